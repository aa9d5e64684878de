"""Promise: what grows with arrays, parameters and devices is found, and fitted.

And no cost of ASAM grows faster than the number of arrays or parameters.
"""

import importlib.metadata
import json
import os

import jax
import numpy as np
import pytest

from benchmarks import growth


@pytest.mark.parametrize('k', [0.0, 0.5, 1.0, 2.0])
def test_exponent(k):
  """That of a known series; a constant matters in the lower half alone."""
  x = np.array([10.0, 30.0, 100.0, 300.0, 1000.0])
  y = 3 * x**k
  assert growth.exponent(x, y) == pytest.approx(k)
  assert growth.exponent(x, np.where(x < 100, 7.0, y)) == pytest.approx(k)
  assert growth.exponent(x, np.where(x == 300, 0.0, y)) is None


@pytest.mark.parametrize(
  ('arrays', 'parameters'), [(10, 10**6), (1000, 10**6), (10, 10**4)]
)
def test_dense_layers(arrays, parameters):
  """They have as many arrays, and about as many parameters."""
  shapes = jax.tree.leaves(growth.dense_layers(arrays, parameters, 1).params)
  assert len(shapes) == arrays
  assert sum(x.size for x in shapes) == pytest.approx(parameters, rel=0.02)


@pytest.mark.slow
def test_program(tmp_path, monkeypatch, quickly_compiled):
  """It measures the series that are asked for, and keeps the others."""
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
  monkeypatch.setattr(growth, 'METHODS', ('base', 'two_gradients', 'asam'))
  for name, sizes in {'arrays': (4, 8), 'devices': (2, 4)}.items():
    small = growth.SERIES[name]._replace(
      sizes=sizes, parameters=lambda size: 360
    )
    monkeypatch.setitem(growth.SERIES, name, small)
    growth.main(
      ['--out', str(tmp_path), '--series', name, '--seconds', '0.001']
    )
  results = json.loads((tmp_path / 'growth.json').read_text())
  assert list(results) == ['arrays', 'devices']
  for name, each in results.items():
    assert each['versions']['jax']
    assert len(each['cases']) == 2 * len(growth.METHODS)
    timed = {'step_seconds' in case for case in each['cases']}
    assert timed == {name == 'arrays'}
  # Twice the layers have about twice the instructions.
  x, y = growth.values(results, 'arrays', 'instructions', 'asam')
  assert growth.exponent(x, y) == pytest.approx(1.0, abs=0.2)
  _, sent = growth.values(results, 'devices', 'collective_bytes', 'base')
  assert (sent > 0).all()
  lines = growth.table(results).splitlines()
  assert len(lines) == 2 + sum(len(growth.SERIES[n].costs) for n in results)
  made = growth.page('a\n\n<!-- growth -->\n\nb\n\n<!-- end -->', results)
  assert lines[-1] in made
  assert growth.page(made, results) == made
  panels = [x for x in growth.chart(results).axes if x.get_visible()]
  assert len(panels) == len(lines) - 2


def test_chips_without_compiler(tmp_path, monkeypatch):
  """The error says what to install, before anything is compiled."""

  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
  monkeypatch.setattr(importlib.metadata, 'version', version)
  monkeypatch.setattr(growth, 'build', None)
  with pytest.raises(RuntimeError, match=r"pip install 'jax\[tpu\]'"):
    growth.main(['--out', str(tmp_path), '--series', 'chips'])


def test_page():
  """The table is that of the recorded results."""
  text = growth.PAGE.read_text()
  assert growth.page(text, growth.load()) == text


def test_recorded_results():
  """No cost of ASAM grows faster than linearly, or than that of another SAM."""
  results = growth.load()
  for name, cost in growth._rows(results):
    costs = {
      method: growth.values(results, name, cost, method)
      for method in growth.METHODS
    }
    own, other = (growth.exponent(*costs[m]) for m in ('asam', 'contrib_sam'))
    assert own <= max(1.0, other) + 0.1, (name, cost, own, other)
    if cost == 'collective_bytes':
      added = costs['asam'][1] - costs['two_gradients'][1]
      assert (added <= 4 * 10).all()  # a scalar for each array
