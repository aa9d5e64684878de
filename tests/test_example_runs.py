"""Promise: a run of the training program survives what befalls it.

Killed and resumed, it ends with the same bits as one that nothing befell.
"""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys

from matplotlib import image
import pytest

from support import program_env

EXAMPLES = Path(__file__).parents[1] / 'examples'
ARGUMENTS = [
  *('--optimizer=sgd,asam', '--rho=0.5,1', '--every-k=2'),
  *('--epochs=3', '--seeds=2'),
]

# Runs train.py, and sends it a signal when `trigger` says so.
PROGRAM = """
import os, pathlib, signal, sys, threading, time
sys.path.insert(0, {examples!r})
import train, groups
from orbax import checkpoint

out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])
calls = 0

# What a shell starts in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

def strike():
  os.kill(os.getpid(), signal.{signal})

def in_a_step(self, epoch, train_epoch=groups.Group.train_epoch):
  # There are 4 runs of the search, and then 4: in the second epoch of these.
  global calls
  calls += 1
  if calls == 3 * 4 + 4 + 2:
    threading.Timer(0.001, strike).start()
  return train_epoch(self, epoch)

def in_a_write(self, step, *args, save=checkpoint.CheckpointManager.save, **kw):
  def watch():
    while not list(out.glob('checkpoints/*tmp*')):
      time.sleep(1e-4)
    strike()
  if step == 4:
    threading.Thread(target=watch, daemon=True).start()
  return save(self, step, *args, **kw)

if {when!r} == 'step':
  groups.Group.train_epoch = in_a_step
elif {when!r} == 'write':
  checkpoint.CheckpointManager.save = in_a_write
try:
  train.main(sys.argv[1:])
except KeyboardInterrupt:
  sys.exit(130)
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs the program in a folder, with a signal or without."""
  env = program_env(tmp_path_factory.mktemp('cache'))

  def run_in(out, *arguments, signal='SIGKILL', when='never'):
    program = PROGRAM.format(examples=str(EXAMPLES), signal=signal, when=when)
    return subprocess.run(
      [sys.executable, '-c', program, *ARGUMENTS, *arguments, '--out', out],
      capture_output=True,
      check=False,
      encoding='utf-8',
      env=env,
    )

  return run_in


def computed(out):
  """What results.json of a run holds, without times and without its command."""

  def strip(value):
    if isinstance(value, dict):
      return {
        key: strip(item)
        for key, item in value.items()
        if 'second' not in key
        and key not in ('ms_per_step', 'time_ratio_to_first', 'wall_time_s')
        and key not in ('command', 'commit', 'resumed_from', 'out', 'resume')
      }
    return value

  return strip(json.loads((out / 'results.json').read_text()))


def unwrapped(text):
  """``text`` without its ends of lines."""
  return ' '.join(text.split())


@pytest.fixture(scope='module')
def untouched(run, tmp_path_factory):
  """The results of a run that nothing befell."""
  out = tmp_path_factory.mktemp('untouched')
  ended = run(out)
  assert ended.returncode == 0, ended.stderr
  return computed(out)


@pytest.mark.parametrize('when', ['step', 'write'])
def test_killed(run, untouched, tmp_path, when):
  """Killed in a step or in a write, and resumed: the same bits."""
  assert run(tmp_path, when=when).returncode == -signal.SIGKILL
  assert not (tmp_path / 'results.json').exists()
  resumed = run(tmp_path, '--resume')
  assert resumed.returncode == 0, resumed.stderr
  assert computed(tmp_path) == untouched
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'curves.png',
    'results.json',
  ]


def test_truncated_checkpoint(run, untouched, tmp_path):
  """A damaged checkpoint is reported, and the one before is used."""
  run(tmp_path, when='step')
  newest = max(
    (path for path in (tmp_path / 'checkpoints').iterdir()),
    key=lambda path: int(path.name),
  )
  file = max(
    (path for path in (newest / 'states').rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  os.truncate(file, file.stat().st_size // 2)
  resumed = run(tmp_path, '--resume')
  assert resumed.returncode == 0, resumed.stderr
  assert f'Checkpoint {newest.name} is damaged' in unwrapped(resumed.stdout)
  assert computed(tmp_path) == untouched


def test_interrupted(run, untouched, tmp_path):
  """Ctrl-C leaves valid results so far, and the run goes on later."""
  ended = run(tmp_path, signal='SIGINT', when='step')
  assert ended.returncode == 130
  assert 'repeat the command with --resume' in unwrapped(ended.stdout)
  results = json.loads((tmp_path / 'results.json').read_text())
  assert not results['complete']
  assert len(results['optimizers']['sgd']['curves']['train_loss']) == 1
  assert 'test_accuracy' not in results['optimizers']['sgd']
  assert image.imread(tmp_path / 'curves.png').ndim == 3
  refused = run(tmp_path)
  assert refused.returncode == 2
  assert 'interrupted. Write --resume' in refused.stderr
  other = run(tmp_path, '--resume', '--lr=1')
  assert other.returncode == 2
  assert 'was started with lr = 0.1' in other.stderr
  assert run(tmp_path, '--resume').returncode == 0
  assert computed(tmp_path) == untouched
