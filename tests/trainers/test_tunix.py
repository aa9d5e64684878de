"""Promise: what docs/trainers.md says of Tunix gives the steps of ASAM."""

import chex
from flax import nnx
import jax
import numpy as np
import optax
import pytest
from tunix.sft import peft_trainer

from tests.helpers import pages
from tests.helpers.training import assert_asam
from tests.helpers.training import assert_momentum_asam

SNIPPETS = pages.read_snippets(pages.read_page('trainers'))['test_tunix']
NAMES = pages.run_snippet(SNIPPETS[0], __name__=__name__)
BATCHES = [
  {'tokens': rng.integers(7, size=(8, 4)), 'labels': rng.integers(3, size=8)}
  for rng in map(np.random.default_rng, range(3))
]


class Network(nnx.Module):
  """An embedding and two dense layers."""

  def __init__(self, *, lora=False, dropout=0.3):
    rngs = nnx.Rngs(0)
    self.embed = nnx.Embed(7, 5, rngs=rngs)
    if lora:
      self.hidden = nnx.LoRALinear(5, 8, lora_rank=2, rngs=rngs)
    else:
      self.hidden = nnx.Linear(5, 8, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.out = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, tokens):
    """The logits of a batch."""
    hidden = nnx.relu(self.hidden(self.embed(tokens).mean(1)))
    return self.out(self.dropout(hidden))


def loss_fn(network, tokens, labels):
  """The mean cross-entropy of a batch."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    network(tokens), labels
  )
  return losses.mean()


def pure(network, *filters):
  """The graph of a network, and copies of its states as dicts."""
  graphdef, *states = nnx.split(network, *filters)
  return graphdef, *(jax.device_get(nnx.to_pure_dict(s)) for s in states)


@pytest.mark.parametrize('lora', [False, True])
def test_tunix(lora):
  """The train step, for all parameters and for low-rank updates alone."""
  network = Network(lora=lora)
  wrt = nnx.LoRAParam if lora else nnx.Param
  graphdef, params, keys, rest = pure(network, wrt, nnx.RngState, ...)
  config = peft_trainer.TrainingConfig(eval_every_n_steps=1000)
  trainer = NAMES['AsamTrainer'](network, optax.sgd(0.1, momentum=0.9), config)
  trainer.with_loss_fn(loss_fn).train(BATCHES)

  def pure_loss_fn(params, keys, batch):
    network = nnx.merge(graphdef, params, keys, rest)
    loss = loss_fn(network, **batch)
    return loss, nnx.to_pure_dict(nnx.state(network, nnx.RngState))

  _, trained, trained_keys, trained_rest = pure(network, wrt, nnx.RngState, ...)
  keys = assert_asam(
    trained,
    pure_loss_fn,
    params,
    BATCHES,
    optax.sgd(0.1, momentum=0.9),
    extra=keys,
    rho=0.5,
  )
  chex.assert_trees_all_equal((trained_keys, trained_rest), (keys, rest))


def test_tunix_momentum():
  """The optimizer, and the parameters for evaluation."""
  network = Network(dropout=0.0)
  graphdef, params, rest = pure(network, nnx.Param, ...)
  training, evaluation = SNIPPETS[1].split('\n\n')
  names = pages.run_snippet(
    training, **NAMES, network=network, loss_fn=loss_fn, batches=BATCHES
  )
  _, trained, _ = pure(network, nnx.Param, ...)
  pages.run_snippet(evaluation, **names)
  assert_momentum_asam(
    trained,
    pure(network, nnx.Param, ...)[1],
    jax.grad(lambda p, batch: loss_fn(nnx.merge(graphdef, p, rest), **batch)),
    params,
    BATCHES,
  )
