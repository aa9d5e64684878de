"""The loss around some parameters, over one batch or as a mean over several."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _coordinates
from optax_asam import _functions
from optax_asam import _trees
from optax_asam import normalization as _normalization

LossFn = Callable[..., Any]

# The default of all measures, as of `asam`.
ELEMENTWISE = _normalization.elementwise()


def rise(
  loss_fn: LossFn, params: optax.Params, coordinates: _coordinates.Coordinates
) -> Callable[[list[jax.Array]], jax.Array]:
  """L(w + T u) - L(w) as a function of u."""
  loss_fn = _functions.checked_scalar_fn('loss_fn', loss_fn)
  dtype = _trees.accumulator_dtype(*jax.tree.leaves(params))
  base = jnp.asarray(loss_fn(params), dtype)

  def rise_at(u):
    perturbed_params = optax.apply_updates(params, coordinates.push(u))
    return jnp.asarray(loss_fn(perturbed_params), dtype) - base

  return rise_at


def origin(
  params: optax.Params, coordinates: _coordinates.Coordinates
) -> list[jax.Array]:
  """The origin of the coordinates."""
  zeros = [jnp.zeros_like(x) for x in coordinates.pull(params)]
  if not sum(x.size for x in zeros):
    raise ValueError(
      f'params must hold a number to perturb, but got none in'
      f' {_trees.describe(params)}. Pass the parameters of the model.'
    )
  return zeros


def at_radius(rho: chex.Numeric, rise: jax.Array) -> jax.Array:
  """``rise``, but zero at the radius zero, unless it is NaN.

  There L(w + 0) and L(w) may be summed in different orders.
  """
  return jnp.where(jnp.asarray(rho) == 0, 0 * rise, rise)


def mean_over_batches(
  on_batch: Callable[[LossFn, jax.Array | None], jax.Array],
  loss_fn: LossFn,
  key: jax.Array | None,
  batches: Any,
) -> jax.Array:
  """``on_batch`` of ``loss_fn``, or its mean over the leading axis."""
  if batches is None:
    return on_batch(loss_fn, key)
  sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
  if len(sizes) != 1 or not min(sizes) or not min(sizes)[0]:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    raise ValueError(
      f'batches must have a leading axis of batches, the same for all leaves,'
      f' but got shapes {shapes}.'
      f' Write for example x.reshape(-1, 128, *x.shape[1:]) for each.'
    )
  ((n,),) = sizes

  def on_numbered_batch(numbered):
    i, batch = numbered
    batch_key = None if key is None else jax.random.fold_in(key, i)
    return on_batch(lambda params: loss_fn(params, batch), batch_key)

  return jnp.mean(jax.lax.map(on_numbered_batch, (jnp.arange(n), batches)))


def check_arguments(
  loss_fn: LossFn,
  params: optax.Params,
  rho: chex.Numeric,
  normalization: _normalization.Normalization,
  mask: _trees.Mask | None,
) -> None:
  """Raises unless the arguments that all measures have are right."""
  _checks.check_function('loss_fn', loss_fn, 'lambda params: loss(params)')
  _trees.check_params(params)
  if callable(rho):
    raise TypeError(
      f'rho must be a number or a traced scalar, but got the function {rho!r}.'
      f' Write for example rho=0.5.'
    )
  _checks.check_scale('rho', rho, '0.5')
  _coordinates.check_normalization('normalization', normalization)
  _trees.check_selects_something(mask)
