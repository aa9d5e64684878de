r"""Normalization operators: functions from ``params`` to :math:`T_w`.

:math:`T_w` is a non-negative diagonal operator, represented as a pytree with
the structure of ``params``. A leaf is an array that broadcasts to its
parameter, in at least float32, or the Python number 1, which costs no
multiplication.
"""

import collections
from collections.abc import Callable
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import _checks
from optax_asam import _trees

__all__ = (
  'Normalization',
  'elementwise',
  'filterwise',
  'identity',
  'layerwise',
  'normalization_layers',
  'not_bias',
)

Normalization = Callable[[optax.Params], Any]

# Dense and convolution layers (Flax, Haiku, Equinox), gates (`bias_ih`,
# `b_hh`), attention (`in_proj_bias`), hand-written layers (`b1`), and the
# shift of a normalization layer (`beta`, `offset`).
_BIAS = re.compile(r'(.+_)?bias|bias_.*|biases|b|b\d+|b_.*|beta|offset')

# Normalization layers: a word of `BatchNorm_0`, `input_layernorm`, `norms`,
# `batch_normalization`, `bn1` or `ln_f`, and their parameters.
_WORD = re.compile(r'[A-Z]*[a-z]+|[A-Z]+')
_NORM = re.compile(r'.*norm(s|alization)?|[bgl]n')
_NORM_PARAMETERS = frozenset(
  {'scale', 'bias', 'offset', 'gamma', 'beta', 'weight'}
)
# These normalize weights, not activations.
_NO_NORM = re.compile(r'.*(weight|spectral).*', re.IGNORECASE)


