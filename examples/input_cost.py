"""Measures what its input costs a step of ASAM.

::

    python examples/input_cost.py --model cnn --out out/input_cost

The whole data set lies on the device, and the compiled step makes its own batch
of it, so that it never waits for the host. What remains is the time of the
gather and the preprocessing, and of the augmentation. That is told by the same
step on a batch that is ready, without and with them, all taken in turn. The
pixels are random: no file is needed, and their values cost no time.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
from pathlib import Path
import shlex
import sys
import time
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import data
import models
from optax_asam import asam
import reporting
import sources

# Data sets, and the shape of their training images.
SHAPES = {
  'fashion_mnist': (sources.FASHION_MNIST, (60_000, 28, 28, 1)),
  'cifar10': (sources.CIFAR10, (50_000, 32, 32, 3)),
}


class TrainState(NamedTuple):
  """What a step starts from; ``key`` and ``step`` decide its batch."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState
  step: jax.Array
  key: jax.Array


# From what a step is given, and the state, to its batch.
GetBatch = Callable[[Any, TrainState], data.Split]


def random_dataset(name: str) -> data.Dataset:
  """A data set of random pixels, like that of this name in all else."""
  source, shape = SHAPES[name]
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, shape, np.uint8)
  labels = rng.integers(0, source.num_classes, shape[0], np.int32)
  part = images, labels
  return data.load(lambda source, data_dir: (part, part), source, None, None)


def make_get_batch(
  dataset: data.Dataset, batch_size: int, *, augment: bool
) -> GetBatch:
  """Makes the input: the next batch of the examples in a random order."""

  def get_batch(inputs, state):
    split, order = inputs
    num_batches = len(order) // batch_size
    start = state.step % num_batches * batch_size
    indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
    key = jax.random.fold_in(state.key, state.step) if augment else None
    return data.make_batch(dataset, split, indices, key)

  return get_batch


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformationExtraArgs,
  get_batch: GetBatch,
) -> Callable[[TrainState, Any], TrainState]:
  """Makes a jitted step that gets its batch by itself."""

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, inputs):
    batch = get_batch(inputs, state)
    train_grad_fn = jax.grad(
      lambda p: models.train_loss_fn(p, state.model_state, model, batch),
      has_aux=True,
    )
    grads, model_state = train_grad_fn(state.params)
    updates, opt_state = tx.update(
      grads,
      state.opt_state,
      state.params,
      grad_fn=lambda p: train_grad_fn(p)[0],
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, model_state, opt_state, state.step + 1, state.key)

  return train_step


def measure(
  dataset: data.Dataset,
  model: nn.Module,
  batch_size: int,
  rounds: int,
  steps: int,
) -> dict[str, list[float]]:
  """Times a step with each kind of input.

  Args:
    dataset: The data set.
    model: The model.
    batch_size: Examples a step.
    rounds: How often all are timed, one after the other.
    steps: Steps a time.

  Returns:
    The seconds of a step in each round, by the input: a batch that is
    ``ready``, one that the step has ``gathered``, or gathered and
    ``augmented``.
  """
  tx = asam(optax.sgd(0.01, momentum=0.9), rho=0.5)
  split = jax.device_put(dataset.train)
  key = jax.random.key(0)
  order = np.random.default_rng(0).permutation(len(dataset.train.labels))
  order = jax.device_put(order)
  batch = data.make_batch(dataset, split, order[:batch_size], key)
  gathered, augmented = (
    make_get_batch(dataset, batch_size, augment=augment)
    for augment in (False, True)
  )
  trainings = {
    name: (make_train_step(model, tx, get_batch), inputs)
    for name, get_batch, inputs in (
      ('ready', lambda batch, _: batch, batch),
      ('gathered', gathered, (split, order)),
      ('augmented', augmented, (split, order)),
    )
  }
  states = {}
  for name, (train_step, inputs) in trainings.items():
    params, model_state = models.init(model, key, batch.images)
    state = TrainState(
      params, model_state, tx.init(params), jnp.int32(0), jnp.copy(key)
    )
    states[name] = jax.block_until_ready(train_step(state, inputs))  # Compiles.
  seconds = {name: [] for name in trainings}
  for _ in range(rounds):
    for name, (train_step, inputs) in trainings.items():
      start = time.perf_counter()
      for _ in range(steps):
        states[name] = train_step(states[name], inputs)
      jax.block_until_ready(states[name])
      seconds[name].append((time.perf_counter() - start) / steps)
  return seconds


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(
    description='Measures what its input costs a step of ASAM.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  option = parser.add_argument
  option('--dataset', choices=SHAPES, default='fashion_mnist', help='its shape')
  option('--model', choices=models.MODELS, default='cnn', help='model')
  option('--batch-size', type=int, default=128, help='examples a step')
  option('--rounds', type=int, default=20, help='how often all are timed')
  option('--steps', type=int, default=20, help='steps a time')
  option('--out', type=Path, default='out/input_cost', help='for results.json')
  args = parser.parse_args(argv)
  dataset = random_dataset(args.dataset)
  model = models.MODELS[args.model](dataset.num_classes)
  seconds = measure(dataset, model, args.batch_size, args.rounds, args.steps)
  results = {
    **reporting.provenance(argv),
    'command': shlex.join(['python', 'examples/input_cost.py', *argv]),
    'config': {**vars(args), 'out': str(args.out)},
    'inputs': {
      name: {
        'ms_per_step': 1000 * np.median(values),
        'time_ratio_to_ready': np.median(np.divide(values, seconds['ready'])),
        'seconds_per_step': values,
      }
      for name, values in seconds.items()
    },
  }
  args.out.mkdir(parents=True, exist_ok=True)
  reporting.write_json(args.out / 'results.json', results)
  print(
    f'A step of ASAM, {args.model} on {args.batch_size} images like those of'
    f' {args.dataset}, median of {args.rounds}:'
  )
  for name, result in results['inputs'].items():
    print(
      f'  batch {name:9} {result["ms_per_step"]:9.3f} ms, times'
      f' {result["time_ratio_to_ready"]:.3f}'
    )


if __name__ == '__main__':
  main(sys.argv[1:])
