"""Measures whether seeds are faster in a loop or mapped over.

::

    python examples/seed_axis_cost.py --model cnn --seeds 3 --out out/seed_axis

Both are as in ``train.py --seed-axis loop|vmap``: one compiled step of ASAM,
called for one seed after the other, or once for all of them. Under ``vmap`` the
convolutions become grouped ones, since each seed has kernels of its own; those
are slow on CPU.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
import sys

import jax

import arguments
import data
import groups
import models
import presets
import timing
import training


def make_measures(
  args: argparse.Namespace,
) -> dict[str, Callable[[], float]]:
  """Makes what trains for an epoch, and returns the seconds of a step and seed.

  Args:
    args: The options; a batch of ``args.steps`` steps is an epoch.
  """
  dataset = timing.random_dataset(args.dataset)
  split = jax.tree.map(
    lambda x: x[: args.steps * args.batch_size], dataset.train
  )
  seeds = range(args.seeds)
  dataset = data.add_label_noise(dataset._replace(train=split), 0.0, seeds)
  options = argparse.Namespace(**presets.DEFAULTS | vars(args))
  runs = [training.Run('asam', 0.5, seed) for seed in seeds]

  def make_measure(seed_axis):
    options.seed_axis = seed_axis
    programs = lambda optimizer, num_examples, mapped: training.make_programs(
      optimizer,
      models.MODELS[args.model](dataset.num_classes),
      dataset,
      options,
      num_steps=args.steps,
      mapped=mapped,
    )
    trained = groups.make_groups(
      runs, dataset, functools.cache(programs), options
    )
    for group in trained:
      group.compile()

    def measure():
      seconds = [group.train_epoch(0)[1] * len(group.runs) for group in trained]
      return sum(seconds) / len(runs)

    return measure

  return {axis: make_measure(axis) for axis in ('loop', 'vmap')}


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = timing.make_parser(
    'Measures whether seeds are faster in a loop or mapped over.',
    'out/seed_axis_cost',
  )
  parser.add_argument(
    '--seeds', type=arguments.count(3), default=3, help='number of seeds'
  )
  args = parser.parse_args(argv)
  measures = make_measures(args)
  seconds = timing.time_in_turn(measures, args.rounds)
  what = f'A step of ASAM and one of {args.seeds} seeds'
  timing.report('examples/seed_axis_cost.py', argv, args, what, seconds)


if __name__ == '__main__':
  main(sys.argv[1:])
