"""The command line: what can be set, and what is wrong with it."""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import math
from pathlib import Path
import tempfile
from typing import Any
from typing import NoReturn

import data

# What the training can take so far: images in float32, and no convolutions,
# which its scan and its vmap over runs make ten times slower on CPU.
DATASETS = ('digits',)
MODELS = ('mlp',)

# JAX takes seeds as uint32; the search adds a few beyond the largest.
MAX_SEED = 2**31


class Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, without the usage before it."""

  def error(self, message: str) -> NoReturn:
    """Says what is wrong on stderr and exits with status 2."""
    if 'Write' not in message:  # argparse's own words
      message += '. Write --help for what there is.'
    self.exit(2, f'{self.prog}: error: {message}\n')


def checked(
  convert: Callable[[str], Any],
  is_valid: Callable[[Any], bool],
  needed: str,
  example: str,
) -> Callable[[str], Any]:
  """An argparse type whose error says what is needed and what to write."""

  def parse(text):
    with contextlib.suppress(ValueError):
      value = convert(text)
      if is_valid(value):
        return value
    raise argparse.ArgumentTypeError(
      f'must be {needed}, but got {text!r}. Write for example {example}.'
    )

  return parse


def split_by_commas(
  convert: Callable[[str], Any],
) -> Callable[[str], list[Any]]:
  """``convert`` for each part of a text with commas."""
  return lambda text: [convert(part) for part in text.split(',')]


def to_seeds(text: str) -> list[int]:
  """The seeds ``3,1,4``, or as many as a single number says, from 0 on."""
  numbers = split_by_commas(int)(text)
  return numbers if len(numbers) > 1 else list(range(numbers[0]))


def are_seeds(seeds: list[int]) -> bool:
  """Whether ``seeds`` are some, all different and in range."""
  return 0 < len(seeds) == len({s for s in seeds if 0 <= s < MAX_SEED})


def are_rhos(rhos: list[float]) -> bool:
  """Whether ``rhos`` are all different radii."""
  return len(rhos) == len({rho for rho in rhos if 0 <= rho < math.inf})


def count(example: int) -> Callable[[str], int]:
  """An argparse type for an integer >= 1."""
  return checked(int, lambda n: n >= 1, 'an integer >= 1', f'{example}')


def rho_candidates(example: str) -> Callable[[str], list[float]]:
  """An argparse type for radii, which become ascending."""
  return checked(
    lambda text: sorted(split_by_commas(float)(text)),
    are_rhos,
    'finite numbers >= 0, all different, with commas between them',
    example,
  )


def make_parser() -> Parser:
  """The options, their defaults and their help."""
  parser = Parser(
    description='Trains a model on noisy labels with SGD, SAM and ASAM.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--dataset', choices=DATASETS, default='digits', help='data set'
  )
  parser.add_argument('--model', choices=MODELS, default='mlp', help='model')
  parser.add_argument(
    '--label-noise',
    type=checked(float, lambda x: 0 <= x < 1, 'a number in [0, 1)', '0.4'),
    default=0.4,
    help='fraction of the labels for training and search that are made wrong',
  )
  parser.add_argument(
    '--epochs', type=count(100), default=100, help='number of epochs'
  )
  parser.add_argument(
    '--batch-size', type=count(100), default=100, help='examples a step'
  )
  parser.add_argument(
    '--lr',
    type=checked(
      float, lambda x: 0 < x < math.inf, 'a finite number > 0', '0.1'
    ),
    default=0.1,
    help='learning rate at the start, decayed by a cosine',
  )
  parser.add_argument(
    '--seeds',
    type=checked(
      to_seeds,
      are_seeds,
      f'a number >= 1 of seeds, or different seeds from 0 to {MAX_SEED - 1}'
      ' with commas between them',
      '5 or 0,1,2',
    ),
    default='5',
    help='number of seeds, or the seeds themselves with commas between them',
  )
  parser.add_argument(
    '--rho-sam',
    type=rho_candidates('0.05,0.1,0.2'),
    default='0.05,0.1,0.2,0.5,1',
    help='candidates for rho of SAM; with a single one there is no search',
  )
  parser.add_argument(
    '--rho-asam',
    type=rho_candidates('0.5,1,2'),
    default='0.5,1,2,5,10',
    help='candidates for rho of ASAM, as many as for SAM',
  )
  parser.add_argument(
    '--out',
    type=Path,
    default='out/train',
    help='folder for results.json and curves.png',
  )
  return parser


def join_values(argv: Sequence[str]) -> list[str]:
  """Turns ``--lr -inf`` into ``--lr=-inf``: argparse takes -inf for an option.

  What was wrong with the value could otherwise not be said.
  """
  joined = []
  for argument in argv:
    before = joined[-1] if joined else ''
    if before.startswith('--') and '=' not in before and argument[:2] != '--':
      joined[-1] = f'{before}={argument}'
    else:
      joined.append(argument)
  return joined


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, data.Dataset]:
  """Reads the command line, with an exit if it cannot be done as it says.

  Args:
    argv: The command line without the program's name.

  Returns:
    The arguments and the data set that they name.
  """
  parser = make_parser()
  args = parser.parse_args(join_values(argv))
  if len(args.rho_sam) != len(args.rho_asam):
    ten_times = ','.join(f'{10 * rho:g}' for rho in args.rho_sam)
    parser.error(
      f'argument --rho-asam: must have as many candidates as --rho-sam, which'
      f' has {len(args.rho_sam)}, but got {len(args.rho_asam)}. Write for'
      f' example --rho-asam {ten_times}.'
    )
  dataset = data.DATASETS[args.dataset]()
  num_examples = len(dataset.train.labels)
  if args.batch_size > num_examples:
    parser.error(
      f'argument --batch-size: must be at most {num_examples}, the size of the'
      f' training set, but got {args.batch_size}. Write for example'
      f' --batch-size {min(100, num_examples)}.'
    )
  try:
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()
  except OSError as error:
    parser.error(
      f'argument --out: must be a folder that can be written to, but got'
      f" '{args.out}' ({error.strerror}). Write for example --out out/train."
    )
  return args, dataset
