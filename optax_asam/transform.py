r"""The transformation that takes the second gradient."""

from collections.abc import Callable
from collections.abc import Hashable
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees
from optax_asam.descent import Descent

When = Callable[[jax.Array], jax.typing.ArrayLike]


class SharpnessAwareState(NamedTuple):
  """State of :func:`sharpness_aware`.

  Attributes:
    step: Number of updates so far, an int32 scalar.
    perturbed_value: The last L(w + eps) that was measured, a scalar of at least
      float32: on updates that ``every_k`` or ``when`` skips, and with
      ``grad_fn`` instead of ``value_fn``, it keeps its value. Zero at first.
    ascent_state: State of the ascent.
  """

  step: jax.typing.ArrayLike
  perturbed_value: jax.Array
  ascent_state: optax.OptState


def sharpness_aware(
  ascent: optax.GradientTransformation,
  descent: Descent | None = None,
  *,
  ascent_steps: int = 1,
  every_k: int = 1,
  when: When | None = None,
  axis_name: Hashable | None = None,
  perturbed_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the gradient with the gradient at perturbed parameters.

  .. math::
    g = \nabla L(w), \quad \epsilon = \mathrm{ascent}(g), \quad
    \tilde g = \nabla L(w + \epsilon), \quad g' = \mathrm{descent}(g, \tilde g)

  With n ascent steps, :math:`\epsilon_{j+1} = \epsilon_j +
  \mathrm{ascent}(\nabla L(w + \epsilon_j)) / n` with the ascent at the
  unperturbed w: by the triangle inequality the sum stays in the ball.

  Args:
    ascent: A transformation from a gradient to a perturbation, for example
      ``optax.chain(steepest_ascent(normalization.elementwise()),
      optax.scale(0.5))``. Its state advances once per update.
    descent: A function from :math:`(g, \tilde g)`, pytrees like ``params``, to
      the gradient that is passed on; by default :math:`\tilde g`.
    ascent_steps: Number n of ascent steps, each of which costs a gradient.
    every_k: The second gradient is taken on updates 0, k, 2k, ...; in between,
      the gradient passes through.
    when: A function from the number of updates so far, an int32 scalar, to a
      bool that says whether to take the second gradient on this update. With
      ``when=lambda step: step >= 9_000``, only the late phase of training is
      sharpness-aware. With ``every_k``, both must hold. A skipped update costs
      what the base optimizer costs, and advances the state of the ascent.
    axis_name: Name of the mapped axis, or names of axes, over which the result
      is averaged: the gradient that is passed on, also by skipped updates (and
      g, if ``descent`` takes it), and ``perturbed_value``. Local gradients
      give a perturbation per device, averaged gradients a shared one; with
      several ascent steps, a shared one also needs a ``pmean`` inside
      ``grad_fn``. An ascent whose state depends on gradients needs averaged
      ones, or replicas diverge.
    perturbed_dtype: The floating-point dtype in which w + eps is formed and
      passed to the gradient function. By default each parameter's own, where
      bfloat16 would lose most of a small perturbation.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update(grads,
    state, params, ...)`` takes exactly one of ``grad_fn(params) -> grads`` and
    ``value_fn(params) -> scalar`` by keyword (``obj_fn`` is another name for
    the latter; next to either, it is left to ``base_tx``). Extra arguments go
    to the ascent and, if they are in its signature, to ``value_fn``, as in
    :func:`optax.lbfgs`. It returns gradients in the dtypes of ``grads``, and a
    :class:`SharpnessAwareState`.

  Raises:
    TypeError: An argument or the result of a function has the wrong type.
    ValueError: An argument is out of its range; ``update`` got no ``params``,
      or not exactly one of ``grad_fn`` and ``value_fn``; trees differ in
      structure or shapes.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_asam import ascent, normalization, sharpness_aware
    >>> tx = optax.chain(
    ...   sharpness_aware(
    ...     optax.chain(
    ...       ascent.steepest_ascent(normalization.elementwise()),
    ...       optax.scale(0.5),
    ...     )
    ...   ),
    ...   optax.sgd(0.1),
    ... )
    >>> value_fn = lambda params: jnp.sum(params**2)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(
    ...   jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn
    ... )
    >>> print(np.asarray(optax.apply_updates(params, updates)).round(3))
    [0.775 1.405]
    >>> print(f'{state[0].perturbed_value:.3f}')
    10.110

  References:
    Foret et al., `SAM <https://arxiv.org/abs/2010.01412>`_, 2021; Kwon et al.,
    `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021.

  .. note::
    ``every_k`` and ``when`` use :func:`jax.lax.cond`. Under :func:`jax.vmap` it
    becomes a select and saves nothing, unless ``step`` is not mapped
    (``in_axes=None`` for integers of the state), and on CPU, XLA runs
    convolutions inside it much more slowly: in these cases, choose between two
    jitted steps in Python.
  """
  _checks.check_transformation(
    'ascent', ascent, 'steepest_ascent(normalization.elementwise())'
  )
  _checks.check_second_gradient(descent, ascent_steps, perturbed_dtype)
  _checks.check_count('every_k', every_k)
  if when is not None:
    _checks.check_static('when', when)
    _checks.check_function('when', when, 'when=lambda step: step >= 9_000')
  ascent = optax.with_extra_args_support(ascent)

  def init_fn(params):
    _checks.check_params(params)
    dtype = _trees.accumulator_dtype(*jax.tree.leaves(params))
    value = jnp.zeros([], dtype)
    if axis_name is None:  # With it, the value is averaged.
      value = _trees.varying_like(value, params)
    return SharpnessAwareState(
      step=jnp.zeros([], jnp.int32),
      perturbed_value=value,
      ascent_state=ascent.init(params),
    )

  def update_fn(
    updates,
    state,
    params=None,
    *,
    grad_fn=None,
    value_fn=None,
    obj_fn=None,
    **extra_args,
  ):
    params = _checks.checked_params(params, updates)
    value_and_grad_fn = _value_and_grad_fn(
      {'grad_fn': grad_fn, 'value_fn': value_fn, 'obj_fn': obj_fn},
      extra_args,
      updates,
    )

    def ascend(grads):
      eps, ascent_state = ascent.update(
        grads, state.ascent_state, params, **extra_args
      )
      _checks.check_perturbation(eps, params)
      return eps, ascent_state

    def perturbed_pass():
      eps, ascent_state = ascend(updates)
      perturbed_params = climb(
        params,
        eps,
        lambda params: ascend(value_and_grad_fn(params)[1])[0],
        ascent_steps=ascent_steps,
        perturbed_dtype=perturbed_dtype,
      )
      value, grads = value_and_grad_fn(perturbed_params)
      if axis_name is not None:
        _checks.check_varies(perturbed_params, grads, axis_name)
      grads = _trees.pmean(grads, axis_name)
      if value is None:
        value = state.perturbed_value
      else:
        value = jnp.asarray(value, state.perturbed_value.dtype)
        value = _trees.pmean(value, axis_name)
      if descent is not None:
        grads = descend(descent, _trees.pmean(updates, axis_name), grads)
      return (value, grads), ascent_state

    if every_k == 1 and when is None:
      (value, grads), ascent_state = perturbed_pass()
    else:
      is_due = jnp.asarray(state.step) % int(every_k) == 0
      if when is not None:
        is_due &= _checks.check_due(when(state.step))
      # Outside the cond, so that a schedule of rho counts every update. The
      # perturbation is unused here, so it is not computed.
      _, ascent_state = ascend(updates)
      # Both branches average: under shard_map they must vary over the same
      # axes, and gradients may be averaged already.
      value, grads = jax.lax.cond(
        is_due,
        lambda: perturbed_pass()[0],
        lambda: (state.perturbed_value, _trees.pmean(updates, axis_name)),
      )
    return grads, SharpnessAwareState(
      step=optax.safe_increment(state.step),
      perturbed_value=value,
      ascent_state=ascent_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def climb(
  params: optax.Params,
  eps: optax.Updates,
  eps_at: Callable[[optax.Params], optax.Updates],
  *,
  ascent_steps: int,
  perturbed_dtype: Any,
) -> optax.Params:
  """Returns w + eps after all ascent steps.

  Args:
    params: The parameters w.
    eps: The perturbation of the gradient at w.
    eps_at: A function from perturbed parameters to the perturbation of the
      gradient there. It is called for each ascent step but the first.
    ascent_steps: Number of ascent steps.
    perturbed_dtype: The dtype in which w + eps is formed.

  Returns:
    The perturbed parameters, a tree like ``params``.
  """
  if ascent_steps > 1:
    eps = _divide(eps, ascent_steps)
  # Unrolled: XLA on CPU runs convolutions much more slowly in a loop.
  for _ in range(ascent_steps - 1):
    step = eps_at(_geometry.perturb(params, eps, perturbed_dtype))
    eps = optax.tree.add(eps, _divide(step, ascent_steps))
  return _geometry.perturb(params, eps, perturbed_dtype)


def descend(
  descent: Descent, grads: optax.Updates, perturbed_grads: optax.Updates
) -> optax.Updates:
  """The result of ``descent``, checked and in the dtypes of ``grads``."""
  result = descent(grads, perturbed_grads)
  _checks.check_like(
    'the result of descent',
    result,
    grads,
    write='For example: descent=lambda g, h: optax.tree.add(g, h).',
  )
  return _trees.cast_like(result, grads)


def _value_and_grad_fn(
  functions: dict[str, Callable[..., Any] | None],
  extra_args: dict[str, Any],
  updates: optax.Updates,
) -> Callable[[optax.Params], tuple[Any, optax.Updates]]:
  """The given function, as one from params to (value or None, grads).

  The gradient has the dtypes of ``updates``.
  """
  name, function = _checks.check_one_function(functions)

  def of_grad_fn(params):
    grads = function(params)
    _checks.check_grads(grads, params)
    return None, _trees.cast_like(grads, updates)

  def of_value_fn(params):
    def value_fn(params):
      value = function(params, **_keywords_of(function, extra_args))
      _checks.check_scalar(name, value)
      return value

    value, grads = jax.value_and_grad(value_fn)(params)
    return value, _trees.cast_like(grads, updates)

  return of_grad_fn if name == 'grad_fn' else of_value_fn


def _keywords_of(
  function: Callable[..., Any], extra_args: dict[str, Any]
) -> dict[str, Any]:
  """The ``extra_args`` that ``function`` takes after its first argument.

  They are matched to its signature by name, as in :func:`optax.lbfgs`.
  """
  try:
    _, *names = inspect.signature(function).parameters
  except (TypeError, ValueError):  # Built-in functions may have no signature.
    return {}
  return {name: extra_args[name] for name in names if name in extra_args}


def _divide(step: optax.Updates, n: int) -> optax.Updates:
  """``step / n`` in at least float32: n roundings to bfloat16 would add up."""
  return jax.tree.map(lambda e: _trees.widen(e) / int(n), step)
