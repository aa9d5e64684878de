r"""The geometry of the normalized ball.

In the coordinates :math:`u = T_w^{-1} \epsilon` the ball :math:`\|T_w^{-1}
\epsilon\|_p \le \rho` is :math:`\|u\|_p \le \rho`, the gradient is :math:`T_w
g`, and the Hessian is :math:`T_w H T_w`. Nothing is divided by :math:`T_w`,
which may be zero.
"""

from collections.abc import Callable
from collections.abc import Iterable
import functools
import math
import operator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _trees

Arrays = list[jax.Array]


class Coordinates(NamedTuple):
  """The coordinates at some parameters.

  Attributes:
    pull: Maps a tree like ``params``, such as a gradient g, to T g: a list of
      the leaves that are perturbed, in at least float32.
    push: Maps such a list u, and optionally a list of bool arrays, to T u where
      they are True and zero elsewhere: a tree like ``params`` in at least
      float32, with an :class:`optax.MaskedNode` for each leaf that is not
      perturbed.
  """

  pull: Callable[[Any], Arrays]
  push: Callable[..., Any]


def coordinates(
  params: optax.Params,
  normalization: Callable[[optax.Params], Any],
  mask: _trees.Mask | None,
) -> Coordinates:
  """The coordinates at ``params``, whose leaves are floating-point arrays."""
  selected, treedef = jax.tree.flatten(_trees.resolve_mask(mask, params))
  _checks.check_selects_something(selected)
  t = normalization(params)
  _checks.check_operator(t, params)
  dtype = _trees.accumulator_dtype(*jax.tree.leaves(params))

  def select(tree):
    leaves = zip(selected, treedef.flatten_up_to(tree), strict=True)
    return [leaf for is_selected, leaf in leaves if is_selected]

  flat_t = select(t)

  def pull(tree):
    return [
      _multiply(t, jnp.asarray(leaf, dtype))
      for t, leaf in zip(flat_t, select(tree), strict=True)
    ]

  def push(u, is_used=None):
    tu = [_multiply(t, x) for t, x in zip(flat_t, u, strict=True)]
    if is_used is not None:
      tu = [jnp.where(used, x, 0) for used, x in zip(is_used, tu, strict=True)]
    leaves = iter(tu)
    return treedef.unflatten(
      next(leaves) if is_selected else optax.MaskedNode()
      for is_selected in selected
    )

  return Coordinates(pull, push)


def perturb(
  params: optax.Params, eps: optax.Updates, dtype: Any = None
) -> optax.Params:
  """Returns w + eps in ``dtype``, by default each parameter's, rounded once.

  A parameter that is masked out is passed through: w + 0 would be a copy.
  """

  def leaf(e, w):
    out = _checks.dtype_of(w) if dtype is None else jnp.dtype(dtype)
    if _checks.is_masked(e):
      return jnp.asarray(w, out)
    wide = _trees.accumulator_dtype(w, out)
    return jnp.asarray(jnp.asarray(w, wide) + jnp.asarray(e, wide), out)

  return jax.tree.map(leaf, eps, params, is_leaf=_checks.is_masked)


def steepest_direction(h: Arrays, p: float) -> tuple[Arrays, Arrays]:
  r"""Maximizes <h, x> over ||x||_p <= 1.

  .. math::
    x = \operatorname{sign}(h) |h|^{q - 1} / \|h\|_q^{q - 1}, \quad
    \frac{1}{p} + \frac{1}{q} = 1

  Args:
    h: Arrays of one dtype, at least float32.
    p: The order, in [1.001, inf].

  Returns:
    Arrays x like ``h``, and bool arrays that broadcast to them: where these are
    False, the maximizer is zero instead of x. They are False everywhere if
    ||h|| is zero, infinite or NaN.
  """
  return direction(h, reduce(h, p), p)


def reduce(h: Arrays, p: float) -> tuple[jax.Array, ...]:
  """The scalars by which :func:`direction` maps each element of ``h``."""
  if not h:
    return ()
  if p == 2:
    return guarded_norm(h)
  tiny = float(jnp.finfo(h[0].dtype).tiny)
  peak = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in h]).max()
  peak = jax.lax.stop_gradient(peak)
  if p == math.inf:
    return guarded_root(jnp.isfinite(peak).astype(peak.dtype), tiny)
  # |h|^q overflows and underflows early, so h is divided by about its largest
  # magnitude. That cancels, so the derivative may ignore it. XLA copies neither
  # scalar, as in `guarded_root`; it would simplify root * root.
  root, usable = guarded_root(peak, 2 * tiny)
  exponent = jnp.ceil(128 * jnp.log2(jnp.where(usable, root, 1))) / 64
  scale = jnp.exp2(exponent)
  total = _sum(_power(jnp.abs(x) / scale, p / (p - 1)) for x in h)
  # (q - 1) / q = 1 / p
  inverse = jnp.sqrt(jnp.where(usable, total, 1) ** (-2 / p))
  return scale, inverse, usable


