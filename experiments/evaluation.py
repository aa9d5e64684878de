"""What is measured on trained models.

A measure maps ``(params, model_state, model, batch)`` of one run to a scalar.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data
from experiments import models
from experiments.loop import Group
from experiments.loop import map_runs
from optax_asam import ascent
from optax_asam import normalization

Measure = Callable[
  [optax.Params, models.ModelState, nn.Module, data.Split], jax.Array
]

# The most examples at once; of more, a measure is the mean over batches. In
# sharpness, each batch has its own perturbation.
BATCH_SIZE = 1000

loss: Measure = models.eval_loss_fn


def accuracy(
  params: optax.Params,
  model_state: models.ModelState,
  model: nn.Module,
  batch: data.Split,
) -> jax.Array:
  """The fraction of ``batch`` that is classified correctly."""
  logits = models.apply_eval(params, model_state, model, batch.images)
  return jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)


def sharpness_in_ball(
  rho: float, normalization: normalization.Normalization
) -> Measure:
  """L(w + eps) - L(w), eps the steepest ascent step to the ball's surface."""
  ball = optax.chain(ascent.steepest_ascent(normalization), optax.scale(rho))

  def sharpness(params, *batch):
    value, grads = jax.value_and_grad(models.eval_loss_fn)(params, *batch)
    eps, _ = ball.update(grads, ball.init(params), params)
    perturbed_params = optax.apply_updates(params, eps)
    return models.eval_loss_fn(perturbed_params, *batch) - value

  return sharpness


# The radii at which the SAM and the ASAM paper train on CIFAR-10.
SAM_BALL_RHO = 0.05
ASAM_BALL_RHO = 0.5

# The same balls for every method, whatever rho it was trained with.
ON_TRAINING_SET: dict[str, Measure] = {
  'train_loss': loss,
  'train_accuracy': accuracy,
  'sharpness_sam_ball': sharpness_in_ball(
    SAM_BALL_RHO, normalization.identity()
  ),
  'sharpness_asam_ball': sharpness_in_ball(
    ASAM_BALL_RHO, normalization.elementwise()
  ),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def measure_batch(
  measure, model, preprocess, params, model_state, labels, images
):
  """``measure`` of each run on a batch."""

  def measure_run(params, model_state, labels, images):
    batch = data.Split(preprocess(images), labels)
    return measure(params, model_state, model, batch)

  return map_runs(measure_run)(params, model_state, labels, images)


def evaluate(
  measure: Measure,
  groups: Sequence[Group],
  model: nn.Module,
  preprocess: Callable[[data.Array], jax.Array],
  split: data.Split,
) -> np.ndarray:
  """A measure of every run, as a mean over the batches of a split.

  Args:
    measure: What is measured.
    groups: The groups of the runs.
    model: The model.
    preprocess: See :class:`data.Dataset`.
    split: The examples, with labels [runs, n].

  Returns:
    An array [runs]; NaN if there are no examples.
  """
  n = len(split.images)
  values, first = [], 0
  for group in groups:
    labels = split.labels[first : first + len(group.runs)]
    first += len(group.runs)
    total = np.zeros(len(group.runs))
    for start in range(0, n, BATCH_SIZE):
      part = slice(start, start + BATCH_SIZE)
      images = split.images[part]
      value = measure_batch(
        measure,
        model,
        preprocess,
        group.state.params,
        group.state.model_state,
        labels[:, part],
        images,
      )
      total += np.asarray(value, np.float64) * len(images)
    values.append(total / n if n else np.full_like(total, np.nan))
  return np.concatenate(values)
