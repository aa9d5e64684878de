"""Groups of runs that train together, one or several at a time."""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import data
import m_sharpness
from training import Position
from training import Programs
from training import Run
from training import TrainState
from training import start_epoch


def stack(trees: Sequence[Any]) -> Any:
  """One tree with a leading axis of runs."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def jit_start_epoch(mapped: bool) -> Callable[[Position], Position]:
  """:func:`start_epoch`, compiled once for all optimizers."""
  return jax.jit(jax.vmap(start_epoch) if mapped else start_epoch)


class Group:
  """Runs of one optimizer that advance together.

  On CPU a group is one run, elsewhere all that differ in rho and seed alone:
  mapped over runs, convolutions become grouped ones, which are slow on CPU.

  Attributes:
    runs: The runs.
    split: What they are trained on, with labels [runs, n] or, for one, [n].
    state: Where they are.
  """

  def __init__(
    self,
    runs: Sequence[Run],
    split: data.Split,
    programs: Programs,
    args: argparse.Namespace,
  ):
    self.runs = runs
    self.split = split
    self._programs = programs
    self._every_k = args.every_k
    self._num_steps = len(split.images) // args.batch_size
    states = [programs.init(run.seed, split) for run in runs]
    rhos = [jnp.float32(run.rho) for run in runs]
    self.state, self._rho = jax.device_put(
      stack(list(zip(states, rhos, strict=True)))
      if self.mapped
      else (states[0], rhos[0]),
      m_sharpness.placement(args.m_sharpness_by),
    )
    self._start_epoch = jit_start_epoch(self.mapped)

  @property
  def mapped(self) -> bool:
    """Whether the state has a leading axis of runs."""
    return len(self.runs) > 1

  def compile(self) -> None:
    """Takes a step on a copy, lest the time of an epoch hold the compiler's."""
    for step in {self._step(i) for i in range(self._every_k)}:
      copy = jax.tree.map(jnp.copy, self.state)
      jax.block_until_ready(step(copy, self._rho, self.split))
    self._start_epoch(self.state.position)

  def _step(self, i):
    sharp = i % self._every_k == 0
    return self._programs.sharp_step if sharp else self._programs.plain_step

  def train_epoch(self, epoch: int) -> tuple[np.ndarray, float]:
    """Trains for one epoch.

    Args:
      epoch: Its number, from 0 on.

    Returns:
      The mean loss of each run over the steps, before each of them, and the
      seconds that a step of one run took.
    """
    start = time.perf_counter()
    state = self.state._replace(position=self._start_epoch(self.state.position))
    for i in range(self._num_steps):
      step = self._step(epoch * self._num_steps + i)
      state = step(state, self._rho, self.split)
    self.state = jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    losses = np.atleast_1d(np.asarray(state.position.loss)) / self._num_steps
    return losses, seconds / self._num_steps / len(self.runs)


def gather_states(groups: Sequence[Group]) -> dict[str, TrainState]:
  """The states of all runs of each optimizer, with a leading axis of runs."""
  states = {}
  for name, mine in itertools.groupby(groups, key=_optimizer):
    first, *others = mine
    states[name] = (
      first.state
      if first.mapped
      else stack([group.state for group in (first, *others)])
    )
  return states


def scatter_states(
  groups: Sequence[Group], states: dict[str, TrainState]
) -> None:
  """Gives each run its part of what :func:`gather_states` returned."""
  for name, mine in itertools.groupby(groups, key=_optimizer):
    for i, group in enumerate(mine):
      group.state = (
        states[name]
        if group.mapped
        else jax.tree.map(lambda x, i=i: x[i], states[name])
      )


def _optimizer(group: Group) -> str:
  return group.runs[0].optimizer


def make_groups(
  runs: Sequence[Run],
  dataset: data.Dataset,
  programs: Callable[..., Programs],
  args: argparse.Namespace,
) -> list[Group]:
  """Sorts runs into groups, in the order of the runs.

  Args:
    runs: The runs, those of an optimizer side by side.
    dataset: The data set with labels [runs, n].
    programs: From an optimizer, the number of examples and whether it is mapped
      to what is compiled for it; see :func:`make_programs`.
    args: The options.
  """
  split = jax.device_put(
    dataset.train, m_sharpness.placement(args.m_sharpness_by)
  )
  mapped = args.seed_axis == 'vmap'
  groups = []
  positions = range(len(runs))
  for _, together in itertools.groupby(
    positions, key=lambda i: runs[i].optimizer if mapped else i
  ):
    group = list(together)
    labels = split.labels[jnp.asarray(group)]
    labels = labels if len(group) > 1 else labels[0]
    groups.append(
      Group(
        [runs[i] for i in group],
        split._replace(labels=labels),
        programs(runs[group[0]].optimizer, len(split.images), len(group) > 1),
        args,
      )
    )
  return groups
