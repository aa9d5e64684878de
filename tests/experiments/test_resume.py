"""Promise: no run of the comparison program loses what it or another computed.

Interrupted and resumed, it ends with the same bits as without interruption.
"""

import errno
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from matplotlib import image
import pytest

from experiments import checkpoints
from experiments import cli
from experiments import compare
from experiments import loop
from experiments import run_folder
from experiments.paper import budget
from experiments.paper import budget_sharpness
from experiments.paper import correlation
from experiments.report import records
from tests.helpers.support import assert_same_bits
from tests.helpers.support import program_env

pytestmark = pytest.mark.usefixtures('quickly_compiled')

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
  *('--optimizer=sgd,asam', '--rho=0.5,1', '--search-seeds=1', '--every-k=2'),
  *('--epochs=2', '--seeds=2', '--train-size=200'),
]
# Two epochs of the two runs of the search, then four runs an epoch.
SECOND_FINAL_EPOCH = 2 * 2 + 4 + 1


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  """Compiles once for all runs of this file."""
  names = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs')
  before = [getattr(jax.config, f'jax_{name}') for name in names]
  folder = str(tmp_path_factory.mktemp('cache'))
  for name, value in zip(names, (folder, 0), strict=True):
    jax.config.update(f'jax_{name}', value)
  yield
  for name, value in zip(names, before, strict=True):
    jax.config.update(f'jax_{name}', value)


def run(out, *arguments):
  """The status with which the program ends."""
  try:
    compare.main([*ARGUMENTS, *arguments, f'--out={out}'])
  except SystemExit as error:
    return error.code
  return 0


def computed(out):
  """What results.json holds, without times and what says how it was run."""

  def strip(value):
    if not isinstance(value, dict):
      return value
    return {
      key: strip(item)
      for key, item in value.items()
      if 'second' not in key
      and key not in ('ms_per_step', 'time_ratio_to_first', 'wall_time_s')
      and key not in ('command', 'commit', 'resumed_from', 'out', 'resume')
    }

  return strip(json.loads((out / 'results.json').read_text()))


def names(out):
  """What a folder holds, but for the lock."""
  return sorted({path.name for path in out.iterdir()} - {run_folder.LOCK})


@pytest.fixture(scope='module')
def untouched(tmp_path_factory, cache):
  """The folder of a run without interruption."""
  del cache
  out = tmp_path_factory.mktemp('untouched')
  assert run(out) == 0
  assert names(out) == ['curves.png', 'results.json']
  return out


@pytest.fixture
def fail(monkeypatch):
  """Makes the n-th call of a method raise an error, and those after it not."""

  def fail_at(owner, name, n, error):
    calls, method = 0, getattr(owner, name)

    def call(*args, **kwargs):
      nonlocal calls
      calls += 1
      if calls == n:
        raise error
      return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)

  return fail_at


def test_interrupted(untouched, tmp_path, fail, capsys):
  """Ctrl-C leaves valid results so far, and --resume computes the rest."""
  fail(loop.Group, 'train_epoch', SECOND_FINAL_EPOCH, KeyboardInterrupt())
  assert run(tmp_path) == 130
  output = capsys.readouterr()
  assert 'with --resume' in ' '.join(output.out.split())
  assert 'Traceback' not in output.err
  results = json.loads((tmp_path / 'results.json').read_text())
  assert not results['complete']
  assert len(results['optimizers']['sgd']['curves']['train_loss']) == 1
  assert 'test_accuracy' not in results['optimizers']['sgd']
  assert image.imread(tmp_path / 'curves.png').ndim == 3
  assert run(tmp_path) == 2
  assert 'interrupted. Write --resume' in capsys.readouterr().err
  assert run(tmp_path, '--resume', '--lr=1') == 2
  assert 'was started with lr = 0.1' in capsys.readouterr().err
  assert run(tmp_path, '--resume') == 0
  assert computed(tmp_path) == computed(untouched)
  assert names(tmp_path) == ['curves.png', 'results.json']


