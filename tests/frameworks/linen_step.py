"""Train steps in Flax linen; the docs print the marked parts."""

# [model]
from flax import linen as nn
from flax.training import train_state
import jax
import optax

import optax_asam
from optax_asam import asam


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
  """Flax's, with the statistics of BatchNorm."""

  batch_stats: dict


def create_train_state(network, key, images, tx):
  """The state before the first step."""
  variables = network.init(key, images, train=False)
  return TrainState.create(
    apply_fn=network.apply,
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    tx=tx,
  )


def loss_fn(params, state, images, labels, key):
  """The loss of one batch and the statistics after it."""
  logits, updated = state.apply_fn(
    {'params': params, 'batch_stats': state.batch_stats},
    images,
    train=True,
    rngs={'dropout': key},
    mutable=['batch_stats'],
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), updated['batch_stats']


# [/model]


# [value_and_grad]
tx = optax.sgd(0.1, momentum=0.9)


@jax.jit
def train_step(state, images, labels, key, rho=0.5):
  """One step of ASAM under any ``tx``."""
  value_and_grad_fn = optax_asam.value_and_grad(loss_fn, rho=rho, has_aux=True)
  (loss, batch_stats), grads = value_and_grad_fn(
    state.params, state, images, labels, key
  )
  return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


# [/value_and_grad]


# [transformation]
asam_tx = asam(optax.sgd(0.1, momentum=0.9), rho=0.5)


@jax.jit
def asam_train_step(state, images, labels, key):
  """One step of ``asam_tx``, which needs the gradient function, too."""

  def value_and_grad_fn(params):
    return jax.value_and_grad(loss_fn, has_aux=True)(
      params, state, images, labels, key
    )

  def grad_fn(params):
    return value_and_grad_fn(params)[1]

  (loss, batch_stats), grads = value_and_grad_fn(state.params)
  updates, opt_state = state.tx.update(
    grads, state.opt_state, state.params, grad_fn=grad_fn
  )
  state = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    batch_stats=batch_stats,
  )
  return state, loss


# [/transformation]
