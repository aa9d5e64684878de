r"""Ascents: Optax transformations from a gradient to a perturbation."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees
from optax_asam import normalization as _normalization

__all__ = (
  'FriendlyState',
  'ScaleByRhoState',
  'friendly',
  'rho_ball',
  'steepest_ascent',
)


def steepest_ascent(
  normalization: _normalization.Normalization,
  *,
  ord: float = 2,
  mask: _trees.Mask | None = None,
) -> optax.GradientTransformation:
  r"""Maps a gradient to the steepest perturbation in the normalized unit ball.

  .. math::
    \epsilon = \arg\max_{\|T_w^{-1} \epsilon\|_p \le 1} \langle g, \epsilon
    \rangle = T_w \, \operatorname{sign}(g) \,
    \frac{|T_w g|^{q - 1}}{\|T_w g\|_q^{q - 1}}, \quad
    \frac{1}{p} + \frac{1}{q} = 1,

  that is :math:`T_w^2 g / \|T_w g\|_2` for p = 2 and :math:`T_w
  \operatorname{sign}(g)` for p = inf. The norm is taken over the whole tree.
  For a ball of another radius, chain a scale after it.

  Args:
    normalization: A function from ``params`` to :math:`T_w`, such as
      ``normalization.elementwise(eta=0.01)``: a pytree like ``params`` of
      non-negative arrays that broadcast to their parameter, or the Python
      number 1.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which leaves are perturbed; the norm is taken over those alone. A
      pytree of bools with the structure of ``params`` or a prefix of it (but
      not a single bool), a function from ``params`` to one, or None for all.

  Returns:
    A stateless :class:`optax.GradientTransformation` whose ``update`` needs
    ``params``. The perturbation has the structure, shapes and dtypes of
    ``params``, and is zero at leaves that are masked out; sums are taken in at
    least float32. Where :math:`\|T_w g\|` is zero or not finite, the
    perturbation is zero.

  Raises:
    TypeError: ``normalization`` is not a function of params, ``ord`` not a
      number, or a leaf of the mask not a bool.
    ValueError: ``ord`` is not in [1.001, inf], the mask does not fit or selects
      nothing, or ``update`` is called without ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_asam import ascent, normalization
    >>> tx = ascent.steepest_ascent(normalization.elementwise(eta=0.0))
    >>> params = jnp.array([3.0, 4.0])
    >>> eps, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(params), params)
    >>> print(np.asarray(eps).round(3))
    [1.8 3.2]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 4;
    for p other than 2, Foret et al., `SAM <https://arxiv.org/abs/2010.01412>`_,
    2021, equation 2.

  .. note::
    For p = 2, one float32 reduction serves elements of :math:`T_w g` from 1e-18
    to 1e18. Elements below 1e-19 are not perturbed, and nothing is if the
    norm is above 6e18. Do not wrap this in ``optax.masked``, which would pass
    the raw gradient on as a perturbation: use ``mask``.
  """
  ascent = _unscaled_ascent(normalization, ord, mask)

  def init_fn(params):
    _checks.check_params(params)
    return ascent.init(params)

  def update_fn(updates, state, params=None):
    params = _checks.checked_params(params, updates)
    eps, state = ascent.update(updates, state, params)
    eps = _trees.fill_masked(eps, params)
    return _trees.cast_like(eps, params), state

  return optax.GradientTransformation(init_fn, update_fn)


class ScaleByRhoState(NamedTuple):
  """State of the last part of :func:`rho_ball`.

  Attributes:
    rho_step: Number of updates so far, an int32 scalar. Its name is unique, so
      that ``optax.tree.get(state, 'count')`` finds that of Adam, and ``'step'``
      that of :class:`optax_asam.SharpnessAwareState`.
  """

  rho_step: jax.typing.ArrayLike


def rho_ball(
  rho: chex.Numeric | optax.Schedule,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  *,
  ord: float = 2,
  mask: _trees.Mask | None = None,
) -> optax.GradientTransformation:
  r"""The ascent that the arguments of :func:`optax_asam.asam` describe.

  Steepest ascent to the surface of the ball :math:`\|T_w^{-1} \epsilon\|_p \le
  \rho`. The state has the same structure for every kind of ``rho``.

  Args:
    rho: The radius :math:`\rho \ge 0`: a number, a traced scalar, or a schedule
      of the number of updates.
    eta: The constant of element-wise normalization, if ``adaptive`` is True.
    adaptive: True for element-wise normalization, False for none, or a
      normalization.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which leaves are perturbed, as in :func:`steepest_ascent`.

  Returns:
    An :class:`optax.GradientTransformation` whose ``update`` needs ``params``.
    It returns a tree like ``params``, with an :class:`optax.MaskedNode` for
    each leaf that is masked out: :func:`optax_asam.sharpness_aware` passes such
    a parameter through without a copy.

  Raises:
    TypeError: An argument is of the wrong type.
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_asam import ascent
    >>> tx = ascent.rho_ball(rho=0.5, eta=0.0, adaptive=True)
    >>> params = jnp.array([3.0, 4.0])
    >>> eps, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(params), params)
    >>> print(np.asarray(eps).round(3))
    [0.9 1.6]
  """
  return optax.chain(
    _unscaled_ascent(_normalization.of(eta, adaptive), ord, mask),
    scale_by_rho(rho),
  )


class FriendlyState(NamedTuple):
  """State of :func:`friendly`.

  Attributes:
    ema: The average of past gradients, a pytree like ``params`` in at least
      float32.
  """

  ema: optax.Updates


def friendly(
  sigma: chex.Numeric = 1.0, decay: chex.Numeric = 0.9
) -> optax.GradientTransformation:
  r"""Removes the average of past gradients: the ascent of Friendly-SAM.

  .. math::
    d_t = g_t - \sigma m_{t - 1}, \quad
    m_t = \lambda m_{t - 1} + (1 - \lambda) g_t, \quad m_0 = 0

  What remains is the noise of the batch. Chain it before :func:`rho_ball` or
  :func:`steepest_ascent`.

  Args:
    sigma: The weight :math:`\sigma \ge 0` of the average, a number or a traced
      scalar.
    decay: The decay :math:`0 \le \lambda < 1` of the average, a number or
      a traced scalar.

  Returns:
    An :class:`optax.GradientTransformation` with a :class:`FriendlyState`, one
    array per parameter in at least float32. Non-finite gradients are left out
    of the average. Under ``axis_name`` it needs averaged gradients, or replicas
    diverge.

  Raises:
    TypeError: An argument is not a real number.
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_asam import ascent, sharpness_aware
    >>> f_sam = optax.chain(
    ...   sharpness_aware(
    ...     optax.chain(
    ...       ascent.friendly(),
    ...       ascent.rho_ball(rho=0.05, eta=0.0, adaptive=False),
    ...     )
    ...   ),
    ...   optax.sgd(0.1),
    ... )
    >>> tx = ascent.friendly(sigma=1.0, decay=0.5)
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.array([2.0, 0.0]), state)
    >>> direction, _ = tx.update(jnp.array([2.0, 1.0]), state)
    >>> print(direction)
    [1. 1.]

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024, algorithm 1.
  """
  _checks.check_scale('sigma', sigma, '1.0')
  _checks.check_scale('decay', decay, '0.9', below_one=True)

  def init_fn(params):
    _checks.check_params(params)
    return FriendlyState(ema=jax.tree.map(_trees.zeros_like, params))

  def update_fn(updates, state, params=None):
    del params
    _checks.check_like(
      'grads', updates, state.ema, write='Pass the gradient at params.'
    )
    direction = jax.tree.map(
      lambda g, m: jnp.asarray(g, m.dtype) - jnp.asarray(sigma, m.dtype) * m,
      updates,
      state.ema,
    )
    ema = _trees.finite_ema(decay, state.ema, updates)
    return direction, FriendlyState(ema=ema)

  return optax.GradientTransformation(init_fn, update_fn)


def _unscaled_ascent(
  normalization: _normalization.Normalization,
  ord: float,
  mask: _trees.Mask | None,
) -> optax.GradientTransformation:
  """:func:`steepest_ascent` without rounding and checks of trees.

  Leaves that are masked out are :class:`optax.MaskedNode`.
  """
  _normalization.check('normalization', normalization)
  _checks.check_ord(ord)
  _trees.check_mask(mask)

  def init_fn(params):
    del params
    return optax.EmptyState()

  def update_fn(updates, state, params=None):
    params = _checks.given(params)
    coordinates = _geometry.coordinates(params, normalization, mask)
    direction = _geometry.steepest_direction(coordinates.pull(updates), ord)
    return coordinates.push(*direction), state

  return optax.GradientTransformation(init_fn, update_fn)


def scale_by_rho(
  rho: chex.Numeric | optax.Schedule,
) -> optax.GradientTransformation:
  """Multiplies by ``rho`` and rounds to the dtypes of ``params``.

  Rounds once, after scaling: a unit perturbation of a million weights of 1e-3
  has elements of 1e-6, of which float16 keeps four bits.
  """
  if not callable(rho):
    _checks.check_scale('rho', rho, '0.5')

  def init_fn(params):
    del params
    return ScaleByRhoState(rho_step=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    step = state.rho_step
    radius = _checks.checked_radius(rho(step)) if callable(rho) else rho
    eps = jax.tree.map(
      lambda e, w: (
        e
        if _checks.is_masked(e)
        else jnp.asarray(jnp.asarray(radius, e.dtype) * e, _checks.dtype_of(w))
      ),
      updates,
      params,
      is_leaf=_checks.is_masked,
    )
    return eps, ScaleByRhoState(rho_step=optax.safe_increment(step))

  return optax.GradientTransformation(init_fn, update_fn)
