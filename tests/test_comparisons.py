"""Promise: the runs behind the paper's tables are what their page says."""

import types

import numpy as np
import pytest

import arguments
import comparisons
import data


@pytest.fixture
def fashion_mnist(monkeypatch):
  """As many images as Fashion-MNIST has, and nothing on them."""

  def load(parser, args):
    del parser
    size = args.train_size or 60000
    split = lambda n: data.Split(
      np.zeros((n, 28, 28, 1), np.uint8), np.zeros(n, np.int32)
    )
    return types.SimpleNamespace(
      train=split(size), test=split(10000), num_classes=10
    )

  monkeypatch.setattr(arguments, 'load_dataset', load)


@pytest.mark.parametrize('name', comparisons.RUNS)
def test_options(name, fashion_mnist, tmp_path):
  """The program takes them; rho is one of six by one seed; seeds by model."""
  args, _ = arguments.parse(
    [*comparisons.RUNS[name], f'--out={tmp_path / "out"}']
  )
  assert all(len(candidates) == 6 for candidates in args.rho.values())
  assert set(args.rho) == set(args.optimizer) - {'sgd'}
  assert args.search_seeds == 1 or not args.rho
  assert len(args.seeds) == (5 if args.model == 'mlp' else 3)
  percent = name.partition('-noise-')[2] or '0'
  assert args.label_noise == pytest.approx(int(percent) / 100)


@pytest.fixture
def short(monkeypatch):
  """A run that takes seconds."""
  options = ['--epochs=1', '--seeds=1', '--optimizer=sgd', '--label-noise=0']
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


def test_interrupted_runs_go_on(short, tmp_path, fashion_mnist, capfd):
  """What has begun is resumed, and the program says with which options."""
  arguments.parse(['--epochs=2', f'--out={tmp_path / "short"}'])
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
