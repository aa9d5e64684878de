r"""Ascents: Optax transformations from a gradient to a perturbation."""

from collections.abc import Callable
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
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
    For p = 2 one float32 reduction serves norms of 1e-18 to 1e18; below, the
    perturbation is zero. ``optax.masked`` around this would hand the raw
    gradient on as a perturbation: use ``mask``.
  """
  _check_normalization('normalization', normalization)
  _checks.check_ord(ord)
  if mask is not None and not _trees.is_function(mask):
    _trees.check_selects_something(mask)

  def init_fn(params):
    _trees.check_params(params)
    return optax.EmptyState()

  def update_fn(updates, state, params=None):
    _trees.check_update(updates, params)
    selected = _trees.resolve_mask(mask, params)
    _trees.check_selects_something(selected)
    t = normalization(params)
    _trees.check_operator(t, params)

    flat_selected, treedef = jax.tree.flatten(selected)
    flat_params, flat_grads, flat_t = map(
      treedef.flatten_up_to, (params, updates, t)
    )
    dtype = _trees.accumulator_dtype(*flat_params)
    scaled_grads = [
      _multiply(t, jnp.asarray(g, dtype))
      for s, t, g in zip(flat_selected, flat_t, flat_grads, strict=True)
      if s
    ]
    direction, usable = _steepest_in_unit_ball(scaled_grads, ord)
    directions = iter(direction)

    def perturbation(selected, t, w):
      if not selected:
        return jnp.zeros_like(w)
      eps = jnp.where(usable, _multiply(t, next(directions)), 0)
      return eps.astype(jnp.result_type(w))

    eps = map(perturbation, flat_selected, flat_t, flat_params)
    return jax.tree.unflatten(treedef, eps), state

  return optax.GradientTransformation(init_fn, update_fn)


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
  _checks.check_static('adaptive', adaptive)
  if isinstance(adaptive, bool):
    normalization = (
      _normalization.elementwise(eta) if adaptive else _normalization.identity()
    )
  else:
    _check_normalization('adaptive', adaptive)
    normalization = adaptive
  return optax.chain(
    steepest_ascent(normalization, ord=ord, mask=mask),
    optax.scale_by_schedule(rho if callable(rho) else lambda _: rho),
  )


def _steepest_in_unit_ball(
  h: list[jax.Array], p: float
) -> tuple[list[jax.Array], jax.Array]:
  r"""Maximizes <h, x> over ||x||_p <= 1.

  .. math::
    x = \operatorname{sign}(h) |h|^{q - 1} / \|h\|_q^{q - 1}

  Args:
    h: Arrays of one dtype, at least float32.
    p: The exponent, in (1, inf].

  Returns:
    The maximizer, arrays like ``h``, and a bool scalar: whether ||h|| is
    neither zero nor infinite nor NaN. Where it is False, x is not to be used.
  """
  tiny = jnp.finfo(h[0].dtype).tiny
  if p == math.inf:
    usable = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in h]).all()
    return [jnp.sign(leaf) for leaf in h], usable
  if p == 2:
    squares = sum(jnp.sum(leaf * leaf) for leaf in h)
    usable = (squares >= tiny) & jnp.isfinite(squares)
    # The guard stands inside the root, whose derivative at 0 is infinite. A
    # square below `tiny` counts as zero on most devices: a thousand elements of
    # 1e-19 beside one of 2e-19 would leave the ball if the sum did not allow
    # for them. In a sum that matters, `size * tiny` is rounded away.
    size = sum(leaf.size for leaf in h)
    norm = jnp.sqrt(jnp.where(usable, squares, 1) + size * tiny)
    return [leaf / norm for leaf in h], usable
  # |h|^q overflows and underflows early, so the largest |h|, which cancels, is
  # divided out first; that it cancels is why its derivative may be left out.
  peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in h]
  peak = jax.lax.stop_gradient(jnp.stack(peaks).max())
  # XLA may divide by multiplying with 1 / peak, which must not be flushed to
  # zero. NaN fails both comparisons.
  usable = (peak >= tiny) & (peak <= 1 / tiny)
  safe_peak = jnp.where(usable, peak, 1)
  q = p / (p - 1)
  magnitudes = [jnp.abs(leaf) / safe_peak for leaf in h]
  total = sum(jnp.sum(_power(leaf, q)) for leaf in magnitudes)
  inverse = jnp.where(usable, total, 1) ** (-1 / p)  # (q - 1) / q = 1 / p
  return [
    jnp.sign(leaf) * _power(magnitude, q - 1) * inverse
    for leaf, magnitude in zip(h, magnitudes, strict=True)
  ], usable


def _power(x: jax.Array, exponent: float) -> jax.Array:
  """``x ** exponent`` for x >= 0, with a zero derivative at zero."""
  positive = x > 0
  return jnp.where(positive, jnp.where(positive, x, 1) ** exponent, 0)


def _multiply(t: Any, x: jax.Array) -> jax.Array:
  """``t * x`` in the dtype of ``x``; a T of Python 1 costs nothing.

  Ones as arrays would be multiplied and compiled: 5.8 s instead of 3.8 s for a
  ResNet-20 under SAM.
  """
  if isinstance(t, int) and t == 1:
    return x
  return jnp.asarray(t, x.dtype) * x


def _check_normalization(
  name: str, value: bool | Callable[[optax.Params], Any]
) -> None:
  """Raises unless ``value`` may be a function from params to T_w."""
  _checks.check_static(name, value)
  allowed = (
    'True, False or a normalization'
    if name == 'adaptive'
    else ('a function from params to T_w')
  )
  write = f'Write for example {name}=normalization.filterwise(0.01).'
  if not callable(value):
    raise TypeError(f'{name} must be {allowed}, but got {value!r}. {write}')
  if value in _normalization.FACTORIES:
    raise TypeError(
      f'{name} must be {allowed}, but got the factory {value.__name__}, which'
      f' was not called. Write {name}=normalization.{value.__name__}().'
    )