def not_bias(params: optax.Params) -> Any:
  """Masks out the biases, which the paper leaves unnormalized.

  A leaf is a bias if the last name on its path is ``bias``, ``biases``,
  ``bias_*``, ``*_bias``, ``b``, ``b_*``, ``b`` and a number, ``beta`` or
  ``offset``, as in the trees of Flax (linen and NNX), Haiku and Equinox; but
  not ``b`` beside ``a``, the factors of LoRA. Of a name such as
  ``layers.0.bias``, only the part after the last ``.`` or ``/`` counts.
  Positions in a list are not names, nor are ``value`` and ``raw_value``, in
  which an NNX variable holds its array.

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
  leaves, treedef = jax.tree.flatten_with_path(params)
  found = [_layer_and_name(path) for path, _ in leaves]
  lora = {layer for layer, name in found if name == 'a'}
  return treedef.unflatten(
    _BIAS.fullmatch(name) is None or (name == 'b' and layer in lora)
    for layer, name in found
  )


def _layer_and_name(path: Any) -> tuple[tuple[Any, ...], str]:
  """What leads to the last name on a key path, and that name, or ''."""
  names = _names(path)
  while names and not isinstance(names[-1], str):
    names.pop()
  *layer, name = names or ['']
  return tuple(layer), name


def _names(path: Any) -> list[Any]:
  """The names and positions on a key path, of which one entry may hold more.

  ``flax.traverse_util.flatten_dict`` makes tuples, or names joined by ``/``.
  """
  names = []
  for entry in _checks.names(path):
    for name in entry if isinstance(entry, tuple) else (entry,):
      names += re.split('[./]', name) if isinstance(name, str) else [name]
  return names


def normalization_layers(params: optax.Params) -> Any:
  """Selects the parameters of normalization layers, for the argument ``mask``.

  SAM-ON perturbs only these, about 0.1% of all parameters. In its authors'
  experiments, this generalizes as well as perturbing all parameters, or better.

  A leaf is selected if it is named ``scale``, ``bias``, ``offset``, ``gamma``,
  ``beta`` or ``weight``, and if its layer is recognized as a normalization
  layer in one of these ways:

  * By name. The name is that of the layer's class, if the tree contains modules
    (Equinox), or else, unless the class is one of Equinox's own, the last name
    before that of the leaf (Flax, Haiku), if all parameters of the layer have
    names from the list above. One of its words must end with ``norm``,
    ``norms`` or ``normalization``, or be ``bn``, ``gn`` or ``ln``. For example:
    ``BatchNorm_0``, ``RMSNorm``, ``resnet/~/batch_norm``, ``input_layernorm``,
    ``norm1``, ``bn1`` and ``ln_f``. Names with ``weight`` or ``spectral`` are
    excluded, since weight and spectral normalization do not normalize
    activations.
  * By its parameters, if the layer has only a position (``layers_1``, or an
    index as in ``nnx.Sequential``): it must have ``scale``, and may have
    ``bias`` and ``offset``, but no other parameters.

  Args:
    params: A pytree of parameters.

  Returns:
    A pytree like ``params``: True at the parameters of normalization layers,
    False elsewhere. If it selects nothing, :func:`optax_asam.asam` raises an
    error.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_asam import asam, normalization
    >>> params = {
    ...   'Conv_0': {'kernel': jnp.ones((3, 3, 1, 2)), 'bias': jnp.zeros(2)},
    ...   'BatchNorm_0': {'scale': jnp.ones(2), 'bias': jnp.zeros(2)},
    ... }
    >>> mask = normalization.normalization_layers(params)
    >>> mask['BatchNorm_0'], mask['Conv_0']
    ({'bias': True, 'scale': True}, {'bias': False, 'kernel': False})
    >>> tx = asam(optax.sgd(0.1), mask=normalization.normalization_layers)

  References:
    Mueller et al., `Normalization Layers Are All That Sharpness-Aware
    Minimization Needs <https://arxiv.org/abs/2306.04226>`_, 2023.
  """
  parameters = collections.defaultdict(set)  # of each layer
  for path, _ in jax.tree.leaves_with_path(params):
    *layer, parameter = _names(path) or ['']
    parameters[tuple(layer)].add(parameter)

  def is_selected(path, _):
    *layer, parameter = _names(path) or ['']
    if parameter not in _NORM_PARAMETERS:
      return False
    layer_class = type(_parent(params, path))
    if _is_norm(layer_class.__name__):
      return True
    if layer_class.__module__.startswith('equinox.'):
      return False
    siblings = parameters[tuple(layer)]
    if not layer or not siblings <= _NORM_PARAMETERS:
      return False
    if _is_position(layer[-1]) and 'scale' in siblings:
      return siblings <= {'scale', 'bias', 'offset'}
    names = [name for name in layer if not _is_position(name)]
    return bool(names) and _is_norm(names[-1])

  return jax.tree_util.tree_map_with_path(is_selected, params)


def _is_norm(name: str) -> bool:
  """Whether a name is that of a normalization layer."""
  words = _WORD.findall(name)
  return _NO_NORM.fullmatch(name) is None and any(
    _NORM.fullmatch(word.lower()) for word in words
  )


def _is_position(name: Any) -> bool:
  """Whether a name on a path says only where a layer is."""
  return not isinstance(name, str) or bool(
    re.fullmatch(r'(layers?_)?\d+', name)
  )


def _parent(tree: Any, path: Any) -> Any:
  """The node that holds a leaf, or None if keys do not lead to it."""
  for entry in path[: len(_checks.names(path)) - 1]:
    try:
      if isinstance(entry, jax.tree_util.GetAttrKey):
        tree = getattr(tree, entry.name)
      else:
        tree = tree[getattr(entry, 'key', getattr(entry, 'idx', None))]
    except (AttributeError, LookupError, TypeError):
      return None
  return tree


def identity() -> Normalization:
  r"""No normalization: :math:`T_w = I`, the operator of SAM.

  Returns:
    A function from ``params`` to a pytree like it whose leaves are the
    Python number 1.

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
      of bools with the structure of ``params`` or a prefix of it (but not a
      single bool), a function from ``params`` to one, or None for all. By
      default, all but biases.

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
  if isinstance(axis, bool) or not isinstance(axis, _checks.Integer):
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
  if isinstance(adaptive, (bool, np.bool_)):
    return elementwise(eta) if adaptive else identity()
  check('adaptive', adaptive)
  return adaptive


def _masked(operator, eta, mask) -> Normalization:
  """``operator(w) + eta`` at the leaves that ``mask`` selects, 1 elsewhere."""
  _checks.check_scale('eta', eta, '0.01')
  if not _trees.is_function(mask):
    _checks.check_bools(mask)

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
