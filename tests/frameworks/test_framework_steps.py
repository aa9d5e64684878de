"""Promise: the train steps of the docs are ASAM in every framework.

The reference is two passes of the plain network with NumPy between them. It
knows the biases from a list.
"""

import functools
import pathlib
import re

import equinox_step
from flax import nnx
from framework_programs import PROGRAMS
import haiku_step
import jax
import jax.numpy as jnp
import linen_step
import nnx_step
import numpy as np
import optax
import pytest

from support import error

HERE = pathlib.Path(__file__).parent
RHO, ETA, LEARNING_RATE, MOMENTUM, DROPOUT_RATE = 0.5, 0.01, 0.1, 0.9, 0.5
BIASES = frozenset({'conv_bias', 'shift', 'dense_bias'})

# Flax 0.12.7 is the first with nnx.as_pure.
needs_as_pure = pytest.mark.skipif(
  not hasattr(nnx, 'as_pure'), reason='the NNX snippet is for Flax 0.12.7'
)


@pytest.fixture(
  scope='module',  # So that pytest groups the tests of one program.
  params=[
    pytest.param(name, marks=needs_as_pure if name == 'nnx' else ())
    for name in PROGRAMS
  ],
)
def name(request):
  """Every program in turn."""
  return request.param


@functools.cache
def program(name, rho, dropout_rate):
  """One of the programs, compiled once for all tests."""
  return PROGRAMS[name](rho, dropout_rate)


def make_weights():
  """Weights of which none is zero, biases included."""
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
    (
      rng.normal(size=(16, 8, 8, 1)),
      rng.integers(0, 10, 16, dtype=np.int32),
    )
    for _ in range(n)
  ]


def perturb(weights, grads, rho, biases=BIASES):
  """``w + rho T^2 g / ||T g||`` with T = 1 at biases, |w| + eta elsewhere."""
  t = {
    k: np.ones(w.shape) if k in biases else np.abs(w) + ETA
    for k, w in weights.items()
  }
  norm = np.sqrt(sum(np.sum((t[k] * g) ** 2) for k, g in grads.items()))
  return {k: w + rho * t[k] ** 2 * grads[k] / norm for k, w in weights.items()}


def test_statistics_are_those_of_one_clean_pass(x64, name):
  """Not of the perturbed pass, and not of both."""
  p = program(name, RHO, DROPOUT_RATE)
  state = p.start(make_weights(), jax.random.key(0))
  for batch in make_batches(2):
    weights = p.weights(state)
    loss, clean, grads = p.plain_pass(weights, state, batch)
    point = perturb(weights, grads, RHO)
    _, perturbed, _ = p.plain_pass(point, state, batch)

    state, loss_of_step = p.step(state, batch)

    assert error(p.statistics(state), clean) < 1e-12
    assert error(p.statistics(state), perturbed) > 1e-3
    assert error(loss_of_step, loss) < 1e-12


def test_both_passes_use_the_same_dropout_mask(x64, name):
  """The step is that of the reference with one mask, and not with two."""
  p = program(name, RHO, DROPOUT_RATE)
  weights, (batch,) = make_weights(), make_batches(1)
  state = p.start(weights, jax.random.key(0))
  _, _, grads = p.plain_pass(weights, state, batch)
  point = perturb(weights, grads, RHO)
  _, _, same_mask = p.plain_pass(point, state, batch)
  other_state = p.start(weights, jax.random.key(1))
  _, _, other_mask = p.plain_pass(point, other_state, batch)

  state, _ = p.step(state, batch)

  after = p.weights(state)
  descended = {k: (weights[k] - after[k]) / LEARNING_RATE for k in weights}
  # The gradients are at most 1, and their difference may round at 1e-15.
  for k in weights:
    np.testing.assert_allclose(descended[k], same_mask[k], rtol=0, atol=1e-13)
  assert error(descended, other_mask) > 0.1


