"""ResNet-50, the residual network of bottlenecks for ImageNet."""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from experiments.models import resnet


class Bottleneck(nn.Module):
  """Convolutions of 1 x 1, 3 x 3 with the stride, and 1 x 1, with BatchNorm.

  Where shapes change, the shortcut is a 1 x 1 convolution with BatchNorm.
  """

  channels: int
  stride: int
  is_first: bool

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps features [n, h, w, c] to [n, h / stride, w / stride, 4 channels]."""
    norm = lambda: resnet.batch_norm(train)
    y = nn.relu(norm()(resnet.conv(self.channels, size=1)(x)))
    y = resnet.conv(self.channels, stride=self.stride)(y)
    y = resnet.conv(4 * self.channels, size=1)(nn.relu(norm()(y)))
    y = norm()(y)
    if self.is_first:
      x = resnet.conv(4 * self.channels, size=1, stride=self.stride)(x)
      x = norm()(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-50 by default, with the stride in the 3 x 3 convolutions."""

  num_classes: int
  stages: Sequence[int] = (3, 4, 6, 3)
  width: int = 64

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, h, w, 3] to logits [n, num_classes]."""
    x = resnet.conv(self.width, size=7, stride=2)(images)
    x = nn.relu(resnet.batch_norm(train)(x))
    # After a ReLU, zeros around the image change no maximum.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = nn.max_pool(x, (3, 3), strides=(2, 2))
    for stage, num_blocks in enumerate(self.stages):
      for i in range(num_blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        x = Bottleneck(self.width * 2**stage, stride, i == 0)(x, train=train)
    return resnet.dense(self.num_classes)(x.mean(axis=(1, 2)))
