"""Residual networks for small images: those of He et al. and wide ones.

Both have BatchNorm, no bias before it, and the initialization of He et al. by
fan-out, as in both groups' programs for Torch: the standard deviation of a
kernel is sqrt(2 / (height * width * output channels)). Images may have any
size; the published ones are 32 x 32 with 3 channels.

Unlike Torch, Flax keeps the biased variance of each batch among the running
statistics. Momentum and epsilon are Torch's.
"""

from collections.abc import Callable
from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp


def conv(channels: int, *, size: int = 3, stride: int = 1) -> nn.Conv:
  """A convolution with zeros around the image on all sides.

  With a stride of 2, Flax's ``'SAME'`` pads only below and to the right.
  """
  return nn.Conv(
    channels,
    kernel_size=(size, size),
    strides=stride,
    padding=size // 2,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
  )


def batch_norm(train: bool) -> nn.BatchNorm:
  """BatchNorm; a momentum of 0.9 is what Torch calls 0.1."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)


def dense(num_classes: int) -> nn.Dense:
  """The last layer; Torch's kernel, uniform up to 1 / sqrt(inputs)."""
  return nn.Dense(
    num_classes,
    kernel_init=nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
  )


def pad_shortcut(x: jax.Array, channels: int, stride: int) -> jax.Array:
  """Every ``stride``-th pixel, with channels of zeros up to ``channels``.

  This is the shortcut without parameters, option A of He et al.
  """
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, [(0, 0)] * 3 + [(0, channels - x.shape[-1])])


class ResidualBlock(nn.Module):
  """Convolution, BatchNorm, ReLU, twice; the last ReLU follows the sum."""

  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps features [n, h, w, c] to [n, h / stride, w / stride, channels]."""
    y = conv(self.channels, stride=self.stride)(x)
    y = nn.relu(batch_norm(train)(y))
    y = batch_norm(train)(conv(self.channels)(y))
    return nn.relu(pad_shortcut(x, self.channels, self.stride) + y)


class WideBlock(nn.Module):
  """BatchNorm, ReLU, convolution, twice; nothing follows the sum.

  Where the number of channels changes, the shortcut is a 1 x 1 convolution of
  the output of the first ReLU.
  """

  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps features [n, h, w, c] to [n, h / stride, w / stride, channels]."""
    activated = nn.relu(batch_norm(train)(x))
    y = conv(self.channels, stride=self.stride)(activated)
    y = conv(self.channels)(nn.relu(batch_norm(train)(y)))
    if x.shape[-1] != self.channels:
      x = conv(self.channels, size=1, stride=self.stride)(activated)
    return x + y


def apply_stages(
  block: Callable[..., nn.Module],
  widths: Sequence[int],
  num_blocks: int,
  x: jax.Array,
  *,
  train: bool,
) -> jax.Array:
  """Stages of ``num_blocks`` blocks; all but the first halve the image."""
  for stage, channels in enumerate(widths):
    for i in range(num_blocks):
      stride = 2 if stage > 0 and i == 0 else 1
      x = block(channels, stride)(x, train=train)
  return x


def blocks_per_stage(depth: int, extra_layers: int) -> int:
  """The n of ``depth = 6 n + extra_layers``, if there is one >= 1."""
  num_blocks, remainder = divmod(depth - extra_layers, 6)
  if remainder or num_blocks < 1:
    raise ValueError(
      f'depth must be 6 n + {extra_layers} with n >= 1, for three stages of n'
      f' blocks, but got {depth}. For example: depth={18 + extra_layers}.'
    )
  return num_blocks


class ResNet(nn.Module):
  """The residual network for CIFAR, of ``depth = 6 n + 2`` layers.

  Attributes:
    num_classes: Number of classes.
    depth: Number of layers with weights: 20 or 32, for example.

  References:
    He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_,
    2015, section 4.2, with shortcuts of option A. The initialization, which the
    paper leaves open, is that of ``fb.resnet.torch``.
  """

  num_classes: int
  depth: int

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, h, w, c] to logits [n, num_classes].

    With ``train``, BatchNorm uses the statistics of the batch and updates the
    running ones.
    """
    num_blocks = blocks_per_stage(self.depth, 2)
    x = nn.relu(batch_norm(train)(conv(16)(images)))
    x = apply_stages(ResidualBlock, (16, 32, 64), num_blocks, x, train=train)
    return dense(self.num_classes)(x.mean(axis=(1, 2)))


class WideResNet(nn.Module):
  """The wide residual network WRN-depth-k, of ``depth = 6 n + 4`` layers.

  Attributes:
    num_classes: Number of classes.
    depth: Number of layers with weights, counting the 1 x 1 convolutions once
      per stage: 16 or 28, for example.
    widening: The factor k on the number of channels.

  References:
    Zagoruyko and Komodakis, `Wide Residual Networks
    <https://arxiv.org/abs/1605.07146>`_, 2016, without dropout, and their
    program for Torch.
  """

  num_classes: int
  depth: int
  widening: int

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, h, w, c] to logits [n, num_classes].

    With ``train``, BatchNorm uses the statistics of the batch and updates the
    running ones.
    """
    num_blocks = blocks_per_stage(self.depth, 4)
    widths = [self.widening * channels for channels in (16, 32, 64)]
    x = apply_stages(
      WideBlock, widths, num_blocks, conv(16)(images), train=train
    )
    x = nn.relu(batch_norm(train)(x))
    return dense(self.num_classes)(x.mean(axis=(1, 2)))
