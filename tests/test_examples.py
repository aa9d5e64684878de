"""The demo program: what it writes and prints, and what it refuses."""

import importlib
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
from matplotlib import image
import numpy as np
import pytest
import scipy.stats

EXAMPLES = Path(__file__).parents[1] / 'examples'
sys.path.insert(0, str(EXAMPLES))

arguments, data, evaluation, models, reporting, search = map(
  importlib.import_module,
  ('arguments', 'data', 'evaluation', 'models', 'reporting', 'search'),
)

SEARCH = ('--seeds=2', '--rho-sam=0.05,0.1', '--rho-asam=0.5,1')
NO_PERTURBATION = ('--seeds=4,1', '--rho-sam=0', '--rho-asam=0')


@pytest.fixture(scope='module')
def run_program(tmp_path_factory):
  """Runs train.py, whose programs are compiled once for the whole module."""
  cache = tmp_path_factory.mktemp('cache')
  env = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONIOENCODING': 'utf-8',
  }

  def run(*args):
    return subprocess.run(
      [sys.executable, EXAMPLES / 'train.py', *args],
      capture_output=True,
      check=False,
      encoding='utf-8',
      env=env,
    )

  return run


@pytest.fixture(scope='module')
def searched(run_program, tmp_path_factory):
  """The folder and the output of a run with a search."""
  out = tmp_path_factory.mktemp('out') / 'new' / 'folder'
  process = run_program('--epochs=2', *SEARCH, '--out', out)
  assert process.returncode == 0, process.stderr
  return out, process.stdout


def read(out):
  return json.loads((out / 'results.json').read_text())


def without_times(results):
  """``results`` without what differs between two runs that are the same."""
  times = {'ms_per_step', 'time_ratio_to_sgd', 'seconds_per_step'}
  if isinstance(results, dict):
    return {
      key: without_times(value)
      for key, value in results.items()
      if key not in times | {'wall_time_s', 'command', 'out'}
    }
  return results


def test_results_hold_what_ran_and_what_came_out(searched):
  out, _ = searched
  results = read(out)
  assert '--rho-sam=0.05,0.1' in results['command']
  assert set(results) == {
    *('command', 'commit', 'versions', 'device', 'config'),
    *('search', 'optimizers', 'wall_time_s'),
  }
  assert set(results['versions']) == {
    *('python', 'jax', 'flax', 'optax', 'optax_asam')
  }
  assert results['config']['seeds'] == [0, 1]
  assert set(results['optimizers']) == {'SGD', 'SAM', 'ASAM'}
  for result in results['optimizers'].values():
    assert np.shape(result['curves']['train_loss']) == (2, 2)
    assert np.shape(result['curves']['held_out_accuracy']) == (2, 2)
    assert result['train_loss']['per_seed'] == result['curves']['train_loss'][1]
    assert len(result['curves']['seconds_per_step']) == 2
    assert result['ms_per_step'] > 0
    for quantity in (
      *('test_accuracy', 'held_out_accuracy', 'train_loss'),
      *('sharpness_sam_ball', 'sharpness_asam_ball'),
    ):
      low, high = result[quantity]['interval_95']
      assert len(result[quantity]['per_seed']) == 2
      assert low < result[quantity]['mean'] < high
  assert results['optimizers']['SGD']['time_ratio_to_sgd'] == 1


def test_search_uses_other_seeds_and_its_best_candidate_is_trained(searched):
  results = read(searched[0])
  for name, rhos in (('SAM', [0.05, 0.1]), ('ASAM', [0.5, 1])):
    found = results['search'][name]
    scores = [c['held_out_accuracy']['mean'] for c in found['candidates']]
    assert [c['rho'] for c in found['candidates']] == rhos
    assert found['seeds'] == [2, 3]
    assert found['rho'] == rhos[np.argmax(scores)]
    assert results['optimizers'][name]['rho'] == found['rho']


def test_figure_decodes_and_nothing_else_is_left(searched):
  out, _ = searched
  assert sorted(path.name for path in out.iterdir()) == [
    'curves.png',
    'results.json',
  ]
  height, width, _ = image.imread(out / 'curves.png').shape
  assert (height, width) == (540, 1200)


def test_tables_are_printed_with_what_the_file_holds(searched):
  out, stdout = searched
  results = read(out)
  rows = [line.split() for line in stdout.splitlines()]
  for name, result in results['optimizers'].items():
    mean = result['test_accuracy']['mean']
    half_width = result['test_accuracy']['interval_95'][1] - mean
    [row] = [row for row in rows if row[:1] == [name]]
    assert row[1:6] == [
      f'{result["rho"]:g}',
      f'{100 * mean:.2f}',
      '±',
      f'{100 * half_width:.2f}',
      f'{result["train_loss"]["mean"]:.3f}',
    ]
  candidates = [results['search'][name]['candidates'] for name in ('SAM', 'ASAM')]
  for sam, asam in zip(*candidates, strict=True):
    row = []
    for candidate in (sam, asam):
      score = candidate['held_out_accuracy']['mean']
      row += [f'{candidate["rho"]:g}', f'{100 * score:.1f}']
    assert row in [[cell.rstrip('*') for cell in row] for row in rows]
  # Of two candidates, either is at the edge.
  for name in ('SAM', 'ASAM'):
    rho = results['search'][name]['rho']
    assert f'{name}: rho = {rho:g} is at the edge' in stdout


def test_results_are_deterministic(searched, run_program, tmp_path):
  process = run_program('--epochs=2', *SEARCH, '--out', tmp_path)
  assert process.returncode == 0, process.stderr
  first, second = read(searched[0]), read(tmp_path)
  assert without_times(first) == without_times(second)


def test_without_perturbation_all_three_are_sgd(run_program, tmp_path):
  process = run_program('--epochs=2', *NO_PERTURBATION, '--out', tmp_path)
  assert process.returncode == 0, process.stderr
  results = read(tmp_path)
  assert results['search'] == {}
  assert 'Choice of rho' not in process.stdout
  curves = {
    name: result['curves']['train_loss']
    for name, result in results['optimizers'].items()
  }
  np.testing.assert_allclose(curves['SAM'], curves['SGD'], rtol=1e-5)
  np.testing.assert_allclose(curves['ASAM'], curves['SGD'], rtol=1e-5)
  assert curves['SGD'][0] > curves['SGD'][1]
  # The seeds make a difference.
  assert curves['SGD'][0][0] != curves['SGD'][0][1]
