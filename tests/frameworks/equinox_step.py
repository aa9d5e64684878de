"""A train step in Equinox; the docs print the marked parts."""

# [model]
import equinox as eqx
import jax
import optax

from optax_asam import asam


class Network(eqx.Module):
  """Convolution, BatchNorm, dropout and a dense layer, for 8x8 images."""

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
    """Logits [10] of one image [1, 8, 8], and the new state."""
    x, state = self.norm(jax.nn.relu(self.conv(image)), state)
    x = self.dropout(x, key=key)
    return self.dense(x.reshape(-1)), state


# [/model]


# [train_step]
tx = asam(optax.sgd(0.1, momentum=0.9), rho=0.5)


def init(key):
  """What the first step takes: network, its state and that of ``tx``."""
  network, state = eqx.nn.make_with_state(Network)(key=key)
  opt_state = tx.init(eqx.filter(network, eqx.is_inexact_array))
  return network, state, opt_state


@eqx.filter_jit
def train_step(network, state, opt_state, images, labels, key, tx=tx):
  """One step of ASAM."""
  params, static = eqx.partition(network, eqx.is_inexact_array)
  keys = jax.random.split(key, len(images))

  def loss_fn(params):
    batched_network = jax.vmap(
      eqx.combine(params, static),
      axis_name='batch',
      in_axes=(0, None, 0),
      out_axes=(0, None),
    )
    logits, new_state = batched_network(images, state, keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new_state

  def grad_fn(params):
    return jax.grad(loss_fn, has_aux=True)(params)[0]

  (loss, new_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return eqx.apply_updates(network, updates), new_state, opt_state, loss


# [/train_step]
