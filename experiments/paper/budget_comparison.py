"""The runs of ``experiments.paper.budget``, and the file that keeps them."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax

from experiments import data
from experiments.paper import budget_methods
from experiments.paper import budget_report
from experiments.paper import budget_tasks
from experiments.paper import budget_training
from experiments.paper.budget_lanes import Lane
from experiments.report import records


class Program(NamedTuple):
  """A program that compares methods.

  Attributes:
    name: Its module.
    description: For its help.
    tasks: The tasks by name.
    methods: The methods by name.
    make_trainer: Makes a trainer with the arguments of
      :class:`budget_training.Trainer`.
    versions: Of what the results depend on besides the usual packages.
  """

  name: str
  description: str
  tasks: Mapping[str, budget_tasks.Task]
  methods: Mapping[str, budget_methods.Method]
  make_trainer: Callable[..., budget_training.Trainer] = budget_training.Trainer
  versions: Mapping[str, str] = {}


class Comparison:
  """The runs of all tasks and methods, and the file of their results.

  Args:
    path: The file.
    results: What it holds so far; changed in place.
    trainers: A trainer for each task.
    datasets: The data set of each task.
    program: Its tasks and methods, in the order of the tables.
  """

  def __init__(
    self,
    path: Path,
    results: dict[str, Any],
    trainers: dict[str, budget_training.Trainer],
    datasets: dict[str, data.Dataset],
    program: Program,
  ):
    self._path = path
    self._tasks, self._methods = program.tasks, program.methods
    self.results = results
    self._trainers, self._datasets = trainers, datasets

  def entry(self, task_name: str, name: str) -> dict[str, Any]:
    """The results of a method on a task, with the runs that are finished."""
    task = self._tasks[task_name]
    method = self._methods[name]
    found = self.results['tasks'].setdefault(
      task_name,
      {
        'title': task.title,
        **({} if task.metric == 'accuracy' else {'metric': task.metric}),
        'methods': {},
      },
    )
    return found['methods'].setdefault(
      name,
      {
        'title': method.title,
        'gradients_per_step': method.gradients,
        'epochs': method.epochs,
        'names': list(method.names),
        'search': [],
        'runs': [],
      },
    )

  def run(self, task_name: str, name: str) -> None:
    """Chooses the values of a method, trains with them, and reads the test."""
    entry = self.entry(task_name, name)
    candidates = budget_methods.candidates(
      self._methods[name], self._tasks[task_name].recipe
    )
    search = [
      Lane(seed, values)
      for values in candidates
      for seed in self.results['config']['search_seeds']
      if len(candidates) > 1
    ]
    self._train(task_name, name, search, entry['search'], is_search=True)
    values = budget_report.choose(entry['search']) if search else (0.0, 0.0)
    lanes = [Lane(seed, values) for seed in self.results['config']['seeds']]
    self._train(task_name, name, lanes, entry['runs'], is_search=False)
    metric = self._tasks[task_name].metric
    entry['summary'] = budget_report.summarize(entry, metric)
    self.write()
    print(budget_report.line(task_name, entry, metric), flush=True)

  def _train(self, task_name, name, lanes, done, *, is_search):
    """Trains the lanes that are not done, and appends what is measured."""
    task = self._tasks[task_name]
    trainer, dataset = self._trainers[task_name], self._datasets[task_name]
    keys = {(run['seed'], *run['values']) for run in done}
    left = [lane for lane in lanes if (lane.seed, *lane.values) not in keys]
    for group in trainer.groups(left) if left else []:
      params = trainer.train(task, name, group)
      held_out = trainer.logits(task, params, dataset.held_out)
      test = (
        [None] * len(group)
        if is_search
        else trainer.logits(task, params, dataset.test)
      )
      for lane, on_held_out, on_test in zip(group, held_out, test, strict=True):
        if (lane.seed, *lane.values) in keys:
          continue  # Repeated to fill the group.
        keys.add((lane.seed, *lane.values))
        labels = budget_training.dataset_of_seed(
          dataset, task, lane.seed
        ).held_out.labels
        found = budget_report.measure(on_held_out, labels)
        run = {
          'seed': lane.seed,
          'values': list(lane.values),
          f'held_out_{task.metric}': found[task.metric],
          'device': jax.devices()[0].device_kind,
        }
        if on_test is not None:
          found = budget_report.measure(on_test, dataset.test.labels)
          run |= {f'test_{what}': value for what, value in found.items()}
        done.append(run)
      self.write()

  def write(self) -> None:
    """Writes the results so far, in the order of tasks and methods."""
    tasks = self.results['tasks'] = _sorted(self.results['tasks'], self._tasks)
    for task in tasks.values():
      task['methods'] = _sorted(task['methods'], self._methods)
    records.write_json(self._path, self.results)


def _sorted(found: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """``found`` in the order of ``names``; others, of an older program, last."""
  return {name: found[name] for name in (*names, *found) if name in found}


def missing(
  program: Program,
  results: dict[str, Any],
  tasks: Iterable[str],
  methods: Iterable[str],
) -> list[tuple[str, str]]:
  """The tasks and methods that have no results yet."""

  def is_missing(task, method):
    found = results['tasks'].get(task, {'methods': {}})['methods']
    recipe = program.tasks[task].recipe
    return program.methods[method].is_applicable(
      recipe
    ) and 'summary' not in found.get(method, {})

  return [
    (task, method)
    for task in tasks
    for method in methods
    if is_missing(task, method)
  ]
