"""Trains with SGD, SAM and ASAM on the same seeds, and compares them.

::

    python -m experiments.compare --label-noise 0.4 --out out/train

The gradients of the three are in ``methods.py``, the step that descends them in
``loop.py``. First rho of SAM and of ASAM is chosen among equally many
candidates, on held-out data whose labels are as noisy as those for training.
Then all are trained with the same seeds. The test data is used once, at the
end.

After Ctrl-C, a kill or a crash, ``--resume`` goes on from the last epoch, with
the same results as a run without interruption.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from experiments import cli
from experiments import config as options
from experiments import data
from experiments import evaluation
from experiments import methods
from experiments import run_folder
from experiments.comparison import Comparison
from experiments.config import Config
from experiments.report import progress
from experiments.report import records
from experiments.report import reporting


def measure(trained: Comparison) -> dict[str, np.ndarray]:
  """The final measures, arrays [runs]; the only use of the test data."""
  measured = {
    name: trained.evaluate(quantity, trained.dataset.train)
    for name, quantity in evaluation.ON_TRAINING_SET.items()
  }
  measured['test_accuracy'] = trained.evaluate(
    evaluation.accuracy, trained.dataset.test
  )
  return measured


def describe_optimizers(
  trained: Comparison, measured: dict[str, np.ndarray]
) -> dict[str, Any]:
  """The part of results.json about each method, as far as it was trained."""
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
  config: Config,
  trained: Comparison,
  measured: dict[str, np.ndarray],
) -> dict[str, Any]:
  """The content of results.json."""
  return {
    **provenance,
    'complete': bool(measured),
    'config': {
      **cli.to_json(config),
      'momentum': methods.MOMENTUM,
      'sharpness_rho': {
        'sam_ball': evaluation.SAM_BALL_RHO,
        'asam_ball': evaluation.ASAM_BALL_RHO,
      },
      'sharpness_batch_size': evaluation.BATCH_SIZE,
    },
    'search': reporting.describe_searches(trained.searches),
    'optimizers': (
      describe_optimizers(trained, measured)
      if 'final' in trained.histories
      else {}
    ),
    'wall_time_s': trained.wall_time,
  }


def compare(config: Config, dataset: data.Dataset, argv: Sequence[str]) -> None:
  """Trains, and writes the results, also those of an interrupted run."""
  console = Console(markup=False)  # A path may have brackets.
  started = config.out / run_folder.STARTED_WITH
  provenance = records.provenance('experiments.compare', argv, started)
  trained = Comparison(config, dataset, console.print)
  measured = {}
  try:
    with cli.interruptible():
      with progress.shown(*trained.cost) as advance:
        trained.run(advance)
      measured = measure(trained)
  finally:
    results = describe(provenance, config, trained, measured)
    # What was interrupted does not replace what is finished.
    if measured or (
      trained.num_epochs and not run_folder.is_finished(config.out)
    ):
      reporting.write(console, config.out, results, trained.searches)


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  config = options.parse(argv)
  parser = options.make_parser()
  try:
    dataset = options.load_dataset(config)
  except data.DataError as error:
    parser.error(str(error))
  with cli.check_out(parser, config):
    try:
      compare(config, dataset, argv)
      run_folder.clear(config.out)
    except KeyboardInterrupt:
      if not run_folder.is_resumable(config.out):
        run_folder.clear(config.out)
        parser.exit(130, 'Interrupted before the first epoch was trained.\n')
      if run_folder.is_finished(config.out):
        parser.exit(
          130,
          'Interrupted. The finished results are unchanged. To continue, repeat'
          ' the command with --resume.\n',
        )
      parser.exit(130)
    except OSError as error:
      parser.exit(
        1,
        f"compare: error: cannot write to '{config.out}': {error}. Repeat the"
        f' command with --resume when this is solved.\n',
      )


if __name__ == '__main__':
  cli.run(main)
