"""Promise: the framework examples train, and their steps are ASAM.

The reference is two plain passes of an example's loss function, with NumPy
between them.
"""

from collections.abc import Callable
import functools
import pathlib
import re
from typing import NamedTuple

import equinox as eqx
from flax import nnx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import fine_tune
from examples.frameworks import train_equinox
from examples.frameworks import train_haiku
from examples.frameworks import train_linen
from examples.frameworks import train_nnx
from tests.helpers import pages
from tests.helpers import reference
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

LEARNING_RATE, MOMENTUM = 0.05, 0.9
TX = optax.sgd(LEARNING_RATE, MOMENTUM)
CODE = pages.blocks(pages.read_page('frameworks'))


class Program(NamedTuple):
  """An example behind one interface.

  Attributes:
    start: from weights to the state before the first step.
    step: the example's, from state, batch and key to the next state and loss.
    read: from a state to its parameters and to what a pass changes.
    plain_pass: from parameters, state, batch and key to what ``jax.grad`` of
      the loss function gives, ``((loss, what the pass changes), grads)``.
  """

  start: Callable
  step: Callable
  read: Callable
  plain_pass: Callable


def linen(dropout_rate):
  """The state is a TrainState."""

  def start(weights):
    return train_linen.TrainState.create(
      apply_fn=train_linen.Network(dropout_rate).apply,
      params={
        'Conv_0': {
          'kernel': weights['conv_kernel'],
          'bias': weights['conv_bias'],
        },
        'BatchNorm_0': {'scale': weights['scale'], 'bias': weights['shift']},
        'Dense_0': {
          'kernel': weights['dense_kernel'],
          'bias': weights['dense_bias'],
        },
      },
      batch_stats={'BatchNorm_0': {'mean': np.zeros(4), 'var': np.ones(4)}},
      tx=TX,
    )

  @jax.jit
  def plain_pass(params, state, batch, key):
    return jax.value_and_grad(train_linen.loss_fn, has_aux=True)(
      params, state, *batch, key
    )

  return Program(
    start,
    lambda state, batch, key: train_linen.train_step(state, *batch, key),
    lambda state: (state.params, state.batch_stats),
    plain_pass,
  )


def nnx_(dropout_rate):
  """The state is a network, which has its own keys, and an optimizer."""
  value_and_grad_fn = nnx.jit(nnx.value_and_grad(train_nnx.loss_fn))

  def start(weights):
    network = train_nnx.Network(dropout_rate, rngs=nnx.Rngs(0))
    params = {
      'conv': {'kernel': weights['conv_kernel'], 'bias': weights['conv_bias']},
      'norm': {'scale': weights['scale'], 'bias': weights['shift']},
      'dense': {
        'kernel': weights['dense_kernel'],
        'bias': weights['dense_bias'],
      },
    }
    nnx.update(network, params)
    nnx.update(network, {'norm': {'mean': np.zeros(4), 'var': np.ones(4)}})
    return network, nnx.Optimizer(network, TX, wrt=nnx.Param)

  def step(state, batch, key):
    del key
    return state, train_nnx.train_step(*state, *batch)

  def read(state):
    params, statistics, counts, _ = nnx.state(
      state[0], nnx.Param, nnx.BatchStat, nnx.RngCount, ...
    )
    # Copies of the variables, which the next step changes.
    return jax.tree.map(jnp.asarray, (params, (statistics, counts)))

  def plain_pass(params, state, batch, key):
    del key
    network = nnx.clone(state[0])
    nnx.update(network, params)
    loss, grads = value_and_grad_fn(network, *batch)
    return (loss, read((network,))[1]), grads

  return Program(start, step, read, plain_pass)


def equinox(dropout_rate):
  """Images and kernels have their channels first."""
  value_and_grad_fn = eqx.filter_jit(
    eqx.filter_value_and_grad(train_equinox.loss_fn, has_aux=True)
  )

  def start(weights):
    network, state = eqx.nn.make_with_state(train_equinox.Network)(
      dropout_rate, key=jax.random.key(0)
    )
    dense_kernel = weights['dense_kernel'].reshape(8, 8, 4, 10)
    network = eqx.tree_at(
      lambda network: [
        array
        for layer in (network.conv, network.norm, network.dense)
        for array in (layer.weight, layer.bias)
      ],
      network,
      [
        weights['conv_kernel'].transpose(3, 2, 0, 1),
        weights['conv_bias'].reshape(4, 1, 1),
        weights['scale'],
        weights['shift'],
        dense_kernel.transpose(3, 2, 0, 1).reshape(10, -1),
        weights['dense_bias'],
      ],
    )
    state = state.set(
      network.norm.batch_state_index, (jnp.zeros(4), jnp.ones(4))
    )
    params = eqx.filter(network, eqx.is_inexact_array)
    return network, state, train_equinox.tx.init(params)

  def channels_first(batch):
    return jnp.moveaxis(batch[0], -1, 1), batch[1]

  def step(state, batch, key):
    *state, loss = train_equinox.train_step(*state, *channels_first(batch), key)
    return tuple(state), loss

  def read(state):
    return eqx.filter(state[0], eqx.is_inexact_array), state[1]

  def plain_pass(params, state, batch, key):
    network = eqx.combine(params, state[0])
    return value_and_grad_fn(network, state[1], *channels_first(batch), key)

  return Program(start, step, read, plain_pass)


