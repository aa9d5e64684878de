"""Promise: GSAM, WSAM and F-SAM follow the equations of their papers."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import ascent
from optax_asam import descent
from tests.helpers.support import assert_same_bits

SHAPES = {'kernel': (3, 2), 'bias': (2,)}


def gsam_by_hand(g, h, alpha):
  """Equation of GSAM, of vectors."""
  return h - alpha * (g - (g @ h) / (h @ h) * h)


def as_vector(tree):
  """A tree of ``SHAPES`` as a vector."""
  return np.concatenate([np.ravel(tree[name]) for name in SHAPES])


def random_tree(seed):
  """A tree of ``SHAPES``."""
  rng = np.random.default_rng(seed)
  return {k: jnp.asarray(rng.standard_normal(s)) for k, s in SHAPES.items()}


def test_reference(x64):
  """Each of two random trees, or three, in NumPy.

  That ``descent`` gets (g, g~) is a law in ``test_laws.py``.
  """
  trees = [random_tree(seed) for seed in range(3)]
  g, h, _ = vectors = [as_vector(tree) for tree in trees]
  got = descent.gsam(0.3)(*trees[:2])
  np.testing.assert_allclose(as_vector(got), gsam_by_hand(g, h, 0.3), 1e-12)
  got = descent.wsam(0.9)(*trees[:2])
  np.testing.assert_allclose(as_vector(got), -8 * g + 9 * h, 1e-12)
  tx, average = ascent.friendly(0.7, 0.8), 0 * g
  state = tx.init(trees[0])
  for tree, g in zip(trees, vectors, strict=True):
    got, state = tx.update(tree, state)
    np.testing.assert_allclose(as_vector(got), g - 0.7 * average, 1e-12)
    average = 0.8 * average + 0.2 * g


def test_identities():
  """The laws by which an argument is chosen."""
  g, h = {'a': jnp.array([1.0, 2.0])}, {'a': jnp.array([3.0, -1.0])}
  assert_same_bits(descent.gsam(0.0)(g, h), h)
  assert_same_bits(descent.wsam(0.0)(g, h), g)
  assert_same_bits(descent.wsam(0.5)(g, h), h)


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
