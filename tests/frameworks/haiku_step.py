"""A train step in Haiku; the docs print the marked parts."""

# [model]
import functools

import haiku as hk
import jax
import optax

from optax_asam import asam


def forward(images, train, dropout_rate=0.5):
  """Convolution, BatchNorm, dropout and a dense layer, for 8x8 images."""
  norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
  x = norm(jax.nn.relu(hk.Conv2D(4, 3)(images)), train)
  if train:
    x = hk.dropout(hk.next_rng_key(), dropout_rate, x)
  return hk.Linear(10)(x.reshape(len(x), -1))


network = hk.transform_with_state(forward)
# [/model]


# [train_step]
tx = asam(optax.sgd(0.1, momentum=0.9), rho=0.5)


def init(key, images):
  """What the first step takes: parameters, statistics, state of ``tx``."""
  params, state = network.init(key, images, train=True)
  return params, state, tx.init(params)


@functools.partial(jax.jit, static_argnames=('network', 'tx'))
def train_step(
  params, state, opt_state, images, labels, key, network=network, tx=tx
):
  """One step of ASAM."""

  def loss_fn(params):
    logits, new_state = network.apply(params, state, key, images, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new_state

  def grad_fn(params):
    return jax.grad(loss_fn, has_aux=True)(params)[0]

  (loss, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), new_state, opt_state, loss


# [/train_step]
