"""Draws what :func:`optax_asam.sharpness.loss_along` returns, with Matplotlib.

Import this module explicitly. It draws on the axes that it is given, and does
not import Matplotlib itself: ``pip install matplotlib``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.contour import QuadContourSet
  from matplotlib.lines import Line2D

# Distinguishable for the color-blind (Okabe and Ito), and dark enough on white.
COLORS: Mapping[str, str] = {
  'sgd': '#555555',
  'sam': '#0072b2',
  'asam': '#d55e00',
  'momentum_asam': '#009e73',
}


def loss_curve(
  ax: 'Axes',
  t: jax.Array | np.ndarray,
  losses: jax.Array | np.ndarray,
  *,
  color: str | None = None,
  label: str | None = None,
  linewidth: float = 2.0,
) -> 'Line2D':
  """Draws the loss along a direction, or along several and their mean.

  Args:
    ax: The Matplotlib axes to draw on.
    t: The positions along the direction, an array of shape [n].
    losses: The losses there: an array of shape [n] for one direction, or
      [k, n] for k directions, which are drawn thin, with their mean.
    color: A color of Matplotlib, by default the next one of the axes.
    label: The label in the legend.
    linewidth: The width of the curve or the mean, in points.

  Returns:
    The line of the curve, or of the mean.

  Raises:
    ValueError: ``losses`` has neither one nor two dimensions.

  Examples:
    >>> import jax.numpy as jnp
    >>> from matplotlib.figure import Figure
    >>> from optax_asam import plotting
    >>> from optax_asam import sharpness
    >>> loss_fn = lambda params: jnp.sum(params**2)
    >>> params, direction = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
    >>> t = jnp.linspace(-1.0, 1.0, 5)
    >>> losses = sharpness.loss_along(loss_fn, params, (direction, t))
    >>> ax = Figure().subplots()
    >>> line = plotting.loss_curve(ax, t, losses, label='quadratic')
    >>> print(line.get_ydata())
    [1.  0.5 1.  2.5 5. ]
  """
  t, losses = np.asarray(t), np.asarray(losses)
  if losses.ndim not in (1, 2):
    raise ValueError(
      f'losses must have shape [n] or [k, n], but has shape {losses.shape}. For'
      f' two directions, use loss_contours.'
    )
  mean = losses.mean(axis=0) if losses.ndim == 2 else losses
  (line,) = ax.plot(t, mean, color=color, label=label, linewidth=linewidth)
  if losses.ndim == 2:
    ax.plot(t, losses.T, color=line.get_color(), linewidth=0.5)
  return line


def loss_contours(
  ax: 'Axes',
  t1: jax.Array | np.ndarray,
  t2: jax.Array | np.ndarray,
  losses: jax.Array | np.ndarray,
  *,
  levels: int | jax.Array | np.ndarray = 16,
  cmap: str = 'viridis',
) -> 'QuadContourSet':
  """Draws the loss on a plane, with the first direction on the x-axis.

  Args:
    ax: The Matplotlib axes to draw on.
    t1: The positions along the first direction, an array of shape [n].
    t2: The positions along the second direction, an array of shape [m].
    losses: The losses there, an array of shape [n, m].
    levels: The levels of the contours, in ascending order, or roughly how many
      there are. To compare plots, use the same levels; what is above the last
      one has the last color.
    cmap: The name of a Matplotlib colormap.

  Returns:
    The filled contours, for ``figure.colorbar``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from matplotlib.figure import Figure
    >>> from optax_asam import plotting
    >>> from optax_asam import sharpness
    >>> loss_fn = lambda params: jnp.sum(params**2)
    >>> params, t = jnp.zeros(2), jnp.linspace(-1.0, 1.0, 5)
    >>> x, y = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    >>> losses = sharpness.loss_along(loss_fn, params, (x, t), (y, t))
    >>> figure = Figure()
    >>> ax = figure.subplots()
    >>> levels = jnp.arange(4.0)
    >>> contours = plotting.loss_contours(ax, t, t, losses, levels=levels)
    >>> bar = figure.colorbar(contours, label='loss')
    >>> print(contours.levels)
    [0. 1. 2. 3.]
  """
  t1, t2, losses = np.asarray(t1), np.asarray(t2), np.asarray(losses)
  return ax.contourf(t1, t2, losses.T, levels=levels, cmap=cmap, extend='max')


def tidy(*axes: 'Axes') -> None:
  """Draws a light grid, and no frame at the top and on the right.

  Args:
    *axes: The Matplotlib axes.

  Examples:
    >>> from matplotlib.figure import Figure
    >>> from optax_asam import plotting
    >>> plotting.tidy(*Figure().subplots(1, 2))
  """
  for ax in axes:
    ax.grid(alpha=0.3)
    ax.spines[['top', 'right']].set_visible(False)
