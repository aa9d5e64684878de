"""The worst point of a normalized ball."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _trees
from optax_asam import normalization as _normalization
from optax_asam.sharpness import _ball
from optax_asam.sharpness import _projected_ascent
from optax_asam.sharpness import _step_rules

_FIXED_STEPS = _step_rules.fixed_steps()


def worst_case(
  loss_fn: _ball.LossFn,
  params: optax.Params,
  rho: chex.Numeric,
  *,
  normalization: _normalization.Normalization = _ball.ELEMENTWISE,
  ord: float = 2,
  steps: int = 20,
  step_rule: _step_rules.StepRule = _FIXED_STEPS,
  restarts: int = 1,
  key: jax.Array | None = None,
  mask: _trees.Mask | None = None,
  perturbed_dtype: Any = jnp.float32,
  batches: Any = None,
  unroll: int | bool = 1,
) -> jax.Array:
  r"""The rise of the loss to the worst point of the normalized ball.

  .. math::
    \max_{\|T_w^{-1} \epsilon\|_p \le \rho} L(w + \epsilon) - L(w)

  by projected steepest ascent. The first run starts at w, and its first step
  is the perturbation of :func:`optax_asam.asam`; the others start at random
  points of the ball. The result is the largest rise at any visited point, w
  included: a lower bound on the maximum, never negative, and never smaller with
  more restarts.

  A single run stays where it starts if the gradient there is zero, and in a
  large ball of p = inf it may end far below the maximum: use restarts. Fixed
  steps do not converge to a maximum inside the ball; those of APGD do.

  Args:
    loss_fn: A function ``loss_fn(params)`` that returns a real scalar, or with
      ``batches`` a function ``loss_fn(params, batch)``.
    params: The parameters w, a pytree of floating-point arrays.
    rho: The radius :math:`\rho \ge 0`, a number or a traced scalar.
    normalization: A function from ``params`` to :math:`T_w`: by default that of
      ASAM; ``normalization.identity()`` for sharpness without normalization.
    ord: The order p of the norm, 2 or inf.
    steps: Number of steps in a run, each of which costs a gradient.
    step_rule: The sizes of the steps: :func:`fixed_steps` or
      :func:`apgd_steps`.
    restarts: Number of runs.
    key: A random key for the runs after the first.
    mask: Which leaves are perturbed, as in :func:`optax_asam.asam`.
    perturbed_dtype: The dtype of w and w + eps in ``loss_fn``, or each
      parameter's own if that is wider. None for each parameter's own, where
      bfloat16 would lose most of a small perturbation.
    batches: None, or a pytree whose leaves have a leading axis of batches. The
      result is then the mean over the batches, each with its own worst point.
    unroll: As in :func:`jax.lax.scan`, for the loop over the steps; True also
      unrolls those over restarts and batches. On CPU, XLA runs convolutions
      many times slower in a loop: True leaves none, but compile time grows with
      the number of gradients.

  Returns:
    The rise, a scalar in the units of the loss, at least float32. NaN if the
    loss was NaN at any point.

  Raises:
    TypeError: An argument is of the wrong type, or the loss is not a real
      scalar.
    ValueError: An argument is out of its range, or ``key`` is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization, sharpness
    >>> loss_fn = lambda params: jnp.sum(params**2)
    >>> params = jnp.array([3.0, 4.0])
    >>> rise = sharpness.worst_case(
    ...     loss_fn, params, 0.5, normalization=normalization.identity())
    >>> print(f'{rise:.3f}')  # 5.5^2 - 5^2
    5.250

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 3;
    Andriushchenko et al., `A Modern Look at the Relationship between Sharpness
    and Generalization <https://arxiv.org/abs/2302.07011>`_, 2023, section 3.
  """
  _ball.check_arguments(
    loss_fn, params, rho, normalization, mask, perturbed_dtype, key
  )

  def on_batch(loss_fn, key):
    return worst_perturbation(
      loss_fn,
      params,
      rho,
      normalization=normalization,
      ord=ord,
      steps=steps,
      step_rule=step_rule,
      restarts=restarts,
      key=key,
      mask=mask,
      perturbed_dtype=perturbed_dtype,
      unroll=unroll,
    )[0]

  return _ball.mean_over_batches(on_batch, loss_fn, key, batches, unroll)


def worst_perturbation(
  loss_fn: _ball.LossFn,
  params: optax.Params,
  rho: chex.Numeric,
  *,
  normalization: _normalization.Normalization = _ball.ELEMENTWISE,
  ord: float = 2,
  steps: int = 20,
  step_rule: _step_rules.StepRule = _FIXED_STEPS,
  restarts: int = 1,
  key: jax.Array | None = None,
  mask: _trees.Mask | None = None,
  perturbed_dtype: Any = jnp.float32,
  unroll: int | bool = 1,
) -> tuple[jax.Array, optax.Params]:
  r"""The result of :func:`worst_case`, and the perturbation that gives it.

  Args:
    loss_fn: A function ``loss_fn(params)`` that returns a real scalar.
    params: The parameters. This and the following arguments are as in
      :func:`worst_case`.
    rho: The radius.
    normalization: A function from ``params`` to :math:`T_w`.
    ord: The order p of the norm, 2 or inf.
    steps: Number of steps in a run.
    step_rule: The sizes of the steps.
    restarts: Number of runs.
    key: A random key for the runs after the first.
    mask: Which leaves are perturbed.
    perturbed_dtype: The dtype in which w + eps is formed.
    unroll: Whether and how far loops are unrolled.

  Returns:
    The rise of the loss, a scalar, and :math:`\epsilon`, a pytree like
    ``params`` in at least float32.

  Raises:
    TypeError: An argument is of the wrong type, or the loss is not a real
      scalar.
    ValueError: An argument is out of its range, or ``key`` is missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_asam import normalization, sharpness
    >>> _, eps = sharpness.worst_perturbation(
    ...     lambda params: jnp.sum(params**2), jnp.array([3.0, 4.0]), 0.5,
    ...     normalization=normalization.identity())
    >>> print(np.asarray(eps).round(3))
    [0.3 0.4]
  """
  _ball.check_arguments(
    loss_fn, params, rho, normalization, mask, perturbed_dtype, key
  )
  _checks.check_ord_of_projection(ord)
  _checks.check_count('steps', steps)
  _checks.check_count('restarts', restarts)
  if not isinstance(step_rule, _step_rules.StepRule):
    raise TypeError(
      f'step_rule must be a sharpness.StepRule, but got {step_rule!r}.'
      f' For example: step_rule=sharpness.fixed_steps(0.25) or'
      f' step_rule=sharpness.apgd_steps().'
    )
  if restarts == 1:
    keys = None
  elif key is None:
    raise ValueError(
      f'key must be given for restarts, but got None for restarts={restarts}.'
      f' For example: key=jax.random.key(0).'
    )
  else:
    # More restarts start with the keys of fewer restarts.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
      jnp.arange(1, restarts)
    )
  rise, center, push = _ball.around(
    loss_fn, params, normalization, mask, perturbed_dtype
  )
  rho = jnp.asarray(rho, center[0].dtype)

  def run(start):
    return _projected_ascent.maximize(
      rise, start, rho, ord, steps=steps, rule=step_rule, unroll=unroll
    )

  def restart(best, key):
    point = _ball.in_ball(key, center, ord)
    return _projected_ascent.better(best, run([rho * x for x in point])), None

  best = run(center)
  if keys is not None:
    best, _ = jax.lax.scan(
      restart, best, keys, unroll=_ball.unrolled(unroll is True, restarts - 1)
    )
  value, u = best
  eps = _trees.fill_masked(push(u), _ball.widen(params, perturbed_dtype))
  # At w the rise is zero, which rounding in a fused program may miss.
  return _ball.at_radius(rho, jnp.maximum(value, 0)), eps
