"""Promise: a cell of the paper's tables is what its run has recorded."""

import numpy as np
import pytest

import comparisons
import paper_tables

PER_SEED = (0.7, 0.72, 0.74)


def make_results(at_edge=False):
  """A run of SGD and ASAM."""
  accuracy = {'test_accuracy': {'per_seed': PER_SEED}}
  return {
    'optimizers': {
      'sgd': {'rho': 0.0, **accuracy},
      'asam': {'rho': 0.5, **accuracy},
    },
    'search': {'asam': {'at_edge': at_edge}},
  }


def test_cell():
  """Mean and half of the t-interval, 4.303 sd / sqrt(3); a star at the edge."""
  results = {'inside': make_results(), 'edge': make_results(at_edge=True)}
  assert paper_tables.cell(results, 'inside', 'sgd') == '72.00 ± 4.97'
  assert paper_tables.cell(results, 'inside', 'asam') == '72.00 ± 4.97 (0.5)'
  assert paper_tables.cell(results, 'edge', 'asam') == '72.00 ± 4.97 (0.5*)'
  assert not paper_tables.cell(results, 'edge', 'sam')
  assert not paper_tables.cell(results, 'other', 'sgd')


def test_every_run_is_in_a_table():
  """Each has accuracies of its own, and each of them is in a cell."""
  rng = np.random.default_rng(0)
  results, expected = {}, []
  for name in comparisons.RUNS:
    results[name] = {'optimizers': {}, 'search': {}}
    options = dict(
      option.split('=', 1) for option in comparisons.RUNS[name] if '=' in option
    )
    for method in options.get('--optimizer', 'sgd,sam,asam').split(','):
      per_seed = rng.uniform(size=3)
      results[name]['optimizers'][method] = {
        'rho': 0.0,
        'test_accuracy': {'per_seed': per_seed},
      }
      expected.append(f'{100 * per_seed.mean():.2f} ± ')
  tables = '\n'.join(paper_tables.tables(results))
  assert all(text in tables for text in expected)


def test_figure():
  """Its points are the means, in the order of the wrong labels."""
  rng = np.random.default_rng(0)
  results = {
    name: {
      'optimizers': {
        method: {'test_accuracy': {'per_seed': rng.uniform(size=3)}}
        for method in paper_tables.METHODS
      }
    }
    for name in comparisons.RUNS
  }
  mlp_axes, cnn_axes, paper_axes = paper_tables.draw_noise(results).axes
  for axes, model in ((mlp_axes, 'mlp'), (cnn_axes, 'cnn')):
    for container, method in zip(
      axes.containers, paper_tables.METHODS, strict=True
    ):
      runs = [f'{model}-all'] + [
        f'{model}-noise-{percent}' for percent in (20, 40, 60, 80)
      ]
      means = [
        100
        * np.mean(
          results[run]['optimizers'][method]['test_accuracy']['per_seed']
        )
        for run in runs
      ]
      assert container.lines[0].get_ydata() == pytest.approx(means)
  assert [line.get_ydata()[-1] for line in paper_axes.lines] == [
    *(68.35, 69.92, 67.69)
  ]
