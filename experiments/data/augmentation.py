"""Random crops and flips, on the device."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames='padding')
def crop_and_flip(
  key: jax.Array, images: jax.Array, *, padding: int = 4
) -> jax.Array:
  r"""Shifts each image at random, and mirrors it with probability 1/2.

  An image is padded with ``padding`` zeros on all sides and cropped to its
  size, at one of :math:`(2 \cdot padding + 1)^2` places with equal probability.
  Zero is black as long as images are not standardized.

  Args:
    key: A random key.
    images: [n, height, width, channels] of any dtype; uint8 is fastest.
    padding: The largest shift.

  Returns:
    Images in the shape and dtype of ``images``.
  """
  n, height, width, _ = images.shape
  places = 2 * padding + 1
  # A number for each of the crops of an image.
  choice = jax.random.randint(key, (n, 1), 0, 2 * places**2)
  is_flipped = choice % 2 == 1
  top, left = jnp.divmod(choice // 2, places)
  rows = top + jnp.arange(height)
  columns = jnp.arange(width)
  columns = left + jnp.where(is_flipped, columns[::-1], columns)
  sides = (padding, padding)
  padded = jnp.pad(images, [(0, 0), sides, sides, (0, 0)])
  # One gather for the shift and the flip.
  image = jnp.arange(n)[:, None, None]
  return padded[image, rows[:, :, None], columns[:, None, :]]
