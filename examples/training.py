"""Training with SGD, SAM or ASAM.

Several runs, which differ in their seed or in rho, advance together: one epoch
of all of them is one call of one compiled program.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import time
from typing import NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import data
import models
from optax_asam import asam
from optax_asam import sam

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def sgd(
  base_tx: optax.GradientTransformation, rho: chex.Numeric
) -> optax.GradientTransformationExtraArgs:
  """``base_tx`` alone, called like the others: rho and grad_fn are ignored."""
  del rho
  return optax.with_extra_args_support(base_tx)


# From a base optimizer and rho to the optimizer that is compared.
TxFactory = Callable[
  [optax.GradientTransformation, chex.Numeric],
  optax.GradientTransformationExtraArgs,
]
OPTIMIZERS: dict[str, TxFactory] = {'SGD': sgd, 'SAM': sam, 'ASAM': asam}

# The parameters after each epoch, and the seconds that a step took in it.
Training = Iterator[tuple[optax.Params, float]]


class TrainState(NamedTuple):
  """What an epoch starts from; ``key`` decides the order of its examples."""

  params: optax.Params
  opt_state: optax.OptState
  key: jax.Array


def make_base_tx(
  learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
  """SGD with momentum, weight decay and a cosine learning rate."""
  schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
  return optax.chain(
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.sgd(schedule, momentum=MOMENTUM),
  )


@functools.partial(jax.jit, static_argnums=0)
def init_params(
  model: nn.Module, key: jax.Array, images: data.Array
) -> optax.Params:
  """Random parameters, compiled once for any number of runs."""
  return model.init(key, images)['params']


def make_train_epoch(
  make_tx: TxFactory,
  base_tx: optax.GradientTransformation,
  model: nn.Module,
  batch_size: int,
) -> Callable[[TrainState, jax.Array, data.Split], TrainState]:
  """Makes a function of ``(state, rho, split)`` that trains for one epoch.

  It is that of one run, with labels [n]. rho may be traced, so that one program
  serves every radius.
  """

  def train_epoch(state, rho, split):
    tx = make_tx(base_tx, rho)
    next_key, key = jax.random.split(state.key)
    order = jax.random.permutation(key, len(split.images))
    # What fills no batch sits this epoch out.
    num_steps = len(order) // batch_size
    batches = order[: num_steps * batch_size].reshape(num_steps, batch_size)

    def train_step(carry, indices):
      params, opt_state = carry
      batch = jax.tree.map(lambda x: x[indices], split)
      grad_fn = jax.grad(lambda p: models.loss_fn(p, model, batch))
      updates, opt_state = tx.update(
        grad_fn(params), opt_state, params, grad_fn=grad_fn
      )
      return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(
      train_step, (state.params, state.opt_state), batches
    )
    return TrainState(params, opt_state, next_key)

  return train_epoch


def train(
  optimizer: str,
  rhos: Sequence[float],
  seeds: Sequence[int],
  split: data.Split,
  *,
  model: nn.Module,
  epochs: int,
  batch_size: int,
  learning_rate: float,
) -> Training:
  """Trains one model per run, all at once.

  Args:
    optimizer: A name in ``OPTIMIZERS``.
    rhos: The radius of each run.
    seeds: The seed of each run, for its first parameters and the order of its
      examples.
    split: The training set, with labels [runs, n].
    model: The model.
    epochs: Number of epochs.
    batch_size: Examples a step.
    learning_rate: The learning rate at the start.

  Yields:
    After every epoch, the parameters with a leading axis of runs, and the
    seconds that a step of all runs took in it, compilation not included.
  """
  make_tx = OPTIMIZERS[optimizer]
  num_steps = len(split.images) // batch_size
  base_tx = make_base_tx(learning_rate, epochs * num_steps)

  def init(rho, seed):
    params_key, order_key = jax.random.split(jax.random.key(seed))
    params = init_params(model, params_key, split.images[:1])
    return TrainState(params, make_tx(base_tx, rho).init(params), order_key)

  states = [init(*run) for run in zip(rhos, seeds, strict=True)]
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  inputs = jnp.asarray(rhos, jnp.float32), jax.device_put(split)
  train_epoch = jax.vmap(
    make_train_epoch(make_tx, base_tx, model, batch_size),
    in_axes=(0, 0, data.LABELS_PER_RUN),
  )
  # Compiled ahead of time, so that no epoch's time holds the compiler's.
  compiled_epoch = jax.jit(train_epoch).lower(state, *inputs).compile()
  for _ in range(epochs):
    start = time.perf_counter()
    state = jax.block_until_ready(compiled_epoch(state, *inputs))
    yield state.params, (time.perf_counter() - start) / num_steps
