"""The momentum that an optimizer keeps in its state."""

import itertools
from typing import Any

import jax
from jax import core
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import _checks
from optax_asam import _trees

# Fields of Optax's states that hold an average of gradients.
_NAMES = ('trace', 'mu')
# The names on the path of a leaf within a field, and the leaf.
_Field = list[tuple[tuple[str, ...], Any]]


def names(path: Any) -> tuple[str, ...]:
  """The names on a key path; an index is one, as in Flax's state dicts."""
  return tuple(map(str, _checks.names(path)))


def fields(state: optax.OptState, wanted: tuple[str, ...]) -> list[_Field]:
  """What ``state`` holds under the ``wanted`` names, also within each other.

  Paths are looked at, not types of nodes: a state may have become a tree of
  dictionaries, parameters may be named ``mu``, and arrays have a method
  ``trace``.
  """
  found = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    path = names(path)
    for i, name in enumerate(path, start=1):
      if name in wanted:
        found.setdefault(path[:i], []).append((path[i:], leaf))
  return list(found.values())


def find(state: optax.OptState, params: optax.Params) -> list[optax.Params]:
  """What ``state`` holds in fields ``trace`` or ``mu``, like ``params``."""
  leaves, treedef = jax.tree.flatten_with_path(params)
  if not leaves:  # Any field would do.
    return [params]
  shapes = [(names(path), jnp.shape(leaf)) for path, leaf in leaves]
  return [
    treedef.unflatten(leaf for _, leaf in field)
    for field in fields(state, _NAMES)
    if [(path, jnp.shape(leaf)) for path, leaf in field] == shapes
  ]


def check_found(
  base_tx: optax.GradientTransformationExtraArgs,
  state: optax.OptState,
  params: optax.Params,
  perturbation: optax.Updates,
) -> None:
  """Raises unless ``state`` holds one momentum, and it is one of gradients.

  The states of SGD and of ``rmsprop`` with momentum look the same, but the
  latter averages negative, preconditioned updates. So the optimizer updates a
  small tree with the structure of ``params``, with a gradient and with zeros:
  what the gradient adds to the momentum must be a positive multiple of it, at
  first and after another gradient that any preconditioner remembers, and at
  parameters of several lengths. What is masked out of ``perturbation`` does not
  count.
  """
  if not jax.tree.leaves(params):  # What base_tx masks may not fit it.
    return
  buffers = find(state, params)
  if len(buffers) != 1:
    raise _checks.no_momentum(f'it keeps {len(buffers)}')
  random = np.random.default_rng(0)

  def small(w):
    return np.zeros([min(size, 2) for size in jnp.shape(w)])

  lengths, sizes = itertools.cycle([1, 2, 3]), itertools.cycle([1, -1 / 8])

  def weights(zeros):
    return zeros + 2.0**-10 * next(lengths)

  def grad(zeros, m):
    # So small that no clipping acts, but exact, also in float16.
    size = max(2.0**-20, 16 * float(jnp.finfo(_checks.dtype_of(m)).tiny))
    return size * random.choice([-3, -2, -1, 1, 2, 3], zeros.shape)

  def earlier_grad(zeros, m):
    # In 16 bits, too large for the other one to be added to it.
    size = 0.125 if jnp.finfo(_checks.dtype_of(m)).bits >= 32 else 0.0
    return size * np.reshape([next(sizes) for _ in zeros.flat], zeros.shape)

  zeros = jax.tree.map(small, params)
  at = jax.tree.map(weights, zeros)
  earlier = jax.tree.map(earlier_grad, zeros, *buffers)
  grads = jax.tree.map(grad, zeros, *buffers)
  with jax.ensure_compile_time_eval():  # Under jit, too.
    dtypes = jax.tree.map(_trees.accumulator_dtype, params)
    zeros, at, earlier, grads = (
      jax.tree.map(jnp.asarray, tree, dtypes)
      for tree in (zeros, at, earlier, grads)
    )

    def update(grads, state):
      return base_tx.update(grads, state, at, value=jnp.zeros([]))[1]

    selected = [
      not _checks.is_masked(leaf)
      for leaf in jax.tree.leaves(perturbation, is_leaf=_checks.is_masked)
    ]

    def ratios_from(state):
      """Of what the gradient adds to it."""
      found, without = (
        jax.tree.map(_trees.widen, *find(update(tree, state), at))
        for tree in (grads, zeros)
      )
      ratios = jax.tree.map(
        lambda m, m_0, g: jnp.ravel((m - m_0) / g), found, without, grads
      )
      return itertools.compress(jax.tree.leaves(ratios), selected)

    try:
      first = base_tx.init(at)
      ratios = [
        *ratios_from(first),  # Yogi begins with a momentum that is not zero.
        *ratios_from(update(earlier, first)),
      ]
    except Exception as error:
      raise _checks.no_momentum(
        f'an update of small arrays failed ({type(error).__name__}:'
        f' {str(error).partition(chr(10))[0]})'
      ) from error
  if any(isinstance(ratio, core.Tracer) for ratio in ratios):
    return  # With a traced decay, only the structure is known.
  ratios = np.concatenate([np.empty(0), *ratios])
  if ratios.size and not 0 < ratios.max() <= 1.02 * ratios.min():
    raise _checks.no_momentum('what it keeps is not proportional to gradients')
