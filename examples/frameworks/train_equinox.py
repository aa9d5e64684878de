"""ASAM in Equinox, with any Optax optimizer."""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn import datasets

import optax_asam.equinox


class Network(eqx.Module):
  """Convolution, BatchNorm, dropout and a dense layer, for an 8x8 image."""

  conv: eqx.nn.Conv2d
  norm: eqx.nn.BatchNorm
  dropout: eqx.nn.Dropout
  dense: eqx.nn.Linear

  def __init__(self, dropout_rate=0.5, *, key):
    conv_key, dense_key = jax.random.split(key)
    self.conv = eqx.nn.Conv2d(1, 4, 3, padding=1, key=conv_key)
    self.norm = eqx.nn.BatchNorm(4, 'batch', momentum=0.9, mode='batch')
    self.dropout = eqx.nn.Dropout(dropout_rate)
    self.dense = eqx.nn.Linear(4 * 8 * 8, 10, key=dense_key)

  def __call__(self, image, state, key):
    """Logits [10] of one image [1, 8, 8], and the new statistics."""
    x, state = self.norm(jax.nn.relu(self.conv(image)), state)
    x = self.dropout(x, key=key)
    return self.dense(x.reshape(-1)), state


def apply(network, state, images, key=None):
  """The logits of a batch, and the new statistics."""
  keys = None if key is None else jax.random.split(key, len(images))
  return jax.vmap(
    network, in_axes=(0, None, 0), out_axes=(0, None), axis_name='batch'
  )(images, state, keys)


def loss_fn(network, state, images, labels, key):
  """The loss of a batch, and the new statistics."""
  logits, state = apply(network, state, images, key)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), state


tx = optax.sgd(0.05, momentum=0.9)


@eqx.filter_jit
def train_step(network, state, opt_state, images, labels, key):
  """The network and its states after a step of ASAM, and the loss."""
  value_and_grad_fn = optax_asam.equinox.filter_value_and_grad(
    loss_fn, rho=0.5, has_aux=True
  )
  (loss, state), grads = value_and_grad_fn(network, state, images, labels, key)
  params = eqx.filter(network, eqx.is_inexact_array)
  updates, opt_state = tx.update(grads, opt_state, params)
  return eqx.apply_updates(network, updates), state, opt_state, loss


@eqx.filter_jit
def accuracy(network, state, images, labels):
  """The fraction of images that are classified correctly."""
  logits, _ = apply(eqx.nn.inference_mode(network), state, images)
  return (logits.argmax(-1) == labels).mean()


def main(epochs=10, batch_size=50):
  """Trains on 1,500 digits and prints the accuracy on the other 297."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)
  key, init_key = jax.random.split(jax.random.key(0))
  network, state = eqx.nn.make_with_state(Network)(key=init_key)
  opt_state = tx.init(eqx.filter(network, eqx.is_inexact_array))
  rng = np.random.default_rng(0)
  for epoch in range(epochs):
    losses = []
    for batch in rng.permutation(1500).reshape(-1, batch_size):
      key, step_key = jax.random.split(key)
      network, state, opt_state, loss = train_step(
        network, state, opt_state, images[batch], labels[batch], step_key
      )
      losses.append(loss)
    test_accuracy = accuracy(network, state, images[1500:], labels[1500:])
    print(
      f'epoch {epoch + 1}: loss {np.mean(losses):.3f},'
      f' test accuracy {test_accuracy:.1%}'
    )


if __name__ == '__main__':
  main()
