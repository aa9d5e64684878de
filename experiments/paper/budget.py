"""Accuracy and cost: what each method costs, and what it buys.

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
import math
from pathlib import Path
import time
from typing import Any

import jax

from experiments import cli
from experiments import data
from experiments import run_folder
from experiments.paper import budget_comparison
from experiments.paper import budget_methods
from experiments.paper import budget_report
from experiments.paper import budget_tasks
from experiments.paper import budget_training
from experiments.report import records


def make_program() -> budget_comparison.Program:
  """The comparison of all tasks and methods."""
  return budget_comparison.Program(
    'experiments.paper.budget',
    'Compares accuracy and cost of methods.',
    *(budget_tasks.TASKS, budget_methods.METHODS),
  )


def make_parser(program: budget_comparison.Program) -> cli.Parser:
  """The options."""
  prog = program.name.rsplit('.', 1)[-1]
  parser = cli.Parser(prog=prog, description=program.description)
  add = parser.add_argument
  names = program.tasks, program.methods
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
  add('--data-dir', type=Path, help='folder with the data')
  add('--out', type=Path, default=Path('out') / prog, help='for results')
  add('--minutes', type=cli.positive(8), help='when to stop (never)')
  add('--lanes', type=cli.count(20), help='runs at once (1 on CPU, else 20)')
  return parser


def make_config(
  program: budget_comparison.Program, args: argparse.Namespace
) -> dict[str, Any]:
  """What the results depend on."""
  return records.to_json(
    {
      'seeds': list(range(args.seeds)),
      'search_seeds': list(range(args.seeds, args.seeds + args.search_seeds)),
      **({'versions': program.versions} if program.versions else {}),
      'tasks': {
        name: {
          'train_size': task.train_size,
          'epochs': task.epochs,
          'batch_size': task.recipe.batch_size,
          'label_noise': task.label_noise,
          'augment': task.augment,
          'draws': task.draws,
          'metric': task.metric,
          'lr': task.recipe.lr,
          'weight_decay': task.recipe.weight_decay,
          'candidates': {
            each: budget_methods.candidates(method, task.recipe)
            for each, method in program.methods.items()
          },
        }
        for name, task in program.tasks.items()
      },
    }
  )


def load(
  parser: cli.Parser,
  args: argparse.Namespace,
  program: budget_comparison.Program,
  deadline: float,
) -> tuple[dict[str, data.Dataset], dict[str, budget_training.Trainer]]:
  """The data set and the trainer of each task."""
  on_cpu = jax.default_backend() == 'cpu'
  datasets, trainers, by_data = {}, {}, {}
  for name in args.tasks:
    read_data = program.tasks[name].load
    try:
      datasets[name] = read_data(args.data_dir)
    except data.DataError as error:
      parser.error(str(error))
    # One for all tasks of a data set: they share compiled programs.
    if read_data not in by_data:
      by_data[read_data] = program.make_trainer(
        datasets[name],
        max_lanes=args.lanes or (1 if on_cpu else 20),
        deadline=deadline,
      )
    trainers[name] = by_data[read_data]
  return datasets, trainers


def train(
  program: budget_comparison.Program,
  parser: cli.Parser,
  argv: Sequence[str],
  args: argparse.Namespace,
  config: dict[str, Any],
  before: dict[str, Any],
) -> dict[str, Any]:
  """Trains what is missing, and returns the results."""
  deadline = time.monotonic() + 60 * (args.minutes or math.inf)
  datasets, trainers = load(parser, args, program, deadline)
  results = begin(program.name, argv, args.out, config, before)
  comparison = budget_comparison.Comparison(
    args.out / run_folder.RESULTS, results, trainers, datasets, program
  )
  work = budget_comparison.missing(program, results, args.tasks, args.methods)
  try:
    for each in work:
      comparison.run(*each)
  except budget_training.OutOfTime:
    print('Out of time. To go on, repeat the command.')
  finally:
    results['complete'] = not budget_comparison.missing(
      program, results, program.tasks, program.methods
    )
    comparison.write()
  return results


def begin(
  name: str,
  argv: Sequence[str],
  out: Path,
  config: dict[str, Any],
  before: dict[str, Any],
) -> dict[str, Any]:
  """The results of a program that goes on with those ``before``."""
  started = out / run_folder.STARTED_WITH
  records.write_started(started, config)
  return {
    **records.provenance(name, argv, started),
    'complete': False,
    'config': config,
    'tasks': before.get('tasks', {}),
  }


def main(argv: Sequence[str]) -> None:
  """Trains what is not in ``--out`` yet, and prints the tables."""
  program = make_program()
  parser = make_parser(program)
  compare(program, parser, argv, parser.parse_args(argv))


def compare(
  program: budget_comparison.Program,
  parser: cli.Parser,
  argv: Sequence[str],
  args: argparse.Namespace,
) -> None:
  """Trains what is not in ``--out`` yet, and prints the tables."""
  prog = program.name.rsplit('.', 1)[-1]
  config = make_config(program, args)
  with cli.lock_out(parser, args.out, config):
    results = run_folder.read(args.out) or {'config': config, 'tasks': {}}
    if budget_comparison.missing(program, results, args.tasks, args.methods):
      results = train(program, parser, argv, args, config, results)
    tables = budget_report.tables(results)
    if tables:
      records.write_figure(
        args.out / f'{prog}.png', budget_report.draw(results)
      )
  print('\n\n'.join(tables.values()))


if __name__ == '__main__':
  cli.run(main)
