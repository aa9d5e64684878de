"""Promise: the second gradient is taken where, when and as it is asked for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import SharpnessAwareState
from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import sharpness_aware
import reference
from support import assert_same_bits
from support import error

CURVATURE = {'kernel': 0.7, 'bias': 1.3}
NAMES = set(CURVATURE)


def loss_fn(params):
  """A polynomial whose leaves are coupled by their common sum."""
  total = sum(w.sum() for w in params.values())
  separate = sum(
    CURVATURE[k] * (w**2).sum() / 2 + (w**4).sum() / 4
    for k, w in params.items()
  )
  return separate + total**2 / 10


def reference_grad(params):
  """The gradient of ``loss_fn``, by hand."""
  total = sum(w.sum() for w in params.values())
  return {k: CURVATURE[k] * w + w**3 + total / 5 for k, w in params.items()}


def reference_run(
  params,
  steps,
  rho,
  p=2,
  ascent_steps=1,
  every_k=1,
  descent=None,
  operator_held=True,
):
  """ASAM around SGD (lr 0.1, momentum 0.9), by hand.

  With ``operator_held=False``, T is taken anew at each ascent step, which is
  not what the library does.
  """
  add = lambda a, b, scale=1: {k: a[k] + scale * b[k] for k in a}
  momentum = {k: 0 * w for k, w in params.items()}
  for step in range(steps):
    grads = reference_grad(params)
    if step % every_k == 0:
      eps = {k: 0 * w for k, w in params.items()}
      ascent_grads = grads
      for _ in range(ascent_steps):
        eps = add(
          eps,
          reference.perturbation(
            params if operator_held else add(params, eps),
            ascent_grads,
            reference.elementwise(0.01),
            rho(step) / ascent_steps,
            p,
            {'kernel'},
            NAMES,
          ),
        )
        ascent_grads = reference_grad(add(params, eps))
      grads = descent(grads, ascent_grads) if descent else ascent_grads
    momentum = add(grads, momentum, 0.9)
    params = add(params, momentum, -0.1)
  return params


def run(tx, params, steps, interface='grad_fn'):
  """``steps`` updates of ``tx`` on ``loss_fn`` in one compiled loop."""
  fun = {'grad_fn': jax.grad(loss_fn), 'value_fn': loss_fn}[interface]

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(
      jax.grad(loss_fn)(params), state, params, **{interface: fun}
    )
    params = optax.apply_updates(params, updates)
    return (params, state), state

  carry = params, tx.init(params)
  return jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)


@pytest.fixture
def params():
  """Parameters of a dense layer, in the default dtype."""
  rng = np.random.default_rng(0)
  return {
    'kernel': jnp.asarray(rng.standard_normal((3, 2))),
    'bias': jnp.asarray(rng.standard_normal(2)),
  }


@pytest.mark.parametrize('p', [2, jnp.inf, 3])
@pytest.mark.parametrize('ascent_steps', [1, 3])
@pytest.mark.parametrize('every_k', [1, 3])
@pytest.mark.parametrize('interface', ['grad_fn', 'value_fn'])
def test_reference(x64, params, p, ascent_steps, every_k, interface):
  """Seven steps by hand, in NumPy, with a schedule of rho."""
  rhos = np.linspace(0.5, 0.1, 7)
  tx = asam(
    optax.sgd(0.1, momentum=0.9),
    rho=lambda count: jnp.asarray(rhos)[count],
    ord=p,
    ascent_steps=ascent_steps,
    every_k=every_k,
  )
  (result, _), _ = run(tx, params, 7, interface)
  expected = reference_run(
    jax.tree.map(np.asarray, params),
    7,
    lambda step: rhos[step],
    p,
    ascent_steps,
    every_k,
  )
  assert error(result, expected) < 1e-12


@pytest.mark.parametrize('every_k', [1, 2])
def test_descent(x64, params, every_k):
  """Descent sees (g, g~) on the steps with a second gradient, and only then."""

  def descent(g, perturbed_g):
    return jax.tree.map(lambda a, b: 2 * a - b**2, g, perturbed_g)

  tx = asam(optax.sgd(0.1, momentum=0.9), every_k=every_k, descent=descent)
  (result, _), _ = run(tx, params, 4)
  expected = reference_run(
    jax.tree.map(np.asarray, params),
    4,
    lambda _: 0.5,
    every_k=every_k,
    descent=descent,
  )
  assert error(result, expected) < 1e-12


def test_state(params):
  """The count, the value at w + eps, and NaN where there is none."""
  tx = asam(optax.sgd(0.1), every_k=2)
  state = tx.init(params)[0]
  assert state.step == 0
  assert jnp.isnan(state.perturbed_value)
  _, states = run(tx, params, 4, 'value_fn')
  assert isinstance(states[0], SharpnessAwareState)
  assert states[0].step.tolist() == [1, 2, 3, 4]
  assert jnp.isnan(states[0].perturbed_value).tolist() == [
    False,
    True,
    False,
    True,
  ]
  assert states[0].perturbed_value[0] > loss_fn(params)
  _, states = run(tx, params, 4, 'grad_fn')
  assert jnp.isnan(states[0].perturbed_value).all()


def test_update_by_keyword(params):
  """All that ``update`` takes has a name, and the functions need theirs."""
  tx = sharpness_aware(ascent.rho_ball(0.5, 0.01, True))
  grad_fn = jax.grad(loss_fn)
  grads, state = grad_fn(params), tx.init(params)
  by_name, _ = tx.update(
    updates=grads, state=state, params=params, grad_fn=grad_fn
  )
  by_position, _ = tx.update(grads, state, params, grad_fn=grad_fn)
  assert_same_bits(by_name, by_position)
  with pytest.raises(TypeError):
    tx.update(grads, state, params, grad_fn)


def test_perturbed_value(x64, params):
  """With value_fn the state holds L(w + eps), in float64 if params are."""
  tx = asam(optax.sgd(0.1), rho=0.3)
  _, states = run(tx, params, 1, 'value_fn')
  eps = reference.perturbation(
    params,
    reference_grad(params),
    reference.elementwise(0.01),
    0.3,
    2,
    {'kernel'},
    NAMES,
  )
  perturbed = {k: params[k] + eps[k] for k in params}
  assert error(states[0].perturbed_value[0], loss_fn(perturbed)) < 1e-14


def test_rho_schedule_counts_updates(params):
  """Whatever ascent_steps and every_k are; contrib.sam's stays at step 0."""
  schedule = lambda count: 0.1 * (count + 1)
  for kwargs in ({}, {'ascent_steps': 3}, {'every_k': 3}):
    tx = asam(optax.sgd(0.1), rho=schedule, **kwargs)
    (_, state), _ = run(tx, params, 5)
    assert optax.tree.get(state, 'count') == 5
  frozen = asam(optax.sgd(0.1), rho=lambda count: 0.1)
  moving = asam(optax.sgd(0.1), rho=schedule)
  (first, _), _ = run(frozen, params, 1)
  assert_same_bits(run(moving, params, 1)[0][0], first)
  assert (
    error(run(moving, params, 3)[0][0], run(frozen, params, 3)[0][0]) > 1e-3
  )


