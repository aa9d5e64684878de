"""SGD, SAM and ASAM: the gradient that each of them descends.

How they descend it is the same for all: :func:`make_base_tx`. To add a method,
write a function like :func:`make_asam` and add it to ``METHODS``.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import optax

from experiments import data
from experiments import m_sharpness
from experiments import models
import optax_asam
from optax_asam import normalization

# From parameters, the model's state and a batch to the loss and the new state.
LossFn = Callable[
  [optax.Params, models.ModelState, data.Split],
  tuple[jax.Array, models.ModelState],
]

# The options: a Config, or anything that has its attributes used here.
Options = Any


def make_sgd(
  loss_fn: LossFn, rho: chex.Numeric, options: Options
) -> m_sharpness.ValueAndGrad:
  """The gradient itself."""
  del rho, options
  return jax.value_and_grad(loss_fn, has_aux=True)


def make_sam(
  loss_fn: LossFn, rho: chex.Numeric, options: Options
) -> m_sharpness.ValueAndGrad:
  """The gradient of SAM: at w + eps, eps in a ball."""
  return _make_perturbed(loss_fn, rho, options, adaptive=False)


def make_asam(
  loss_fn: LossFn, rho: chex.Numeric, options: Options
) -> m_sharpness.ValueAndGrad:
  """The gradient of ASAM: the ball is normalized by the parameters."""
  adaptive = NORMALIZATIONS[options.normalization](
    options.eta,
    mask=None if options.normalize_biases else normalization.not_bias,
  )
  return _make_perturbed(loss_fn, rho, options, adaptive=adaptive)


def _make_perturbed(loss_fn, rho, options, *, adaptive):
  return optax_asam.value_and_grad(
    loss_fn,
    has_aux=True,
    rho=rho,
    adaptive=adaptive,
    ord=options.ord,
    mask=PERTURBED[options.perturb],
  )


METHODS = {'sgd': make_sgd, 'sam': make_sam, 'asam': make_asam}
SHARPNESS_AWARE = ('sam', 'asam')

NORMALIZATIONS: dict[str, Callable[..., normalization.Normalization]] = {
  'elementwise': normalization.elementwise,
  'filterwise': normalization.filterwise,
  'layerwise': normalization.layerwise,
}


def in_other_layers(params: optax.Params) -> Any:
  """A mask of all parameters but those of normalization layers."""
  return jax.tree.map(
    lambda is_in: not is_in, normalization.normalization_layers(params)
  )


# The layers that are perturbed.
PERTURBED = {
  'all': None,
  'normalization': normalization.normalization_layers,
  'others': in_other_layers,
}


def make_value_and_grad(
  method: str, loss_fn: LossFn, rho: chex.Numeric, options: Options
) -> m_sharpness.ValueAndGrad:
  """The gradient of a method, averaged over groups with ``m_sharpness``.

  Args:
    method: A name in ``METHODS``.
    loss_fn: The loss.
    rho: The radius, which may be traced.
    options: The options.
  """
  value_and_grad = METHODS[method](loss_fn, rho, options)
  if options.m_sharpness and method in SHARPNESS_AWARE:
    in_groups = m_sharpness.WAYS[options.m_sharpness_by]
    return in_groups(value_and_grad, options.m_sharpness)
  return value_and_grad


def num_gradients(method: str) -> int:
  """The number of gradients that a step takes."""
  return 2 if method in SHARPNESS_AWARE else 1


MOMENTUM = 0.9


def make_base_tx(
  options: Options, num_steps: int
) -> optax.GradientTransformation:
  """SGD with momentum, weight decay and a cosine learning rate."""
  return optax.chain(
    optax.add_decayed_weights(options.weight_decay),
    optax.sgd(
      optax.cosine_decay_schedule(options.lr, num_steps), momentum=MOMENTUM
    ),
  )
