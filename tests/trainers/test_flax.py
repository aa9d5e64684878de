"""Promise: the steps for Flax on docs/trainers.md are those of ASAM."""

from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
import jax
import numpy as np
import optax

from tests.helpers import pages
from tests.helpers.training import assert_asam
from tests.helpers.training import assert_momentum_asam

SNIPPETS = pages.read_snippets(pages.read_page('trainers'))
BATCHES = [
  (rng.standard_normal((8, 5)).astype(np.float32), rng.integers(3, size=8))
  for rng in map(np.random.default_rng, range(3))
]
NETWORK = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
PARAMS = NETWORK.init(jax.random.key(0), BATCHES[0][0])['params']


def cross_entropy(logits, labels):
  """The mean over a batch."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_fn(params, batch):
  """The loss of the linen network."""
  return cross_entropy(NETWORK.apply({'params': params}, batch[0]), batch[1])


def test_flax_train_state():
  """``value_and_grad`` in place of JAX's."""
  names = pages.run_snippet(
    SNIPPETS['test_flax_train_state'][0], loss_fn=loss_fn
  )
  tx = optax.sgd(0.1, momentum=0.9)
  state = TrainState.create(apply_fn=NETWORK.apply, params=PARAMS, tx=tx)
  for batch in BATCHES:
    expected_loss = loss_fn(state.params, batch)
    state, loss = names['train_step'](state, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  assert_asam(
    state.params,
    lambda params, extra, batch: (loss_fn(params, batch), extra),
    PARAMS,
    BATCHES,
    tx,
    rho=0.5,
  )


def test_flax_train_state_momentum():
  """``momentum_asam`` as the optimizer."""
  names = pages.run_snippet(
    SNIPPETS['test_flax_train_state'][1],
    loss_fn=loss_fn,
    TrainState=TrainState,
    network=NETWORK,
    params=PARAMS,
  )
  state = names['state']
  for batch in BATCHES:
    state, _ = names['train_step'](state, batch)
  evaluated = assert_momentum_asam(
    state.params,
    names['optax_asam'].eval_params(state, state.params),
    jax.grad(loss_fn),
    PARAMS,
    BATCHES,
  )
  loss = names['eval_step'](state, BATCHES[0])
  np.testing.assert_allclose(loss, loss_fn(evaluated, BATCHES[0]), rtol=1e-5)


def test_flax_nnx_optimizer():
  """``momentum_asam`` in an ``nnx.Optimizer``."""
  network = nnx.Sequential(
    nnx.Linear(5, 8, rngs=nnx.Rngs(0)),
    nnx.relu,
    nnx.Linear(8, 3, rngs=nnx.Rngs(1)),
  )
  graphdef, params = nnx.split(network)
  params = jax.device_get(nnx.to_pure_dict(params))

  def loss_of(network, batch):
    return cross_entropy(network(batch[0]), batch[1])

  (snippet,) = SNIPPETS['test_flax_nnx_optimizer']
  names = pages.run_snippet(snippet, nnx=nnx, network=network, loss_fn=loss_of)
  optimizer = names['optimizer']
  for batch in BATCHES:
    names['train_step'](network, optimizer, batch)
  state = nnx.state(network, nnx.Param)
  pure_loss_fn = lambda p, batch: loss_of(nnx.merge(graphdef, p), batch)
  evaluated = assert_momentum_asam(
    nnx.to_pure_dict(state),
    nnx.to_pure_dict(names['optax_asam'].eval_params(optimizer, state)),
    jax.grad(pure_loss_fn),
    params,
    BATCHES,
  )
  loss = names['eval_step'](network, optimizer, BATCHES[0])
  expected = pure_loss_fn(evaluated, BATCHES[0])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
