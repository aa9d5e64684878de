"""A convolution for many networks at once."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def convolve(
  images: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **options: Any,
) -> jax.Array:
  """A convolution as one matrix product, for ``flax.linen.Conv``.

  ``vmap`` over kernels makes it a batch of matrix products. Of
  ``jax.lax.conv_general_dilated`` it makes a grouped convolution, which is
  slow, as is a convolution in a loop on CPU.

  Args:
    images: [n, height, width, channels].
    kernel: [height, width, channels, new channels].
    strides: Vertical and horizontal.
    padding: At the top and bottom, left and right.
    **options: Those of ``conv_general_dilated``, with their default values.

  Returns:
    The result, [n, new height, new width, new channels].
  """
  del options
  columns = jnp.concatenate(
    windows(images, kernel.shape[:2], strides, padding), axis=-1
  )
  return columns @ kernel.reshape(-1, kernel.shape[-1])


def windows(
  images: jax.Array,
  size: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> list[jax.Array]:
  """What each element of a kernel of this size sees, row by row."""
  x = jnp.pad(images, [(0, 0), *padding, (0, 0)])
  new_size = [
    (x.shape[axis + 1] - size[axis]) // strides[axis] + 1 for axis in (0, 1)
  ]

  def window(i, j):
    rows, columns = (
      slice(first, first + stride * (n - 1) + 1, stride)
      for first, stride, n in zip((i, j), strides, new_size, strict=True)
    )
    return x[:, rows, columns]

  return [window(i, j) for i in range(size[0]) for j in range(size[1])]