def test_every_step_draws_one_new_dropout_mask(x64, name):
  """Under the same weights and batch, the loss is another after a step."""
  p = program(name, RHO, DROPOUT_RATE)
  weights, (batch,) = make_weights(), make_batches(1)
  state = p.start(weights, jax.random.key(0))
  loss, _, _ = p.plain_pass(weights, state, batch)
  state, _ = p.step(state, batch)
  next_loss, _, _ = p.plain_pass(weights, state, batch)
  assert abs(next_loss - loss) > 1e-3
  if name == 'nnx':
    network, _ = state
    assert network.dropout.rngs.count[...] == 1


@functools.cache
def reference(biases=BIASES):
  """Losses and running mean of ten steps of ASAM on SGD, written out."""
  p = program('linen', RHO, 0.0)
  weights = make_weights()
  state = p.start(weights, jax.random.key(0))  # With statistics of 0 and 1.
  trace = {k: np.zeros(w.shape) for k, w in weights.items()}
  losses, mean = [], 0
  for batch in make_batches(10):
    loss, statistics, grads = p.plain_pass(weights, state, batch)
    losses.append(loss)
    mean = 0.9 * mean + statistics['mean']
    point = perturb(weights, grads, RHO, biases)
    _, _, grads = p.plain_pass(point, state, batch)
    for k, g in grads.items():
      trace[k] = MOMENTUM * trace[k] + g
      weights[k] = weights[k] - LEARNING_RATE * trace[k]
  return np.asarray(losses), mean


def test_same_network_gives_the_same_losses(x64, name):
  """In ten steps, and the same running mean.

  The running variance starts at 0 in Haiku and at 1 elsewhere.
  """
  p = program(name, RHO, 0.0)
  state = p.start(make_weights(), jax.random.key(0))
  losses = []
  for batch in make_batches(10):
    state, loss = p.step(state, batch)
    losses.append(loss)
  expected_losses, mean = reference()
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
  np.testing.assert_allclose(p.statistics(state)['mean'], mean, rtol=1e-10)


@pytest.mark.parametrize('bias', sorted(BIASES))
def test_losses_show_every_bias(x64, bias):
  """The test above fails where a single bias is normalized.

  For this, the networks have their relu before BatchNorm, which would take the
  bias of the convolution out otherwise.
  """
  losses, _ = reference(BIASES - {bias})
  expected_losses, _ = reference()
  assert np.max(np.abs(losses / expected_losses - 1)) > 1e-6


@needs_as_pure
@pytest.mark.parametrize('name', ['linen', 'nnx'])
def test_perturbed_value(x64, name):
  """With ``value_fn``, the loss of the second pass is in the state."""
  p = program(name, RHO, DROPOUT_RATE)
  weights, (batch,) = make_weights(), make_batches(1)
  state = p.start(weights, jax.random.key(0))
  _, _, grads = p.plain_pass(weights, state, batch)
  loss, _, _ = p.plain_pass(perturb(weights, grads, RHO), state, batch)

  update = {'linen': update_linen, 'nnx': update_nnx}[name]

  assert error(update(state, *batch), loss) < 1e-12


def update_linen(state, images, labels):
  """``perturbed_value`` after a step in linen."""
  train_state, key = state
  key = jax.random.fold_in(key, train_state.step)

  @jax.jit
  def update(train_state):
    def value_fn(params):
      loss, _ = linen_step.loss_fn(params, train_state, images, labels, key)
      return loss

    grads = jax.grad(value_fn)(train_state.params)
    return train_state.tx.update(
      grads, train_state.opt_state, train_state.params, value_fn=value_fn
    )

  _, (asam_state, _) = update(train_state)
  return asam_state.perturbed_value


