"""Masks, dtypes and inner products of parameter trees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import _checks

PyTree = Any
Mask = PyTree | Callable[[optax.Params], PyTree]


def accumulator_dtype(*leaves: Any) -> Any:
  """float64 if one of ``leaves``, or of dtypes, is float64; else float32.

  Sums of squares in a 16-bit dtype overflow (a float16 leaf of 200s) or stop
  growing, and float32 with bfloat16 must stay float32.
  """
  wide = any(_checks.dtype_of(leaf) == jnp.float64 for leaf in leaves)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: Any) -> jax.Array:
  """``x`` in at least float32."""
  return jnp.asarray(x, accumulator_dtype(x))


def zeros_like(w: Any) -> jax.Array:
  """Zeros like ``w`` in at least float32."""
  return jnp.zeros_like(w, dtype=accumulator_dtype(w))


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
  """``tree`` in the dtypes of ``like``, which may hold Python floats.

  ``optax.tree.cast_like`` needs arrays, and warns of NumPy's float64.
  """
  return jax.tree.map(
    lambda x, y: jnp.asarray(x, _checks.dtype_of(y)), tree, like
  )


def pmean(tree: PyTree, axis_name: Any) -> PyTree:
  """The mean over the mapped axes ``axis_name``, if it is not None."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def varying_like(tree: PyTree, like: PyTree) -> PyTree:
  """``tree``, which varies over the mesh axes over which ``like`` does, too.

  Only in its types, which matter under :func:`jax.shard_map`.
  """
  if not hasattr(jax.lax, 'pcast'):  # pragma: no cover
    return tree
  axes = frozenset().union(*map(_checks.varying_axes, jax.tree.leaves(like)))

  def leaf(x):
    missing = tuple(sorted(axes - _checks.varying_axes(x)))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(leaf, tree)


def finite_ema(
  decay: jax.typing.ArrayLike, average: PyTree, grads: optax.Updates
) -> PyTree:
  """``decay * average + (1 - decay) * grads``, if all of ``grads`` is finite.

  Otherwise ``average``, which is a tree of at least float32. Leaves that it
  masks out stay so.
  """
  grads = jax.tree.map(
    lambda m, g: m if _checks.is_masked(m) else jnp.asarray(g, m.dtype),
    average,
    grads,
    is_leaf=_checks.is_masked,
  )
  finite = [jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]
  # XLA would copy the conjunction over all leaves to each of them, but not a
  # root: programs would grow with the square of their number.
  is_finite = jnp.sqrt(sum(1.0 - f.astype(jnp.float32) for f in finite)) == 0

  def leaf(m, g):
    decay_ = jnp.asarray(decay, m.dtype)
    return jnp.where(is_finite, decay_ * m + (1 - decay_) * g, m)

  return jax.tree.map(leaf, average, grads)


def dot(a: PyTree, b: PyTree) -> jax.Array:
  """The inner product of two trees, in at least float32.

  ``optax.tree.vdot`` accumulates bfloat16 in bfloat16.
  """
  dtype = accumulator_dtype(*jax.tree.leaves(b))
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return sum(
    (jnp.sum(jnp.asarray(x, dtype) * jnp.asarray(y, dtype)) for x, y in leaves),
    jnp.zeros([], dtype),
  )


def fill_masked(tree: PyTree, params: optax.Params) -> PyTree:
  """``tree`` with zeros, like those of ``params``, at leaves masked out."""
  return jax.tree.map(
    lambda x, w: jnp.zeros_like(w) if _checks.is_masked(x) else x,
    tree,
    params,
    is_leaf=_checks.is_masked,
  )


def resolve_mask(mask: Mask | None, params: optax.Params) -> PyTree:
  """A mask in any form that Optax accepts, as a tree of bools.

  Args:
    mask: A pytree of bools with the structure of ``params`` or a prefix of it,
      a function from ``params`` to one, or None for True everywhere. Plain
      dicts fit any tree with the same names, such as an ``nnx.State``.
    params: The parameters.

  Returns:
    A pytree of Python bools with the structure of ``params``.

  Raises:
    TypeError: A leaf of the mask is not a bool.
    ValueError: The mask does not fit ``params``.
  """
  if mask is None:
    return jax.tree.map(lambda _: True, params)
  prefix = mask(params) if is_function(mask) else mask
  _checks.check_bools(prefix)
  if isinstance(mask, (bool, np.bool_)):
    _checks.check_one_leaf(mask, params)
  try:
    selected = jax.tree.map(
      lambda value, subtree: jax.tree.map(lambda _: bool(value), subtree),
      prefix,
      params,
    )
  except ValueError as error:
    selected = _by_name(prefix, params)
    if selected is None:
      raise _checks.misfit_of_mask(prefix, params) from error
  return selected


def check_mask(mask: Mask | None) -> None:
  """Raises unless ``mask`` may be one: not yet whether it fits."""
  if not is_function(mask):
    _checks.check_bools(mask)
    _checks.check_selects_something(mask)


def is_function(mask: Mask) -> bool:
  """Whether ``mask`` is a function from params to a mask.

  The leaves decide, as in Optax: an Equinox module of bools is callable, too.
  A function may itself be a pytree: Optimistix wraps closures in modules.
  """
  leaves = jax.tree.leaves(mask)
  return callable(mask) and not any(
    isinstance(leaf, (bool, np.bool_)) or _checks.is_array(leaf)
    for leaf in leaves
  )


def _by_name(prefix: PyTree, params: optax.Params) -> PyTree | None:
  """``prefix`` matched to ``params`` by names, or None if it does not fit."""
  # A name ``value`` at the end of a mask may be that of a layer, unless it is
  # an attribute. In the mask, the wrapper of an array may be missing.
  is_attribute = lambda path: isinstance(
    path[-1] if path else None, jax.tree_util.GetAttrKey
  )
  values = {
    (_checks.names if is_attribute(path) else _checks.keys)(path): bool(leaf)
    for path, leaf in jax.tree.leaves_with_path(prefix)
  }
  used = set()

  def value(path, _):
    path = _checks.keys(path)
    for i in range(len(path) + 1):
      if path[:i] in values:
        used.add(path[:i])
        return values[path[:i]]
    return None

  selected = jax.tree_util.tree_map_with_path(value, params)
  size = jax.tree.structure(params).num_leaves
  fits = used == set(values) and len(jax.tree.leaves(selected)) == size
  return selected if fits else None
