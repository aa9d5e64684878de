"""Promise: optax_asam.equinox is eqx.filter_grad with another gradient.

The reference is two passes of Equinox, with NumPy between them.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_asam
from optax_asam import _checks
from optax_asam import sharpness
import optax_asam.equinox
from tests.helpers import reference
from tests.helpers.cases import OPTIONS
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')


class Network(eqx.Module):
  """A dense layer, BatchNorm and dropout, and another dense layer."""

  hidden: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  dropout: eqx.nn.Dropout
  out: eqx.nn.Linear

  def __init__(self, key):
    hidden_key, out_key = jax.random.split(key)
    self.hidden = eqx.nn.Linear(3, 4, key=hidden_key)
    self.norm = eqx.nn.BatchNorm(4, 'batch', momentum=0.9, mode='batch')
    self.dropout = eqx.nn.Dropout(0.5)
    self.out = eqx.nn.Linear(4, 2, key=out_key)

  def __call__(self, x, state, key):
    """From [3] to [2], and the new state."""
    x, state = self.norm(jax.nn.relu(self.hidden(x)), state)
    return self.out(self.dropout(x, key=key)), state


def loss_fn(network, state, x, *, key):
  """A loss, and the new state."""
  y, state = jax.vmap(
    network, axis_name='batch', in_axes=(0, None, 0), out_axes=(0, None)
  )(x, state, jax.random.split(key, len(x)))
  return jnp.mean((y - 1) ** 2), state


@pytest.mark.parametrize('on_part', [False, True])
def test_is_two_passes(x64, on_part):
  """The new state is that of the clean one, and both drop the same units.

  With ``ascent_fun``, the state and the value are those of the perturbed one.
  """
  network, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
  x = np.random.default_rng(1).normal(size=(2, 8, 3))
  plain = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))
  ascent_fun, first = None, plain
  if on_part:
    ascent_fun = lambda network, state, x, *, key: loss_fn(
      network, state, x[::4], key=key
    )
    first = eqx.filter_jit(eqx.filter_value_and_grad(ascent_fun, has_aux=True))
  value_and_grad_fn = eqx.filter_jit(
    optax_asam.equinox.filter_value_and_grad(
      loss_fn, has_aux=True, ascent_fun=ascent_fun
    )
  )
  for i, batch in enumerate(x):
    key = jax.random.key(i)
    out, grads = first(network, state, batch, key=key)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    perturbed_network = eqx.combine(reference.perturb(params, grads), static)
    second_out, expected = plain(perturbed_network, state, batch, key=key)
    out = second_out if on_part else out
    result = value_and_grad_fn(network, state, batch, key=key)
    assert error(result, (out, expected)) < 1e-12
    assert error(result[1], grads) > 1e-2
    (_, state), grads = result
    network = eqx.apply_updates(network, jax.tree.map(lambda g: -g, grads))


def test_state_may_be_replaced_in_the_loss():
  """Which invalidates the old one: the second pass needs one of its own."""

  class Counter(eqx.Module):
    scale: jax.Array
    count: eqx.nn.StateIndex

    def __init__(self):
      self.scale = jnp.array(3.0)
      self.count = eqx.nn.StateIndex(jnp.array(1.0))

  def loss_fn(counter, state):
    count = state.get(counter.count)
    return count * counter.scale**2, state.set(counter.count, count + 1)

  for ascent_fun in (None, loss_fn):
    counter, state = eqx.nn.make_with_state(Counter)()
    grads, state = optax_asam.equinox.filter_grad(
      loss_fn,
      has_aux=True,
      adaptive=False,
      ascent_steps=2,
      ascent_fun=ascent_fun,
    )(counter, state)
    np.testing.assert_allclose(grads.scale, 2 * (3 + 0.5), rtol=1e-6)
    assert state.get(counter.count) == 2


def small_loss_fn(model, x):
  """The loss of one dense layer."""
  return jnp.mean(jax.vmap(model)(x) ** 2)


@pytest.fixture
def model():
  """Two arrays, a number and a function."""
  return eqx.nn.Sequential(
    [
      eqx.nn.Linear(3, 2, key=jax.random.key(0)),
      eqx.nn.Dropout(0.5, inference=True),
      eqx.nn.Lambda(jnp.tanh),
    ]
  )


def test_options(model):
  """All of them at once, in a decorator: the same as the plain function.

  That each of them reaches it shows in ``test_errors.py``.
  """
  options = {
    name: value for each in OPTIONS.values() for name, value in each.items()
  }
  options['rho'] = 1.0
  params, static = eqx.partition(model, eqx.is_inexact_array)
  half_loss_fn = lambda model, x: small_loss_fn(model, x[:1])

  def pure(fun):
    return lambda params: fun(eqx.combine(params, static), jnp.eye(3))

  expected = optax_asam.value_and_grad(
    pure(small_loss_fn), ascent_fun=pure(half_loss_fn), **options
  )(params)
  options['ascent_fun'] = half_loss_fn
  result = optax_asam.equinox.filter_value_and_grad(**options)(small_loss_fn)(
    model, jnp.eye(3)
  )
  grads = optax_asam.equinox.filter_grad(**options)(small_loss_fn)(
    model, x=jnp.eye(3)
  )
  assert error(result, expected) < 1e-6
  assert error(grads, expected[1]) < 1e-6


class Loss(eqx.Module):
  """A loss that holds an array."""

  target: jax.Array

  def __call__(self, model, x):
    """The squared distance."""
    return jnp.sum((model(x) - self.target) ** 2)


def test_loss_is_a_module(model):
  """Equinox would warn of a function that holds the module's arrays."""
  wrapped = optax_asam.equinox.filter_grad(Loss(jnp.ones(2)), rho=0.0)
  x = jnp.ones(3)
  expected = eqx.filter_grad(Loss(jnp.ones(2)))(model, x)
  assert error(eqx.filter_jit(wrapped)(model, x), expected) < 1e-6
  wrapped = optax_asam.equinox.filter_grad(
    Loss(jnp.ones(2)), rho=0.0, ascent_fun=Loss(jnp.ones(2))
  )
  assert error(eqx.filter_jit(wrapped)(model, x), expected) < 1e-6


