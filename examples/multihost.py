"""Trains a classifier with ASAM on all devices of all processes of a job.

The same command starts every process::

    python examples/multihost.py                     # on each host of a pod
    srun python examples/multihost.py                # under SLURM
    python examples/multihost.py --num-processes 2   # both on this machine

The train step is that of one device: parameters and batches are laid out over a
mesh, and the compiler does the rest. Checkpoints are written by all processes.
What is killed goes on with ``--resume``, on as many devices as there are then.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import arguments
import cluster
import data
import evaluation
import host_io
import models
from optax_asam import asam
import records

# What must be the same when a run goes on.
CONFIG = (
  *('dataset', 'train_size', 'model', 'batch_size', 'epochs'),
  *('lr', 'rho', 'seed'),
)


class TrainState(NamedTuple):
  """What a step starts from."""

  params: optax.Params
  opt_state: optax.OptState


class Trained(NamedTuple):
  """What a run ends with, the loss before each step included."""

  state: TrainState
  losses: list[float]
  test_accuracy: float


def make_mesh() -> Mesh:
  """All devices in a row, those of one process side by side.

  So the parts of a batch lie in the order in which the processes read them.
  """
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(devices), ('devices',))


def place(mesh: Mesh, state: Any, *, shard_params: bool) -> Any:
  """The shardings of a state: whole on each device, or a part on each.

  With ``shard_params`` an array is split along its first axis that the number
  of devices divides.
  """

  def place_array(array):
    for axis, size in enumerate(array.shape if shard_params else ()):
      if size % mesh.size == 0:
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'devices'))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(place_array, state)


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformationExtraArgs,
  preprocess: Callable[[data.Array], jax.Array],
) -> Callable[[TrainState, data.Split], tuple[TrainState, jax.Array]]:
  """The step: nothing in it is about devices."""

  def train_step(state, batch):
    batch = batch._replace(images=preprocess(batch.images))
    loss_fn = lambda p: models.train_loss_fn(p, {}, model, batch)[0]
    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, grad_fn=jax.grad(loss_fn)
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state), loss

  return train_step


def make_parser() -> arguments.Parser:
  """The options and their help."""
  parser = arguments.Parser(
    prog='multihost.py',
    description='Trains a classifier with ASAM on all devices of a job.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  positive = arguments.positive(0.1)
  count = arguments.count
  add('--dataset', choices=data.DATASETS, default='digits')
  add('--data-dir', type=Path, help='folder with its files, on each host')
  add('--train-size', type=count(1000), help='examples to train on (all)')
  add('--model', choices=('mlp', 'cnn'), default='mlp')
  add('--epochs', type=count(20), default=20)
  add('--batch-size', type=count(128), default=128, help='of all devices (128)')
  add('--lr', type=positive, default=0.1, help='learning rate (0.1)')
  add('--rho', type=positive, default=0.5, help='the radius of asam (0.5)')
  add('--seed', type=count(1), default=1, help='of parameters and data (1)')
  add(
    '--shard-params',
    action='store_true',
    help='split parameters and optimizer state over all devices',
  )
  add('--out', type=Path, default=Path('out/multihost'), help='for results')
  add(
    '--checkpoint-dir',
    help='a folder that all hosts share, gs://, too (checkpoints in --out)',
  )
  add('--checkpoint-every', type=count(100), help='steps (an epoch)')
  add('--resume', action='store_true', help='go on from the last checkpoint')
  cluster.add_arguments(parser)
  return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Reads the command line, with an exit if something is wrong with it."""
  parser = make_parser()
  args = parser.parse_args(arguments.join_values(argv))
  cluster.check_arguments(parser, args)
  args.checkpoint_dir = args.checkpoint_dir or args.out / 'checkpoints'
  return args


def report(step: int, loss: float) -> None:
  """Prints the loss before a step, from one process."""
  if jax.process_index() == 0:
    print(f'step {step}: loss {loss:.6f}', flush=True)


def write_results(
  argv: Sequence[str], args: argparse.Namespace, trained: Trained
) -> None:
  """Writes results.json, from one process."""
  if jax.process_index() == 0:
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
      **records.provenance('examples/multihost.py', argv),
      'config': {name: getattr(args, name) for name in CONFIG},
      'num_processes': jax.process_count(),
      'num_devices': jax.device_count(),
      'losses': trained.losses,
      'test_accuracy': trained.test_accuracy,
    }
    records.write_json(args.out / 'results.json', results)
    accuracy = f'{100 * trained.test_accuracy:.2f} %'
    print(f'Test accuracy {accuracy}. Wrote results.json to {args.out}.')


def train(args: argparse.Namespace) -> Trained:
  """Trains, from the newest checkpoint on, and writes others."""
  dataset = data.DATASETS[args.dataset](args.data_dir, args.train_size)
  host_io.check_batch_size(args.batch_size, dataset.train)
  steps_per_epoch = len(dataset.train.labels) // args.batch_size
  num_steps = args.epochs * steps_per_epoch
  model = models.MODELS[args.model](dataset.num_classes)
  schedule = optax.cosine_decay_schedule(args.lr, num_steps)
  tx = asam(optax.sgd(schedule, momentum=0.9), rho=args.rho)

  def init():
    images = dataset.preprocess(dataset.train.images[:1])
    params, _ = models.init(model, jax.random.key(args.seed), images)
    return TrainState(params, tx.init(params))

  mesh = make_mesh()
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('devices'))
  shapes = jax.eval_shape(init)
  shardings = place(mesh, shapes, shard_params=args.shard_params)
  train_step = jax.jit(
    make_train_step(model, tx, dataset.preprocess),
    donate_argnums=0,
    out_shardings=(shardings, whole),
  )

  config = {name: getattr(args, name) for name in CONFIG}
  checkpoints = host_io.Checkpoints(str(args.checkpoint_dir), config)
  state, losses = checkpoints.restore(
    shapes, shardings, resume=args.resume
  ) or (jax.jit(init, out_shardings=shardings)(), [])
  batches = host_io.local_batches(
    dataset.train,
    args.batch_size,
    epochs=args.epochs,
    seed=args.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    first_step=len(losses),
  )
  every = args.checkpoint_every or steps_per_epoch
  for step, batch in enumerate(batches, len(losses) + 1):
    state, loss = train_step(state, host_io.to_global(batch, split))
    # In a long job read every 100th loss: here, devices wait for the host.
    losses.append(float(loss))
    report(step, losses[-1])
    is_preempted = checkpoints.is_preempted(step)
    if step % every == 0 or step == num_steps or is_preempted:
      checkpoints.save(step, state, losses)
    if is_preempted:
      sys.exit(f'Stopped by SIGTERM after step {step}: go on with --resume.')

  accuracy = jax.jit(evaluation.accuracy, static_argnums=2, out_shardings=whole)
  test = dataset.test._replace(images=dataset.preprocess(dataset.test.images))
  return Trained(state, losses, float(accuracy(state.params, {}, model, test)))


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  args = parse(argv)
  if cluster.is_rehearsal(args):
    command = [sys.executable, sys.argv[0], *argv]
    sys.exit(
      cluster.rehearse(command, args.num_processes, args.devices_per_process)
    )
  with cluster.joined(args):
    print(cluster.describe_process(), flush=True)
    try:
      trained = train(args)
    except (data.DataError, host_io.CheckpointError) as error:
      make_parser().error(str(error))
    write_results(argv, args, trained)


if __name__ == '__main__':
  main(sys.argv[1:])
