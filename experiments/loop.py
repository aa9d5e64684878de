"""Training with SGD, SAM or ASAM: one compiled step for all seeds and radii.

A *run* is one training: a method, a radius rho and a seed. Runs of one method
differ in numbers only, so that one compiled step serves them all: in a loop
over runs, or mapped over them.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import time
from typing import Any
from typing import NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments import methods
from experiments import models
from experiments.config import Config


class Run(NamedTuple):
  """One training."""

  optimizer: str
  rho: float
  seed: int


class Position(NamedTuple):
  """The position of a run in its data.

  Attributes:
    key: The random key of the epochs to come.
    order: The order of the examples in this epoch, int32 [n].
    step: Number of steps taken in this epoch, an int32 scalar.
    loss: Sum of the losses of those steps, a float32 scalar.
  """

  key: jax.Array
  order: jax.Array
  step: jax.Array
  loss: jax.Array


class TrainState(NamedTuple):
  """All that changes in a run."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState
  position: Position


def map_runs(function: Callable[..., Any]) -> Callable[..., Any]:
  """Maps a function over the leading axis of all arguments but the last.

  The last one is what runs share. A single run is not mapped: under ``vmap``,
  convolutions become grouped ones, which are slow on CPU.
  """

  @functools.wraps(function)
  def mapped(*args):
    *of_runs, shared = args
    if len(jax.tree.leaves(of_runs)[0]) > 1:
      return jax.vmap(function, in_axes=(*[0] * len(of_runs), None))(*args)
    of_run = jax.tree.map(lambda x: x[0], of_runs)
    return jax.tree.map(lambda x: x[None], function(*of_run, shared))

  return mapped


def start_epoch(position: Position, _: None = None) -> Position:
  """The start of the next epoch, with its own order."""
  key, order_key = jax.random.split(position.key)
  order = jax.random.permutation(order_key, len(position.order))
  return Position(
    key, order, jnp.zeros_like(position.step), jnp.zeros_like(position.loss)
  )


_start_epochs = jax.jit(map_runs(start_epoch))


def augmentation_key(key: jax.Array, step: chex.Numeric) -> jax.Array:
  """The key of a step's augmentation, from that of its epoch.

  The first two that ``fold_in`` makes are the next epoch's, those of ``split``.
  """
  return jax.random.fold_in(key, step + 2)


@functools.partial(jax.jit, static_argnums=0)
def init_run(
  model: nn.Module, seed: jax.Array, images: jax.Array
) -> tuple[optax.Params, models.ModelState, jax.Array]:
  """Parameters, state and key of a run."""
  init_key, key = jax.random.split(jax.random.key(seed))
  return *models.init(model, init_key, images), key


class Programs:
  """What is compiled for a comparison; each program compiles when first called.

  Args:
    model: The model.
    dataset: Says how batches are made; the examples are arguments of the steps.
    config: The options.
    num_examples: Number of examples that each run is trained on.
  """

  def __init__(
    self,
    model: nn.Module,
    dataset: data.Dataset,
    config: Config,
    num_examples: int,
  ):
    self.config = config
    self.num_steps = num_examples // config.batch_size
    self._model, self._dataset = model, dataset
    self._num_examples = num_examples
    self._tx = methods.make_base_tx(config, config.epochs * self.num_steps)

  def init(self, seed: int) -> TrainState:
    """The state in which a run starts."""
    images = self._dataset.preprocess(self._dataset.train.images[:1])
    params, model_state, key = init_run(self._model, jnp.uint32(seed), images)
    position = Position(
      key,
      order=jnp.zeros(self._num_examples, jnp.int32),
      step=jnp.zeros([], jnp.int32),
      loss=jnp.zeros([]),
    )
    return TrainState(params, model_state, self._tx.init(params), position)

  @functools.cache  # noqa: B019  (as long as the program runs)
  def step(self, method: str) -> Callable[..., TrainState]:
    """A step of a method: from states, radii, labels and images to states.

    States, radii and labels have a leading axis of runs.
    """
    config = self.config

    def loss_fn(params, model_state, batch):
      return models.train_loss_fn(
        params,
        model_state,
        self._model,
        batch,
        label_smoothing=config.label_smoothing,
      )

    def train_step(state, rho, labels, images):
      params, model_state, opt_state, (key, order, step, loss_sum) = state
      # Examples that do not fill a batch are left out of this epoch.
      indices = jax.lax.dynamic_slice_in_dim(
        order, step * config.batch_size, config.batch_size
      )
      # Both gradients of SAM and ASAM are of the same batch.
      batch = data.make_batch(
        self._dataset,
        data.Split(images, labels),
        indices,
        augmentation_key(key, step) if config.augment else None,
      )
      value_and_grad = methods.make_value_and_grad(method, loss_fn, rho, config)
      (loss, model_state), grads = value_and_grad(params, model_state, batch)
      updates, opt_state = self._tx.update(grads, opt_state, params)
      return TrainState(
        optax.apply_updates(params, updates),
        model_state,
        opt_state,
        Position(key, order, step + 1, loss_sum + loss),
      )

    return jax.jit(map_runs(train_step), donate_argnums=0)