PROGRAM = """
import os, pathlib, signal, sys
from experiments import compare

def write_half(path, content, write=pathlib.Path.write_bytes):
  if path.name == '.partial-3.msgpack':
    write(path, content[:len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
  return write(path, content)

pathlib.Path.write_bytes = write_half
compare.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_in_a_write(untouched, tmp_path, tmp_path_factory):
  """Killed while it writes a checkpoint, and resumed: the same bits."""
  env = program_env(tmp_path_factory.mktemp('cache'))
  env['XLA_FLAGS'] = os.environ['XLA_FLAGS']  # Other devices, other bits.
  killed = subprocess.run(
    [sys.executable, '-c', PROGRAM, *ARGUMENTS, f'--out={tmp_path}'],
    capture_output=True,
    check=False,
    cwd=ROOT,
    env=env,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert names(tmp_path) == ['checkpoints', 'checkpoints.json']
  assert run(tmp_path, '--resume') == 0
  assert computed(tmp_path) == computed(untouched)


def test_damaged_checkpoint(untouched, tmp_path, fail, capsys):
  """A damaged checkpoint is reported, and the one before is used."""
  fail(loop.Group, 'train_epoch', SECOND_FINAL_EPOCH, KeyboardInterrupt())
  run(tmp_path)
  os.truncate(tmp_path / 'checkpoints' / '3.msgpack', 1000)
  assert run(tmp_path, '--resume') == 0
  assert 'Checkpoint 3 is damaged' in capsys.readouterr().out
  assert computed(tmp_path) == computed(untouched)


def test_finished_run_is_kept(untouched, fail, capsys):
  """Other options are refused; the same, interrupted, replace nothing."""
  before = {path: path.read_bytes() for path in untouched.iterdir()}
  assert run(untouched, '--lr=0.2') == 2
  error = capsys.readouterr().err
  assert 'holds the results of a run with lr = 0.1, but got 0.2.' in error
  # Interrupted at once, nothing is left that blocks the next start.
  fail(loop.Group, 'compile', 1, KeyboardInterrupt())
  assert run(untouched) == 130
  assert not (untouched / run_folder.STARTED_WITH).exists()
  fail(loop.Group, 'train_epoch', SECOND_FINAL_EPOCH, KeyboardInterrupt())
  assert run(untouched) == 130
  assert '--resume' in capsys.readouterr().err
  assert (
    before.items()
    <= {
      path: path.read_bytes() for path in untouched.iterdir() if path.is_file()
    }.items()
  )
  run_folder.clear(untouched)


def test_stale_checkpoints(tmp_path):
  """They are cleared where checkpoints.json was removed, as it is advised."""
  with run_folder.claim(tmp_path, {}, resume=False):
    checkpoints.Checkpoints(tmp_path / 'checkpoints').save(7, states(0), {})
  (tmp_path / 'checkpoints' / '.partial-8.msgpack').touch()
  (tmp_path / '.partial-results.json').touch()
  (tmp_path / 'checkpoints.json').unlink()
  with run_folder.claim(tmp_path, {}, resume=False):
    assert names(tmp_path) == ['checkpoints.json']


def test_find_change():
  """A new option is a change; a new task or method is not."""
  find = run_folder.find_change
  assert not find({}, {'lr': 1})
  assert not find({'lr': 1, 'old': 2}, {'lr': 1})
  assert find({'old': 2}, {'lr': 1}) == 'lr = null, but got 1'
  tasks = lambda **tasks: {'tasks': tasks}
  assert not find(tasks(a=1, b=2), tasks(b=2, c=3))
  assert find(tasks(a=1), tasks(a=2)) == 'tasks: a = 1, but got 2'
  assert find(tasks(a=1), tasks(b=1)) == 'tasks: a, but got b'


def test_two_processes(tmp_path, capsys):
  """The second is told which process has the folder."""
  with run_folder.claim(tmp_path, {}, resume=False):
    for arguments in ([], ['--resume']):
      assert run(tmp_path, *arguments) == 2
      assert capsys.readouterr().err == (
        f"compare: error: argument --out: a run is in progress in '{tmp_path}'"
        f' by process {os.getpid()}. Wait until it has ended, or write another'
        f' --out.\n'
      )


@pytest.mark.parametrize('program', [budget, budget_sharpness, correlation])
def test_two_processes_that_always_resume(program, tmp_path, capsys):
  """Neither overwrites what the other writes."""
  with run_folder.lock(tmp_path, {}):
    records.write_started(tmp_path / run_folder.STARTED_WITH, {})
    with pytest.raises(SystemExit):
      program.main([f'--out={tmp_path}'])
  assert f'by process {os.getpid()}' in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'n'), [('write_bytes', 3), ('write_text', 2)])
def test_full_disk(untouched, tmp_path, fail, capsys, name, n):
  """One line, whether a checkpoint or results.json fails; then it goes on."""
  error = OSError(errno.ENOSPC, 'No space left on device')
  fail(Path, name, n, error)
  assert run(tmp_path) == 1
  message = capsys.readouterr().err.splitlines()[-1]
  assert message.startswith('compare: error: cannot write to ')
  assert 'No space left on device' in message
  assert 'Traceback' not in message
  assert not list(tmp_path.rglob('.partial-*'))
  assert run(tmp_path, '--resume') == 0
  assert computed(tmp_path) == computed(untouched)


def test_interrupted_before_training(tmp_path, fail, capsys):
  """One line, and nothing that blocks the next start."""
  fail(loop.Group, 'compile', 1, KeyboardInterrupt())
  assert run(tmp_path) == 130
  assert capsys.readouterr().err == (
    'Interrupted before the first epoch was trained.\n'
  )
  assert names(tmp_path) == []


def test_interrupted_import(tmp_path):
  """Ctrl-C while the program imports JAX is one line."""
  (tmp_path / 'jax.py').write_text(
    'import os, signal, time\n'
    'os.kill(os.getpid(), signal.SIGINT)\n'
    'time.sleep(60)\n'
  )
  path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
  ended = subprocess.run(
    [sys.executable, '-m', 'experiments.compare', f'--out={tmp_path / "out"}'],
    capture_output=True,
    check=False,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': path},
    text=True,
  )
  assert ended.returncode == 130
  assert (ended.stdout, ended.stderr) == ('', 'Interrupted.\n')
  assert not (tmp_path / 'out').exists()


def test_swallowed_interrupt(monkeypatch):
  """Ctrl-C inside a callback that ignores exceptions is not lost."""

  class Callback:
    """Its exceptions are ignored, like those of JAX's garbage collection."""

    def __del__(self):
      signal.raise_signal(signal.SIGINT)

  @cli.interruptible()
  def block():
    Callback()
    time.sleep(60)

  monkeypatch.setattr(sys, 'unraisablehook', lambda _: None)
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    block()
  assert signal.getsignal(signal.SIGINT) is before


