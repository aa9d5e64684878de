r"""Normalization operators: functions from ``params`` to :math:`T_w`.

:math:`T_w` is a positive diagonal operator, represented as a pytree with the
structure of ``params``. A leaf is an array that broadcasts to its parameter,
in at least float32, or the Python number 1, which costs no multiplication.
"""

from collections.abc import Callable
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _trees

Normalization = Callable[[optax.Params], Any]

# Dense and convolution layers (Flax, Haiku, Equinox), gates (`bias_ih`,
# `b_hh`), attention (`in_proj_bias`), hand-written layers (`b1`), and the
# shift of a normalization layer (`beta`, `offset`).
_BIAS = re.compile(r'(.+_)?bias|bias_.*|biases|b|b\d+|b_.*|beta|offset')


def not_bias(params: optax.Params) -> Any:
  """Masks out the biases, which the paper leaves unnormalized.

  A leaf is a bias if the last name on its path is ``bias``, ``biases``,
  ``bias_*``, ``*_bias``, ``b``, ``b_*``, ``b`` and a number, ``beta`` or
  ``offset``, as in the trees of Flax (linen and NNX), Haiku and Equinox. Of a
  name such as ``layers.0.bias``, only the part after the last ``.`` or ``/``
  counts. Positions in a list are not names, nor are ``value`` and
  ``raw_value``, in which an NNX variable holds its array.

  Args:
    params: A pytree of parameters.

  Returns:
    A pytree like ``params``: False at biases, True elsewhere. In a tree
    without names, everything is True.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization
    >>> params = {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}
    >>> normalization.not_bias(params)
    {'bias': False, 'kernel': True}

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 4.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _BIAS.fullmatch(_last_name(path)) is None, params
  )


def _last_name(path: Any) -> str:
  """The last name on a key path, or ''."""
  for name in reversed(_checks.names(path)):
    if isinstance(name, tuple) and name:  # flax.traverse_util.flatten_dict
      name = name[-1]
    if isinstance(name, str):
      return re.split('[./]', name)[-1]
  return ''


def identity() -> Normalization:
  r"""No normalization: :math:`T_w = I`, the operator of SAM.

  Returns:
    A function from ``params`` to a pytree like it, of Python ones.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization
    >>> normalization.identity()({'kernel': jnp.ones((2, 3))})
    {'kernel': 1}

  References:
    Foret et al., `Sharpness-Aware Minimization
    <https://arxiv.org/abs/2010.01412>`_, 2021.
  """
  return lambda params: jax.tree.map(lambda _: 1, params)


def elementwise(
  eta: chex.Numeric = 0.01, mask: _trees.Mask | None = not_bias
) -> Normalization:
  r"""Element-wise normalization, the operator of ASAM.

  .. math::
    T_w = \operatorname{diag}(|w_1| + \eta, \ldots, |w_k| + \eta)

  Args:
    eta: The constant :math:`\eta \ge 0`, a number or a traced scalar. With it,
      weights that are zero are perturbed, too.
    mask: Which leaves are normalized; the others have :math:`T_w = 1`. A pytree
      of bools with the structure of ``params`` or a prefix of it, a function
      from ``params`` to one, or None for all. By default, all but biases.

  Returns:
    A function from ``params`` to :math:`T_w`: a pytree like ``params`` whose
    leaves have the shape of their parameter and at least float32, or are 1.

  Raises:
    TypeError: ``eta`` is not a real number, or a leaf of the mask is not a
      bool.
    ValueError: ``eta`` is negative or not finite, or the mask does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization
    >>> params = {'kernel': jnp.array([-3.0, 0.0]), 'bias': jnp.array([2.0])}
    >>> t = normalization.elementwise(eta=0.5)(params)
    >>> print(t['kernel'], t['bias'])
    [3.5 0.5] 1

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 4.
  """
  return _masked(jnp.abs, eta, mask)


def filterwise(
  eta: chex.Numeric = 0.01,
  axis: int = -1,
  mask: _trees.Mask | None = not_bias,
) -> Normalization:
  r"""Filter-wise normalization of convolution kernels.

  .. math::
    T_w = \operatorname{diag}(\|f_i\|_2 + \eta) \quad
    \text{on the entries of the filter } f_i

  A filter is the part of a leaf of three or more dimensions that belongs to one
  output channel. Other leaves are normalized element-wise, as in the paper.

  Args:
    eta: The constant :math:`\eta \ge 0`, a number or a traced scalar.
    axis: The axis of output channels: -1 in Flax and Haiku, 0 in Equinox.
    mask: Which leaves are normalized, as in :func:`elementwise`.

  Returns:
    A function from ``params`` to :math:`T_w`: a pytree like ``params`` whose
    leaves are at least float32 and broadcast to their parameter, or are 1. The
    leaf of a kernel has size 1 along every axis but ``axis``.

  Raises:
    TypeError: ``eta`` is not a real number, ``axis`` not an int, or a leaf of
      the mask not a bool.
    ValueError: ``eta`` is negative or not finite, the mask does not fit, or a
      kernel does not have the axis.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization
    >>> kernel = jnp.array([[[3.0, 0.0], [4.0, 0.0]]])  # two filters
    >>> print(normalization.filterwise(eta=0.5)({'kernel': kernel})['kernel'])
    [[[5.5 0.5]]]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 3.

  .. note::
    A convolution kernel is recognized by its number of dimensions alone, so an
    attention kernel of three dimensions, or dense layers stacked by ``scan``,
    count as one. Mask them out, or normalize element-wise.
  """
  _checks.check_static('axis', axis)
  if isinstance(axis, bool) or not isinstance(axis, int):
    raise TypeError(
      f'axis must be an int, the axis of output channels, but got {axis!r}.'
      f' For example: axis=-1 (Flax, Haiku) or axis=0 (Equinox).'
    )

  def operator(w):
    if w.ndim < 3:
      return jnp.abs(w)
    if not -w.ndim <= axis < w.ndim:
      raise ValueError(
        f'axis must be in range for every kernel, but got axis={axis} for one'
        f' of shape {w.shape}. For example: axis=-1 (Flax, Haiku) or'
        f' axis=0 (Equinox).'
      )
    return _l2_norm(w, tuple(i for i in range(w.ndim) if i != axis % w.ndim))

  return _masked(operator, eta, mask)


def layerwise(
  eta: chex.Numeric = 0.01, mask: _trees.Mask | None = not_bias
) -> Normalization:
  r"""Layer-wise normalization: one number per leaf.

  .. math::
    T_w = \operatorname{diag}(\|w_l\|_2 + \eta) \quad
    \text{on the entries of the leaf } w_l

  Args:
    eta: The constant :math:`\eta \ge 0`, a number or a traced scalar.
    mask: Which leaves are normalized, as in :func:`elementwise`.

  Returns:
    A function from ``params`` to :math:`T_w`: a pytree like ``params`` whose
    leaves are at least float32 and of size 1 along every axis, or are 1.

  Raises:
    TypeError: ``eta`` is not a real number, or a leaf of the mask is not a
      bool.
    ValueError: ``eta`` is negative or not finite, or the mask does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization
    >>> params = {'kernel': jnp.array([3.0, 4.0])}
    >>> print(normalization.layerwise(eta=0.5)(params)['kernel'])
    [5.5]

  References:
    The family of operators of Kwon et al., `ASAM
    <https://arxiv.org/abs/2102.11600>`_, 2021, section 3, with leaves in
    place of filters.
  """
  return _masked(lambda w: _l2_norm(w, None), eta, mask)


def check(name: str, value: Any) -> None:
  """Raises unless ``value`` may be a normalization."""
  factories = (identity, elementwise, filterwise, layerwise)
  _checks.check_normalization(name, value, factories)


def of(eta: chex.Numeric, adaptive: bool | Normalization) -> Normalization:
  """The normalization that two arguments of :func:`optax_asam.asam` mean."""
  _checks.check_scale('eta', eta, '0.01')
  if isinstance(adaptive, bool):
    return elementwise(eta) if adaptive else identity()
  check('adaptive', adaptive)
  return adaptive


def _masked(operator, eta, mask) -> Normalization:
  """``operator(w) + eta`` at the leaves that ``mask`` selects, 1 elsewhere."""
  _checks.check_scale('eta', eta, '0.01')
  _checks.check_selects_something(mask)

  def leaf(selected, w):
    if not selected:
      return 1
    w = _trees.widen(w)
    return operator(w) + jnp.asarray(eta, w.dtype)

  def normalization(params):
    return jax.tree.map(leaf, _trees.resolve_mask(mask, params), params)

  return normalization


def _l2_norm(w: jax.Array, axis: tuple[int, ...] | None) -> jax.Array:
  """The norm over ``axis``, kept as size 1, with a zero derivative at zero."""
  # There is no second reduction for the scale, so float32 below 1e-19 is 0.
  squares = jnp.sum(w * w, axis=axis, keepdims=True)
  nonzero = squares != 0  # True for NaN, which must not be hidden.
  # Guarded inside the root: sqrt has an infinite derivative at zero.
  return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)
