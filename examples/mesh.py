"""Trains with ASAM on a mesh: batches and parameters are sharded.

A residual network with BatchNorm and dropout in bfloat16, on scikit-learn's
digits. The train step does not mention devices: ``jit`` computes on global
arrays, and the compiler adds the communication. On eight simulated devices::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/mesh.py
"""

import argparse
from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
from flax.training import train_state
import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from sklearn import datasets

import optax_asam

BATCH_SIZE = 64


class Network(nn.Module):
  """A small residual network with float32 parameters.

  With bfloat16 parameters, rounding would lose most of the perturbation.
  """

  dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images [n, 8, 8, 1] to logits [n, 10]."""
    conv = functools.partial(
      nn.Conv, 16, (3, 3), use_bias=False, dtype=self.dtype
    )
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, dtype=self.dtype
    )
    x = nn.silu(norm(momentum=0.9)(conv(strides=2)(images)))
    x += nn.silu(norm(momentum=0.9)(conv()(x)))
    x = nn.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1))
    return nn.Dense(10, dtype=self.dtype)(x).astype(jnp.float32)


class TrainState(train_state.TrainState):
  """Flax's ``TrainState``, with BatchNorm statistics and a dropout key."""

  batch_stats: Any
  key: jax.Array


def init(network: Network, num_steps: int, key: jax.Array) -> TrainState:
  """The initial state."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.01, 0.1, num_steps // 4, num_steps
  )
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.add_decayed_weights(5e-4),
    optax.sgd(schedule, momentum=0.9),
  )
  params_key, dropout_key = jax.random.split(key)
  variables = network.init(params_key, jnp.ones((1, 8, 8, 1)), train=False)
  return TrainState.create(
    apply_fn=network.apply, tx=tx, key=dropout_key, **variables
  )


def train_step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
  """The next state, and the loss before the step."""
  images, labels = batch
  # The same key in both passes of ASAM: they drop the same features.
  rngs = {'dropout': jax.random.fold_in(state.key, state.step)}

  def loss_fn(params):
    variables = {'params': params, 'batch_stats': state.batch_stats}
    logits, updated = state.apply_fn(
      variables, images, train=True, rngs=rngs, mutable='batch_stats'
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated['batch_stats']

  # Without ASAM: jax.value_and_grad(loss_fn, has_aux=True)
  grad_fn = optax_asam.value_and_grad(loss_fn, rho=0.5, has_aux=True)
  (loss, batch_stats), grads = grad_fn(state.params)
  return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def make_mesh(devices: Sequence[Any]) -> Mesh:
  """A mesh data x model; model has size 2 if the number of devices is even.

  The size of data must divide the batch size.
  """
  model = 2 if len(devices) % 2 == 0 else 1
  shape = (len(devices) // model, model)
  return Mesh(mesh_utils.create_device_mesh(shape, devices), ('data', 'model'))


def make_shardings(mesh: Mesh, tree: Any) -> Any:
  """Shards the last axis of each array over model, if it divides evenly.

  Only the shape matters, so momentum is sharded like its parameter.
  """

  def make_sharding(x):
    is_split = x.ndim and x.shape[-1] % mesh.shape['model'] == 0
    axes = [None] * (x.ndim - 1) + ['model'] if is_split else []
    return NamedSharding(mesh, P(*axes))

  return jax.tree.map(make_sharding, tree)


def train(
  mesh: Mesh, epochs: int, dtype: Any = jnp.bfloat16
) -> tuple[TrainState, float]:
  """The trained state, and its accuracy on the last 297 digits."""
  # The default since JAX 0.5: dropout does not depend on shardings.
  jax.config.update('jax_threefry_partitionable', True)
  pixels, labels = datasets.load_digits(return_X_y=True)
  images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  steps = 1500 // BATCH_SIZE
  # The state is created on the mesh: each device initializes its own shards.
  make_state = functools.partial(init, Network(dtype), epochs * steps)
  shardings = make_shardings(
    mesh, jax.eval_shape(make_state, jax.random.key(0))
  )
  state = jax.jit(make_state, out_shardings=shardings)(jax.random.key(0))
  step = jax.jit(train_step, out_shardings=(shardings, None), donate_argnums=0)
  batch_sharding = NamedSharding(mesh, P('data'))
  rng = np.random.default_rng(0)
  for epoch in range(1, epochs + 1):
    losses = []
    order = rng.permutation(1500)[: steps * BATCH_SIZE]
    for indices in order.reshape(steps, BATCH_SIZE):
      batch = jax.device_put((images[indices], labels[indices]), batch_sharding)
      state, loss = step(state, batch)
      # Simulated devices must wait for each step. On others, wait less often.
      losses.append(float(loss))
    print(f'epoch {epoch}: loss {np.mean(losses):.4f}', flush=True)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  logits = jax.jit(functools.partial(state.apply_fn, train=False))(
    variables, images[1500:]
  )
  return state, float(np.mean(np.argmax(logits, axis=-1) == labels[1500:]))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--epochs', type=int, default=10)
  args = parser.parse_args()
  mesh = make_mesh(jax.devices())
  print(f'mesh: {dict(mesh.shape)}')
  print(f'test accuracy: {train(mesh, args.epochs)[1]:.1%}')
