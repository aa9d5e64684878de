"""Trains with ASAM on all devices of several processes.

Start the same command on each host of a TPU slice, or with ``srun`` under
SLURM: JAX finds the other hosts. Elsewhere, give the address of process 0, as
for these two processes on one machine, with four simulated devices each::

    export JAX_PLATFORMS=cpu
    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    run="python examples/multihost.py --checkpoint-dir /tmp/checkpoints
      --coordinator-address localhost:12321 --num-processes 2"
    $run --process-id 0 & $run --process-id 1; wait

The train step is that of a single device: arrays are global, and the compiler
adds the communication. Each process reads its part of each batch and writes its
part of each checkpoint. Repeat the command to resume from the last checkpoint,
on any number of devices that divides the batch size.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import os
import sys
import traceback
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn import datasets

from optax_asam import asam

WIDTHS = (64, 128, 128, 10)


class TrainState(NamedTuple):
  """What a checkpoint holds; the step is also the position in the data."""

  step: jax.typing.ArrayLike
  params: optax.Params
  opt_state: optax.OptState


def init_params(key: jax.Array) -> optax.Params:
  """A multilayer perceptron."""
  keys = jax.random.split(key, len(WIDTHS) - 1)
  init_kernel = jax.nn.initializers.he_normal()
  return [
    {'kernel': init_kernel(key, (n, m)), 'bias': jnp.zeros(m)}
    for key, n, m in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
  ]


def predict(params: Any, images: jax.typing.ArrayLike) -> jax.Array:
  """Logits [n, 10] of images [n, 64]."""
  *hidden, last = params
  x = jnp.asarray(images)
  for layer in hidden:
    x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
  return x @ last['kernel'] + last['bias']


def loss_fn(params: optax.Params, batch: Any) -> jax.Array:
  """The mean cross-entropy of a batch."""
  images, labels = batch
  losses = optax.softmax_cross_entropy_with_integer_labels(
    predict(params, images), labels
  )
  return losses.mean()


def read_batches(
  images: np.ndarray, labels: np.ndarray, batch_size: int, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """This process's part of each global batch from ``step`` on.

  The global batch depends on the step alone, not on the number of processes.
  For data that does not fit in memory, Grain offers the same.
  """
  steps = len(labels) // batch_size
  while True:
    epoch, i = divmod(step, steps)
    order = np.random.default_rng(epoch).permutation(len(labels))
    batch = order[i * batch_size : (i + 1) * batch_size]
    local = batch.reshape(jax.process_count(), -1)[jax.process_index()]
    yield images[local], labels[local]
    step += 1


def train(args: argparse.Namespace) -> TrainState:
  """The state after ``args.steps`` steps, resuming from the last checkpoint."""
  is_first = jax.process_index() == 0
  pixels, labels = datasets.load_digits(return_X_y=True)
  images = (pixels / 16).astype(np.float32)
  tx = asam(optax.sgd(0.05, momentum=0.9), rho=0.5)

  def init():
    params = init_params(jax.random.key(0))
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))

  def train_step(state, batch):
    grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, grad_fn=grad_fn
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), loss

  # In the order of the processes, so that each part of a batch stays local.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  mesh = Mesh(np.array(devices), ('data',))
  replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  # Fully sharded: parameters and momentum are split wherever possible.
  shardings = jax.tree.map(
    lambda x: split if x.ndim and x.shape[0] % mesh.size == 0 else replicated,
    jax.eval_shape(init),
  )
  init = jax.jit(init, out_shardings=shardings)
  train_step = jax.jit(
    train_step, donate_argnums=0, out_shardings=(shardings, replicated)
  )

  options = ocp.CheckpointManagerOptions(
    save_interval_steps=args.checkpoint_every, max_to_keep=2
  )
  with ocp.CheckpointManager(args.checkpoint_dir, options=options) as manager:
    first = manager.latest_step() or 0
    if first:
      restore = ocp.args.StandardRestore(init.eval_shape())
      state: Any = manager.restore(first, args=restore)
    else:
      state = init()
    batches = read_batches(images[:1500], labels[:1500], args.batch_size, first)
    for step in range(first + 1, args.steps + 1):
      # Joins the parts that the processes have read, without moving them.
      batch = jax.make_array_from_process_local_data(split, next(batches))
      state, loss = train_step(state, batch)
      # Simulated devices must wait for each step. On others, wait less often.
      loss = float(loss)
      if is_first:
        print(f'step {step}: loss {loss:.6f}', flush=True)
      # Saves every checkpoint_every steps, and when SIGTERM preempts a process.
      save, is_last = ocp.args.StandardSave(state), step == args.steps
      manager.save(step, args=save, force=is_last)
      if manager.reached_preemption(step):
        sys.exit(f'Preempted after step {step}. Repeat the command to resume.')

  logits = jax.jit(predict, out_shardings=replicated)(state.params, images)
  if is_first:
    is_correct = np.argmax(logits, axis=-1) == labels
    print(f'test accuracy: {is_correct[1500:].mean():.1%}', flush=True)
  return state


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--checkpoint-dir', required=True, help='absolute, shared by all hosts')
  add('--checkpoint-every', type=int, default=100, help='steps (100)')
  add('--steps', type=int, default=500, help='total (500)')
  add('--batch-size', type=int, default=64, help='global (64)')
  add('--coordinator-address', help='host:port of process 0')
  add('--num-processes', type=int)
  add('--process-id', type=int)
  return parser.parse_args(argv)


def main() -> None:
  """Joins the other processes, if there are any, and trains."""
  args = parse()
  try:
    jax.distributed.initialize(
      args.coordinator_address, args.num_processes, args.process_id
    )
  except ValueError as error:
    if 'coordinator_address' not in str(error):
      raise
    print('No cluster was found: this is the only process.')
  print(f'process {jax.process_index()} of {jax.process_count()}', flush=True)
  try:
    train(args)
  except Exception:
    # On a regular exit, JAX waits for processes that wait for this one.
    traceback.print_exc()
    os._exit(1)


if __name__ == '__main__':
  main()
