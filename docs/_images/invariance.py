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
POINTS = jnp.array([[1.2, 1.2], [3.0, 0.48]])  # w, and diag(2.5, 0.4) w
NORMALIZATIONS = {
  'SAM': normalization.identity(),
  'ASAM': normalization.elementwise(eta=0.0, mask=None),
}


def loss_fn(w):
  """The squared error of f(x) = w2 ReLU(w1 x) at x = 1, y = 1."""
  return (w[1] * jax.nn.relu(w[0]) - 1) ** 2


def perturbations():
  """For each method, eps at both points and the losses at w + eps."""
  found = {}
  for name, operator in NORMALIZATIONS.items():

    def perturb(w, ball=ascent.steepest_ascent(operator)):
      direction, _ = ball.update(jax.grad(loss_fn)(w), ball.init(w), w)
      eps = RHO * direction
      return eps, loss_fn(w + eps)

    found[name] = jax.vmap(perturb)(POINTS)
  return found


def main():
  """Writes invariance.png next to this file."""
  figure = Figure(figsize=(8, 2.7), dpi=120, layout='constrained')
  w1, w2 = np.meshgrid(np.linspace(0, 4.4, 441), np.linspace(0, 2.0, 201))
  panels = figure.subplots(1, 2, sharey=True)
  for axes, (name, (eps, losses)) in zip(
    panels, perturbations().items(), strict=True
  ):
    axes.contour(
      w1,
      w2,
      jax.vmap(jax.vmap(loss_fn))(np.stack([w1, w2], axis=-1)),
      np.arange(0, 3.5, 0.25) ** 2,
      colors='0.8',
      linewidths=0.8,
    )
    for w, e, loss, label in zip(
      POINTS, eps, losses, ('w', 'A w'), strict=True
    ):
      half_axes = RHO * np.broadcast_to(NORMALIZATIONS[name](w), 2)
      color = {'SAM': 'tab:blue', 'ASAM': 'tab:red'}[name]
      axes.add_patch(
        Ellipse(w, *(2 * half_axes), edgecolor=color, fill=False, linewidth=2)
      )
      axes.annotate(
        '',
        w + e,
        w,
        arrowprops={'arrowstyle': '->', 'shrinkA': 0, 'shrinkB': 0},
      )
      axes.plot(*w, 'ko', markersize=4)
      axes.text(
        *(w - jnp.array([0.09, 0.02])),
        label,
        ha='right',
        va='center',
        fontsize=9,
      )
      axes.text(
        w[0],
        w[1] + half_axes[1] + 0.06,
        f'L({label} + eps) = {loss:.2f}',
        ha='center',
        fontsize=9,
        bbox={'color': 'white', 'pad': 1, 'alpha': 0.8},
      )
    axes.set(title=name, xlabel='w1', xlim=(0, 4.4), ylim=(0, 2.0))
    axes.set_aspect('equal')
  panels[0].set_ylabel('w2')
  figure.savefig(pathlib.Path(__file__).with_suffix('.png'))


if __name__ == '__main__':
  main()
