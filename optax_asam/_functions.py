"""What ``update`` is given to take the second gradient with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_asam import _trees

GradFn = Callable[[optax.Params], Any]
ValueFn = Callable[[optax.Params], Any]


def as_value_and_grad_fn(
  grad_fn: GradFn | None, value_fn: ValueFn | None
) -> Callable[[optax.Params], tuple[jax.typing.ArrayLike, Any]]:
  """Either argument of ``update`` as one checked function of params."""
  if (grad_fn is None) == (value_fn is None):
    got = 'neither' if grad_fn is None else 'both'
    raise ValueError(
      f'Exactly one of grad_fn and value_fn must be given, but got {got}. Write'
      f' tx.update(grads, state, params, grad_fn=grad_fn) with'
      f' grad_fn(params) -> grads, or value_fn=value_fn with'
      f' value_fn(params) -> scalar.'
    )
  name, function = (
    ('grad_fn', grad_fn) if value_fn is None else ('value_fn', value_fn)
  )
  if not callable(function):
    raise TypeError(
      f'{name} must be a function of params, but got {function!r}. Write for'
      f' example {name}=lambda params: ...'
    )

  def checked_grad_fn(params):
    grads = function(params)
    write = 'Write for example grad_fn=jax.grad(loss_fn).'
    if isinstance(grads, tuple) and type(grads) is not type(params):
      write = (
        'A function made with has_aux=True or by value_and_grad returns a'
        ' tuple: write grad_fn=lambda p: jax.grad(loss_fn, has_aux=True)(p)[0].'
      )
    _trees.check_like(
      'the result of grad_fn', grads, params, dtypes=True, write=write
    )
    return jnp.nan, grads

  return (
    checked_grad_fn
    if value_fn is None
    else jax.value_and_grad(checked_scalar_fn('value_fn', value_fn))
  )


def checked_scalar_fn(name: str, function: ValueFn) -> ValueFn:
  """``function``, called ``name``, with a check of what it returns."""

  def checked(params):
    value = function(params)
    if not _trees.is_float_array(value) or jnp.shape(value):
      raise TypeError(
        f'{name} must return a real scalar, but returned'
        f' {_trees.describe(value)}. Write for example'
        f' {name}=lambda p: loss(p).mean(), or loss(p)[0] where it returns'
        f' auxiliary data, too.'
      )
    return value

  return checked
