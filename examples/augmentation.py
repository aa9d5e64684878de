"""Random changes of images that keep their class, on the device."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames='padding')
def crop_and_flip(
  key: jax.Array, images: jax.Array, *, padding: int = 4
) -> jax.Array:
  r"""Shifts each image at random, and mirrors every other one.

  An image gets ``padding`` zeros on all sides, and of that a part of its own
  size is cut out: of :math:`(2 \cdot padding + 1)^2` places each is equally
  likely. Zero is black as long as images are not standardized.

  It depends on nothing but its arguments. So one call a step, before the two
  gradients are taken, gives both passes of SAM and ASAM the same images.

  Args:
    key: A random key.
    images: [n, height, width, channels] of any dtype; uint8 is fastest.
    padding: The most that an image is shifted by.

  Returns:
    The new images, in the shape and dtype of ``images``.
  """
  n, height, width, _ = images.shape
  places = 2 * padding + 1
  # One number for each image says which of its crops it becomes.
  choice = jax.random.randint(key, (n, 1), 0, 2 * places**2)
  is_flipped = choice % 2 == 1
  top, left = jnp.divmod(choice // 2, places)
  rows = top + jnp.arange(height)
  columns = jnp.arange(width)
  columns = left + jnp.where(is_flipped, columns[::-1], columns)
  sides = (padding, padding)
  padded = jnp.pad(images, [(0, 0), sides, sides, (0, 0)])
  # One gather for both. Of what was tried on CPU (slices under vmap, a gather
  # for each axis, selections, one-hot products) nothing is faster by more than
  # chance, and selections and products are over ten times slower.
  image = jnp.arange(n)[:, None, None]
  return padded[image, rows[:, :, None], columns[:, None, :]]
