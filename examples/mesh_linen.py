"""A train step of ASAM on a mesh, in Flax linen.

BatchNorm, dropout, bfloat16 compute, clipping, gradient accumulation, warm-up
and cosine; parameters and optimizer state are split over the devices, and so is
the batch. ASAM is one line of the train step. It runs on any number of devices;
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of a CPU.
"""

import functools
from typing import Any

from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

import data
import mesh_setup
import optax_asam


class Network(nn.Module):
  """A small residual network for images of 8 x 8.

  Attributes:
    dtype: What it computes in. Parameters are float32 all the same: in them,
      bfloat16 would round most of a perturbation away.
    dropout_rate: The fraction of features that a pass in training drops.
  """

  dtype: Any = jnp.bfloat16
  dropout_rate: float = 0.1

  def setup(self):
    """The layers; a bias before BatchNorm would do nothing."""
    norm = {'momentum': 0.9, 'dtype': self.dtype}
    conv = {'use_bias': False, 'dtype': self.dtype}
    self.conv_in = nn.Conv(16, (3, 3), strides=2, **conv)
    self.norm_in = nn.BatchNorm(**norm)
    self.conv_mid = nn.Conv(16, (3, 3), **conv)
    self.norm_mid = nn.BatchNorm(**norm)
    self.dropout = nn.Dropout(self.dropout_rate)
    self.out = nn.Dense(10, dtype=self.dtype)

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images [n, 8, 8, 1] to logits [n, 10] in float32."""
    x = self.conv_in(images)
    x = nn.silu(self.norm_in(x, use_running_average=not train))
    y = self.norm_mid(self.conv_mid(x), use_running_average=not train)
    x = (x + nn.silu(y)).reshape(len(x), -1)
    x = self.dropout(x, deterministic=not train)
    return self.out(x).astype(jnp.float32)


class TrainState(train_state.TrainState):
  """Flax's, with the statistics of BatchNorm and the key of dropout."""

  batch_stats: Any
  key: jax.Array


def create_state(
  network: Network, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """The state before the first step."""
  init_key, dropout_key = jax.random.split(key)
  variables = network.init(init_key, jnp.ones((1, 8, 8, 1)), train=False)
  return TrainState.create(
    apply_fn=network.apply,
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    key=dropout_key,
    tx=tx,
  )


def loss_fn(
  params: optax.Params, state: TrainState, batch: data.Split
) -> tuple[jax.Array, Any]:
  """The loss of a micro-batch, and the statistics of BatchNorm after it."""
  logits, updated = state.apply_fn(
    {'params': params, 'batch_stats': state.batch_stats},
    batch.images,
    train=True,
    # Of the state alone: both passes of ASAM drop the same features.
    rngs={'dropout': jax.random.fold_in(state.key, state.step)},
    mutable=['batch_stats'],
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
  return losses.mean(), updated['batch_stats']


def train_step(
  state: TrainState, batch: data.Split
) -> tuple[TrainState, jax.Array]:
  """One micro-batch, with a perturbation of its own: next state and loss."""
  # The plain version: grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  grad_fn = optax_asam.value_and_grad(loss_fn, has_aux=True, rho=0.5)
  # Loss and statistics are those of the first pass, at the parameters.
  (loss, batch_stats), grads = grad_fn(state.params, state, batch)
  return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def predict(state: TrainState, images: data.Array) -> jax.Array:
  """Logits by the running statistics."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  return state.apply_fn(variables, images, train=False)


if __name__ == '__main__':
  create_state_of_network = functools.partial(create_state, Network())
  mesh_setup.run(__doc__, create_state_of_network, train_step, predict)
