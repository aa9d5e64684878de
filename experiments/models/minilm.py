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

from experiments.models import fine_tuned
from experiments.models import minilm_weights

PAD = 0
# The layers of a block that LoRA updates, as in its paper.
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
    self.width = width = config.hidden_size
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


class FineTuned(fine_tuned.FineTuned):
  """A classifier of texts in two classes, with pretrained weights.

  Args:
    folder: Of ``config.json`` and ``model.safetensors``; None for that of the
      package.
    lora_rank: The rank of updates of query and value; 0 for no such updates.
  """

  def __init__(self, folder: Path | None, lora_rank: int = 0):
    read = lambda: minilm_weights.read(folder)
    super().__init__(
      lambda rngs: Encoder(read()[0], lora_rank, rngs),
      lambda: read()[1],
      num_classes=2,
    )


def is_trained(params: Any) -> Any:
  """What LoRA trains, as a mask: its updates and the head."""

  def of_path(path, _):
    names = [key.key for key in path]
    return names[0] == 'head' or names[-1].startswith('lora_')

  return jax.tree_util.tree_map_with_path(of_path, params)
