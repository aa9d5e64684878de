"""Promise: where ASAM is something else, it is that bit for bit."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import alias
from optax_asam import asam
from optax_asam import ascent
from optax_asam import looksam
from optax_asam import normalization
from optax_asam import sam
from tests.helpers import network
from tests.helpers.support import assert_same_bits

PARAMS = network.make_params(np.float32)
BASES = {
  'sgd': lambda: optax.sgd(0.1, momentum=0.9),
  'adamw': lambda: optax.adamw(1e-2),
}


def train(
  tx, steps=50, estimator=None, extra_args=lambda grad_fn: {'grad_fn': grad_fn}
):
  """Steps on the small network, each with a batch of its own."""
  value_and_grad = estimator or jax.value_and_grad(network.loss_fn)
  x, y = network.make_batch(np.float32)

  def step(carry, i):
    params, state = carry
    batch = jnp.roll(x, i, axis=1), y
    _, grads = value_and_grad(params, batch)
    extra = {}
    if estimator is None:
      extra = extra_args(
        lambda params: jax.grad(network.loss_fn)(params, batch)
      )
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  step, carry = jax.jit(step), (PARAMS, tx.init(PARAMS))
  for i in range(steps):
    carry = step(carry, i)
  return carry[0]


def contrib_sam(base, ascent_tx):
  """optax.contrib.sam in opaque mode, and what its ``update`` is given."""
  tx = optax.contrib.sam(base, ascent_tx, opaque_mode=True)
  extra_args = lambda grad_fn: {'grad_fn': lambda params, _: grad_fn(params)}
  return {'tx': tx, 'extra_args': extra_args}


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('adaptive', [True, False])
def test_contrib_sam(base, adaptive):
  """optax.contrib.sam with our ascent, over 50 steps."""
  t = normalization.elementwise() if adaptive else normalization.identity()
  unit = ascent.steepest_ascent(t)
  theirs = train(
    **contrib_sam(BASES[base](), optax.chain(unit, optax.sgd(0.3)))
  )
  ours = train(asam(BASES[base](), 0.3, adaptive=adaptive))
  assert_same_bits(ours, theirs)


def test_contrib_sam_at_zero_gradient():
  """Where optax.contrib.sam's step is NaN, ours is the base's."""
  params, grad_fn = jnp.zeros(3), lambda params, *_: params
  contrib = optax.contrib.sam(
    optax.sgd(0.1),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
    opaque_mode=True,
  )
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    updates, _ = contrib.update(
      params, contrib.init(params), params, grad_fn=grad_fn
    )
  assert jnp.isnan(updates).all()
  tx = sam(optax.sgd(0.1), 0.1)
  updates, _ = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
  assert (updates == 0).all()


@pytest.mark.parametrize('base', BASES)
def test_rho_zero_is_the_base(base):
  """Rho = 0, by the transformation and by value_and_grad, over 50 steps."""
  make = BASES[base]
  estimator = optax_asam.value_and_grad(network.loss_fn, rho=0.0)
  plain = train(make(), estimator=jax.value_and_grad(network.loss_fn))
  for result in (
    train(asam(make(), 0.0)),
    train(sam(make(), 0.0)),
    train(looksam(make(), 0.0)),
    train(make(), estimator=estimator),
  ):
    assert_same_bits(result, plain)


def test_one_ulp_shows():
  """Both ways to ASAM agree to the bit, and not with a larger rho."""
  make = BASES['sgd']
  estimator = optax_asam.value_and_grad(network.loss_fn, rho=0.5)
  ours = train(asam(make()))
  assert_same_bits(ours, train(make(), estimator=estimator))
  with pytest.raises(AssertionError):
    assert_same_bits(ours, train(asam(make(), 0.5 * (1 + 2e-7))))


def test_sam_is_asam_without_normalization(monkeypatch):
  """sam(...) is asam(adaptive=False, ...), every argument passed on."""
  bind = inspect.signature(asam).bind
  monkeypatch.setattr(alias, 'asam', bind)
  given = {name: object() for name in inspect.signature(sam).parameters}
  given['base_tx'] = optax.sgd(0.1)
  assert sam(**given).arguments == {**given, 'adaptive': False}
