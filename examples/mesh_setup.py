"""What the train steps on a mesh share: devices, shardings, optimizer, loop.

Nothing here calls ASAM: that is one line of each program, ``mesh_linen.py`` and
``mesh_nnx.py``.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import data

PyTree = Any

MICRO_BATCH_SIZE = 32
MICRO_BATCHES_PER_UPDATE = 2
CLIP_NORM = 1.0
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
# Of the learning rate: the first update, the highest, and where it ends.
START, PEAK, END = 0.01, 0.1, 0.0


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """All devices, as ``data`` x ``model``; ``model`` is 2 if it divides."""
  devices = jax.devices() if devices is None else devices
  model = 2 if len(devices) % 2 == 0 else 1
  shape = (len(devices) // model, model)
  return Mesh(mesh_utils.create_device_mesh(shape, devices), ('data', 'model'))


def make_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
  """Splits every array over ``model``, along its last axis that divides.

  The shape alone decides, so that momenta and accumulated gradients lie where
  their parameters do. Scalars, and what does not divide, are on every device.
  """
  size = mesh.shape['model']

  def make_sharding(x):
    spec = [None] * x.ndim
    for axis in reversed(range(x.ndim)):
      if x.shape[axis] % size == 0:
        spec[axis] = 'model'
        break
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(make_sharding, tree)


def shard(
  mesh: Mesh,
  create_state: Callable[[jax.Array], PyTree],
  train_step: Callable[[PyTree, data.Split], tuple[PyTree, jax.Array]],
  key: jax.Array,
) -> tuple[PyTree, Callable[..., tuple[PyTree, jax.Array]]]:
  """The state on the mesh, made there piece by piece, and the compiled step.

  The step keeps the shardings of the state, and reuses its memory.
  """
  shardings = make_shardings(mesh, jax.eval_shape(create_state, key))
  state = jax.jit(create_state, out_shardings=shardings)(key)
  step = jax.jit(train_step, out_shardings=(shardings, None), donate_argnums=0)
  return state, step


def make_schedule(num_updates: int) -> optax.Schedule:
  """Warm-up for a quarter of the updates, then a cosine."""
  return optax.warmup_cosine_decay_schedule(
    START, PEAK, num_updates // 4, num_updates, END
  )


def make_tx(num_updates: int) -> optax.GradientTransformation:
  """SGD with all that a plain train step has; ASAM needs no change here.

  ``MultiSteps`` makes one update of the mean gradient of some micro-batches. It
  stands under ASAM, so each of these gradients has a perturbation of its own
  (m-sharpness), which helps more than one for the whole batch. Around ASAM it
  would be wrong. For one perturbation, accumulate inside of the gradient
  function; see "Gradient accumulation" in docs/composition.md.

  What is clipped is the mean of the perturbed gradients, and the schedule
  counts updates, not micro-batches.
  """
  tx = optax.chain(
    optax.clip_by_global_norm(CLIP_NORM),
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.sgd(make_schedule(num_updates), momentum=MOMENTUM),
  )
  return optax.MultiSteps(
    tx, MICRO_BATCHES_PER_UPDATE
  ).gradient_transformation()


def num_examples_per_step(mesh: Mesh) -> int:
  """The size of a micro-batch, up to the next that ``data`` divides."""
  size = mesh.shape['data']
  return -(-MICRO_BATCH_SIZE // size) * size


def make_epoch(
  mesh: Mesh, split: data.Split, rng: np.random.Generator
) -> Iterator[data.Split]:
  """Shuffled micro-batches of full size, split over ``data``."""
  size = num_examples_per_step(mesh)
  order = rng.permutation(len(split.labels))
  for start in range(0, len(order) - size + 1, size):
    indices = order[start : start + size]
    yield jax.device_put(
      data.Split(split.images[indices], split.labels[indices]),
      NamedSharding(mesh, PartitionSpec('data')),
    )


def run(
  description: str | None,
  create_state: Callable[..., PyTree],
  train_step: Callable[[PyTree, data.Split], tuple[PyTree, jax.Array]],
  predict: Callable[[PyTree, data.Array], jax.Array],
) -> None:
  """Trains on the digits on all devices, and prints how it goes.

  Args:
    description: What ``--help`` says first.
    create_state: From an optimizer and a random key to the state.
    train_step: From a state and a micro-batch to the next state and the loss.
    predict: From a state and images to logits.
  """
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('--epochs', type=int, default=10, help='default: 10')
  epochs = parser.parse_args().epochs
  if epochs < 1:
    parser.error(
      f'argument --epochs: must be an integer >= 1, but got {epochs}. Write'
      f' for example --epochs 10.'
    )

  # Dropout must not depend on how it is split. The default since JAX 0.5.
  jax.config.update('jax_threefry_partitionable', True)
  dataset, mesh = data.digits(), make_mesh()
  size = num_examples_per_step(mesh)
  steps = epochs * (len(dataset.train.labels) // size)
  tx = make_tx(steps // MICRO_BATCHES_PER_UPDATE)
  state, step = shard(
    mesh,
    functools.partial(create_state, tx),
    train_step,
    jax.random.key(0),
  )
  print(
    f'mesh of {mesh.size}: data {mesh.shape["data"]} x model'
    f' {mesh.shape["model"]}; {MICRO_BATCHES_PER_UPDATE} micro-batches of'
    f' {size} an update'
  )

  jitted_predict, rng = jax.jit(predict), np.random.default_rng(0)

  def accuracy(split):
    logits = jitted_predict(state, split.images)
    return jnp.mean(jnp.argmax(logits, -1) == split.labels)

  for epoch in range(1, epochs + 1):
    losses = []
    for batch in make_epoch(mesh, dataset.train, rng):
      state, loss = step(state, batch)
      losses.append(loss)
    print(
      f'epoch {epoch:3}: train loss {np.mean(losses):.4f}, held-out accuracy'
      f' {accuracy(dataset.held_out):.2%}'
    )
  print(f'test accuracy {accuracy(dataset.test):.2%}')
