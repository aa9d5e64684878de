"""A Transformer that translates, of the size that IWSLT is trained with."""

from flax import linen as nn
import jax
import jax.numpy as jnp

# The piece after the end of a sentence, which attention ignores.
PAD = 0
INIT = nn.initializers.xavier_uniform()


class Transformer(nn.Module):
  """Encoder and decoder; layer norms stand after the residual sums.

  As in Vaswani et al., `Attention Is All You Need
  <https://arxiv.org/abs/1706.03762>`_, 2017. The embedding of the target
  language is the output layer, too.

  Attributes:
    vocab_size: The number of pieces, of both languages.
    layers: Of the encoder, and of the decoder.
    width: Of embeddings and residuals.
    hidden_size: Of the feed-forward layers.
    heads: Of each attention.
    dropout: The rate after embeddings and before each residual sum.
  """

  vocab_size: int
  layers: int = 6
  width: int = 512
  hidden_size: int = 1024
  heads: int = 4
  dropout: float = 0.3

  def setup(self) -> None:
    """Makes the parts."""
    self.source_embed = self._make_embed()
    self.target_embed = self._make_embed()
    self.encoder = [self._make_layer() for _ in range(self.layers)]
    self.decoder = [
      self._make_layer(is_decoder=True) for _ in range(self.layers)
    ]
    self.embedding_dropout = nn.Dropout(self.dropout)

  def _make_embed(self):
    init = nn.initializers.normal(self.width**-0.5)
    return nn.Embed(self.vocab_size, self.width, embedding_init=init)

  def _make_layer(self, is_decoder=False):
    return Layer(self.hidden_size, self.heads, self.dropout, is_decoder)

  def __call__(
    self, source: jax.Array, target: jax.Array, *, train: bool = False
  ) -> jax.Array:
    """Logits of the piece after each one of the target.

    Args:
      source: Pieces, int32 [n, source length].
      target: Pieces from the first mark on, int32 [n, target length].
      train: Whether there is dropout, which takes an rng of that name.

    Returns:
      Logits, float32 [n, target length, vocab_size].
    """
    return self.decode(self.encode(source, train), source, target, train)

  def encode(self, source: jax.Array, train: bool = False) -> jax.Array:
    """Maps pieces to [n, source length, width]."""
    x = self._embed(self.source_embed, source, train)
    is_piece = source != PAD
    mask = nn.make_attention_mask(is_piece, is_piece)
    for layer in self.encoder:
      x = layer(x, mask, train=train)
    return x

  def decode(
    self,
    encoded: jax.Array,
    source: jax.Array,
    target: jax.Array,
    train: bool = False,
  ) -> jax.Array:
    """Logits from what :meth:`encode` has made of the source."""
    x = self._embed(self.target_embed, target, train)
    source_mask = nn.make_attention_mask(jnp.ones_like(target), source != PAD)
    for layer in self.decoder:
      x = layer(
        x, nn.make_causal_mask(target), encoded, source_mask, train=train
      )
    return self.target_embed.attend(x)

  def decode_next(
    self,
    encoded: jax.Array,
    source: jax.Array,
    pieces: jax.Array,
    position: jax.Array | int,
  ) -> jax.Array:
    """Logits after one more piece of the target.

    Keys and values of the pieces before it are in the collection ``cache``,
    which must be mutable. Initialize it with all pieces, [n, target length].

    Args:
      encoded: What :meth:`encode` has made of the source.
      source: Pieces, int32 [n, source length].
      pieces: The pieces at ``position``, int32 [n, 1].
      position: Where they are in the target: 0, then 1, and so on.

    Returns:
      Logits, float32 [n, 1, vocab_size].
    """
    x = self._embed(self.target_embed, pieces, train=False, first=position)
    source_mask = nn.make_attention_mask(jnp.ones_like(pieces), source != PAD)
    for layer in self.decoder:
      x = layer(x, None, encoded, source_mask, cached=True)
    return self.target_embed.attend(x)

  def _embed(self, embed, pieces, train, first: jax.Array | int = 0):
    x = embed(pieces) * self.width**0.5
    x = x + positions(first + jnp.arange(pieces.shape[1]), self.width)
    return self.embedding_dropout(x, deterministic=not train)


class Layer(nn.Module):
  """Self-attention, in the decoder attention to the source, feed-forward."""

  hidden_size: int
  heads: int
  dropout: float
  is_decoder: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    encoded: jax.Array | None = None,
    source_mask: jax.Array | None = None,
    *,
    train: bool = False,
    cached: bool = False,
  ) -> jax.Array:
    """Maps [n, length, width] to the same shape.

    If ``cached``, self-attention is to the positions of earlier calls, too.
    """

    def add(x, y):
      y = nn.Dropout(self.dropout, deterministic=not train)(y)
      return nn.LayerNorm(epsilon=1e-5)(x + y)

    attention = lambda decode=False: nn.MultiHeadDotProductAttention(
      self.heads, kernel_init=INIT, decode=decode
    )
    x = add(x, attention(cached)(x, mask=mask))
    if self.is_decoder:
      x = add(x, attention()(x, encoded, mask=source_mask))
    y = nn.relu(nn.Dense(self.hidden_size, kernel_init=INIT)(x))
    return add(x, nn.Dense(x.shape[-1], kernel_init=INIT)(y))


def positions(indices: jax.Array, width: int) -> jax.Array:
  """Sines and cosines of wavelengths from 2 pi to 2e4 pi, [length, width]."""
  frequencies = jnp.exp(-jnp.log(1e4) * jnp.linspace(0, 1, width // 2))
  angles = indices[:, None] * frequencies
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
