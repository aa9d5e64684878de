r"""Drop-in replacements for ``jax.value_and_grad`` and ``jax.grad``."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import chex
import jax

from optax_asam import _checks
from optax_asam import _estimator
from optax_asam import _trees
from optax_asam import descent as _descent
from optax_asam import normalization as _normalization


def value_and_grad(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  *,
  rho: chex.Numeric = 0.5,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  ascent_steps: int = 1,
  descent: _descent.Descent | None = None,
  perturbed_dtype: Any = None,
  ascent_fun: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  r"""The value of ``fun`` and its sharpness-aware gradient.

  .. math::
    (L(w), \nabla L(w + \epsilon)), \quad
    \epsilon = \rho \, \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}

  A drop-in replacement for :func:`jax.value_and_grad` with any optimizer. The
  value and the auxiliary data are those of the clean pass, so
  BatchNorm statistics among them are updated once, from the unperturbed model;
  with ``ascent_fun``, they are those of the perturbed pass. The other
  arguments, such as a dropout key, are the same in both passes. For modules
  that hold more than parameters, use :mod:`optax_asam.nnx` or
  :mod:`optax_asam.equinox`.

  Args:
    fun: A function that returns a scalar, or with ``has_aux`` a pair of a
      scalar and auxiliary data.
    argnums: Which positional arguments are differentiated and perturbed; with
      several, the norm is taken over all of them.
    has_aux: Whether ``fun`` returns auxiliary data.
    rho: The radius :math:`\rho \ge 0`, a number or a traced scalar. For a
      schedule, pass ``rho=schedule(step)``: this function keeps no step count.
      The default is for element-wise normalization and ``ord=2``; SAM usually
      takes 0.05.
    eta: The constant :math:`\eta \ge 0` of element-wise normalization.
    adaptive: True for element-wise normalization of all but biases, False for
      none (SAM), or a normalization such as ``normalization.filterwise(0.01)``.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which leaves are perturbed, as in :func:`asam`. With several
      ``argnums`` it is a mask for the tuple of those arguments.
    ascent_steps: Number of ascent steps, each of which costs a gradient.
    descent: A function from the clean and the perturbed gradient to the one
      that is returned; by default the perturbed one.
    perturbed_dtype: The dtype in which w + eps is formed, as in
      :func:`sharpness_aware`; by default each parameter's own.
    ascent_fun: The function whose gradient determines the perturbation; by
      default ``fun``. It takes the same arguments as ``fun`` and returns a
      scalar, or with ``has_aux`` a pair. For example, the loss of a quarter of
      the batch: ``ascent_fun=lambda params, batch: loss_fn(params,
      jax.tree.map(lambda x: x[::4], batch))``. All ascent steps use it. ``fun``
      is evaluated only at w + eps, so the value and the auxiliary data are
      those at w + eps. The first argument of ``descent`` is the gradient of
      ``ascent_fun``.

  Returns:
    A function of the arguments of ``fun`` that returns ``(value, grads)``, or
    ``((value, aux), grads)`` with ``has_aux``. The gradient has the shapes and
    dtypes of the arguments.

  Raises:
    TypeError: An argument is of the wrong type, or ``rho`` is a schedule.
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax_asam
    >>> loss_fn = lambda params: jnp.sum(params**2)
    >>> params = jnp.array([3.0, 4.0])
    >>> value, grads = optax_asam.value_and_grad(loss_fn, rho=0.5)(params)
    >>> print(value, np.asarray(grads).round(3))
    25.0 [ 7.477 11.494]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.
  """
  _checks.check_function('fun', fun, 'value_and_grad(loss_fn, rho=0.5)')
  _checks.check_argnums(argnums)
  estimate = _estimator.estimator(
    rho,
    eta,
    adaptive,
    ord=ord,
    mask=mask,
    ascent_steps=ascent_steps,
    descent=descent,
    perturbed_dtype=perturbed_dtype,
    has_ascent_fun=ascent_fun is not None,
  )

  ascent_fun_ = _checks.checked_ascent_fun(fun, ascent_fun, has_aux)

  @functools.wraps(fun)
  def value_and_grad_fn(*args, **kwargs):
    def value_and_grad_at(params):
      perturbed_args = _replace(args, argnums, params)
      return jax.value_and_grad(fun, argnums, has_aux)(
        *perturbed_args, **kwargs
      )

    def ascent_grad_at(params):
      perturbed_args = _replace(args, argnums, params)
      grads = jax.grad(ascent_fun_, argnums, has_aux)(*perturbed_args, **kwargs)
      return grads[0] if has_aux else grads

    _checks.check_argnums(argnums, len(args))
    params = _select(args, argnums)
    _checks.check_not_module(params)
    _checks.check_params(params)
    return estimate(params, value_and_grad_at, ascent_grad_at)

  return value_and_grad_fn


def grad(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  *,
  rho: chex.Numeric = 0.5,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  ascent_steps: int = 1,
  descent: _descent.Descent | None = None,
  perturbed_dtype: Any = None,
  ascent_fun: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  r"""The sharpness-aware gradient of ``fun``, a drop-in for :func:`jax.grad`.

  .. math::
    \nabla L(w + \epsilon), \quad
    \epsilon = \rho \, \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}

  Args:
    fun: A function that returns a scalar, or with ``has_aux`` a pair of a
      scalar and auxiliary data.
    argnums: Which arguments are differentiated. This and the following
      arguments are as in :func:`value_and_grad`.
    has_aux: Whether ``fun`` returns auxiliary data.
    rho: The radius, a number or a traced scalar.
    eta: The constant of element-wise normalization.
    adaptive: True, False or a normalization.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which leaves are perturbed.
    ascent_steps: Number of ascent steps.
    descent: A function from the clean and the perturbed gradient to the one
      that is returned.
    perturbed_dtype: The dtype in which w + eps is formed.
    ascent_fun: The function whose gradient determines the perturbation.

  Returns:
    A function of the arguments of ``fun`` that returns the gradient, or
    ``(grads, aux)`` with ``has_aux``.

  Raises:
    TypeError: An argument is of the wrong type, or ``rho`` is a schedule.
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax_asam
    >>> grad_fn = optax_asam.grad(lambda params: jnp.sum(params**2), rho=0.5)
    >>> print(np.asarray(grad_fn(jnp.array([3.0, 4.0]))).round(3))
    [ 7.477 11.494]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.
  """
  value_and_grad_fn = value_and_grad(
    fun,
    argnums,
    has_aux,
    rho=rho,
    eta=eta,
    adaptive=adaptive,
    ord=ord,
    mask=mask,
    ascent_steps=ascent_steps,
    descent=descent,
    perturbed_dtype=perturbed_dtype,
    ascent_fun=ascent_fun,
  )
  return _estimator.without_value(value_and_grad_fn, has_aux)


def _select(args: tuple[Any, ...], argnums: int | Sequence[int]) -> Any:
  """The arguments that are differentiated, as :func:`jax.grad` returns them."""
  if isinstance(argnums, _checks.Integer):
    return args[argnums]
  return tuple(args[i] for i in argnums)


def _replace(
  args: tuple[Any, ...], argnums: int | Sequence[int], params: Any
) -> list[Any]:
  """``args`` with ``params`` in place of what :func:`_select` returns."""
  replaced = list(args)
  if isinstance(argnums, _checks.Integer):
    replaced[argnums] = params
  else:
    for i, argument in zip(argnums, params, strict=True):
      replaced[i] = argument
  return replaced
