"""Data sets by name, and label noise.

A data set is split once and for all; which labels are wrong depends on a seed.
To add a data set, write a function like :func:`digits` and name it in
``DATASETS``.
"""

from collections.abc import Callable
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np
import sklearn.datasets

Array = jax.Array | np.ndarray


class Split(NamedTuple):
  """A part of a data set.

  Attributes:
    images: float32 [n, height, width, channels], from 0 to 1.
    labels: int32 [n], or [runs, n] where each run has labels of its own.
  """

  images: Array
  labels: Array


# How `jax.vmap` maps a Split over runs: they share the images.
LABELS_PER_RUN = Split(images=None, labels=0)  # pyright: ignore[reportArgumentType]


class Dataset(NamedTuple):
  """A data set for training, for choosing rho, and for the final test."""

  num_classes: int
  train: Split
  held_out: Split
  test: Split


def digits() -> Dataset:
  """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels."""
  images, labels = sklearn.datasets.load_digits(return_X_y=True)
  # The file lists writer after writer; all parts shall have something of each.
  order = np.random.default_rng(0).permutation(len(labels))
  images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  labels = labels[order].astype(np.int32)
  train, held_out, test = (
    Split(images[part], labels[part])
    for part in (slice(1000), slice(1000, 1300), slice(1300, None))
  )
  return Dataset(num_classes=10, train=train, held_out=held_out, test=test)


DATASETS: dict[str, Callable[[], Dataset]] = {'digits': digits}


def flip_labels(
  labels: np.ndarray,
  fraction: float,
  num_classes: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Gives ``floor(fraction * n)`` of n labels another class, at random."""
  # In decimal, as it was written: the float 0.29 * 100 is below 29.
  num_flipped = int(Fraction(str(fraction)) * len(labels))
  flipped = rng.choice(len(labels), num_flipped, replace=False)
  noisy = labels.copy()
  noisy[flipped] += rng.integers(
    1, num_classes, num_flipped, dtype=labels.dtype
  )
  return noisy % num_classes


def add_label_noise(
  dataset: Dataset, fraction: float, seeds: Sequence[int]
) -> Dataset:
  """Makes labels wrong, for each seed others, wherever a choice is based on.

  Args:
    dataset: A data set with labels [n].
    fraction: The fraction of labels that become wrong, in [0, 1).
    seeds: A seed for each run.

  Returns:
    The data set with labels [runs, n]: noisy ones for training and, at the same
    fraction, for choosing rho; those of the test are the true ones.
  """
  train_labels, held_out_labels = [], []
  for seed in seeds:
    rng = np.random.default_rng(seed)
    for noisy, split in (
      (train_labels, dataset.train),
      (held_out_labels, dataset.held_out),
    ):
      noisy.append(
        flip_labels(
          np.asarray(split.labels), fraction, dataset.num_classes, rng
        )
      )
  return dataset._replace(
    train=dataset.train._replace(labels=np.stack(train_labels)),
    held_out=dataset.held_out._replace(labels=np.stack(held_out_labels)),
    test=dataset.test._replace(
      labels=np.stack([dataset.test.labels] * len(seeds))
    ),
  )
