"""Promise: LookSAM follows the equations of its paper, with ASAM's ball."""

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import looksam
from optax_asam import normalization
from tests.helpers import reference
from tests.helpers.reference import polynomial
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import run

pytestmark = pytest.mark.usefixtures('quickly_compiled')

GRAD_FN = jax.grad(polynomial)
SGD = optax.sgd(0.1)
RHO, ALPHA, EVERY_K = 0.3, 0.4, 3


def run_by_hand(params, steps, base, rho, p, operator, normalized, perturbed):
  """LookSAM in NumPy; of vectors, where all leaves count alike."""
  vector = lambda tree: np.concatenate([tree['bias'], tree['kernel'].ravel()])
  tree = lambda x: {'bias': x[:2], 'kernel': x[2:].reshape(3, 2)}
  grad = lambda w: vector(reference.polynomial_grad(tree(w)))
  w, state = vector(params), None
  for step in range(steps):
    g = grad(w)
    if step % EVERY_K == 0:
      eps = reference.perturbation(
        tree(w), tree(g), operator, rho(step), p, normalized, perturbed
      )
      descended = grad(w + vector(eps))
      g_v = descended - (g @ descended) / (g @ g) * g
    else:
      norms = np.linalg.norm(g) / np.linalg.norm(g_v)
      descended = g + ALPHA * norms * g_v
    update, state = base(descended, state, step)
    w = w + update
  return tree(w)


ELEMENTWISE = reference.elementwise(0.01)
MOMENTUM = optax.sgd(0.01, momentum=0.9), reference.sgd
# Each differs from the first in these arguments of `looksam` and by hand.
CASES = {
  'asam': ({}, {}),
  'sam': ({'adaptive': False}, {'normalized': ()}),
  'layerwise': (
    {'adaptive': normalization.layerwise(0.01)},
    {'operator': reference.layerwise(0.01)},
  ),
  'p = inf': ({'ord': np.inf, 'rho': 0.05}, {'p': np.inf}),
  'p = 3': ({'ord': 3}, {'p': 3}),
  'mask': (
    {'mask': {'kernel': False, 'bias': True}},
    {'perturbed': ('bias',)},
  ),
  # It counts the updates in between, too.
  'schedule': ({'rho': lambda step: 0.1 + 0.004 * step}, {}),
  'adam': ({}, {}),
}


@pytest.mark.parametrize('name', CASES)
def test_reference(x64, params, name):
  """One hundred steps by hand, in NumPy."""
  options, by_hand = CASES[name]
  base_tx, base = MOMENTUM
  if name == 'adam':
    base_tx, base = optax.adam(0.01), reference.adam
  options = {'rho': RHO, 'every_k': EVERY_K, 'alpha': ALPHA} | options
  (got, _), _ = run(looksam(base_tx, **options), params, 100)
  rho = options['rho']
  expected = run_by_hand(
    jax.tree.map(np.asarray, params),
    100,
    base,
    rho if callable(rho) else lambda step: rho,
    **{
      'p': 2,
      'operator': ELEMENTWISE,
      'normalized': ('kernel',),
      'perturbed': ('kernel', 'bias'),
    }
    | by_hand,
  )
  assert error(got, expected) < (1e-8 if name == 'adam' else 1e-10)


def test_state(params):
  """The count, L(w + eps) and the direction: orthogonal to g, of norm 1."""
  tx = looksam(SGD, RHO, every_k=2)
  init = tx.init(params)
  assert_same_bits(init[0].direction, jax.tree.map(jnp.zeros_like, params))
  _, states = run(tx, params, 4, 'value_fn')
  assert states[0].step.tolist() == [1, 2, 3, 4]
  value = states[0].perturbed_value
  assert value[0] == value[1] > value[2] == value[3]
  direction = jax.tree.map(lambda x: x[0], states[0].direction)
  direction, g = ravel_pytree(direction)[0], ravel_pytree(GRAD_FN(params))[0]
  np.testing.assert_allclose(jnp.linalg.norm(direction), 1, rtol=1e-6)
  assert abs(direction @ g) < 1e-6 * jnp.linalg.norm(g)
  # A checkpoint fits, whatever the arguments are.
  other = looksam(SGD, optax.constant_schedule(0.1), every_k=1).init(params)
  assert jax.tree.structure(other) == jax.tree.structure(init)


