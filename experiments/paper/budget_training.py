"""Trains runs of a method, as many lanes at once as the memory holds."""

from collections.abc import Sequence
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data
from experiments.paper import budget_lanes
from experiments.paper import budget_methods
from experiments.paper import budget_tasks
from experiments.paper.budget_lanes import Inputs
from experiments.paper.budget_lanes import Lane

# The most steps of a compiled program.
CHUNK = 60


class OutOfTime(Exception):  # noqa: N818  (not an error)
  """The time limit has passed; what is unfinished is dropped."""


class Trainer:
  """Compiles what is needed for the data set and recipes, and trains.

  Args:
    dataset: The data set; tasks use the first of its training examples.
    max_lanes: The most lanes at once.
    deadline: The value of ``time.monotonic`` at which to stop.
  """

  def __init__(
    self,
    dataset: data.Dataset,
    max_lanes: int,
    deadline: float = math.inf,
  ):
    self._dataset = dataset
    self._images = jnp.asarray(dataset.train.images)
    self._max_lanes = max_lanes
    self._deadline = deadline
    self._programs: dict[Any, Any] = {}

  def groups(self, lanes: Sequence[Lane]) -> list[Sequence[Lane]]:
    """Lanes that train at once; the last ones are repeated to fill a group."""
    count = -(-len(lanes) // self._max_lanes)
    size = -(-len(lanes) // count)
    full = [*lanes, *[lanes[-1]] * (count * size - len(lanes))]
    return [full[i : i + size] for i in range(0, len(full), size)]

  def train(
    self, task: budget_tasks.Task, name: str, lanes: Sequence[Lane]
  ) -> Any:
    """Trains a group of lanes of a method.

    Returns:
      The parameters to be evaluated, with a leading axis of lanes.

    Raises:
      OutOfTime: The deadline has passed.
    """
    method = budget_methods.METHODS[name]
    init, run = self._program(task, method, len(lanes))
    num_steps, chunk = steps_of(task, method)
    seeds = [lane.seed for lane in lanes]
    init_keys, augment_keys = jax.vmap(
      lambda seed: jax.random.split(jax.random.key(seed)), out_axes=1
    )(jnp.uint32(seeds))
    inputs = Inputs(
      values=jnp.float32([lane.values for lane in lanes]),
      keys=augment_keys,
      labels=self._labels(task, lanes),
      images=self._images,
      num_steps=jnp.int32(num_steps),
    )
    indices = budget_lanes.make_indices(
      *(seeds, task.epochs * method.epochs, task.train_size),
      task.recipe.batch_size,
    )
    for i, seed in enumerate(seeds):
      indices[:, i] = drawn(self._dataset, task, seed)[indices[:, i]]
    params = budget_lanes.init_params(
      *(task.recipe.model, self._dataset.preprocess, init_keys),
      self._dataset.train.images[:1],
    )
    carry = jax.block_until_ready((params, init(params, inputs)))
    for first in range(0, num_steps, chunk):
      steps = np.arange(first, first + chunk, dtype=np.int32)
      carry = run(carry, inputs, indices[first : first + chunk], steps)
      jax.block_until_ready(carry)
      if time.monotonic() > self._deadline:
        raise OutOfTime
    params, opt_state = carry
    if method.eval_params:
      axes = budget_lanes.counters_are_shared(opt_state), 0
      params = budget_lanes.map_lanes(method.eval_params, len(lanes), axes, 0)(
        opt_state, params
      )
    return params

  def logits(
    self, task: budget_tasks.Task, params: Any, split: data.Split
  ) -> np.ndarray:
    """The logits of trained lanes, [lanes, n, classes]."""
    return budget_lanes.logits(
      *(task.recipe.model, self._dataset.preprocess),
      *(params, split.images),
    )

  def _labels(self, task, lanes):
    """The labels of each lane: noisy ones, then those that are not used."""
    labels = np.asarray(self._dataset.train.labels)
    rows = []
    for lane in lanes:
      noisy = dataset_of_seed(self._dataset, task, lane.seed).train.labels
      rows.append(labels.copy())
      rows[-1][drawn(self._dataset, task, lane.seed)] = noisy
    return jnp.asarray(np.stack(rows), jnp.int32)

  def _program(self, task, method, num_lanes):
    """The jitted functions ``init`` and ``run``."""
    # By what is traced: twice the epochs need no program of their own.
    key = (
      *(task.recipe, task.augment),
      *(method.make_tx, method.ascent_part, num_lanes),
    )
    if key not in self._programs:
      self._programs[key] = budget_lanes.make_functions(
        self._dataset, task, method, num_lanes
      )
    return self._programs[key]


def steps_of(
  task: budget_tasks.Task, method: budget_methods.Method
) -> tuple[int, int]:
  """Steps of the run, and of each call of the program.

  Examples that do not fill a batch are left out of an epoch.
  """
  per_epoch = task.train_size // task.recipe.batch_size
  num_steps = per_epoch * task.epochs * method.epochs
  # Compiled for one length, which divides all.
  length = per_epoch * task.epochs
  chunk = max(n for n in range(1, CHUNK + 1) if length % n == 0)
  return num_steps, chunk


def drawn(
  dataset: data.Dataset, task: budget_tasks.Task, seed: int
) -> np.ndarray:
  """The indices of the training examples of a seed."""
  if not task.draws:
    return np.arange(task.train_size)
  rng = np.random.default_rng([seed, 1])
  return rng.choice(len(dataset.train.labels), task.train_size, replace=False)


def dataset_of_seed(
  dataset: data.Dataset, task: budget_tasks.Task, seed: int
) -> data.Dataset:
  """The examples of a task for a seed, with its labels."""
  indices = drawn(dataset, task, seed)
  train = jax.tree.map(lambda x: x[indices], dataset.train)
  noisy = data.add_label_noise(
    dataset._replace(train=train), task.label_noise, [seed]
  )
  only = lambda split: split._replace(labels=split.labels[0])
  return noisy._replace(train=only(noisy.train), held_out=only(noisy.held_out))
