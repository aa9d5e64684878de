"""The stages of a comparison, with a checkpoint after every epoch.

In the first one rho is searched for, in the second one all optimizers are
trained with what was found. In both, all runs advance side by side, epoch by
epoch: whatever else the machine does slows all of them alike.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
import time

from flax import linen as nn
import jax
import numpy as np

import checkpoints
import data
import evaluation
import groups
import models
import optimizers
import search
import training

# For every epoch, a number for every run.
History = dict[str, list[list[float]]]
QUANTITIES = ('train_loss', 'held_out_accuracy', 'seconds_per_step')
STAGES = ('search', 'final')


class Experiment:
  """A comparison, and where it stands.

  Attributes:
    model: The model.
    stage: The name of the present stage.
    runs: The runs of this stage.
    dataset: What they are trained on, with labels [runs, n].
    groups: The same runs in groups, which hold the parameters.
    histories: What has happened in each stage.
  """

  def __init__(
    self,
    args: argparse.Namespace,
    dataset: data.Dataset,
    report: Callable[[str], None],
  ):
    """Starts anew or, with ``--resume``, from the newest checkpoint.

    Args:
      args: The options.
      dataset: The data set with its true labels [n].
      report: Is told what a person should know.
    """
    self.model: nn.Module = models.MODELS[args.model](dataset.num_classes)
    self._args = args
    self._dataset = dataset
    self._checkpoints = checkpoints.Checkpoints(args.out / checkpoints.FOLDER)
    self._began = time.perf_counter()
    if not (args.resume and self._restore(report)):
      self.histories: dict[str, History] = {}
      self._start(STAGES[0] if self.searched else STAGES[1])

  @property
  def searched(self) -> list[training.Run]:
    """The runs of the search; none where nothing is to be chosen."""
    args = self._args
    return search.make_runs(args.rho, args.seeds, args.search_seeds)

  @property
  def searches(self) -> dict[str, search.Search]:
    """What was found, for each optimizer, once the search is done."""
    history = self.histories.get('search')
    if history is None or len(history['train_loss']) < self._args.epochs:
      return {}
    return search.make_searches(self.searched, history['held_out_accuracy'][-1])

  @property
  def rhos(self) -> dict[str, float]:
    """The radius of each optimizer, as given or as found; SGD has none."""
    given = {name: rhos[0] for name, rhos in self._args.rho.items()}
    found = {name: each.rho for name, each in self.searches.items()}
    return {
      name: (given | found).get(name, 0.0) for name in self._args.optimizer
    }

  @property
  def cost(self) -> tuple[int, int]:
    """Gradients a step, over epochs and runs: those done, and all."""
    costs = {
      'search': sum(cost(run.optimizer) for run in self.searched),
      'final': len(self._args.seeds) * sum(map(cost, self._args.optimizer)),
    }
    done = sum(
      len(history['train_loss']) * costs[stage]
      for stage, history in self.histories.items()
    )
    return done, sum(costs.values()) * self._args.epochs

  @property
  def wall_time(self) -> float:
    """Seconds so far; of what is resumed, with those of its earlier parts."""
    return time.perf_counter() - self._began

  def runs_of(self, stage: str) -> Sequence[training.Run]:
    """The runs of a stage that has begun."""
    if stage == 'search':
      return self.searched
    return [
      training.Run(name, rho, seed)
      for name, rho in self.rhos.items()
      for seed in self._args.seeds
    ]

  def run(
    self, advance: Callable[[int], None], after_epoch: Callable[[], None]
  ) -> None:
    """Trains until the last epoch of the last stage.

    Args:
      advance: Is told of the cost of what was done, part by part.
      after_epoch: Is called when all runs are an epoch further.
    """
    while True:
      history = self.histories[self.stage]
      for group in self.groups:
        group.compile()
      for epoch in range(len(history['train_loss']), self._args.epochs):
        self._train_epoch(epoch, history, advance)
        self._save()
        after_epoch()
      if self.stage == STAGES[-1]:
        return
      self._start(STAGES[-1])

  def evaluate(
    self, measure: evaluation.Measure, split: data.Split
  ) -> np.ndarray:
    """A measure [runs] of the present parameters."""
    return evaluation.evaluate(
      measure, self.groups, self.model, self._dataset, split
    )

  def _start(self, stage: str) -> None:
    self.stage = stage
    self.histories[stage] = {quantity: [] for quantity in QUANTITIES}
    self._make_runs()

  def _make_runs(self) -> None:
    args = self._args
    self.runs = self.runs_of(self.stage)
    dataset = data.add_label_noise(
      self._dataset, args.label_noise, [run.seed for run in self.runs]
    )
    if self.stage == 'final' and args.merge_held_out:
      dataset = data.merge_held_out(dataset)
    self.dataset = dataset._replace(
      train=jax.device_put(dataset.train),
      held_out=jax.device_put(dataset.held_out),
    )
    self.groups = groups.make_groups(
      self.runs, self.dataset, self._programs, args
    )

  @functools.cache  # noqa: B019  (as long as the program runs)
  def _programs(self, optimizer: str, num_examples: int, mapped: bool):
    return training.make_programs(
      optimizer,
      self.model,
      self._dataset,
      self._args,
      num_steps=num_examples // self._args.batch_size,
      mapped=mapped,
    )

  def _train_epoch(
    self, epoch: int, history: History, advance: Callable[[int], None]
  ) -> None:
    losses, seconds = [], []
    for group in self.groups:
      group_losses, group_seconds = group.train_epoch(epoch)
      losses += group_losses.tolist()
      seconds += [group_seconds] * len(group.runs)
      advance(sum(cost(run.optimizer) for run in group.runs))
    accuracies = self.evaluate(evaluation.accuracy, self.dataset.held_out)
    history['train_loss'].append(losses)
    history['seconds_per_step'].append(seconds)
    history['held_out_accuracy'].append(accuracies.tolist())

  def _save(self) -> None:
    epochs = sum(len(each['train_loss']) for each in self.histories.values())
    self._checkpoints.save(
      epochs,
      groups.gather_states(self.groups),
      {
        'stage': self.stage,
        'histories': self.histories,
        'wall_time_s': self.wall_time,
      },
    )

  def _restore(self, report: Callable[[str], None]) -> bool:
    """Goes on from the newest checkpoint that is whole, if there is one."""

    def make_states(progress):
      self.stage, self.histories = progress['stage'], progress['histories']
      self._began -= progress['wall_time_s']
      self._make_runs()
      return groups.gather_states(self.groups)

    restored = self._checkpoints.restore(make_states, report)
    if restored is None:
      report('There is no whole checkpoint. The run starts anew.')
      return False
    states, _ = restored
    groups.scatter_states(self.groups, states)
    return True


def cost(optimizer: str) -> int:
  """The gradients that a step takes."""
  return 2 if optimizer in optimizers.SHARPNESS_AWARE else 1
