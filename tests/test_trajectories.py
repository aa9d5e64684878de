"""Promise: ASAM reaches the valley of the paper's figure, SAM not always.

And a scaling that changes no value of the loss changes neither ASAM's
perturbation nor its sharpness, but SAM's.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib import colors
from matplotlib import image
import numpy as np
import pytest

import reference
from support import assert_same_bits
from support import error
import trajectories

COMMITTED = Path(trajectories.__file__).with_suffix('')
LR, RHO, STEPS = trajectories.LEARNING_RATE, trajectories.RHO, 100
FIRST, SECOND = trajectories.STARTS
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


def reference_path(name, start):
  """The weights that ``sam`` or ``asam`` visits, in float64."""
  path = [np.array(start)]
  for _ in range(STEPS):
    w = path[-1]
    eps = reference_perturbation(name, w, RHO)
    path.append(w - LR * reference_grad(w + eps))
  return np.array(path)


def follow(name, start, steps=STEPS):
  """The weights that the library visits, as float64."""
  tx = trajectories.OPTIMIZERS[name]
  path = trajectories.follow(tx, jnp.array(start), steps)
  return np.asarray(path, np.float64)


@pytest.fixture(scope='module')
def paths():
  """The paths of the figure, by optimizer and start."""
  return {
    (name, start): follow(name, start)
    for name in trajectories.OPTIMIZERS
    for start in trajectories.STARTS
  }


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder that the program has written, and its results."""
  out = tmp_path_factory.mktemp('trajectories') / 'out'
  trajectories.main(['--out', str(out)])
  return out, json.loads((out / 'results.json').read_text())


def height(path):
  """w_1 w_2 - 0.04: how far above the valley, whose loss is zero."""
  return path[..., 0] * path[..., 1] - 0.04


def imbalance(path):
  """w_1^2 - w_2^2, which is zero where the valley is nearest to the origin."""
  return path[..., 0] ** 2 - path[..., 1] ** 2


@pytest.mark.parametrize('start', trajectories.STARTS)
@pytest.mark.parametrize('name', trajectories.OPTIMIZERS)
def test_paths(paths, name, start):
  """The library takes the steps of the formulas."""
  assert error(paths[name, start], reference_path(name, start)) < 1e-5


@pytest.mark.parametrize('start', trajectories.STARTS)
def test_asam_reaches_the_valley(paths, start):
  """From both starts, after which it crosses the valley to and fro."""
  path = paths['asam', start]
  arrival = np.argmax(height(path) > 0)
  assert arrival == {FIRST: 11, SECOND: 7}[start]
  # A step of the zigzag changes w_1 w_2 by lr ||w||^2 or a little more.
  width = 1.1 * LR * (path[arrival:] ** 2).sum(axis=1).max()
  assert width < 0.007
  assert np.abs(height(path[arrival:])).max() < width
  assert abs(height(path[arrival:]).mean()) < 0.001


def test_sam_drifts_along_the_valley(paths):
  """From the first start it arrives as ASAM does, and then leaves ASAM."""
  sam, asam = paths['sam', FIRST], paths['asam', FIRST]
  arrival = np.argmax(height(sam) > 0)
  assert arrival == 13
  assert np.abs(height(sam[arrival:])).max() < 0.005
  # What is left of the way to (0.2, 0.2), beside where ASAM stays.
  assert 0.1 < imbalance(sam[-1]) / imbalance(sam[arrival]) < 0.2
  assert 0.75 < imbalance(asam[-1]) / imbalance(asam[arrival]) < 0.85


