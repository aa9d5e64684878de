"""The momentum that an optimizer keeps in its state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import _checks
from optax_asam import _trees

# Fields of Optax's states that hold an average of gradients.
_NAMES = ('trace', 'mu')
# The names on the path of a leaf within a field, and the leaf.
_Field = list[tuple[tuple[Any, ...], Any]]


def fields(state: optax.OptState, names: tuple[str, ...]) -> list[_Field]:
  """What ``state`` holds under one of ``names``, which may contain each other.

  Paths are looked at, not types of nodes: a state may have become a tree of
  dictionaries, parameters may be named ``mu``, and arrays have a method
  ``trace``.
  """
  found = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    path = _checks.names(path)
    for i, name in enumerate(path, start=1):
      if isinstance(name, str) and name in names:
        found.setdefault(path[:i], []).append((path[i:], leaf))
  return list(found.values())


def find(state: optax.OptState, params: optax.Params) -> list[optax.Params]:
  """What ``state`` holds in fields ``trace`` or ``mu``, like ``params``."""
  leaves, treedef = jax.tree.flatten_with_path(params)
  if not leaves:  # A placeholder of optax.tree.map_params, for example.
    return [params]
  shapes = [(_checks.names(path), jnp.shape(leaf)) for path, leaf in leaves]
  return [
    treedef.unflatten(leaf for _, leaf in field)
    for field in fields(state, _NAMES)
    if [(path, jnp.shape(leaf)) for path, leaf in field] == shapes
  ]


def check_found(
  base_tx: optax.GradientTransformationExtraArgs,
  state: optax.OptState,
  params: optax.Params,
) -> None:
  """Raises unless ``state`` holds one momentum, and it is one of gradients.

  The states of SGD and of ``rmsprop`` with momentum look the same, but the
  latter averages negative, preconditioned updates. So the optimizer takes one
  update of a small tree with the structure of ``params``: what it then holds
  must be a positive multiple of the gradient.
  """
  count = len(find(state, params))
  if count != 1:
    raise _checks.no_momentum(f'it keeps {count}')
  random = np.random.default_rng(0)

  def small(w):
    return np.zeros([min(size, 2) for size in jnp.shape(w)])

  def grad(w):  # Small, for clipping, and exact in 16 bits.
    return random.choice([-3, -2, -1, 1, 2, 3], np.shape(w)) / 1024

  zeros = jax.tree.map(small, params)
  grads = jax.tree.map(grad, zeros)
  with jax.ensure_compile_time_eval():  # Under jit, too.
    as_params = lambda x, w: jnp.asarray(x, _checks.dtype_of(w))
    zeros = jax.tree.map(as_params, zeros, params)
    grads = jax.tree.map(as_params, grads, params)
    try:
      _, state = base_tx.update(
        grads, base_tx.init(zeros), zeros, value=jnp.zeros([])
      )
      (momentum,) = find(state, zeros)
      ratios = [
        np.asarray(_trees.widen(m) / _trees.widen(g)).ravel()
        for m, g in zip(
          jax.tree.leaves(momentum), jax.tree.leaves(grads), strict=True
        )
      ]
    except Exception as error:
      raise _checks.no_momentum('an update of small arrays failed') from error
  ratios = np.concatenate([np.empty(0), *ratios])
  if ratios.size and not 0 < ratios.max() <= 1.02 * ratios.min():
    raise _checks.no_momentum('what it keeps is not an average of gradients')
