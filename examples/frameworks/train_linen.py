"""ASAM in Flax linen, with any Optax optimizer and any trainer."""

from flax import linen as nn
from flax.training import train_state
import jax
import numpy as np
import optax
from sklearn import datasets

import optax_asam


class Network(nn.Module):
  """Convolution, BatchNorm, dropout and a dense layer, for 8x8 images."""

  dropout_rate: float = 0.5

  @nn.compact
  def __call__(self, images, train):
    """Logits [n, 10] of images [n, 8, 8, 1]."""
    x = nn.relu(nn.Conv(4, (3, 3))(images))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
  """Flax's ``TrainState``, with BatchNorm statistics."""

  batch_stats: dict


def loss_fn(params, state, images, labels, key):
  """The loss of a batch, and the new statistics."""
  logits, updated = state.apply_fn(
    {'params': params, 'batch_stats': state.batch_stats},
    images,
    train=True,
    rngs={'dropout': key},
    mutable=['batch_stats'],
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), updated['batch_stats']


@jax.jit
def train_step(state, images, labels, key):
  """The state after a step of ASAM, and the loss."""
  value_and_grad_fn = optax_asam.value_and_grad(loss_fn, rho=0.5, has_aux=True)
  (loss, batch_stats), grads = value_and_grad_fn(
    state.params, state, images, labels, key
  )
  return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def accuracy(state, images, labels):
  """The fraction of images that are classified correctly."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  logits = state.apply_fn(variables, images, train=False)
  return (logits.argmax(-1) == labels).mean()


def main(epochs=10, batch_size=50):
  """Trains on 1,500 digits and prints the accuracy on the other 297."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
  key, init_key = jax.random.split(jax.random.key(0))
  network = Network()
  variables = network.init(init_key, images[:1], train=False)
  state = TrainState.create(
    apply_fn=network.apply,
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    tx=optax.sgd(0.05, momentum=0.9),
  )
  rng = np.random.default_rng(0)
  for epoch in range(epochs):
    losses = []
    for batch in rng.permutation(1500).reshape(-1, batch_size):
      step_key = jax.random.fold_in(key, state.step)
      state, loss = train_step(state, images[batch], labels[batch], step_key)
      losses.append(loss)
    test_accuracy = accuracy(state, images[1500:], labels[1500:])
    print(
      f'epoch {epoch + 1}: loss {np.mean(losses):.3f},'
      f' test accuracy {test_accuracy:.1%}'
    )


if __name__ == '__main__':
  main()
