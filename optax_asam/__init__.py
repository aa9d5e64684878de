"""Adaptive Sharpness-Aware Minimization as an Optax transformation."""

from typing import TYPE_CHECKING
from typing import Any

from optax_asam import ascent
from optax_asam import descent
from optax_asam import normalization
from optax_asam import sharpness
from optax_asam.alias import asam
from optax_asam.alias import sam
from optax_asam.autodiff import grad
from optax_asam.autodiff import value_and_grad
from optax_asam.looksam import LookSAMState
from optax_asam.looksam import looksam
from optax_asam.momentum import MomentumASAMState
from optax_asam.momentum import eval_params
from optax_asam.momentum import momentum_asam
from optax_asam.transform import SharpnessAwareState
from optax_asam.transform import sharpness_aware

__version__ = '0.2.0.dev0'


# Type checkers would accept every name.
if not TYPE_CHECKING:  # pragma: no branch

  def __getattr__(name: str) -> Any:
    """Names the import of a module that needs another library."""
    if name in ('equinox', 'nnx', 'plotting'):
      raise AttributeError(
        f'optax_asam.{name} must be imported explicitly:'
        f' import optax_asam.{name}'
      )
    raise AttributeError(f"module 'optax_asam' has no attribute {name!r}")


__all__ = (
  'LookSAMState',
  'MomentumASAMState',
  'SharpnessAwareState',
  'asam',
  'ascent',
  'descent',
  'eval_params',
  'grad',
  'looksam',
  'momentum_asam',
  'normalization',
  'sam',
  'sharpness',
  'sharpness_aware',
  'value_and_grad',
)
