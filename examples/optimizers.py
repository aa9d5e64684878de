"""The optimizers that are compared, by name.

To add one, write a function like :func:`make_asam` and name it in
``OPTIMIZERS``.
"""

import argparse
from collections.abc import Callable

import chex
import optax

from optax_asam import asam
from optax_asam import normalization
from optax_asam import sam

MOMENTUM = 0.9

# The axis of the parts of a batch that have a perturbation of their own.
MICROBATCHES = 'microbatches'

NORMALIZATIONS: dict[str, Callable[[float], normalization.Normalization]] = {
  'elementwise': normalization.elementwise,
  'filterwise': normalization.filterwise,
  'layerwise': normalization.layerwise,
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
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric,
  args: argparse.Namespace,
) -> optax.GradientTransformationExtraArgs:
  """``base_tx`` alone, called like the others: grad_fn is ignored."""
  del rho, args
  return optax.with_extra_args_support(base_tx)


def make_sam(
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric,
  args: argparse.Namespace,
) -> optax.GradientTransformationExtraArgs:
  """SAM around ``base_tx``."""
  return sam(base_tx, rho, ord=args.ord, axis_name=axis_name(args))


def make_asam(
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric,
  args: argparse.Namespace,
) -> optax.GradientTransformationExtraArgs:
  """ASAM around ``base_tx``."""
  adaptive = NORMALIZATIONS[args.normalization](args.eta)
  return asam(
    base_tx,
    rho,
    adaptive=adaptive,
    ord=args.ord,
    axis_name=axis_name(args),
  )


def axis_name(args: argparse.Namespace) -> str | None:
  """What gradients of microbatches are averaged over, where there are any."""
  return MICROBATCHES if args.m_sharpness else None


# From a base optimizer, rho and the options to the optimizer that is compared.
TxFactory = Callable[
  [optax.GradientTransformation, chex.Numeric, argparse.Namespace],
  optax.GradientTransformationExtraArgs,
]
OPTIMIZERS: dict[str, TxFactory] = {
  'sgd': make_sgd,
  'sam': make_sam,
  'asam': make_asam,
}
SHARPNESS_AWARE = ('sam', 'asam')
