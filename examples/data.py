"""Data sets by name, label noise, and batches.

A data set is split once and for all; which labels are wrong depends on a seed.
To add a data set, write a function like :func:`digits` or :func:`fashion_mnist`
and name it in ``DATASETS``.
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

import archives
import augmentation
import sources

Array = jax.Array | np.ndarray

# What the functions that load a data set raise, a line for the command line.
DataError = archives.DataError


class Split(NamedTuple):
  """A part of a data set.

  Attributes:
    images: [n, height, width, channels], as the data set keeps them: uint8, a
      quarter of float32, until a batch is made of them.
    labels: int32 [n], or [runs, n] where each run has labels of its own.
  """

  images: Array
  labels: Array


# How `jax.vmap` maps a Split over runs: they share the images.
LABELS_PER_RUN = Split(images=None, labels=0)  # pyright: ignore[reportArgumentType]


class Dataset(NamedTuple):
  """A data set for training, for choosing rho, and for the final test.

  Attributes:
    num_classes: Labels are from 0 to one less.
    train: What parameters are trained on.
    held_out: What rho is chosen on; see :func:`merge_held_out`.
    test: What results are reported of.
    preprocess: From images as a Split holds them to what models take, float32.
    augment: From a random key and such images to others of the same classes,
      for training alone; None where there is none.
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
  """Gathers images and labels, and makes them what models take.

  This is the whole input of a step, and belongs inside the compiled one, where
  ``split`` lies on the device: no step ever waits for the host. Call it once a
  step, so that both passes of SAM and ASAM see the same batch.

  Args:
    dataset: Says how images are augmented and preprocessed.
    split: Where the batch is from, with labels [n].
    indices: The positions of its examples.
    key: A random key for augmentation; None for none.

  Returns:
    The batch, with images in float32.
  """
  images, labels = split.images[indices], split.labels[indices]
  if key is not None and dataset.augment is not None:
    images = dataset.augment(key, jnp.asarray(images))
  return Split(dataset.preprocess(images), labels)


@functools.cache  # A data set that is loaded again compiles nothing again.
def make_standardize(
  mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Array], jax.Array]:
  """Makes a ``preprocess`` of uint8 that standardizes each channel.

  Mean and standard deviation are those of pixels from 0 to 1.
  """

  def standardize(images):
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    return (pixels - jnp.float32(mean)) / jnp.float32(std)

  return standardize


def shrink(train: Split, train_size: int | None) -> Split:
  """The first ``train_size`` examples, so that smaller ones lie in larger."""
  available = len(train.labels)
  if train_size is None:
    return train
  if not 1 <= train_size <= available:
    raise DataError(
      f'argument --train-size: must be an integer from 1 to {available}, the'
      f' number of examples for training, but got {train_size}. Write for'
      f' example --train-size {min(1000, available)}.'
    )
  return Split(train.images[:train_size], train.labels[:train_size])


def digits(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels.

  Their images are float32, from 0 to 1, and stay as they are. They come with
  scikit-learn, wherever ``data_dir`` is.
  """
  del data_dir
  images, labels = sklearn.datasets.load_digits(return_X_y=True)
  # The file lists writer after writer; all parts shall have something of each.
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


# How many of the official training images rho is chosen on.
NUM_HELD_OUT = 5000


def hold_out(train: Split, train_size: int | None) -> tuple[Split, Split]:
  """Splits the official training set.

  Its order is shuffled, the same way every time. The last ``NUM_HELD_OUT`` are
  held out, whatever ``train_size`` is; the first are for training.
  """
  order = np.random.default_rng(0).permutation(len(train.labels))
  train = Split(train.images[order], train.labels[order])
  held_out = jax.tree.map(lambda x: x[-NUM_HELD_OUT:], train)
  train = jax.tree.map(lambda x: x[:-NUM_HELD_OUT], train)
  return shrink(train, train_size), held_out


def merge_held_out(dataset: Dataset) -> Dataset:
  """Moves all that is held out to what is trained on.

  First choose rho on the data set as it is loaded. Then train on all of it, and
  report the test alone: nothing is left to choose anything on, and accuracy on
  the empty rest is NaN. Labels of both may be noisy already.
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
  """70,000 articles of clothing in grey, 28 x 28 pixels; 10,000 for the test.

  Args:
    data_dir: The folder of the four IDX files, compressed or not. Without it
      they are looked for where Debian's package ``dataset-fashion-mnist`` puts
      them, and downloaded if they are not there.
    train_size: How many of the 55,000 that are not held out to train on.

  Raises:
    DataError: A file is missing or damaged, or there are not as many examples.
  """
  return load(sources.read_idx, sources.FASHION_MNIST, data_dir, train_size)


def cifar10(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """60,000 photographs of 10 classes, 32 x 32 pixels; 10,000 for the test.

  Args:
    data_dir: The folder of ``cifar-10-binary.tar.gz``, or of what was extracted
      from it. Without it the archive is downloaded.
    train_size: How many of the 45,000 that are not held out to train on.

  Raises:
    DataError: As for :func:`fashion_mnist`.
  """
  return load(sources.read_cifar, sources.CIFAR10, data_dir, train_size)


def cifar100(
  data_dir: Path | None = None, train_size: int | None = None
) -> Dataset:
  """Like :func:`cifar10`, of 100 classes, from ``cifar-100-binary.tar.gz``."""
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