PASS_ON = looksam(optax.identity(), RHO, every_k=2, alpha=ALPHA)


@jax.jit
def two_updates(params, grads, perturbed_grads, later):
  """The direction that an update leaves, and the gradient of the next one."""
  _, state = PASS_ON.update(
    grads, PASS_ON.init(params), params, grad_fn=lambda _: perturbed_grads
  )
  descended, _ = PASS_ON.update(
    later, state, params, grad_fn=lambda _: perturbed_grads
  )
  return state[0].direction, descended


def tree_of(*values, dtype='float32'):
  """A tree with these elements."""
  values = np.asarray(values, dtype)
  return {'kernel': jnp.asarray(values[:2]), 'bias': jnp.asarray(values[2:])}


G = 1.0, -2.0, 3.0
NO_DIRECTION = {
  'nan at w': ((np.nan, -2.0, 3.0), G),
  'nan at w + eps': (G, (1.0, np.nan, 3.0)),
  'inf at w + eps': (G, (1.0, -2.0, np.inf)),
  'huge': ((1e30, -2e30, 3e30), (1e30, 2e30, 3e30)),
  'zero': ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
  'zero at w': ((0.0, 0.0, 0.0), G),
  'the same': (G, G),
  'an ulp': (G, (1.0 + 2**-23, -2.0, 3.0)),
  'parallel but for rounding': ((0.1, -0.2, 0.3), (0.7, -1.4, 2.1)),
}


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    *[(name, 'float32') for name in NO_DIRECTION],
    ('an ulp in 16 bits', 'bfloat16'),
  ],
)
def test_no_direction(name, dtype):
  """The next update is the base's to the last bit: -0.0 + 0.0 would be 0.0."""
  values = NO_DIRECTION.get(name, (G, (1.0 + 2**-7, -2.0, 3.0)))
  values = (1, 2, 3), *values, (-0.0, 1.0, 0.5)
  *trees, later = (tree_of(*v, dtype=dtype) for v in values)
  direction, descended = two_updates(*trees, later)
  assert not any(d.any() for d in jax.tree.leaves(direction))
  assert_same_bits(descended, later)


@pytest.mark.parametrize(
  ('dtype', 'smallest'), [('float32', 1e-4), ('bfloat16', 0.05)]
)
def test_small_direction(dtype, smallest):
  """What is larger than rounding errors is a direction, in 16 bits, too."""
  w, g = tree_of(1, 2, 3, dtype=dtype), tree_of(1, 0, 1, dtype=dtype)
  perturbed = tree_of(1, smallest, 1, dtype=dtype)
  direction, descended = two_updates(w, g, perturbed, g)
  assert error(direction, tree_of(0, 1, 0)) < 2e-3
  expected = tree_of(1, ALPHA * np.sqrt(2), 1, dtype=dtype)
  assert error(descended, expected) < 2e-3


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e30, 0.0])
def test_bad_gradient_in_between(value):
  """It reaches the base as it is, and spoils neither other leaves nor state."""
  later = tree_of(value, 1.0, 0.5) if value else tree_of(0, 0, 0)
  direction, descended = two_updates(
    tree_of(1, 2, 3), tree_of(*G), tree_of(3.0, 1.0, 1.0), later
  )
  assert_same_bits(descended, later)
  norm = jnp.linalg.norm(ravel_pytree(direction)[0])
  np.testing.assert_allclose(norm, 1, rtol=1e-6)


def test_norms_in_float32():
  """In float16, 64 squares of 200 are infinite."""
  g, h = np.full(64, 200.0), np.full(64, 200.0)
  h[:32] = -100
  tree = lambda x: {'w': jnp.asarray(x, jnp.float16)}
  direction, descended = two_updates(tree(g), tree(g), tree(h), tree(g))
  g_v = h - (g @ h) / (g @ g) * g
  g_v /= np.linalg.norm(g_v)
  assert error(direction, {'w': np.float32(g_v)}) < 1e-6
  expected = g + ALPHA * np.linalg.norm(g) * g_v
  assert error(descended, {'w': np.float16(expected)}) < 1e-3
