"""Trains with SGD, SAM and ASAM on the same seeds, and compares them.

::

    python examples/train.py --label-noise 0.4 --out out/train

First rho of SAM and of ASAM is chosen, from equally many candidates and on
held-out data whose labels are as noisy as those for training. Then all train
side by side with the same seeds. The test data is read once, at the end. The
optimizers are put to use in ``training.py``.

What is killed goes on with ``--resume``, and ends as if nothing had happened.
"""

import argparse
from collections.abc import Sequence
import contextlib
import sys
from typing import Any

import numpy as np
from rich.console import Console

import arguments
import evaluation
import experiment
import optimizers
import progress
import records
import reporting
import summaries


def measure(trained: experiment.Experiment) -> dict[str, np.ndarray]:
  """What is measured at the end, arrays [runs]; here the test data is read."""
  measured = {
    name: trained.evaluate(quantity, trained.dataset.train)
    for name, quantity in evaluation.ON_TRAINING_SET.items()
  }
  measured['test_accuracy'] = trained.evaluate(
    evaluation.accuracy, trained.dataset.test
  )
  return measured


def describe_optimizers(
  trained: experiment.Experiment, measured: dict[str, np.ndarray]
) -> dict[str, Any]:
  """What results.json holds of each optimizer, as far as the training got."""
  history = {
    quantity: np.asarray(values)
    for quantity, values in trained.histories['final'].items()
  }
  described = {}
  for name, rho in trained.rhos.items():
    mine = [run.optimizer == name for run in trained.runs]
    curves = {
      quantity: values.reshape(-1, len(mine))[:, mine]
      for quantity, values in history.items()
    }
    described[name] = {
      'rho': rho,
      **{
        quantity: reporting.summarize(values[mine])
        for quantity, values in measured.items()
      },
      **reporting.summarize_curves(curves),
      'curves': curves,
    }
  return reporting.add_time_ratios(described)


def describe(
  provenance: dict[str, Any],
  args: argparse.Namespace,
  trained: experiment.Experiment,
  measured: dict[str, np.ndarray],
) -> dict[str, Any]:
  """What results.json holds."""
  return {
    **provenance,
    'complete': bool(measured),
    'config': {
      **vars(args),
      'ord': f'{args.ord:g}',  # JSON has no inf.
      'momentum': optimizers.MOMENTUM,
      'sharpness_rho': {
        'sam_ball': evaluation.SAM_BALL_RHO,
        'asam_ball': evaluation.ASAM_BALL_RHO,
      },
    },
    'search': reporting.describe_searches(trained.searches),
    'optimizers': (
      describe_optimizers(trained, measured)
      if 'final' in trained.histories
      else {}
    ),
    'wall_time_s': trained.wall_time,
  }


def train(
  trained: experiment.Experiment, args: argparse.Namespace
) -> dict[str, np.ndarray]:
  """Trains, and measures at the end, while progress is shown."""
  folder = args.out / 'tensorboard' if args.tensorboard else None
  with contextlib.closing(summaries.Summaries(folder)) as curves:

    def add_epochs():
      for stage, history in trained.histories.items():
        curves.add_epochs(stage, trained.runs_of(stage), history)

    with progress.shown(*trained.cost) as advance:
      trained.run(advance, add_epochs)
    add_epochs()  # Of a run that was interrupted after its last.
    measured = measure(trained)
    curves.add_measured(trained.stage, trained.runs, measured)
  return measured


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  args, dataset = arguments.parse(argv)
  provenance = records.provenance(
    'examples/train.py', argv, args.out / arguments.STARTED_WITH
  )
  console = Console(markup=False)  # A path may have brackets.
  trained = experiment.Experiment(args, dataset, console.print)
  measured = {}
  try:
    measured = train(trained, args)
  finally:
    # Ctrl-C, too, leaves what there is.
    results = describe(provenance, args, trained, measured)
    reporting.write(console, args.out, results, trained.searches)
  arguments.finish(args.out)


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except KeyboardInterrupt:
    sys.exit(130)  # As a shell reports it.
