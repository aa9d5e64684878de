"""Promise: value_and_grad and grad are drop-ins for JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from tests.helpers import reference
from tests.helpers.cases import OPTIONS
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')


def loss_fn(params, x, *, power=2):
  """A scalar of two parameter trees."""
  h = jnp.tanh(x @ params['kernel'] + params['bias'])
  return (h**power).mean() + (params['kernel'] ** 4).sum()


def loss_and_aux(params, x, **kwargs):
  """``loss_fn`` with auxiliary data that tell where it was evaluated."""
  return loss_fn(params, x, **kwargs), {'kernel': params['kernel'], 'x': x}


@pytest.fixture
def x():
  """Inputs."""
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)


@pytest.mark.parametrize(
  'option', ['defaults', 'ascent_steps', 'descent', 'perturbed_dtype']
)
def test_is_the_transformation(params, x, option):
  """Arguments mean what they mean in asam, and change the gradient.

  The others are compared with NumPy in ``test_ascent_fun``.
  """
  options = OPTIONS[option]
  value, grads = jax.jit(optax_asam.value_and_grad(loss_fn, **options))(
    params, x
  )
  tx = asam(optax.identity(), **options)
  grad_fn = lambda params: jax.grad(loss_fn)(params, x)
  clean = grad_fn(params)
  expected, _ = jax.jit(
    lambda g, p: tx.update(g, tx.init(p), p, grad_fn=grad_fn)
  )(clean, params)
  assert error(value, loss_fn(params, x)) < 1e-6
  assert error(grads, expected) < 1e-5
  assert error(grads, clean) > 1e-4
  if options:
    plain = optax_asam.grad(loss_fn)(params, x)
    assert error(grads, plain) > 1e-4


def test_rho_zero(params, x):
  """JAX's own value, auxiliary data and gradient."""
  for fun, has_aux in ((loss_fn, False), (loss_and_aux, True)):
    ours = optax_asam.value_and_grad(fun, has_aux=has_aux, rho=0.0)(params, x)
    theirs = jax.value_and_grad(fun, has_aux=has_aux)(params, x)
    assert_same_bits(ours, theirs)
    ours = optax_asam.grad(fun, has_aux=has_aux, rho=0.0)(params, x)
    assert_same_bits(ours, jax.grad(fun, has_aux=has_aux)(params, x))


def test_aux_is_of_the_clean_pass(params, x):
  """And so is the value."""
  (value, aux), grads = optax_asam.value_and_grad(loss_and_aux, has_aux=True)(
    params, x
  )
  assert_same_bits(aux, {'kernel': params['kernel'], 'x': x})
  assert_same_bits(value, loss_fn(params, x))
  alone = optax_asam.grad(loss_and_aux, has_aux=True)(params, x)
  assert_same_bits(alone, (grads, aux))


@pytest.mark.parametrize(
  ('argnums', 'mask'),
  [
    *[(argnums, None) for argnums in (1, (0, 1), [1, 0], -1, (1,))],
    ([1, 0], ({'kernel': True, 'bias': False}, False)),
  ],
)
def test_argnums(params, x, argnums, mask):
  """As in jax.grad; several arguments share one norm, and one mask."""

  def fun(x, params, power):
    return loss_fn(params, x, power=power)

  args = (x, params, 2)
  if argnums == -1:
    fun = lambda x, power, params: loss_fn(params, x, power=power)
    args = (x, 2, params)
  ours = optax_asam.grad(fun, argnums, rho=0.3, mask=mask)(*args)
  clean = jax.grad(fun, argnums)(*args)
  assert jax.tree.structure(ours) == jax.tree.structure(clean)

  def of_joint(joint):
    replaced = list(args)
    for i, argument in zip(np.atleast_1d(argnums), joint, strict=True):
      replaced[i] = argument
    return fun(*replaced)

  joint = tuple(args[i] for i in np.atleast_1d(argnums))
  expected = optax_asam.grad(of_joint, rho=0.3, mask=mask)(joint)
  if isinstance(argnums, int):
    expected = expected[0]
  assert error(ours, expected) < 1e-6


def test_keyword_arguments(params, x):
  """They reach both passes."""
  grads = optax_asam.grad(loss_fn, rho=0.3)(params, x, power=4)
  expected = optax_asam.grad(lambda p: loss_fn(p, x, power=4), rho=0.3)(params)
  assert_same_bits(grads, expected)
  assert error(grads, optax_asam.grad(loss_fn, rho=0.3)(params, x)) > 1e-3


