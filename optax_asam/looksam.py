r"""LookSAM: the second gradient on every k-th update, reused in between.

The updates in between reuse the direction of the part of the perturbed gradient
that is orthogonal to the clean one, so a step costs :math:`1 + 1/k` gradients
on average.
"""

from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees
from optax_asam import ascent as _ascent
from optax_asam import normalization as _normalization
from optax_asam import transform


class LookSAMState(NamedTuple):
  r"""State of :func:`looksam`, without that of ``base_tx``.

  Attributes:
    step: Number of updates so far, an int32 scalar.
    perturbed_value: The last L(w + eps) that was measured with ``value_fn``, a
      scalar of at least float32. Zero at first.
    ascent_state: State of the ascent.
    direction: :math:`g_v / \|g_v\|_2` from the last update that took the second
      gradient, a pytree like ``params`` in at least float32. Zero if there is
      none.
  """

  step: jax.typing.ArrayLike
  perturbed_value: jax.Array
  ascent_state: optax.OptState
  direction: optax.Updates


@_checks.checks_base_tx
def looksam(
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric | optax.Schedule = 0.5,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  *,
  every_k: int = 5,
  alpha: chex.Numeric = 0.1,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  axis_name: Hashable | None = None,
  perturbed_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""LookSAM around any Optax optimizer, with the perturbation of ASAM.

  On updates 0, k, 2k, ..., with the gradients g at w and :math:`\tilde g` at
  :math:`w + \epsilon`, where :math:`\epsilon` is the perturbation of
  :func:`optax_asam.asam`, the gradient for ``base_tx`` is :math:`g'`:

  .. math::
    g' = \tilde g, \quad
    g_v = \tilde g - \frac{\langle g, \tilde g \rangle}{\|g\|_2^2} \, g

  On all other updates, with the last :math:`g_v`:

  .. math::
    g' = g + \alpha \, \|g\|_2 \, \frac{g_v}{\|g_v\|_2}

  Norms and inner products are taken over the whole tree, in at least float32.

  Args:
    base_tx: The optimizer, such as ``optax.sgd(0.1, momentum=0.9)``.
    rho: The radius :math:`\rho \ge 0` of the perturbation: a number, a traced
      scalar, or an Optax schedule of the number of updates.
    eta: The constant of element-wise normalization, if ``adaptive`` is True.
    adaptive: True for element-wise normalization of all but biases, False for
      none (the LookSAM of the paper), or a normalization.
    every_k: The second gradient is taken on updates 0, k, 2k, ...
    alpha: The weight :math:`\alpha \ge 0` of the reused direction, a number or
      a traced scalar.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which leaves are perturbed, as in :func:`optax_asam.asam`. The
      direction includes all leaves.
    axis_name: Name of the mapped axis over which gradients are averaged, as in
      :func:`optax_asam.sharpness_aware`. The direction is that of averaged
      gradients.
    perturbed_dtype: The dtype in which w + eps is formed, as in
      :func:`optax_asam.sharpness_aware`; by default each parameter's own.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` that is called like
    :func:`optax_asam.asam`: ``update(grads, state, params, ...)`` takes
    ``grad_fn`` or ``value_fn`` by keyword on each update. Its state is a tuple
    of :class:`LookSAMState`, which holds one array per parameter in at least
    float32, and the state of ``base_tx``.

    If g or :math:`\tilde g` is zero or not finite, or if :math:`g_v` is no
    larger than rounding errors, as with ``rho=0``, the direction is zero, and
    updates in between are those of ``base_tx``.

  Raises:
    TypeError: An argument or the result of a function has the wrong type.
    ValueError: An argument is out of its range, or ``update`` lacks ``params``
      or a function for the second gradient.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_asam import looksam
    >>> grad_fn = jax.grad(lambda params: jnp.sum(params**4))
    >>> tx = looksam(optax.sgd(0.01), rho=0.5, every_k=2, alpha=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> for _ in range(4):
    ...   updates, state = tx.update(
    ...     grad_fn(params), state, params, grad_fn=grad_fn
    ...   )
    ...   params = optax.apply_updates(params, updates)
    >>> print(np.asarray(params).round(3))
    [0.815 0.801]

  References:
    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022, algorithm 1.

  .. note::
    The second gradient is inside :func:`jax.lax.cond`. Under :func:`jax.vmap`
    it becomes a select and saves nothing, unless ``step`` is not mapped, and on
    CPU, XLA runs convolutions inside it much more slowly. In these cases,
    choose in Python between two jitted steps on the same state: one with
    ``every_k=1``, which needs no ``cond``, for updates 0, k, 2k, ..., and one
    with ``every_k=k`` for the others. Pass ``grad_fn=lambda _: grads`` to the
    latter, so that it does not compile a second gradient.
  """
  _checks.check_count('every_k', every_k)
  _checks.check_scale('alpha', alpha, '0.1')
  ascent = _ascent.rho_ball(rho, eta, adaptive, ord=ord, mask=mask)
  # Any: for type checkers, Optax's states have no fields.
  sharpness_aware: Any = transform.sharpness_aware(
    ascent, axis_name=axis_name, perturbed_dtype=perturbed_dtype
  )

  def init_fn(params):
    direction = jax.tree.map(_trees.zeros_like, params)
    return LookSAMState(
      **sharpness_aware.init(params)._asdict(), direction=direction
    )

  def update_fn(updates, state, params=None, **extra_args):
    params = _checks.checked_params(params, updates)

    def look():
      grads, (_, value, _) = sharpness_aware.update(
        updates,
        transform.SharpnessAwareState(
          state.step, state.perturbed_value, state.ascent_state
        ),
        params,
        **extra_args,
      )
      direction = _direction(_trees.pmean(updates, axis_name), grads)
      return grads, value, _trees.cast_like(direction, state.direction)

    def reuse():
      grads = _along(_trees.pmean(updates, axis_name), state.direction, alpha)
      return grads, state.perturbed_value, state.direction

    # As in `sharpness_aware`: a schedule of rho counts every update, and under
    # jit, the perturbation is not computed, since nothing uses it here.
    _, ascent_state = ascent.update(updates, state.ascent_state, params)
    if every_k == 1:
      grads, value, direction = look()
    else:
      is_due = jnp.asarray(state.step) % int(every_k) == 0
      grads, value, direction = jax.lax.cond(is_due, look, reuse)
    return grads, LookSAMState(
      step=optax.safe_increment(state.step),
      perturbed_value=value,
      ascent_state=ascent_state,
      direction=direction,
    )

  return optax.chain(
    optax.GradientTransformationExtraArgs(init_fn, update_fn), base_tx
  )


def _direction(
  grads: optax.Updates, perturbed_grads: optax.Updates
) -> optax.Updates:
  """The part of g~ that is orthogonal to g, as a unit vector, or zero."""
  rejections, length, usable = _geometry.rejection(perturbed_grads, grads)
  norm, is_normal = _geometry.guarded_norm(rejections)
  # If g~ equals g but for rounding, as with rho = 0, what is left is noise, and
  # as a unit vector it would be as large as any signal.
  usable &= is_normal & (norm > _rounding(grads) * jnp.abs(length))
  return jax.tree.map(
    lambda r: jnp.where(usable, r / norm.astype(r.dtype), 0), rejections
  )


def _along(
  grads: optax.Updates, direction: optax.Updates, alpha: chex.Numeric
) -> optax.Updates:
  """Adds ``alpha * ||g||`` times the direction to g, in the dtypes of g."""
  norm, usable = _geometry.guarded_norm(grads)
  length = jnp.asarray(alpha, norm.dtype) * norm

  def leaf(g, d):
    wide = _trees.widen(g)
    d = jnp.asarray(d, wide.dtype)
    # Without a direction, g is passed on bit for bit: -0.0 + 0.0 is 0.0.
    used = usable & (d != 0)
    return jnp.where(used, wide + length.astype(d.dtype) * d, wide).astype(
      _checks.dtype_of(g)
    )

  return jax.tree.map(leaf, grads, direction)


def _rounding(grads: optax.Updates) -> float:
  """By how much two computations of one gradient may differ, relatively.

  Each leaf is rounded to its dtype. Before that, sums in another order differ
  by some units in the last place of the accumulator.
  """
  leaves = jax.tree.leaves(grads)
  last_places = [float(jnp.finfo(_checks.dtype_of(g)).eps) for g in leaves]
  accumulator = float(jnp.finfo(_trees.accumulator_dtype(*leaves)).eps)
  return max([100 * accumulator, *last_places])
