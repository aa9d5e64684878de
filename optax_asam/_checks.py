"""Every check of an argument, a tree or a result, with its message.

A message names the argument, says what is needed and what was given, and ends
with what to write instead.
"""

import collections
from collections.abc import Callable
import functools
import math
import reprlib
import sys
from typing import Any
from typing import ParamSpec
from typing import TypeVar

import chex
import jax
from jax import core
import jax.numpy as jnp
import numpy as np
import optax

P = ParamSpec('P')
R = TypeVar('R')

Number = int | float | np.integer | np.floating
Integer = int | np.integer

# Of asam.
_STATIC_ARGS = (
  "static_args=('base_tx', 'adaptive', 'ord', 'mask', 'ascent_steps', "
  "'every_k', 'when', 'descent', 'perturbed_dtype')"
)
_MASK_EXAMPLE = 'For example: mask=jax.tree.map(lambda x: x.ndim > 1, params).'


# What a value is.


def is_array(value: Any) -> bool:
  """Whether ``value`` is a NumPy or JAX array, a tracer included."""
  return isinstance(value, (jax.Array, np.ndarray))


def dtype_of(value: Any) -> Any:
  """The dtype that JAX gives an array or a Python number."""
  dtype = getattr(value, 'dtype', None)
  if dtype is None or isinstance(value, (np.ndarray, np.generic)):
    return jnp.result_type(value)
  return dtype


def is_float_array(value: Any) -> bool:
  """Whether ``value`` is a floating-point array or a Python float."""
  if isinstance(value, type):
    return False
  dtype = getattr(value, 'dtype', type(value))
  return dtype is float or (
    dtype is not type(value) and jnp.issubdtype(dtype, jnp.floating)
  )


def is_real(value: Any) -> bool:
  """Whether ``value`` is a real number or an array of them, but not a bool."""
  dtype = getattr(value, 'dtype', None)  # Scalars of ml_dtypes have one, too.
  if dtype is None:
    return isinstance(value, Number) and not isinstance(value, bool)
  return any(jnp.issubdtype(dtype, d) for d in (jnp.floating, jnp.integer))


def is_float_scalar(value: Any) -> bool:
  """Whether ``value`` is a real floating-point scalar."""
  return is_float_array(value) and not jnp.shape(value)


def is_masked(node: Any) -> bool:
  """Whether ``node`` marks a leaf that is masked out."""
  return isinstance(node, optax.MaskedNode)


def describe(tree: Any) -> str:
  """What ``tree`` is, in the words of an error message."""
  if isinstance(tree, tuple):
    return f'a tuple of length {len(tree)}'
  if is_array(tree):
    return f'an array of shape {tree.shape} and dtype {tree.dtype}'
  name = type(tree).__name__
  return f'an {name}' if name[0] in 'aeiou' else f'a {name}'


def path_name(path: Any) -> str:
  """A key path as it appears in a message."""
  return f'params{jax.tree_util.keystr(path)}'


def keys(path: Any) -> tuple[Any, ...]:
  """The names and indices on a key path."""
  return tuple(
    getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', None)))
    for entry in path
  )


def names(path: Any) -> tuple[Any, ...]:
  """The names and indices on a key path, without what wraps the array.

  A Flax NNX variable holds its array in ``value`` or ``raw_value``. Elsewhere
  on the path, these are names of layers.
  """
  found = keys(path)
  return found[:-1] if found[-1:] in (('value',), ('raw_value',)) else found


# Arguments of factories.


def check_static(name: str, value: Any) -> None:
  """Raises if ``value``, which shapes the program, is an array."""
  if is_array(value):
    raise TypeError(
      f'{name} must be known before tracing, but is an array: {value}.'
      f' optax.inject_hyperparams makes arrays of numbers and functions that'
      f' static_args does not name. For asam: optax.inject_hyperparams(asam,'
      f' {_STATIC_ARGS}). For another function, name only those of these'
      f' arguments that it takes.'
    )