def test_stateful_ascent(params):
  """Its state advances on the clean gradient alone, once an update."""
  ema = optax.chain(optax.trace(0.9), ascent.rho_ball(0.1, 0.01, True))
  for kwargs in ({}, {'ascent_steps': 3}, {'every_k': 2}):
    tx = optax.chain(sharpness_aware(ema, **kwargs), optax.sgd(0.0))
    (_, state), _ = run(tx, params, 3)
    grads = jax.grad(loss_fn)(params)  # lr = 0: the same at each step
    expected = jax.tree.map(lambda g: g * (1 + 0.9 + 0.81), grads)
    assert error(optax.tree.get(state, 'trace'), expected) < 1e-6


def test_ascent_stays_in_the_ball(params):
  """Several steps reach no farther than rho, and no less than a step's."""
  seen = []
  tx = asam(optax.sgd(0.1), rho=0.5, ascent_steps=4, adaptive=False)

  def grad_fn(perturbed):
    seen.append(optax.tree.norm(optax.tree.sub(perturbed, params)).item())
    return jax.grad(loss_fn)(perturbed)

  tx.update(jax.grad(loss_fn)(params), tx.init(params), params, grad_fn=grad_fn)
  assert len(seen) == 4
  np.testing.assert_allclose(seen[0], 0.125, rtol=1e-5)
  assert seen == sorted(seen)
  assert 0.25 < seen[-1] <= 0.5 * (1 + 1e-6)


