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


@functools.partial(jax.jit, static_argnums=0)
def init_run(
  model: nn.Module, seed: jax.Array, images: jax.Array
) -> tuple[optax.Params, models.ModelState, jax.Array]:
  """Parameters, state and the key of a run; compiled once for all."""
  init_key, key = jax.random.split(jax.random.key(seed))
  return *models.init(model, init_key, images), key


# From parameters, the states of model and optimizer, rho and a batch to updates
# and the new states, and the loss before the step.
Update = Callable[
  [optax.Params, models.ModelState, optax.OptState, jax.Array, data.Split],
  tuple[optax.Updates, optax.OptState, models.ModelState, jax.Array],
]


def make_update(
  make_tx: Callable[[chex.Numeric], optax.GradientTransformationExtraArgs],
  model: nn.Module,
  label_smoothing: float,
  *,
  perturb: bool,
) -> Update:
  """Makes the function that an optimizer's updates come from.

  Args:
    make_tx: From rho to the optimizer.
    model: The model.
    label_smoothing: Label smoothing of the loss.
    perturb: Whether a second gradient is taken.
  """
  value_and_grad = jax.value_and_grad(
    functools.partial(models.train_loss_fn, label_smoothing=label_smoothing),
    has_aux=True,
  )

  def update(params, model_state, opt_state, rho, batch):
    (loss, new_model_state), grads = value_and_grad(
      params, model_state, model, batch
    )

    def grad_fn(perturbed_params):
      if not perturb:
        return grads
      return value_and_grad(perturbed_params, model_state, model, batch)[1]

    updates, opt_state = make_tx(rho).update(
      grads, opt_state, params, grad_fn=grad_fn
    )
    return updates, opt_state, new_model_state, loss

  return update


def over_microbatches(update: Update, size: int) -> Update:
  """``update`` with a perturbation for each ``size`` examples of the batch.

  The optimizer averages its gradients over these microbatches, by their axis;
  what else depends on them is averaged here.
  """

  def update_microbatches(params, model_state, opt_state, rho, batch):
    def update_microbatch(microbatch):
      updates, new_opt_state, new_model_state, loss = update(
        params, model_state, opt_state, rho, microbatch
      )
      return (
        updates,
        new_opt_state,
        *jax.lax.pmean((new_model_state, loss), optimizers.MICROBATCHES),
      )

    microbatches = jax.tree.map(
      lambda x: x.reshape(-1, size, *x.shape[1:]), batch
    )
    return jax.vmap(
      update_microbatch, out_axes=None, axis_name=optimizers.MICROBATCHES
    )(microbatches)

  return update_microbatches


class Programs(NamedTuple):
  """What is compiled for an optimizer, for one run or mapped over several.

  Attributes:
    init: From rho, a seed and the training set to the state of one run.
    sharp_step: From a state, rho and the training set to the next state.
    plain_step: The same without a perturbation, for steps between those of
      ``every_k``. On CPU, XLA runs convolutions inside a cond ten times slower:
      so which of the two it is, is decided in Python.
  """

  init: Callable[[float, int, data.Split], TrainState]
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
  make_tx = lambda rho: optimizers.OPTIMIZERS[optimizer](base_tx, rho, args)
  is_sharpness_aware = optimizer in optimizers.SHARPNESS_AWARE

  def init(rho, seed, split):
    images = dataset.preprocess(split.images[:1])
    params, model_state, key = init_run(model, jnp.uint32(seed), images)
    position = Position(
      key,
      order=jnp.zeros(len(split.images), jnp.int32),
      step=jnp.zeros([], jnp.int32),
      loss=jnp.zeros([]),
    )
    return TrainState(params, model_state, make_tx(rho).init(params), position)

  def make_step(perturb):
    update = make_update(make_tx, model, args.label_smoothing, perturb=perturb)
    if args.m_sharpness and is_sharpness_aware:
      update = over_microbatches(update, args.m_sharpness)

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
        jax.random.fold_in(key, step) if args.augment else None,
      )
      updates, opt_state, model_state, loss = update(
        params, model_state, opt_state, rho, batch
      )
      return TrainState(
        optax.apply_updates(params, updates),
        model_state,
        opt_state,
        Position(key, order, step + 1, loss_sum + loss),
      )

    if mapped:
      train_step = jax.vmap(train_step, in_axes=(0, 0, data.LABELS_PER_RUN))
    return jax.jit(train_step, donate_argnums=0)

  plain_step = make_step(False)
  sharp_step = make_step(True) if is_sharpness_aware else plain_step
  return Programs(init, sharp_step, plain_step)
