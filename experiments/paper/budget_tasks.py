"""What ``experiments.paper.budget`` trains: data, model and recipe by name."""

from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any
from typing import NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import data
from experiments import models
from experiments.models import convolution
from experiments.models import vit

# From a learning rate, the number of steps and a weight decay to an optimizer;
# the last two may be traced.
MakeTx = Callable[
  [float, chex.Numeric, float | jax.Array],
  optax.GradientTransformationExtraArgs,
]


def cosine(lr: float, num_steps: chex.Numeric) -> optax.Schedule:
  """A cosine schedule from ``lr`` to zero, whose length may be traced."""
  return lambda step: lr / 2 * (1 + jnp.cos(jnp.pi * step / num_steps))


def make_adamw(mask: Any = None) -> MakeTx:
  """Makes AdamW with clipping, for what the mask selects."""

  def make_tx(lr, num_steps, weight_decay):
    tx = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(cosine(lr, num_steps), weight_decay=weight_decay),
    )
    if mask is None:
      return tx
    return optax.partition({True: tx, False: optax.set_to_zero()}, mask)

  return make_tx


def make_sgd(
  lr: float, num_steps: chex.Numeric, weight_decay: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum, that of the comparisons of the CNN."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(cosine(lr, num_steps), momentum=0.9),
  )


class Recipe(NamedTuple):
  """A model and its optimizer. Tasks of a recipe share compiled programs.

  Attributes:
    model: The model.
    make_tx: Makes the base optimizer.
    lr: Its learning rate at the first step.
    weight_decay: The weight decay of all methods but those that tune it.
    weight_decays: The candidates of those.
    rho_scale: What the candidates for rho of all methods are multiplied by.
    batch_size: The number of examples of a step.
    has_normalization: Whether the model has normalization layers.
    mask: From parameters to which of them are trained; None for all.
  """

  # Or what has its ``init`` and ``apply``.
  model: nn.Module | Any
  make_tx: MakeTx
  lr: float
  weight_decay: float
  weight_decays: tuple[float, ...]
  rho_scale: float = 1.0
  batch_size: int = 128
  has_normalization: bool = False
  mask: Callable[[Any], Any] | None = None


class Task(NamedTuple):
  """A training set for a recipe.

  Attributes:
    title: What it is, for tables.
    recipe: The recipe.
    load: From the folder of the files, or None, to the data set.
    train_size: The number of its training examples that are used.
    epochs: The number of epochs, except for a method that takes more.
    label_noise: The fraction of labels that are replaced.
    augment: Whether examples are augmented, if the data set says how.
    draws: Whether each seed draws its own training examples.
    metric: What is compared: 'accuracy' or 'balanced_accuracy'.
  """

  title: str
  recipe: Recipe
  load: Callable[[Path | None], data.Dataset]
  train_size: int
  epochs: int
  label_noise: float = 0.0
  augment: bool = False
  draws: bool = False
  metric: str = 'accuracy'


VIT = Recipe(
  model=vit.ViT(10),
  make_tx=make_adamw(),
  lr=1e-3,
  weight_decay=1e-4,
  weight_decays=(0.1, 0.3, 1.0, 3.0),
  has_normalization=True,
)
CNN = Recipe(
  model=models.CNN(10, conv_general_dilated=convolution.convolve),
  make_tx=make_sgd,
  lr=0.03,
  weight_decay=5e-4,
  weight_decays=(2e-3, 5e-3, 1e-2, 2e-2),
  rho_scale=2.0,
)


@functools.cache
def fashion_mnist(data_dir: Path | None) -> data.Dataset:
  """The training images that every task draws on, so that shapes agree."""
  return data.fashion_mnist(data_dir, 10_000)


TASKS: dict[str, Task] = {
  'vit-2000': Task(
    'ViT, 2,000 images', VIT, fashion_mnist, train_size=2000, epochs=60
  ),
  'cnn-noise-40': Task(
    'CNN, 10,000 images, 40% label noise',
    CNN,
    fashion_mnist,
    train_size=10_000,
    epochs=30,
    label_noise=0.4,
  ),
  'vit-10000': Task(
    'ViT, 10,000 images', VIT, fashion_mnist, train_size=10_000, epochs=60
  ),
  'vit-10000-augmented': Task(
    'ViT, 10,000 images, augmented',
    VIT,
    fashion_mnist,
    train_size=10_000,
    epochs=60,
    augment=True,
  ),
}
