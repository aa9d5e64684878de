r"""Sharpness as a measure: how far the loss rises around given parameters.

:func:`optax_asam.asam` takes one step to the surface of the ball
:math:`\|T_w^{-1} \epsilon\|_p \le \rho`; these functions search the ball,
average over it, or measure the curvature in it. With a normalization for which
:math:`T_w` follows a rescaling of the weights, such as ``elementwise(eta=0,
mask=None)``, these measures are invariant to rescalings that leave the
network's function unchanged. :func:`loss_along` evaluates the loss along given
directions.
"""

from optax_asam.sharpness._average_case import average_case
from optax_asam.sharpness._hessian import max_hessian_eigenvalue
from optax_asam.sharpness._loss_along import loss_along
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
  'loss_along',
  'max_hessian_eigenvalue',
  'worst_case',
  'worst_perturbation',
)