def check_scale(
  name: str, value: Any, example: str, *, below_one: bool = False
) -> None:
  """Raises unless ``value`` is a real scalar, finite and >= 0 if concrete."""
  write = f'For example: {name}={example}.'
  if hasattr(value, 'dtype'):
    if value.shape or not is_real(value):
      raise TypeError(
        f'{name} must be a real number, but got an array of shape'
        f' {value.shape} and dtype {value.dtype}. {write}'
      )
    if isinstance(value, core.Tracer) or (
      isinstance(value, jax.Array) and not value.is_fully_addressable
    ):
      return
  elif not is_real(value):
    raise TypeError(f'{name} must be a real number, but got {value!r}. {write}')
  if not (math.isfinite(float(value)) and float(value) >= 0):
    raise ValueError(
      f'{name} must be finite and >= 0, but got {value}. {write}'
    )
  if below_one and not float(value) < 1:
    raise ValueError(f'{name} must be in [0, 1), but got {value!r}. {write}')


def check_no_schedule(rho: Any) -> None:
  """Raises if ``rho`` is a schedule, which needs a step count."""
  if callable(rho):
    raise TypeError(
      f'rho must be a number or a traced scalar here, but got the function'
      f' {rho!r}: this function keeps no step count. For example: rho=0.5,'
      f' rho=schedule(step), or asam(base_tx, rho=schedule).'
    )


def checked_radius(value: Any) -> Any:
  """``value``, from a schedule of rho, if it is a real scalar."""
  if not is_real(value) or jnp.shape(value):
    raise TypeError(
      f'rho must return a real scalar, but returned {describe(value)}. For'
      f' example: rho=optax.linear_schedule(0.0, 0.5, 1000).'
    )
  return value


def check_ord(value: Any) -> None:
  """Raises unless ``value`` is the order of a norm, in [1.001, inf]."""
  check_static('ord', value)
  write = 'For example: ord=2, ord=3 or ord=jnp.inf.'
  if isinstance(value, bool) or not isinstance(value, Number):
    raise TypeError(
      f'ord must be a number in [1.001, inf], but got {value!r}. {write}'
    )
  # Closer to 1, the powers |h|^q with 1 / ord + 1 / q = 1 underflow.
  if not value >= 1.001:  # NaN included.
    raise ValueError(f'ord must be in [1.001, inf], but got {value!r}. {write}')


def check_count(name: str, value: Any) -> None:
  """Raises unless ``value`` is an integer >= 1."""
  check_static(name, value)
  write = f'For example: {name}=1.'
  if isinstance(value, bool) or not isinstance(value, Integer):
    raise TypeError(f'{name} must be an int >= 1, but got {value!r}. {write}')
  if not 1 <= value < 2**31:
    raise ValueError(
      f'{name} must be >= 1 and fit in an int32, but got {value!r}. {write}'
    )


def check_transformation(name: str, value: Any, write: str) -> None:
  """Raises unless ``value`` is an Optax gradient transformation."""
  if isinstance(value, optax.GradientTransformation):
    return
  got = f'{value!r}'
  if callable(value):
    name_ = getattr(value, '__name__', got)
    got = f'the function {name_}, which was not called'
  if hasattr(value, 'gradient_transformation'):  # optax.MultiSteps
    write = f'{name}=multi_steps.gradient_transformation()'
  raise TypeError(
    f'{name} must be an optax.GradientTransformation, but got {got}.'
    f' For example: {write}.'
  )


def checks_base_tx(factory: Callable[P, R]) -> Callable[P, R]:
  """Adds a helpful error for a missing or wrong ``base_tx``.

  Python's own error for ``factory(rho=0.5)`` does not say what to write.
  """

  @functools.wraps(factory)
  def checked(*args: P.args, **kwargs: P.kwargs) -> R:
    write = f'{factory.__name__}(optax.sgd(0.1))'
    if not args and 'base_tx' not in kwargs:
      raise TypeError(
        f'base_tx, the optimizer to wrap, must be given, but got none.'
        f' For example: {write}.'
      )
    check_transformation(
      'base_tx', args[0] if args else kwargs['base_tx'], write
    )
    return factory(*args, **kwargs)

  return checked


