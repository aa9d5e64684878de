"""Data sets by name, label noise, and batches.

A data set is always split in the same way; label noise depends on a seed. To
add a data set, write a function like :func:`digits` or :func:`fashion_mnist`
and add it to ``DATASETS``.
"""

from collections.abc import Callable
from collections.abc import Sequence
from fractions import Fraction
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

from experiments.data import archives
from experiments.data import augmentation
from experiments.data import sources

Array = jax.Array | np.ndarray

# What the functions that load a data set raise; the message is one line.
DataError = archives.DataError


class Split(NamedTuple):
  """A part of a data set.

  Attributes:
    images: [n, height, width, channels] in the data set's own dtype: uint8,
      a quarter of float32, until they are gathered into a batch. For texts,
      the tokens, int32 [n, length].
    labels: int32 [n], or [runs, n] if each run has its own labels.
  """

  images: Array
  labels: Array


class Dataset(NamedTuple):
  """A data set for training, for choosing rho, and for the final test.

  Attributes:
    num_classes: Labels are from 0 to ``num_classes - 1``.
    train: The examples for training.
    held_out: The examples for choosing rho; see :func:`merge_held_out`.
    test: The examples for the reported results.
    preprocess: From the images of a Split to the float32 images that models
      take.
    augment: From a random key and images to images of the same classes, for
      training only; None if there is no augmentation.
  """

  num_classes: int
  train: Split
  held_out: Split
  test: Split
  preprocess: Callable[[Array], jax.Array] = jnp.asarray
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def make_batch(
  dataset: Dataset, split: Split, indices: Array, key: jax.Array | None = None
) -> Split:
  """Gathers, augments and preprocesses the examples of a batch.

  It is called inside the compiled step, with ``split`` on the device, so that
  no step waits for the host, and once per step, so that both gradients of SAM
  and ASAM are of the same batch.

  Args:
    dataset: Its ``augment`` and ``preprocess`` are used.
    split: The examples to choose from, with labels [n].
    indices: The indices of the examples of the batch.
    key: A random key for augmentation; None for no augmentation.

  Returns:
    The batch, with images in float32.
  """
  images, labels = split.images[indices], split.labels[indices]
  if key is not None and dataset.augment is not None:
    images = dataset.augment(key, jnp.asarray(images))
  return Split(dataset.preprocess(images), labels)


@functools.cache  # Loading a data set again compiles nothing again.
def make_standardize(
  mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Array], jax.Array]:
  """Makes a ``preprocess`` of uint8 that standardizes each channel.

  Mean and standard deviation are of pixels from 0 to 1.
  """

  def standardize(images):
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    return (pixels - jnp.float32(mean)) / jnp.float32(std)

  return standardize


def shrink(train: Split, train_size: int | None) -> Split:
  """The first ``train_size`` examples; smaller sets are parts of larger."""
  available = len(train.labels)
  if train_size is None:
    return train
  if not 1 <= train_size <= available:
    raise DataError(
      f'argument --train-size: must be an integer from 1 to {available}, the'
      f' number of examples for training, but got {train_size}. For'
      f' example: --train-size {min(1000, available)}.'
    )
  return Split(train.images[:train_size], train.labels[:train_size])


def digits(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels.

  Their images are float32, from 0 to 1, and are not standardized. ``data_dir``
  is ignored.
  """
  del data_dir
  images, labels = sklearn.datasets.load_digits(return_X_y=True)
  # The file is sorted by writer; each part should have digits of all writers.
  order = np.random.default_rng(0).permutation(len(labels))
  images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  labels = labels[order].astype(np.int32)
  train, held_out, test = (
    Split(images[part], labels[part])
    for part in (slice(1000), slice(1000, 1300), slice(1300, None))
  )
  return Dataset(
    num_classes=10,
    train=shrink(train, train_size),
    held_out=held_out,
    test=test,
  )


# The number of official training images that rho is chosen on.
NUM_HELD_OUT = 5000


def hold_out(train: Split, train_size: int | None) -> tuple[Split, Split]:
  """Splits the official training set.

  It is shuffled, always in the same way. The last ``NUM_HELD_OUT`` are held
  out, whatever ``train_size`` is; the first are for training.
  """
  order = np.random.default_rng(0).permutation(len(train.labels))
  train = Split(train.images[order], train.labels[order])
  held_out = jax.tree.map(lambda x: x[-NUM_HELD_OUT:], train)
  train = jax.tree.map(lambda x: x[:-NUM_HELD_OUT], train)
  return shrink(train, train_size), held_out


def merge_held_out(dataset: Dataset) -> Dataset:
  """Moves the held-out examples to the training set, once rho is chosen.

  Held-out accuracy is then NaN. Labels of both may already be noisy.
  """
  train, held_out = dataset.train, dataset.held_out
  return dataset._replace(
    train=Split(
      np.concatenate([train.images, held_out.images]),
      np.concatenate([train.labels, held_out.labels], axis=-1),
    ),
    held_out=Split(held_out.images[:0], held_out.labels[..., :0]),
  )


def load(
  read: Callable[..., tuple[sources.Part, sources.Part]],
  source: sources.Idx | sources.Cifar,
  data_dir: Path | None,
  train_size: int | None,
) -> Dataset:
  """Reads a published data set, and holds a part of it out."""
  train, test = (Split(*part) for part in read(source, data_dir))
  train, held_out = hold_out(train, train_size)
  return Dataset(
    num_classes=source.num_classes,
    train=train,
    held_out=held_out,
    test=test,
    preprocess=make_standardize(source.mean, source.std),
    augment=augmentation.crop_and_flip,
  )


def fashion_mnist(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """70,000 grayscale images of clothing, 28 x 28 pixels; 10,000 for the test.

  Args:
    data_dir: The folder of the four IDX files, compressed or not. By default,
      they are read from where Debian's package ``dataset-fashion-mnist`` puts
      them, or else downloaded.
    train_size: Number of training examples, at most 55,000.

  Raises:
    DataError: A file is missing or damaged, or ``train_size`` is too large.
  """
  return load(sources.read_idx, sources.FASHION_MNIST, data_dir, train_size)


def cifar10(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """60,000 color images of 10 classes, 32 x 32 pixels; 10,000 for the test.

  Args:
    data_dir: The folder of ``cifar-10-binary.tar.gz``, or of what was extracted
      from it. By default, the archive is downloaded.
    train_size: Number of training examples, at most 45,000.

  Raises:
    DataError: As for :func:`fashion_mnist`.
  """
  return load(sources.read_cifar, sources.CIFAR10, data_dir, train_size)


def cifar100(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """Like :func:`cifar10`, with 100 classes."""
  return load(sources.read_cifar, sources.CIFAR100, data_dir, train_size)


DATASETS: dict[str, Callable[..., Dataset]] = {
  'digits': digits,
  'fashion_mnist': fashion_mnist,
  'cifar10': cifar10,
  'cifar100': cifar100,
}


def flip_labels(
  labels: np.ndarray,
  fraction: float,
  num_classes: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Replaces ``floor(fraction * n)`` of n labels by others, at random."""
  # Exact, as the decimal says: in floating point, 0.29 * 100 is below 29.
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
  """Adds label noise, by seed, to all labels that a choice depends on.

  Args:
    dataset: A data set with labels [n].
    fraction: The fraction of labels that are replaced, in [0, 1).
    seeds: The seed of each run.

  Returns:
    The data set with labels [runs, n]. The labels for training and for choosing
    rho are noisy to the same fraction, those of the test are the true ones.
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
