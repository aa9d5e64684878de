"""Promise: the runs behind the paper's tables are what their page says."""

import json

import numpy as np
import pytest

import comparisons
import experiment
import paper_runs
import records
import train

# What a run has that others of its model do not have, by the rest of its name.
OWN = {
  'all': {},
  'sgd-twice': {'optimizer': ['sgd'], 'epochs': 60},
  'asam-inf': {'optimizer': ['asam'], 'ord': np.inf},
  'asam-biases': {'optimizer': ['asam'], 'normalize_biases': True},
  'asam-filterwise': {'optimizer': ['asam'], 'normalization': 'filterwise'},
  'noise-20': {'label_noise': 0.2},
  'noise-40': {'label_noise': 0.4},
  'noise-60': {'label_noise': 0.6},
  'noise-80': {'label_noise': 0.8},
  **{
    f'm-{m}': {
      'optimizer': ['sam', 'asam'],
      'm_sharpness': m,
      'm_sharpness_by': 'microbatching',
    }
    for m in (32, 8)
  },
  'perturb-normalization': {
    'optimizer': ['sam', 'asam'],
    'perturb': 'normalization',
  },
  'perturb-others': {'optimizer': ['sam', 'asam'], 'perturb': 'others'},
}
OF_ALL = {
  'optimizer': ['sgd', 'sam', 'asam'],
  'epochs': 30,
  'label_noise': 0.0,
  'ord': 2.0,
  'normalize_biases': False,
  'normalization': 'elementwise',
  'm_sharpness': None,
  'm_sharpness_by': 'vmap',
  'perturb': 'all',
  'batch_size': 128,
}
OF_MODEL = {
  'mlp': {'seeds': 5, 'train_size': None, 'merge_held_out': True, 'lr': 0.1},
  'cnn': {'seeds': 3, 'train_size': 10000, 'merge_held_out': False, 'lr': 0.03},
  'cnn-bn': {
    **{'seeds': 3, 'train_size': 10000, 'merge_held_out': False, 'lr': 0.1}
  },
}


@pytest.mark.parametrize('name', comparisons.RUNS)
def test_options(name, tmp_path):
  """The program takes them; they are those that the name says.

  Rho is one of six values, by one seed.
  """
  args = paper_runs.parse(*comparisons.RUNS[name], f'--out={tmp_path / "out"}')
  assert name.startswith(f'{args.model}-')
  own = OWN[name.removeprefix(f'{args.model}-')]
  expected = OF_ALL | OF_MODEL[args.model] | own
  seeds = expected.pop('seeds')
  assert {option: getattr(args, option) for option in expected} == expected
  assert len(args.seeds) == seeds
  assert all(len(candidates) == 6 for candidates in args.rho.values())
  assert set(args.rho) == set(args.optimizer) - {'sgd'}
  assert args.search_seeds == 1 or not args.rho


@pytest.fixture
def short(monkeypatch):
  """A run that takes seconds."""
  options = ['--epochs=2', '--seeds=1', '--optimizer=sgd', '--label-noise=0']
  monkeypatch.setattr(comparisons, 'RUNS', {'short': options})


def test_finished_runs_are_kept(short, tmp_path, capfd):
  """Repeated, the command does nothing more."""
  comparisons.main([f'--out={tmp_path}'])
  assert 'short finished after' in capfd.readouterr().out
  file = tmp_path / 'short' / 'results.json'
  written = file.stat().st_mtime_ns
  comparisons.main([f'--out={tmp_path}'])
  assert file.stat().st_mtime_ns == written
  assert not capfd.readouterr().out


def test_interrupted_runs_go_on(short, tmp_path, monkeypatch):
  """What has begun is resumed; commits and times of its parts are kept."""
  train_epoch = experiment.Experiment._train_epoch

  def interrupt(self, epoch, *rest):
    if epoch == 1:
      raise KeyboardInterrupt
    self._began -= 1000  # As if it had taken longer.
    return train_epoch(self, epoch, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(experiment.Experiment, '_train_epoch', interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.main([*comparisons.RUNS['short'], f'--out={tmp_path / "short"}'])
  comparisons.main([f'--out={tmp_path}'])
  results = json.loads((tmp_path / 'short' / 'results.json').read_text())
  assert results['complete']
  assert results['command'].endswith(' --resume')
  assert results['resumed_from'] == [records.git_commit()]
  assert results['wall_time_s'] > 1000


def test_runs_of_other_options(short, tmp_path, monkeypatch, capsys):
  """What was finished with other options is not taken for the run of now."""
  comparisons.main([f'--out={tmp_path}'])
  options = [*comparisons.RUNS['short'], '--lr=1']
  monkeypatch.setattr(comparisons, 'RUNS', {'short': options})
  with pytest.raises(SystemExit):
    comparisons.main([f'--out={tmp_path}'])
  assert 'holds a run with other options' in capsys.readouterr().err


def test_failed_run(short, tmp_path, capfd):
  """Its file of output says why."""
  paper_runs.parse('--epochs=1', f'--out={tmp_path / "short"}')
  with pytest.raises(SystemExit) as exit_info:
    comparisons.main([f'--out={tmp_path}'])
  assert exit_info.value.code == 1
  assert 'short ended with exit code 2' in capfd.readouterr().out
  output = (tmp_path / 'short' / 'output.txt').read_text()
  assert 'argument --resume: the run was started with' in output


def test_unknown_run(tmp_path, capsys):
  """The error lists those that there are."""
  with pytest.raises(SystemExit):
    comparisons.main(['mlp', f'--out={tmp_path}'])
  error = capsys.readouterr().err
  assert "there is no run 'mlp'" in error
  assert all(name in error for name in comparisons.RUNS)
