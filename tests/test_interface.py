"""Promise: the public names and signatures stay as they are published."""

import inspect
import types

import pytest

import optax_asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import normalization
from optax_asam import plotting
from optax_asam import sharpness
import optax_asam.equinox
import optax_asam.nnx

OPTIONS = (
  ' rho=0.5, eta=0.01, adaptive=True, ord=2, mask=None, ascent_steps=1,'
  ' descent=None, perturbed_dtype=None, ascent_fun=None)'
)
WORST_CASE = (
  '(loss_fn, params, rho, *, normalization=normalization, ord=2, steps=20,'
  ' step_rule=StepRule, restarts=1, key=None, mask=None,'
  ' perturbed_dtype=float32,'
)
# Of a default that is no literal, the name of the function or class.
SIGNATURES = {
  optax_asam.asam: (
    '(base_tx, rho=0.5, eta=0.01, adaptive=True, *, ord=2, mask=None,'
    ' ascent_steps=1, every_k=1, when=None, descent=None, axis_name=None,'
    ' perturbed_dtype=None)'
  ),
  optax_asam.sam: (
    '(base_tx, rho=0.05, *, ord=2, mask=None, ascent_steps=1, every_k=1,'
    ' when=None, descent=None, axis_name=None, perturbed_dtype=None)'
  ),
  optax_asam.looksam: (
    '(base_tx, rho=0.5, eta=0.01, adaptive=True, *, every_k=5, alpha=0.1,'
    ' ord=2, mask=None, axis_name=None, perturbed_dtype=None)'
  ),
  optax_asam.sharpness_aware: (
    '(ascent, descent=None, *, ascent_steps=1, every_k=1, when=None,'
    ' axis_name=None, perturbed_dtype=None)'
  ),
  optax_asam.value_and_grad: '(fun, argnums=0, has_aux=False, *,' + OPTIONS,
  optax_asam.grad: '(fun, argnums=0, has_aux=False, *,' + OPTIONS,
  optax_asam.nnx.value_and_grad: '(f, argnums=0, has_aux=False, *,' + OPTIONS,
  optax_asam.nnx.grad: '(f, argnums=0, has_aux=False, *,' + OPTIONS,
  optax_asam.equinox.filter_value_and_grad: (
    '(fun, *, has_aux=False,' + OPTIONS
  ),
  optax_asam.equinox.filter_grad: '(fun, *, has_aux=False,' + OPTIONS,
  optax_asam.momentum_asam: (
    '(base_tx, rho=2.0, eta=0.01, adaptive=True, *, ord=2, mask=None,'
    ' momentum=None)'
  ),
  optax_asam.eval_params: '(opt_state, params)',
  ascent.steepest_ascent: '(normalization, *, ord=2, mask=None)',
  ascent.rho_ball: '(rho, eta=0.01, adaptive=True, *, ord=2, mask=None)',
  ascent.friendly: '(sigma=1.0, decay=0.9)',
  descent.gsam: '(alpha=0.4)',
  descent.wsam: '(gamma=0.9)',
  normalization.identity: '()',
  normalization.elementwise: '(eta=0.01, mask=not_bias)',
  normalization.filterwise: '(eta=0.01, axis=-1, mask=not_bias)',
  normalization.layerwise: '(eta=0.01, mask=not_bias)',
  normalization.not_bias: '(params)',
  normalization.normalization_layers: '(params)',
  sharpness.worst_case: WORST_CASE + ' batches=None, unroll=1)',
  sharpness.worst_perturbation: WORST_CASE + ' unroll=1)',
  sharpness.average_case: (
    '(loss_fn, params, rho, key, *, normalization=normalization,'
    " distribution='normal', ord=2, samples=100, mask=None,"
    ' perturbed_dtype=float32, batches=None)'
  ),
  sharpness.max_hessian_eigenvalue: (
    '(loss_fn, params, key, *, normalization=normalization, steps=50,'
    ' mask=None, perturbed_dtype=float32, batches=None, unroll=1)'
  ),
  sharpness.loss_along: (
    '(loss_fn, params, *axes, perturbed_dtype=float32, batches=None)'
  ),
  sharpness.fixed_steps: '(size=0.25)',
  sharpness.apgd_steps: '()',
  sharpness.StepRule: '(momentum, init, update)',
  plotting.loss_curve: (
    '(ax, t, losses, *, color=None, label=None, linewidth=2.0)'
  ),
  plotting.loss_contours: (
    "(ax, t1, t2, losses, *, levels=16, cmap='viridis')"
  ),
  plotting.tidy: '(*axes)',
}


class Name(str):
  """A string that is shown without quotes."""

  __repr__ = str.__str__


def literal(default):
  """A default that can be compared as text."""
  if default is None or isinstance(default, (bool, int, float, str)):
    return default
  return Name(getattr(default, '__name__', type(default).__name__))


@pytest.mark.parametrize(
  'function', SIGNATURES, ids=lambda function: function.__qualname__
)
def test_signature(function):
  """Names, order, kinds and defaults of the arguments."""
  empty = inspect.Parameter.empty
  parameters = [
    parameter.replace(
      annotation=empty,
      default=empty
      if parameter.default is empty
      else literal(parameter.default),
    )
    for parameter in inspect.signature(function).parameters.values()
  ]
  assert str(inspect.Signature(parameters)) == SIGNATURES[function]


def test_names():
  """What the package exports is what is promised here, and no more."""
  exported = {
    name: getattr(optax_asam, name)
    for name in optax_asam.__all__
    if not isinstance(getattr(optax_asam, name), types.ModuleType)
  }
  functions = {f for f in SIGNATURES if exported.get(f.__name__) is f}
  states = {
    optax_asam.LookSAMState,
    optax_asam.MomentumASAMState,
    optax_asam.SharpnessAwareState,
  }
  assert set(exported.values()) == functions | states
  assert optax_asam.SharpnessAwareState._fields == (
    'step',
    'perturbed_value',
    'ascent_state',
  )
  assert optax_asam.LookSAMState._fields == (
    *optax_asam.SharpnessAwareState._fields,
    'direction',
  )
  assert optax_asam.MomentumASAMState._fields == (
    'perturbation',
    'momentum',
    'rho_state',
    'base_state',
  )
  assert set(sharpness.__all__) == {
    f.__name__
    for f in SIGNATURES
    if f.__module__.startswith(sharpness.__name__)
  }


@pytest.mark.parametrize('name', ['equinox', 'nnx', 'plotting'])
def test_modules_imported_by_name(name):
  """What needs another library is not imported, and the error says how."""
  with pytest.raises(AttributeError, match=f'import optax_asam.{name}'):
    optax_asam.__getattr__(name)


def test_unknown_name():
  """The usual error."""
  with pytest.raises(AttributeError, match="no attribute 'asma'"):
    _ = optax_asam.asma
