"""What the gradient estimators share."""

from collections.abc import Callable
import functools
from typing import Any

import chex
import optax

from optax_asam import _checks
from optax_asam import _trees
from optax_asam import ascent as _ascent
from optax_asam import descent as _descent
from optax_asam import normalization as _normalization
from optax_asam import transform


def second_gradient(
  rho: chex.Numeric,
  eta: chex.Numeric,
  adaptive: bool | _normalization.Normalization,
  *,
  ord: float,
  mask: _trees.Mask | None,
  ascent_steps: int,
  descent: _descent.Descent | None,
  perturbed_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
  """The transformation from a gradient to the sharpness-aware one.

  The arguments are those of :func:`optax_asam.value_and_grad`, which keeps no
  state between calls, so it cannot count updates for a schedule of ``rho``.
  """
  _checks.check_no_schedule(rho)
  return transform.sharpness_aware(
    _ascent.rho_ball(rho, eta, adaptive, ord=ord, mask=mask),
    descent,
    ascent_steps=ascent_steps,
    perturbed_dtype=perturbed_dtype,
  )


def without_value(
  value_and_grad_fn: Callable[..., Any], has_aux: bool
) -> Callable[..., Any]:
  """``value_and_grad_fn`` without the value, as ``grad`` returns it."""

  @functools.wraps(value_and_grad_fn)
  def grad_fn(*args, **kwargs):
    out, grads = value_and_grad_fn(*args, **kwargs)
    return (grads, out[1]) if has_aux else grads

  return grad_fn