def states(seed):
  """What a checkpoint may hold: arrays of several dtypes, and keys."""
  key = jax.random.key(seed)
  return {
    'weights': jax.random.normal(key, (300,)),
    'half': jax.random.normal(key, (3,), jnp.bfloat16),
    'step': jnp.int32(seed),
    'key': key,
  }


def data_of(tree):
  """``tree`` with the data of its keys."""
  return {**tree, 'key': jax.random.key_data(tree['key'])}


def flip(content):
  """Changes a bit in the middle."""
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
  ('damage', 'damaged'),
  [
    (None, ()),
    *[
      (damage, damaged)
      for damage in (flip, lambda content: content[:-1])
      for damaged in ((3,), (2, 3))
    ],
  ],
)
def test_checkpoints(tmp_path, damage, damaged):
  """The newest intact one of two comes back bit for bit, keys and all."""
  saved = checkpoints.Checkpoints(tmp_path)
  for step in (1, 2, 3):
    saved.save(step, states(step), {'losses': [0.1 * step, None]})
  assert saved.steps == [2, 3]
  for step in damaged:
    file = tmp_path / f'{step}.msgpack'
    file.write_bytes(damage(file.read_bytes()))
  reports = []
  restored = saved.restore(lambda _: states(0), reports.append)
  if len(damaged) == 2:
    assert restored is None
    assert 'starts from the beginning' in reports.pop()
  else:
    tree, progress = restored
    newest = 3 - len(damaged)
    assert_same_bits(data_of(tree), data_of(states(newest)))
    assert progress == {'losses': [0.1 * newest, None]}
  assert [report.split()[1] for report in reports] == [
    str(step) for step in reversed(damaged)
  ]
  if restored is None:  # A run that starts again keeps its checkpoints.
    saved.save(1, states(5), {})
  else:
    saved.save(3, states(5), {})
  again, _ = saved.restore(lambda _: states(0), reports.append)
  assert_same_bits(data_of(again), data_of(states(5)))
