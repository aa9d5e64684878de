"""ASAM in Flax NNX, with any Optax optimizer."""

from flax import nnx
import numpy as np
import optax
from sklearn import datasets

import optax_asam.nnx


class Network(nnx.Module):
  """Convolution, BatchNorm, dropout and a dense layer, for 8x8 images."""

  def __init__(self, dropout_rate=0.5, *, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
    self.dense = nnx.Linear(8 * 8 * 4, 10, rngs=rngs)

  def __call__(self, images):
    """Logits [n, 10] of images [n, 8, 8, 1]."""
    x = self.dropout(self.norm(nnx.relu(self.conv(images))))
    return self.dense(x.reshape(len(x), -1))


def loss_fn(network, images, labels):
  """The loss of a batch."""
  logits = network(images)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


@nnx.jit
def train_step(network, optimizer, images, labels):
  """Updates the network and the optimizer in place, and returns the loss."""
  value_and_grad_fn = optax_asam.nnx.value_and_grad(loss_fn, rho=0.5)
  loss, grads = value_and_grad_fn(network, images, labels)
  optimizer.update(network, grads)
  return loss


@nnx.jit
def accuracy(network, images, labels):
  """The fraction of images that are classified correctly."""
  return (network(images).argmax(-1) == labels).mean()


def main(epochs=10, batch_size=50):
  """Trains on 1,500 digits and prints the accuracy on the other 297."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
  network = Network(rngs=nnx.Rngs(0))
  tx = optax.sgd(0.05, momentum=0.9)
  optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
  rng = np.random.default_rng(0)
  for epoch in range(epochs):
    losses = []
    network.train()
    for batch in rng.permutation(1500).reshape(-1, batch_size):
      loss = train_step(network, optimizer, images[batch], labels[batch])
      losses.append(loss)
    network.eval()
    test_accuracy = accuracy(network, images[1500:], labels[1500:])
    print(
      f'epoch {epoch + 1}: loss {np.mean(losses):.3f},'
      f' test accuracy {test_accuracy:.1%}'
    )


if __name__ == '__main__':
  main()
