"""Promise: the perturbation is the one of the formula, in every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from optax_asam import ascent
from optax_asam import normalization
from tests.helpers import cases
from tests.helpers import reference
from tests.helpers.cases import ORDS
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

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


def perturb(tx, params, grads):
  """The perturbation, jitted."""
  eps, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  return eps


@pytest.mark.parametrize(
  ('p', 'name'),
  [
    *[(2, name) for name in cases.NORMALIZATIONS],
    *[(p, name) for p in ORDS[1:] for name in cases.OPERATORS],
  ],
)
def test_reference(x64, p, name):
  """Every ord, normalization and kind of mask against NumPy, to 1e-12.

  Masks do not depend on the others: most cases have none.
  """
  rng = np.random.default_rng(0)
  params, grads = (
    {k: np.asarray(scale * rng.standard_normal(s)) for k, s in SHAPES.items()}
    for scale in (0.3, 2.0)
  )
  pairs = [('none', 'none')]
  if (p, name) == (2, 'elementwise'):
    pairs = [(m, 'none') for m in MASKS] + [('not_bias', m) for m in MASKS]
  for normalized, perturbed in pairs:
    t, operator = cases.make_normalization(name, 0.01, MASKS[normalized][0])
    tx = ascent.steepest_ascent(t, ord=p, mask=MASKS[perturbed][0])
    # Eager: compiling each of these would take a minute.
    eps, _ = tx.update(nested(grads), tx.init(nested(params)), nested(params))
    expected = reference.perturbation(
      params, grads, operator, 1.0, p, MASKS[normalized][1], MASKS[perturbed][1]
    )
    assert error(eps, nested(expected)) < 1e-12, (normalized, perturbed)


@pytest.mark.parametrize('p', [2, 3, 1.5])
def test_maximum(x64, p):
  """SciPy finds the same maximum of <g, eps> over ||eps / T||_p <= rho."""
  w, g = np.random.default_rng(1).standard_normal((2, 4))
  t = np.abs(w) + 0.1
  found = optimize.minimize(
    lambda eps: -g @ eps,
    0.05 * t * np.sign(g),
    constraints={
      'type': 'ineq',
      'fun': lambda eps: 0.5 - np.linalg.norm(eps / t, p),
    },
    method='SLSQP',
    options={'ftol': 1e-12, 'maxiter': 500},
  )
  tx = ascent.rho_ball(0.5, 0.1, True, ord=p)
  eps = perturb(tx, jnp.asarray(w), jnp.asarray(g))
  np.testing.assert_allclose(g @ eps, -found.fun, rtol=1e-6)
  np.testing.assert_allclose(eps, found.x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('p', ORDS)
def test_never_out_of_the_ball(p):
  """For gradients from 1e-45 to 1e38 in float32; on the sphere from 1e-15."""
  params = jnp.ones(1001)
  tx = ascent.steepest_ascent(normalization.identity(), ord=p)
  scales = np.float32(10.0 ** np.arange(-45, 38.4, 0.2))

  def perturbation(scale):
    grads = jnp.full(1001, scale / 2).at[0].set(scale)
    return tx.update(grads, tx.init(params), params)[0]

  eps = np.float64(jax.jit(jax.vmap(perturbation))(scales))
  norms = np.linalg.norm(eps, p, axis=1)
  assert (norms <= 1 + 1e-5).all()
  inner = (scales >= 1e-15) & (scales <= 1e15)
  assert (norms[inner] >= 1 - 1e-5).all()


@pytest.mark.parametrize('p', ORDS)
def test_smallest_normal_number(p):
  """Smaller numbers count as zero; for p = 2, those up to its root."""
  tiny = jnp.finfo(jnp.float32).tiny
  tx = ascent.steepest_ascent(normalization.identity(), ord=p)
  update = jax.jit(tx.update)
  root = 2.0**-63  # of tiny
  pairs = (2.5 * tiny, p != 2), (tiny / 2, 0), (1.01 * root, 1), (1e18, 1)
  for g, expected in pairs:
    eps, _ = update(jnp.array([g, 0]), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(eps, [expected, 0], atol=1e-6)


@pytest.mark.parametrize('p', ORDS)
def test_dtypes(x64, p):
  """The perturbation has the dtypes of params, in a mixed tree as well."""
  dtypes = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
  params = [jnp.asarray([1.0, -2.0], dtype) for dtype in dtypes]
  grads = [jnp.asarray([0.5, 1.0], jnp.float32) for _ in dtypes]
  names = [str(i) for i in range(4)]
  eps = perturb(ascent.rho_ball(0.5, 0.01, True, ord=p), params, grads)
  expected = reference.perturbation(
    {k: np.float64(w) for k, w in zip(names, params, strict=True)},
    {k: np.float64(g) for k, g in zip(names, grads, strict=True)},
    reference.elementwise(0.01),
    0.5,
    p,
    names,
    names,
  )
  for e, dtype, name in zip(eps, dtypes, names, strict=True):
    assert e.dtype == dtype
    # T is float32 in all leaves but the last, which the norm shows.
    ulp = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
      np.float64(e), expected[name], rtol=max(ulp, 1e-7)
    )


def test_defaults_of_rho_ball():
  """Those of asam; NumPy bools, and True as the mask of an array, are fine."""
  params, grads = jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])
  eps = [
    tx.update(grads, tx.init(params), params)[0]
    for tx in (
      ascent.rho_ball(0.5),
      ascent.rho_ball(0.5, 0.01, np.True_, mask=True),
    )
  ]
  assert_same_bits(*eps)


def test_identity_costs_nothing():
  """T = 1 is a Python number that is never multiplied."""
  params = [jnp.ones(3)] * 10

  def multiplications(t):
    tx = ascent.steepest_ascent(t)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    return sum(eqn.primitive.name == 'mul' for eqn in jaxpr.jaxpr.eqns)

  by_t = multiplications(normalization.elementwise())
  assert by_t >= multiplications(normalization.identity()) + len(params)