def test_mask_is_a_module(model):
  """Of bools, made as users of Equinox make the spec of a partition."""
  mask = jax.tree.map(lambda _: False, model)
  mask = eqx.tree_at(lambda model: model[0].weight, mask, replace=True)
  grad_fn = functools.partial(
    optax_asam.equinox.filter_grad, small_loss_fn, rho=1.0
  )
  expected = grad_fn(
    mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
  )
  x = jnp.eye(3)
  assert error(grad_fn(mask=mask)(model, x), expected(model, x)) < 1e-6


def test_wrong_first_argument(model):
  """It is differentiated: by position, and with floating-point arrays in it."""
  grad_fn = optax_asam.equinox.filter_grad(small_loss_fn)
  with pytest.raises(TypeError, match=r"by position, but got \['model', 'x'\]"):
    grad_fn(model=model, x=jnp.eye(3))
  with pytest.raises(
    TypeError, match='must hold floating-point arrays, but got Seq'
  ):
    grad_fn(model[1:], jnp.eye(3))
  with pytest.raises(TypeError, match='fun must be a function'):
    optax_asam.equinox.filter_grad(1)


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: (m,), lambda m: [m]])
def test_module_with_other_leaves_is_an_error(model, wrap):
  """In the plain functions, which would perturb the rate of a dropout."""
  message = r'optax_asam\.equinox\.filter_value_and_grad'
  for other in (model, eqx.nn.Dropout(), eqx.filter(model, callable)):
    with pytest.raises(TypeError, match=message):
      _checks.check_not_module(wrap(other))
    with pytest.raises(TypeError, match=r'Pass what eqx\.partition'):
      sharpness.worst_case(lambda module: 0.0, wrap(other), 0.1)
  with pytest.raises(TypeError, match='an array of dtype int32'):
    _checks.check_not_module(wrap(jax.tree.map(jnp.int32, model[0])))
