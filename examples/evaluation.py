"""What is measured on trained models, for all runs at once.

A measure maps ``(params, model, split)`` to a scalar for each run: ``params``
has a leading axis of runs, and the labels of ``split`` are [runs, n].
"""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

import data
import models
from optax_asam import ascent
from optax_asam import normalization

Measure = Callable[[optax.Params, nn.Module, data.Split], jax.Array]


def over_runs(measure: Measure) -> Measure:
  """Makes a measure of one run one of all runs, jitted."""

  @functools.partial(jax.jit, static_argnums=1)
  def measure_all(params, model, split):
    return jax.vmap(
      lambda params, split: measure(params, model, split),
      in_axes=(0, data.LABELS_PER_RUN),
    )(params, split)

  return measure_all


loss = over_runs(models.loss_fn)


@over_runs
def accuracy(
  params: optax.Params, model: nn.Module, split: data.Split
) -> jax.Array:
  """The fraction of ``split`` that is classified as its labels say."""
  logits = models.predict(params, model, split.images)
  return jnp.mean(jnp.argmax(logits, axis=-1) == split.labels)


def sharpness_in_ball(
  rho: float, normalization: normalization.Normalization
) -> Measure:
  """L(w + eps) - L(w), where eps is one steepest step to the ball's surface."""
  ball = optax.chain(ascent.steepest_ascent(normalization), optax.scale(rho))

  @over_runs
  def sharpness(params, model, split):
    value, grads = jax.value_and_grad(models.loss_fn)(params, model, split)
    eps, _ = ball.update(grads, ball.init(params), params)
    perturbed_params = optax.apply_updates(params, eps)
    return models.loss_fn(perturbed_params, model, split) - value

  return sharpness


# The radii at which the SAM and the ASAM paper train on CIFAR-10.
SAM_BALL_RHO = 0.05
ASAM_BALL_RHO = 0.5

# The balls are the same for every optimizer, whatever it was trained with.
ON_TRAINING_SET: dict[str, Measure] = {
  'train_loss': loss,
  'sharpness_sam_ball': sharpness_in_ball(
    SAM_BALL_RHO, normalization.identity()
  ),
  'sharpness_asam_ball': sharpness_in_ball(
    ASAM_BALL_RHO, normalization.elementwise()
  ),
}