def check_function(name: str, value: Any, write: str) -> None:
  """Raises unless ``value`` is callable."""
  if not callable(value):
    got = describe(value) if is_array(value) else repr(value)
    raise TypeError(
      f'{name} must be a function, but got {got}. For example: {write}.'
    )


def checked_ascent_fun(
  fun: Callable[..., Any],
  ascent_fun: Callable[..., Any] | None,
  has_aux: bool,
) -> Callable[..., Any]:
  """``ascent_fun`` with a check of what it returns; by default ``fun``."""
  if ascent_fun is None:
    return fun
  write = (
    'ascent_fun=lambda params, batch: loss_fn(params, jax.tree.map('
    'lambda x: x[::4], batch))'
  )
  check_function('ascent_fun', ascent_fun, write)

  needed = 'a pair of a scalar and auxiliary data' if has_aux else 'a scalar'

  def checked(*args, **kwargs):
    out = ascent_fun(*args, **kwargs)
    if has_aux:
      is_pair = isinstance(out, (tuple, list)) and len(out) == 2
      is_valid = is_pair and is_float_scalar(out[0])
    else:
      is_valid = is_float_scalar(out)
    if not is_valid:
      raise TypeError(
        f'ascent_fun must return {needed}, like the function to differentiate,'
        f' but returned {describe(out)}. For example: {write}.'
      )
    return out

  return checked


def check_normalization(
  name: str, value: Any, factories: tuple[Callable[..., Any], ...]
) -> None:
  """Raises unless ``value`` may be a function from params to T_w."""
  check_static(name, value)
  allowed = (
    'True, False or a normalization'
    if name == 'adaptive'
    else 'a function from params to T_w'
  )
  write = f'For example: {name}=normalization.filterwise(0.01).'
  if not callable(value):
    raise TypeError(f'{name} must be {allowed}, but got {value!r}. {write}')
  if value in factories:
    raise TypeError(
      f'{name} must be {allowed}, but got the factory {value.__name__}, which'
      f' was not called. Write {name}=normalization.{value.__name__}().'
    )


def check_argnums(argnums: Any, num_args: int | None = None) -> None:
  """Raises unless ``argnums`` are indices of positional arguments."""
  is_sequence = isinstance(argnums, (tuple, list))
  numbers = argnums if is_sequence else (argnums,)
  for number in numbers:
    if isinstance(number, bool) or not isinstance(number, Integer):
      hint = ''
      if isinstance(number, float):
        hint = f' rho is a keyword: rho={number}.'
      raise TypeError(
        f'argnums must be an int or a sequence of ints, but got {argnums!r}.'
        f'{hint} For example: argnums=0.'
      )
    if num_args is not None and not -num_args <= number < num_args:
      raise TypeError(
        f'argnums must index positional arguments, but got {argnums!r} for'
        f' {num_args} of them. Pass differentiated arguments by position.'
        f' For example: argnums=0.'
      )


def check_perturbed_dtype(value: Any) -> None:
  """Raises unless ``value`` is None or a floating-point dtype."""
  check_static('perturbed_dtype', value)
  if value is None:
    return
  write = 'For example: perturbed_dtype=jnp.float32.'
  try:
    dtype = jnp.dtype(value)
  except TypeError as error:
    raise TypeError(
      f'perturbed_dtype must be a dtype or None, but got {value!r}. {write}'
    ) from error
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'perturbed_dtype must be a floating-point dtype, but got {dtype}.'
      f' {write}'
    )


_DESCENTS = f'{__package__}.descent'


