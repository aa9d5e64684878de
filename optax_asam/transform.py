r"""The transformation that takes the second gradient."""

from collections.abc import Callable
from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _functions
from optax_asam import _trees

Descent = Callable[[optax.Updates, optax.Updates], optax.Updates]


class SharpnessAwareState(NamedTuple):
  """State of :func:`sharpness_aware`.

  Attributes:
    step: Number of updates so far, an int32 scalar.
    perturbed_value: L(w + eps) of the last update, a scalar of at least
      float32. NaN before the first update, on updates that ``every_k`` skips,
      and where ``grad_fn`` was given instead of ``value_fn``.
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
  axis_name: Hashable | None = None,
  perturbed_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the gradient by the gradient at perturbed parameters.

  .. math::
    g = \nabla L(w), \quad \epsilon = \mathrm{ascent}(g), \quad
    \tilde g = \nabla L(w + \epsilon), \quad g' = \mathrm{descent}(g, \tilde g)

  With n ascent steps, :math:`\epsilon_{j+1} = \epsilon_j +
  \mathrm{ascent}(\nabla L(w + \epsilon_j)) / n` with the ascent at the
  unperturbed w: by the triangle inequality the sum stays in the ball.

  Args:
    ascent: The transformation from a gradient to a perturbation, for example
      ``optax.chain(steepest_ascent(normalization.elementwise()),
      optax.scale(0.5))``. Its state advances once an update.
    descent: A function from :math:`(g, \tilde g)`, pytrees like ``params``, to
      the gradient that is handed on; by default :math:`\tilde g` itself.
    ascent_steps: Number n of ascent steps, each of which costs a gradient.
    every_k: The second gradient is taken on updates 0, k, 2k, ...; in between
      the gradient passes through.
    axis_name: Name of the mapped axis, or names of axes, over which whatever
      leaves is averaged: the second gradient (and g, where ``descent`` takes
      it) and ``perturbed_value``. Gradients that come in per device give a
      perturbation per device, averaged ones a shared one; with several ascent
      steps that takes a ``pmean`` inside ``grad_fn``, too. An ascent with a
      state that depends on gradients needs averaged ones, or replicas diverge.
    perturbed_dtype: The floating dtype in which w + eps is formed and handed to
      the gradient function. By default each parameter's own, in which bfloat16
      loses most of a small perturbation.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update(grads,
    state, params, ...)`` takes exactly one of ``grad_fn(params) -> grads`` and
    ``value_fn(params) -> scalar`` by keyword; further keywords go to the
    ascent. It returns gradients in the dtypes of ``grads``, and a
    :class:`SharpnessAwareState`.

  Raises:
    TypeError: An argument, or what a function returned, is of the wrong type.
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
    ``every_k`` is a :func:`jax.lax.cond`. Under :func:`jax.vmap` it becomes a
    select and saves nothing, and on CPU, XLA runs convolutions inside it about
    ten times slower: there, choose between two jitted steps in Python.
  """
  _checks.check_transformation(
    'ascent', ascent, 'steepest_ascent(normalization.elementwise())'
  )
  if descent is not None:
    _checks.check_function(
      'descent', descent, 'descent=lambda grads, perturbed_grads: ...'
    )
  _checks.check_count('ascent_steps', ascent_steps)
  _checks.check_count('every_k', every_k)
  _checks.check_perturbed_dtype(perturbed_dtype)
  ascent = optax.with_extra_args_support(ascent)

  def init_fn(params):
    _trees.check_params(params)
    dtype = _trees.accumulator_dtype(*jax.tree.leaves(params))
    return SharpnessAwareState(
      step=jnp.zeros([], jnp.int32),
      perturbed_value=jnp.full([], jnp.nan, dtype),
      ascent_state=ascent.init(params),
    )

  def update_fn(
    updates, state, params=None, *, grad_fn=None, value_fn=None, **extra_args
  ):
    params = _trees.checked_params(params, updates)
    params = jax.tree.map(jnp.asarray, params)
    value_and_grad_fn = _functions.as_value_and_grad_fn(grad_fn, value_fn)

    def ascend(grads):
      return ascent.update(grads, state.ascent_state, params, **extra_args)

    def perturb(eps):
      return optax.apply_updates(optax.tree.cast(params, perturbed_dtype), eps)

    def average(tree):
      return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    # Outside the cond, so that a schedule of rho counts every update.
    first_step, ascent_state = ascend(updates)

    def perturbed_pass():
      eps = _divide(first_step, ascent_steps)
      # Unrolled: XLA on CPU runs convolutions in a loop 25 times slower.
      for _ in range(ascent_steps - 1):
        _, grads = value_and_grad_fn(perturb(eps))
        eps = optax.tree.add(eps, _divide(ascend(grads)[0], ascent_steps))
      value, perturbed_grads = value_and_grad_fn(perturb(eps))
      value = average(jnp.asarray(value, state.perturbed_value.dtype))
      perturbed_grads = average(optax.tree.cast_like(perturbed_grads, updates))
      if descent is None:
        return value, perturbed_grads
      return value, _descend(descent, average(updates), perturbed_grads)

    def clean_pass():
      return jnp.full_like(state.perturbed_value, jnp.nan), average(updates)

    # Both passes average: under shard_map the branches of a cond must vary over
    # the same axes, and gradients may come in averaged already.
    if every_k == 1:
      value, descent_grads = perturbed_pass()
    else:
      value, descent_grads = jax.lax.cond(
        state.step % every_k == 0, perturbed_pass, clean_pass
      )
    return descent_grads, SharpnessAwareState(
      step=optax.safe_increment(state.step),
      perturbed_value=value,
      ascent_state=ascent_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _descend(
  descent: Descent, grads: optax.Updates, perturbed_grads: optax.Updates
) -> optax.Updates:
  """The result of ``descent``, checked and in the dtypes of ``grads``."""
  result = descent(grads, perturbed_grads)
  _trees.check_like(
    'the result of descent',
    result,
    grads,
    write='Write for example descent=lambda g, h: optax.tree.add(g, h).',
  )
  return optax.tree.cast_like(result, grads)


def _divide(step: optax.Updates, n: int) -> optax.Updates:
  """``step / n`` in at least float32: n roundings to bfloat16 would add up."""
  return jax.tree.map(
    lambda e: jnp.asarray(e, _trees.accumulator_dtype(e)) / n, step
  )