def test_gradients_are_unrolled(params):
  """No loop in the compiled step, however many gradients it takes."""
  tx = asam(optax.sgd(0.1), ascent_steps=3)
  step = lambda p, s: tx.update(
    jax.grad(loss_fn)(p), s, p, grad_fn=jax.grad(loss_fn)
  )
  assert 'while' not in str(jax.make_jaxpr(step)(params, tx.init(params)))


@pytest.mark.parametrize('every_k', [1, 2])
@pytest.mark.parametrize('perturbed_dtype', [None, jnp.float32])
def test_dtypes_in_low_precision(every_k, perturbed_dtype):
  """Gradients leave in the dtype they came in; w + eps is formed as asked."""
  params = {
    'kernel': jnp.full(4, 1.0, jnp.bfloat16),
    'bias': jnp.full(2, 1.0, jnp.float16),
  }
  expected = {
    'kernel': perturbed_dtype or jnp.bfloat16,
    'bias': perturbed_dtype or jnp.float16,
  }
  seen = []

  def grad_fn(params):
    seen.append(params)
    return jax.tree.map(lambda w: 2 * w, params)

  tx = sharpness_aware(
    ascent.rho_ball(1e-3, 0.0, True),
    every_k=every_k,
    perturbed_dtype=perturbed_dtype,
  )
  grads = jax.tree.map(lambda w: 2 * w, params)
  out, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  assert jax.tree.map(lambda w: w.dtype, seen[0]) == jax.tree.map(
    jnp.dtype, expected
  )
  assert jax.tree.map(lambda w: w.dtype, out) == jax.tree.map(
    lambda w: w.dtype, params
  )
  assert state.perturbed_value.dtype == jnp.float32
  if every_k == 1:  # eps = 1e-3 / sqrt(6), under half a bfloat16 ulp of 1.
    kernel = np.float64(seen[0]['kernel'])
    expected = 1 + 1e-3 / np.sqrt(6) if perturbed_dtype else 1
    np.testing.assert_allclose(kernel, expected, rtol=2e-6)


def test_python_floats():
  """Leaves may be Python floats, as in other transformations."""
  params = {'w': 1.5}
  grad_fn = jax.grad(lambda p: p['w'] ** 2)
  for perturbed_dtype in (None, jnp.float32):
    tx = asam(optax.sgd(0.1), perturbed_dtype=perturbed_dtype)
    updates, _ = tx.update(
      grad_fn(params), tx.init(params), params, grad_fn=grad_fn
    )
    np.testing.assert_allclose(updates['w'], -0.2 * 2.255, rtol=1e-6)


def test_float32_scalars_promote_nothing():
  """A float32 rho, eta or schedule leaves a bfloat16 tree as it is."""
  params = {'kernel': jnp.ones(3, jnp.bfloat16)}
  value_fn = lambda p: (p['kernel'] ** 2).sum()
  for rho in (jnp.float32(0.5), lambda count: jnp.float32(0.5)):
    tx = asam(optax.sgd(0.1), rho=rho, eta=jnp.float32(0.01))
    state = tx.init(params)
    updates, new_state = tx.update(
      jax.grad(value_fn)(params), state, params, value_fn=value_fn
    )
    assert updates['kernel'].dtype == jnp.bfloat16
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(new_state) == dtypes(state)


