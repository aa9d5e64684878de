"""Promise: minima that a base reaches alone, it reaches within asam."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_asam import asam
from optax_asam import ascent
from support import BASES
from support import LINE_SEARCHES
from support import assert_same_bits
from support import error
from support import update_on

STEPS = 20_000
RHO = 0.5

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
# Optax's own criterion, 3e-2 relative and 3e-2 absolute, beside a minimum of 1.
CONVERGED = 6e-2

# Where the schedule must start lower: test_backtracking_may_fail_for_good.
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
def asam_distance(base, target):
  """``distance`` of asam, a function of the first and the last rho."""

  @jax.jit
  def run(first_rho, last_rho):
    rho = optax.linear_schedule(first_rho, last_rho, STEPS // 2)
    return distance(base, asam(BASES[base](), rho), target)

  return run


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('base', BASES)
def test_decaying_rho(base, target):
  """Where rho decays to zero, the minimum is reached as by the base alone."""
  tx = optax.chain(BASES[base]())  # a chain, as asam is
  alone = jax.jit(lambda: distance(base, tx, target))
  assert alone() < CONVERGED
  rho = RADII.get((base, target), RHO)
  assert asam_distance(base, target)(rho, 0.0) < CONVERGED


@pytest.mark.parametrize('base', BASES)
def test_constant_rho(base):
  """A constant rho keeps near the minimum of a bowl, and off a narrow one.

  On the parabola g~ points away from the minimum wherever g does, so that steps
  overshoot by no more than a learning rate times rho. (With a perturbation
  downhill the iterates would stay on a circle of radius rho.) The valley of the
  Rosenbrock function is narrower than rho: without a decay the minimum is not
  reached, except by a search that tests the clean loss for long enough.
  """
  assert asam_distance(base, 'parabola')(RHO, RHO) < RHO / 5
  if base not in LINE_SEARCHES:
    assert asam_distance(base, 'rosenbrock')(RHO, RHO) > RHO


@functools.cache
def compiled(base, target):
  """A step of asam with a constant rho around ``base``, and its first state."""
  loss_fn, start, _ = TARGETS[target]
  tx = asam(BASES[base](), RHO)
  step = jax.jit(functools.partial(update_on, loss_fn, base, tx))
  # Without the weak types of Optax's searches, which would compile once more.
  state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), tx.init(start))
  return step, state


@pytest.mark.parametrize('base', LINE_SEARCHES)
def test_line_searches_see_the_clean_loss(base):
  """A line search around asam lowers the clean loss.

  Its direction is made of the perturbed gradient g~. All else that it sees is
  clean: the loss L(w) and the gradient at w (``value`` and ``grad``), and the
  loss at the points that it tries (``value_fn``). So it accepts a step that
  lowers L(w) enough, and the ``value`` in its state is L at the new parameters.

  It can do so where g~ descends L, which it does on a parabola everywhere.
  """
  loss_fn, params, _ = TARGETS['parabola']
  step, state = compiled(base, 'parabola')
  for _ in range(3):
    value, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = step(state, params)
    params = optax.apply_updates(params, updates)
    slope = jnp.vdot(updates, grads)
    assert slope < 0
    assert loss_fn(params) <= value + 1e-4 * slope
    assert error(state[1][-1].value, loss_fn(params)) < 1e-6
    assert state[0].perturbed_value > value


def test_lbfgs_sees_the_perturbed_gradient():
  """L-BFGS takes its curvature from differences of g~, its search uses g.

  ``optax.value_and_grad_from_state`` gives the clean value and gradient that
  the search left, as without asam.
  """
  loss_fn, params, _ = TARGETS['parabola']
  step, state = compiled('lbfgs', 'parabola')
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


def test_backtracking_tells_that_it_climbs():
  """Where g~ climbs L, no step lowers L, and the search says that it failed.

  It then takes the shortest step it tried: ``decrease_error`` in the state of
  the search is positive.
  """
  loss_fn, params, _ = TARGETS['rosenbrock']
  step, state = compiled('backtracking', 'rosenbrock')
  climbs, failures = [], []
  for _ in range(9):
    grads = jax.grad(loss_fn)(params)
    updates, state = step(state, params)
    params = optax.apply_updates(params, updates)
    climbs.append(bool(jnp.vdot(updates, grads) > 0))
    failures.append(bool(state[1][-1].info.decrease_error > 0))
  assert climbs == failures
  assert set(climbs) == {False, True}


def test_backtracking_may_fail_for_good():
  """Failing, it shortens its first guess until no step changes the loss.

  In float32 that stays so after rho has decayed: choose a smaller rho (RADII),
  or L-BFGS, whose search starts anew each time.
  """
  assert asam_distance('backtracking', 'rosenbrock')(RHO, 0.0) > RHO
