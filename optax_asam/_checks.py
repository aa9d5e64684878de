"""Checks of what a factory is given; the error says what to write instead."""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import ParamSpec
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

P = ParamSpec('P')
R = TypeVar('R')

Number = int | float | np.integer | np.floating
Integer = int | np.integer

_STATIC_ARGS = (
  "static_args=('base_tx', 'adaptive', 'ord', 'mask', 'ascent_steps', "
  "'every_k', 'descent', 'perturbed_dtype')"
)


def is_array(value: Any) -> bool:
  """Whether ``value`` is a NumPy or JAX array, a tracer included."""
  return isinstance(value, (jax.Array, np.ndarray))


def check_static(name: str, value: Any) -> None:
  """Raises if ``value``, which shapes the program, is an array."""
  if is_array(value):
    raise TypeError(
      f'{name} must be known before tracing, but got the array {value}.'
      f' Under optax.inject_hyperparams, name it in static_args:'
      f' optax.inject_hyperparams(asam, {_STATIC_ARGS});'
      f" for sam without 'adaptive'."
    )


def check_scale(name: str, value: Any, example: str) -> None:
  """Raises unless ``value`` is a scalar, finite and >= 0 where that shows."""
  write = f'Write for example {name}={example}.'
  if isinstance(value, np.ndarray) and not value.ndim:
    value = value.item()
  if is_array(value):
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
      value.dtype, jnp.integer
    )
    if value.ndim or not real:
      raise TypeError(
        f'{name} must be one real number, but got an array of shape'
        f' {value.shape} and dtype {value.dtype}. {write}'
      )
    return
  if isinstance(value, bool) or not isinstance(value, Number):
    raise TypeError(
      f'{name} must be one real number, but got {value!r}. {write}'
    )
  if not (math.isfinite(value) and value >= 0):
    raise ValueError(
      f'{name} must be finite and >= 0, but got {value!r}. {write}'
    )


def check_ord(value: Any) -> None:
  """Raises unless ``value`` is the exponent of a norm, in (1, inf]."""
  check_static('ord', value)
  write = 'Write for example ord=2, ord=3 or ord=jnp.inf.'
  if isinstance(value, bool) or not isinstance(value, Number):
    raise TypeError(
      f'ord must be a number in (1, inf], but got {value!r}. {write}'
    )
  if not value > 1:  # NaN included.
    raise ValueError(f'ord must be in (1, inf], but got {value!r}. {write}')


def check_count(name: str, value: Any) -> None:
  """Raises unless ``value`` is an integer >= 1."""
  check_static(name, value)
  write = f'Write for example {name}=1.'
  if isinstance(value, bool) or not isinstance(value, Integer):
    raise TypeError(f'{name} must be an int >= 1, but got {value!r}. {write}')
  if value < 1:
    raise ValueError(f'{name} must be >= 1, but got {value!r}. {write}')


def check_transformation(name: str, value: Any, write: str) -> None:
  """Raises unless ``value`` is an Optax gradient transformation."""
  if isinstance(value, optax.GradientTransformation):
    return
  got = f'{value!r}'
  if isinstance(value, type) or callable(value):
    got = (
      f'the function {getattr(value, "__name__", got)}, which was not called'
    )
  raise TypeError(
    f'{name} must be an optax.GradientTransformation, but got {got}.'
    f' Write for example {write}.'
  )


def check_function(name: str, value: Any, write: str) -> None:
  """Raises unless ``value`` is callable."""
  check_static(name, value)
  if not callable(value):
    raise TypeError(
      f'{name} must be a function, but got {value!r}. Write for example'
      f' {write}.'
    )


def check_perturbed_dtype(value: Any) -> None:
  """Raises unless ``value`` is None or a floating dtype."""
  check_static('perturbed_dtype', value)
  if value is None:
    return
  write = 'Write for example perturbed_dtype=jnp.float32.'
  try:
    dtype = jnp.dtype(value)
  except TypeError as error:
    raise TypeError(
      f'perturbed_dtype must be a dtype or None, but got {value!r}. {write}'
    ) from error
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'perturbed_dtype must be a floating dtype, but got {dtype}. {write}'
    )


def checks_base_tx(factory: Callable[P, R]) -> Callable[P, R]:
  """Makes a ``base_tx`` that is missing or wrong an error that helps.

  Python's own, for ``factory(rho=0.5)``, would not say what to write.
  """

  @functools.wraps(factory)
  def checked(*args: P.args, **kwargs: P.kwargs) -> R:
    write = f'{factory.__name__}(optax.sgd(0.1))'
    if not args and 'base_tx' not in kwargs:
      raise TypeError(
        f'base_tx, the optimizer to wrap, must be given, but got none. Write'
        f' for example {write}.'
      )
    check_transformation(
      'base_tx', args[0] if args else kwargs['base_tx'], write
    )
    return factory(*args, **kwargs)

  return checked