def test_extra_args(params):
  """Unknown ones are accepted; ascent and base each get theirs."""

  def scale_by_extra(name):
    def update(updates, state, params=None, **extra_args):
      factor = extra_args[name]
      return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(
      lambda _: optax.EmptyState(), update
    )

  tx = optax.chain(
    sharpness_aware(
      optax.chain(ascent.rho_ball(1.0, 0.01, True), scale_by_extra('radius'))
    ),
    optax.sgd(0.1),
    scale_by_extra('factor'),
  )
  grads, grad_fn = jax.grad(loss_fn)(params), jax.grad(loss_fn)
  updates, _ = tx.update(
    grads, tx.init(params), params, grad_fn=grad_fn, radius=0.2, factor=3.0
  )
  plain = asam(optax.sgd(0.3), rho=0.2)
  expected, _ = plain.update(
    grads, plain.init(params), params, grad_fn=grad_fn, unknown='ignored'
  )
  assert error(updates, expected) < 1e-6


class OddState(NamedTuple):
  """A state with what contrib.sam's arithmetic breaks on."""

  flag: jax.Array
  key: jax.Array
  count: jax.Array


@pytest.mark.parametrize('every_k', [1, 2])
def test_states_of_any_dtype(params, every_k):
  """Bools, keys and integers in the state of the ascent and of the base."""

  def odd():
    def init(params):
      del params
      return OddState(jnp.array(True), jax.random.key(0), jnp.array(0))

    def update(updates, state, params=None):
      del params
      flag, key, count = state
      return updates, OddState(~flag, jax.random.split(key)[0], count + 1)

    return optax.GradientTransformation(init, update)

  tx = optax.chain(
    sharpness_aware(
      optax.chain(odd(), ascent.rho_ball(0.5, 0.01, True)), every_k=every_k
    ),
    odd(),
    optax.sgd(0.1),
  )
  (result, state), _ = run(tx, params, 3)
  for s in (state[0].ascent_state[0], state[1]):
    assert not s.flag
    assert s.count == 3
  (expected, _), _ = run(asam(optax.sgd(0.1), every_k=every_k), params, 3)
  assert error(result, expected) < 1e-6


def test_donation(params):
  """State and params share no buffer: both may be donated."""
  tx = asam(optax.sgd(0.1, momentum=0.9))
  state = tx.init(params)
  leaves = jax.tree.leaves((params, state))
  pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
  assert len(pointers) == len(leaves)

  def step(params, state):
    grad_fn = jax.grad(loss_fn)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  for _ in range(2):
    params, state = step(params, state)
  assert state[0].step == 2


def test_compiled_once(params):
  """The second call, and a new value of a traced rho, compile nothing."""

  @jax.jit
  def step(params, state, rho):
    tx = asam(optax.adam(0.1), rho=rho, every_k=2)
    updates, state = tx.update(
      jax.grad(loss_fn)(params), state, params, value_fn=loss_fn
    )
    return optax.apply_updates(params, updates), state

  state = asam(optax.adam(0.1)).init(params)
  for rho in (0.1, 0.2, 0.3):
    params, state = step(params, state, rho)
  assert step._cache_size() == 1


def test_normalizations_reach_the_ascent(params):
  """``adaptive`` as a normalization is the ascent with that normalization."""
  t = normalization.filterwise(0.3, mask=None)
  by_hand = optax.chain(
    sharpness_aware(
      optax.chain(ascent.steepest_ascent(t, ord=3), optax.scale(0.2))
    ),
    optax.sgd(0.1),
  )
  tx = asam(optax.sgd(0.1), 0.2, adaptive=t, ord=3)
  assert_same_bits(run(tx, params, 3)[0][0], run(by_hand, params, 3)[0][0])
