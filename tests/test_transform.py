"""Promise: states, dtypes and arguments of the second gradient are as said.

Where and when it is taken: the trajectories of test_laws.py.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import SharpnessAwareState
from optax_asam import asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import sharpness_aware
from tests.helpers import reference
from tests.helpers.reference import polynomial
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import run

GRAD_FN = jax.grad(polynomial)
SGD = optax.sgd(0.1, momentum=0.9)


def test_state(x64, params):
  """The count, and with value_fn the value L(w + eps), in float64."""
  tx = asam(optax.sgd(0.1), 0.3, every_k=2)
  assert tx.init(params)[0].step == 0
  _, (state, _) = run(tx, params, 4, 'value_fn')
  assert isinstance(state, SharpnessAwareState)
  assert state.step.tolist() == [1, 2, 3, 4]
  _, perturbed = reference.asam_run(
    jax.tree.map(np.asarray, params), 1, lambda _: 0.3
  )
  value = state.perturbed_value
  assert error(value[0], polynomial(perturbed)) < 1e-14
  # Skipped updates keep the last value measured, and so do those by grad_fn.
  assert tx.init(params)[0].perturbed_value == 0
  assert value[1] == value[0] != value[2] == value[3]
  _, (state, _) = run(tx, params, 2, 'grad_fn')
  assert state.perturbed_value.tolist() == [0, 0]


def test_when(params):
  """It sees the number of updates, and holds together with ``every_k``."""
  taken = lambda **kwargs: run(asam(SGD, **kwargs), params, 8)[0][0]
  assert_same_bits(taken(when=lambda step: step % 2 == 0), taken(every_k=2))
  assert_same_bits(
    taken(when=lambda step: step >= 4, every_k=3),
    taken(when=lambda step: step == 6),
  )
  base = run(asam(SGD, when=lambda step: False), params, 8)[0][0]
  updates = run(asam(SGD, 0.0), params, 8)[0][0]
  assert error(base, updates) < 1e-6


@pytest.mark.parametrize(
  ('wrap', 'every_k'), [(asam, 1), (asam, 2), (looksam, 2)]
)
def test_skipped_updates_compute_no_perturbation(params, wrap, every_k):
  """Of the ascent, only the state is computed outside the conditional."""
  tx = wrap(optax.identity(), optax.linear_schedule(0, 1, 9), every_k=every_k)
  step = lambda p, s: tx.update(p, s, p, grad_fn=lambda p: p)
  program = jax.jit(step).lower(params, tx.init(params)).as_text('hlo')
  entry = program[program.index('ENTRY') :]
  assert ('sqrt(' in entry) == (every_k == 1)


@pytest.mark.parametrize('wrap', [asam, looksam])
def test_vmap(params, wrap):
  """Skipped updates save their second gradient if ``step`` is not mapped."""
  tx = wrap(SGD, every_k=2)
  mapped = jax.tree.map(lambda w: jnp.stack([w, w]), (params, tx.init(params)))
  step = lambda p, s: tx.update(p, s, p, grad_fn=GRAD_FN)

  def has_cond(axis_of_step):
    is_step = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
    carry = jax.tree.map(
      lambda x: x[0] if is_step(x) and axis_of_step is None else x, mapped
    )
    axes = jax.tree.map(lambda x: axis_of_step if is_step(x) else 0, mapped)
    return 'cond[' in str(jax.make_jaxpr(jax.vmap(step, axes))(*carry))

  assert has_cond(None)
  assert not has_cond(0)


def test_one_count(params):
  """``optax.tree.get`` finds the count of the base, whatever rho is."""
  schedule = optax.constant_schedule(0.1)
  states = [asam(optax.adam(0.1), rho).init(params) for rho in (0.1, schedule)]
  assert optax.tree.get(states[0], 'count') == 0
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_arguments_of_value_fn(params):
  """It gets the keywords in its signature; ``obj_fn`` is another name."""
  tx = sharpness_aware(ascent.rho_ball(0.5, 0.01, True))
  state = tx.init(params)
  scaled = lambda params, scale, unused=0: scale * polynomial(params)
  update = lambda **kwargs: tx.update(GRAD_FN(params), state, params, **kwargs)
  expected = update(value_fn=lambda p: 3 * polynomial(p))
  for name in ('value_fn', 'obj_fn'):
    got = update(**{name: scaled, 'scale': 3, 'other': 0})
    assert_same_bits(got, expected)
  # The base may need `obj_fn`, so it may be given beside `grad_fn`.
  assert_same_bits(
    update(grad_fn=jax.grad(polynomial), obj_fn=None),
    update(grad_fn=jax.grad(polynomial), obj_fn=scaled),
  )
  # Without a signature that can be read, it gets params alone.
  no_signature = jax.tree_util.Partial(polynomial)
  no_signature.__signature__ = 0
  assert_same_bits(update(value_fn=no_signature), update(value_fn=polynomial))


@pytest.mark.parametrize('ascent_steps', [1, 2])
def test_grad_fn_of_any_floating_dtype(params, ascent_steps):
  """Its result is cast to the dtypes of ``grads``."""
  params = optax.tree.cast(params, jnp.bfloat16)
  tx = sharpness_aware(
    ascent.rho_ball(0.5, 0.01, True), ascent_steps=ascent_steps
  )
  grad_fn = lambda p: optax.tree.cast(GRAD_FN(p), jnp.float32)
  grads, state = GRAD_FN(params), tx.init(params)
  got, _ = tx.update(grads, state, params, grad_fn=grad_fn)
  expected, _ = tx.update(grads, state, params, grad_fn=GRAD_FN)
  assert_same_bits(got, expected)


def test_update_by_keyword(params):
  """All that ``update`` takes has a name, and the functions need theirs."""
  tx = sharpness_aware(ascent.rho_ball(0.5, 0.01, True))
  grads, state = GRAD_FN(params), tx.init(params)
  by_name, _ = tx.update(
    updates=grads, state=state, params=params, grad_fn=GRAD_FN
  )
  by_position, _ = tx.update(grads, state, params, grad_fn=GRAD_FN)
  assert_same_bits(by_name, by_position)
  with pytest.raises(TypeError):
    tx.update(grads, state, params, GRAD_FN)


@pytest.mark.parametrize(
  'kwargs', [{}, {'ascent_steps': 3}, {'every_k': 2}], ids=str
)
def test_stateful_ascent(params, kwargs):
  """Its state advances on the clean gradient alone, once an update."""
  schedule = lambda count: 0.1 * (count + 1)
  ema = optax.chain(optax.trace(0.9), ascent.rho_ball(schedule, 0.01, True))
  tx = optax.chain(sharpness_aware(ema, **kwargs), optax.sgd(0.0))
  _, (state, _) = run(tx, params, 3)
  trace, ball = state.ascent_state
  grads = GRAD_FN(params)  # lr = 0: the same at each step
  expected = jax.tree.map(lambda g: g * (1 + 0.9 + 0.81), grads)
  assert error(jax.tree.map(lambda x: x[-1], trace.trace), expected) < 1e-6
  (count,) = jax.tree.leaves(ball)
  assert count.tolist() == [1, 2, 3]


def test_gradients_are_unrolled(params):
  """No loop in the compiled step, however many gradients it takes."""
  tx = asam(optax.sgd(0.1), ascent_steps=3)
  step = lambda p, s: tx.update(GRAD_FN(p), s, p, grad_fn=GRAD_FN)
  jaxpr = str(jax.make_jaxpr(step)(params, tx.init(params)))
  assert not re.search(r'\b(while|scan)\[', jaxpr)


def test_numpy_integers(params):
  """They promote nothing, but must fit in an int32."""

  def updates(n):
    tx = asam(optax.sgd(0.1), ascent_steps=n, every_k=n)
    state = tx.init(params)
    return tx.update(params, state, params, grad_fn=lambda params: params)[0]

  with jax.numpy_dtype_promotion('strict'):
    assert_same_bits(updates(np.int64(2)), updates(2))
  with pytest.raises(ValueError, match='fit in an int32'):
    updates(2**31)


@pytest.mark.parametrize('dtype', [jnp.float64, np.float64, 'float64', float])
def test_perturbed_in_float64(x64, dtype):
  """However it is written, float32 would lose this perturbation."""
  seen = []
  grad_fn = lambda params: seen.append(params) or params
  tx = asam(optax.sgd(0.1), 1e-9, perturbed_dtype=dtype)
  w = jnp.ones(1, jnp.float32)
  tx.update(w, tx.init(w), w, grad_fn=grad_fn)
  assert seen[0] > 1


@pytest.mark.parametrize('every_k', [1, 2])
@pytest.mark.parametrize('perturbed_dtype', [None, jnp.float32])
def test_dtypes_in_low_precision(every_k, perturbed_dtype):
  """Gradients leave in the dtype they came in; w + eps is formed as asked."""
  params = {
    'kernel': jnp.full(4, 1.0, jnp.bfloat16),
    'bias': jnp.full(2, 1.0, jnp.float16),
  }
  dtypes = lambda tree: jax.tree.map(lambda w: w.dtype, tree)
  seen = []

  def grad_fn(params):
    seen.append(params)
    return jax.tree.map(lambda w: 2 * w, params)

  # Float32 scalars promote nothing.
  tx = sharpness_aware(
    ascent.rho_ball(lambda _: jnp.float32(1e-3), jnp.float32(0.0), True),
    every_k=every_k,
    perturbed_dtype=perturbed_dtype,
  )
  grads, state = jax.tree.map(lambda w: 2 * w, params), tx.init(params)
  out, new_state = tx.update(grads, state, params, grad_fn=grad_fn)
  expected = optax.tree.cast(params, perturbed_dtype)
  assert dtypes(seen[0]) == dtypes(expected)
  assert dtypes(out) == dtypes(params)
  assert dtypes(new_state) == dtypes(state)
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
  # NumPy's scalars are float64, of which JAX would warn.
  for number in (float, np.float64):
    grads, perturbed_grads = {'w': number(3.0)}, {'w': number(4.51)}
    for tx in (
      *(looksam(optax.sgd(0.1)), asam(optax.sgd(0.1))),
      *(asam(SGD, descent=f) for f in (descent.gsam(0.0), descent.wsam(0.5))),
    ):
      updates, _ = tx.update(
        grads, tx.init(params), params, grad_fn=lambda _, g=perturbed_grads: g
      )
      np.testing.assert_allclose(updates['w'], -0.451, rtol=1e-6)


class OddState(NamedTuple):
  """A state that contrib.sam's arithmetic breaks on."""

  flag: jax.Array
  key: jax.Array
  count: jax.Array


