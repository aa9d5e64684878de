"""What the programs that measure the cost of a step share.

Times are comparable within one run alone: everything is timed in turn, round
after round, and the ratios of a round say more than its seconds.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import data
import models
import records
import sources

# Data sets, and the shape of their training images.
SHAPES = {
  'fashion_mnist': (sources.FASHION_MNIST, (60_000, 28, 28, 1)),
  'cifar10': (sources.CIFAR10, (50_000, 32, 32, 3)),
}


def random_dataset(name: str) -> data.Dataset:
  """A data set of random pixels, like that of this name in all else.

  No file is needed, and the values of pixels cost no time.
  """
  source, shape = SHAPES[name]
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, shape, np.uint8)
  labels = rng.integers(0, source.num_classes, shape[0], np.int32)
  part = images, labels
  return data.load(lambda source, data_dir: (part, part), source, None, None)


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
  """A parser of the options that all of these programs have."""
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  option = parser.add_argument
  option('--dataset', choices=SHAPES, default='fashion_mnist', help='its shape')
  option('--model', choices=models.MODELS, default='cnn', help='model')
  option('--batch-size', type=int, default=128, help='examples a step')
  option('--rounds', type=int, default=20, help='how often all are timed')
  option('--steps', type=int, default=20, help='steps a time')
  option('--out', type=Path, default=out, help='folder for results.json')
  return parser


def time_in_turn(
  measures: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
  """Calls each function in each round; what it returns are seconds a step."""
  seconds = {name: [] for name in measures}
  for _ in range(rounds):
    for name, measure in measures.items():
      seconds[name].append(measure())
  return seconds


def report(
  program: str,
  argv: Sequence[str],
  args: argparse.Namespace,
  what: str,
  seconds: Mapping[str, Sequence[float]],
) -> None:
  """Writes results.json and prints a table; ratios are to the first.

  Args:
    program: The program, such as 'examples/input_cost.py'.
    argv: Its command line.
    args: Its options.
    what: What was timed, for a person.
    seconds: Seconds a step, in each round, by the name of what was timed.
  """
  first = next(iter(seconds))
  timed = {
    name: {
      'ms_per_step': 1000 * np.median(values),
      'time_ratio_to_first': np.median(np.divide(values, seconds[first])),
      'seconds_per_step': values,
    }
    for name, values in seconds.items()
  }
  args.out.mkdir(parents=True, exist_ok=True)
  records.write_json(
    args.out / 'results.json',
    {
      **records.provenance(program, argv),
      'config': vars(args),
      'timed': timed,
    },
  )
  print(
    f'{what}, {args.model} on {args.batch_size} images like those of'
    f' {args.dataset}, median of {args.rounds}:'
  )
  for name, each in timed.items():
    print(
      f'  {name:10} {each["ms_per_step"]:9.3f} ms, times'
      f' {each["time_ratio_to_first"]:.3f}'
    )