def check_second_gradient(
  descent: Any, ascent_steps: Any, perturbed_dtype: Any
) -> None:
  """Raises unless these arguments, which say how it is taken, are valid."""
  if descent is not None:
    check_static('descent', descent)
    check_function(
      'descent', descent, 'descent=lambda grads, perturbed_grads: ...'
    )
    # What a factory returns has a dot in its qualified name.
    name = getattr(descent, '__qualname__', '.')
    if getattr(descent, '__module__', '') == _DESCENTS and '.' not in name:
      raise TypeError(
        f'descent must be a function of two gradients, but got the factory'
        f' {name}, which was not called. Write descent=descent.{name}().'
      )
  check_count('ascent_steps', ascent_steps)
  check_perturbed_dtype(perturbed_dtype)


# Arguments of the measures of sharpness.


def check_ord_of_projection(ord: Any) -> None:
  """Raises unless there is a projection onto the ball of the p-norm."""
  check_ord(ord)
  if ord not in (2, math.inf):
    raise ValueError(
      f'ord must be 2 or inf, for which there is a projection, but got {ord!r}.'
      f' For example: ord=jnp.inf.'
    )


def check_key(key: Any) -> None:
  """Raises unless ``key`` is a random key, typed or raw."""
  if is_array(key) and (
    jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
  ):
    return
  raise TypeError(
    f'key must be a random key, but got {key!r}. For example:'
    f' key=jax.random.key(0).'
  )


def check_batches(batches: Any) -> int:
  """The number of ``batches``, if all leaves agree on it; else raises."""
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
  sizes = {shape[:1] for shape in shapes}
  if len(sizes) != 1 or not min(sizes) or not min(sizes)[0]:
    raise ValueError(
      f'batches must have a leading axis of batches, of one size in all leaves,'
      f' but got shapes {shapes}. For example: batches=jax.tree.map(lambda x:'
      f' x.reshape(-1, 128, *x.shape[1:]), data).'
    )
  return shapes[0][0]


def check_axes(axes: tuple[Any, ...], params: optax.Params) -> None:
  """Raises unless ``axes`` are pairs of a direction and a 1-D array."""
  write = (
    'For example: loss_along(loss_fn, params, (eps, jnp.linspace(-1, 1, 51))).'
  )
  if not axes:
    raise ValueError(f'axes must be given, but got none. {write}')
  for axis in axes:
    if not isinstance(axis, (tuple, list)) or len(axis) != 2:
      raise TypeError(
        f'axes must be pairs of a direction and an array, but got'
        f' {describe(axis)}. {write}'
      )
    direction, t = axis
    check_like('the direction in axes', direction, params, write=write)
    if not is_array(t) or not is_real(t) or t.ndim != 1:
      raise TypeError(
        f'axes must be pairs of a direction and a real 1-D array, but got'
        f' {describe(t)} for the array. {write}'
      )


# Masks.


def check_bools(mask: Any) -> None:
  """Raises unless every leaf of ``mask`` is a bool."""
  for path, leaf in jax.tree.leaves_with_path(mask):
    if not isinstance(leaf, (bool, np.bool_)):
      got, hint = repr(leaf), ''
      if is_array(leaf):
        got = describe(leaf)
        hint = ' Under optax.inject_hyperparams, name mask in static_args.'
      raise TypeError(
        f'mask must be a pytree of Python bools, but at'
        f' mask{jax.tree_util.keystr(path)} got {got}. {_MASK_EXAMPLE}{hint}'
      )


def check_one_leaf(mask: Any, params: optax.Params) -> None:
  """Raises if the bool ``mask`` is for a tree of several ``params``.

  ``optax.inject_hyperparams`` calls a function as a schedule, with the number
  of updates, unless it is named in ``static_args``: ``not_bias`` returns True.
  """
  if not jax.tree_util.treedef_is_leaf(jax.tree.structure(params)):
    raise ValueError(
      f'mask must have the structure of params, but got {mask}. Use mask=None'
      f' to select all leaves. Under optax.inject_hyperparams, name mask in'
      f' static_args.'
    )