def test_drift(paths):
  """A step draws SAM towards the origin by lr rho, ASAM not at all.

  So the steps along the gradient change w_1^2 - w_2^2 by a factor of about
  1 - lr^2, and those of SAM by another one, which is further from 1.
  """
  sam = paths['sam', FIRST]
  pull = LR * RHO / np.linalg.norm(sam[:-1], axis=1)
  want = imbalance(sam[:-1]) * ((1 - pull) ** 2 - LR**2)
  np.testing.assert_allclose(imbalance(sam[1:]), want, rtol=0, atol=1e-7)
  for start in trajectories.STARTS:
    asam = paths['asam', start]
    stretch = 1 + np.sign(height(asam[:-1])) * RHO / np.sqrt(2)
    want = imbalance(asam[:-1]) * (1 - (LR * stretch) ** 2)
    np.testing.assert_allclose(imbalance(asam[1:]), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize('start', trajectories.STARTS)
def test_asam_in_the_long_run(start):
  """After 2000 steps its zigzag has brought it to (0.2, 0.2), too."""
  end = follow('asam', start, 2000)[-2:].mean(axis=0)
  np.testing.assert_allclose(end, [0.2, 0.2], rtol=0, atol=0.006)


@pytest.mark.parametrize('w1', [0.1, 0.2, 0.3])
def test_where_sam_stands_still(w1):
  """Up to the threshold no step moves it; above, and for ASAM, all is well."""
  threshold = float(trajectories.stuck_below(np.float64(w1), RHO))
  for w2 in (1e-3, 0.033, threshold - 1e-5):
    path = follow('sam', (w1, w2))
    assert_same_bits(path, np.tile(path[0], (STEPS + 1, 1)))
    assert follow('asam', (w1, w2))[1, 1] > w2 + 0.9 * LR * w1
  assert follow('sam', (w1, threshold + 1e-5))[1, 1] > threshold + 0.7 * LR * w1


def test_starts_beside_the_threshold(paths):
  """The first start is above it by 3 %, the second below, where SAM stays."""
  ratios = [
    w2 / trajectories.stuck_below(w1, RHO) for w1, w2 in (FIRST, SECOND)
  ]
  np.testing.assert_allclose(ratios, [1.03, 0.67], rtol=0, atol=0.005)
  path = paths['sam', SECOND]
  assert_same_bits(path, np.tile(path[0], (STEPS + 1, 1)))


# The zigzag reaches as far as a step, 0.015, to both sides of the valley, and
# the published points may be of another one of its phases.
TOLERANCES = 0.007, 0.002, 1e-7, 0.014, 0.004


@pytest.mark.parametrize(
  ('published', 'tolerance'),
  list(zip(trajectories.PUBLISHED, TOLERANCES, strict=True)),
)
def test_published(paths, published, tolerance):
  """The paths pass by what was read off the published picture."""
  name, start, step, point = published
  here = paths[name, trajectories.STARTS[start]][step]
  assert np.hypot(*(here - point)) < tolerance


def worst_on_a_grid(name, w):
  """The maximum of L(w + eps) - L(w) over a grid of the ball's surface.

  Below w the loss falls by less than it rises above, so that the maximum is
  on the surface.
  """
  angle = np.linspace(0, 2 * np.pi, 100_001)
  eps = trajectories.BALL_RHO * np.stack([np.cos(angle), np.sin(angle)])
  w1, w2 = w[:, None] + OPERATORS[name](w)[:, None] * eps
  losses = np.abs(w1 * np.maximum(w2, 0) - 0.04)
  return losses.max() - abs(w[0] * w[1] - 0.04)


def test_scaling():
  """At A w, ASAM's perturbation is A times that at w; SAM's is not."""
  scaling, w = np.array(trajectories.SCALING), np.array(trajectories.POINT)
  eps, scaled_eps = (
    {
      name: np.float64(trajectories.perturb(name, jnp.asarray(at)))
      for name in OPERATORS
    }
    for at in (w, scaling * w)
  )
  for name in OPERATORS:
    want = reference_perturbation(name, scaling * w, trajectories.BALL_RHO)
    assert error(scaled_eps[name], want) < 1e-6
  assert error(scaled_eps['asam'], scaling * eps['asam']) < 1e-6
  assert error(scaled_eps['sam'], scaling * eps['sam']) > 0.9


def test_sharpness(written):
  """Adaptive sharpness is equal at w and at A w; plain sharpness is not."""
  balls = written[1]['balls']
  points = np.array(balls['points'])
  np.testing.assert_allclose(points, [[1, 1], [3, 1 / 3]], rtol=1e-6)
  np.testing.assert_allclose(balls['losses'], [0.96, 0.96], rtol=1e-6)
  sharpness = balls['sharpness']
  for name in OPERATORS:
    want = [worst_on_a_grid(name, w) for w in points]
    np.testing.assert_allclose(sharpness[name], want, rtol=1e-4)
  rho = balls['settings']['rho']
  equal = np.sqrt(2) * rho + rho**2 / 2  # (1 + rho / sqrt(2))^2 - 1
  np.testing.assert_allclose(sharpness['asam'], [equal, equal], rtol=1e-4)
  assert sharpness['sam'][1] > 1.9 * sharpness['sam'][0]


def test_written(written):
  """The folder holds two figures, and results with the command that made it."""
  out, results = written
  assert {path.name for path in out.iterdir()} == {
    *('balls.png', 'results.json', 'trajectories.png')
  }
  for path in out.glob('*.png'):
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 500
    for color in trajectories.COLORS.values():
      distance = np.abs(pixels - np.array(colors.to_rgb(color))).max(axis=-1)
      assert (distance < 0.01).sum() > 100
  command = f'python experiments/trajectories.py --out {out}'
  assert results['command'] == command
  assert {'commit', 'device', 'versions'} < set(results)


def test_results(written, paths):
  """results.json holds the paths of the figure."""
  results = written[1]['trajectories']
  for (name, start), path in paths.items():
    i = trajectories.STARTS.index(start)
    np.testing.assert_allclose(results['paths'][name][i], path, atol=1e-6)
    assert results['end_points'][name][i] == results['paths'][name][i][-1]
    loss = abs(height(path[-1]))
    np.testing.assert_allclose(results['end_losses'][name][i], loss, atol=1e-6)


@pytest.mark.parametrize('part', ['trajectories', 'balls'])
def test_committed(written, part):
  """The committed results are those of the program."""
  committed = json.loads((COMMITTED / 'results.json').read_text())
  assert not committed['commit'].endswith('-dirty')
  now, then = written[1][part], committed[part]
  assert jax.tree.structure(now) == jax.tree.structure(then)
  assert jax.tree.leaves(now) == pytest.approx(jax.tree.leaves(then), abs=1e-5)


def test_page():
  """The page beside the results shows their numbers."""
  page = (COMMITTED.parent / 'README.md').read_text()
  results = json.loads((COMMITTED / 'results.json').read_text())
  for row in results['trajectories']['beside_the_published']:
    published, here = row['published'], row['here']
    cells = (
      f'({", ".join(f"{x:g}" for x in published)})',
      f'({", ".join(f"{x:.3f}" for x in here)})',
    )
    assert f'| {" | ".join(cells)} |' in page
  text = ' '.join(page.split())
  settings = results['trajectories']['settings']
  assert f'rate {settings["learning_rate"]}, rho = {settings["rho"]}' in text
  # From the first start, the 11th step of ASAM crosses the valley.
  paths = {
    name: np.array(paths[0])
    for name, paths in results['trajectories']['paths'].items()
  }
  crossing = paths['asam'][10:12]
  before, after = np.prod(crossing, axis=1)
  assert before < 0.04 < after
  middle = ', '.join(f'{x:.3f}' for x in crossing.mean(axis=0))
  asam, sam = (
    np.linalg.norm(paths[name][-1] - paths[name][step])
    for name, step in (('asam', 11), ('sam', 12))
  )
  assert f'in its 11th step, around ({middle}), and' in text
  assert f'its end is {asam:.3f} from its place after step 11' in text
  assert f'SAM {sam:.3f} from its place after step 12' in text
