"""Promise: minima that a base reaches alone, it reaches within asam."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_asam import asam
from optax_asam import ascent
from optax_asam import eval_params
from optax_asam import looksam
from optax_asam import momentum_asam
from tests.helpers.cases import BASES
from tests.helpers.cases import FAST_BASES
from tests.helpers.cases import update_on
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

STEPS = 20_000
RHO = 0.5
SLOW = [
  pytest.param(base, marks=[pytest.mark.slow] * (base not in FAST_BASES))
  for base in BASES
]

# Optax's own targets: a loss, where to start, and the minimum.
TARGETS = {
  'parabola': (
    lambda w: jnp.sum((w - jnp.array([1.0, -1.0, 1.0])) ** 2),
    jnp.array([-1.0, 10.0, 1.0]),
    jnp.array([1.0, -1.0, 1.0]),
  ),
  'rosenbrock': (
    lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
    jnp.zeros(2),
    jnp.ones(2),
  ),
}
# Optax's own criterion: 3e-2 relative and 3e-2 absolute, for a minimum of 1.
CONVERGED = 6e-2

# Where a search that fails shortens its first guess until no step changes the
# loss in float32: rho must start lower.
RADII = {('backtracking', 'rosenbrock'): 0.01}


def distance(base, tx, target):
  """How far from the minimum the last hundred iterates are."""
  loss_fn, start, minimum = TARGETS[target]

  def step(carry, _):
    params, state = carry
    updates, state = update_on(loss_fn, base, tx, state, params)
    params = optax.apply_updates(params, updates)
    evaluated = params
    if base == 'schedule_free':
      evaluated = optax.contrib.schedule_free_eval_params(state[-1], params)
    return (params, state), jnp.abs(evaluated - minimum).max()

  _, distances = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
  return distances[-100:].max()


@functools.cache
def asam_distance(base, target, wrap=asam):
  """``distance`` of asam, a function of the first and the last rho."""

  @jax.jit
  def run(first_rho, last_rho):
    rho = optax.linear_schedule(first_rho, last_rho, STEPS // 2)
    return distance(base, wrap(BASES[base](), rho), target)

  return run


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('base', SLOW)
def test_decaying_rho(base, target):
  """Where rho decays to zero, the minimum is reached."""
  rho = RADII.get((base, target), RHO)
  assert asam_distance(base, target)(rho, 0.0) < CONVERGED


def test_constant_rho():
  """A constant rho keeps near the minimum of a bowl, and off a narrow one.

  On the parabola g~ points away from the minimum wherever g does. The valley of
  the Rosenbrock function is narrower than rho.
  """
  assert asam_distance('momentum', 'parabola')(RHO, RHO) < RHO / 5
  assert asam_distance('momentum', 'rosenbrock')(RHO, RHO) > RHO


@pytest.mark.parametrize('base', ['momentum', 'adam'])
@pytest.mark.parametrize('target', TARGETS)
def test_looksam(base, target):
  """LookSAM reaches minima where rho decays to zero."""
  assert asam_distance(base, target, looksam)(RHO, 0.0) < CONVERGED


def test_momentum_asam_with_a_constant_rho():
  """W comes near the minimum of a bowl, and w + eps keeps its distance."""
  loss_fn, start, _ = TARGETS['parabola']
  tx = momentum_asam(optax.sgd(0.01, momentum=0.9), RHO)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    params = optax.apply_updates(params, updates)
    w = eval_params(state, params)
    return (params, state), (loss_fn(w), loss_fn(params))

  _, losses = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
  clean, perturbed = (loss[-1000:] for loss in losses)
  assert clean.max() < 1e-2 < perturbed.min()


def test_lbfgs_sees_the_perturbed_gradient():
  """L-BFGS takes its curvature from differences of g~, its search uses g."""
  loss_fn, params, _ = TARGETS['parabola']
  tx = asam(BASES['lbfgs'](), RHO)
  step = jax.jit(functools.partial(update_on, loss_fn, 'lbfgs', tx))
  # Without the weak types of Optax's searches, which would compile once more.
  state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), tx.init(params))
  ball = ascent.rho_ball(RHO, 0.01, True)
  perturbed_grads = []
  for _ in range(2):
    eps, _ = ball.update(jax.grad(loss_fn)(params), ball.init(params), params)
    perturbed_grads.append(jax.grad(loss_fn)(params + eps))
    updates, state = step(state, params)
    params = optax.apply_updates(params, updates)
  expected = perturbed_grads[1] - perturbed_grads[0]
  memory = optax.tree.get(state, 'diff_updates_memory')
  assert min(error(row, expected) for row in memory) < 1e-5
  value, grads = optax.value_and_grad_from_state(loss_fn)(params, state=state)
  assert_same_bits(value, state[1][-1].value)
  assert error(grads, jax.grad(loss_fn)(params)) < 1e-5
