"""Promise: combinations that others fell into do what the docs say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import normalization
from support import assert_same_bits
from support import error

# The snippet to copy from the docs.
STATIC_ARGS = (
  'base_tx',
  'adaptive',
  'ord',
  'mask',
  'ascent_steps',
  'every_k',
  'descent',
  'perturbed_dtype',
)


def loss_fn(params, x):
  """The loss of a dense layer on a batch [n, 3]."""
  h = jnp.tanh(x @ params['kernel']) + params['bias']
  return (h**2).mean()


@pytest.fixture
def x():
  """Inputs: four micro-batches of two."""
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.standard_normal((4, 2, 3)), jnp.float32)


def update(tx, state, params, x):
  """One update on a batch."""
  grad_fn = lambda params: jax.grad(loss_fn)(params, x)
  return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)


def only_update(tx, params, x):
  """The updates of a fresh state."""
  return update(tx, tx.init(params), params, x)[0]


def test_multi_steps_inside(params, x):
  """Asam(MultiSteps(base)): a perturbation a micro-batch, then their mean."""
  base = optax.sgd(0.1, momentum=0.9)
  tx = asam(optax.MultiSteps(base, 4).gradient_transformation())
  state = tx.init(params)
  for micro_batch in x:
    updates, state = update(tx, state, params, micro_batch)
  extract = asam(optax.scale(1.0))
  each = [only_update(extract, params, micro_batch) for micro_batch in x]
  mean = jax.tree.map(lambda *g: sum(g) / 4, *each)
  expected, _ = base.update(mean, base.init(params), params)
  assert error(updates, expected) < 1e-6


def test_multi_steps_around(params, x):
  """MultiSteps(asam) takes g~ from the last micro-batch alone: documented."""
  tx = optax.MultiSteps(asam(optax.scale(1.0)), 4)
  state = tx.init(params)
  for micro_batch in x:
    updates, state = update(tx, state, params, micro_batch)
  mean = jax.grad(loss_fn)(params, x.reshape(-1, 3))
  last = lambda p: jax.grad(loss_fn)(p, x[-1])
  inner = asam(optax.scale(1.0))
  of_last, _ = inner.update(mean, inner.init(params), params, grad_fn=last)
  whole = only_update(inner, params, x.reshape(-1, 3))
  assert error(updates, of_last) < 1e-6
  assert error(updates, whole) > 1e-2


def test_microbatching_inside_grad_fn(params, x):
  """One perturbation for the whole batch, with the memory of a micro-batch."""
  microbatching = pytest.importorskip('optax.microbatching')
  whole = x.reshape(-1, 3)
  grad = microbatching.microbatch(
    jax.grad(loss_fn),
    argnums=1,
    microbatch_size=2,
    accumulator=microbatching.AccumulationType.MEAN,
  )
  tx = asam(optax.sgd(0.1))
  grad_fn = lambda params: grad(params, whole)
  updates, _ = tx.update(
    grad_fn(params), tx.init(params), params, grad_fn=grad_fn
  )
  assert error(updates, only_update(tx, params, whole)) < 1e-6


def test_partition_inside(params, x):
  """Frozen leaves: asam around partition, with a mask for the ascent."""
  labels = {'kernel': 'train', 'bias': 'freeze'}
  trainable = {'kernel': True, 'bias': False}
  base = optax.partition(
    {'train': optax.sgd(0.1), 'freeze': optax.set_to_zero()}, labels
  )
  updates = only_update(asam(base, mask=trainable), params, x[0])
  alone = asam(optax.sgd(0.1))
  grad_fn = lambda kernel: jax.grad(loss_fn)({**params, **kernel}, x[0])
  kernel_only = lambda kernel: {'kernel': grad_fn(kernel)['kernel']}
  kernel = {'kernel': params['kernel']}
  expected, _ = alone.update(
    kernel_only(kernel), alone.init(kernel), kernel, grad_fn=kernel_only
  )
  assert error(updates['kernel'], expected['kernel']) < 1e-6
  assert_same_bits(updates['bias'], jnp.zeros(2))


def test_masked_inside(params, x):
  """The base may be masked; the gradient function sees all parameters."""
  base = optax.chain(
    optax.masked(
      optax.add_decayed_weights(0.1), {'kernel': True, 'bias': False}
    ),
    optax.sgd(0.1),
  )
  updates = only_update(asam(base), params, x[0])
  plain = only_update(asam(optax.sgd(0.1)), params, x[0])
  decay = {'kernel': 0.01 * params['kernel'], 'bias': jnp.zeros(2)}
  assert error(updates, optax.tree.sub(plain, decay)) < 1e-6


@pytest.mark.parametrize('where', ['clean', 'perturbed'])
def test_apply_if_finite(params, where):
  """Inside, it sees what NaN there is; around, the incoming gradient alone."""
  grads = jax.tree.map(jnp.ones_like, params)
  nan = jax.tree.map(lambda w: w * jnp.nan, params)
  clean, perturbed = (nan, nan) if where == 'clean' else (grads, nan)

  def step(tx):
    updates, state = tx.update(
      clean, tx.init(params), params, grad_fn=lambda _: perturbed
    )
    finite = all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    return finite, optax.tree.get(state, 'notfinite_count')

  inside = asam(optax.apply_if_finite(optax.sgd(0.1), 3))
  assert step(inside) == (True, 1)
  around = optax.apply_if_finite(asam(optax.sgd(0.1)), 3)
  finite, count = step(around)
  if where == 'clean':
    assert (finite, count) == (True, 1)
  else:  # What the docs warn of: the updates are NaN.
    assert (finite, count) == (False, 0)


def test_clipping_belongs_inside(params, x):
  """Before asam it shapes the ascent alone, inside the descent gradient."""
  norm = lambda tx: optax.tree.norm(only_update(tx, params, x[0]))
  clip = optax.clip_by_global_norm(0.01)
  plain = norm(asam(optax.sgd(1.0)))
  assert plain > 0.1
  np.testing.assert_allclose(
    norm(optax.chain(clip, asam(optax.sgd(1.0)))), plain, rtol=1e-5
  )
  np.testing.assert_allclose(
    norm(asam(optax.chain(clip, optax.sgd(1.0)))), 0.01, rtol=1e-5
  )


def test_weight_decay_belongs_inside(params, x):
  """Before asam it is lost in the perturbation."""
  decay = optax.add_decayed_weights(0.5)
  inside = only_update(asam(optax.chain(decay, optax.sgd(0.1))), params, x[0])
  plain = only_update(asam(optax.sgd(0.1)), params, x[0])
  expected = jax.tree.map(lambda u, w: u - 0.05 * w, plain, params)
  assert error(inside, expected) < 1e-6
  before = only_update(optax.chain(decay, asam(optax.sgd(0.1))), params, x[0])
  assert error(before, expected) > 1e-2


@pytest.mark.parametrize(
  'kwargs', [{}, {'adaptive': normalization.layerwise(0.2), 'every_k': 2}]
)
def test_inject_hyperparams(params, x, kwargs):
  """With static_args it is asam, and a new rho or eta works at once."""
  injected = optax.inject_hyperparams(asam, static_args=STATIC_ARGS)
  tx = injected(optax.sgd(0.1), rho=0.3, eta=0.05, **kwargs)
  state = tx.init(params)
  assert set(state.hyperparams) == {'rho', 'eta'}
  step = jax.jit(lambda state: update(tx, state, params, x[0]))
  plain = only_update(asam(optax.sgd(0.1), 0.3, 0.05, **kwargs), params, x[0])
  assert error(step(state)[0], plain) < 1e-6
  state.hyperparams['rho'] = jnp.float32(0.6)
  state.hyperparams['eta'] = jnp.float32(0.1)
  plain = only_update(asam(optax.sgd(0.1), 0.6, 0.1, **kwargs), params, x[0])
  assert error(step(state)[0], plain) < 1e-6
  assert step._cache_size() == 1


def test_inject_hyperparams_with_a_schedule(params, x):
  """It evaluates the schedule of rho at each step."""
  injected = optax.inject_hyperparams(asam, static_args=STATIC_ARGS)
  tx = injected(optax.sgd(0.1), rho=lambda count: 0.1 * (count + 1))
  state = tx.init(params)
  for rho in (0.1, 0.2, 0.3):
    updates, state = update(tx, state, params, x[0])
    plain = only_update(asam(optax.sgd(0.1), rho), params, x[0])
    assert error(updates, plain) < 1e-6


def test_map_params(params):
  """It calls init with a placeholder that has no leaves."""
  tx = asam(optax.adam(0.1))
  state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
  assert_same_bits(state[1][0].mu, jax.tree.map(jnp.ones_like, params))
  assert state[0].step == 0


def test_tree_get(params, x):
  """Our count and value are found by name beside Adam's state."""
  tx = asam(optax.adam(0.1))
  _, state = update(tx, tx.init(params), params, x[0])
  assert optax.tree.get(state, 'step') == 1
  assert jnp.isnan(optax.tree.get(state, 'perturbed_value'))


