"""The optimizers that are compared, by name.

They differ in the gradient that they descend; how they do is the same for all:
:func:`make_base_tx`. To add one, write a function like :func:`make_asam` and
name it in ``OPTIMIZERS``.
"""

import argparse
from collections.abc import Callable
from typing import Any

import chex
import jax
import optax

import data
import m_sharpness
import models
import optax_asam
from optax_asam import normalization

MOMENTUM = 0.9

# From parameters, the model's state and a batch to the loss and the new state.
LossFn = Callable[
  [optax.Params, models.ModelState, data.Split],
  tuple[jax.Array, models.ModelState],
]

NORMALIZATIONS: dict[str, Callable[..., normalization.Normalization]] = {
  'elementwise': normalization.elementwise,
  'filterwise': normalization.filterwise,
  'layerwise': normalization.layerwise,
}


def in_normalization_layers(params: optax.Params) -> Any:
  """A mask of the parameters of BatchNorm."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'BatchNorm' in jax.tree_util.keystr(path), params
  )


def in_other_layers(params: optax.Params) -> Any:
  """A mask of all other parameters."""
  return jax.tree.map(lambda is_in: not is_in, in_normalization_layers(params))


# Which layers are perturbed at all.
PERTURBED = {
  'all': None,
  'normalization': in_normalization_layers,
  'others': in_other_layers,
}


def make_base_tx(
  args: argparse.Namespace, num_steps: int
) -> optax.GradientTransformation:
  """SGD with momentum, weight decay and a cosine learning rate."""
  return optax.chain(
    optax.add_decayed_weights(args.weight_decay),
    optax.sgd(
      optax.cosine_decay_schedule(args.lr, num_steps), momentum=MOMENTUM
    ),
  )


def make_sgd(
  loss_fn: LossFn, rho: chex.Numeric, args: argparse.Namespace
) -> m_sharpness.ValueAndGrad:
  """The gradient itself."""
  del rho, args
  return jax.value_and_grad(loss_fn, has_aux=True)


def make_sam(
  loss_fn: LossFn, rho: chex.Numeric, args: argparse.Namespace
) -> m_sharpness.ValueAndGrad:
  """The gradient of SAM."""
  return optax_asam.value_and_grad(
    loss_fn,
    has_aux=True,
    rho=rho,
    adaptive=False,
    ord=args.ord,
    mask=PERTURBED[args.perturb],
  )


def make_asam(
  loss_fn: LossFn, rho: chex.Numeric, args: argparse.Namespace
) -> m_sharpness.ValueAndGrad:
  """The gradient of ASAM."""
  adaptive = NORMALIZATIONS[args.normalization](
    args.eta, mask=None if args.normalize_biases else normalization.not_bias
  )
  return optax_asam.value_and_grad(
    loss_fn,
    has_aux=True,
    rho=rho,
    adaptive=adaptive,
    ord=args.ord,
    mask=PERTURBED[args.perturb],
  )


# From the loss, rho and the options to the gradient that is descended.
OPTIMIZERS: dict[
  str,
  Callable[
    [LossFn, chex.Numeric, argparse.Namespace], m_sharpness.ValueAndGrad
  ],
] = {
  'sgd': make_sgd,
  'sam': make_sam,
  'asam': make_asam,
}
SHARPNESS_AWARE = ('sam', 'asam')


def make_value_and_grad(
  optimizer: str,
  loss_fn: LossFn,
  rho: chex.Numeric,
  args: argparse.Namespace,
) -> m_sharpness.ValueAndGrad:
  """The gradient of an optimizer, over groups of examples where they are asked.

  Args:
    optimizer: A name in ``OPTIMIZERS``.
    loss_fn: The loss.
    rho: The radius, which may be traced.
    args: The options.
  """
  value_and_grad = OPTIMIZERS[optimizer](loss_fn, rho, args)
  if args.m_sharpness and optimizer in SHARPNESS_AWARE:
    way = m_sharpness.WAYS[args.m_sharpness_by]
    return way(value_and_grad, args.m_sharpness)
  return value_and_grad
