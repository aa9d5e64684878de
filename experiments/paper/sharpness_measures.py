"""The measures of sharpness that are correlated with the generalization gap."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np
import optax

from optax_asam import normalization
from optax_asam import sharpness

STEPS, RESTARTS, SAMPLES = 20, 1, 20
# Without eta and with biases normalized too, the measure is invariant under
# rescaling.
INVARIANT = {'eta': 0.0, 'mask': None}
NORMALIZATIONS = {
  'sharpness': normalization.identity(),
  'adaptive sharpness': normalization.elementwise(**INVARIANT),
}
# What is measured, the case and p.
Key = tuple[str, str, float]
# The middle radius is the one reported first.
RADII: dict[Key, tuple[float, float, float]] = {
  ('sharpness', 'worst', 2): (0.02, 0.05, 0.1),
  ('sharpness', 'worst', np.inf): (2e-4, 5e-4, 1e-3),
  ('sharpness', 'average', 2): (0.002, 0.005, 0.01),
  ('sharpness', 'average', np.inf): (0.005, 0.01, 0.02),
  ('adaptive sharpness', 'worst', 2): (0.2, 0.5, 1.0),
  ('adaptive sharpness', 'worst', np.inf): (0.005, 0.01, 0.02),
  ('adaptive sharpness', 'average', 2): (0.05, 0.1, 0.2),
  ('adaptive sharpness', 'average', np.inf): (0.1, 0.2, 0.4),
}


def title(key: Key) -> str:
  """What a measure is called in tables."""
  name, case, ord = key
  return f'{name}, {case} case, p = {ord:g}'


def name(key: Key, rho: float) -> str:
  """The key of a measure in results.json."""
  return f'{title(key)}, rho = {rho:g}'


def middle(key: Key) -> str:
  """The name of a measure at its middle radius."""
  return name(key, RADII[key][1])


def make(
  loss_fn: Callable[[optax.Params, Any], jax.Array], batches: Any
) -> dict[Key, Callable[[optax.Params, float], jax.Array]]:
  """All measures, functions of the parameters and the radius.

  Args:
    loss_fn: Maps parameters and a batch to a loss.
    batches: Batches along the first axis, each with its own perturbation.
  """

  def measure(key, params, rho):
    kind, case, ord = key
    options: Any = {
      'normalization': NORMALIZATIONS[kind],
      'ord': ord,
      'batches': batches,
    }
    if case == 'worst':
      return sharpness.worst_case(
        loss_fn, params, rho, steps=STEPS, restarts=RESTARTS, **options
      )
    return sharpness.average_case(
      loss_fn,
      params,
      rho,
      jax.random.key(0),
      distribution='normal' if ord == 2 else 'uniform',
      samples=SAMPLES,
      **options,
    )

  return {key: functools.partial(measure, key) for key in RADII}


def make_config() -> dict[str, Any]:
  """What the measures depend on."""
  return {
    'adaptive_sharpness': INVARIANT,
    'steps': STEPS,
    'restarts': RESTARTS,
    'samples': SAMPLES,
    'radii': [
      {'measure': name, 'case': case, 'p': f'{ord:g}', 'rho': list(radii)}
      for (name, case, ord), radii in RADII.items()
    ],
  }
