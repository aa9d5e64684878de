"""The tables that the tests run over.

A new normalization, ascent, descent or wrapper is one entry here.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

from optax_asam import asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness_aware
from tests.helpers import reference

# The exponents p of the ball: two with a code path of their own, two without.
ORDS = (2, math.inf, 3, 1.5)

# Functions (eta, *, mask) -> normalization, and eta -> operator in NumPy.
NORMALIZATIONS = {
  'identity': (
    lambda eta, mask: normalization.identity(),
    lambda eta: reference.ones,
  ),
  'elementwise': (normalization.elementwise, reference.elementwise),
  'filterwise': (normalization.filterwise, reference.filterwise),
  **{
    f'filterwise, axis {axis}': (
      functools.partial(normalization.filterwise, axis=axis),
      functools.partial(reference.filterwise, axis=axis),
    )
    for axis in (0, 1, -3)
  },
  'layerwise': (normalization.layerwise, reference.layerwise),
}
# Those that differ in more than the axis.
OPERATORS = ('identity', 'elementwise', 'filterwise', 'layerwise')


def make_normalization(name, eta, mask=None):
  """A normalization and the operator in NumPy; ``mask=None`` takes all."""
  library, by_hand = NORMALIZATIONS[name]
  return library(eta, mask=mask), by_hand(eta)


# Ascents on their own, for Optax's contract.
ASCENTS = {
  'steepest_ascent': ascent.steepest_ascent(normalization.layerwise(0.05)),
  'rho_ball': ascent.rho_ball(0.3, 0.05, True),
  'friendly': optax.chain(
    ascent.friendly(0.9, 0.8), ascent.rho_ball(0.3, 0.05, True)
  ),
}

# Functions (g, g~) -> g', which run on NumPy arrays, too.
DESCENTS = {
  'linear': lambda g, h: jax.tree.map(lambda a, b: a / 2 + b, g, h),
  'nonlinear': lambda g, h: jax.tree.map(lambda a, b: 2 * a - b**2, g, h),
}

# Keywords of `asam` and `value_and_grad`, each of which changes the gradient.
OPTIONS = {
  'defaults': {},
  'rho, eta': {'rho': 0.1, 'eta': 0.2},
  'sam': {'adaptive': False},
  'normalization': {'adaptive': normalization.layerwise(0.1)},
  'p = inf': {'ord': jnp.inf, 'rho': 0.01},
  'p = 3': {'ord': 3},
  'mask': {'mask': lambda params: jax.tree.map(lambda w: w.ndim > 1, params)},
  'ascent_steps': {'ascent_steps': 3},
  'descent': {'descent': DESCENTS['linear']},
  'perturbed_dtype': {'perturbed_dtype': jnp.bfloat16},
}

# The public transformations, around a base.
WRAPPERS = {
  'asam': lambda base_tx: asam(base_tx, 0.3, 0.05),
  'sam': lambda base_tx: sam(base_tx, 0.3),
  'sharpness_aware': lambda base_tx: optax.chain(
    sharpness_aware(
      optax.chain(
        ascent.steepest_ascent(normalization.filterwise(0.05), ord=jnp.inf),
        optax.scale(0.3),
      )
    ),
    base_tx,
  ),
  'every_k': lambda base_tx: asam(
    base_tx,
    0.3,
    ord=3,
    ascent_steps=2,
    every_k=2,
    descent=DESCENTS['linear'],
  ),
  'looksam': lambda base_tx: looksam(base_tx, 0.3, every_k=2),
  'gsam': lambda base_tx: asam(base_tx, 0.3, descent=descent.gsam(0.4)),
  'wsam': lambda base_tx: asam(base_tx, 0.3, descent=descent.wsam(0.7)),
  'friendly': lambda base_tx: optax.chain(
    sharpness_aware(ASCENTS['friendly']), base_tx
  ),
  'momentum_asam': lambda base_tx: momentum_asam(base_tx, 0.3, momentum=0.9),
}

# At learning rates that lead to the targets of test_convergence.py.
BASES = {
  'sgd': lambda: optax.sgd(1e-3),
  'momentum': lambda: optax.sgd(1e-3, momentum=0.9),
  'adam': lambda: optax.adam(1e-2),
  'adamw': lambda: optax.adamw(1e-2),
  'lamb': lambda: optax.lamb(1e-3),
  'lion': lambda: optax.lion(3e-3),
  'rmsprop': lambda: optax.rmsprop(5e-3),
  'adafactor': lambda: optax.adafactor(5e-3, min_dim_size_to_factor=2),
  'adabelief': lambda: optax.adabelief(1e-2),
  'sm3': lambda: optax.sm3(1.0),
  'muon': lambda: optax.contrib.muon(1e-2),
  'schedule_free': lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
  'lbfgs': optax.lbfgs,
  'backtracking': lambda: optax.chain(
    optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)
  ),
}
LINE_SEARCHES = ('lbfgs', 'backtracking')
# One of each kind: first order, preconditioned, with parameters, line search.
FAST_BASES = ('momentum', 'adam', 'schedule_free', 'backtracking')


def update_on(loss_fn, base, tx, state, params, **extra_args):
  """One update of ``tx`` with the extra arguments that ``base`` needs."""
  value, grads = jax.value_and_grad(loss_fn)(params)
  if base in LINE_SEARCHES:
    extra_args |= {'value': value, 'grad': grads, 'value_fn': loss_fn}
  else:
    extra_args |= {'grad_fn': jax.grad(loss_fn)}
  tx = optax.with_extra_args_support(tx)
  return tx.update(grads, state, params, **extra_args)
