"""ASAM in Haiku, as an Optax transformation."""

import haiku as hk
import jax
import numpy as np
import optax
from sklearn import datasets

from optax_asam import asam


def forward(images, train, dropout_rate=0.5):
  """Convolution, BatchNorm, dropout and a dense layer, for 8x8 images."""
  norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
  x = norm(jax.nn.relu(hk.Conv2D(4, 3)(images)), train)
  if train:
    x = hk.dropout(hk.next_rng_key(), dropout_rate, x)
  return hk.Linear(10)(x.reshape(len(x), -1))


network = hk.transform_with_state(forward)
tx = asam(optax.sgd(0.05, momentum=0.9), rho=0.5)


def loss_fn(params, state, images, labels, key):
  """The loss of a batch, and the new statistics."""
  logits, state = network.apply(params, state, key, images, train=True)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), state


@jax.jit
def train_step(params, state, opt_state, images, labels, key):
  """Parameters and states after a step of ASAM, and the loss."""
  value_and_grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def grad_fn(params):
    return value_and_grad_fn(params, state, images, labels, key)[1]

  (loss, new_state), grads = value_and_grad_fn(
    params, state, images, labels, key
  )
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), new_state, opt_state, loss


@jax.jit
def accuracy(params, state, images, labels):
  """The fraction of images that are classified correctly."""
  logits, _ = network.apply(params, state, None, images, train=False)
  return (logits.argmax(-1) == labels).mean()


def main(epochs=10, batch_size=50):
  """Trains on 1,500 digits and prints the accuracy on the other 297."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
  key, init_key = jax.random.split(jax.random.key(0))
  params, state = network.init(init_key, images[:1], train=True)
  opt_state = tx.init(params)
  rng = np.random.default_rng(0)
  for epoch in range(epochs):
    losses = []
    for batch in rng.permutation(1500).reshape(-1, batch_size):
      key, step_key = jax.random.split(key)
      params, state, opt_state, loss = train_step(
        params, state, opt_state, images[batch], labels[batch], step_key
      )
      losses.append(loss)
    test_accuracy = accuracy(params, state, images[1500:], labels[1500:])
    print(
      f'epoch {epoch + 1}: loss {np.mean(losses):.3f},'
      f' test accuracy {test_accuracy:.1%}'
    )


if __name__ == '__main__':
  main()
