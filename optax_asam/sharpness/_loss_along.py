"""The loss on a line, a plane or another grid of points."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees
from optax_asam.sharpness import _ball


def loss_along(
  loss_fn: _ball.LossFn,
  params: optax.Params,
  *axes: tuple[optax.Updates, jax.Array | np.ndarray],
  perturbed_dtype: Any = jnp.float32,
  batches: Any = None,
) -> jax.Array:
  r"""The loss on a grid of points around the parameters, to be plotted.

  .. math::
    L(w + t_1 d_1 + \dots + t_n d_n)

  for all combinations of the given :math:`t_i`: a curve for one direction, a
  surface for two. Directions can be the difference between two solutions, the
  gradient, the result of :func:`worst_perturbation`, or random numbers times
  :math:`T_w`. They are used as they are, without normalization.

  Args:
    loss_fn: As in :func:`worst_case`.
    params: The parameters w, a pytree of floating-point arrays.
    *axes: For each axis of the grid, a pair of the direction :math:`d_i`, a
      pytree like ``params``, and the numbers :math:`t_i`, a 1-D array.
    perturbed_dtype: As in :func:`worst_case`.
    batches: As in :func:`worst_case`.

  Returns:
    The losses, an array with an axis for each direction, at least float32.

  Raises:
    TypeError: An argument is of the wrong type, or the loss is not a real
      scalar.
    ValueError: There is no direction, or one does not fit ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import sharpness
    >>> params = {'x': jnp.array(3.0), 'y': jnp.array(4.0)}
    >>> along_x = {'x': jnp.array(1.0), 'y': jnp.array(0.0)}, jnp.arange(3)
    >>> along_y = {'x': jnp.array(0.0), 'y': jnp.array(1.0)}, jnp.arange(2)
    >>> loss_fn = lambda params: params['x'] * params['y']
    >>> print(sharpness.loss_along(loss_fn, params, along_x))
    [12. 16. 20.]
    >>> print(sharpness.loss_along(loss_fn, params, along_x, along_y))
    [[12. 15.]
     [16. 20.]
     [20. 25.]]

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018.
  """
  _checks.check_function('loss_fn', loss_fn, 'lambda params: loss(params)')
  _checks.check_not_module(params, measured=True)
  _checks.check_params(params)
  _checks.check_axes(axes, params)
  _checks.check_perturbed_dtype(perturbed_dtype)
  params = _ball.widen(params, perturbed_dtype)
  dtype = _trees.accumulator_dtype(*jax.tree.leaves(params))
  directions = [direction for direction, _ in axes]
  grid = jnp.meshgrid(*(jnp.asarray(t, dtype) for _, t in axes), indexing='ij')

  def on_batch(loss_fn, key):
    del key
    loss = _ball.checked_loss(loss_fn, dtype)

    def value(point):
      eps = jax.tree.map(
        lambda *leaves: sum(
          t * jnp.asarray(d, dtype) for t, d in zip(point, leaves, strict=True)
        ),
        *directions,
      )
      return loss(_geometry.perturb(params, eps))

    losses = jax.lax.map(value, [t.ravel() for t in grid])
    return losses.reshape(grid[0].shape)

  return _ball.mean_over_batches(on_batch, loss_fn, None, batches)