def haiku(dropout_rate):
  """The network is global in the example."""
  forward = functools.partial(train_haiku.forward, dropout_rate=dropout_rate)
  network = hk.transform_with_state(forward)

  def with_network(function):
    def patched(*args):
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_haiku, 'network', network)
        return function(*args)

    return jax.jit(patched)

  train_step = with_network(train_haiku.train_step.__wrapped__)
  value_and_grad_fn = with_network(
    jax.value_and_grad(train_haiku.loss_fn, has_aux=True)
  )

  def start(weights):
    params = {
      'conv2_d': {'w': weights['conv_kernel'], 'b': weights['conv_bias']},
      'batch_norm': {
        'scale': weights['scale'].reshape(1, 1, 1, 4),
        'offset': weights['shift'].reshape(1, 1, 1, 4),
      },
      'linear': {'w': weights['dense_kernel'], 'b': weights['dense_bias']},
    }
    images = np.zeros((1, 8, 8, 1), weights['scale'].dtype)
    _, state = network.init(jax.random.key(0), images, train=True)
    return params, state, train_haiku.tx.init(params)

  def step(state, batch, key):
    *state, loss = train_step(*state, *batch, key)
    return tuple(state), loss

  def plain_pass(params, state, batch, key):
    return value_and_grad_fn(params, state[1], *batch, key)

  return Program(start, step, lambda state: state[:2], plain_pass)


needs_optimizer = pytest.mark.skipif(
  not hasattr(nnx, 'as_pure'), reason='nnx.Optimizer.update took no model yet'
)
PROGRAMS = [
  linen,
  pytest.param(nnx_, marks=needs_optimizer),
  equinox,
  haiku,
]


def make_weights():
  """Weights of which none is zero, biases included, as Flax lays them out."""
  rng = np.random.default_rng(0)
  return {
    'conv_kernel': rng.normal(0, 0.3, (3, 3, 1, 4)),
    'conv_bias': rng.normal(0, 0.3, 4),
    'scale': rng.normal(1, 0.3, 4),
    'shift': rng.normal(0, 0.3, 4),
    'dense_kernel': rng.normal(0, 0.06, (256, 10)),
    'dense_bias': rng.normal(0, 0.3, 10),
  }


def make_batches(n):
  """Batches of noise."""
  rng = np.random.default_rng(1)
  return [
    (rng.normal(size=(16, 8, 8, 1)), rng.integers(0, 10, 16, dtype=np.int32))
    for _ in range(n)
  ]


@pytest.mark.parametrize('make_program', PROGRAMS)
def test_step_is_two_passes(x64, make_program):
  """With one dropout mask, and the statistics and counts of the clean one."""
  program = make_program(0.5)
  state = program.start(make_weights())
  trace = jax.tree.map(np.zeros_like, program.read(state)[0])
  for i, batch in enumerate(make_batches(2)):
    key = jax.random.key(i)
    params = jax.tree.map(np.asarray, program.read(state)[0])
    out, grads = program.plain_pass(params, state, batch, key)
    _, grads = program.plain_pass(
      reference.perturb(params, grads), state, batch, key
    )
    trace = jax.tree.map(
      lambda t, g: MOMENTUM * t + np.asarray(g), trace, grads
    )
    expected = jax.tree.map(lambda w, t: w - LEARNING_RATE * t, params, trace)

    state, loss = program.step(state, batch, key)

    params, changed = program.read(state)
    assert error((loss, changed), out) < 1e-12
    assert error(params, expected) < 1e-12


