"""Promise: a bad number costs a step, never the training.

Zero, denormal, huge, infinite and NaN gradients at either pass, in one leaf or
in all. After such a step the state is what the base transformation alone makes
of it, and training recovers, as docs/non_finite.md says. The page's float16
program with dynamic loss scaling runs here.
"""

import functools

from flax.training.dynamic_scale import DynamicScale
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from tests.helpers import pages
from tests.helpers import reference
from tests.helpers.cases import DESCENTS
from tests.helpers.cases import WRAPPERS
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import perturbed_point

ORDS = [2, 3, jnp.inf]
# A number, and the ords for which a clean gradient gives no perturbation that
# holds it in one leaf, and in all.
NUMBERS = {
  'zero': (0.0, [], ORDS),
  'denormal': (1e-40, [], ORDS),
  'huge': (1e30, [2], [2]),
  'largest': (3e38, [2, 3], [2, 3]),
  'inf': (jnp.inf, ORDS, ORDS),
  'nan': (jnp.nan, ORDS, ORDS),
}
LEAVES = {
  'normalized leaf': ['kernel'],
  'other leaf': ['bias'],
  'all leaves': ['kernel', 'bias'],
}
RHO, ETA = 0.5, 0.01
# Powers of two here and in the loss: their products are exact, so that two
# programs agree to the last bit whether or not one fuses multiply and add.
BASE = optax.sgd(0.25, momentum=0.5)
GUARDED = optax.apply_if_finite(BASE, 5)


def loss_fn(params, numbers):
  """A loss with the gradient factor * w / 2 + offset."""
  return sum(
    (numbers['factor'][k] * w**2 / 4 + numbers['offset'][k] * w).sum()
    for k, w in params.items()
  )


value = jax.jit(loss_fn)
gradient = jax.jit(jax.grad(loss_fn))
base_alone = jax.jit(BASE.update)
guarded_alone = jax.jit(GUARDED.update)


def good(params):
  """The numbers for which the gradient is w / 2."""
  return {
    'factor': jax.tree.map(np.ones_like, params),
    'offset': jax.tree.map(np.zeros_like, params),
  }


def bad(params, name, leaves=('kernel', 'bias')):
  """The numbers for which it is +- ``NUMBERS[name]`` in ``leaves``."""
  numbers = good(params)
  for leaf in leaves:
    signs = (-1.0) ** np.arange(params[leaf].size)
    offset = np.float32(NUMBERS[name][0] * signs)
    numbers['factor'][leaf] = np.zeros_like(params[leaf])
    numbers['offset'][leaf] = offset.reshape(params[leaf].shape)
  return numbers


def passes(params, bad_pass, *args):
  """The numbers of the clean and of the perturbed pass."""
  return [
    bad(params, *args) if bad_pass in (name, 'both') else good(params)
    for name in ('clean', 'perturbed')
  ]


def by_the_formula(params, grads, ord=2, **kwargs):
  """The parameters of the second pass, w + eps, in NumPy."""
  kwargs = {
    'adaptive': True,
    'rho': RHO,
    'eta': ETA,
    'perturbed': params,
  } | kwargs
  exact = {k: np.float64(w) for k, w in params.items()}
  grads = {k: np.float64(g) for k, g in grads.items()}
  tiny = np.finfo(np.float32).tiny  # Denormal numbers count as zero.
  grads = {k: np.where(np.abs(g) < tiny, 0, g) for k, g in grads.items()}
  eps = reference.perturbation(
    exact,
    grads,
    reference.elementwise(kwargs['eta']),
    kwargs['rho'],
    ord,
    {'kernel'} if kwargs['adaptive'] else set(),
    kwargs['perturbed'],
  )
  return {k: np.asarray(exact[k] + eps[k], params[k].dtype) for k in params}