def misfit_of_mask(mask: Any, params: optax.Params) -> ValueError:
  """The error for a mask that does not fit ``params``."""
  parts = {names(path): path for path, _ in jax.tree.leaves_with_path(mask)}
  paths = {names(path): path for path, _ in jax.tree.leaves_with_path(params)}
  fits = lambda part, path: path[: len(part)] == part
  missing = [
    path for x, path in paths.items() if not any(fits(y, x) for y in parts)
  ]
  extra = [
    part for x, part in parts.items() if not any(fits(x, y) for y in paths)
  ]
  differences = [
    *(f'nothing is given for {path_name(path)}' for path in missing),
    *(f'there is no {path_name(part)}' for part in extra),
    'the containers differ',
  ]
  return ValueError(
    f'mask must have the structure of params or a prefix of it, but'
    f' {differences[0]}. {_MASK_EXAMPLE}'
  )


def check_selects_something(mask: Any) -> None:
  """Raises if all leaves of ``mask``, which are bools, are False."""
  leaves = jax.tree.leaves(mask)
  if leaves and not any(leaves):
    raise ValueError(
      f'mask selects nothing: {reprlib.repr(mask)} is False everywhere. Use'
      f' mask=None to select all leaves, or omit the transformation. If the'
      f' mask is normalization.normalization_layers, it recognized no layer of'
      f' params by name: pass a mask of your own, mask=lambda params: ...'
    )


# Trees.


def check_params(params: optax.Params) -> None:
  """Raises unless every leaf of ``params`` is a floating-point array."""
  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_masked):
    if is_float_array(leaf):
      continue
    name = path_name(path)
    if is_masked(leaf):
      raise ValueError(
        f'{name} is an optax.MaskedNode: optax.masked or optax.partition'
        f' around a transformation hides parameters from it. Put it inside,'
        f' such as asam(optax.partition(...), mask=trainable) or'
        f' asam(optax.masked(...)).'
      )
    if not hasattr(leaf, 'dtype'):
      raise TypeError(
        f'{name} must be a floating-point array, but got {leaf!r}. Pass only'
        f' the arrays: params, static = equinox.partition(model,'
        f' equinox.is_inexact_array), with equinox.combine(params, static) in'
        f' the loss, or graphdef, params, rest = nnx.split(model, nnx.Param,'
        f' ...), with nnx.merge(graphdef, params, rest).'
      )
    raise TypeError(
      f'{name} must be a floating-point array, but got dtype {leaf.dtype}. Pass'
      f' only the parameters that are trained by gradients, and a complex one'
      f' as two real arrays. The order of the arguments of an update is'
      f' tx.update(grads, state, params).'
    )


def checked_params(
  params: optax.Params | None, updates: optax.Updates
) -> optax.Params:
  """``params``, if ``updates`` may be the gradient at them; else raises."""
  params = given(params)
  check_params(params)
  check_like('grads', updates, params, write='Pass the gradient at params.')
  return params


def given(params: optax.Params | None) -> optax.Params:
  """``params``; raises if ``update`` was called without them."""
  if params is None:
    raise ValueError(
      'params must be given, but got None: the perturbation depends on them.'
      ' Write tx.update(grads, state, params), with grad_fn=grad_fn if tx takes'
      ' a second gradient.'
    )
  return params


def check_like(
  name: str, tree: Any, params: optax.Params, *, write: str
) -> None:
  """Raises unless ``tree`` has the structure and shapes of ``params``.

  Args:
    name: What ``tree`` is, for the message.
    tree: The tree, whose leaves must be floating-point arrays.
    params: The tree that it should be like.
    write: What to write instead, for the message.
  """
  if jax.tree.structure(tree) != jax.tree.structure(params):
    raise ValueError(
      f'{name} must have the structure of params, but'
      f' {_first_difference(tree, params)}. {write}'
    )
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)
  for i, (got, want) in enumerate(leaves):
    if jnp.shape(got) == jnp.shape(want) and is_float_array(got):
      continue
    path, _ = jax.tree.leaves_with_path(params)[i]
    if jnp.shape(got) != jnp.shape(want):
      raise ValueError(
        f'{name} must have the shapes of params, but at {path_name(path)} got'
        f' {jnp.shape(got)} instead of {jnp.shape(want)}. {write}'
      )
    raise TypeError(
      f'{name} must have floating-point leaves, but at {path_name(path)} got'
      f' {dtype_of(got)} for {dtype_of(want)}. {write}'
    )


