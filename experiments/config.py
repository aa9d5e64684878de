"""The options of a comparison: what they are, and what is wrong with them."""

import argparse
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import optax

from experiments import cli
from experiments import data
from experiments import m_sharpness
from experiments import methods
from experiments import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The options, with their defaults. ``--help`` says what they mean.

  Attributes:
    seed_axis: 'loop' trains one run after the other, 'vmap' all runs of a
      method at once.
    rho: The candidates of each method that has a radius.
  """

  preset: str | None = None
  optimizer: list[str] = dataclasses.field(
    default_factory=lambda: [*methods.METHODS]
  )
  seeds: list[int] = dataclasses.field(default_factory=lambda: [*range(5)])
  search_seeds: int = 2
  seed_axis: str = 'loop'
  dataset: str = 'digits'
  data_dir: Path | None = None
  train_size: int | None = None
  merge_held_out: bool = False
  label_noise: float = 0.4
  augment: bool = False
  model: str = 'mlp'
  epochs: int = 100
  batch_size: int = 100
  lr: float = 0.1
  weight_decay: float = 5e-4
  label_smoothing: float = 0.0
  rho: dict[str, list[float]] = dataclasses.field(
    default_factory=lambda: {
      'sam': [0.05, 0.1, 0.2, 0.5, 1.0],
      'asam': [0.5, 1.0, 2.0, 5.0, 10.0],
    }
  )
  eta: float = 0.01
  normalization: str = 'elementwise'
  normalize_biases: bool = False
  perturb: str = 'all'
  ord: float = 2.0
  every_k: int = 1
  m_sharpness: int | None = None
  m_sharpness_by: str = 'vmap'
  out: Path = Path('out/train')
  resume: bool = False


# Kwon et al., ASAM, 2021, section 5: the recipe for CIFAR, with the radii found
# there. SGD had twice the epochs: --optimizer sgd --epochs 400.
_PAPER = {
  'model': 'resnet20',
  'label_noise': 0.0,
  'epochs': 200,
  'batch_size': 128,
  'lr': 0.1,
  'weight_decay': 5e-4,
  'label_smoothing': 0.1,
  'augment': True,
  'merge_held_out': True,
}
PRESETS: dict[str, dict[str, Any]] = {
  'paper-cifar10': {
    **_PAPER,
    'dataset': 'cifar10',
    'rho': {'sam': [0.05], 'asam': [0.5]},
  },
  'paper-cifar100': {
    **_PAPER,
    'dataset': 'cifar100',
    'rho': {'sam': [0.1], 'asam': [1.0]},
  },
}

# JAX takes seeds as uint32; the search adds a few to the largest.
MAX_SEED = 2**31


def _to_seeds(text: str) -> list[int]:
  """The seeds ``3,1,4``, or 0 to n - 1 for a single number n."""
  numbers = [int(part) for part in text.split(',')]
  return numbers if len(numbers) > 1 else list(range(numbers[0]))


def _are_seeds(seeds: list[int]) -> bool:
  return 0 < len(seeds) == len({s for s in seeds if 0 <= s < MAX_SEED})


def _are_methods(names: list[str]) -> bool:
  return len(names) == len(set(names) & set(methods.METHODS))


def _to_rho(text: str) -> tuple[str | None, list[float]]:
  """The candidates ``asam=0.5,1``, or ``0.5,1`` for all methods."""
  name, equals, numbers = text.rpartition('=')
  return name if equals else None, sorted(map(float, numbers.split(',')))


def _is_rho(named: tuple[str | None, list[float]]) -> bool:
  name, rhos = named
  return name in {None, *methods.SHARPNESS_AWARE} and len(rhos) == len(
    {rho for rho in rhos if 0 <= rho < math.inf}
  )


def make_parser() -> cli.Parser:
  """The options and their help. The result lacks what is not given."""
  parser = cli.Parser(
    prog='compare',
    description='Trains a model with SGD, SAM and ASAM, and compares them.',
    argument_default=argparse.SUPPRESS,
  )
  names = ', '.join(methods.METHODS)
  flag = argparse.BooleanOptionalAction
  add = parser.add_argument
  add(
    '--preset',
    choices=PRESETS,
    help="the paper's recipe, which other options override",
  )
  add(
    '--optimizer',
    type=cli.checked(
      lambda text: text.split(','),
      _are_methods,
      f'some of {names}',
      'sgd,asam',
    ),
    help=f'what to compare, of {names} (all)',
  )
  add(
    '--seeds',
    type=cli.checked(
      _to_seeds,
      _are_seeds,
      'a number of seeds >= 1, or distinct seeds from 0 to'
      f' {MAX_SEED - 1} separated by commas',
      '5 or 0,1,2',
    ),
    help='number of seeds, or seeds separated by commas (5)',
  )
  add(
    '--search-seeds',
    type=cli.count(2),
    help='number of seeds for each candidate for rho (2)',
  )
  add(
    '--seed-axis',
    choices=('auto', 'loop', 'vmap'),
    help='a loop over runs, or vmap; auto: a loop on CPU',
  )
  add('--dataset', choices=data.DATASETS, help='data set (digits)')
  add('--data-dir', type=Path, help='folder with the files of the data set')
  add(
    '--train-size',
    type=cli.count(1000),
    help='number of training examples (all that are not held out)',
  )
  add(
    '--merge-held-out',
    action=flag,
    help='train on the held-out examples as well once rho is chosen (no)',
  )
  add(
    '--label-noise',
    type=cli.fraction(0.4),
    help='fraction of training and held-out labels that are replaced (0.4)',
  )
  add('--augment', action=flag, help='random crops and flips (no)')
  add('--model', choices=models.MODELS, help='model (mlp)')
  add('--epochs', type=cli.count(100), help='number of epochs (100)')
  add('--batch-size', type=cli.count(100), help='examples per step (100)')
  add('--lr', type=cli.positive(0.1), help='peak of the cosine schedule (0.1)')
  add('--weight-decay', type=cli.nonnegative(5e-4), help='weight decay (5e-4)')
  add('--label-smoothing', type=cli.fraction(0.1), help='label smoothing (0)')
  add(
    '--rho',
    action='append',
    type=cli.checked(
      _to_rho,
      _is_rho,
      'distinct finite numbers >= 0 separated by commas, with the name of a'
      ' method and = before them if they are for one only',
      '0.5 or asam=0.5,1,2',
    ),
    help='candidates for the radius, for one method as in asam=0.5,1,2;'
    ' a single one is used without a search (five each)',
  )
  add('--eta', type=cli.nonnegative(0.01), help='eta of ASAM (0.01)')
  add(
    '--normalization',
    choices=methods.NORMALIZATIONS,
    help='normalization of ASAM (elementwise)',
  )
  add(
    '--normalize-biases',
    action='store_true',
    help='normalize biases as well, unlike the paper',
  )
  add(
    '--perturb',
    choices=methods.PERTURBED,
    help='layers to perturb: all, those of BatchNorm, or others',
  )
  add(
    '--ord',
    type=cli.checked(
      float, lambda p: p > 1, 'a number > 1, or inf', '2 or inf'
    ),
    help='exponent p of the norm of the ball (2)',
  )
  add('--every-k', type=cli.count(1), help='perturb on every k-th step (1)')
  add(
    '--m-sharpness',
    type=cli.count(32),
    metavar='M',
    help='perturb each group of M examples of a batch on its own',
  )
  add(
    '--m-sharpness-by',
    choices=m_sharpness.WAYS,
    help='all groups at once, or one after the other (vmap)',
  )
  add('--out', type=Path, help='folder for results (out/train)')
  add('--resume', action='store_true', help='resume the run in --out')
  return parser


def _join_values(argv: Sequence[str]) -> list[str]:
  """Turns ``--lr -inf`` into ``--lr=-inf``: argparse takes -inf for an option.

  Otherwise the error would not say what is wrong with the value.
  """
  joined = []
  for argument in argv:
    before = joined[-1] if joined else ''
    if before.startswith('--') and '=' not in before and argument[:2] != '--':
      joined[-1] = f'{before}={argument}'
    else:
      joined.append(argument)
  return joined


def parse(argv: Sequence[str]) -> Config:
  """Reads the command line; exits if it contradicts itself."""
  parser = make_parser()
  given = vars(parser.parse_args(_join_values(argv)))
  preset = PRESETS.get(given.get('preset', ''), {})
  config = Config(**preset | {k: v for k, v in given.items() if k != 'rho'})
  rhos = given.get('rho', [])
  # What is given for one method overrides what is given for all.
  of_all = {n: each for name, each in rhos if not name for n in config.rho}
  merged = config.rho | of_all | {name: each for name, each in rhos if name}
  config = dataclasses.replace(
    config, rho={n: merged[n] for n in config.optimizer if n in merged}
  )
  if given.get('seed_axis', 'auto') == 'auto':
    on_cpu = jax.default_backend() == 'cpu'
    config = dataclasses.replace(config, seed_axis='loop' if on_cpu else 'vmap')
  for problem in _find_problems(config, given):
    parser.error(problem)
  return config


# Options without effect unless one of these methods is compared.
_NEEDS = {
  **dict.fromkeys(
    ('rho', 'ord', 'every_k', 'm_sharpness', 'perturb'),
    methods.SHARPNESS_AWARE,
  ),
  **dict.fromkeys(('eta', 'normalization', 'normalize_biases'), ('asam',)),
}


def _find_problems(config: Config, given: Mapping[str, Any]) -> Iterator[str]:
  """What is wrong with options that do not fit each other or the machine."""
  compared = config.optimizer
  for name, needs in _NEEDS.items():
    if name in given and not set(needs) & set(compared):
      yield (
        f'argument --{name.replace("_", "-")}: is for {" and ".join(needs)},'
        f' and ignored by --optimizer {",".join(compared)}. Leave it out, or'
        f' write --optimizer {",".join([*compared, needs[-1]])}.'
      )
  for name, _ in given.get('rho', []):
    if name not in {None, *compared}:
      yield (
        f'argument --rho: is given for {name}, which is not compared. Leave it'
        f' out, or write --optimizer {",".join([*compared, name])}.'
      )
  sizes = {name: len(rhos) for name, rhos in config.rho.items()}
  if len(set(sizes.values())) > 1:
    few = min(sizes, key=lambda name: sizes[name])
    example = ','.join(f'{0.1 * 2**i:g}' for i in range(max(sizes.values())))
    yield (
      f'argument --rho: must give all methods equally many candidates, but got'
      f' {", ".join(f"{n} for {name}" for name, n in sizes.items())}. For'
      f' example: --rho {few}={example}.'
    )
  if 'search_seeds' in given and max(sizes.values(), default=0) < 2:
    yield (
      'argument --search-seeds: is ignored without a search for rho. Leave it'
      ' out, or give several candidates. For example: --rho 0.5,1.'
    )
  if config.rho and config.ord != 2 and 'rho' not in given:
    yield (
      f'argument --ord: the default candidates for rho are for --ord 2, but got'
      f' {config.ord:g}. Give --rho as well. For example: --rho'
      f' sam=0.0001,0.001 --rho asam=0.001,0.01.'
    )
  if config.normalization == 'filterwise' and config.model == 'mlp':
    yield (
      'argument --normalization: filterwise is for convolutions, and the same'
      ' as elementwise for --model mlp, which has none. Leave it out, or write'
      ' --model cnn.'
    )
  if config.perturb != 'all' and config.model in models.WITHOUT_BATCH_NORM:
    yield (
      f'argument --perturb: must be all for --model {config.model}, which has'
      f' no BatchNorm, but got {config.perturb}. Leave it out, or write --model'
      f' cnn-bn.'
    )
  yield from _find_problems_of_groups(config, given)
  of_preset = PRESETS.get(config.preset or '', {})
  if of_preset and config.dataset != of_preset['dataset']:
    yield (
      f'argument --dataset: --preset {config.preset} is a recipe for'
      f' {of_preset["dataset"]}, but got {config.dataset}. Leave one of the two'
      f' out.'
    )
  if config.data_dir is not None and config.dataset == 'digits':
    yield (
      'argument --data-dir: is ignored by --dataset digits, which comes with'
      ' scikit-learn. Leave it out, or write --dataset fashion_mnist.'
    )


def _find_problems_of_groups(
  config: Config, given: Mapping[str, Any]
) -> Iterator[str]:
  m = config.m_sharpness
  if not m:
    if 'm_sharpness_by' in given:
      yield (
        'argument --m-sharpness-by: is ignored without --m-sharpness. Leave it'
        ' out, or give both. For example: --m-sharpness 32.'
      )
    return
  if config.batch_size % m:
    yield (
      f'argument --m-sharpness: must divide the batch size,'
      f' {config.batch_size}, but got {m}. For example: --m-sharpness'
      f' {math.gcd(config.batch_size, m)}.'
    )
  way = config.m_sharpness_by
  if way == 'microbatching' and not hasattr(optax, 'microbatching'):
    yield (
      'argument --m-sharpness-by: microbatching needs Optax 0.2.7 or newer.'
      ' Install it, or write --m-sharpness-by vmap.'
    )


def load_dataset(config: Config) -> data.Dataset:
  """The data set.

  Raises:
    data.DataError: It cannot be read, or does not fit the options.
  """
  dataset = data.DATASETS[config.dataset](config.data_dir, config.train_size)
  if config.augment and dataset.augment is None:
    raise data.DataError(
      f'argument --augment: there are no crops and flips for {config.dataset}.'
      f' Leave it out, or write --no-augment.'
    )
  num_examples = len(dataset.train.labels)
  if config.batch_size > num_examples:
    raise data.DataError(
      f'argument --batch-size: must be at most {num_examples}, the size of the'
      f' training set, but got {config.batch_size}. For example: --batch-size'
      f' {min(100, num_examples)}.'
    )
  return dataset