def direction(
  h: Arrays, scalars: tuple[jax.Array, ...], p: float
) -> tuple[Arrays, Arrays]:
  """What :func:`steepest_direction` returns, element by element."""
  if not h:
    return [], []
  tiny = float(jnp.finfo(h[0].dtype).tiny)
  if p == 2:
    norm, usable = scalars
    # Most devices flush squares below `tiny` to zero, so the elements behind
    # them are dropped. Otherwise, a thousand elements of 1e-19 and one
    # of 2e-19, which alone counts in the norm, would leave the ball.
    is_used = [_exceeds(x, math.sqrt(tiny), usable) for x in h]
    return [x / norm for x in h], is_used
  if p == math.inf:
    _, usable = scalars
    # Some devices flush denormal numbers to zero, so they are always dropped.
    is_used = [_exceeds(x, tiny, usable) for x in h]
    return [jnp.sign(x) for x in h], is_used
  scale, inverse, usable = scalars
  # q - 1 = 1 / (p - 1)
  return [
    jnp.sign(x) * _power(jnp.abs(x) / scale, 1 / (p - 1)) * inverse for x in h
  ], [usable] * len(h)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
  """The sum over all elements of one or more arrays."""
  return functools.reduce(operator.add, map(jnp.sum, arrays))


def guarded_root(x: jax.Array, tiny: float) -> tuple[jax.Array, jax.Array]:
  """The root of a scalar, and whether the scalar is in (tiny, max / 8).

  The guard is inside the root, whose derivative at zero is infinite, and
  whether it was needed is read from the root. XLA copies cheap scalar
  arithmetic into the fusion of each leaf, but not a root: a comparison of ``x``
  itself would also copy its sum over all leaves, and programs would grow with
  the square of their number.
  """
  largest = float(jnp.finfo(x.dtype).max)
  is_normal = (x > tiny) & (x < largest / 8)  # False for NaN.
  root = jnp.sqrt(jnp.where(is_normal, x, tiny))
  return root, root > math.sqrt(tiny)


def guarded_norm(tree: Any) -> tuple[jax.Array, jax.Array]:
  """The norm of a tree, and whether it is neither too small nor too large."""
  squares = _trees.dot(tree, tree)
  return guarded_root(squares, float(jnp.finfo(squares.dtype).tiny))


def rejection(tree: Any, along: Any) -> tuple[Any, jax.Array, jax.Array]:
  """The part of ``tree`` that is orthogonal to the tree ``along``.

  Returns:
    That part, in at least float32; the length of the other part; and whether
    the norm of ``along`` is neither too small nor too large.
  """
  norm, usable = guarded_norm(along)
  # It is not divided by the square of the norm, which XLA would simplify, as in
  # `guarded_root`.
  length = _trees.dot(tree, along) / norm

  def leaf(x, a):
    x = _trees.widen(x)
    return x - (length / norm).astype(x.dtype) * _trees.widen(a)

  return jax.tree.map(leaf, tree, along), length, usable


# Jitted, so that jax_debug_infs does not see the threshold.
@functools.partial(jax.jit, inline=True)
def _exceeds(x: jax.Array, threshold: float, usable: jax.Array) -> jax.Array:
  """Whether |x| > threshold, element by element; False if not ``usable``.

  With one comparison per element, programs compile faster than with two
  conditions.
  """
  return jnp.abs(x) > jnp.where(usable, threshold, math.inf)


def _power(x: jax.Array, exponent: float) -> jax.Array:
  """``x ** exponent`` for x >= 0; the derivative at zero is zero, not inf."""
  return jnp.maximum(x, float(jnp.finfo(x.dtype).tiny)) ** exponent


def _multiply(t: Any, x: jax.Array) -> jax.Array:
  """``t * x`` in the dtype of ``x``; if T is the Python number 1, for free.

  Arrays of ones would be multiplied, and would take longer to compile.
  """
  if isinstance(t, int):
    return x
  return jnp.asarray(t, x.dtype) * x
