"""Promise: momentum_asam follows its equations, around w, at one gradient."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import eval_params
from optax_asam import momentum_asam
from optax_asam import normalization
from tests.helpers import reference
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

SGD = optax.sgd(0.01, momentum=0.9)
ADAM = optax.adam(0.01)


def make_params(dtype=None):
  """The parameters of ``reference.polynomial``."""
  return {
    'kernel': jnp.asarray([[0.5, -1.0], [2.0, 0.1]], dtype),
    'bias': jnp.asarray([0.3, -0.7], dtype),
  }


def training_step(tx, grad_fn):
  """An ordinary training step."""

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grad_fn(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  return step


def train(tx, params, steps, grad_fn=None):
  """The parameters of the loop, and the state, after some steps."""
  step = training_step(tx, grad_fn or jax.grad(reference.polynomial))
  carry = params, tx.init(params)
  return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])(carry)


def nesterov(g, state, step):
  """An update of SGD with Nesterov momentum, and its state."""
  _, state = reference.sgd(g, state, step)
  return -0.01 * (g + 0.9 * state[0]), state


ELEMENTWISE = reference.elementwise(0.01)


def run_by_hand(
  w,
  steps,
  base,
  rho,
  *,
  p=2,
  operator=ELEMENTWISE,
  perturbed=frozenset({'kernel', 'bias'}),
  beta=None,
):
  """The equations of momentum_asam: w + eps, and w."""
  eps, average = {k: 0 * v for k, v in w.items()}, {}
  states = dict.fromkeys(w)
  for step in range(steps):
    g = reference.polynomial_grad({k: w[k] + eps[k] for k in w})
    made = {k: base(g[k], states[k], step) for k in w}
    w = {k: w[k] + made[k][0] for k in w}
    states = {k: made[k][1] for k in w}
    m = {k: states[k][0] for k in w}
    if beta is not None:
      m = average = {k: beta * average.get(k, 0) + (1 - beta) * g[k] for k in w}
    up = reference.perturbation(
      w, m, operator, rho(step), p, {'kernel'}, perturbed
    )
    eps = {k: -up[k] for k in w}
  return {k: w[k] + eps[k] for k in w}, w


# Each a base, the same by hand, and arguments of `momentum_asam` and by hand.
CASES = {
  'sgd': (SGD, reference.sgd, {}, {}),
  'nesterov': (
    optax.sgd(0.01, momentum=0.9, nesterov=True),
    nesterov,
    {},
    {},
  ),
  'adam': (ADAM, reference.adam, {}, {}),
  'p = inf': (
    ADAM,
    reference.adam,
    {'ord': np.inf, 'rho': 0.01},
    {'p': np.inf},
  ),
  'p = 3': (SGD, reference.sgd, {'ord': 3}, {'p': 3}),
  'eta': (
    SGD,
    reference.sgd,
    {'eta': 0.2},
    {'operator': reference.elementwise(0.2)},
  ),
  'layerwise': (
    SGD,
    reference.sgd,
    # With a larger rho, rounding errors grow a thousandfold in ten steps.
    {'adaptive': normalization.layerwise(0.2), 'rho': 0.01},
    {'operator': reference.layerwise(0.2)},
  ),
  'not adaptive': (
    SGD,
    reference.sgd,
    {'adaptive': False},
    {'operator': reference.ones},
  ),
  'mask': (
    SGD,
    reference.sgd,
    {'mask': {'kernel': True, 'bias': False}},
    {'perturbed': {'kernel'}},
  ),
  'momentum': (ADAM, reference.adam, {'momentum': 0.7}, {'beta': 0.7}),
  'schedule': (
    SGD,
    reference.sgd,
    {'rho': lambda step: 0.01 * (step % 7)},
    {},
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_reference(x64, name):
  """One hundred steps by hand, in NumPy."""
  base_tx, base, options, by_hand = CASES[name]
  options = {'rho': 0.1, **options}
  params = make_params()
  tx = momentum_asam(base_tx, **options)
  got = train(tx, params, 100)
  rho = options['rho']
  expected, clean = run_by_hand(
    {k: np.asarray(w) for k, w in params.items()},
    100,
    base,
    rho if callable(rho) else lambda step: rho,
    **by_hand,
  )
  tolerance = 1e-10 if base is not reference.adam else 1e-8
  assert error(got[0], expected) < tolerance
  assert error(eval_params(got[1], got[0]), clean) < tolerance
  masked = jax.tree.leaves(
    (got[1].perturbation, got[1].momentum),
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  copies = 1 + ('momentum' in options)
  assert len(masked) == 2 * copies
  selected = len(by_hand.get('perturbed', params))
  assert len(jax.tree.leaves(masked)) == copies * selected


# Optax's optimizers that average gradients, and in which field.
FOUND = {
  'sgd': SGD,
  'float16': optax.adam(0.01, mu_dtype=jnp.float16),
  'nesterov': optax.sgd(0.1, momentum=0.5, nesterov=True),
  'bfloat16': optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
  'adam': ADAM,
  'adamw': optax.adamw(0.01),
  'nadam': optax.nadam(0.01),
  'nadamw': optax.nadamw(0.01),
  'lion': optax.lion(0.01),
  'adabelief': optax.adabelief(0.01),
  'radam': optax.radam(0.01),
  'lamb': optax.lamb(0.01),
  'yogi': optax.yogi(0.01),
  'amsgrad': optax.amsgrad(0.01),
  'adamax': optax.adamax(0.01),
  'adamaxw': optax.adamaxw(0.01),
  'chain': optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.clip(1.0),
    optax.add_decayed_weights(1e-4),
    SGD,
  ),
  'inject_hyperparams': optax.inject_hyperparams(optax.adamw)(
    learning_rate=optax.linear_schedule(0.0, 0.01, 10)
  ),
  'apply_if_finite': optax.apply_if_finite(ADAM, 3),
  'reduce_on_plateau': optax.chain(SGD, optax.contrib.reduce_on_plateau()),
}
LABELS = {'kernel': 'a', 'bias': 'b'}
PRECONDITIONERS = (
  optax.scale_by_rms,
  optax.scale_by_rss,
  optax.scale_by_trust_ratio,
)
NOT_FOUND = {
  'no momentum': optax.sgd(0.1),
  'muon': optax.contrib.muon(0.01),
  'partition': optax.partition({'a': SGD, 'b': ADAM}, LABELS),
  'lars': optax.lars(0.1),
  'rmsprop': optax.rmsprop(0.1, momentum=0.9),
  'two': optax.chain(optax.scale_by_adam(), optax.trace(0.9)),
  'adan': optax.adan(0.1),
  'ademamix': optax.contrib.ademamix(0.1),
  'prodigy': optax.contrib.prodigy(0.1),
  'schedule_free': optax.contrib.schedule_free_adamw(0.1),
  'sm3': optax.sm3(0.1),
  'novograd': optax.novograd(0.1),
  **{
    f'trace after {before.__name__}': optax.chain(
      before(), optax.trace(0.9), optax.scale(-0.1)
    )
    for before in PRECONDITIONERS
  },
  'maximize': optax.chain(optax.scale(-1.0), SGD),
  'MultiSteps': optax.MultiSteps(SGD, 2).gradient_transformation(),
  'needs arguments': optax.chain(
    optax.scale_by_backtracking_linesearch(3), SGD
  ),
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=[pytest.mark.slow]
      * (name not in ('sgd', 'adamw', 'lamb', 'reduce_on_plateau', 'yogi')),
    )
    for name in FOUND
  ],
)
def test_without_a_perturbation(name):
  """With rho = 0, updates are those of the base, bit for bit.

  Eager and compiled, and for a gradient of -0.0, too.
  """
  base_tx = FOUND[name]
  if name == 'reduce_on_plateau' and not hasattr(optax, 'microbatching'):
    pytest.skip('earlier, its cond could not be evaluated while tracing')
  extra_args = {'value': 1.0} if name == 'reduce_on_plateau' else {}
  tx = momentum_asam(base_tx, 0.0)
  base_tx = optax.with_extra_args_support(base_tx)
  params = {'mu': make_params()}  # a name of Optax's states
  if name == 'lamb':
    # Of a smaller matrix, the XLA of JAX 0.10 adds up a norm in another order
    # if a subtraction is fused into it.
    params['mu']['kernel'] = jnp.sin(jnp.arange(48.0)).reshape(6, 8)
  state, base_state = jax.jit(tx.init)(params), base_tx.init(params)
  assert_same_bits(state.perturbation, jax.tree.map(jnp.zeros_like, params))
  update = jax.jit(tx.update)
  base_update = jax.jit(base_tx.update)
  for i in range(3):
    grads = jax.tree.map(lambda w: jnp.sin(7 * w + i), params)  # noqa: B023
    # With Nesterov's momentum, the second is -0.0 on the second update.
    grads['mu']['bias'] = jnp.array([-0.0, (-3.0, 0.5, 1.0)[i]])
    if i == 2:
      update, base_update = tx.update, base_tx.update
    updates, state = update(grads, state, params, **extra_args)
    expected, _ = base_update(grads, base_state, params, **extra_args)
    assert_same_bits(updates, expected)
    params = optax.apply_updates(params, updates)
    assert_same_bits(eval_params(state, params), params)
    base_state = state.base_state


@pytest.mark.parametrize('name', NOT_FOUND)
def test_no_momentum(name):
  """In doubt, ``init`` says what to write, and that works."""
  base_tx, params = NOT_FOUND[name], make_params()
  with pytest.raises(ValueError, match=r'momentum=0\.9'):
    momentum_asam(base_tx).init(params)
  state = jax.eval_shape(momentum_asam(base_tx, momentum=0.9).init, params)
  assert jax.tree.structure(state.momentum) == jax.tree.structure(params)


def test_traced_decay():
  """Its value is not looked at, and the error of another update is shown."""
  params = make_params()
  init = lambda decay: momentum_asam(optax.sgd(0.1, decay)).init(params)
  expected = momentum_asam(SGD).init(params)
  assert_same_bits(jax.jit(init)(0.9), expected)
  assert jnp.shape(jax.vmap(init)(jnp.ones(2)).perturbation['bias'])[0] == 2
  with pytest.raises(ValueError, match=r'small arrays failed \(\w+: .+\)'):
    momentum_asam(NOT_FOUND['needs arguments']).init(params)


@pytest.mark.parametrize(
  'before', [optax.adaptive_grad_clip(0.01), optax.clip(1e-3)]
)
def test_clipping_inside(before):
  """However small the bound, what is kept is an average of gradients."""
  for dtype in ('float32', 'bfloat16'):
    params = jax.tree.map(lambda w: w.astype(dtype), make_params())  # noqa: B023
    momentum_asam(optax.chain(before, SGD)).init(params)


def test_frozen_inside():
  """The momentum of parameters that are masked out does not count."""
  frozen, trained = ({'kernel': x, 'bias': not x} for x in (True, False))
  base_tx = optax.chain(optax.masked(optax.set_to_zero(), frozen), ADAM)
  tx = momentum_asam(base_tx, mask=trained)
  state = tx.init(make_params())
  assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)
  assert jax.tree.structure(state.perturbation) == jax.tree.structure(
    {'kernel': optax.MaskedNode(), 'bias': 0}
  )


def test_momentum_of_arrays():
  """Parameters may be a single array, which has a method ``trace``, or none."""
  (w, state) = train(
    momentum_asam(SGD, 0.5), jnp.eye(2), 2, lambda w: jnp.ones_like(w)
  )
  assert jnp.abs(w - eval_params(state, w)).max() > 0.1
  momentum_asam(SGD).init({})
  momentum_asam(SGD).init({'w': jnp.zeros((0, 3))})


@pytest.mark.parametrize(
  ('dtype', 'momentum'),
  [('float32', None), ('float32', 0.9), ('bfloat16', None), ('float16', None)],
)
def test_drift(dtype, momentum):
  """At learning rate 0, w stays: what is stored is what was realized."""
  base_tx = optax.sgd(0.0, momentum=0.9)
  tx = momentum_asam(base_tx, rho=0.5, momentum=momentum)
  rng = np.random.default_rng(0)
  params = {
    'kernel': jnp.asarray(rng.standard_normal((32, 16)) ** 3, dtype),
    'bias': jnp.asarray(0.01 * rng.standard_normal(8), dtype),
  }
  noise = {
    name: jnp.asarray(rng.standard_normal((64, *w.shape)), dtype)
    for name, w in params.items()
  }

  def step(carry, i):
    params, state = carry
    grads = jax.tree.map(lambda x: x[i % 64], noise)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = params, tx.init(params)
  many = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(10_000))[0])
  after, state = many(carry)
  assert error(eval_params(state, after), params) < 1e-5
  for name, e in state.perturbation.items():
    assert e.dtype == jnp.float32
    assert after[name].dtype == dtype
    assert jnp.abs(e).max() > 1e-3 * jnp.abs(params[name]).max()
  # A step that is not in a loop, with donation, rounds in the same way.
  step = jax.jit(step, donate_argnums=0)
  carry = jax.tree.map(jnp.copy, (after, state))
  for i in range(100):
    carry, _ = step(carry, i)
  assert error(eval_params(carry[1], carry[0]), params) < 1e-5


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_clean_parameters_follow_the_base(dtype):
  """In the dtype of the parameters: exactly in 16 bits."""
  rng = np.random.default_rng(0)
  draw = lambda: {'w': jnp.asarray(rng.standard_normal((16, 8)), dtype)}
  base_tx = optax.adam(0.01)
  tx = momentum_asam(base_tx, rho=0.5)
  params, base_update = draw(), jax.jit(base_tx.update)
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(20):
    clean, grads = eval_params(state, params), draw()
    step, _ = base_update(grads, state.base_state, clean)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    expected = optax.apply_updates(clean, step)
    if dtype == jnp.float32:
      assert error(eval_params(state, params), expected) < 1e-6
    else:
      assert_same_bits(eval_params(state, params), expected)
  assert error(params, clean) > 0.01


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_non_finite_gradients(value):
  """They are left out of the average, and reach the base."""
  params = make_params()
  base_tx = optax.apply_if_finite(SGD, 3)
  tx = momentum_asam(base_tx, 0.5, momentum=0.9)
  params, state = train(tx, params, 3)
  bad = {'kernel': jnp.ones((2, 2)), 'bias': jnp.array([value, 1.0])}
  updates, after = jax.jit(tx.update)(bad, state, params)
  assert_same_bits(after.momentum, state.momentum)
  assert after.base_state.total_notfinite == 1
  moved = optax.apply_updates(params, updates)
  assert error(eval_params(after, moved), eval_params(state, params)) < 1e-6
  # Without it, as by the base alone: nothing is hidden.
  tx = momentum_asam(SGD, 0.5)
  params, state = train(tx, make_params(), 3)
  updates, _ = tx.update(bad, state, params)
  assert not np.isfinite(updates['bias'][0])
  assert np.isfinite(updates['kernel']).all()


@pytest.mark.parametrize('value', [0.0, 1e-30, 1e30])
@pytest.mark.parametrize('ord', [2, 3])
def test_no_direction(value, ord):
  """Where the norm of the momentum has none, w takes the step of the base."""
  params = make_params()
  grads = jax.tree.map(lambda w: jnp.full_like(w, value), params)
  tx = momentum_asam(optax.sgd(1e-30, momentum=0.9), 0.5, ord=ord)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  is_lost = value == 0 or ord == 2  # p = 3 divides by the largest first.
  assert any(e.any() for e in jax.tree.leaves(state.perturbation)) != is_lost
  looped = optax.apply_updates(params, updates)
  expected = jax.tree.map(lambda w: w - np.float32(1e-30) * value, params)
  assert error(eval_params(state, looped), expected) < 1e-6


STATIC_ARGS = ('base_tx', 'adaptive', 'ord', 'mask')
AROUND = {
  'chain': lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
  'named_chain': lambda tx: optax.named_chain(('tx', tx)),
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'inject_hyperparams': lambda tx: optax.inject_hyperparams(
    momentum_asam, static_args=STATIC_ARGS
  )(SGD, 0.5, 0.01, True, momentum=0.9),
}


@pytest.mark.parametrize('name', AROUND)
def test_eval_params(name):
  """The state is found in that of any wrapper."""
  tx = AROUND[name](momentum_asam(SGD, 0.5))
  params, state = train(tx, make_params(), 3)
  clean = eval_params(state, params)
  assert error(clean, params) > 1e-2
  plain, plain_state = train(
    momentum_asam(
      optax.chain(optax.clip_by_global_norm(1.0), SGD)
      if name == 'chain'
      else SGD,
      0.5,
      momentum=0.9 if name == 'inject_hyperparams' else None,
    ),
    make_params(),
    3,
  )
  assert error(clean, eval_params(plain_state, plain)) < 1e-6
  with pytest.raises(ValueError, match='contains 0'):
    eval_params(SGD.init(params), params)
  with pytest.raises(ValueError, match='contains 2'):
    eval_params((state, state), params)
  with pytest.raises(ValueError, match='contains 0'):
    eval_params(state, params['kernel'])


def test_eval_params_of_frameworks():
  """Flax's ``TrainState`` and ``nnx.Optimizer`` are taken as they are."""
  nnx = pytest.importorskip('flax.nnx')
  train_state = pytest.importorskip('flax.training.train_state')
  tx = momentum_asam(optax.adam(0.1), 0.5)
  ts = train_state.TrainState.create(apply_fn=None, params=make_params(), tx=tx)
  ts = ts.apply_gradients(grads=jax.grad(reference.polynomial)(ts.params))
  expected = eval_params(ts.opt_state, ts.params)
  assert error(expected, ts.params) > 1e-2
  assert_same_bits(eval_params(ts, ts.params), expected)

  class Model(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(make_params()['kernel'])
      self.bias = nnx.Param(make_params()['bias'])

  def arrays(model):
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return dict(zip(('bias', 'kernel'), leaves, strict=True))

  loss_fn = lambda model: reference.polynomial(arrays(model))

  model = Model()
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(loss_fn)(model)
    if 'model' in inspect.signature(optimizer.update).parameters:
      optimizer.update(model, grads)
    else:
      optimizer.update(grads)

  step(model, optimizer)
  if hasattr(nnx, 'to_pure_dict'):
    pure = nnx.to_pure_dict(nnx.state(optimizer)['opt_state'])
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert error(dict(eval_params(pure, params)), expected) < 1e-6
  nnx.update(model, eval_params(optimizer, nnx.state(model, nnx.Param)))
  assert error(arrays(model), expected) < 1e-6


def test_eval_params_of_dictionaries():
  """A state that was saved without its types, and without what is masked."""
  serialization = pytest.importorskip('flax.serialization')
  params = {'perturbation': make_params(), 'mu': make_params()}
  tx = momentum_asam(SGD, 0.5, mask={'perturbation': True, 'mu': False})
  grads = jax.tree.map(jnp.sin, params)
  updates, state = tx.update(grads, tx.init(params), params)
  looped = optax.apply_updates(params, updates)
  clean = eval_params(state, looped)
  assert error(clean['perturbation'], looped['perturbation']) > 1e-2
  assert_same_bits(clean['mu'], looped['mu'])
  saved = serialization.to_state_dict(state)
  assert_same_bits(eval_params(saved, looped), clean)


def test_eval_params_of_layers():
  """Layers may be called ``value``, and be in a list that became a dict."""
  serialization = pytest.importorskip('flax.serialization')
  params = {
    'dense': jnp.array([1.0, 2.0]),
    'value': {'dense': jnp.array([3.0, 5.0])},
    'stack': [jnp.ones(2), jnp.ones(3)],
  }
  tx = momentum_asam(SGD, 0.5)
  updates, state = tx.update(params, tx.init(params), params)
  looped = optax.apply_updates(params, updates)
  clean = jax.tree.map(jnp.subtract, looped, state.perturbation)
  assert error(clean, looped) > 1e-2
  assert_same_bits(eval_params(state, looped), clean)
  saved = serialization.to_state_dict(state)
  assert_same_bits(eval_params(saved, looped), clean)


def test_eval_params_by_name():
  """Not of two leaves that differ in the name of a wrapper; or of no leaf."""
  params = {'value': jnp.ones(2), 'raw_value': jnp.zeros(2)}
  with pytest.raises(ValueError, match='two leaves of one name'):
    eval_params(momentum_asam(SGD).init(params), params)
  assert eval_params(momentum_asam(SGD).init({}), {}) == {}


def test_float8():
  """Without gradients, every finite parameter stays as it is."""
  params = jnp.arange(256, dtype=jnp.uint8).view(jnp.float8_e4m3fn)
  params = params[jnp.isfinite(params.astype(jnp.float32))]
  tx = momentum_asam(SGD, 0.5)
  grads = jnp.zeros_like(params)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  looped = optax.apply_updates(params, updates)
  assert_same_bits(looped, params)
  assert_same_bits(eval_params(state, looped), params)


def test_under_vmap():
  """Several seeds are trained at once."""
  tx = momentum_asam(SGD, 0.5)
  params = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), make_params())
  step = training_step(tx, jax.grad(reference.polynomial))

  def run(params):
    return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

  one = jax.jit(run)(make_params())
  got = jax.tree.map(lambda w: w[0], jax.jit(jax.vmap(run))(params))
  assert error(got, one) < 1e-5


