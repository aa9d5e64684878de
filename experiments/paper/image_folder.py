"""Folders of JPEG files, one for each class, read by Grain.

The layout of ImageNet: ``train/n01440764/n01440764_18.JPEG`` and so on, and
likewise in ``val``.
"""

from collections.abc import Iterator
import functools
from pathlib import Path

import grain
import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

from experiments import data
from experiments.data import archives

# Left, top, right and bottom of a crop.
Box = tuple[float, float, float, float]

SUFFIXES = ('.jpeg', '.jpg', '.png')
# Of random crops: the fraction of the area, and the ratio of width to height.
AREAS, RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)
# In evaluation: the side of the centre crop over the shorter side of the image.
CENTRE = 0.875


class ImageFolder:
  """The image files of a folder and their labels, a data source for Grain.

  Args:
    folder: A folder with a subfolder for each class.

  Attributes:
    classes: The names of the subfolders, in the order of the labels.

  Raises:
    archives.DataError: There is no image.
  """

  def __init__(self, folder: Path):
    paths = sorted(
      path
      for path in folder.glob('*/*')
      if path.suffix.lower() in SUFFIXES and not path.name.startswith('.')
    )
    if not paths:
      raise archives.DataError(
        f"argument --data-dir: there are no images in '{folder}'. It must have"
        f' a folder of JPEG files for each class.'
      )
    self.classes = sorted({path.parent.name for path in paths})
    self._paths = paths
    label_of = {name: label for label, name in enumerate(self.classes)}
    self._labels = [label_of[path.parent.name] for path in paths]

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> tuple[Path, int]:
    """The path and the label of a file."""
    return self._paths[index], self._labels[index]


def train_batches(
  folder: ImageFolder, batch_size: int, size: int, *, seed: int, threads: int
) -> Iterator[data.Split]:
  """One epoch in random order, with random crops and horizontal flips.

  Args:
    folder: The images.
    batch_size: The size of a batch; an incomplete last batch is dropped.
    size: The height and width of images.
    seed: The seed of the order, crops and flips.
    threads: The number of files read in parallel.

  Returns:
    Batches: images, uint8 [batch_size, size, size, 3], and labels, int32.
  """
  dataset = (
    grain.MapDataset.source(folder)
    .seed(seed)
    .shuffle()
    .random_map(functools.partial(_read_random_crop, size))
    .batch(batch_size, drop_remainder=True)
  )
  return iter(dataset.to_iter_dataset(_options(threads)))


def eval_batches(
  folder: ImageFolder, batch_size: int, size: int, *, threads: int
) -> Iterator[data.Split]:
  """The centre crop of each image; the last batch may be smaller."""
  dataset = (
    grain.MapDataset.source(folder)
    .map(functools.partial(_read_centre, size))
    .batch(batch_size)
  )
  return iter(dataset.to_iter_dataset(_options(threads)))


def _options(threads: int) -> grain.ReadOptions:
  return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)


def _read(path: Path) -> Image.Image:
  try:
    return Image.open(path).convert('RGB')
  except (OSError, UnidentifiedImageError) as error:
    raise archives.DataError(
      f'{path} cannot be used: {error}. Replace it, or remove it.'
    ) from error


def _resize(image: Image.Image, label: int, size: int, box: Box) -> data.Split:
  resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
  return data.Split(np.asarray(resized), np.array(label, np.int32))


def _read_random_crop(
  size: int, element: tuple[Path, int], rng: np.random.Generator
) -> data.Split:
  path, label = element
  image = _read(path)
  example = _resize(image, label, size, random_box(*image.size, rng))
  if rng.random() < 0.5:
    example = example._replace(images=example.images[:, ::-1])
  return example


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
  """A crop of random area and ratio.

  If ten tries do not fit, the largest square in the centre.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*AREAS)
    ratio = np.exp(rng.uniform(*np.log(RATIOS)))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    if w <= width and h <= height:
      left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
      return left, top, left + w, top + h
  return centre_box(width, height, 1.0)


def centre_box(width: int, height: int, part: float) -> Box:
  """The square in the centre with ``part`` of the shorter side."""
  side = part * min(width, height)
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def _read_centre(size: int, element: tuple[Path, int]) -> data.Split:
  path, label = element
  image = _read(path)
  return _resize(image, label, size, centre_box(*image.size, CENTRE))
