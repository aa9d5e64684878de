"""Projected steepest ascent in a ball of the 2- or the inf-norm."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_asam import _geometry
from optax_asam import _trees
from optax_asam._geometry import Arrays
from optax_asam.sharpness import _ball
from optax_asam.sharpness._step_rules import StepRule


class _Carry(NamedTuple):
  """The state of a run; ``previous`` is the point before ``point``."""

  point: Arrays
  previous: Arrays
  best_point: Arrays
  best_grads: Arrays
  best: jax.Array
  rule_state: Any


def maximize(
  fun: Callable[[Arrays], jax.Array],
  start: Arrays,
  radius: jax.Array,
  p: float,
  *,
  steps: int,
  rule: StepRule,
  unroll: int | bool,
) -> tuple[jax.Array, Arrays]:
  """Maximizes ``fun`` over ||u||_p <= radius by projected steepest ascent.

  Args:
    fun: A function from u, arrays of one dtype, at least float32, to a scalar.
    start: The first point, inside the ball.
    radius: The radius of the ball, in the same dtype.
    p: 2 or inf.
    steps: Number of steps, each of which costs a gradient.
    rule: The sizes of the steps.
    unroll: As in :func:`jax.lax.scan`.

  Returns:
    The largest value at any visited point, ``start`` included, and the point.
    NaN counts as the largest.
  """
  value_and_grad = jax.value_and_grad(fun)
  dtype = start[0].dtype

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
    steepest = zip(*_geometry.steepest_direction(grads, p), strict=True)
    direction = [jnp.where(is_used, x, 0) for x, is_used in steepest]
    length = jnp.asarray(size, dtype) * radius
    target = _ball.project(_combine(1, point, length, direction), radius, p)
    # No momentum after a jump, or before the first step.
    weight = jnp.where(jump | (k == 0), 1.0, rule.momentum)
    momentum = _combine(2, point, -1, carry.previous)
    next_point = _ball.project(
      _combine(weight, target, 1 - weight, momentum), radius, p
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
    best=-jnp.array(jnp.finfo(dtype).max, dtype),
    rule_state=rule.init(steps, dtype),
  )
  carry = _trees.varying_like(carry, start)
  unroll = _ball.unrolled(unroll, steps)
  carry, _ = jax.lax.scan(step, carry, jnp.arange(steps), unroll=unroll)
  return better((carry.best, carry.best_point), (fun(carry.point), carry.point))


def better(
  a: tuple[jax.Array, Arrays], b: tuple[jax.Array, Arrays]
) -> tuple[jax.Array, Arrays]:
  """The larger of two values, with its point; ``a`` if they are equal."""
  return _where(_is_better(b[0], a[0]), b, a)


def _is_better(value: jax.Array, best: jax.Array) -> jax.Array:
  """Whether ``value`` is larger; NaN, which must not be hidden, is largest."""
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
