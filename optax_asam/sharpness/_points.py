"""Random points of the coordinates, lists of arrays."""

import math

import chex
import jax
import jax.numpy as jnp

from optax_asam import _checks
from optax_asam.sharpness._projected_ascent import l2_norm

Arrays = list[jax.Array]


def normal(key: jax.Array, zeros: Arrays) -> Arrays:
  """Independent standard normal numbers, shaped and sharded like zeros."""
  return [
    x + jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    for i, x in enumerate(zeros)
  ]


def in_ball(key: jax.Array, zeros: Arrays, p: float) -> Arrays:
  """A point, like zeros, that is uniform in the unit ball of the p-norm."""
  if p == math.inf:
    return [
      x
      + jax.random.uniform(
        jax.random.fold_in(key, i), x.shape, x.dtype, minval=-1
      )
      for i, x in enumerate(zeros)
    ]
  direction = normal(key, zeros)
  size = sum(x.size for x in zeros)
  radius = jax.random.uniform(jax.random.fold_in(key, len(zeros))) ** (1 / size)
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


def check_key(key: jax.Array) -> None:
  """Raises unless ``key`` is a random key, of the new kind or the old one."""
  if _checks.is_array(key) and (
    jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
  ):
    return
  raise TypeError(
    f'key must be a random key, but got {key!r}. Write for example'
    f' key=jax.random.key(0).'
  )
