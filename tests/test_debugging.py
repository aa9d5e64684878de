"""Promise: a healthy step runs under JAX's debugging switches."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness
from optax_asam import sharpness_aware
from tests.helpers.cases import ASCENTS

pytestmark = pytest.mark.usefixtures('quickly_compiled')

SWITCHES = {
  'jax_debug_nans': True,
  'jax_debug_infs': True,
  'jax_numpy_dtype_promotion': 'strict',
  'jax_numpy_rank_promotion': 'raise',
  'jax_check_tracer_leaks': True,
  'jax_enable_checks': True,
}
DTYPES = ('float32', 'bfloat16', 'float16', 'float8_e4m3fn')
SGD = optax.identity()  # Optax's own arithmetic promotes float8.
TRANSFORMATIONS = {
  'asam': asam(SGD),
  'sam': sam(SGD),
  'inf': asam(SGD, ord=jnp.inf),
  '3': asam(SGD, ord=3),
  'layerwise': asam(SGD, adaptive=normalization.layerwise()),
  'ascent_steps': asam(SGD, ascent_steps=2),
  'when': asam(SGD, when=lambda step: step > 0),
  'mask': asam(SGD, mask={'kernel': True, 'bias': False}),
  'schedule': asam(SGD, optax.linear_schedule(0.1, 0.5, 10)),
  'perturbed_dtype': asam(SGD, perturbed_dtype=jnp.float32),
  'descent': asam(SGD, descent=lambda grads, perturbed_grads: grads),
  'looksam': looksam(SGD, every_k=2),
  'gsam': asam(SGD, descent=descent.gsam()),
  'wsam': asam(SGD, descent=descent.wsam()),
  'friendly': optax.chain(sharpness_aware(ASCENTS['friendly']), SGD),
}
PARAMS = {
  'kernel': {dtype: jnp.full((2, 2), 0.5, dtype) for dtype in DTYPES},
  'bias': {'bfloat16': jnp.full(2, 0.5, jnp.bfloat16)},
}


@pytest.fixture(autouse=True)
def switches():
  """Turns everything on for one test."""
  before = {name: getattr(jax.config, name) for name in SWITCHES}
  for name, value in SWITCHES.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def loss_fn(params):
  """A loss that casts what it takes, as strict promotion wants it."""
  leaves = [jnp.asarray(w, jnp.float32) for w in jax.tree.leaves(params)]
  return sum(jnp.mean((w - 1) ** 2) for w in leaves)


EAGER = ('3', 'asam', 'when', 'mask', 'perturbed_dtype', 'looksam')


@pytest.mark.parametrize(
  ('name', 'jit'),
  [(name, True) for name in TRANSFORMATIONS]
  + [(name, False) for name in EAGER],
)
def test_update(name, jit):
  """Two steps, one with each function, on parameters of all dtypes."""
  if not jit:  # Else nothing is cached.
    jax.config.update('jax_check_tracer_leaks', False)
  tx = TRANSFORMATIONS[name]
  maybe_jit = jax.jit if jit else lambda fun: fun
  state = maybe_jit(tx.init)(PARAMS)
  functions = [{'grad_fn': jax.grad(loss_fn)}, {'value_fn': loss_fn}]
  if name == 'looksam':  # Measures on the first.
    functions.reverse()
  for extra_args in functions:

    @maybe_jit
    def step(params, state, extra_args=extra_args):
      grads = jax.grad(loss_fn)(params)
      return tx.update(grads, state, params, **extra_args)

    updates, state = step(PARAMS, state)
  dtypes = lambda tree: jax.tree.map(lambda w: w.dtype, tree)
  assert dtypes(updates) == dtypes(PARAMS)
  assert state[0].perturbed_value > 0


@pytest.mark.parametrize('momentum', [None, 0.9])
def test_momentum_asam(momentum):
  """Two steps, of which the second removes a perturbation."""
  base_tx = SGD if momentum else optax.sgd(0.1, momentum=0.9)
  params = PARAMS
  if momentum is None:  # Optax's arithmetic
    params = {name: leaves['bfloat16'] for name, leaves in PARAMS.items()}
  tx = momentum_asam(base_tx, 2.0, momentum=momentum)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state

  params, state = step(*step(params, jax.jit(tx.init)(params)))
  assert any(e.any() for e in jax.tree.leaves(state.perturbation))


def test_gradient_of_zero():
  """Nothing is divided by a norm of zero."""
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  for tx in (asam(SGD), asam(SGD, ord=jnp.inf), asam(SGD, ord=3), looksam(SGD)):
    updates, _ = tx.update(
      zeros, tx.init(PARAMS), PARAMS, grad_fn=lambda _: zeros
    )
    assert not any(w.any() for w in jax.tree.leaves(updates))


def test_random_numbers_have_the_dtype_of_params(x64):
  """JAX would draw float64."""
  params = {'w': jnp.full(3, 0.5, jnp.float32)}
  loss_fn = lambda params: jnp.sum(params['w'] ** 2)
  measure = sharpness.average_case(
    loss_fn, params, 0.1, jax.random.key(0), samples=1, distribution='uniform'
  )
  assert measure.dtype == jnp.float32


def test_value_and_grad_and_sharpness():
  """The other uses of the same pieces."""
  key = jax.random.key(0)
  value, _ = optax_asam.value_and_grad(loss_fn)(PARAMS)
  assert value > 0
  params = {name: leaves['bfloat16'] for name, leaves in PARAMS.items()}
  measures = [
    sharpness.worst_case(
      loss_fn,
      params,
      rho,
      step_rule=rule,
      ord=p,
      steps=3,
      restarts=2,
      key=key,
    )
    for rule, p, rho in (
      (sharpness.fixed_steps(jnp.bfloat16(0.5)), 2, jnp.float16(0.1)),
      (sharpness.apgd_steps(), jnp.inf, jnp.int32(1)),
    )
  ]
  measures.append(sharpness.average_case(loss_fn, params, 0.1, key, samples=2))
  measures.append(
    sharpness.max_hessian_eigenvalue(loss_fn, params, key, steps=2)
  )
  assert all(measure.dtype == jnp.float32 for measure in measures)
