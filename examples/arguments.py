"""The command line: what can be set, and what is wrong with it."""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import json
import math
from pathlib import Path
import shutil
from typing import Any
from typing import NoReturn

import jax

import checkpoints
import data
import m_sharpness
import models
import optimizers
import presets
import records

# JAX takes seeds as uint32; the search adds a few beyond the largest.
MAX_SEED = 2**31


class Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, without the usage before it."""

  def error(self, message: str) -> NoReturn:
    """Says what is wrong on stderr and exits with status 2."""
    if 'write' not in message.lower():  # argparse's own words
      message = f'{message.rstrip(".")}. Write --help for what there is.'
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


def count(example: float) -> Callable[[str], int]:
  """An argparse type for an integer >= 1."""
  return checked(int, lambda n: n >= 1, 'an integer >= 1', f'{example:g}')


def number(
  is_valid: Callable[[float], bool], needed: str, example: str
) -> Callable[[str], float]:
  """An argparse type for a finite number."""
  return checked(
    float, lambda x: math.isfinite(x) and is_valid(x), needed, example
  )


def positive(example: float) -> Callable[[str], float]:
  """An argparse type for a finite number > 0."""
  return number(lambda x: x > 0, 'a finite number > 0', f'{example:g}')


def nonnegative(example: float) -> Callable[[str], float]:
  """An argparse type for a finite number >= 0."""
  return number(lambda x: x >= 0, 'a finite number >= 0', f'{example:g}')


def fraction(example: float) -> Callable[[str], float]:
  """An argparse type for a number in [0, 1)."""
  return number(lambda x: 0 <= x < 1, 'a number in [0, 1)', f'{example:g}')


def to_rho(text: str) -> tuple[str | None, list[float]]:
  """The candidates ``asam=0.5,1``, or for all optimizers ``0.5,1``."""
  name, equals, numbers = text.rpartition('=')
  return name if equals else None, sorted(split_by_commas(float)(numbers))


def is_rho(named: tuple[str | None, list[float]]) -> bool:
  """Whether it is candidates for an optimizer that has a radius."""
  name, rhos = named
  return (name is None or name in optimizers.SHARPNESS_AWARE) and are_rhos(rhos)


def are_optimizers(names: list[str]) -> bool:
  """Whether ``names`` are all different optimizers."""
  return len(names) == len(set(names) & set(optimizers.OPTIMIZERS))


def make_parser() -> Parser:
  """The options and their help. What is not given is not in the result."""
  parser = Parser(
    description='Trains a model with SGD, SAM and ASAM, and compares them.',
    argument_default=argparse.SUPPRESS,
    allow_abbrev=False,
  )
  add = parser.add_argument
  names = ', '.join(optimizers.OPTIMIZERS)
  add(
    '--preset',
    choices=presets.PRESETS,
    help="the paper's recipe; other options may change it",
  )
  add(
    '--optimizer',
    type=checked(
      split_by_commas(str), are_optimizers, f'some of {names}', 'sgd,asam'
    ),
    help=f'what is compared on the same seeds, of {names} (all)',
  )
  add(
    '--seeds',
    type=checked(
      to_seeds,
      are_seeds,
      f'a number >= 1 of seeds, or different seeds from 0 to {MAX_SEED - 1}'
      ' with commas between them',
      '5 or 0,1,2',
    ),
    help='number of seeds, or the seeds with commas between them (5)',
  )
  add(
    '--search-seeds',
    type=count(2),
    help='number of seeds that each candidate for rho is tried with (2)',
  )
  add(
    '--seed-axis',
    choices=('auto', 'loop', 'vmap'),
    help='one run after the other, or vmapped; auto: a loop on CPU',
  )
  add('--dataset', choices=data.DATASETS, help='data set (digits)')
  add('--data-dir', type=Path, help='folder with the files of the data set')
  add(
    '--train-size',
    type=count(1000),
    help='number of examples to train on (all that are not held out)',
  )
  add(
    '--merge-held-out',
    action=argparse.BooleanOptionalAction,
    help='after the choice of rho, train on the held-out examples as well (no)',
  )
  add(
    '--label-noise',
    type=fraction(0.4),
    help='fraction of the labels for training and search made wrong (0.4)',
  )
  add(
    '--augment',
    action=argparse.BooleanOptionalAction,
    help='random crops and flips (no)',
  )
  add('--model', choices=models.MODELS, help='model (mlp)')
  add('--epochs', type=count(100), help='number of epochs (100)')
  add('--batch-size', type=count(100), help='examples a step (100)')
  add(
    '--lr',
    type=positive(0.1),
    help='learning rate at the start, decayed by a cosine (0.1)',
  )
  add(
    '--weight-decay',
    type=nonnegative(5e-4),
    help='weight decay (5e-4)',
  )
  add(
    '--label-smoothing',
    type=fraction(0.1),
    help='label smoothing in training (0)',
  )
  add(
    '--rho',
    action='append',
    type=checked(
      to_rho,
      is_rho,
      'finite numbers >= 0, all different, with commas between them, of one'
      ' optimizer if its name and = stand before them',
      '0.5 or asam=0.5,1,2',
    ),
    help='candidates for the radius, for one optimizer as in asam=0.5,1,2;'
    ' a single one is taken without a search (five for each)',
  )
  add(
    '--eta',
    type=nonnegative(0.01),
    help='the constant of normalization (0.01)',
  )
  add(
    '--normalization',
    choices=optimizers.NORMALIZATIONS,
    help='the normalization of asam (elementwise)',
  )
  add(
    '--normalize-biases',
    action='store_true',
    help='normalize biases as well, which the paper does not',
  )
  add(
    '--perturb',
    choices=optimizers.PERTURBED,
    help='the layers that are perturbed: all, those of BatchNorm, or others',
  )
  add(
    '--ord',
    type=checked(float, lambda p: p > 1, 'a number > 1, or inf', '2 or inf'),
    help='the exponent p of the ball (2)',
  )
  add(
    '--every-k',
    type=count(1),
    help='a perturbation on every k-th step (1)',
  )
  add(
    '--m-sharpness',
    type=count(32),
    metavar='M',
    help='a perturbation for each group of M examples of a batch',
  )
  add(
    '--m-sharpness-by',
    choices=m_sharpness.WAYS,
    help='groups at once, one after the other, or one on each device (vmap)',
  )
  add('--out', type=Path, help='folder for results (out/train)')
  add(
    '--resume',
    action='store_true',
    help='go on with the run that was interrupted in --out',
  )
  add(
    '--tensorboard',
    action='store_true',
    help='write curves for TensorBoard to --out',
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


# Options that do nothing unless one of these optimizers is compared.
NEEDS_OPTIMIZER = {
  'rho': optimizers.SHARPNESS_AWARE,
  'ord': optimizers.SHARPNESS_AWARE,
  'every_k': optimizers.SHARPNESS_AWARE,
  'm_sharpness': optimizers.SHARPNESS_AWARE,
  'perturb': optimizers.SHARPNESS_AWARE,
  'eta': ('asam',),
  'normalization': ('asam',),
  'normalize_biases': ('asam',),
}


def check_ignored(
  parser: Parser, given: dict[str, Any], compared: Sequence[str]
) -> None:
  """Exits if an option was given that the others make useless."""
  for name, needs in NEEDS_OPTIMIZER.items():
    if name in given and not set(needs) & set(compared):
      parser.error(
        f'argument --{name.replace("_", "-")}: is for {" and ".join(needs)},'
        f' and ignored by --optimizer {",".join(compared)}. Leave it out, or'
        f' write --optimizer {",".join([*compared, needs[-1]])}.'
      )
  for name, _ in given.get('rho', []):
    if name not in {None, *compared}:
      parser.error(
        f'argument --rho: is given for {name}, which is not compared. Leave it'
        f' out, or write --optimizer {",".join([*compared, name])}.'
      )


def merge_rho(
  given: list[tuple[str | None, list[float]]],
  default: dict[str, list[float]],
  compared: Sequence[str],
) -> dict[str, list[float]]:
  """The candidates of each optimizer that has a radius; what is named wins."""
  unnamed = {
    name: rhos
    for owner, rhos in given
    if owner is None
    for name in optimizers.SHARPNESS_AWARE
  }
  named = {name: rhos for name, rhos in given if name}
  merged = default | unnamed | named
  return {name: merged[name] for name in compared if name in merged}


def is_search(rho: dict[str, list[float]]) -> bool:
  """Whether any optimizer has more than one candidate."""
  return any(len(rhos) > 1 for rhos in rho.values())


def check_candidates(parser: Parser, rho: dict[str, list[float]]) -> None:
  """Exits unless all optimizers choose among equally many candidates."""
  sizes = {name: len(rhos) for name, rhos in rho.items()}
  if len(set(sizes.values())) > 1:
    listed = ', '.join(f'{name} {n}' for name, n in sizes.items())
    few = min(sizes, key=lambda name: sizes[name])
    many = max(sizes, key=lambda name: sizes[name])
    example = ','.join(f'{0.1 * 2**i:g}' for i in range(sizes[many]))
    parser.error(
      f'argument --rho: must give all optimizers equally many candidates, but'
      f' got: {listed}. Write for example --rho {few}={example}.'
    )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, data.Dataset]:
  """Reads the command line, with an exit if it cannot be done as it says.

  Args:
    argv: The command line without the program's name.

  Returns:
    The options and the data set that they name.
  """
  parser = make_parser()
  given = vars(parser.parse_args(join_values(argv)))
  compared = given.get('optimizer', list(optimizers.OPTIMIZERS))
  check_ignored(parser, given, compared)
  preset = presets.PRESETS.get(given.get('preset', ''), {})
  options = presets.DEFAULTS | preset | given
  args = argparse.Namespace(**options)
  args.optimizer = compared
  defaults = (presets.DEFAULTS | preset)['rho']
  args.rho = merge_rho(given.get('rho', []), defaults, compared)
  check_candidates(parser, args.rho)
  check_choices(parser, given, args)
  if preset and args.dataset != preset['dataset']:
    parser.error(
      f'argument --dataset: --preset {args.preset} is a recipe for'
      f' {preset["dataset"]}, but got {args.dataset}. Leave one of the two out.'
    )
  if args.seed_axis == 'auto':
    args.seed_axis = 'loop' if jax.default_backend() == 'cpu' else 'vmap'
  dataset = load_dataset(parser, args)
  check_out(parser, args)
  return args, dataset


def check_choices(
  parser: Parser, given: dict[str, Any], args: argparse.Namespace
) -> None:
  """Exits if options do not fit each other."""
  if 'search_seeds' in given and not is_search(args.rho):
    parser.error(
      'argument --search-seeds: is ignored where there is one rho for each'
      ' optimizer, and nothing to search. Leave it out, or write several'
      ' candidates as in --rho 0.5,1.'
    )
  if args.rho and args.ord != 2 and 'rho' not in given:
    parser.error(
      f'argument --ord: the candidates for rho that are used by default are for'
      f' --ord 2, but got {args.ord:g}. Write --rho, too: for --ord inf for'
      f' example --rho sam=0.0001,0.001 --rho asam=0.001,0.01.'
    )
  if args.normalization == 'filterwise' and args.model == 'mlp':
    parser.error(
      'argument --normalization: filterwise is for convolutions, and the same'
      ' as elementwise for --model mlp, which has none. Leave it out, or write'
      ' --model cnn.'
    )
  if args.perturb != 'all' and args.model in models.WITHOUT_BATCH_NORM:
    parser.error(
      f'argument --perturb: must be all for --model {args.model}, which has no'
      f' BatchNorm, but got {args.perturb}. Leave it out, or write --model'
      f' cnn-bn.'
    )
  check_groups(parser, given, args)


def check_groups(
  parser: Parser, given: dict[str, Any], args: argparse.Namespace
) -> None:
  """Exits if a batch cannot be divided as ``--m-sharpness`` says."""
  if not args.m_sharpness:
    if 'm_sharpness_by' in given:
      parser.error(
        'argument --m-sharpness-by: is ignored without --m-sharpness. Leave it'
        ' out, or write for example --m-sharpness 32.'
      )
    return
  if args.batch_size % args.m_sharpness:
    parser.error(
      f'argument --m-sharpness: must divide the batch size,'
      f' {args.batch_size}, but got {args.m_sharpness}. Write for example'
      f' --m-sharpness {math.gcd(args.batch_size, args.m_sharpness)}.'
    )
  missing = m_sharpness.missing(args.m_sharpness_by)
  if missing:
    parser.error(
      f'argument --m-sharpness-by: {args.m_sharpness_by} needs {missing}, which'
      f' is not in the version that is installed. Install a newer one, or write'
      f' --m-sharpness-by vmap.'
    )
  num_groups, num_devices = (
    args.batch_size // args.m_sharpness,
    jax.device_count(),
  )
  if args.m_sharpness_by == 'shard_map' and num_groups != num_devices:
    parser.error(
      f'argument --m-sharpness-by: shard_map takes as many groups as there are'
      f' devices, {num_devices}, but --batch-size {args.batch_size} and'
      f' --m-sharpness {args.m_sharpness} make {num_groups}. Write for example'
      f' --batch-size {num_devices * args.m_sharpness}.'
    )


def load_dataset(parser: Parser, args: argparse.Namespace) -> data.Dataset:
  """The data set, with an exit if it does not fit the options."""
  if args.data_dir is not None and args.dataset == 'digits':
    parser.error(
      'argument --data-dir: is ignored by --dataset digits, which comes with'
      ' scikit-learn. Leave it out, or write --dataset fashion_mnist.'
    )
  try:
    dataset = data.DATASETS[args.dataset](args.data_dir, args.train_size)
  except data.DataError as error:
    parser.error(str(error))
  if args.augment and dataset.augment is None:
    parser.error(
      f'argument --augment: there are no crops and flips for {args.dataset}.'
      f' Leave it out, or write --no-augment.'
    )
  num_examples = len(dataset.train.labels)
  if args.batch_size > num_examples:
    parser.error(
      f'argument --batch-size: must be at most {num_examples}, the size of the'
      f' training set, but got {args.batch_size}. Write for example'
      f' --batch-size {min(100, num_examples)}.'
    )
  return dataset


# What a run was started with, in --out beside its checkpoints until it is done.
STARTED_WITH = 'checkpoints.json'
# Options that do not change what a run computes.
NOT_CONFIG = ('out', 'resume', 'tensorboard', 'data_dir', 'threads')


def check_out(parser: Parser, args: argparse.Namespace) -> None:
  """Exits unless results may be written to ``--out``.

  A run that was interrupted there is neither lost nor mixed with another: what
  it was started with is kept in a file beside its checkpoints.
  """
  file = args.out / STARTED_WITH
  config = {
    name: value
    for name, value in records.to_json(vars(args)).items()
    if name not in NOT_CONFIG
  }
  if args.resume:
    check_resumption(parser, file, config)
  elif file.exists():
    parser.error(
      f"argument --out: '{args.out}' holds a run that was interrupted. Write"
      f' --resume to go on with it, or another --out; or remove {file}.'
    )
  try:
    args.out.mkdir(parents=True, exist_ok=True)
    records.write_started(file, config)
  except OSError as error:
    parser.error(
      f'argument --out: must be a folder that can be written to, but got'
      f" '{args.out}' ({error.strerror}). Write for example --out out/train."
    )


def finish(out: Path) -> None:
  """Removes what a run has needed to be resumed."""
  (out / STARTED_WITH).unlink()
  shutil.rmtree(out / checkpoints.FOLDER)


def check_resumption(
  parser: Parser, file: Path, config: dict[str, Any]
) -> None:
  """Exits unless an interrupted run had the same options."""
  if not file.exists():
    parser.error(
      f"argument --resume: there is no interrupted run in '{file.parent}'."
      f' Leave it out, or write the --out of one.'
    )
  started = records.read_started(file)
  for name, value in config.items():
    if started.get(name) != value:
      parser.error(
        f'argument --resume: the run was started with'
        f' {name} = {json.dumps(started.get(name))}, but got'
        f' {json.dumps(value)}. Write the same options again.'
      )