class Group:
  """Runs of one method that advance together.

  Attributes:
    runs: The runs.
    labels: Their labels, [runs, n].
    images: The images that they share.
    state: Their states, with a leading axis of runs.
  """

  def __init__(
    self, runs: Sequence[Run], split: data.Split, programs: Programs
  ):
    self.runs = runs
    self.images, self.labels = split
    self._programs = programs
    states = [programs.init(run.seed) for run in runs]
    self.state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    self._rho = jnp.float32([run.rho for run in runs])

  def compile(self) -> None:
    """Takes a step on a copy, so that no epoch's time includes compilation."""
    for step in {self._step(i) for i in range(self._programs.config.every_k)}:
      copy = jax.tree.map(jnp.copy, self.state)
      jax.block_until_ready(step(copy, self._rho, self.labels, self.images))
    _start_epochs(self.state.position, None)

  def _step(self, i: int) -> Callable[..., TrainState]:
    # XLA runs convolutions inside a cond ten times slower on CPU, so Python
    # decides which steps are perturbed.
    is_perturbed = i % self._programs.config.every_k == 0
    return self._programs.step(
      self.runs[0].optimizer if is_perturbed else 'sgd'
    )

  def train_epoch(self, epoch: int) -> tuple[np.ndarray, float]:
    """Trains for one epoch.

    Args:
      epoch: Its number, from 0.

    Returns:
      The mean loss of each run over the steps, before each of them, and the
      seconds per step of one run.
    """
    start = time.perf_counter()
    num_steps = self._programs.num_steps
    state = self.state._replace(
      position=_start_epochs(self.state.position, None)
    )
    for i in range(num_steps):
      step = self._step(epoch * num_steps + i)
      state = step(state, self._rho, self.labels, self.images)
    self.state = jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    losses = np.asarray(state.position.loss) / num_steps
    return losses, seconds / num_steps / len(self.runs)


def make_groups(
  runs: Sequence[Run], split: data.Split, programs: Programs
) -> list[Group]:
  """Sorts runs into groups, in the order of the runs.

  Args:
    runs: The runs, with those of a method next to each other.
    split: What they are trained on, with labels [runs, n].
    programs: What is compiled for them.
  """
  split = jax.device_put(split)
  mapped = programs.config.seed_axis == 'vmap'
  groups = []
  for _, positions in itertools.groupby(
    range(len(runs)), key=lambda i: runs[i].optimizer if mapped else i
  ):
    members = list(positions)
    labels = split.labels[jnp.asarray(members)]
    groups.append(
      Group([runs[i] for i in members], split._replace(labels=labels), programs)
    )
  return groups


def gather_states(groups: Sequence[Group]) -> dict[str, TrainState]:
  """The states of all runs of each method, with a leading axis of runs."""
  return {
    name: jax.tree.map(
      lambda *leaves: jnp.concatenate(leaves), *[group.state for group in mine]
    )
    for name, mine in itertools.groupby(groups, key=_method)
  }


def scatter_states(
  groups: Sequence[Group], states: dict[str, TrainState]
) -> None:
  """Gives each group its part of what :func:`gather_states` returned."""
  for name, mine in itertools.groupby(groups, key=_method):
    first = 0
    for group in mine:
      part = slice(first, first + len(group.runs))
      first += len(group.runs)
      group.state = jax.device_put(
        jax.tree.map(lambda x, part=part: x[part], states[name]),
        jax.tree.map(lambda x: x.sharding, group.state),
      )


def _method(group: Group) -> str:
  return group.runs[0].optimizer
