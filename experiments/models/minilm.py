"""MiniLM, a small BERT, in Flax NNX: pretrained weights, whole or with LoRA.

The encoder of Wang et al., `MiniLM <https://arxiv.org/abs/2002.10957>`_, 2020,
as Sentence Transformers publishes it: the mean of the tokens is the embedding.
There is no dropout.
"""

import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import minilm_weights

PAD = 0
# At once; the attention of more would need much memory.
EMBED_BATCH = 128
# Of what LoRA updates in each block, as in the paper of LoRA.
ADAPTED = ('query', 'value')


class Block(nnx.Module):
  """Self-attention and a hidden layer, each followed by a layer norm."""

  def __init__(
    self, config: minilm_weights.Config, lora_rank: int, rngs: nnx.Rngs
  ):
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

  def __init__(
    self, config: minilm_weights.Config, lora_rank: int, rngs: nnx.Rngs
  ):
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
    self,
    config: minilm_weights.Config,
    num_classes: int,
    lora_rank: int,
    rngs: nnx.Rngs,
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
    config, _ = minilm_weights.read(self._folder)
    return Classifier(config, self._num_classes, self._lora_rank, rngs)

  @functools.cached_property
  def _split(self):
    """The structure, and the state without values."""
    return nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))

  def init(self, key: jax.Array, pieces: Any) -> dict[str, Any]:
    """The pretrained weights, and a random head and random updates."""
    del pieces
    params = nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key)), nnx.Param))
    _, weights = minilm_weights.read(self._folder)
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
    logits = _merge(*self._split, variables['params'])(pieces)
    return logits if mutable is False else (logits, {})

  def embed(self, pieces: Any) -> np.ndarray:
    """The embeddings [n, width] of the pretrained encoder."""
    config, weights = minilm_weights.read(self._folder)
    parts = []
    for i in range(0, len(pieces), EMBED_BATCH):
      part = np.asarray(pieces[i : i + EMBED_BATCH])
      # Filled, so that one program does for all.
      filled = np.pad(
        part,
        [(0, EMBED_BATCH - len(part)), (0, 0)],
        constant_values=PAD + 1,
      )
      parts.append(np.asarray(_embed(config, weights, filled))[: len(part)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config, weights, pieces):
  graphdef, abstract = nnx.split(
    nnx.eval_shape(lambda: Encoder(config, 0, nnx.Rngs(0)))
  )
  return _merge(graphdef, abstract, weights)(pieces)


def _merge(graphdef, abstract, params):
  """A module of this structure with these parameters."""
  state = jax.tree.map(lambda x: x, abstract)
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)


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
