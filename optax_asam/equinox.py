r"""Equinox's ``filter_value_and_grad`` and ``filter_grad``, sharpness-aware.

Import this module explicitly; ``import optax_asam`` does not import Equinox.
"""

from collections.abc import Callable
import functools
from typing import Any

import chex
import equinox as eqx
import jax

from optax_asam import _checks
from optax_asam import _estimator
from optax_asam import _trees
from optax_asam import descent as _descent
from optax_asam import normalization as _normalization


@_estimator.usable_as_decorator
def filter_value_and_grad(
  fun: Callable[..., Any],
  *,
  has_aux: bool = False,
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
  r"""The value and sharpness-aware gradient of ``fun``, for Equinox modules.

  .. math::
    (L(w), \nabla L(w + \epsilon)), \quad
    \epsilon = \rho \, \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}

  A drop-in replacement for ``equinox.filter_value_and_grad`` with any
  optimizer. The floating-point arrays of the first argument are differentiated
  and perturbed. The value and the auxiliary data, such as an
  ``equinox.nn.State``, are those of the clean pass; with ``ascent_fun``, they
  are those of the perturbed pass. The other arguments, such as a state or a
  dropout key, are the same in both passes.

  Args:
    fun: A function that returns a scalar, or with ``has_aux`` a pair of a
      scalar and auxiliary data.
    has_aux: Whether ``fun`` returns auxiliary data.
    rho: The radius :math:`\rho \ge 0`, a number or a traced scalar. For a
      schedule, pass ``rho=schedule(step)``: this function keeps no step count.
      The default is for element-wise normalization and ``ord=2``; SAM usually
      takes 0.05.
    eta: The constant :math:`\eta \ge 0` of element-wise normalization.
    adaptive: True for element-wise normalization of all but biases, False for
      none (SAM), or a normalization, such as
      ``normalization.filterwise(0.01, axis=0)`` for Equinox's convolutions.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which of the floating-point arrays are perturbed: a pytree of bools
      with the structure of the first argument or a prefix of it, or a function
      that returns one. The function receives the first argument with None in
      place of everything but floating-point arrays.
    ascent_steps: Number of ascent steps, each of which costs a gradient.
    descent: A function from the clean and the perturbed gradient to the one
      that is returned; by default the perturbed one.
    perturbed_dtype: The dtype in which w + eps is formed, as in
      :func:`optax_asam.sharpness_aware`; by default each parameter's own.
    ascent_fun: The function whose gradient determines the perturbation; by
      default ``fun``. It takes the same arguments as ``fun`` and returns a
      scalar, or with ``has_aux`` a pair. For example, the loss of a quarter of
      the batch: ``ascent_fun=lambda model, batch: loss_fn(model,
      jax.tree.map(lambda x: x[::4], batch))``. All ascent steps use it. ``fun``
      is evaluated only at w + eps, so the value and the auxiliary data are
      those at w + eps. The first argument of ``descent`` is the gradient of
      ``ascent_fun``.

  Returns:
    A function of the arguments of ``fun`` that returns ``(value, grads)``, or
    ``((value, aux), grads)`` with ``has_aux``. The gradient is like the first
    argument, with None in place of everything but floating-point arrays.
    Without ``fun``, a decorator.

  Raises:
    TypeError: An argument is of the wrong type, or ``rho`` is a schedule.
    ValueError: An argument is out of its range.

  Examples:
    >>> import equinox as eqx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_asam.equinox
    >>> model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    >>> value_and_grad_fn = optax_asam.equinox.filter_value_and_grad(
    ...   loss_fn, rho=0.5
    ... )
    >>> loss, grads = value_and_grad_fn(model, jnp.ones(2))
    >>> print(grads.weight.shape)
    (3, 2)

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.
  """
  _checks.check_function('fun', fun, 'filter_value_and_grad(loss_fn, rho=0.5)')
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
  value_and_grad_pass = eqx.filter_value_and_grad(fun, has_aux=has_aux)
  ascent_grad_pass = eqx.filter_grad(
    _checks.checked_ascent_fun(fun, ascent_fun, has_aux), has_aux=has_aux
  )

  def value_and_grad_fn(*args, **kwargs):
    if not args:
      raise TypeError(
        'The first argument, which is differentiated, must be given by'
        f' position, but got {sorted(kwargs)} by keyword.'
        ' For example: value_and_grad_fn(model, x).'
      )
    # Copies of the containers, since a pass may replace an eqx.nn.State, which
    # invalidates the old one.
    leaves, treedef = jax.tree.flatten((args[1:], kwargs))
    params, static = eqx.partition(args[0], eqx.is_inexact_array)
    if not jax.tree.leaves(params):
      raise TypeError(
        'The first argument, which is differentiated, must hold'
        f' floating-point arrays, but got {args[0]!r}. Pass the model first.'
      )
    _checks.check_params(params)

    def value_and_grad_at(params):
      return value_and_grad_pass(
        eqx.combine(params, static), *args[1:], **kwargs
      )

    def ascent_grad_at(params):
      args, kwargs = jax.tree.unflatten(treedef, leaves)
      grads = ascent_grad_pass(eqx.combine(params, static), *args, **kwargs)
      return grads[0] if has_aux else grads

    return estimate(params, value_and_grad_at, ascent_grad_at)

  if isinstance(fun, eqx.Module):  # Its fields would become attributes.
    return value_and_grad_fn
  return functools.wraps(fun)(value_and_grad_fn)


@_estimator.usable_as_decorator
def filter_grad(
  fun: Callable[..., Any],
  *,
  has_aux: bool = False,
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
  r"""The sharpness-aware gradient, a drop-in for ``equinox.filter_grad``.

  .. math::
    \nabla L(w + \epsilon), \quad
    \epsilon = \rho \, \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}

  Args:
    fun: A function that returns a scalar, or with ``has_aux`` a pair of a
      scalar and auxiliary data.
    has_aux: Whether ``fun`` returns auxiliary data. The following arguments are
      as in :func:`filter_value_and_grad`.
    rho: The radius, a number or a traced scalar.
    eta: The constant of element-wise normalization.
    adaptive: True, False or a normalization.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which of the floating-point arrays are perturbed.
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
    >>> import equinox as eqx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_asam.equinox
    >>> model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    >>> grad_fn = optax_asam.equinox.filter_grad(loss_fn, rho=0.5)
    >>> print(grad_fn(model, jnp.ones(2)).weight.shape)
    (3, 2)

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.
  """
  value_and_grad_fn = filter_value_and_grad(
    fun,
    has_aux=has_aux,
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
