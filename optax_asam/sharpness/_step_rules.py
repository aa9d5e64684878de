"""How far the steps of a projected ascent go."""

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
    momentum: The weight of a step beside that of the one before it: with 1
      there is no momentum.
    init: From the number of steps and the dtype of values to a state.
    update: From a state, the number of the step from 0 on, the value at the
      present point and the best one so far to the size of the step, in units of
      the radius, a bool, whether to go on from the best point, and the state.
  """

  momentum: float
  init: Callable[[int, Any], Any]
  update: Callable[
    [Any, jax.Array, jax.Array, jax.Array],
    tuple[chex.Numeric, chex.Numeric, Any],
  ]


def fixed_steps(size: float = 0.25) -> StepRule:
  """A first step to the surface of the ball, then steps of one size.

  Args:
    size: The size of the steps after the first, in units of the radius.

  Returns:
    A rule for the argument ``step_rule`` of :func:`worst_case`.

  Raises:
    TypeError: ``size`` is no real number.
    ValueError: ``size`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import sharpness
    >>> rise = sharpness.worst_case(
    ...     lambda params: jnp.cos(params).sum(), jnp.ones(2), 0.1,
    ...     step_rule=sharpness.fixed_steps(0.1))
    >>> print(f'{rise:.3f}')
    0.117
  """
  _checks.check_scale('size', size, '0.25')

  def update(state, k, value, best):
    del value, best
    return jnp.where(k == 0, 1.0, size), False, state

  return StepRule(1.0, lambda steps, dtype: (), update)


class ApgdState(NamedTuple):
  """What APGD remembers.

  Attributes:
    size: The size of the steps.
    value: The value at the point before.
    increases: Number of steps since the last checkpoint that went up.
    best: The best value at the last checkpoint.
    halved: Whether the size was halved there.
    is_checkpoint: bool [steps]: whether one follows a step.
    window: int [steps]: how many steps it closes.
  """

  size: jax.Array
  value: jax.Array
  increases: jax.Array
  best: jax.Array
  halved: jax.Array
  is_checkpoint: jax.Array
  window: jax.Array


def apgd_checkpoints(steps: int) -> list[int]:
  """The numbers of the steps after which APGD looks back."""
  fractions = [0.0, 0.22]
  while fractions[-1] < 1:
    width = max(fractions[-1] - fractions[-2] - 0.03, 0.06)
    fractions.append(fractions[-1] + width)
  # In exact arithmetic: 0.22 + 0.19 is 0.41.
  numbers = [math.ceil(round(p * steps, 9)) for p in fractions]
  return sorted({n for n in numbers if n <= steps})


def apgd_steps() -> StepRule:
  """The rule of Auto-PGD: halves the size of the steps where they stall.

  Steps of twice the radius at first, each with a quarter of the one before it.
  At a few points of the way, if fewer than three quarters of the steps since
  the last such point went up, or none led to a new best point, the size is
  halved and the run goes on from its best point.

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
    increases = state.increases + ((k > 0) & (value > state.value))
    is_checkpoint = state.is_checkpoint[k]
    # A run that starts below zero has not stalled as it climbs.
    last_best = jnp.where(k == 0, best, state.best)
    stalled = (increases < 0.75 * state.window[k]) | (
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
