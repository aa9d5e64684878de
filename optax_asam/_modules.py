"""Recognizes modules of Flax NNX and Equinox without importing either."""

import sys
from typing import Any

import jax
import jax.numpy as jnp


def check_not_module(params: Any) -> None:
  """Raises if ``params`` contains a module that holds more than parameters.

  An NNX module also holds batch statistics and random keys, and an Equinox
  module functions and numbers. ``jax.grad`` would differentiate all of them,
  the ascent would perturb them, and what a forward pass changes in an NNX
  module would be lost. An NNX module of ``nnx.Param`` alone, where it is a
  pytree (Flax 0.12), and a partitioned Equinox module are pytrees of parameters
  like any other.

  Args:
    params: The arguments that are differentiated.

  Raises:
    TypeError: There is such a module.
  """
  nnx_module = _class('flax.nnx', 'Module')
  equinox_module = _class('equinox', 'Module')

  def is_module(node):
    return isinstance(node, (nnx_module, equinox_module))

  for path, node in jax.tree.leaves_with_path(params, is_leaf=is_module):
    name = f'params{jax.tree_util.keystr(path)}'
    if isinstance(node, nnx_module):
      _check_nnx(name, node)
    elif isinstance(node, equinox_module):
      _check_equinox(name, node)


def _class(module: str, name: str) -> Any:
  """A class of a module that is imported, or else () for ``isinstance``."""
  return getattr(sys.modules.get(module), name, ())


def _check_nnx(name: str, module: Any) -> None:
  """Raises unless every leaf of ``module`` is an ``nnx.Param``."""
  param = _class('flax.nnx', 'Param')
  variable = _class('flax.nnx', 'Variable')

  def is_variable(node):
    return isinstance(node, variable)

  for path, leaf in jax.tree.leaves_with_path(module, is_leaf=is_variable):
    if not isinstance(leaf, param):
      raise TypeError(
        f'{name} is the Flax NNX module {type(module).__name__}, which must'
        f' hold only nnx.Param here, but {name}{jax.tree_util.keystr(path)} is'
        f' of type {type(leaf).__name__}. Use optax_asam.nnx.value_and_grad or'
        f' optax_asam.nnx.grad: they perturb only nnx.Param, and update'
        f' the module as nnx.value_and_grad does.'
      )


def _check_equinox(name: str, module: Any) -> None:
  """Raises unless every leaf of ``module`` is a floating array."""
  for path, leaf in jax.tree.leaves_with_path(module):
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f'{name} is the Equinox module {type(module).__name__}, which must hold'
        f' only floating arrays here, but'
        f' {name}{jax.tree_util.keystr(path)} is'
        f' {leaf if dtype is None else f"an array of dtype {dtype}"}. Use'
        f' optax_asam.equinox.filter_value_and_grad or'
        f' optax_asam.equinox.filter_grad, or pass what eqx.partition(model,'
        f' eqx.is_inexact_array) gives and eqx.combine it in the loss function.'
      )
