"""A small vision transformer."""

from flax import linen as nn
import jax
import jax.numpy as jnp


class ViT(nn.Module):
  """A vision transformer with layer norms before the residual branches.

  As in Dosovitskiy et al., `An Image is Worth 16x16 Words
  <https://arxiv.org/abs/2010.11929>`_, 2021, with the mean of the tokens in
  place of a class token, and without dropout. For images of 28 x 28 x 1 it has
  205 k parameters.

  Attributes:
    num_classes: The number of logits.
    patch_size: Height and width of a patch, which divide those of the image.
    width: The size of a token.
    depth: The number of blocks.
    heads: The number of attention heads, which divides ``width``.
    hidden_size: The size of the hidden layer of each block.
  """

  num_classes: int
  patch_size: int = 7
  width: int = 64
  depth: int = 4
  heads: int = 4
  hidden_size: int = 256

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, h, w, c] to logits [n, classes]; ``train`` is ignored."""
    del train
    x = nn.Dense(self.width)(patches(images, self.patch_size))
    x += self.param('position', nn.initializers.normal(0.02), x.shape[1:])
    for _ in range(self.depth):
      x += Attention(self.heads)(nn.LayerNorm()(x))
      y = nn.gelu(nn.Dense(self.hidden_size)(nn.LayerNorm()(x)))
      x += nn.Dense(self.width)(y)
    return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=1))


class Attention(nn.Module):
  """Self-attention; queries, keys and values are one product.

  Attributes:
    heads: The number of heads.
  """

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [n, length, width] to the same shape."""
    n, length, width = x.shape
    size = width // self.heads
    qkv = nn.Dense(3 * width)(x).reshape(n, length, 3, self.heads, size)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum('nqhd,nkhd->nhqk', q, k) * size**-0.5
    y = jnp.einsum('nhqk,nkhd->nqhd', nn.softmax(scores), v)
    return nn.Dense(width)(y.reshape(n, length, width))


def patches(images: jax.Array, size: int) -> jax.Array:
  """Cuts images [n, h, w, c] into patches [n, (h w) / size^2, size^2 c]."""
  n, height, width, channels = images.shape
  x = images.reshape(
    n, height // size, size, width // size, size, channels
  ).swapaxes(2, 3)
  return x.reshape(n, -1, size * size * channels)
