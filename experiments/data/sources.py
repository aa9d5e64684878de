"""The published data sets: their files, checksums and statistics.

Each is read as a whole, into a training and a test part: images, uint8 [n,
height, width, channels], and labels, int32 [n].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import archives
from experiments.data import formats

Part = tuple[np.ndarray, np.ndarray]


class IdxFile(NamedTuple):
  """A compressed IDX file, and the checksum of its content."""

  archive: archives.Published
  md5: str


class Idx(NamedTuple):
  """A data set of IDX files.

  Attributes:
    num_classes: Labels are from 0 to ``num_classes - 1``.
    mean: The mean of the official training images, from 0 to 1, by channel.
    std: Their standard deviation.
    train: The images and the labels for training.
    test: The same for the test.
    system_dir: Where a distribution puts the files.
  """

  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  train: tuple[IdxFile, IdxFile]
  test: tuple[IdxFile, IdxFile]
  system_dir: Path


class Cifar(NamedTuple):
  """A data set in the binary version of CIFAR, a single archive.

  Attributes:
    num_classes: As in :class:`Idx`.
    mean: As in :class:`Idx`.
    std: As in :class:`Idx`.
    num_label_bytes: Number of labels in a record; the last one is used.
    archive: The archive.
    folder: The folder in it.
    train: The number of records in each file for training.
    test: The same for the test.
  """

  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  num_label_bytes: int
  archive: archives.Published
  folder: str
  train: Mapping[str, int]
  test: Mapping[str, int]


def fashion_mnist_file(name: str, archive_md5: str, md5: str) -> IdxFile:
  """One of the four files."""
  url = f'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}.gz'
  return IdxFile(archives.Published(url, archive_md5), md5)


FASHION_MNIST = Idx(
  num_classes=10,
  mean=(0.2860,),
  std=(0.3530,),
  train=(
    fashion_mnist_file(
      'train-images-idx3-ubyte',
      '8d4fb7e6c68d591d4c3dfef9ec88bf0d',
      'f4a8712d7a061bf5bd6d2ca38dc4d50a',
    ),
    fashion_mnist_file(
      'train-labels-idx1-ubyte',
      '25c81989df183df01b3e8a0aad5dffbe',
      '9018921c3c673c538a1fc5bad174d6f9',
    ),
  ),
  test=(
    fashion_mnist_file(
      't10k-images-idx3-ubyte',
      'bef4ecab320f06d8554ea6380940ec79',
      '8181f5470baa50b63fa0f6fddb340f0a',
    ),
    fashion_mnist_file(
      't10k-labels-idx1-ubyte',
      'bb300cfdad3c16e7a12a480ee83cd310',
      '15d484375f8d13e6eb1aabb0c3f46965',
    ),
  ),
  # Where Debian's package dataset-fashion-mnist puts them.
  system_dir=Path('/usr/share/datasets/fashion-mnist'),
)

CIFAR10 = Cifar(
  num_classes=10,
  mean=(0.4914, 0.4822, 0.4465),
  std=(0.2470, 0.2435, 0.2616),
  num_label_bytes=1,
  archive=archives.Published(
    'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    'c32a1d4ab5d03f1284b67883e8d87530',
  ),
  folder='cifar-10-batches-bin',
  train={f'data_batch_{i}.bin': 10_000 for i in range(1, 6)},
  test={'test_batch.bin': 10_000},
)

CIFAR100 = Cifar(
  num_classes=100,
  mean=(0.5071, 0.4865, 0.4409),
  std=(0.2673, 0.2564, 0.2762),
  num_label_bytes=2,
  archive=archives.Published(
    'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
    '03b5dce01913d631647c71ecec9e9cb8',
  ),
  folder='cifar-100-binary',
  train={'train.bin': 50_000},
  test={'test.bin': 10_000},
)


def read_idx(source: Idx, data_dir: Path | None) -> tuple[Part, Part]:
  """Reads a data set of IDX files, each compressed or not.

  Args:
    source: The data set.
    data_dir: The folder of the files; None for those of the system, or else
      downloaded ones.

  Returns:
    The training and the test part.

  Raises:
    archives.DataError: A file is missing or damaged.
  """

  def read(file):
    path = archives.find(
      file.archive,
      data_dir,
      extracted=[file.archive.name.removesuffix('.gz')],
      system_dir=source.system_dir,
    )
    with archives.explaining(path, file.archive):
      return formats.read_idx(archives.read(path, file.md5))

  train, test = (
    (read(images)[..., None], read(labels).astype(np.int32))
    for images, labels in (source.train, source.test)
  )
  return train, test


def read_cifar(source: Cifar, data_dir: Path | None) -> tuple[Part, Part]:
  """Reads a data set in the binary version of CIFAR.

  Args:
    source: The data set.
    data_dir: The folder of the archive, or of what was extracted from it; None
      to download the archive.

  Returns:
    The training and the test part.

  Raises:
    archives.DataError: A file is missing or damaged. For extracted files, which
      have no published checksum, only sizes and labels are checked.
  """
  path = archives.find(
    source.archive, data_dir, extracted=[source.folder, *source.test]
  )
  with archives.explaining(path, source.archive):
    contents = archives.read_members(
      path, source.archive.md5, source.folder, [*source.train, *source.test]
    )

  def read(files):
    images, labels = [], []
    for name, num_records in files.items():
      with archives.explaining(f'{path}: {name}', source.archive):
        parsed = formats.read_cifar(
          contents[name], num_records, source.num_label_bytes
        )
        check_labels(parsed[1], source.num_classes)
      images.append(parsed[0])
      labels.append(parsed[1])
    return np.concatenate(images), np.concatenate(labels).astype(np.int32)

  return read(source.train), read(source.test)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises a ValueError if a label is not less than ``num_classes``."""
  if labels.size and labels.max() >= num_classes:
    raise ValueError(
      f'its labels must be less than {num_classes}, but one is {labels.max()}'
    )
