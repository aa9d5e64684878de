"""Promise: a cell of the paper's tables is what its run has recorded."""

import json

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


# Where the table of image classification has a method: its row.
ROWS = {
  ('all', 'sgd'): 'SGD',
  ('all', 'sam'): 'SAM',
  ('all', 'asam'): 'ASAM',
  ('sgd-twice', 'sgd'): 'SGD, twice the epochs',
  ('asam-inf', 'asam'): 'ASAM, p = inf',
  ('asam-biases', 'asam'): 'ASAM, biases normalized',
  ('asam-filterwise', 'asam'): 'ASAM, filter-wise',
}
# Where other tables have a run: table and row.
OTHER_ROWS = {
  **{f'noise-{percent}': (0, f'{percent} %') for percent in (20, 40, 60, 80)},
  **{f'm-{m}': (1, str(m)) for m in (32, 8)},
  'perturb-normalization': (2, 'BatchNorm alone'),
  'perturb-others': (2, 'all but BatchNorm'),
}
TITLES = {
  ('mlp', 0): 'MLP, wrong labels',
  ('cnn', 0): 'CNN, wrong labels',
  ('mlp', 1): 'MLP, examples that share a perturbation',
  ('cnn-bn', 2): 'CNN with BatchNorm, layers perturbed',
}


def make_all_results():
  """All runs, each method with accuracies of its own."""
  rng = np.random.default_rng(0)
  results = {}
  for name in comparisons.RUNS:
    options = dict(
      option.split('=', 1) for option in comparisons.RUNS[name] if '=' in option
    )
    methods = options.get('--optimizer', 'sgd,sam,asam').split(',')
    results[name] = {
      'optimizers': {
        method: {
          'rho': 0.0,
          'test_accuracy': {'per_seed': rng.uniform(size=3)},
        }
        for method in methods
      },
      'search': {},
    }
  return results


def read_tables(tables):
  """From (title, row, column) to a cell."""
  cells = {}
  for table in tables:
    header, _, *rows = (line[2:-2].split(' | ') for line in table.split('\n'))
    for row in rows:
      for column, value in zip(header[1:], row[1:], strict=True):
        cells[header[0], row[0], column] = value
  return cells


def test_every_run_is_in_its_cell():
  """The mean of each method of each run is where one looks for it."""
  results = make_all_results()
  cells = read_tables(paper_tables.tables(results))
  for name, result in results.items():
    model = max(
      (each for each in comparisons.MODELS if name.startswith(f'{each}-')),
      key=len,
    )
    variant = name.removeprefix(f'{model}-')
    for method, optimizer in result['optimizers'].items():
      if variant in OTHER_ROWS:
        table, row = OTHER_ROWS[variant]
        place = TITLES[model, table], row, method.upper()
      elif model == 'cnn-bn':
        place = TITLES[model, 2], 'all', method.upper()
      else:
        place = '', ROWS[variant, method], model.upper()
      mean = 100 * np.mean(optimizer['test_accuracy']['per_seed'])
      assert cells[place].startswith(f'{mean:.2f} ± '), place
  assert cells['CNN, wrong labels', '0 %', 'SAM'] == cells['', 'SAM', 'CNN']


def test_figure():
  """Its points are the means, in the order of the wrong labels."""
  results = make_all_results()
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


def test_program(tmp_path, capsys):
  """It reads what comparisons.py has written, and leaves out what goes on."""
  with pytest.raises(SystemExit):
    paper_tables.main([str(tmp_path)])
  assert 'there is no run in' in capsys.readouterr().err
  for name, complete in (('mlp-all', True), ('mlp-noise-20', False)):
    (tmp_path / name).mkdir()
    results = make_results() | {'complete': complete}
    results['optimizers']['sam'] = results['optimizers']['sgd']
    (tmp_path / name / 'results.json').write_text(json.dumps(results))
  paper_tables.main([str(tmp_path)])
  cells = read_tables(capsys.readouterr().out.strip().split('\n\n'))
  assert cells['MLP, wrong labels', '0 %', 'ASAM'] == '72.00 ± 4.97 (0.5)'
  assert not cells['MLP, wrong labels', '20 %', 'ASAM']
  assert (tmp_path / 'noise.png').exists()
