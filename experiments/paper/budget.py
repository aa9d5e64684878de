"""Accuracy for the money: what each method costs, and what it buys.

::

    python -m experiments.paper.budget

Trains every method of ``budget_methods`` on every task of ``budget_tasks``. The
values of a method, such as rho, are chosen among as many candidates each, by
the accuracy on held-out data with seeds of their own; then the method is
trained with the seeds of the results, and the test data are read.

Finished runs are kept in ``--out``: repeat the command to resume. With
``--minutes``, the program stops in time. On a GPU, many runs train at once; on
CPU, each runs on its own, with the same results up to rounding.
"""

import argparse
from collections.abc import Sequence
import json
import math
from pathlib import Path
import time
from typing import Any

import jax

from experiments import cli
from experiments import data
from experiments.paper import budget_comparison
from experiments.paper import budget_methods
from experiments.paper import budget_report
from experiments.paper import budget_tasks
from experiments.paper import budget_training
from experiments.report import records

CONFIG = 'config.json'
RESULTS = 'results.json'
FIGURE = 'budget.png'


def make_parser() -> cli.Parser:
  """The options."""
  parser = cli.Parser(
    prog='budget', description='Compares accuracy and cost of methods.'
  )
  add = parser.add_argument
  names = budget_tasks.TASKS, budget_methods.METHODS
  for option, choices in zip(('--tasks', '--methods'), names, strict=True):
    add(
      option,
      type=cli.checked(
        lambda text: text.split(','),
        lambda given, choices=choices: set(given) <= set(choices),
        f'some of {",".join(choices)}',
        ','.join(list(choices)[:2]),
      ),
      default=list(choices),
      help='which ones, separated by commas (all)',
    )
  add('--seeds', type=cli.count(5), default=5, help='of the results (5)')
  add('--search-seeds', type=cli.count(2), default=2, help='of the search (2)')
  add('--data-dir', type=Path, help='folder with the files of Fashion-MNIST')
  add('--out', type=Path, default=Path('out/budget'), help='for results')
  add('--minutes', type=cli.positive(8), help='when to stop (never)')
  add('--lanes', type=cli.count(20), help='runs at once (1 on CPU, else 20)')
  add('--threads', type=cli.count(8), help='to compile ahead (none on CPU)')
  add('--commit', help='of a copy of the code without its repository')
  return parser


def make_config(args: argparse.Namespace) -> dict[str, Any]:
  """What the results depend on."""
  return records.to_json(
    {
      'seeds': list(range(args.seeds)),
      'search_seeds': list(range(args.seeds, args.seeds + args.search_seeds)),
      'tasks': {
        name: {
          'train_size': task.train_size,
          'epochs': task.epochs,
          'batch_size': task.recipe.batch_size,
          'label_noise': task.label_noise,
          'augment': task.augment,
          'weight_decay': task.recipe.weight_decay,
          'candidates': {
            each: budget_methods.candidates(method, task.recipe)
            for each, method in budget_methods.METHODS.items()
          },
        }
        for name, task in budget_tasks.TASKS.items()
      },
    }
  )


def read(
  parser: cli.Parser, out: Path, config: dict[str, Any]
) -> dict[str, Any]:
  """The results so far; exits if they are of other settings."""
  results = {'config': config, 'tasks': {}}
  path = out / RESULTS
  if not path.exists():
    return results
  results['tasks'] = json.loads(path.read_text())['tasks']
  before = records.read_started(out / CONFIG)
  if before != config:
    parser.error(
      f"argument --out: '{out}' holds results of other settings than this"
      f' program has now. Remove it, or write another --out.'
    )
  return results


def main(argv: Sequence[str]) -> None:
  """Trains what is not in ``--out`` yet."""
  start = time.monotonic()
  parser = make_parser()
  args = parser.parse_args(argv)
  config = make_config(args)
  results = read(parser, args.out, config)
  on_cpu = jax.default_backend() == 'cpu'
  datasets, trainers = {}, {}
  for name in args.tasks:
    load = budget_tasks.TASKS[name].load
    try:
      datasets[name] = load(args.data_dir)
    except data.DataError as error:
      parser.error(str(error))
    # One for all tasks of a data set: they share compiled programs.
    trainers[name] = trainers.get(load) or budget_training.Trainer(
      datasets[name],
      max_lanes=args.lanes or (1 if on_cpu else 20),
      deadline=start + 60 * (args.minutes or math.inf),
      threads=args.threads or (0 if on_cpu else 8),
    )
    trainers[load] = trainers[name]
  args.out.mkdir(parents=True, exist_ok=True)
  started = args.out / CONFIG
  records.write_started(started, config)
  results = {
    **records.provenance('experiments.paper.budget', argv, started),
    'complete': False,
    **results,
  }
  results['commit'] = results['commit'] or args.commit
  comparison = budget_comparison.Comparison(
    args.out / RESULTS, results, trainers, datasets
  )
  work = [
    (task, method)
    for task in args.tasks
    for method in args.methods
    if budget_methods.METHODS[method].is_applicable(
      budget_tasks.TASKS[task].recipe
    )
  ]
  try:
    for each in work:
      comparison.prepare(*each)
    for each in work:
      comparison.run(*each)
    results['complete'] = True
  except budget_training.OutOfTime:
    print('Out of time. To go on, repeat the command.')
  finally:
    for trainer in trainers.values():
      trainer.close()
    comparison.write()
  if not budget_report.tables(results):
    return
  with records.replacing(args.out / FIGURE) as partial:
    budget_report.draw(results).savefig(partial, format='png')
  print('\n\n'.join(budget_report.tables(results).values()))


if __name__ == '__main__':
  cli.run(main)
