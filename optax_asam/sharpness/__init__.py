r"""Sharpness as a measure: how far the loss rises around some parameters.

Where :func:`optax_asam.asam` takes one step to the surface of the ball
:math:`\|T_w^{-1} \epsilon\|_p \le \rho`, these search it, average over it, or
take its curvature. With a normalization that makes :math:`T_w` follow a
rescaling of the network, as ``elementwise(eta=0, mask=None)`` does, all three
stay when the network is rescaled without a change of its function.
"""

from optax_asam.sharpness._average_case import average_case
from optax_asam.sharpness._hessian import max_hessian_eigenvalue
from optax_asam.sharpness._step_rules import StepRule
from optax_asam.sharpness._step_rules import apgd_steps
from optax_asam.sharpness._step_rules import fixed_steps
from optax_asam.sharpness._worst_case import worst_case
from optax_asam.sharpness._worst_case import worst_perturbation

__all__ = (
  'StepRule',
  'apgd_steps',
  'average_case',
  'fixed_steps',
  'max_hessian_eigenvalue',
  'worst_case',
  'worst_perturbation',
)