@pytest.mark.parametrize('every_k', [1, 2])
def test_states_of_any_dtype(params, every_k):
  """Bools, keys and integers in the state of the ascent and of the base."""

  def init(params):
    del params
    return OddState(jnp.array(True), jax.random.key(0), jnp.array(0))

  def update(updates, state, params=None):
    del params
    flag, key, count = state
    return updates, OddState(~flag, jax.random.split(key)[0], count + 1)

  odd = optax.GradientTransformation(init, update)
  tx = optax.chain(
    sharpness_aware(
      optax.chain(odd, ascent.rho_ball(0.5, 0.01, True)), every_k=every_k
    ),
    odd,
    optax.sgd(0.1),
  )
  (result, state), _ = run(tx, params, 3)
  for s in (state[0].ascent_state[0], state[1]):
    assert not s.flag
    assert s.count == 3
  (expected, _), _ = run(asam(optax.sgd(0.1), every_k=every_k), params, 3)
  assert error(result, expected) < 1e-6


@pytest.mark.parametrize(
  'tx',
  [
    *(asam(SGD), looksam(SGD), momentum_asam(SGD)),
    momentum_asam(SGD, momentum=0.9),
  ],
)
def test_donation(params, tx):
  """State and params share no buffer: both may be donated."""
  state = tx.init(params)
  leaves = jax.tree.leaves((params, state))
  pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
  assert len(pointers) == len(leaves)

  def step(params, state):
    updates, state = tx.update(GRAD_FN(params), state, params, grad_fn=GRAD_FN)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  start = params
  for _ in range(2):
    params, state = step(params, state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