@functools.cache
def compiled_step(ord, adaptive, ascent_steps=1):
  """A step around ``BASE`` with value_fn, and around ``GUARDED`` with grad_fn.

  What is bad is data, so that each configuration is compiled once.

  Returns:
    A function of the parameters, a pair of states, the numbers of each pass
    and eta. It returns the parameters that each further pass saw, and a pair of
    (updates, state).
  """

  @jax.jit
  def step(params, states, numbers, eta):
    clean, *later = numbers
    grads = jax.grad(loss_fn)(params, clean)
    seen = []

    def grad_fn(perturbed_params):
      seen.append(perturbed_params)
      return jax.grad(loss_fn)(perturbed_params, later[len(seen) - 1])

    # With several ascent steps only grad_fn knows which pass it is.
    value_fn = lambda perturbed_params: loss_fn(perturbed_params, later[-1])
    plain, guarded = (
      asam(base, RHO, eta, adaptive, ord=ord, ascent_steps=ascent_steps).update
      for base in (BASE, GUARDED)
    )
    results = (
      plain(grads, states[0], params, value_fn=value_fn),
      guarded(grads, states[1], params, grad_fn=grad_fn),
    )
    return seen, results

  return step


@functools.cache
def first_states():
  """States with some momentum in them, which a bad step could spoil."""
  params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
  init = [asam(base).init(params) for base in (BASE, GUARDED)]
  _, results = compiled_step(2, True)(params, init, [good(params)] * 2, ETA)
  return [state for _, state in results]


def assert_bases_alone(results, params, seen, numbers):
  """Each base made of the gradient at ``seen`` what it makes of it alone."""
  grads = gradient(seen, numbers)
  for alone, before, (updates, after) in zip(
    (base_alone, guarded_alone), first_states(), results, strict=True
  ):
    assert_same_bits((updates, after[1]), alone(grads, before[1], params))
    assert after[0].step == before[0].step + 1
    # That of the schedule of rho.
    assert jax.tree.leaves(after[0].ascent_state) == [after[0].step]


@pytest.mark.parametrize('adaptive', [True, False], ids=['asam', 'sam'])
@pytest.mark.parametrize('ord', ORDS)
@pytest.mark.parametrize('where', LEAVES)
@pytest.mark.parametrize('bad_pass', ['clean', 'perturbed'])
@pytest.mark.parametrize('name', NUMBERS)
def test_bad_step(params, name, bad_pass, where, ord, adaptive):
  """The perturbation is the formula's or none; the bases get what is there."""
  clean, perturbed = passes(params, bad_pass, name, LEAVES[where])
  (seen,), results = compiled_step(ord, adaptive)(
    params, first_states(), [clean, perturbed], ETA
  )
  _, in_one_leaf, in_all = NUMBERS[name]
  none_made = in_all if where == 'all leaves' else in_one_leaf
  if bad_pass == 'clean' and ord in none_made:
    assert_same_bits(seen, params)
  else:
    grads = gradient(params, clean)
    expected = by_the_formula(params, grads, ord, adaptive=adaptive)
    assert error(seen, expected) < 1e-6
  assert_bases_alone(results, params, seen, perturbed)
  _, (state, _) = results[0]
  np.testing.assert_allclose(
    state.perturbed_value, value(seen, perturbed), rtol=1e-5
  )


@pytest.mark.parametrize('ord', ORDS)
@pytest.mark.parametrize('name', NUMBERS)
def test_zero_parameters(params, name, ord):
  """With eta = 0 they stay, and only inf and NaN stop the others: 0 * inf."""
  params['kernel'] = jnp.zeros_like(params['kernel'])
  clean, perturbed = passes(params, 'clean', name, ['kernel'])
  (seen,), results = compiled_step(ord, True)(
    params, first_states(), [clean, perturbed], 0.0
  )
  expected = params
  if np.isfinite(NUMBERS[name][0]):
    grads = gradient(params, clean)
    expected = by_the_formula(params, grads, ord, eta=0.0)
  assert error(seen['bias'], expected['bias']) < 1e-6
  assert_same_bits(seen['kernel'], params['kernel'])
  assert_bases_alone(results, params, seen, perturbed)