def _first_difference(tree: Any, params: optax.Params) -> str:
  """The first place at which the structures differ, in words."""
  got = {path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
  want = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
  missing = [name for name in want if name not in got]
  extra = sorted(got.difference(want))
  if missing:
    what = f'{missing[0]} is missing'
  elif extra:
    what = f'{extra[0]} is unexpected'
  else:
    what = 'the containers differ'
  return f'{what} (got {describe(tree)}, for params {describe(params)})'


def check_perturbation(eps: Any, params: optax.Params) -> None:
  """Raises unless ``eps``, from an ascent, may be added to ``params``."""
  leaves, treedef = jax.tree.flatten(eps, is_leaf=is_masked)
  if treedef == jax.tree.structure(params):
    pairs = zip(leaves, jax.tree.leaves(params), strict=True)
    eps = treedef.unflatten(w if is_masked(e) else e for e, w in pairs)
  check_like(
    'the result of ascent',
    eps,
    params,
    write='Return the perturbation eps, as ascent.rho_ball(0.5) does.',
  )


def check_operator(t: Any, params: optax.Params) -> None:
  """Raises unless ``t`` is a :math:`T_w` for ``params``."""
  write = 'Return one array or 1 for each parameter, as elementwise() does.'
  if jax.tree.structure(t) != jax.tree.structure(params):
    raise ValueError(
      f'normalization must return a tree like params, but'
      f' {_first_difference(t, params)}. {write}'
    )
  leaves = zip(jax.tree.leaves(t), jax.tree.leaves(params), strict=True)
  for i, (leaf, w) in enumerate(leaves):
    is_one = isinstance(leaf, int) and leaf == 1 and leaf is not True
    if is_one or (is_float_array(leaf) and jnp.shape(leaf) == jnp.shape(w)):
      continue
    name = path_name(jax.tree.leaves_with_path(params)[i][0])
    if not is_float_array(leaf):
      raise TypeError(
        f'normalization must return floating-point arrays or the number 1, but'
        f' at {name} returned {leaf!r}. {write}'
      )
    try:
      chex.assert_is_broadcastable(jnp.shape(leaf), jnp.shape(w))
    except AssertionError as error:
      raise ValueError(
        f'normalization must return arrays that broadcast to their parameter,'
        f' but at {name} returned shape {jnp.shape(leaf)} for {jnp.shape(w)}.'
        f' {write}'
      ) from error


# Momentum.


def no_momentum(reason: str) -> ValueError:
  """The error for a ``base_tx`` without a momentum for ``momentum_asam``."""
  return ValueError(
    f'base_tx must keep exactly one average of gradients with the structure of'
    f' params, in a field named trace or mu of its state, but {reason}. Let'
    f' momentum_asam keep it instead: momentum_asam(base_tx, momentum=0.9).'
    f' Transformations that need a mapped axis or a mesh can go before:'
    f' optax.chain(transformation, momentum_asam(base_tx)).'
  )


def check_distinct(paths: list[tuple[str, ...]]) -> None:
  """Raises if two leaves of params have the same :func:`names`."""
  ((path, count),) = collections.Counter(paths).most_common(1)
  if count > 1:
    raise ValueError(
      f'params must not have two leaves of one name, but has {count} named'
      f" {'/'.join(path)}: 'value' and 'raw_value' at the end do not count."
      f' Rename one of them.'
    )


def check_one_perturbation(count: int) -> None:
  """Raises unless ``count`` perturbations were found in a state."""
  if count != 1:
    raise ValueError(
      f'opt_state must contain exactly one perturbation with the names and'
      f' shapes of params, but contains {count}. Pass the state of an optimizer'
      f' that contains momentum_asam, and the parameters of its training loop:'
      f' eval_params(opt_state, params).'
    )


# The functions for the second gradient, and their results.


def check_one_function(functions: dict[str, Any]) -> tuple[str, Any]:
  """The only one of ``functions`` that is not None, with its name."""
  given = {name: fun for name, fun in functions.items() if fun is not None}
  if len(given) > 1:  # It may be meant for base_tx, as of optax.contrib.sophia.
    given.pop('obj_fn', None)
  if len(given) != 1:
    got = ' and '.join(given) if given else 'neither'
    raise ValueError(
      f'Exactly one of grad_fn and value_fn must be given, but got {got}. Write'
      f' tx.update(grads, state, params, grad_fn=grad_fn) with grad_fn(params)'
      f' -> grads, or value_fn=value_fn with value_fn(params) -> scalar. A'
      f' trainer that passes only gradients, such as'
      f' TrainState.apply_gradients in Flax, needs optax_asam.value_and_grad'
      f' with the base optimizer instead.'
    )
  ((name, function),) = given.items()
  if not callable(function):
    raise TypeError(
      f'{name} must be a function of params, but got {function!r}.'
      f' For example: {name}=lambda params: ...'
    )
  return name, function


def check_grads(grads: Any, params: optax.Params) -> None:
  """Raises unless ``grads``, from ``grad_fn``, may be the gradient."""
  write = 'For example: grad_fn=jax.grad(loss_fn).'
  is_like_params = jax.tree.structure(grads) == jax.tree.structure(params)
  if type(grads) is tuple and len(grads) == 2 and not is_like_params:
    write = (
      'A function made by value_and_grad or with has_aux=True returns a tuple:'
      ' write grad_fn=jax.grad(loss_fn), or with auxiliary data'
      ' grad_fn=lambda p: jax.grad(loss_fn, has_aux=True)(p)[0].'
    )
  check_like('the result of grad_fn', grads, params, write=write)


def check_scalar(name: str, value: Any) -> None:
  """Raises unless ``value``, from the function ``name``, is a real scalar."""
  if not is_float_scalar(value):
    raise TypeError(
      f'{name} must return a real scalar, but returned {describe(value)}.'
      f' For example: {name}=lambda p: loss(p).mean(), or loss(p)[0] if it'
      f' returns auxiliary data, too.'
    )


def check_due(value: Any) -> Any:
  """``value``, from the function ``when``, if it is a single bool."""
  if jnp.shape(value) or dtype_of(value) != jnp.bool_:
    raise TypeError(
      f'when must return a single bool, but returned {describe(value)}.'
      f' For example: when=lambda step: step >= 9_000.'
    )
  return value


def check_varies(
  params: optax.Params, grads: optax.Updates, axis_name: Any
) -> None:
  """Raises if, by their types, a ``pmean`` would not change the gradients.

  Under :func:`jax.shard_map`, the gradient with respect to a replicated
  parameter is already summed over the axis. The types are the same for a loss
  that is averaged over the axis, which does not need ``axis_name``.
  """
  if not hasattr(jax, 'typeof'):  # pragma: no cover
    return  # Before JAX 0.6, types do not show it.
  axes = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
  # Empty with check_vma=False and under pmap and vmap.
  varying = frozenset().union(
    *(varying_axes(jax.lax.axis_index(axis)) for axis in axes)
  )
  if not varying:
    return
  leaves = zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(grads), strict=True
  )
  for (path, w), g in leaves:
    if fixed := varying - varying_axes(w) - varying_axes(g):
      raise ValueError(
        f'axis_name={axis_name!r} must name axes over which gradients vary, but'
        f' that of {path_name(path)} does not over {sorted(fixed)}:'
        f' jax.shard_map has already summed the gradients of replicated'
        f' parameters. Pass local parameters to update and to the gradient'
        f' function: params ='
        f" jax.lax.pcast(params, {axis_name!r}, to='varying'). If the loss is"
        f' averaged over the axis, omit axis_name.'
      )


