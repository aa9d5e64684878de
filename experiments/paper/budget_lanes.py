"""The steps of a method in many lanes: seeds and candidates at once.

Steps are mapped over lanes and scanned. Counters of steps are the same in all
lanes and stay scalars, so that ``every_k``, ``when`` and LookSAM skip gradients
under ``vmap``, too: the condition is one number.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments import models
from experiments.paper import budget_methods
from experiments.paper import budget_tasks

EVAL_BATCH = 1000


class Lane(NamedTuple):
  """A run of a method.

  Attributes:
    seed: Determines the initialization, the batches and the label noise.
    values: Those of the candidate.
  """

  seed: int
  values: tuple[float, float]


class Inputs(NamedTuple):
  """What a program takes besides the states: arrays, their shapes, or axes.

  Attributes:
    values: Those of each lane, float32 [lanes, 2].
    keys: For augmentation, [lanes].
    labels: int32 [lanes, n].
    images: Shared by all lanes, [n, h, w, c].
    num_steps: Of the whole run, an int32 scalar.
  """

  values: Any
  keys: Any
  labels: Any
  images: Any
  num_steps: Any


# What is mapped over lanes.
LANES = Inputs(0, 0, 0, None, None)


def map_lanes(function: Callable[..., Any], lanes: int, in_axes, out_axes):
  """``vmap`` that leaves out an axis of a single lane."""
  if lanes > 1:
    return jax.vmap(function, in_axes, out_axes)
  is_axis = lambda x: x is None or isinstance(x, int)

  def each(change, axes, tree):
    return jax.tree.map(
      lambda axis, part: part if axis is None else jax.tree.map(change, part),
      axes,
      tree,
      is_leaf=is_axis,
    )

  def mapped(*args):
    result = function(*each(lambda x: x[0], in_axes, args))
    return each(lambda x: x[None], out_axes, result)

  return mapped


def counters_are_shared(opt_state: optax.OptState) -> Any:
  """The axes of a state: none of counters, the first of all else.

  All other integers would have to be the same in all lanes, too.
  """
  return jax.tree.map(lambda x: None if _is_integer(x) else 0, opt_state)


def _is_integer(x):
  return jnp.issubdtype(x.dtype, jnp.integer)


def make_indices(
  seeds: Sequence[int], epochs: int, num_examples: int, batch_size: int
) -> np.ndarray:
  """The batches of each lane, int32 [steps, lanes, batch_size].

  Each epoch has its own order; examples that do not fill a batch are left out.
  On the host: a slice of an array on the device is compiled for each place.
  """
  used = num_examples // batch_size * batch_size
  lanes = []
  for seed in seeds:
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(num_examples)[:used] for _ in range(epochs)]
    lanes.append(np.reshape(orders, (-1, batch_size)))
  return np.stack(lanes, axis=1).astype(np.int32)


def make_functions(
  dataset: data.Dataset,
  task: budget_tasks.Task,
  method: budget_methods.Method,
  num_lanes: int,
) -> tuple[Any, Any]:
  """The functions ``init`` and ``run`` of a method, jitted.

  ``init(params, inputs)`` returns the states of the optimizer, and
  ``run(carry, inputs, indices, steps)`` takes steps from parameters and states,
  with the batches ``indices``, [steps, lanes, batch_size].
  """
  recipe, model = task.recipe, task.recipe.model
  augment = dataset.augment if task.augment else None

  def make_tx(lane):
    def base_tx(weight_decay=recipe.weight_decay):
      return recipe.make_tx(recipe.lr, lane.num_steps, weight_decay)

    run = budget_methods.Run(base_tx, lane.num_steps, recipe.mask)
    return method.make_tx(run, lane.values[0], lane.values[1])

  def init(params, lane):
    return make_tx(lane).init(params)

  def step(params, opt_state, lane, indices, i):
    images, labels = lane.images[indices], lane.labels[indices]
    if augment is not None:
      images = augment(jax.random.fold_in(lane.keys, i), images)
    images = dataset.preprocess(images)

    def grad_fn(params, n=recipe.batch_size):
      batch = data.Split(images[:n], labels[:n])
      return jax.grad(
        lambda params: models.train_loss_fn(params, {}, model, batch)[0]
      )(params)

    grads = grad_fn(params, recipe.batch_size // method.ascent_part)
    second = {'grad_fn': grad_fn} if method.second_gradient else {}
    updates, opt_state = make_tx(lane).update(
      grads, opt_state, params, **second
    )
    return optax.apply_updates(params, updates), opt_state

  def init_lanes(params, inputs):
    # The state of a lane says which parts of it are counters.
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    lane = inputs._replace(
      values=inputs.values[0], keys=inputs.keys[0], labels=inputs.labels[0]
    )
    axes = counters_are_shared(jax.eval_shape(init, first(params), lane))
    return map_lanes(init, num_lanes, (0, LANES), axes)(params, inputs)

  def run(carry, inputs, indices, steps):
    axes = 0, counters_are_shared(carry[1])
    mapped = map_lanes(step, num_lanes, (*axes, LANES, 0, None), axes)

    def body(carry, xs):
      return mapped(*carry, inputs, *xs), None

    return jax.lax.scan(body, carry, (indices, steps))[0]

  return jax.jit(init_lanes), jax.jit(run, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_params(
  model: Any,
  preprocess: Callable[[data.Array], jax.Array],
  keys: jax.Array,
  image: data.Array,
) -> Any:
  """The parameters in which lanes start."""
  image = preprocess(image)
  init = lambda key: models.init(model, key, image)[0]
  return map_lanes(init, len(keys), (0,), 0)(keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(model, preprocess, params, images):
  apply = lambda params: models.apply_eval(
    params, {}, model, preprocess(images)
  )
  # A lane after the other: the images of all would need much memory.
  return jax.lax.map(apply, params)


def logits(
  model: Any,
  preprocess: Callable[[data.Array], jax.Array],
  params: Any,
  images: data.Array,
) -> np.ndarray:
  """The logits of each lane, [lanes, n, classes]."""
  parts = [
    _logits(model, preprocess, params, images[i : i + EVAL_BATCH])
    for i in range(0, len(images), EVAL_BATCH)
  ]
  return np.concatenate([np.asarray(part) for part in parts], axis=1)
