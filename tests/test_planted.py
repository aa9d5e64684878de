"""Promise: the tests can fail. Wrong formulas, planted, are caught."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import _ball
from optax_asam import _trees
from optax_asam import alias
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import transform
from support import error
import test_ascent
import test_golden
import test_parity
import test_transform


def tree_norm(tree):
  """The 2-norm of a tree."""
  return jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))


def multiply(t, x):
  """The product of two trees; a leaf of ``t`` may be the number 1."""
  return jax.tree.map(lambda t, x: t * x, t, x)


def right(t, g):
  """T^2 g / ||T g||."""
  norm = tree_norm(multiply(t, g))
  return jax.tree.map(lambda x: x / norm, multiply(t, multiply(t, g)))


def one_operator(t, g):
  """T g / ||T g||: a step in the normalized space, not mapped back."""
  tg = multiply(t, g)
  return jax.tree.map(lambda x: x / tree_norm(tg), tg)


def norm_of_the_gradient(t, g):
  """T^2 g / ||g||."""
  return jax.tree.map(lambda x: x / tree_norm(g), multiply(t, multiply(t, g)))


def norm_of_the_perturbation(t, g):
  """T^2 g / ||T^2 g||: a plain ball, a sheared direction."""
  t2g = multiply(t, multiply(t, g))
  return jax.tree.map(lambda x: x / tree_norm(t2g), t2g)


def norm_of_each_leaf(t, g):
  """T^2 g / ||T g||, the norm taken leaf by leaf."""
  return jax.tree.map(lambda t, g: right(t, g), t, g)


def descending(t, g):
  """The right perturbation with the wrong sign."""
  return jax.tree.map(lambda x: -x, right(t, g))


WRONG_PERTURBATIONS = [
  one_operator,
  norm_of_the_gradient,
  norm_of_the_perturbation,
  norm_of_each_leaf,
  descending,
]


def plant_perturbation(monkeypatch, formula):
  """Puts ``formula`` in the place of the ascent, for p = 2."""

  def planted(t, ord, mask):
    del ord, mask
    return optax.stateless(lambda g, params: formula(t(params), g))

  monkeypatch.setattr(ascent, '_unrounded_ascent', planted)


def golden():
  """The test against the authors' trajectory of an MLP."""
  test_golden.test_trajectory(None, 'asam_mlp', 'grad_fn')


def test_the_right_formula_passes(x64, monkeypatch):
  """The control: what is planted is all that makes the others fail."""
  plant_perturbation(monkeypatch, right)
  golden()


@pytest.mark.parametrize('formula', WRONG_PERTURBATIONS)
def test_wrong_perturbation(x64, monkeypatch, formula):
  """The golden trajectory fails."""
  plant_perturbation(monkeypatch, formula)
  with pytest.raises(AssertionError):
    golden()


@pytest.mark.parametrize(
  'wrong',
  [
    lambda eta: normalization.elementwise(eta, mask=None),
    lambda eta: normalization.elementwise(0.0),
    lambda eta: normalization.elementwise(2 * eta),
    lambda eta: normalization.layerwise(eta),
    lambda eta: normalization.identity(),
    lambda eta: lambda params: jax.tree.map(jnp.abs, params),
  ],
)
def test_wrong_normalization(x64, monkeypatch, wrong):
  """Biases normalized, eta forgotten or doubled, another operator."""
  rho_ball = ascent.rho_ball
  monkeypatch.setattr(
    ascent,
    'rho_ball',
    lambda rho, eta, adaptive, **kwargs: rho_ball(
      rho, eta, wrong(eta), **kwargs
    ),
  )
  with pytest.raises(AssertionError):
    golden()


def test_wrong_exponent(x64, monkeypatch):
  """Of the dual norm, for p = 3."""
  steepest = _ball.steepest
  monkeypatch.setattr(_ball, 'steepest', lambda h, p: steepest(h, p + 0.01))
  tree = test_ascent.tree.__wrapped__()
  with pytest.raises(AssertionError):
    test_ascent.test_reference(None, tree, 3, 'elementwise')


