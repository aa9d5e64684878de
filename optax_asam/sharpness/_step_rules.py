"""Step sizes for projected ascent."""

from collections.abc import Callable
from itertools import pairwise
import math
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_asam import _checks


class StepRule(NamedTuple):
  """How far each step goes.

  Attributes:
    momentum: The weight of a step relative to the previous one; 1 means no
      momentum.
    init: A function from the number of steps and the dtype of values to a
      state.
    update: A function from a state, the index of the step, the value at the
      current point and the best value so far to the size of the step, in units
      of the radius, whether to restart from the best point, and the new state.
  """

  momentum: float
  init: Callable[[int, Any], Any]
  update: Callable[
    [Any, jax.Array, jax.Array, jax.Array],
    tuple[chex.Numeric, chex.Numeric, Any],
  ]


def fixed_steps(size: float = 0.25) -> StepRule:
  """A first step to the surface of the ball, then steps of a fixed size.

  Args:
    size: The size of the steps after the first, in units of the radius.

  Returns:
    A rule for the argument ``step_rule`` of :func:`worst_case`.

  Raises:
    TypeError: ``size`` is not a real number.
    ValueError: ``size`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import sharpness
    >>> rise = sharpness.worst_case(
    ...     lambda params: jnp.cos(params).sum(), jnp.arange(3.0), 1.0,
    ...     steps=2, step_rule=sharpness.fixed_steps(0.1))
    >>> print(f'{rise:.3f}')
    1.714
  """
  _checks.check_scale('size', size, '0.25')

  def update(state, k, value, best):
    del value, best
    return jnp.where(k == 0, 1.0, size), False, state

  return StepRule(1.0, lambda steps, dtype: (), update)


class ApgdState(NamedTuple):
  """The state of APGD.

  Attributes:
    size: The size of the steps.
    value: The value at the previous point.
    increases: Number of steps since the last checkpoint that increased the
      value.
    best: The best value at the last checkpoint.
    halved: Whether the size was halved at the last checkpoint.
    is_checkpoint: Whether a checkpoint follows each step, bool [steps].
    window: Number of steps since the last checkpoint, int32 [steps].
  """

  size: jax.Array
  value: jax.Array
  increases: jax.Array
  best: jax.Array
  halved: jax.Array
  is_checkpoint: jax.Array
  window: jax.Array


def apgd_checkpoints(steps: int) -> list[int]:
  """The numbers of steps after which APGD decides whether to halve."""
  fractions = [0.0, 0.22]
  while fractions[-1] < 1:
    width = max(fractions[-1] - fractions[-2] - 0.03, 0.06)
    fractions.append(fractions[-1] + width)
  # In exact arithmetic: 0.22 + 0.19 is 0.41.
  numbers = [math.ceil(round(p * steps, 9)) for p in fractions]
  return sorted({n for n in numbers if n <= steps})


def apgd_steps() -> StepRule:
  """The rule of Auto-PGD: halves the step size when progress stalls.

  Steps start at twice the radius, with momentum 0.25. At a few checkpoints, if
  fewer than three quarters of the steps since the last one increased the loss,
  or if there is no new best point, the size is halved and the run restarts from
  its best point. Unlike the published rule, a halving does not spend a step on
  returning to the best point.

  Returns:
    A rule for the argument ``step_rule`` of :func:`worst_case`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import sharpness
    >>> rise = sharpness.worst_case(
    ...     lambda params: jnp.cos(params).sum(), jnp.ones(2), 0.1,
    ...     step_rule=sharpness.apgd_steps())
    >>> print(f'{rise:.3f}')
    0.117

  References:
    Croce and Hein, `Reliable evaluation of adversarial robustness with an
    ensemble of diverse parameter-free attacks
    <https://arxiv.org/abs/2003.01690>`_, 2020, section 3.
  """

  def init(steps, dtype):
    checkpoints = apgd_checkpoints(steps)
    windows = {end: end - begin for begin, end in pairwise(checkpoints)}
    return ApgdState(
      size=jnp.array(2, dtype),
      value=jnp.array(0, dtype),
      increases=jnp.int32(0),
      best=jnp.array(0, dtype),
      halved=jnp.array(False),
      is_checkpoint=jnp.array([k in windows for k in range(steps)]),
      window=jnp.array([windows.get(k, 0) for k in range(steps)], jnp.int32),
    )

  def update(state, k, value, best):
    went_up = (k > 0) & (value > state.value)
    increases = state.increases + went_up.astype(jnp.int32)
    is_checkpoint = state.is_checkpoint[k]
    # A run that starts below zero has not stalled while it climbs.
    last_best = jnp.where(k == 0, best, state.best)
    stalled = (4 * increases < 3 * state.window[k]) | (
      ~state.halved & (best <= last_best)
    )
    halve = is_checkpoint & stalled
    size = jnp.where(halve, state.size / 2, state.size)
    return (
      size,
      halve,
      state._replace(
        size=size,
        value=jnp.where(halve, best, value),
        increases=jnp.where(is_checkpoint, 0, increases),
        best=jnp.where(is_checkpoint, best, last_best),
        halved=jnp.where(is_checkpoint, halve, state.halved),
      ),
    )

  return StepRule(0.75, init, update)
