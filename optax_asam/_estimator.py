"""What the gradient estimators share."""

from collections.abc import Callable
import functools
import inspect
from typing import Any
from typing import Concatenate
from typing import ParamSpec
from typing import Protocol
from typing import TypeVar
from typing import overload

import chex
import optax

from optax_asam import _checks
from optax_asam import _trees
from optax_asam import ascent as _ascent
from optax_asam import descent as _descent
from optax_asam import normalization as _normalization
from optax_asam import transform

P = ParamSpec('P')
R = TypeVar('R', covariant=True)

GradFn = Callable[[optax.Params], optax.Updates]
ValueAndGradFn = Callable[[optax.Params], tuple[Any, optax.Updates]]


def estimator(
  rho: chex.Numeric,
  eta: chex.Numeric,
  adaptive: bool | _normalization.Normalization,
  *,
  ord: float,
  mask: _trees.Mask | None,
  ascent_steps: int,
  descent: _descent.Descent | None,
  perturbed_dtype: Any,
  has_ascent_fun: bool,
) -> Callable[..., tuple[Any, optax.Updates]]:
  """The function that takes both gradients.

  The arguments are those of :func:`optax_asam.value_and_grad`, which keeps no
  state between calls, so it cannot count updates for a schedule of ``rho``.

  Returns:
    A function of ``params``, ``value_and_grad_fn`` for the pass that is kept,
    and ``ascent_grad_fn`` for all others. The former is the clean pass, or the
    last one if another function is ascended. It returns the value of that pass,
    or what came with it, and the sharpness-aware gradient.
  """
  _checks.check_no_schedule(rho)
  ascent = _ascent.rho_ball(rho, eta, adaptive, ord=ord, mask=mask)
  _checks.check_second_gradient(descent, ascent_steps, perturbed_dtype)

  def take(
    params: optax.Params,
    value_and_grad_fn: ValueAndGradFn,
    ascent_grad_fn: GradFn,
  ) -> tuple[Any, optax.Updates]:
    out = None
    if has_ascent_fun:
      grads = ascent_grad_fn(params)
    else:
      out, grads = value_and_grad_fn(params)
    state = ascent.init(params)

    def ascend(grads):
      eps, _ = ascent.update(grads, state, params)
      return eps

    perturbed_params = transform.climb(
      params,
      ascend(grads),
      lambda params: ascend(ascent_grad_fn(params)),
      ascent_steps=ascent_steps,
      perturbed_dtype=perturbed_dtype,
    )
    if has_ascent_fun:
      out, perturbed_grads = value_and_grad_fn(perturbed_params)
    else:
      perturbed_grads = ascent_grad_fn(perturbed_params)
    perturbed_grads = _trees.cast_like(perturbed_grads, grads)
    if descent is not None:
      perturbed_grads = transform.descend(descent, grads, perturbed_grads)
    return out, perturbed_grads

  return take


class Decorator(Protocol[P, R]):
  """A function of a function and options, or of options alone."""

  @overload
  def __call__(
    self, fun: Callable[..., Any], /, *args: P.args, **kwargs: P.kwargs
  ) -> R: ...

  @overload
  def __call__(
    self, *args: P.args, **kwargs: P.kwargs
  ) -> Callable[[Callable[..., Any]], R]: ...


def usable_as_decorator(
  factory: Callable[Concatenate[Callable[..., Any], P], R],
) -> Decorator[P, R]:
  """Lets ``factory`` take options alone: ``@factory(rho=0.5)``."""
  (first, *_) = inspect.signature(factory).parameters

  @functools.wraps(factory)
  def checked(*args: Any, **kwargs: Any) -> Any:
    if args or first in kwargs:
      return factory(*args, **kwargs)
    return functools.partial(factory, **kwargs)

  return checked


def without_value(
  value_and_grad_fn: Callable[..., Any], has_aux: bool
) -> Callable[..., Any]:
  """``value_and_grad_fn`` without the value, as ``grad`` returns it."""

  @functools.wraps(value_and_grad_fn)
  def grad_fn(*args, **kwargs):
    out, grads = value_and_grad_fn(*args, **kwargs)
    return (grads, out[1]) if has_aux else grads

  return grad_fn
