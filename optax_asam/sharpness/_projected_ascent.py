"""Projected steepest ascent in a ball of the 2- or the inf-norm."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_asam import _ball
from optax_asam.sharpness._step_rules import StepRule

Arrays = list[jax.Array]


class _Carry(NamedTuple):
  """A run of ascent; ``previous`` is the point before the present one."""

  point: Arrays
  previous: Arrays
  best_point: Arrays
  best_grads: Arrays
  best: jax.Array
  rule_state: Any


def maximize(
  fun: Callable[[Arrays], jax.Array],
  start: Arrays,
  radius: chex.Numeric,
  p: float,
  *,
  steps: int,
  rule: StepRule,
  unroll: int | bool,
) -> tuple[jax.Array, Arrays]:
  """Maximizes ``fun`` over ||u||_p <= radius by projected steepest ascent.

  Args:
    fun: A function from u, arrays of one dtype, at least float32, to a scalar.
    start: Where to begin, inside the ball.
    radius: The radius of the ball.
    p: 2 or inf.
    steps: Number of steps, each of which costs a gradient.
    rule: How far they go.
    unroll: As for :func:`jax.lax.scan`.

  Returns:
    The best value of all points seen, the start among them, and its point. NaN
    counts as the best.
  """
  value_and_grad = jax.value_and_grad(fun)
  dtype = jax.eval_shape(fun, start).dtype

  def step(carry, k):
    value, grads = value_and_grad(carry.point)
    is_better = _is_better(value, carry.best)
    best_point, best_grads = _where(
      is_better,
      (carry.point, grads),
      (carry.best_point, carry.best_grads),
    )
    best = jnp.where(is_better, value, carry.best)
    size, jump, rule_state = rule.update(carry.rule_state, k, value, best)
    point, grads = _where(jump, (best_point, best_grads), (carry.point, grads))
    direction, usable = _ball.steepest(grads, p)
    direction = [jnp.where(usable, x, 0) for x in direction]
    length = size * radius
    target = project(_combine(1, point, length, direction), radius, p)
    # Nothing to keep up after a jump, or before the first step.
    weight = jnp.where(jump | (k == 0), 1.0, rule.momentum)
    kept_up = _combine(2, point, -1, carry.previous)
    next_point = project(
      _combine(weight, target, 1 - weight, kept_up), radius, p
    )
    return (
      _Carry(next_point, point, best_point, best_grads, best, rule_state),
      None,
    )

  carry = _Carry(
    point=start,
    previous=start,
    best_point=start,
    best_grads=[jnp.zeros_like(x) for x in start],
    best=jnp.array(-jnp.inf, dtype),
    rule_state=rule.init(steps, dtype),
  )
  carry, _ = jax.lax.scan(step, carry, jnp.arange(steps), unroll=unroll)
  return better((carry.best, carry.best_point), (fun(carry.point), carry.point))


def better(
  a: tuple[jax.Array, Arrays], b: tuple[jax.Array, Arrays]
) -> tuple[jax.Array, Arrays]:
  """Of two values with their points the one that is larger, a if equal."""
  return _where(_is_better(b[0], a[0]), b, a)


def project(u: Arrays, radius: jax.typing.ArrayLike, p: float) -> Arrays:
  """The nearest point of the ball."""
  if p == math.inf:
    radii = [jnp.asarray(radius, x.dtype) for x in u]
    return [jnp.clip(x, -r, r) for x, r in zip(u, radii, strict=True)]
  norm = l2_norm(u)
  scale = jnp.where(norm > radius, radius / jnp.where(norm > 0, norm, 1), 1)
  return [scale.astype(x.dtype) * x for x in u]


def l2_norm(u: Arrays) -> jax.Array:
  """The 2-norm of all arrays together."""
  return jnp.sqrt(sum(jnp.sum(x * x) for x in u))


def _is_better(value: jax.Array, best: jax.Array) -> jax.Array:
  """Whether ``value`` is larger; NaN, which is not to be hidden, is largest."""
  return jnp.isnan(value) | (value > best)


def _where(condition: chex.Numeric, a: Any, b: Any) -> Any:
  """``a`` or ``b``, two trees."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _combine(a: chex.Numeric, x: Arrays, b: chex.Numeric, y: Arrays) -> Arrays:
  """``a x + b y`` in the dtypes of x."""
  return [
    jnp.asarray(a, v.dtype) * v + jnp.asarray(b, v.dtype) * w
    for v, w in zip(x, y, strict=True)
  ]
