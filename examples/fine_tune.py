"""Fine-tuning with ASAM: only the head, or LoRA.

A small network is trained on the digits 0 to 4, and then fine-tuned on 200
images of the digits 5 to 9: first its head alone, with the frozen layers in the
same pytree, then low-rank updates of all layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import optax_asam


def init(key, sizes=(64, 64, 64, 5)):
  """The parameters of dense layers."""
  keys = jax.random.split(key, len(sizes) - 1)
  return {
    f'dense_{i}': {
      'kernel': jax.random.normal(key, (n_in, n_out)) * jnp.sqrt(2 / n_in),
      'bias': jnp.zeros(n_out),
    }
    for i, (key, n_in, n_out) in enumerate(
      zip(keys, sizes[:-1], sizes[1:], strict=True)
    )
  }


def init_lora(key, params, rank=4):
  """Low-rank updates of the kernels, which start at zero."""
  lora = {}
  for name, layer in params.items():
    key, down_key = jax.random.split(key)
    n_in, n_out = layer['kernel'].shape
    lora[name] = {
      'down': jax.random.normal(down_key, (n_in, rank)) / jnp.sqrt(n_in),
      'up': jnp.zeros((rank, n_out)),
    }
  return lora


def add_lora(params, lora):
  """The parameters with low-rank updates."""
  return {
    name: {
      'kernel': layer['kernel'] + lora[name]['down'] @ lora[name]['up'],
      'bias': layer['bias'],
    }
    for name, layer in params.items()
  }


def apply(params, images):
  """The logits of a batch."""
  # By name: jit sorts the keys of a dict, dense_10 before dense_2.
  *hidden, head = (params[f'dense_{i}'] for i in range(len(params)))
  x = images
  for layer in hidden:
    x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
  return x @ head['kernel'] + head['bias']


def loss_fn(params, images, labels):
  """The loss of a batch."""
  logits = apply(params, images)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def lora_loss_fn(lora, params, images, labels):
  """The loss of a batch as a function of the low-rank updates alone."""
  return loss_fn(add_lora(params, lora), images, labels)


def train(loss_fn, tx, params, images, labels, steps):
  """The parameters after full-batch steps of ``tx``, an ``asam``."""

  @jax.jit
  def train_step(params, opt_state):
    grad_fn = jax.grad(functools.partial(loss_fn, images=images, labels=labels))
    grads = grad_fn(params)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  for _ in range(steps):
    params, opt_state = train_step(params, opt_state)
  return params


def fine_tune_head(params, images, labels, steps):
  """Trains the last layer alone."""
  trained = {name: name == 'dense_2' for name in params}
  base_tx = optax.partition(
    {True: optax.adam(1e-2), False: optax.set_to_zero()}, trained
  )
  # partition is inside: grad_fn needs all parameters. The mask keeps the
  # frozen ones out of the perturbation and its norm.
  tx = optax_asam.asam(base_tx, rho=0.5, mask=trained)
  return train(loss_fn, tx, params, images, labels, steps)


def fine_tune_lora(params, images, labels, steps):
  """Trains and perturbs low-rank updates; nothing else is differentiated."""
  tx = optax_asam.asam(optax.adam(1e-2), rho=0.5)
  frozen_loss_fn = functools.partial(lora_loss_fn, params=params)
  lora = init_lora(jax.random.key(1), params)
  lora = train(frozen_loss_fn, tx, lora, images, labels, steps)
  return add_lora(params, lora)


def main(steps=300):
  """Prints the test accuracy before and after fine-tuning."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 16).astype(np.float32)
  old, new = labels < 5, labels >= 5

  tx = optax_asam.asam(optax.adam(1e-2), rho=0.5)
  params = init(jax.random.key(0))
  params = train(loss_fn, tx, params, images[old], labels[old], steps)

  images, labels = images[new], labels[new] - 5
  fine_tuned = {
    'before': params,
    'head': fine_tune_head(params, images[:200], labels[:200], steps),
    'LoRA': fine_tune_lora(params, images[:200], labels[:200], steps),
  }
  for name, params in fine_tuned.items():
    predictions = apply(params, images[200:]).argmax(-1)
    accuracy = (predictions == labels[200:]).mean()
    print(f'{name:6}  test accuracy {accuracy:.1%}')


if __name__ == '__main__':
  main()
