"""Measures what its input costs a step of ASAM.

::

    python examples/input_cost.py --model cnn --out out/input_cost

The whole data set lies on the device, and the compiled step makes its own batch
of it, so that it never waits for the host. What remains is the time of the
gather and the preprocessing, and of the augmentation. That is told by the same
step on a batch that is ready, without and with them, all taken in turn.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
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
import optax_asam
import timing

# Whatever they are: the numbers cost no time.
BASE_TX = optax.sgd(0.01, momentum=0.9)
RHO = 0.5


class TrainState(NamedTuple):
  """What a step starts from; ``key`` and ``step`` decide its batch."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState
  step: jax.Array
  key: jax.Array


# From what a step is given, and the state, to its batch.
GetBatch = Callable[[Any, TrainState], data.Split]


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
  model: nn.Module, get_batch: GetBatch
) -> Callable[[TrainState, Any], TrainState]:
  """Makes a jitted step that gets its batch by itself."""
  value_and_grad = optax_asam.value_and_grad(
    models.train_loss_fn, has_aux=True, rho=RHO
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, inputs):
    params, model_state, opt_state, step, key = state
    batch = get_batch(inputs, state)
    (_, model_state), grads = value_and_grad(params, model_state, model, batch)
    updates, opt_state = BASE_TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return TrainState(params, model_state, opt_state, step + 1, key)

  return train_step


def make_measures(
  dataset: data.Dataset, model: nn.Module, batch_size: int, steps: int
) -> dict[str, Callable[[], float]]:
  """Makes what takes ``steps`` steps, and returns the seconds of one.

  Returns:
    A function for each input: a batch that is ``ready``, one that the step has
    ``gathered``, or gathered and ``augmented``.
  """
  split = jax.device_put(dataset.train)
  key = jax.random.key(0)
  order = np.random.default_rng(0).permutation(len(dataset.train.labels))
  order = jax.device_put(order)
  batch = data.make_batch(dataset, split, order[:batch_size], key)

  def make_measure(get_batch, inputs):
    train_step = make_train_step(model, get_batch)
    params, model_state = models.init(model, key, batch.images)
    state = TrainState(
      params,
      model_state,
      BASE_TX.init(params),
      jnp.int32(0),
      jnp.copy(key),
    )
    state = jax.block_until_ready(train_step(state, inputs))  # Compiles.

    def measure():
      nonlocal state
      start = time.perf_counter()
      for _ in range(steps):
        state = train_step(state, inputs)
      jax.block_until_ready(state)
      return (time.perf_counter() - start) / steps

    return measure

  gathered, augmented = (
    make_get_batch(dataset, batch_size, augment=augment)
    for augment in (False, True)
  )
  return {
    'ready': make_measure(lambda batch, _: batch, batch),
    'gathered': make_measure(gathered, (split, order)),
    'augmented': make_measure(augmented, (split, order)),
  }


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = timing.make_parser(
    'Measures what its input costs a step of ASAM.', 'out/input_cost'
  )
  args = parser.parse_args(argv)
  dataset = timing.random_dataset(args.dataset)
  model = models.MODELS[args.model](dataset.num_classes)
  measures = make_measures(dataset, model, args.batch_size, args.steps)
  seconds = timing.time_in_turn(measures, args.rounds)
  what = 'A step of ASAM by its batch'
  timing.report('examples/input_cost.py', argv, args, what, seconds)


if __name__ == '__main__':
  main(sys.argv[1:])
