"""Training with SGD, SAM or ASAM, one compiled step for all seeds and radii.

A *run* is one training: an optimizer, a radius rho and a seed. Runs of one
optimizer differ in numbers alone, so that one program serves them all. Either
it is called for one run after the other, or it is mapped over their axis
(``groups.py``).
"""

import argparse
from collections.abc import Callable
import functools
from typing import NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import data
import models
import optimizers


class Run(NamedTuple):
  """One training."""

  optimizer: str
  rho: float
  seed: int


class Position(NamedTuple):
  """Where a run stands in its data.

  Attributes:
    key: The random key of what is to come.
    order: The order of the examples in this epoch, int32 [n].
    step: Number of steps taken in this epoch, an int32 scalar.
    loss: Sum of the losses of those steps, a float32 scalar.
  """

  key: jax.Array
  order: jax.Array
  step: jax.Array
  loss: jax.Array


class TrainState(NamedTuple):
  """What a step starts from: all that changes in a run."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState
  position: Position


def start_epoch(position: Position) -> Position:
  """The start of the next epoch, with an order of its own."""
  key, order_key = jax.random.split(position.key)
  order = jax.random.permutation(order_key, len(position.order))
  return Position(
    key, order, jnp.zeros_like(position.step), jnp.zeros_like(position.loss)
  )


def augmentation_key(key: jax.Array, step: chex.Numeric) -> jax.Array:
  """The key of a step's augmentation, from that of its epoch.

  The first two that ``fold_in`` makes are the next epoch's, those of ``split``.
  """
  return jax.random.fold_in(key, step + 2)


@functools.partial(jax.jit, static_argnums=0)
def init_run(
  model: nn.Module, seed: jax.Array, images: jax.Array
) -> tuple[optax.Params, models.ModelState, jax.Array]:
  """Parameters, state and the key of a run; compiled once for all."""
  init_key, key = jax.random.split(jax.random.key(seed))
  return *models.init(model, init_key, images), key


class Programs(NamedTuple):
  """What is compiled for an optimizer, for one run or mapped over several.

  Attributes:
    init: From a seed and the training set to the state of one run.
    sharp_step: From a state, rho and the training set to the next state.
    plain_step: The same without a perturbation, for steps between those of
      ``every_k``. On CPU, XLA runs convolutions inside a cond ten times slower:
      so which of the two it is, is decided in Python.
  """

  init: Callable[[int, data.Split], TrainState]
  sharp_step: Callable[[TrainState, jax.Array, data.Split], TrainState]
  plain_step: Callable[[TrainState, jax.Array, data.Split], TrainState]


def make_programs(
  optimizer: str,
  model: nn.Module,
  dataset: data.Dataset,
  args: argparse.Namespace,
  *,
  num_steps: int,
  mapped: bool,
) -> Programs:
  """Makes the jitted functions of an optimizer; they compile when first called.

  Args:
    optimizer: A name in ``optimizers.OPTIMIZERS``.
    model: The model.
    dataset: Says how batches are made; the examples themselves are arguments of
      the programs.
    args: The options.
    num_steps: Number of steps in an epoch.
    mapped: Whether states, radii and labels have a leading axis of runs.
  """
  base_tx = optimizers.make_base_tx(args, args.epochs * num_steps)

  def loss_fn(params, model_state, batch):
    return models.train_loss_fn(
      params, model_state, model, batch, label_smoothing=args.label_smoothing
    )

  def init(seed, split):
    images = dataset.preprocess(split.images[:1])
    params, model_state, key = init_run(model, jnp.uint32(seed), images)
    position = Position(
      key,
      order=jnp.zeros(len(split.images), jnp.int32),
      step=jnp.zeros([], jnp.int32),
      loss=jnp.zeros([]),
    )
    return TrainState(params, model_state, base_tx.init(params), position)

  def make_step(gradient):
    def train_step(state, rho, split):
      params, model_state, opt_state, (key, order, step, loss_sum) = state
      # What fills no batch sits this epoch out.
      indices = jax.lax.dynamic_slice_in_dim(
        order, step * args.batch_size, args.batch_size
      )
      # One batch for both passes, images, BatchNorm and all.
      batch = data.make_batch(
        dataset,
        split,
        indices,
        augmentation_key(key, step) if args.augment else None,
      )
      value_and_grad = optimizers.make_value_and_grad(
        gradient, loss_fn, rho, args
      )
      (loss, model_state), grads = value_and_grad(params, model_state, batch)
      updates, opt_state = base_tx.update(grads, opt_state, params)
      return TrainState(
        optax.apply_updates(params, updates),
        model_state,
        opt_state,
        Position(key, order, step + 1, loss_sum + loss),
      )

    if mapped:
      train_step = jax.vmap(train_step, in_axes=(0, 0, data.LABELS_PER_RUN))
    return jax.jit(train_step, donate_argnums=0)

  plain_step = make_step('sgd')
  sharp_step = plain_step if optimizer == 'sgd' else make_step(optimizer)
  return Programs(init, sharp_step, plain_step)
