"""Models by name, and the loss that they are trained on.

To add a model, write a Flax module and name it in ``MODELS``.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import data


class MLP(nn.Module):
  """A multilayer perceptron with ReLU between its layers."""

  num_classes: int
  hidden_sizes: Sequence[int] = (256, 256)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [n, ...] to logits [n, num_classes]."""
    x = images.reshape(images.shape[0], -1)
    for size in self.hidden_sizes:
      x = nn.relu(nn.Dense(size)(x))
    return nn.Dense(self.num_classes)(x)


# From the number of classes to a module.
MODELS: dict[str, Callable[[int], nn.Module]] = {'mlp': MLP}


def predict(
  params: optax.Params, model: nn.Module, images: data.Array
) -> jax.Array:
  """The logits [n, num_classes] of ``images``."""
  variables: dict[str, Any] = {'params': params}
  return jnp.asarray(model.apply(variables, images))


def loss_fn(
  params: optax.Params, model: nn.Module, batch: data.Split
) -> jax.Array:
  """The mean cross-entropy on ``batch``."""
  logits = predict(params, model, batch.images)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, batch.labels
  ).mean()
