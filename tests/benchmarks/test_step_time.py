"""Promise: step times are compared within rounds, and all are written."""

import json
import math
import time

import jax
import numpy as np
import pytest

from benchmarks import compiled
from benchmarks import models
from benchmarks import step_time
from benchmarks import step_time_report
from benchmarks import steps
from benchmarks import timing


def test_interleaved_rounds():
  """On a machine that slows down, the ratio is that of the same rounds."""
  now, order = 0.0, []

  def runner(name, seconds, steps):
    def run(n):
      nonlocal now
      order.append(name)
      slowdown = 1 + 0.5 * ((len(order) - 1) // 3)  # from round to round
      now += n * seconds * slowdown

    return timing.Runner(run, steps)

  runners = {
    'base': runner('base', 0.01, 1),
    'two': runner('two', 0.02, 1),
    'cycle': runner('cycle', 0.06, 5),
  }
  times = timing.interleave(
    runners, 60.0, min_rounds=4, max_rounds=8, clock=lambda: now
  )
  rounds = [order[i : i + 3] for i in range(6, len(order), 3)]
  assert len(rounds) == 8
  assert all(sorted(each) == sorted(runners) for each in rounds)
  assert len(set(map(tuple, rounds))) > 1
  assert times['base'].max() > 2 * times['base'].min()
  for name, expected in {'two': 2.0, 'cycle': 1.2}.items():
    np.testing.assert_allclose(
      timing.ratio(times[name], times['base']), expected
    )
  # Without time, the least number of rounds is made.
  assert (
    len(
      timing.interleave(runners, 0.0, min_rounds=4, clock=lambda: now)['base']
    )
    == 4
  )


def test_interval():
  """The interval holds the median, and is as wide as rounds differ."""
  ratios = 2 + 0.1 * np.random.default_rng(1).standard_normal(200)
  median, low, high = timing.ratio(ratios, np.ones(200))
  assert low < median < high
  assert 0.01 < high - low < 0.08


@pytest.fixture(scope='module')
def results(tmp_path_factory, quickly_compiled):
  """What a short run of every method on a small model writes."""
  out = tmp_path_factory.mktemp('step_time')
  argv = ['--models', 'tiny', '--max-rounds', '2', '--min-rounds', '2']
  step_time.main([*argv, '--out', str(out)])
  return json.loads((out / 'step_time.json').read_text())


def test_results(results):
  """Every method has a row with all keys, and base has ratios of one."""
  assert set(results) == {'machine', 'versions', 'commit', 'rows'}
  rows = {row['method']: row for row in results['rows']}
  jax_methods = [
    name for name in step_time.METHODS if name not in step_time.TORCH
  ]
  assert set(rows) == {*steps.METHODS, 'late_20'}
  assert set(rows) <= set(jax_methods)
  for row in rows.values():
    assert tuple(row) == timing.KEYS
    assert all(
      isinstance(row[key], (int, float)) and row[key] > 0
      for key in timing.KEYS[2:]
    )
    assert row['step_over_base_low'] <= row['step_over_base_high']
  assert [rows['base'][key] for key in timing.KEYS[3:8]] == [1.0] * 5
  assert rows['two_gradients']['instructions'] > rows['base']['instructions']
  # Late in training, one step in five is ASAM's, as with every fifth.
  assert rows['late_20']['bytes_accessed'] == rows['every_5']['bytes_accessed']


def test_out_of_time(tmp_path, monkeypatch, capsys):
  """What is finished until then does not replace a file with all models."""

  def measure(name, *args, **options):
    del args, options
    time.sleep(0.2)
    row = dict.fromkeys(timing.KEYS, 1.0)
    return [row | {'model': name, 'method': 'base'}]

  monkeypatch.setattr(step_time, 'measure', measure)
  file = tmp_path / 'step_time.json'
  file.write_text('{}')
  argv = ['--models', 'tiny', 'MLP', '--minutes=0.003', f'--out={tmp_path}']
  with pytest.raises(SystemExit, match='No time is left for MLP'):
    step_time.main(argv)
  assert 'Finished models are in' in capsys.readouterr().err
  assert file.read_text() == '{}'


def test_report(results):
  """The page gets a table of each file, and the chart a panel of each model."""
  text = 'a\n\n<!-- step_time -->\n\nold\n\n<!-- end -->\n\nb <!-- end -->'
  made = step_time_report.page(text, {'step_time': results})
  assert made.startswith('a\n\n<!-- step_time -->\n\n')
  assert made.endswith('\n\n<!-- end -->\n\nb <!-- end -->')
  assert 'old' not in made
  assert '| `base` | 1.00 |' in made
  assert step_time_report.page(made, {'step_time': results}) == made
  figure = step_time_report.chart({'step_time': results})
  assert [axes.get_title() for axes in figure.axes] == ['tiny']


def test_failures_are_reported(capsys, monkeypatch):
  """A method that fails costs its own row alone."""

  def fail(model, base_tx):
    raise ValueError('broken')

  monkeypatch.setitem(steps.METHODS, 'asam', fail)
  rows = step_time.measure(
    'tiny', 'cpu', methods=['asam'], seconds=0, min_rounds=1
  )
  assert [row['method'] for row in rows] == ['base']
  assert 'tiny, asam: ValueError: broken' in capsys.readouterr().err


def test_interrupted_run(tmp_path, capsys, monkeypatch):
  """It keeps the finished models where no report finds them, and says so."""
  out = tmp_path / 'results'
  row = timing.make_row('MLP', 'base', 4, np.ones(3), np.ones(3))

  def measure(name, *args, **kwargs):
    if name == 'LM':
      raise KeyboardInterrupt
    return [row]

  monkeypatch.setattr(step_time, 'measure', measure)
  monkeypatch.setattr(step_time_report, 'ROOT', tmp_path)
  with pytest.raises(KeyboardInterrupt):
    step_time.main(['--models', 'MLP', 'LM', '--out', str(out)])
  assert step_time_report.load() == {}
  [path] = out.iterdir()
  assert json.loads(path.read_text())['rows'] == [row]
  assert f'Finished models are in {path}.' in capsys.readouterr().err
  step_time.main(['--models', 'MLP', '--out', str(out)])
  assert list(step_time_report.load()) == ['step_time']


def test_interrupted_compilation(monkeypatch):
  """It does not wait for the programs that are still queued."""
  calls = []

  def build(*args):
    calls.append(args)
    if len(calls) == 3:
      raise KeyboardInterrupt
    time.sleep(0.1)

  monkeypatch.setattr(step_time, 'build', build)
  model, base_tx = models.make('tiny', 'cpu'), models.optimizer('tiny')
  made = {str(i): steps.METHODS['base'](model, base_tx) for i in range(30)}
  with pytest.raises(KeyboardInterrupt):
    step_time.compile_all(
      made, model.batch, 'tiny', jobs=2, rounds=1, end=math.inf
    )
  assert len(calls) < len(made)


def test_late_alone(quickly_compiled):
  """It measures what it is computed from."""
  rows = step_time.measure(
    'tiny', 'cpu', methods=['late_20'], seconds=0, min_rounds=1
  )
  methods = [row['method'] for row in rows]
  assert methods == ['base', 'asam', 'every_5', 'late_20']
  assert rows[-1]['instructions'] == rows[-2]['instructions'] > 0


RECORDED = step_time_report.load()['step_time']


@pytest.mark.slow
@pytest.mark.skipif(
  jax.__version__ != RECORDED['versions']['jax'], reason='of another XLA'
)
@pytest.mark.parametrize('method', ['asam', 'momentum_asam'])
def test_recorded_costs(method):
  """What is recorded of compiled programs is still true."""
  model = models.make('MLP', 'cpu')
  each = steps.METHODS[method](model, models.optimizer('MLP'))
  program = step_time.build(each.cycle[0], each.carry, model.batch)
  (row,) = (
    row
    for row in RECORDED['rows']
    if (row['model'], row['method']) == ('MLP', method)
  )
  temp_bytes = compiled.temp_bytes(program.call)
  assert temp_bytes == pytest.approx(row['temp_bytes'], rel=0.02)
  instructions = compiled.instructions(program.call)
  assert instructions == pytest.approx(row['instructions'], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*models.MODULES])
def test_twins(name):
  """A model and its NNX twin have the same parameters."""
  model = models.make(name, 'cpu')
  shapes = lambda tree: sorted(x.shape for x in jax.tree.leaves(tree))
  assert shapes(model.twin().params) == shapes(model.params)
