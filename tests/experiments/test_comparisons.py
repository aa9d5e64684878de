"""Promise: comparisons run once, resume, and are the recorded ones."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
import types

import pytest

from experiments import checkpoints
from experiments import cli
from experiments import config
from experiments import run_folder
from experiments.paper import comparisons
from experiments.paper import tables
from experiments.report import records

SHORT = ['--epochs=2', '--seeds=1', '--optimizer=sgd', '--label-noise=0']
RECORDED = tables.load(tables.RESULTS / 'comparisons')


@pytest.fixture
def commands(monkeypatch):
  """The commands of processes that are not started but finish the second time.

  They leave the files that ``experiments.compare`` leaves.
  """
  commands = []

  def run(command, **options):
    del options
    commands.append(shlex.join(command))
    out = pathlib.Path(command[3].removeprefix('--out='))
    if len(commands) == 1:
      (out / run_folder.STARTED_WITH).touch()
      (out / checkpoints.FOLDER).mkdir()
      (out / checkpoints.FOLDER / '1.msgpack').touch()
      return subprocess.CompletedProcess(command, 130)
    options = cli.determining(config.parse(SHORT))
    results = {'complete': True, 'config': options}
    records.write_json(out / 'results.json', results)
    return subprocess.CompletedProcess(command, 0)

  processes = types.SimpleNamespace(run=run, STDOUT=subprocess.STDOUT)
  monkeypatch.setattr(comparisons, 'subprocess', processes)
  monkeypatch.setattr(comparisons, 'ROOT', pathlib.Path.cwd())
  monkeypatch.setattr(comparisons, 'RUNS', {'short': SHORT})
  return commands


def test_resumed_then_kept(commands, tmp_path, monkeypatch, capsys):
  """An interrupted run is resumed; a finished one is kept, or refused.

  Refused if it had other options than the run has now.
  """
  argv = [f'--out={tmp_path}']
  with pytest.raises(SystemExit):
    comparisons.main(argv)
  assert 'short ended with exit code 130' in capsys.readouterr().out
  comparisons.main([*argv, f'--data-dir={tmp_path}'])
  assert 'short finished after' in capsys.readouterr().out
  first, second = commands
  assert shlex.join(SHORT) in first
  assert second.startswith(f'{first} --data-dir=')
  assert second.endswith(' --resume')

  comparisons.main(argv)
  monkeypatch.setattr(comparisons, 'RUNS', {'short': [*SHORT, '--lr=1']})
  with pytest.raises(SystemExit):
    comparisons.main(argv)
  assert 'holds a run with lr = ' in capsys.readouterr().err
  assert len(commands) == 2


def test_interrupted(tmp_path, monkeypatch):
  """Ctrl-C, which also ends the runs in progress, starts no others."""
  started = []

  def run(name, *args):
    del args
    started.append(name)
    time.sleep(0.1)  # Until both are queued.
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    return False

  monkeypatch.setattr(comparisons, 'run', run)
  monkeypatch.setattr(comparisons, 'RUNS', {'first': [], 'second': []})
  with pytest.raises(KeyboardInterrupt), cli.interruptible():
    comparisons.main([f'--out={tmp_path}'])
  time.sleep(0.4)  # Until a second one would have started.
  assert started == ['first']


@pytest.mark.slow
def test_process(tmp_path, monkeypatch, capfd):
  """A run is a process, whose failure is reported and explained."""
  runs = {'short': SHORT, 'wrong': ['--epochs=0']}
  monkeypatch.setattr(comparisons, 'RUNS', runs)
  with pytest.raises(SystemExit):
    comparisons.main([f'--out={tmp_path}'])
  out = capfd.readouterr().out
  assert 'short finished' in out
  assert 'wrong ended with exit code 2' in out
  assert '--epochs' in (tmp_path / 'wrong' / 'output.txt').read_text()
  results = json.loads((tmp_path / 'short' / 'results.json').read_text())
  assert results['complete']


def test_recorded():
  """Every run is recorded, whole, of a clean commit, with today's options."""
  assert set(RECORDED) == set(comparisons.RUNS)
  for name, results in RECORDED.items():
    now = cli.determining(config.parse(comparisons.RUNS[name]))
    assert now.items() <= results['config'].items()
    assert not results['commit'].endswith('-dirty')
    for search in results['search'].values():
      assert len(search['candidates']) == 6
      assert len(search['seeds']) == 1
    for measured in results['optimizers'].values():
      accuracies = measured['test_accuracy']['per_seed']
      assert len(accuracies) == (5 if name.startswith('mlp') else 3)


def test_figure():
  """The lines of a method end at its mean."""
  axes = tables.draw_noise(RECORDED).axes[1]
  drawn = [
    100 * x['test_accuracy']['mean']
    for x in RECORDED['cnn-noise-80']['optimizers'].values()
  ]
  ends = [bars.lines[0].get_ydata()[-1] for bars in axes.containers]
  assert ends == pytest.approx(drawn)