ELEMENTWISE = reference.elementwise(0.01)
# Each option of OPTIONS, as keywords of `by_hand`.
BY_HAND = {
  'defaults': {},
  'rho, eta': {'rho': 0.1, 'operator': reference.elementwise(0.2)},
  'sam': {'operator': reference.ones},
  'normalization': {'operator': reference.layerwise(0.1)},
  'p = inf': {'p': np.inf, 'rho': 0.01},
  'p = 3': {'p': 3},
  'mask': {'perturbed': {'kernel'}},
  'ascent_steps': {'ascent_steps': 3},
  'descent': {'descent': OPTIONS['descent']['descent']},
  'perturbed_dtype': {'dtype': jnp.bfloat16},
}


def by_hand(
  params,
  batch,
  part,
  *,
  rho=0.5,
  operator=ELEMENTWISE,
  p=2,
  perturbed=frozenset({'kernel', 'bias'}),
  ascent_steps=1,
  descent=None,
  dtype=None,
):
  """The squared error of ``batch`` at w + eps of ``part``, and the gradient."""
  gradient = reference.squared_error_grad
  first = grads = gradient(params, part)
  eps = 0
  for _ in range(ascent_steps):
    step = reference.perturbation(
      params, grads, operator, rho / ascent_steps, p, {'kernel'}, perturbed
    )
    eps = jax.tree.map(np.add, eps, step) if eps else step
    point = jax.tree.map(np.add, params, eps)
    if dtype is not None:
      point = jax.tree.map(lambda w: w.astype(dtype).astype(float), point)
    grads = gradient(point, part)
  grads = gradient(point, batch)
  if descent is not None:
    grads = descent(first, grads)
  return point, reference.squared_error(point, batch), grads


@pytest.mark.parametrize('option', OPTIONS)
def test_ascent_fun(x64, option):
  """The ascent takes its gradients, ``fun`` gives the rest at w + eps.

  The ascent is on a quarter of the batch, and each pass is traced once.
  """
  rng = np.random.default_rng(2)
  params = {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}
  batch = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))
  part = tuple(array[::4] for array in batch)
  passes = []

  def fun(params, batch):
    passes.append(len(batch[0]))
    point = optax.tree.cast(params, jnp.float64)
    return reference.squared_error(point, batch), point

  value_and_grad_fn = optax_asam.value_and_grad(
    fun,
    has_aux=True,
    ascent_fun=lambda params, batch: fun(params, [x[::4] for x in batch]),
    **OPTIONS[option],
  )
  (value, point), grads = jax.jit(value_and_grad_fn)(params, batch)

  options = BY_HAND[option]
  expected = by_hand(params, batch, part, **options)
  tolerance = 5e-3 if option == 'perturbed_dtype' else 1e-12
  assert error((point, value), expected[:2]) < 1e-12
  assert error(grads, expected[2]) < tolerance
  assert passes == [4] * options.get('ascent_steps', 1) + [16]
  # Another perturbation than that of the whole batch.
  assert error(grads, by_hand(params, batch, batch, **options)[2]) > 1e-3


def test_grad_with_ascent_fun(params, x):
  """Without the value; arguments reach both functions as they were given."""
  half = lambda params, x, *, power=2: loss_fn(params, x[:2], power=power)
  for kwargs in ({}, {'power': 4}):
    _, expected = optax_asam.value_and_grad(loss_fn, ascent_fun=half)(
      params, x, **kwargs
    )
    grads = optax_asam.grad(loss_fn, ascent_fun=half)(params, x, **kwargs)
    assert_same_bits(grads, expected)
    assert error(grads, optax_asam.grad(loss_fn)(params, x, **kwargs)) > 1e-4
  same = optax_asam.grad(loss_fn, ascent_fun=loss_fn)(params, x)
  assert_same_bits(same, optax_asam.grad(loss_fn)(params, x))


def test_traced_rho_and_its_derivative(x64):
  """Meta-learning of rho, against finite differences, and finite at 0."""
  w = jnp.array([0.5, -2.0, 1.0])
  fun = lambda w: (jnp.sin(w) * w**2).sum()

  @jax.jit
  def after_one_step(rho, w):
    return fun(w - 0.1 * optax_asam.grad(fun, rho=rho)(w))

  derivative = jax.jit(jax.grad(after_one_step))
  for rho in (0.0, 0.3):
    h = 1e-5
    difference = (
      after_one_step(rho + h, w) - after_one_step(max(rho - h, 0.0), w)
    ) / (h + min(rho, h))
    np.testing.assert_allclose(derivative(rho, w), difference, rtol=1e-3)
  assert derivative(0.3, jnp.zeros(3)) == 0  # zero gradient: eps = 0, not NaN


def test_the_function_keeps_its_name():
  """As jax.grad's result does."""
  assert optax_asam.grad(loss_fn).__name__ == 'loss_fn'
  assert optax_asam.value_and_grad(loss_fn).__doc__ == loss_fn.__doc__
