"""The loss over the normalized ball, and points of the ball.

Points are lists of arrays, in the coordinates of ``_geometry``.
"""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees
from optax_asam import normalization as _normalization
from optax_asam._geometry import Arrays

LossFn = Callable[..., Any]

# The default of all measures, as in `asam`.
ELEMENTWISE = _normalization.elementwise()


class Ball(NamedTuple):
  """A loss in the coordinates u = eps / T_w.

  Attributes:
    rise: L(w + T u) - L(w) as a function of u.
    center: The origin.
    push: From u to eps = T u.
  """

  rise: Callable[[Arrays], jax.Array]
  center: Arrays
  push: Callable[[Arrays], optax.Updates]


def around(
  loss_fn: LossFn,
  params: optax.Params,
  normalization: _normalization.Normalization,
  mask: _trees.Mask | None,
  perturbed_dtype: Any,
) -> Ball:
  """The ball around the parameters, whose radius is left open."""
  params = widen(params, perturbed_dtype)
  dtype = _trees.accumulator_dtype(*jax.tree.leaves(params))
  loss = checked_loss(loss_fn, dtype)
  base = loss(params)
  # Under `jax.shard_map`, the gradient with respect to a replicated parameter
  # would be summed over the devices.
  params = _trees.varying_like(params, (params, base))
  coordinates = _geometry.coordinates(params, normalization, mask)
  center = [jnp.zeros_like(x) for x in coordinates.pull(params)]
  return Ball(
    lambda u: loss(_geometry.perturb(params, coordinates.push(u))) - base,
    _trees.varying_like(center, params),
    coordinates.push,
  )


def checked_loss(
  loss_fn: LossFn, dtype: Any
) -> Callable[[optax.Params], jax.Array]:
  """``loss_fn`` in ``dtype``; raises unless the loss is a real scalar."""

  def loss(params):
    value = loss_fn(params)
    _checks.check_scalar('loss_fn', value)
    return jnp.asarray(value, dtype)

  return loss


def widen(params: optax.Params, dtype: Any) -> optax.Params:
  """``params`` in ``dtype``, or in their own dtypes where these are wider."""
  if dtype is None:
    return params

  def leaf(w):
    own = _checks.dtype_of(w)
    is_wider = jnp.finfo(own).bits > jnp.finfo(dtype).bits
    return jnp.asarray(w, own if is_wider else dtype)

  return jax.tree.map(leaf, params)


def at_radius(rho: jax.Array, rise: jax.Array) -> jax.Array:
  """``rise``, but zero if ``rho`` is zero, unless it is NaN.

  L(w + 0) and L(w) may be summed in different orders.
  """
  return jnp.where(rho == 0, 0 * rise, rise)


def mean_over_batches(
  on_batch: Callable[[LossFn, jax.Array | None], jax.Array],
  loss_fn: LossFn,
  key: jax.Array | None,
  batches: Any,
  unroll: int | bool = 1,
) -> jax.Array:
  """``on_batch`` of ``loss_fn``, or its mean over the leading axis.

  The loop over batches is unrolled if ``unroll`` is True.
  """
  if batches is None:
    return on_batch(loss_fn, key)
  n = _checks.check_batches(batches)

  def on_numbered_batch(_, numbered):
    i, batch = numbered
    batch_key = None if key is None else jax.random.fold_in(key, i)
    return None, on_batch(lambda params: loss_fn(params, batch), batch_key)

  _, values = jax.lax.scan(
    on_numbered_batch,
    None,
    (jnp.arange(n), batches),
    unroll=unrolled(unroll is True, n),
  )
  return jnp.mean(values, axis=0)


def unrolled(unroll: int | bool, length: int) -> int | bool:
  """``unroll`` for :func:`jax.lax.scan`, without a loop if it is True.

  With True, :func:`jax.lax.scan` leaves a loop of one step, and in any loop XLA
  runs convolutions many times slower on CPU.
  """
  return max(length, 2) if unroll is True else unroll


def check_arguments(
  loss_fn: LossFn,
  params: optax.Params,
  rho: chex.Numeric,
  normalization: _normalization.Normalization,
  mask: _trees.Mask | None,
  perturbed_dtype: Any,
  key: jax.Array | None = None,
) -> None:
  """Raises unless the arguments that all measures share are valid."""
  _checks.check_function('loss_fn', loss_fn, 'lambda params: loss(params)')
  _checks.check_not_module(params, measured=True)
  _checks.check_params(params)
  if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
    raise ValueError(
      f'params must contain a number to perturb, but there is none in'
      f' {_checks.describe(params)}. Pass the parameters of the model.'
    )
  _checks.check_no_schedule(rho)
  _checks.check_scale('rho', rho, '0.5')
  _normalization.check('normalization', normalization)
  _trees.check_mask(mask)
  _checks.check_perturbed_dtype(perturbed_dtype)
  if key is not None:
    _checks.check_key(key)


def project(u: Arrays, radius: jax.Array, p: float) -> Arrays:
  """The nearest point of the ball, whose radius has the dtype of u."""
  if p == math.inf:
    return [jnp.clip(x, -radius, radius) for x in u]
  norm, _ = _geometry.guarded_norm(u)
  factor = jnp.where(norm > radius, radius / norm, 1)
  return [factor * x for x in u]


def normal(key: jax.Array, zeros: Arrays) -> Arrays:
  """Independent standard normal numbers, with the shapes of ``zeros``."""
  return [
    x + jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    for i, x in enumerate(zeros)
  ]


def in_ball(key: jax.Array, zeros: Arrays, p: float) -> Arrays:
  """A random point, uniform in the unit ball of the p-norm."""
  if p == math.inf:
    return [
      x
      + jax.random.uniform(
        jax.random.fold_in(key, i), x.shape, x.dtype, minval=-1
      )
      for i, x in enumerate(zeros)
    ]
  direction = normal(key, zeros)
  size = max(1, sum(x.size for x in zeros))
  norm, _ = _geometry.guarded_norm(direction)
  key = jax.random.fold_in(key, len(zeros))
  radius = jax.random.uniform(key, dtype=norm.dtype) ** (1 / size)
  return [radius / norm * x for x in direction]
