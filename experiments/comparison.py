"""The two stages of a comparison, with a checkpoint after every epoch.

First the search for rho, then the training of all methods with the rho that was
found. In both, all runs advance together, epoch by epoch, so that whatever else
the machine does slows all of them alike.
"""

from collections.abc import Callable
import functools
import time

from flax import linen as nn
import jax
import numpy as np

from experiments import checkpoints
from experiments import data
from experiments import evaluation
from experiments import loop
from experiments import methods
from experiments import models
from experiments import search
from experiments.config import Config

# For every epoch, a number for every run.
History = dict[str, list[list[float]]]
QUANTITIES = ('train_loss', 'held_out_accuracy', 'seconds_per_step')
STAGES = ('search', 'final')


class Comparison:
  """A comparison and its progress.

  Attributes:
    model: The model.
    stage: The name of the current stage.
    runs: The runs of this stage.
    dataset: What they are trained on, with labels [runs, n].
    groups: The same runs in groups, which hold the parameters.
    histories: The history of each stage so far.
  """

  def __init__(
    self,
    config: Config,
    dataset: data.Dataset,
    report: Callable[[str], None],
  ):
    """Starts from the beginning or, with ``--resume``, from a checkpoint.

    Args:
      config: The options.
      dataset: The data set with its true labels [n].
      report: Called with messages for the user.
    """
    self.model: nn.Module = models.MODELS[config.model](dataset.num_classes)
    self._config = config
    self._dataset = dataset
    self._checkpoints = checkpoints.Checkpoints(config.out / checkpoints.FOLDER)
    self._began = time.perf_counter()
    self.histories: dict[str, History] = {}
    if not (config.resume and self._restore(report)):
      self._start(STAGES[0] if self.searched else STAGES[1])

  @property
  def searched(self) -> list[loop.Run]:
    """The runs of the search; none if there is nothing to choose."""
    config = self._config
    return search.make_runs(config.rho, config.seeds, config.search_seeds)

  @property
  def searches(self) -> dict[str, search.Search]:
    """The search of each method, once it is done."""
    history = self.histories.get('search')
    if history is None or len(history['train_loss']) < self._config.epochs:
      return {}
    return search.make_searches(self.searched, history['held_out_accuracy'][-1])

  @property
  def rhos(self) -> dict[str, float]:
    """The radius of each method, as given or as found; 0 for SGD."""
    given = {name: rhos[0] for name, rhos in self._config.rho.items()}
    found = {name: each.rho for name, each in self.searches.items()}
    return {
      name: (given | found).get(name, 0.0) for name in self._config.optimizer
    }

  @property
  def num_epochs(self) -> int:
    """Number of epochs done, of both stages."""
    return sum(len(each['train_loss']) for each in self.histories.values())

  @property
  def cost(self) -> tuple[int, int]:
    """Gradients per step, summed over epochs and runs: done, and in total."""
    cost = methods.num_gradients
    costs = {
      'search': sum(cost(run.optimizer) for run in self.searched),
      'final': len(self._config.seeds) * sum(map(cost, self._config.optimizer)),
    }
    done = sum(
      len(history['train_loss']) * costs[stage]
      for stage, history in self.histories.items()
    )
    return done, sum(costs.values()) * self._config.epochs

  @property
  def wall_time(self) -> float:
    """Seconds so far, including those before the run was resumed."""
    return time.perf_counter() - self._began

  def run(self, advance: Callable[[int], None]) -> None:
    """Trains until the last epoch of the last stage.

    Args:
      advance: Called with the cost of each part that is done.
    """
    while True:
      history = self.histories[self.stage]
      for group in self.groups:
        group.compile()
      for epoch in range(len(history['train_loss']), self._config.epochs):
        self._train_epoch(epoch, history, advance)
        self._save()
      if self.stage == STAGES[-1]:
        return
      self._start(STAGES[-1])

  def evaluate(
    self, measure: evaluation.Measure, split: data.Split
  ) -> np.ndarray:
    """A measure [runs] of the current parameters."""
    return evaluation.evaluate(
      measure, self.groups, self.model, self._dataset.preprocess, split
    )

  def _start(self, stage: str) -> None:
    self.stage = stage
    self.histories[stage] = {quantity: [] for quantity in QUANTITIES}
    self._make_runs()

  def _make_runs(self) -> None:
    config = self._config
    self.runs = (
      self.searched
      if self.stage == 'search'
      else [
        loop.Run(name, rho, seed)
        for name, rho in self.rhos.items()
        for seed in config.seeds
      ]
    )
    dataset = data.add_label_noise(
      self._dataset, config.label_noise, [run.seed for run in self.runs]
    )
    if self.stage == 'final' and config.merge_held_out:
      dataset = data.merge_held_out(dataset)
    self.dataset = dataset._replace(
      train=jax.device_put(dataset.train),
      held_out=jax.device_put(dataset.held_out),
    )
    self.groups = loop.make_groups(
      self.runs,
      self.dataset.train,
      self._programs(len(self.dataset.train.images)),
    )

  @functools.cache  # noqa: B019  (as long as the program runs)
  def _programs(self, num_examples: int) -> loop.Programs:
    return loop.Programs(self.model, self._dataset, self._config, num_examples)

  def _train_epoch(
    self, epoch: int, history: History, advance: Callable[[int], None]
  ) -> None:
    losses, seconds = [], []
    for group in self.groups:
      group_losses, group_seconds = group.train_epoch(epoch)
      losses += group_losses.tolist()
      seconds += [group_seconds] * len(group.runs)
      advance(sum(methods.num_gradients(run.optimizer) for run in group.runs))
    accuracies = self.evaluate(evaluation.accuracy, self.dataset.held_out)
    history['train_loss'].append(losses)
    history['seconds_per_step'].append(seconds)
    history['held_out_accuracy'].append(accuracies.tolist())

  def _save(self) -> None:
    self._checkpoints.save(
      self.num_epochs,
      loop.gather_states(self.groups),
      {
        'stage': self.stage,
        'histories': self.histories,
        'wall_time_s': self.wall_time,
      },
    )

  def _restore(self, report: Callable[[str], None]) -> bool:
    """Resumes from the newest intact checkpoint, if there is one."""

    def make_states(progress):
      self.stage, self.histories = progress['stage'], progress['histories']
      self._began -= progress['wall_time_s']
      self._make_runs()
      return loop.gather_states(self.groups)

    restored = self._checkpoints.restore(make_states, report)
    if restored is None:
      return False
    states, _ = restored
    loop.scatter_states(self.groups, states)
    return True
