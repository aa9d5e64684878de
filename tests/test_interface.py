"""Promise: the public names and signatures stay as they are published."""

import inspect
import types

import pytest

import optax_asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import normalization

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
  optax_asam.value_and_grad: (
    '(fun, argnums=0, has_aux=False, *, rho=0.5, eta=0.01, adaptive=True,'
    ' ord=2, mask=None, ascent_steps=1, descent=None, perturbed_dtype=None,'
    ' ascent_fun=None)'
  ),
  optax_asam.grad: (
    '(fun, argnums=0, has_aux=False, *, rho=0.5, eta=0.01, adaptive=True,'
    ' ord=2, mask=None, ascent_steps=1, descent=None, perturbed_dtype=None,'
    ' ascent_fun=None)'
  ),
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
}


@pytest.mark.parametrize(
  'function', SIGNATURES, ids=lambda function: function.__qualname__
)
def test_signature(function):
  """Names, order, kinds and defaults of the arguments."""
  parameters = [
    parameter.replace(annotation=inspect.Parameter.empty)
    for parameter in inspect.signature(function).parameters.values()
  ]
  signature = str(inspect.Signature(parameters))
  if parameters and callable(parameters[-1].default):
    default = parameters[-1].default
    signature = signature.replace(repr(default), default.__name__)
  assert signature == SIGNATURES[function]


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


@pytest.mark.parametrize('name', ['equinox', 'nnx', 'plotting'])
def test_modules_imported_by_name(name):
  """What needs another library is not imported, and the error says how."""
  with pytest.raises(AttributeError, match=f'import optax_asam.{name}'):
    optax_asam.__getattr__(name)


def test_unknown_name():
  """The usual error."""
  with pytest.raises(AttributeError, match="no attribute 'asma'"):
    _ = optax_asam.asma
