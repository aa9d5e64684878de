"""Promise: the perturbation is the one of the formula, in every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from optax_asam import ascent
from optax_asam import normalization
import reference
from support import assert_same_bits
from support import error

ORDS = [2, jnp.inf, 3, 1.5]
NORMALIZATIONS = {
  'identity': (lambda mask: normalization.identity(), reference.ones),
  'elementwise': (
    lambda mask: normalization.elementwise(0.01, mask=mask),
    reference.elementwise(0.01),
  ),
  'filterwise': (
    lambda mask: normalization.filterwise(0.01, mask=mask),
    reference.filterwise(0.01),
  ),
  'filterwise, axis 0': (
    lambda mask: normalization.filterwise(0.01, axis=0, mask=mask),
    reference.filterwise(0.01, axis=0),
  ),
  'layerwise': (
    lambda mask: normalization.layerwise(0.01, mask=mask),
    reference.layerwise(0.01),
  ),
}
SHAPES = {
  'conv/kernel': (3, 3, 2, 4),
  'conv/bias': (4,),
  'dense/kernel': (8, 5),
  'dense/bias': (5,),
  'temperature': (),
}
KERNELS = {'conv/kernel', 'dense/kernel', 'temperature'}
# Each kind of mask, and the leaves that it selects.
MASKS = {
  'none': (None, set(SHAPES)),
  'tree': (
    {
      'conv': {'kernel': True, 'bias': False},
      'dense': {'kernel': False, 'bias': True},
      'temperature': True,
    },
    {'conv/kernel', 'dense/bias', 'temperature'},
  ),
  'prefix': (
    {'conv': True, 'dense': False, 'temperature': np.False_},
    {'conv/kernel', 'conv/bias'},
  ),
  'function': (
    lambda params: jax.tree.map(lambda w: w.ndim > 1, params),
    {'conv/kernel', 'dense/kernel'},
  ),
  'not_bias': (normalization.not_bias, KERNELS),
}


def nested(flat):
  """{'a/b': x} as {'a': {'b': x}}."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = jnp.asarray(leaf)
  return tree


@pytest.fixture
def tree():
  """Random parameters and gradients of a small network, by name."""
  rng = np.random.default_rng(0)
  draw = lambda scale: {
    name: np.asarray(scale * rng.standard_normal(shape))
    for name, shape in SHAPES.items()
  }
  return draw(0.3), draw(2.0)


def perturb(tx, params, grads):
  """The perturbation, jitted."""
  eps, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  return eps


@pytest.mark.parametrize('name', NORMALIZATIONS)
@pytest.mark.parametrize('p', ORDS)
def test_reference(x64, tree, p, name):
  """Every ord, normalization and kind of mask against NumPy, to 1e-12."""
  params, grads = tree
  library, operator = NORMALIZATIONS[name]
  pairs = [(mask, 'none') for mask in MASKS] + [('not_bias', m) for m in MASKS]
  for normalized, perturbed in pairs:
    tx = ascent.steepest_ascent(
      library(MASKS[normalized][0]), ord=p, mask=MASKS[perturbed][0]
    )
    # Not jitted: to compile each of these would take a minute.
    eps, _ = tx.update(nested(grads), tx.init(nested(params)), nested(params))
    expected = reference.perturbation(
      params, grads, operator, 1.0, p, MASKS[normalized][1], MASKS[perturbed][1]
    )
    assert error(eps, nested(expected)) < 1e-12, (normalized, perturbed)