def varying_axes(x: Any) -> frozenset[Any]:
  """The mesh axes over which ``x`` varies, by its type."""
  aval = jax.typeof(x)
  if hasattr(aval, 'manual_axis_type'):  # JAX 0.10; `vma` before.
    return aval.manual_axis_type.varying
  return getattr(aval, 'vma', frozenset())  # pragma: no cover


# Modules of Flax NNX and Equinox, recognized without importing either library.


def check_not_module(params: Any, *, measured: bool = False) -> None:
  """Raises if ``params`` contains a module that holds more than parameters.

  An NNX module also holds batch statistics and random keys, and an Equinox
  module functions and numbers. ``jax.grad`` would differentiate all of them,
  the ascent would perturb them, and what a forward pass changes in an NNX
  module would be lost. An NNX module of ``nnx.Param`` alone, where it is a
  pytree (Flax 0.12), and a partitioned Equinox module are pytrees of parameters
  like any other.

  Args:
    params: The arguments that are differentiated.
    measured: Whether the sharpness at ``params`` is measured.

  Raises:
    TypeError: There is such a module.
  """
  nnx_module = _class('flax.nnx', 'Module')
  equinox_module = _class('equinox', 'Module')

  def is_module(node):
    return isinstance(node, (nnx_module, equinox_module))

  for path, node in jax.tree.leaves_with_path(params, is_leaf=is_module):
    name = path_name(path)
    if isinstance(node, nnx_module):
      _check_nnx(name, node, measured)
    elif isinstance(node, equinox_module):
      _check_equinox(name, node, measured)