def test_linen_with_the_transformation(x64):
  """The step in the docs is ASAM's, and SGD's where ``every_k`` skips it."""
  (code,) = [code for code in CODE if 'state.tx.update' in code]
  program, key = linen(0.5), jax.random.key(0)
  first, second = make_batches(2)
  names = pages.run_snippet(code, loss_fn=train_linen.loss_fn)
  expected = program.start(make_weights())
  tx = names['tx']
  state = expected.replace(tx=tx, opt_state=tx.init(expected.params))

  expected, loss = program.step(expected, first, key)
  state, loss_ = names['train_step'](state, *first, key)
  assert (
    error((loss_, program.read(state)), (loss, program.read(expected))) < 1e-12
  )

  (loss, changed), grads = program.plain_pass(
    expected.params, expected, second, key
  )
  expected = expected.apply_gradients(grads=grads, batch_stats=changed)
  state, loss_ = names['train_step'](state, *second, key)
  assert (
    error((loss_, program.read(state)), (loss, program.read(expected))) < 1e-12
  )
  assert int(state.step) == 2


@needs_optimizer
def test_nnx_with_the_transformation(x64):
  """The step in the docs is ASAM's, and SGD's where ``every_k`` skips it."""
  (code,) = [code for code in CODE if 'nnx.as_pure' in code]
  program, batches = nnx_(0.5), make_batches(2)
  expected = program.start(make_weights())
  network, _ = program.start(make_weights())
  names = pages.run_snippet(
    code, nnx=nnx, network=network, loss_fn=train_nnx.loss_fn
  )
  state = network, names['optimizer']

  program.step(expected, batches[0], None)
  names['train_step'](*state, *batches[0])
  assert error(program.read(state), program.read(expected)) < 1e-12

  params, _ = program.read(state)
  traces = jax.tree.leaves(state[1].opt_state[1])
  out, grads = program.plain_pass(params, state, batches[1], None)
  loss = names['train_step'](*state, *batches[1])
  after, changed = program.read(state)
  expected = [
    w - LEARNING_RATE * (MOMENTUM * trace + g)
    for w, trace, g in zip(
      jax.tree.leaves(params), traces, jax.tree.leaves(grads), strict=True
    )
  ]
  assert error((loss, changed), out) < 1e-12
  assert error(jax.tree.leaves(after), expected) < 1e-12


def test_docs_show_the_examples():
  """Every block of the page but the two above is part of an example."""
  modules = train_linen, train_nnx, train_equinox, train_haiku, fine_tune
  sources = [pathlib.Path(module.__file__).read_text() for module in modules]
  sources += [re.sub('^  ', '', sources[-1], flags=re.MULTILINE)]
  missing = [
    code for code in CODE if not any(code in source for source in sources)
  ]
  assert len(CODE) == 7
  assert len(missing) == 2
  assert all('every_k' in code for code in missing)


@pytest.mark.parametrize(
  'module',
  [
    train_linen,
    pytest.param(train_nnx, marks=needs_optimizer),
    train_equinox,
    train_haiku,
  ],
)
def test_training(module, capsys):
  """From the example's own weights, in float32."""
  module.main(epochs=2)
  losses = re.findall(r'loss (\S+), test accuracy', capsys.readouterr().out)
  assert float(losses[1]) < 0.7 * float(losses[0])


def test_fine_tuning(capsys):
  """The head alone is enough, and LoRA at least as good."""
  fine_tune.main(steps=100)
  accuracies = re.findall(r'(\S+)%', capsys.readouterr().out)
  before, head, lora = map(float, accuracies)
  assert min(head, lora) > before + 40


def test_steps_of_fine_tuning(monkeypatch):
  """They are ASAM's of the head alone, and of low-rank updates alone."""
  monkeypatch.setattr(optax, 'adam', lambda _: optax.sgd(1.0))
  params = fine_tune.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = rng.normal(size=(16, 64)), rng.integers(0, 5, 16)

  def descend(loss_fn, params):
    grads = jax.grad(loss_fn)(params)
    grads = jax.grad(loss_fn)(reference.perturb(params, grads))
    return jax.tree.map(lambda w, g: w - g, params, grads)

  head_loss_fn = lambda head: fine_tune.loss_fn(params | head, *batch)
  head = descend(head_loss_fn, {'dense_2': params['dense_2']})
  got = fine_tune.fine_tune_head(params, *batch, 1)
  assert error(got, params | head) < 1e-5

  lora_loss_fn = lambda lora: fine_tune.lora_loss_fn(lora, params, *batch)
  lora = descend(lora_loss_fn, fine_tune.init_lora(jax.random.key(1), params))
  got = fine_tune.fine_tune_lora(params, *batch, 1)
  assert error(got, fine_tune.add_lora(params, lora)) < 1e-5
