"""What the library asks of a tree: its leaves, its shape, its masks."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import _checks

PyTree = Any
Mask = PyTree | Callable[[optax.Params], PyTree]


def accumulator_dtype(*leaves: Any) -> Any:
  """float64 if one of ``leaves`` is, float32 otherwise.

  Sums of squares in a 16-bit dtype overflow (a float16 leaf of 200s) or stop
  growing, and float32 beside bfloat16 must stay float32.
  """
  wide = any(jnp.result_type(leaf) == jnp.float64 for leaf in leaves)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def path_name(path: Any) -> str:
  """A key path as a person reads it."""
  return f'params{jax.tree_util.keystr(path)}'


def check_params(params: optax.Params) -> None:
  """Raises unless every leaf of ``params`` is a floating array."""

  def is_masked(node):
    return isinstance(node, optax.MaskedNode)

  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_masked):
    name = path_name(path)
    if is_masked(leaf):
      raise ValueError(
        f'{name} is an optax.MaskedNode: optax.masked or optax.partition'
        f' stands around this transformation and hides parameters that the'
        f' gradient function needs. Put it inside:'
        f' asam(optax.partition(...), mask=trainable) or'
        f' asam(optax.masked(...)).'
      )
    if is_float_array(leaf):
      continue
    if not hasattr(leaf, 'dtype'):
      raise TypeError(
        f'{name} must be a floating array, but got {leaf!r}. Pass the arrays'
        f' alone, as equinox.filter(model, equinox.is_inexact_array) or'
        f' nnx.split(model, nnx.Param, ...) give them.'
      )
    raise TypeError(
      f'{name} must be a floating array, but got dtype {leaf.dtype}. Split the'
      f' parameters that are trained by gradients from the others, and keep the'
      f' real and the imaginary part of a complex one as two arrays.'
    )


def is_float_array(value: Any) -> bool:
  """Whether ``value`` is a floating array or a Python float."""
  dtype = getattr(value, 'dtype', type(value))
  return dtype is float or (
    dtype is not type(value) and jnp.issubdtype(dtype, jnp.floating)
  )


def checked_params(
  params: optax.Params | None, updates: optax.Updates
) -> optax.Params:
  """``params``, if ``updates`` may be the gradient at them; else raises."""
  if params is None:
    raise ValueError(
      'params must be given, but got None: the perturbation depends on them.'
      ' Write tx.update(grads, state, params, grad_fn=grad_fn).'
    )
  check_params(params)
  check_like('grads', updates, params, write='Pass the gradient at params.')
  return params


def check_like(
  name: str,
  tree: PyTree,
  params: optax.Params,
  *,
  dtypes: bool = False,
  write: str,
) -> None:
  """Raises unless ``tree`` has the structure and shapes of ``params``.

  Args:
    name: what ``tree`` is, for the message.
    tree: the tree in question.
    params: the tree that it should be like.
    dtypes: whether the dtypes are compared, too.
    write: what to write instead, for the message.
  """
  if jax.tree.structure(tree) != jax.tree.structure(params):
    raise ValueError(
      f'{name} must have the structure of params, but'
      f' {_first_difference(tree, params)}. {write}'
    )
  pairs = zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(tree), strict=True
  )
  for (path, want), got in pairs:
    if jnp.shape(got) != jnp.shape(want):
      raise ValueError(
        f'{name} must have the shapes of params, but at {path_name(path)} got'
        f' {jnp.shape(got)} instead of {jnp.shape(want)}. {write}'
      )
    got_dtype, want_dtype = jnp.result_type(got), jnp.result_type(want)
    if dtypes and got_dtype != want_dtype:
      raise TypeError(
        f'{name} must have the dtypes of the params it is given, but at'
        f' {path_name(path)} got {got_dtype} instead of {want_dtype}. {write}'
      )


def _first_difference(tree: PyTree, params: optax.Params) -> str:
  """The first place at which the structures differ, in words."""
  got = {path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
  want = {path_name(path) for path, _ in jax.tree.leaves_with_path(params)}
  for path, _ in jax.tree.leaves_with_path(params):
    if path_name(path) not in got:
      what = f'{path_name(path)} is missing'
      break
  else:
    extra = [
      path_name(path)
      for path, _ in jax.tree.leaves_with_path(tree)
      if path_name(path) not in want
    ]
    what = f'{extra[0]} is unexpected' if extra else 'the containers differ'
  return f'{what} (got {describe(tree)}, for params {describe(params)})'


def describe(tree: PyTree) -> str:
  """What ``tree`` is, in the words of an error message."""
  if isinstance(tree, tuple):
    return f'a tuple of length {len(tree)}'
  if _checks.is_array(tree):
    return f'an array of shape {tree.shape} and dtype {tree.dtype}'
  name = type(tree).__name__
  return f'an {name}' if name[0] in 'aeiou' else f'a {name}'


def check_operator(t: PyTree, params: optax.Params) -> None:
  """Raises unless ``t`` is a :math:`T_w` for ``params``."""
  write = 'Return one array or 1 for each parameter, as elementwise() does.'
  if jax.tree.structure(t) != jax.tree.structure(params):
    raise ValueError(
      f'normalization must return a tree like params, but'
      f' {_first_difference(t, params)}. {write}'
    )
  for (path, w), leaf in zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(t), strict=True
  ):
    is_one = isinstance(leaf, int) and leaf == 1 and leaf is not True
    if not (is_one or is_float_array(leaf)):
      raise TypeError(
        f'normalization must return floating arrays or the number 1, but at'
        f' {path_name(path)} returned {leaf!r}. {write}'
      )
    try:
      chex.assert_is_broadcastable(jnp.shape(leaf), jnp.shape(w))
    except AssertionError as error:
      raise ValueError(
        f'normalization must return arrays that broadcast to their parameter,'
        f' but at {path_name(path)} returned shape {jnp.shape(leaf)} for'
        f' {jnp.shape(w)}. {write}'
      ) from error


def resolve_mask(mask: Mask | None, params: optax.Params) -> PyTree:
  """A tree like ``params`` of bools, from a mask as Optax takes them.

  Args:
    mask: a pytree of bools with the structure of ``params`` or a prefix of it,
      a function from params to one, or None for True everywhere.
    params: the parameters.

  Returns:
    A pytree of Python bools with the structure of ``params``.

  Raises:
    TypeError: a leaf of the mask is no bool.
    ValueError: the mask does not fit ``params``.
  """
  if mask is None:
    return jax.tree.map(lambda _: True, params)
  prefix = mask(params) if is_function(mask) else mask
  for path, leaf in jax.tree.leaves_with_path(prefix):
    if not isinstance(leaf, (bool, np.bool_)):
      got, hint = repr(leaf), ''
      if _checks.is_array(leaf):
        got = describe(leaf)
        hint = ' Under optax.inject_hyperparams, name mask in static_args.'
      raise TypeError(
        f'mask must be a pytree of Python bools, but at'
        f' mask{jax.tree_util.keystr(path)} got {got}. Write for example'
        f' mask=jax.tree.map(lambda x: x.ndim > 1, params).{hint}'
      )
  try:
    return jax.tree.map(
      lambda selected, subtree: jax.tree.map(lambda _: bool(selected), subtree),
      prefix,
      params,
    )
  except ValueError as error:
    raise ValueError(
      f'mask must have the structure of params or a prefix of it, but got'
      f' {jax.tree.structure(prefix)} for {jax.tree.structure(params)}. Write'
      f' for example mask=jax.tree.map(lambda x: x.ndim > 1, params).'
    ) from error


def check_selects_something(mask: Mask | None) -> None:
  """Raises if ``mask`` is a tree of bools that is false everywhere."""
  leaves = jax.tree.leaves(mask)
  if leaves and all(leaf is False or leaf is np.False_ for leaf in leaves):
    raise ValueError(
      f'mask selects nothing: got {mask!r}, false everywhere. Write mask=None'
      f' to select all, or leave the transformation out.'
    )


def is_function(mask: Mask) -> bool:
  """Whether ``mask`` is a function from params to a mask.

  The leaves decide, as in Optax: an Equinox module of bools is callable, too.
  """
  leaves = jax.tree.leaves(mask)
  return bool(leaves) and all(callable(leaf) for leaf in leaves)