def test_ignored_mask(x64, monkeypatch):
  """Every leaf perturbed, whatever the mask says."""
  resolve_mask = _trees.resolve_mask
  monkeypatch.setattr(
    _trees, 'resolve_mask', lambda mask, params: resolve_mask(None, params)
  )
  tree = test_ascent.tree.__wrapped__()
  with pytest.raises(AssertionError):
    test_ascent.test_reference(None, tree, 2, 'identity')


def transformation_fails(monkeypatch, update, **kwargs):
  """Plants ``update(tx, *args)`` around the transformation; must be caught."""
  sharpness_aware = transform.sharpness_aware

  def planted(*args, **options):
    tx = sharpness_aware(*args, **options)

    def update_fn(updates, state, params, **extra_args):
      return update(tx, updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)

  monkeypatch.setattr(alias.transform, 'sharpness_aware', planted)
  params = test_transform.params.__wrapped__()
  arguments = {
    'p': 2,
    'ascent_steps': 1,
    'every_k': 1,
    'interface': 'grad_fn',
    **kwargs,
  }
  with pytest.raises(AssertionError):
    test_transform.test_reference(None, params, **arguments)


def test_gradient_passed_through(x64, monkeypatch):
  """The clean gradient is descended."""

  def update(tx, updates, state, params, **extra_args):
    return updates, tx.update(updates, state, params, **extra_args)[1]

  transformation_fails(monkeypatch, update)


def test_every_step(x64, monkeypatch):
  """every_k is ignored: the second gradient is taken on each update."""

  def update(tx, updates, state, params, **extra_args):
    return tx.update(
      updates, state._replace(step=jnp.int32(0)), params, **extra_args
    )

  transformation_fails(monkeypatch, update, every_k=3)


def test_frozen_schedule(x64, monkeypatch):
  """The schedule of rho stays at its first value, as contrib.sam's does."""

  def update(tx, updates, state, params, **extra_args):
    updates, new_state = tx.update(updates, state, params, **extra_args)
    return updates, new_state._replace(ascent_state=state.ascent_state)

  transformation_fails(monkeypatch, update)


def test_operator_of_the_perturbed_point(x64):
  """With several ascent steps, T is held at w: elsewhere is told apart."""
  params = test_transform.params.__wrapped__()
  tx = alias.asam(optax.sgd(0.1, momentum=0.9), ascent_steps=3)
  (result, _), _ = test_transform.run(tx, params, 3)
  params = jax.tree.map(np.asarray, params)

  def by_hand(held):
    return test_transform.reference_run(
      params, 3, lambda _: 0.5, ascent_steps=3, operator_held=held
    )

  assert error(result, by_hand(True)) < 1e-12
  assert error(result, by_hand(False)) > 1e-4


def test_planted_error_measure():
  """The measure of error itself: zero for equal, infinite for NaN."""
  tree = {'a': jnp.array([1.0, -4.0]), 'b': jnp.zeros(2)}
  assert error(tree, tree) == 0
  off = {'a': jnp.array([1.0, -3.0]), 'b': jnp.zeros(2)}
  assert error(off, tree) == 0.25
  assert error({**tree, 'b': jnp.array([0.0, 0.5])}, tree) == 0.5
  assert error({**tree, 'b': jnp.array([0.0, jnp.nan])}, tree) == float('inf')


def test_bits(monkeypatch):
  """One ulp of rho makes the comparison with contrib.sam fail."""
  rho_ball = ascent.rho_ball
  monkeypatch.setattr(
    ascent,
    'rho_ball',
    lambda rho, *args, **kwargs: rho_ball(rho * (1 + 2e-7), *args, **kwargs),
  )
  with pytest.raises(AssertionError):
    test_parity.test_contrib_sam('sgd', True)
