r"""Ascents: Optax transformations from a gradient to a perturbation."""

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _ball
from optax_asam import _checks
from optax_asam import _coordinates
from optax_asam import _trees
from optax_asam import normalization as _normalization


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
  \operatorname{sign}(g)` for p = inf. The norm is one number for the whole
  tree. Chain a scale after it for a ball of another radius.

  Args:
    normalization: A function from ``params`` to :math:`T_w`, such as
      ``normalization.elementwise(eta=0.01)``: a pytree like ``params`` of
      non-negative arrays that broadcast to their parameter, or Python ones.
    ord: The exponent p of the ball, in (1, inf].
    mask: Which leaves are perturbed; the norm is taken over those alone. A
      pytree of bools with the structure of ``params`` or a prefix of it, a
      function from ``params`` to one, or None for all.

  Returns:
    An :class:`optax.GradientTransformation` without state whose ``update``
    needs ``params``. What it returns has the structure, shapes and dtypes of
    ``params``; sums are taken in at least float32. Where :math:`\|T_w g\|` is
    zero or not finite, the perturbation is zero.

  Raises:
    TypeError: ``normalization`` is no function of params, ``ord`` no number,
      or the mask has leaves that are no bools.
    ValueError: ``ord`` is not in (1, inf], the mask does not fit or selects
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
    For p = 2 one float32 reduction serves elements of :math:`T_w g` from 1e-18
    to 1e18; smaller ones move less than they should, and where the norm is
    larger nothing does. ``optax.masked`` around this would hand the raw
    gradient on as a perturbation: use ``mask``.
  """
  ascent = _unrounded_ascent(normalization, ord, mask)

  def update_fn(updates, state, params=None):
    eps, state = ascent.update(updates, state, params)
    return _round(eps, params), state

  return optax.GradientTransformation(ascent.init, update_fn)


def rho_ball(
  rho: chex.Numeric | optax.Schedule,
  eta: chex.Numeric,
  adaptive: bool | _normalization.Normalization,
  *,
  ord: float = 2,
  mask: _trees.Mask | None = None,
) -> optax.GradientTransformation:
  r"""The ascent that the arguments of :func:`optax_asam.asam` describe.

  Steepest ascent to the surface of the ball :math:`\|T_w^{-1} \epsilon\|_p \le
  \rho`. The state is that of an Optax schedule, whatever ``rho`` is.

  Args:
    rho: The radius :math:`\rho \ge 0`: a number, a traced scalar, or a schedule
      of the count of updates.
    eta: The constant of element-wise normalization, where ``adaptive`` is True.
    adaptive: True for element-wise normalization, False for none, or a
      normalization.
    ord: The exponent p of the ball, in (1, inf].
    mask: Which leaves are perturbed, as in :func:`steepest_ascent`.

  Returns:
    An :class:`optax.GradientTransformation` whose ``update`` needs ``params``.

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
  if not callable(rho):
    _checks.check_scale('rho', rho, '0.5')
  _checks.check_scale('eta', eta, '0.01')
  if isinstance(adaptive, bool):
    normalization = (
      _normalization.elementwise(eta) if adaptive else _normalization.identity()
    )
  else:
    _coordinates.check_normalization('adaptive', adaptive)
    normalization = adaptive
  return optax.chain(
    _unrounded_ascent(normalization, ord, mask),
    optax.scale_by_schedule(rho if callable(rho) else lambda _: rho),
    # Last, and once: among a million weights of 1e-3 a unit perturbation has
    # elements of 1e-6, of which float16 keeps four bits.
    optax.stateless(_round),
  )


def _unrounded_ascent(
  normalization: _normalization.Normalization,
  ord: float,
  mask: _trees.Mask | None,
) -> optax.GradientTransformation:
  """:func:`steepest_ascent` with its result still in at least float32."""
  _coordinates.check_normalization('normalization', normalization)
  _checks.check_ord(ord)
  _trees.check_selects_something(mask)

  def init_fn(params):
    _trees.check_params(params)
    return optax.EmptyState()

  def update_fn(updates, state, params=None):
    params = _trees.checked_params(params, updates)
    coordinates = _coordinates.at(params, normalization, mask)
    direction, usable = _ball.steepest(coordinates.pull(updates), ord)
    eps = jax.tree.map(
      lambda e: jnp.where(usable, e, 0), coordinates.push(direction)
    )
    return eps, state

  return optax.GradientTransformation(init_fn, update_fn)


def _round(eps: optax.Updates, params: optax.Params | None) -> optax.Updates:
  """``eps`` in the dtypes of ``params``."""
  return jax.tree.map(
    lambda e, w: jnp.asarray(e, jnp.result_type(w)), eps, params
  )
