"""Promise: GSAM, WSAM and F-SAM follow the equations of their papers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import sharpness_aware
from tests.helpers import reference
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

CURVATURE = np.array([0.5, 1.5, 2.0, 0.1])
SHAPE = {'kernel': slice(0, 3), 'bias': slice(3, 4)}


def loss_fn(params):
  """A quartic whose coordinates are coupled."""
  w = jnp.concatenate([params['kernel'], params['bias']])
  return (CURVATURE * w**2).sum() / 2 + (w**4).sum() / 4 + w.sum() ** 2 / 10


def reference_grad(w):
  """Its gradient."""
  return CURVATURE * w + w**3 + w.sum() / 5


def reference_run(base, w, steps, descend, sigma=0.0):
  """A base with ``descend(g, h)``, and F-SAM with ``sigma`` > 0."""
  state, average = None, np.zeros(4)
  for step in range(steps):
    g = reference_grad(w)
    t = np.append(np.abs(w[:3]) + 0.01, 1.0)
    d = g - sigma * average
    average = 0.9 * average + 0.1 * g
    h = reference_grad(w + 0.1 * t * t * d / np.sqrt(((t * d) ** 2).sum()))
    update, state = base(descend(g, h), state, step)
    w = w + update
  return w


def gsam_by_hand(g, h, alpha=0.3):
  """Equation of GSAM."""
  return h - alpha * (g - (g @ h) / (h @ h) * h)


BASES = {
  'sgd': (optax.sgd(0.01, momentum=0.9), reference.sgd, 1e-10),
  'adam': (optax.adam(0.01), reference.adam, 1e-8),
}
F_SAM = optax.chain(ascent.friendly(0.7), ascent.rho_ball(0.1, 0.01, True))
CASES = {
  'gsam': (
    lambda base: asam(base, 0.1, descent=descent.gsam(0.3)),
    gsam_by_hand,
    0.0,
  ),
  'wsam': (
    lambda base: asam(base, 0.1, descent=descent.wsam(0.9)),
    lambda g, h: -8 * g + 9 * h,
    0.0,
  ),
  'friendly': (
    lambda base: optax.chain(sharpness_aware(F_SAM), base),
    lambda g, h: h,
    0.7,
  ),
}


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('name', CASES)
def test_reference(x64, name, base):
  """One hundred steps by hand, in NumPy."""
  wrap, descend, sigma = CASES[name]
  base_tx, by_hand, tolerance = BASES[base]
  tx = wrap(base_tx)
  w = np.array([0.5, -1.0, 2.0, 0.3])
  params = {key: jnp.asarray(w[part]) for key, part in SHAPE.items()}

  def step(carry, _):
    params, state = carry
    grads = jax.grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, value_fn=loss_fn)
    return (optax.apply_updates(params, updates), state), None

  carry = params, tx.init(params)
  (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=100))(carry)
  got = np.concatenate([params['kernel'], params['bias']])
  np.testing.assert_allclose(
    got,
    reference_run(by_hand, w, 100, descend, sigma),
    rtol=tolerance,
    atol=tolerance / 100,
  )


def test_identities():
  """The laws by which an argument is chosen."""
  g, h = {'a': jnp.array([1.0, 2.0])}, {'a': jnp.array([3.0, -1.0])}
  assert_same_bits(descent.gsam(0.0)(g, h), h)
  assert_same_bits(descent.wsam(0.0)(g, h), g)
  assert_same_bits(descent.wsam(0.5)(g, h), h)
  assert_same_bits(descent.wsam(0.9)(g, g), g)


def test_wsam_near_one(x64):
  """In float32, 1 - gamma is not rounded, and large weights do not cancel."""
  random = np.random.default_rng(0)
  g = random.standard_normal(100)
  h = g + 1e-3 * random.standard_normal(100)
  g, h = np.float32(g), np.float32(h)
  for gamma in (0.9, 0.9999, 1 - 1e-8):
    weight = gamma / (1 - gamma)
    expected = (1 - weight) * np.float64(g) + weight * np.float64(h)
    got = descent.wsam(gamma)(jnp.asarray(g), jnp.asarray(h))
    assert error(np.float64(got), expected) < 1e-6


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf])
def test_unusable_gradient(value):
  """Without a direction of g~, GSAM does not ascend g, and hides nothing."""
  h = jnp.full(2, value)
  assert_same_bits(descent.gsam(0.4)(jnp.ones(2), h), h)


def test_inner_products_in_float32():
  """In float16, 64 squares of 200 are infinite."""
  g, h = np.ones(64), np.full(64, 200.0)
  g[0] = 0
  got = descent.gsam(0.5)(jnp.float16(g), jnp.float16(h))
  assert got.dtype == jnp.float16
  np.testing.assert_allclose(got, gsam_by_hand(g, h, 0.5), rtol=1e-3)
  assert got[0] > h[0]


def test_state_keeps_its_dtype(x64):
  """A float64 gradient of float32 parameters does not change the state's."""
  params = jnp.zeros(2, jnp.float32)
  for tx in (
    ascent.friendly(),
    optax_asam.momentum_asam(optax.sgd(0.1), momentum=0.9),
  ):
    state = tx.init(params)
    _, new_state = tx.update(jnp.ones(2, jnp.float64), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)


def test_friendly_skips_non_finite_gradients():
  """One of them would stay in the average for ever."""
  tx = ascent.friendly(1.0, 0.5)
  state = tx.init(jnp.zeros(2))
  _, state = tx.update(jnp.array([1.0, 0.0]), state)
  direction, skipped = tx.update(jnp.array([jnp.nan, 0.0]), state)
  assert_same_bits(skipped, state)
  assert np.isnan(direction[0])
