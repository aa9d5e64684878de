"""Random points of the coordinates, lists of arrays."""

import math

import chex
import jax
import jax.numpy as jnp

from optax_asam import _checks
from optax_asam.sharpness._projected_ascent import l2_norm

Arrays = list[jax.Array]


def normal(key: jax.Array, like: Arrays) -> Arrays:
  """Independent standard normal numbers."""
  return [
    jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    for i, x in enumerate(like)
  ]


def in_ball(key: jax.Array, like: Arrays, p: float) -> Arrays:
  """A point that is uniform in the unit ball of the 2- or the inf-norm."""
  if p == math.inf:
    return [
      jax.random.uniform(
        jax.random.fold_in(key, i), x.shape, x.dtype, minval=-1
      )
      for i, x in enumerate(like)
    ]
  direction = normal(key, like)
  size = sum(x.size for x in like)
  radius = jax.random.uniform(jax.random.fold_in(key, len(like))) ** (1 / size)
  return scale(radius / l2_norm(direction), direction)


def scale(a: chex.Numeric, u: Arrays) -> Arrays:
  """``a u`` in the dtype of u."""
  return [jnp.asarray(a, x.dtype) * x for x in u]


def check_ord(ord: float) -> None:
  """Raises unless there is a projection for ``ord``."""
  _checks.check_ord(ord)
  if ord not in (2, math.inf):
    raise ValueError(
      f'ord must be 2 or inf, for which there is a projection, but got {ord!r}.'
      f' Write for example ord=jnp.inf.'
    )
