"""Models by name, and the loss that they are trained on.

To add a model, write a Flax module and add it to ``MODELS``. It maps images,
float32 [n, height, width, channels], and ``train``, which is True in training
only, to logits [n, num_classes].

A model has trainable ``params`` and a ``model_state`` that forward passes in
training update: a dict with the running statistics of BatchNorm, empty for a
model without it.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import data
from experiments.models import resnet

ModelState = dict[str, Any]


class MLP(nn.Module):
  """A multilayer perceptron with ReLU between its layers."""

  num_classes: int
  hidden_sizes: Sequence[int] = (256, 256)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, ...] to logits [n, num_classes]; ``train`` is ignored."""
    del train
    x = images.reshape(images.shape[0], -1)
    for size in self.hidden_sizes:
      x = nn.relu(nn.Dense(size)(x))
    return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
  """3 x 3 convolutions that halve the image, then a hidden dense layer.

  It has Flax's initialization, like the MLP, and strides in place of pooling,
  whose gradient is slow on CPU. With ``batch_norm``, BatchNorm follows each
  convolution. For images of 28 x 28 x 1 it has 207 k parameters, for 32 x 32 x
  3 it has 269 k, nearly all of them in the dense layer.
  """

  num_classes: int
  channels: Sequence[int] = (16, 32)
  hidden_size: int = 128
  batch_norm: bool = False
  # By default, that of JAX; see flax.linen.Conv.
  conv_general_dilated: Any = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, h, w, c] to logits; ``train`` is for BatchNorm."""
    x = images
    for channels in self.channels:
      x = nn.Conv(
        channels,
        kernel_size=(3, 3),
        strides=2,
        padding=1,
        use_bias=not self.batch_norm,
        conv_general_dilated=self.conv_general_dilated,
      )(x)
      if self.batch_norm:
        x = resnet.batch_norm(train)(x)
      x = nn.relu(x)
    x = nn.relu(nn.Dense(self.hidden_size)(x.reshape(x.shape[0], -1)))
    return nn.Dense(self.num_classes)(x)


# From the number of classes to a module.
MODELS: dict[str, Callable[[int], nn.Module]] = {
  'mlp': MLP,
  'cnn': CNN,
  'cnn-bn': functools.partial(CNN, batch_norm=True),
  'resnet20': functools.partial(resnet.ResNet, depth=20),
  'resnet32': functools.partial(resnet.ResNet, depth=32),
  'wrn-16-4': functools.partial(resnet.WideResNet, depth=16, widening=4),
  'wrn-28-10': functools.partial(resnet.WideResNet, depth=28, widening=10),
}
WITHOUT_BATCH_NORM = ('mlp', 'cnn')


def init(
  model: nn.Module, key: jax.Array, images: data.Array
) -> tuple[optax.Params, ModelState]:
  """Random parameters and an initial state, for images of this shape."""
  variables = dict(model.init(key, images))
  return variables.pop('params'), variables


def apply_train(
  params: optax.Params,
  model_state: ModelState,
  model: nn.Module,
  images: data.Array,
) -> tuple[jax.Array, ModelState]:
  """The logits of a forward pass in training, and the new state."""
  variables: dict[str, Any] = {'params': params, **model_state}
  logits, new_model_state = model.apply(
    variables, images, train=True, mutable=list(model_state)
  )
  return logits, dict(new_model_state)


def apply_eval(
  params: optax.Params,
  model_state: ModelState,
  model: nn.Module,
  images: data.Array,
) -> jax.Array:
  """The logits [n, num_classes] in evaluation."""
  variables: dict[str, Any] = {'params': params, **model_state}
  return jnp.asarray(model.apply(variables, images))


def cross_entropies(
  logits: jax.Array, labels: data.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """The cross-entropies [...] of ``logits`` [..., classes] against ``labels``.

  With label smoothing a, each class has the target a / num_classes, plus 1 - a
  for the label.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  if not label_smoothing:
    return losses
  # Without an array of targets as large as the logits.
  uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
  return (1 - label_smoothing) * losses + label_smoothing * uniform


def train_loss_fn(
  params: optax.Params,
  model_state: ModelState,
  model: nn.Module,
  batch: data.Split,
  *,
  label_smoothing: float = 0.0,
) -> tuple[jax.Array, ModelState]:
  """The loss of a forward pass in training, and the new state.

  Differentiate it with ``has_aux=True``. ``optax_asam.value_and_grad`` returns
  the state of the pass at the unperturbed parameters.
  """
  logits, new_model_state = apply_train(
    params, model_state, model, batch.images
  )
  losses = cross_entropies(logits, batch.labels, label_smoothing)
  return losses.mean(), new_model_state


def eval_loss_fn(
  params: optax.Params,
  model_state: ModelState,
  model: nn.Module,
  split: data.Split,
) -> jax.Array:
  """The mean cross-entropy on ``split`` in evaluation."""
  logits = apply_eval(params, model_state, model, split.images)
  return cross_entropies(logits, split.labels).mean()
