"""Promise: value_and_grad and grad are drop-ins for JAX's own."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from tests.helpers.cases import OPTIONS
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error


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


@pytest.mark.parametrize('option', OPTIONS)
def test_is_the_transformation(params, x, option):
  """Each argument means what it means in asam, and changes the gradient."""
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


@pytest.mark.parametrize('argnums', [1, (0, 1), [1, 0], -1, (1,)])
def test_argnums(params, x, argnums):
  """As in jax.grad; several arguments share one norm."""

  def fun(x, params, power):
    return loss_fn(params, x, power=power)

  args = (x, params, 2)
  if argnums == -1:
    fun = lambda x, power, params: loss_fn(params, x, power=power)
    args = (x, 2, params)
  ours = optax_asam.grad(fun, argnums, rho=0.3)(*args)
  clean = jax.grad(fun, argnums)(*args)
  assert jax.tree.structure(ours) == jax.tree.structure(clean)

  def of_joint(joint):
    replaced = list(args)
    for i, argument in zip(np.atleast_1d(argnums), joint, strict=True):
      replaced[i] = argument
    return fun(*replaced)

  joint = tuple(args[i] for i in np.atleast_1d(argnums))
  expected = optax_asam.grad(of_joint, rho=0.3)(joint)
  if isinstance(argnums, int):
    expected = expected[0]
  assert error(ours, expected) < 1e-6


def test_keyword_arguments(params, x):
  """They reach both passes."""
  grads = optax_asam.grad(loss_fn, rho=0.3)(params, x, power=4)
  expected = optax_asam.grad(lambda p: loss_fn(p, x, power=4), rho=0.3)(params)
  assert_same_bits(grads, expected)
  assert error(grads, optax_asam.grad(loss_fn, rho=0.3)(params, x)) > 1e-3


def test_dtypes():
  """The gradient has the dtypes of the arguments, whatever w + eps had."""
  params = {'a': jnp.ones(2, jnp.bfloat16), 'b': jnp.ones(2, jnp.float32)}
  fun = lambda p: sum((w.astype(jnp.float32) ** 2).sum() for w in p.values())
  for perturbed_dtype in (None, jnp.float32):
    grads = optax_asam.grad(fun, perturbed_dtype=perturbed_dtype)(params)
    assert grads['a'].dtype == jnp.bfloat16
    assert grads['b'].dtype == jnp.float32


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


def test_modules_are_refused():
  """What they hold beside parameters would be differentiated and perturbed."""
  network = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match=r'optax_asam\.nnx\.value_and_grad'):
    optax_asam.value_and_grad(lambda m, x: m(x).sum())(
      network, jnp.ones((1, 2))
    )
