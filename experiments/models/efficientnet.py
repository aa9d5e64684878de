"""EfficientNet-lite0 in Flax NNX, with pretrained weights.

As in Tan and Le, `EfficientNet <https://arxiv.org/abs/1905.11946>`_, 2019, but
without squeeze-and-excitation and with ReLU6 for swish; neither dropout nor
stochastic depth is used. The statistics of BatchNorm are constants; its scale
and bias are trained.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from experiments.models import convolution
from experiments.models import efficientnet_weights
from experiments.models import fine_tuned


class Stage(NamedTuple):
  """Blocks in a row; the first of them has the stride."""

  repeats: int
  kernel_size: int
  stride: int
  expansion: int
  channels: int


class Sizes(NamedTuple):
  """The channels of the first and last convolution, and the stages."""

  stem: int
  stages: tuple[Stage, ...]
  width: int


LITE0 = Sizes(
  32,
  (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
  ),
  1280,
)
batch_norm = functools.partial(
  nnx.BatchNorm, use_running_average=True, epsilon=1e-3
)
# Zeros, until the pretrained weights are known.
pointwise = functools.partial(
  nnx.Linear, use_bias=False, kernel_init=nnx.initializers.zeros
)


def same(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
  """The padding of TensorFlow's 'SAME': what is odd is at the end."""
  total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
  return total // 2, total - total // 2


class Conv(nnx.Module):
  """A convolution, or a depthwise one if there are no channels to sum over.

  Both are as in ``convolution.convolve``: XLA's are slow on CPU.
  """

  def __init__(self, kernel_size: int, stride: int, *channels: int):
    self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, *channels)))
    self.stride = stride

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [n, height, width, channels] to the same with other sizes."""
    kernel = self.kernel[...]
    size = kernel.shape[:2]
    strides = self.stride, self.stride
    padding = [
      same(n, k, self.stride) for n, k in zip(x.shape[1:3], size, strict=True)
    ]
    if kernel.ndim == 4:
      return convolution.convolve(x, kernel, strides, padding)
    windows = convolution.windows(x, size, strides, padding)
    weights = kernel.reshape(-1, kernel.shape[-1])
    terms = [w * y for w, y in zip(weights, windows, strict=True)]
    return sum(terms, jnp.zeros(()))


class Block(nnx.Module):
  """Expands the channels, convolves each on its own, and projects them."""

  def __init__(self, stage: Stage, n_in: int, stride: int, rngs: nnx.Rngs):
    width = stage.expansion * n_in
    if stage.expansion > 1:
      self.expand = pointwise(n_in, width, rngs=rngs)
      self.expand_norm = batch_norm(width, rngs=rngs)
    self.depthwise = Conv(stage.kernel_size, stride, width)
    self.depthwise_norm = batch_norm(width, rngs=rngs)
    self.project = pointwise(width, stage.channels, rngs=rngs)
    self.project_norm = batch_norm(stage.channels, rngs=rngs)
    self.expands = stage.expansion > 1
    self.is_residual = stride == 1 and n_in == stage.channels

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [n, height, width, channels] to the same with other sizes."""
    y = x
    if self.expands:
      y = nnx.relu6(self.expand_norm(self.expand(y)))
    y = nnx.relu6(self.depthwise_norm(self.depthwise(y)))
    y = self.project_norm(self.project(y))
    return x + y if self.is_residual else y


class Encoder(nnx.Module):
  """Maps images to embeddings."""

  def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
    self.stem = Conv(3, 2, 3, sizes.stem)
    self.stem_norm = batch_norm(sizes.stem, rngs=rngs)
    n_in = sizes.stem
    self.depth = 0
    for stage in sizes.stages:
      for i in range(stage.repeats):
        stride = stage.stride if i == 0 else 1
        block = Block(stage, n_in, stride, rngs)
        setattr(self, f'block_{self.depth}', block)
        n_in = stage.channels
        self.depth += 1
    self.last = pointwise(n_in, sizes.width, rngs=rngs)
    self.last_norm = batch_norm(sizes.width, rngs=rngs)
    self.width = sizes.width

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps uint8 images [n, height, width, 1 or 3] to [n, width]."""
    x = (jnp.asarray(images, jnp.float32) - 127) / 128
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    x = nnx.relu6(self.stem_norm(self.stem(x)))
    for i in range(self.depth):
      x = getattr(self, f'block_{i}')(x)
    x = nnx.relu6(self.last_norm(self.last(x)))
    return x.mean(axis=(1, 2))


class FineTuned(fine_tuned.FineTuned):
  """A classifier of images, with pretrained weights.

  Args:
    folder: That of ``efficientnet_weights.read``.
    num_classes: The number of logits.
  """

  def __init__(self, folder: Path | None, num_classes: int):
    super().__init__(
      lambda rngs: Encoder(LITE0, rngs),
      lambda: efficientnet_weights.read(folder),
      num_classes,
    )