def update_nnx(state, images, labels):
  """``perturbed_value`` after a step in NNX."""
  network, optimizer = state

  @nnx.jit
  def update(network, optimizer):
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    rest = nnx.as_pure(rest)

    def value_fn(params):
      logits = nnx.merge(graphdef, params, rest)(images)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean()

    grads = jax.grad(value_fn)(params)
    optimizer.update(network, grads, value_fn=value_fn)

  update(network, optimizer)
  return optimizer.opt_state[0].perturbed_value[...]


@needs_as_pure
def test_nnx_under_every_k(x64):
  """The step that ``every_k`` skips is one of plain SGD, statistics too."""
  p = PROGRAMS['nnx'](RHO, DROPOUT_RATE, every_k=2)
  plain_pass = program('nnx', RHO, DROPOUT_RATE).plain_pass  # Compiled before.
  weights, batches = make_weights(), make_batches(2)
  state, _ = p.step(p.start(weights, jax.random.key(0)), batches[0])
  before = p.weights(state)
  _, statistics, grads = plain_pass(before, state, batches[1])

  state, _ = p.step(state, batches[1])

  for k, after in p.weights(state).items():
    step = MOMENTUM * (before[k] - weights[k]) - LEARNING_RATE * grads[k]
    np.testing.assert_allclose(after - before[k], step, rtol=0, atol=1e-14)
  assert error(p.statistics(state), statistics) < 1e-12
  network, _ = state
  assert network.dropout.rngs.count[...] == 2


def train_linen_value_and_grad(images, labels, keys):
  """Losses of the first snippet for linen."""
  state = linen_step.create_train_state(
    linen_step.Network(), keys[0], images, linen_step.tx
  )
  for key in keys:
    state, loss = linen_step.train_step(state, images, labels, key)
    yield loss


def train_linen(images, labels, keys):
  """Losses of the second snippet for linen."""
  state = linen_step.create_train_state(
    linen_step.Network(), keys[0], images, linen_step.asam_tx
  )
  for key in keys:
    state, loss = linen_step.asam_train_step(state, images, labels, key)
    yield loss


def train_nnx(images, labels, keys):
  """Losses of the snippet for NNX."""
  network = nnx_step.Network(rngs=nnx.Rngs(keys[0]))
  optimizer = nnx_step.create_optimizer(network)
  for _ in keys:
    yield nnx_step.train_step(network, optimizer, images, labels)


def train_equinox(images, labels, keys):
  """Losses of the snippet for Equinox."""
  images = jnp.moveaxis(images, -1, 1)
  state = equinox_step.init(keys[0])
  for key in keys:
    *state, loss = equinox_step.train_step(*state, images, labels, key)
    yield loss


def train_haiku(images, labels, keys):
  """Losses of the snippet for Haiku."""
  state = haiku_step.init(keys[0], images)
  for key in keys:
    *state, loss = haiku_step.train_step(*state, images, labels, key)
    yield loss


def test_snippets_train(name):
  """As the docs print them: from their own weights and in float32."""
  ((images, labels),) = make_batches(1)
  keys = jax.random.split(jax.random.key(0), 20)
  losses = list(globals()[f'train_{name}'](images, labels, keys))
  assert losses[0].dtype == jnp.float32
  assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_docs_print_these_files():
  """Every file, by markers that are there once."""
  docs = HERE.parents[1] / 'docs' / 'frameworks.md'
  text = docs.read_text()
  snippets = re.findall(
    r'^```\{literalinclude\} (.+)\n:language: python\n'
    r':start-after: "(.+)"\n:end-before: "(.+)"\n```$',
    text,
    re.MULTILINE,
  )
  assert len(snippets) == text.count('{literalinclude}')
  for path, *markers in snippets:
    lines = (docs.parent / path).read_text().splitlines()
    start, end = ([i for i, x in enumerate(lines) if m in x] for m in markers)
    assert (len(start), len(end)) == (1, 1), (path, markers)
    assert start < end, (path, markers)
  printed = {(docs.parent / path).resolve() for path, *_ in snippets}
  assert printed == set(HERE.resolve().glob('*_step.py'))