def factory(learning_rate):
  """The optimizer, in the form that Optax's tests need."""
  default = inspect.signature(momentum_asam).parameters['rho'].default
  rho = optax.linear_schedule(default, 0.0, 20_000)
  return momentum_asam(optax.sgd(learning_rate, momentum=0.9), rho)


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('test_optimizers_accept_extra_args', {'wrap': True}),
    *[
      ('test_optimizers', {'target': target, 'dtype': 'float32'})
      for target in ('parabola', 'rosenbrock', 'mixed_tensor_target')
    ],
    ('test_optimizers_can_be_wrapped_in_inject_hyperparams', {}),
    *[
      (name, {'dtype': dtype})
      for name in (
        'test_preserve_dtype',
        'test_state_shape_dtype_shard_stability',
      )
      for dtype in ('float32', 'bfloat16')
    ],
  ],
)
def test_optax_suite(monkeypatch, name, options):
  """Optax's own tests of contributed optimizers pass with the default rho.

  It decays to zero: they look at the parameters of the loop.
  """
  common = pytest.importorskip('optax.contrib._common_test')
  test = getattr(common.ContribTest, f'{name}0', None)
  if test is None:
    pytest.skip('in this Optax there is no such test')
  monkeypatch.setattr(common.contrib, 'momentum_asam', factory, raising=False)
  if 'target' in options:
    target = getattr(common, f'_setup_{options["target"]}')
    options = {**options, 'target': target}
  inspect.unwrap(test)(
    common.ContribTest(f'{name}0'),
    opt_name='momentum_asam',
    opt_kwargs={'learning_rate': 1e-3},
    wrapper_name=None,
    wrapper_kwargs=None,
    **options,
  )


def test_masked_around():
  """What hides parameters belongs inside."""
  tx = optax.masked(momentum_asam(SGD), {'kernel': True, 'bias': False})
  with pytest.raises(ValueError, match='Put it inside'):
    tx.init(make_params())
  tx = momentum_asam(SGD, adaptive=normalization.layerwise())
  with pytest.raises(ValueError, match='params must be given'):
    tx.update(make_params(), tx.init(make_params()))