@pytest.mark.parametrize('bad_passes', [{0}, {1}, {0, 1}])
@pytest.mark.parametrize('name', NUMBERS)
def test_bad_ascent_step(params, name, bad_passes):
  """Of two ascent steps a bad one adds nothing, and the other keeps its half.

  Bad as the first one, it leaves the second at w, too.
  """
  numbers = [
    bad(params, name) if i in bad_passes else good(params) for i in range(3)
  ]
  (_, seen), (_, guarded) = compiled_step(2, True, ascent_steps=2)(
    params, first_states(), numbers, ETA
  )
  if bad_passes == {0, 1}:
    assert_same_bits(seen, params)
  else:
    grads = gradient(params, good(params))
    expected = by_the_formula(params, grads, rho=RHO / 2)
    assert error(seen, expected) < 1e-6
  expected = guarded_alone(
    gradient(seen, numbers[-1]), first_states()[1][1], params
  )
  assert_same_bits((guarded[0], guarded[1][1]), expected)


def test_bad_gradient_where_nothing_is_perturbed(params):
  """A leaf that ``mask`` leaves out has no part in the norm, whatever it is."""
  tx = asam(optax.identity(), RHO, ETA, mask={'kernel': True, 'bias': False})
  grads = gradient(params, bad(params, 'nan', ['bias']))
  expected = by_the_formula(params, grads, perturbed=['kernel'])
  assert error(perturbed_point(tx, params, grads)[0], expected) < 1e-6


def test_descent_hands_on_what_it_uses(params):
  """A bad clean gradient reaches the base through it."""
  grads = gradient(params, bad(params, 'nan', ['bias']))
  tx = asam(optax.identity(), descent=DESCENTS['linear'])
  seen, updates = perturbed_point(tx, params, grads)
  assert_same_bits(seen, params)
  assert jnp.isnan(updates['bias']).all()
  assert_same_bits(updates['kernel'], 5 / 4 * params['kernel'])


@functools.cache
def compiled_training(base):
  """A step of training, with rho and the numbers of both passes as data."""

  @jax.jit
  def step(params, state, numbers, rho):
    clean, perturbed = numbers
    updates, state = asam(base, rho).update(
      jax.grad(loss_fn)(params, clean),
      state,
      params,
      grad_fn=lambda p: jax.grad(loss_fn)(p, perturbed),
    )
    return optax.apply_updates(params, updates), state

  return step


def train(base, params, plan, rhos=None):
  """Trains by a plan: for each step the bad pass and number, or None."""
  state = asam(base).init(params)
  for step, rho in zip(plan, rhos or [RHO] * len(plan), strict=True):
    numbers = passes(params, *(step or ['neither']))
    params, state = compiled_training(base)(params, state, numbers, rho)
  return params, state


def test_training_recovers(params):
  """It is the run without the bad steps, to the last bit.

  That is, without those at whose second pass a number is not finite; those
  with a bad clean gradient alone are steps of the base, as with rho = 0.
  """
  plan = [None] * 25
  plan[2] = 'both', 'nan'
  plan[4] = 'perturbed', 'inf', ['bias']
  plan[7:12] = [('both', 'inf'), ('perturbed', 'nan', ['kernel'])] * 2 + [
    ('both', 'nan', ['bias'])
  ]
  skipped = [i for i, step in enumerate(plan) if step]
  plan[14] = 'clean', 'nan'
  plan[15] = 'clean', 'huge', ['kernel']
  base = optax.apply_if_finite(optax.adam(0.25), 5)
  result, state = train(base, params, plan)
  kept = [i for i in range(25) if i not in skipped]
  expected, expected_state = train(
    base, params, [None] * len(kept), [RHO * (i not in (14, 15)) for i in kept]
  )
  assert_same_bits(result, expected)
  assert_same_bits(state[1].inner_state, expected_state[1].inner_state)
  assert state[1].total_notfinite == len(skipped) == 7
  assert state[0].step == 25
  numbers = good(params)
  assert value(result, numbers) < value(params, numbers) / 50


