"""Adaptive Sharpness-Aware Minimization as an Optax transformation."""

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
