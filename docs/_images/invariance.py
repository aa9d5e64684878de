"""Draws the picture of docs/mathematics.md: SAM and ASAM at rescaled weights.

::

    python docs/_images/invariance.py
"""

import pathlib

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
import numpy as np

from optax_asam import ascent
from optax_asam import normalization

RHO = 0.4
POINTS = np.array([[1.2, 1.2], [3.0, 0.48]])  # w, and diag(2.5, 0.4) w
NORMALIZATIONS = {
  'SAM': normalization.identity(),
  'ASAM': normalization.elementwise(eta=0.0, mask=None),
}
COLORS = {'SAM': 'tab:blue', 'ASAM': 'tab:red'}


def loss_fn(w):
  """The squared error of f(x) = w2 ReLU(w1 x) at x = 1, y = 1."""
  return (w[1] * jax.nn.relu(w[0]) - 1) ** 2


@jax.jit
def perturbations(points):
  """For each method, at each point: the half-axes of the region, and eps."""
  found = {}
  for name, operator in NORMALIZATIONS.items():

    def perturb(w, operator=operator):
      ball = ascent.steepest_ascent(operator)
      eps, _ = ball.update(jax.grad(loss_fn)(w), ball.init(w), w)
      return RHO * operator(w) * jnp.ones(2), RHO * eps

    found[name] = jax.vmap(perturb)(points)
  return found


def main():
  """Writes invariance.png next to this file."""
  figure = Figure(figsize=(8, 2.7), dpi=120, layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  w1, w2 = np.meshgrid(np.linspace(0, 4.4, 441), np.linspace(0, 2.0, 201))
  arrow = {'arrowstyle': '->', 'shrinkA': 0, 'shrinkB': 0}
  found = perturbations(POINTS)
  for axes, name in zip(panels, NORMALIZATIONS, strict=True):
    levels = np.arange(0, 3.5, 0.25) ** 2
    axes.contour(w1, w2, (w1 * w2 - 1) ** 2, levels, colors='0.8', linewidths=1)
    for label, w, half_axes, eps in zip(
      ('w', 'A w'), POINTS, *map(np.asarray, found[name]), strict=True
    ):
      ellipse = Ellipse(w, *(2 * half_axes), color=COLORS[name], fill=False)
      ellipse.set_linewidth(2)
      axes.add_patch(ellipse)
      axes.annotate('', w + eps, w, arrowprops=arrow)
      axes.plot(*w, 'ko', markersize=4)
      axes.text(w[0], w[1] - 0.2, label, ha='center')
      axes.text(
        w[0],
        w[1] + half_axes[1] + 0.06,
        f'L({label} + eps) = {loss_fn(w + eps):.2f}',
        bbox={'color': 'white', 'pad': 1, 'alpha': 0.8},
        ha='center',
      )
    axes.set(title=name, xlabel='w1', xlim=(0, 4.4), ylim=(0, 2.0))
    axes.set_aspect('equal')
  panels[0].set_ylabel('w2')
  figure.savefig(pathlib.Path(__file__).with_suffix('.png'))


if __name__ == '__main__':
  main()