@pytest.mark.parametrize('name', WRAPPERS)
def test_every_wrapper_recovers(params, name):
  """Two bad updates in a row leave no trace in parameters or state.

  Two, so that those that count in twos measure where they did.
  """
  tx = WRAPPERS[name](optax.apply_if_finite(optax.adam(0.25), 5))

  @jax.jit
  def step(params, state, numbers):
    grad_fn = jax.grad(lambda p: loss_fn(p, numbers))
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  def result(plan):
    carry = params, jax.jit(tx.init)(params)
    for numbers in plan:
      carry = step(*carry, numbers)
    params_, state = carry
    if name == 'momentum_asam':
      return optax_asam.eval_params(state, params_)
    return params_

  clean = [good(params)] * 8
  spoiled = [bad(params, 'nan', ['bias']), bad(params, 'inf')]
  expected = result(clean)
  assert error(result(clean[:4] + spoiled + clean[4:]), expected) < 1e-6
  assert error(expected, params) > 0.1


@pytest.mark.parametrize('ord', ORDS)
def test_float16(params, ord):
  """Squares that overflow or vanish in float16 do neither."""
  params = optax.tree.cast(params, jnp.float16)
  tx = asam(optax.identity(), RHO, ETA, ord=ord)
  for size in (200, 65504, 6e-8):
    grads = {k: size * jnp.sign(w) for k, w in params.items()}
    seen, _ = perturbed_point(tx, params, grads)
    # An ulp: w + eps is rounded, and eps may be.
    assert error(seen, by_the_formula(params, grads, ord)) < 2**-10
    assert error(seen, params) > 0.05


@pytest.fixture(scope='module')
def float16_program():
  """What the program in docs/non_finite.md defines, and its loop's code."""
  program, loop = pages.blocks(pages.read_page('non_finite'))
  namespace = {}
  exec(program, namespace)
  return namespace, loop


@pytest.fixture
def batch():
  """Inputs and targets that a dense layer can fit."""
  rng = np.random.default_rng(2)
  x = rng.standard_normal((8, 3)).astype(np.float32)
  weights = rng.standard_normal((3, 2)).astype(np.float32)
  return x, x @ weights + 1


def dynamic_scale(scale):
  """One that doubles after four steps, and compiles one program."""
  return DynamicScale(
    growth_interval=4, scale=jnp.float32(scale), fin_steps=jnp.int32(0)
  )


def test_float16_program(params, batch, float16_program):
  """A step of the page's is ASAM's in float32, as far as float16 goes."""
  program, _ = float16_program
  state = program['tx'].init(params)
  result, *_ = program['train_step'](
    params, state, dynamic_scale(2.0**10), batch
  )
  x, y = batch
  grad_fn = optax_asam.grad(
    lambda params: ((x @ params['kernel'] + params['bias'] - y) ** 2).mean()
  )
  grads = jax.jit(grad_fn)(params)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  assert error(result, expected) < 2e-3


def test_float16_loop(params, batch, float16_program):
  """The page's loop trains from Flax's default scale, which overflows."""
  program, loop = float16_program
  namespace = {**program, 'params': params, 'batches': [batch] * 60}
  exec(loop, namespace)
  assert namespace['opt_state'][1].total_notfinite > 0
  assert namespace['loss'] < program['loss_fn'](params, batch) / 50


def test_float16_overflow(params, batch, float16_program):
  """At either pass it costs the step alone, and the scale is halved.

  The scale grows until the second pass overflows; twice it is made so large
  that the first does, too.
  """
  program, _ = float16_program
  carry = params, program['tx'].init(params)
  scale, overflows = dynamic_scale(2.0**14), 0
  for i in range(60):
    if i in (20, 40):
      scale = dynamic_scale(2.0**20)
    *after, scale_after, loss = program['train_step'](*carry, scale, batch)
    if not after[1][1].last_finite:
      overflows += 1
      assert_same_bits(after[0], carry[0])
      assert_same_bits(after[1][1].inner_state, carry[1][1].inner_state)
      assert scale_after.scale == scale.scale / 2
      assert scale_after.fin_steps == 0
    carry, scale = after, scale_after
  assert overflows > 7
  assert loss < program['loss_fn'](params, batch) / 50