@pytest.mark.parametrize('p', ORDS)
def test_maximum(x64, p):
  """SciPy, given nothing but <g, eps> and the ball, finds the same maximum."""
  rng = np.random.default_rng(1)
  w, g = rng.standard_normal((2, 4))
  tx = ascent.steepest_ascent(normalization.elementwise(0.1), ord=p)
  eps = np.asarray(perturb(tx, jnp.asarray(w), jnp.asarray(g)))
  t = np.abs(w) + 0.1

  def slack(x):  # As <= 1 for every coordinate where p is infinite.
    return 1 - np.abs(x / t) if p == np.inf else 1 - (np.abs(x / t) ** p).sum()

  found = optimize.minimize(
    lambda x: -g @ x,
    0.1 * t * np.sign(g),
    constraints={'type': 'ineq', 'fun': slack},
    method='SLSQP',
    options={'ftol': 1e-12, 'maxiter': 500},
  )
  np.testing.assert_allclose(g @ eps, -found.fun, rtol=1e-6)
  np.testing.assert_allclose(eps, found.x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('p', ORDS)
@pytest.mark.parametrize('bad', [0.0, np.nan, np.inf, -np.inf])
def test_no_perturbation_without_a_norm(p, bad):
  """A gradient that is zero, or NaN or infinite anywhere, gives eps = 0."""
  params = {'a': jnp.ones(3), 'b': jnp.ones((2, 2))}
  grads = jax.tree.map(lambda w: w if bad else 0 * w, params)
  grads['a'] = grads['a'].at[1].set(bad)
  tx = ascent.steepest_ascent(normalization.elementwise(), ord=p)
  assert_same_bits(
    perturb(tx, params, grads), jax.tree.map(jnp.zeros_like, params)
  )


@pytest.mark.parametrize('p', ORDS)
def test_infinite_parameter(p):
  """T = inf gives eps = 0 everywhere, not 0 * inf."""
  params = {'a': jnp.array([1.0, jnp.inf]), 'b': jnp.ones(2)}
  grads = {'a': jnp.array([1.0, 0.0]), 'b': jnp.ones(2)}
  tx = ascent.steepest_ascent(normalization.elementwise(), ord=p)
  assert_same_bits(
    perturb(tx, params, grads), jax.tree.map(jnp.zeros_like, params)
  )


@pytest.mark.parametrize('p', ORDS)
@pytest.mark.parametrize('scale', [1e-15, 1e-8, 1.0, 1e8, 1e15])
def test_scale_of_the_gradient_cancels(p, scale):
  """In float32, from 1e-15 to 1e15."""
  params = {'a': jnp.array([0.5, -2.0, 1.0]), 'b': jnp.array(3.0)}
  grads = {'a': jnp.array([1.0, 0.2, -3.0]), 'b': jnp.array(0.7)}
  scaled = jax.tree.map(lambda g: scale * g, grads)
  tx = ascent.steepest_ascent(normalization.elementwise(), ord=p)
  eps = perturb(tx, params, grads)
  assert error(perturb(tx, params, scaled), eps) < 1e-5


@pytest.mark.parametrize('p', ORDS)
def test_never_out_of_the_ball(p):
  """Where squares of a float32 gradient are flushed to zero, and above."""
  params = jnp.ones(1001)
  tx = ascent.steepest_ascent(normalization.identity(), ord=p)
  scales = np.float32(10.0 ** np.arange(-45, 39))

  def perturbation(scale):
    grads = jnp.full(1001, scale / 2).at[0].set(scale)
    return tx.update(grads, tx.init(params), params)[0]

  eps = np.float64(jax.jit(jax.vmap(perturbation))(scales))
  norms = np.linalg.norm(eps, p, axis=1)
  assert (norms <= 1 + 1e-5).all()
  inner = (scales >= 1e-15) & (scales <= 1e15)
  assert (norms[inner] >= 1 - 1e-5).all()


@pytest.mark.parametrize('p', ORDS)
def test_empty_leaves(p):
  """Arrays of size zero, and a tree without leaves."""
  tx = ascent.steepest_ascent(normalization.filterwise(), ord=p)
  params = {'a': jnp.ones((2, 0, 3)), 'w': jnp.array([3.0]), 'c': None}
  eps = perturb(tx, params, params)
  assert eps['a'].shape == (2, 0, 3)
  np.testing.assert_allclose(eps['w'], [3.01], rtol=1e-6)
  assert perturb(tx, {}, {}) == {}


@pytest.mark.parametrize('p', ORDS)
@pytest.mark.parametrize('scale', [1e-15, 1e-18, 1e18])
def test_sparse_gradient(p, scale):
  """One element of a million makes the whole norm."""
  params = jnp.ones(10**6)
  tx = ascent.steepest_ascent(normalization.identity(), ord=p)
  eps = perturb(tx, params, (0 * params).at[7].set(scale))
  np.testing.assert_allclose(eps[7], 1, rtol=1e-5)
  assert jnp.count_nonzero(eps) == 1


@pytest.mark.parametrize('p', ORDS)
def test_smallest_normal_number(p):
  """What is smaller counts as zero, and this is not."""
  tiny = jnp.finfo(jnp.float32).tiny
  tx = ascent.steepest_ascent(normalization.identity(), ord=p)
  eps = perturb(tx, jnp.ones(2), jnp.array([tiny, 0]))
  # For p = 2 the square is far below; no perturbation is too long, still.
  expected = 0 if p == 2 else 1
  np.testing.assert_allclose(eps, [expected, 0], atol=1e-6)
  assert not perturb(tx, jnp.ones(2), jnp.array([tiny / 2, 0])).any()
  root = 2.0**-63  # of tiny, and the smallest for p = 2
  eps = perturb(tx, jnp.ones(2), jnp.array([root, 0]))
  np.testing.assert_allclose(eps, [1, 0], atol=1e-6)


def test_dtypes(x64):
  """The perturbation has the dtypes of params, in a mixed tree as well."""
  dtypes = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
  params = [jnp.asarray([1.0, -2.0], dtype) for dtype in dtypes]
  grads = [jnp.asarray([0.5, 1.0], jnp.float32) for _ in dtypes]
  exact = [np.asarray(w, np.float64) for w in params]
  names = [str(i) for i in range(4)]
  for p in ORDS:
    tx = ascent.rho_ball(0.5, 0.01, True, ord=p)
    eps = perturb(tx, params, grads)
    expected = reference.perturbation(
      dict(zip(names, exact, strict=True)),
      {name: np.array([0.5, 1.0]) for name in names},
      reference.elementwise(0.01),
      0.5,
      p,
      names,
      names,
    )
    for e, dtype, name in zip(eps, dtypes, names, strict=True):
      assert e.dtype == dtype
      # T is float32 at all leaves but the last, which the norm shows.
      ulp = 2 * float(jnp.finfo(dtype).eps)
      np.testing.assert_allclose(
        np.float64(e), expected[name], rtol=max(ulp, 1e-7)
      )


@pytest.mark.parametrize('p', ORDS)
@pytest.mark.parametrize('zero', ['everywhere', 'in one element'])
def test_derivatives_are_finite(p, zero):
  """Through the ascent, also where the gradient or the weights are zero."""
  w = jnp.array([[[1.0, 0.0], [2.0, 0.0]]])
  g = jnp.array([[[1.0, 2.0], [0.0, 3.0]]])
  if zero == 'everywhere':
    g = 0 * g
  for t in (
    normalization.elementwise(0.0),
    normalization.filterwise(0.0),
    normalization.layerwise(0.0),
  ):
    tx = ascent.steepest_ascent(t, ord=p)
    total = lambda w, g, tx=tx: tx.update(g, tx.init(w), w)[0].sum()
    for derivative in jax.jit(jax.grad(total, (0, 1)))(w, g):
      assert jnp.isfinite(derivative).all()


def test_rho():
  """A number, an array and a schedule scale alike, with one state structure."""
  params, grads = jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])
  schedule = optax.linear_schedule(0.2, 0.4, 2)
  states = []
  for rho, expected in [
    (0.2, [0.2, 0.2, 0.2]),
    (jnp.float32(0.2), [0.2, 0.2, 0.2]),
    (schedule, [0.2, 0.3, 0.4]),
  ]:
    tx = ascent.rho_ball(rho, 0.0, True)
    state = tx.init(params)
    for radius in expected:
      eps, state = tx.update(grads, state, params)
      np.testing.assert_allclose(eps, radius * np.array([1.8, 3.2]), rtol=1e-6)
    states.append(jax.tree.structure(state))
  assert states[0] == states[1] == states[2]


def test_identity_costs_nothing():
  """T = 1 is a Python number that is never multiplied."""
  params = [jnp.ones(3)] * 10

  def multiplications(t):
    tx = ascent.steepest_ascent(t)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    return sum(eqn.primitive.name == 'mul' for eqn in jaxpr.jaxpr.eqns)

  squares = multiplications(normalization.identity())
  assert multiplications(normalization.elementwise()) == squares + 20
