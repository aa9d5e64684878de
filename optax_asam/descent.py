r"""Descents: functions from the clean and the perturbed gradient to one."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees

__all__ = (
  'Descent',
  'gsam',
  'wsam',
)

Descent = Callable[[optax.Updates, optax.Updates], optax.Updates]


def gsam(alpha: chex.Numeric = 0.4) -> Descent:
  r"""The descent of GSAM, which also reduces the surrogate gap.

  .. math::
    g' = \tilde g - \alpha \left( g - \frac{\langle g, \tilde g
    \rangle}{\|\tilde g\|_2^2} \, \tilde g \right)

  with g at w and :math:`\tilde g` at :math:`w + \epsilon`: the component of
  g orthogonal to :math:`\tilde g` is subtracted.

  Args:
    alpha: The weight :math:`\alpha \ge 0`, a number or a traced scalar. The
      paper uses 0.4 to 0.6, with rho affine in the learning rate.

  Returns:
    A function for the argument ``descent`` of :func:`optax_asam.asam`. Inner
    products are taken over the whole tree, in at least float32. If
    :math:`\|\tilde g\|` is zero or not finite, or its square too small or too
    large for the dtype, it returns :math:`\tilde g`.

  Raises:
    TypeError: ``alpha`` is not a real number.
    ValueError: ``alpha`` is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import descent
    >>> print(descent.gsam(0.5)(jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])))
    [ 2.  -0.5]

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022, algorithm 1.
  """
  _checks.check_scale('alpha', alpha, '0.4')

  def descent(grads, perturbed_grads):
    rejections, _, usable = _geometry.rejection(grads, perturbed_grads)

    def leaf(r, h):
      wide = _trees.widen(h)
      result = wide - jnp.asarray(alpha, wide.dtype) * r.astype(wide.dtype)
      return jnp.where(usable, result, wide)

    result = jax.tree.map(leaf, rejections, perturbed_grads)
    return _trees.cast_like(result, perturbed_grads)

  return descent


def wsam(gamma: chex.Numeric = 0.9) -> Descent:
  r"""The descent of WSAM, which weights sharpness in the loss.

  .. math::
    g' = \left( 1 - \frac{\gamma}{1 - \gamma} \right) g +
    \frac{\gamma}{1 - \gamma} \, \tilde g

  Args:
    gamma: The weight :math:`0 \le \gamma < 1`, a number or a traced scalar: 0
      is the base optimizer, 0.5 is SAM or ASAM. The paper uses 0.9.

  Returns:
    A function for the argument ``descent`` of :func:`optax_asam.asam`.

  Raises:
    TypeError: ``gamma`` is not a real number.
    ValueError: ``gamma`` is not in [0, 1).

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import descent
    >>> print(descent.wsam(0.75)(jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])))
    [ 4. -2.]

  References:
    Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023, equation 9.
  """
  _checks.check_scale('gamma', gamma, '0.9', below_one=True)

  def descent(grads, perturbed_grads):
    # A Python number before it is rounded to float32, where it may become one.
    exact = gamma if isinstance(gamma, (int, float)) else _trees.widen(gamma)
    weight = exact / (1 - exact)

    def leaf(g, h):
      wide = _trees.widen(h)
      change = wide - jnp.asarray(g, wide.dtype)
      # From the nearer of g and h, so that the weights 0 and 1 and equal
      # gradients are exact, and without the cancellation of large weights.
      weight_ = jnp.asarray(weight, wide.dtype)
      return jnp.where(
        weight_ < 0.5,
        jnp.asarray(g, wide.dtype) + weight_ * change,
        wide + (weight_ - 1) * change,
      )

    result = jax.tree.map(leaf, grads, perturbed_grads)
    return _trees.cast_like(result, perturbed_grads)

  return descent
