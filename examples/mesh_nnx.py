"""A train step of ASAM on a mesh, in Flax NNX.

BatchNorm, dropout, bfloat16 compute, clipping, gradient accumulation, warm-up
and cosine; parameters and optimizer state are split over the devices, and so is
the batch. ASAM is one line of the train step. It runs on any number of devices;
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of a CPU.

A pass changes an NNX network in place. So the state holds arrays alone, and
each pass merges a network of its own from them.
"""

from typing import Any

from flax import nnx
from flax import struct
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

import data
import mesh_setup
import optax_asam

# Arrays in the place of variables. Flax 0.10 has no as_pure and needs none: its
# states hold copies.
as_pure = getattr(nnx, 'as_pure', lambda tree: tree)


class Network(nnx.Module):
  """A small residual network for images of 8 x 8.

  Parameters are float32, whatever it computes in: in them, bfloat16 would round
  most of a perturbation away.
  """

  def __init__(
    self, rngs: nnx.Rngs, dtype: Any = jnp.bfloat16, dropout_rate: float = 0.1
  ):
    norm = {'momentum': 0.9, 'dtype': dtype, 'rngs': rngs}
    # A bias before BatchNorm would do nothing.
    conv = {'use_bias': False, 'dtype': dtype, 'rngs': rngs}
    self.conv_in = nnx.Conv(1, 16, (3, 3), strides=2, **conv)
    self.norm_in = nnx.BatchNorm(16, **norm)
    self.conv_mid = nnx.Conv(16, 16, (3, 3), **conv)
    self.norm_mid = nnx.BatchNorm(16, **norm)
    self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
    self.out = nnx.Linear(4 * 4 * 16, 10, dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images [n, 8, 8, 1] to logits [n, 10] in float32."""
    x = self.conv_in(images)
    x = nnx.silu(self.norm_in(x, use_running_average=not train))
    y = self.norm_mid(self.conv_mid(x), use_running_average=not train)
    x = (x + nnx.silu(y)).reshape(len(x), -1)
    x = self.dropout(x, deterministic=not train)
    return self.out(x).astype(jnp.float32)


class TrainState(train_state.TrainState):
  """Flax's, with what else an NNX network is made of.

  Attributes:
    graphdef: Its structure.
    rest: The statistics of BatchNorm, and the keys and counts of dropout.
  """

  graphdef: Any = struct.field(pytree_node=False)
  rest: Any


def create_state(
  tx: optax.GradientTransformation, key: jax.Array, **network_args: Any
) -> TrainState:
  """The state before the first step."""
  network = Network(nnx.Rngs(key), **network_args)
  graphdef, params, rest = nnx.split(network, nnx.Param, ...)
  return TrainState.create(
    apply_fn=nnx.merge,
    params=as_pure(params),
    rest=as_pure(rest),
    graphdef=graphdef,
    tx=tx,
  )


def loss_fn(
  params: optax.Params, state: TrainState, batch: data.Split
) -> tuple[jax.Array, Any]:
  """The loss of a micro-batch, and the rest of the network after it."""
  # From the same rest in both passes of ASAM: they drop the same features.
  network = state.apply_fn(state.graphdef, params, state.rest)
  logits = network(batch.images, train=True)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
  _, _, rest = nnx.split(network, nnx.Param, ...)
  return losses.mean(), as_pure(rest)


def train_step(
  state: TrainState, batch: data.Split
) -> tuple[TrainState, jax.Array]:
  """One micro-batch, with a perturbation of its own: next state and loss."""
  # The plain version: grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  grad_fn = optax_asam.value_and_grad(loss_fn, has_aux=True, rho=0.5)
  # Loss, statistics and counts are those of the first pass, at the parameters.
  (loss, rest), grads = grad_fn(state.params, state, batch)
  return state.apply_gradients(grads=grads, rest=rest), loss


def predict(state: TrainState, images: data.Array) -> jax.Array:
  """Logits by the running statistics."""
  network = state.apply_fn(state.graphdef, state.params, state.rest)
  return network(images, train=False)


if __name__ == '__main__':
  mesh_setup.run(__doc__, create_state, train_step, predict)
