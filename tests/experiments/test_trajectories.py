"""Promise: the paper's trajectories and balls are those of the formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import tables
from experiments.paper import trajectories
from tests.helpers import reference
from tests.helpers.support import error

LR, RHO = trajectories.LEARNING_RATE, trajectories.RHO
OPERATORS = {'sam': reference.ones, 'asam': reference.elementwise(0.0)}


def reference_grad(w):
  """The gradient of |w_1 ReLU(w_2) - 0.04|."""
  relu = max(w[1], 0.0)
  return np.sign(w[0] * relu - 0.04) * np.array([relu, w[0] * (w[1] > 0)])


def reference_perturbation(name, w, rho):
  """The perturbation of ``sam`` or ``asam`` at w."""
  trees = {'w': w}, {'w': reference_grad(w)}
  eps = reference.perturbation(*trees, OPERATORS[name], rho, 2, ['w'], ['w'])
  return eps['w']


def follow(name, start, steps=trajectories.STEPS):
  """The weights that the library visits, as float64."""
  tx = trajectories.OPTIMIZERS[name]
  path = trajectories.follow(tx, jnp.array(start), steps)
  return np.asarray(path, np.float64)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder that the program has written, and its results."""
  out = tmp_path_factory.mktemp('trajectories') / 'out'
  trajectories.main(['--out', str(out)])
  return out, json.loads((out / 'results.json').read_text())


@pytest.mark.parametrize('start', trajectories.STARTS)
@pytest.mark.parametrize('name', trajectories.OPTIMIZERS)
def test_paths(name, start):
  """The library takes the steps of the formulas in float64."""
  path = [np.array(start)]
  for _ in range(trajectories.STEPS):
    w = path[-1]
    eps = reference_perturbation(name, w, RHO)
    path.append(w - LR * reference_grad(w + eps))
  assert error(follow(name, start), np.array(path)) < 1e-5


@pytest.mark.parametrize('w1', [0.1, 0.2, 0.3])
def test_where_sam_never_moves(w1):
  """Up to the threshold it takes no step; above it, and ASAM, do."""
  threshold = float(trajectories.stuck_below(np.float64(w1), RHO))
  for w2 in (1e-3, threshold - 1e-5):
    assert np.ptp(follow('sam', (w1, w2)), axis=0).max() == 0
    assert follow('asam', (w1, w2))[1, 1] > w2 + 0.9 * LR * w1
  assert follow('sam', (w1, threshold + 1e-5))[1, 1] > threshold + 0.7 * LR * w1


def worst_on_a_grid(name, w):
  """The maximum of L(w + eps) - L(w) over a grid of the ball's surface."""
  angle = np.linspace(0, 2 * np.pi, 100_001)
  eps = trajectories.BALL_RHO * np.stack([np.cos(angle), np.sin(angle)])
  w1, w2 = w[:, None] + OPERATORS[name](w)[:, None] * eps
  losses = np.abs(w1 * np.maximum(w2, 0) - 0.04)
  return losses.max() - abs(w[0] * w[1] - 0.04)


def test_balls(written):
  """Perturbations and sharpness; ASAM's sharpness is equal at w and A w."""
  balls = written[1]['balls']
  points = np.array(balls['points'])
  np.testing.assert_allclose(points, [[1, 1], [3, 1 / 3]], rtol=1e-6)
  rho = balls['settings']['rho']
  for name in OPERATORS:
    want = [reference_perturbation(name, w, rho) for w in points]
    np.testing.assert_allclose(balls['perturbations'][name], want, atol=1e-5)
    want = [worst_on_a_grid(name, w) for w in points]
    np.testing.assert_allclose(balls['sharpness'][name], want, rtol=1e-4)
  equal = np.sqrt(2) * rho + rho**2 / 2  # (1 + rho / sqrt(2))^2 - 1
  np.testing.assert_allclose(balls['sharpness']['asam'], equal, rtol=1e-4)
  assert balls['sharpness']['sam'][1] > 1.9 * balls['sharpness']['sam'][0]


def test_recorded(written):
  """The program writes the recorded results again, and both figures."""
  out, results = written
  file = tables.RESULTS / 'trajectories' / 'results.json'
  recorded = json.loads(file.read_text())
  for part in ('trajectories', 'balls'):
    now, then = results[part], recorded[part]
    assert jax.tree.structure(now) == jax.tree.structure(then)
    assert jax.tree.leaves(now) == pytest.approx(
      jax.tree.leaves(then), abs=1e-5
    )
  assert results['command'].endswith(f'trajectories --out {out}')
  assert {'commit', 'device', 'versions'} < set(results)
  assert {path.name for path in out.glob('*.png')} == {
    *('balls.png', 'trajectories.png')
  }