def _class(module: str, name: str) -> Any:
  """A class of a module that is imported, or else () for ``isinstance``."""
  return getattr(sys.modules.get(module), name, ())


def _check_nnx(name: str, module: Any, measured: bool) -> None:
  """Raises unless every leaf of ``module`` is an ``nnx.Param``."""
  param = _class('flax.nnx', 'Param')
  variable = _class('flax.nnx', 'Variable')

  write = (
    'Pass its parameters: graphdef, params, rest = nnx.split(model, nnx.Param,'
    ' ...), and in the loss nnx.merge(graphdef, params, rest).'
    if measured
    else 'Use optax_asam.nnx.value_and_grad or optax_asam.nnx.grad: they'
    ' perturb only nnx.Param, and update the module as nnx.value_and_grad does.'
  )

  def is_variable(node):
    return isinstance(node, variable)

  for path, leaf in jax.tree.leaves_with_path(module, is_leaf=is_variable):
    if not isinstance(leaf, param):
      raise TypeError(
        f'{name} is the Flax NNX module {type(module).__name__}, which must'
        f' hold only nnx.Param here, but {name}{jax.tree_util.keystr(path)} is'
        f' of type {type(leaf).__name__}. {write}'
      )


def _check_equinox(name: str, module: Any, measured: bool) -> None:
  """Raises unless every leaf of ``module`` is a floating-point array."""
  write = (
    'what eqx.partition(model, eqx.is_inexact_array) gives, and eqx.combine it'
    ' in the loss function.'
  )
  if measured:
    write = f'Pass {write}'
  else:
    write = (
      f'Use optax_asam.equinox.filter_value_and_grad or'
      f' optax_asam.equinox.filter_grad, or pass {write}'
    )
  for path, leaf in jax.tree.leaves_with_path(module):
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f'{name} is the Equinox module {type(module).__name__}, which must hold'
        f' only floating-point arrays here, but'
        f' {name}{jax.tree_util.keystr(path)} is'
        f' {leaf if dtype is None else f"an array of dtype {dtype}"}. {write}'
      )
