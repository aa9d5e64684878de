"""Models by name, and the loss that they are trained on.

To add a model, write a Flax module and name it in ``MODELS``. It is called with
images, float32 [n, height, width, channels], and with ``train``, which is True
in training alone, and returns logits [n, num_classes].

A model has ``params``, which are trained by gradients, and a ``model_state``,
which a pass in training updates by itself: a dict with the running statistics
of BatchNorm, empty for a model without it.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import data
import resnet

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

  With Flax's initialization, like the MLP. On images of 28 x 28 x 1 it has
  207 k parameters, of 32 x 32 x 3 it has 269 k, nearly all of them in the dense
  layer. Strides stand in for pooling, whose gradient is slow on CPU. With
  ``batch_norm``, BatchNorm stands after each convolution.
  """

  num_classes: int
  channels: Sequence[int] = (16, 32)
  hidden_size: int = 128
  batch_norm: bool = False

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
  """Random parameters and a fresh state; of ``images`` the shape matters."""
  variables = dict(model.init(key, images))
  return variables.pop('params'), variables


def apply_train(
  params: optax.Params,
  model_state: ModelState,
  model: nn.Module,
  images: data.Array,
) -> tuple[jax.Array, ModelState]:
  """The logits of a pass in training, and the state after it."""
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
  """The logits [n, num_classes] of a trained model, whose state stays."""
  variables: dict[str, Any] = {'params': params, **model_state}
  return jnp.asarray(model.apply(variables, images))


def cross_entropies(
  logits: jax.Array, labels: data.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """The cross-entropies [...] of ``logits`` [..., classes] against ``labels``.

  With label smoothing a, a class has the probability a / num_classes, and the
  label's own has 1 - a more.
  """
  if not label_smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  targets = optax.smooth_labels(targets, label_smoothing)
  return optax.softmax_cross_entropy(logits, targets)


def train_loss_fn(
  params: optax.Params,
  model_state: ModelState,
  model: nn.Module,
  batch: data.Split,
  *,
  label_smoothing: float = 0.0,
) -> tuple[jax.Array, ModelState]:
  """The loss of a pass in training, and the state after it.

  With ``has_aux=True`` it is a function for :func:`jax.value_and_grad` and for
  ``optax_asam.value_and_grad``, which gives the state of the clean pass. A
  ``grad_fn`` for ``tx.update`` leaves the state of the perturbed one out::

    train_grad_fn = jax.grad(train_loss_fn, has_aux=True)
    grads, new_model_state = train_grad_fn(params, model_state, model, batch)
    grad_fn = lambda p: train_grad_fn(p, model_state, model, batch)[0]
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
  """The mean cross-entropy of a trained model on ``split``."""
  logits = apply_eval(params, model_state, model, split.images)
  return cross_entropies(logits, split.labels).mean()