@pytest.mark.parametrize(
  'base',
  [
    optax.lbfgs,
    lambda: optax.chain(
      optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)
    ),
  ],
)
def test_line_search_needs_value_fn(params, x, base):
  """With value_fn it lowers the clean loss; grad_fn it rejects."""
  value_fn = lambda params: loss_fn(params, x[0])
  tx = asam(base(), rho=0.05)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(value_fn)(params)
    updates, state = tx.update(
      grads, state, params, value=value, grad=grads, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  first = value_fn(params)
  for _ in range(5):
    params, state = step(params, state)
  assert value_fn(params) < 0.9 * first
  value, grads = jax.value_and_grad(value_fn)(params)
  with pytest.raises(TypeError):
    tx.update(
      grads, state, params, value=value, grad=grads, grad_fn=jax.grad(value_fn)
    )


def test_none_in_params():
  """Parameters that hold None, as Equinox's filtered modules do."""
  params = {'w': jnp.ones(2), 'activation': None}
  tx = asam(optax.sgd(0.1))
  grad_fn = jax.grad(lambda p: (p['w'] ** 2).sum())
  updates, _ = tx.update(
    grad_fn(params), tx.init(params), params, grad_fn=grad_fn
  )
  assert updates['activation'] is None
  assert (updates['w'] < -0.2).all()


def test_two_steps_chosen_in_python(params, x):
  """The way to every_k on CPU: two estimators, one optimizer."""
  base = optax.sgd(0.1, momentum=0.9)
  estimators = optax_asam.value_and_grad(loss_fn), jax.value_and_grad(loss_fn)
  chosen, base_state = params, base.init(params)
  tx = asam(base, every_k=2)
  expected, state = params, tx.init(params)
  for i in range(4):
    _, grads = estimators[i % 2](chosen, x[i])
    updates, base_state = base.update(grads, base_state, chosen)
    chosen = optax.apply_updates(chosen, updates)
    updates, state = update(tx, state, expected, x[i])
    expected = optax.apply_updates(expected, updates)
  assert error(chosen, expected) < 1e-5
