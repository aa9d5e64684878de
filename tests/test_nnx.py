"""Promise: optax_asam.nnx is nnx.value_and_grad with another gradient.

The reference is two passes of clones, with NumPy between them.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_asam
from optax_asam import sharpness
import optax_asam.nnx
from tests.helpers import reference
from tests.helpers.cases import OPTIONS
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')


class Network(nnx.Module):
  """A dense layer, BatchNorm and dropout, and a dense layer with LoRA."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.LoRA(
      4, 2, 2, base_module=nnx.Linear(4, 2, rngs=rngs), rngs=rngs
    )

  def __call__(self, x):
    """From [n, 3] to [n, 2]."""
    return self.out(self.dropout(self.norm(nnx.relu(self.hidden(x)))))


def loss_fn(network, x):
  """A loss, and auxiliary data that depend on the parameters."""
  y = network(x)
  return jnp.mean((y - 1) ** 2), y


def ascent_fun(network, x):
  """The loss of a quarter of the batch."""
  return loss_fn(network, x[::4])


LORA = nnx.DiffState(0, nnx.LoRAParam)


@functools.cache
def plain(argnums, fun=loss_fn):
  """One pass of the network."""
  return nnx.jit(nnx.value_and_grad(fun, argnums=argnums, has_aux=True))


@functools.cache
def sharpness_aware(argnums, ascent_fun=None):
  """Both passes of the network."""
  return nnx.jit(
    optax_asam.nnx.value_and_grad(
      loss_fn, argnums=argnums, has_aux=True, ascent_fun=ascent_fun
    )
  )


@pytest.fixture
def network():
  """A network of which no variable is zero."""
  network = Network(nnx.Rngs(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(0.3, 0.5, w.shape), w.dtype),
    nnx.state(network, nnx.Param),
  )
  nnx.update(network, params)
  return network


@pytest.fixture
def x():
  """Inputs of three batches."""
  x = np.random.default_rng(1).normal(size=(3, 8, 3))
  return jnp.asarray(x, jnp.float32)


def by_hand(network, x, argnums):
  """What ``sharpness_aware`` should return, and the network after it."""
  clean, perturbed = nnx.clone(network), nnx.clone(network)
  wrt = argnums.filter if isinstance(argnums, nnx.DiffState) else nnx.Param
  out, grads = plain(argnums)(clean, x)
  nnx.update(perturbed, reference.perturb(nnx.state(network, wrt), grads))
  _, grads = plain(argnums)(perturbed, x)
  return (out, grads), clean


def on_part_by_hand(network, x, argnums):
  """The same with ``ascent_fun``: all but w is that of the second pass."""
  ascent, perturbed = nnx.clone(network), nnx.clone(network)
  wrt = argnums.filter if isinstance(argnums, nnx.DiffState) else nnx.Param
  params = nnx.state(network, wrt)
  _, grads = plain(argnums, ascent_fun)(ascent, x)
  nnx.update(perturbed, reference.perturb(params, grads))
  result = plain(argnums)(perturbed, x)
  nnx.update(perturbed, params)
  return result, perturbed


def variables(network):
  """All that a network holds, in arrays."""
  leaves = jax.tree.leaves(nnx.state(network))
  return [
    jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    else leaf
    for leaf in leaves
  ]


@pytest.mark.parametrize('argnums', [0, LORA], ids=['Param', 'LoRAParam'])
def test_is_two_passes(network, x, argnums):
  """Statistics and dropout counts are those of the clean one, twice."""
  expected_network = nnx.clone(network)
  for batch in x[:2]:
    expected, expected_network = by_hand(expected_network, batch, argnums)
    result = sharpness_aware(argnums)(network, batch)
    assert error(result, expected) < 1e-6
    assert error(variables(network), variables(expected_network)) < 1e-6
  _, clean_grads = plain(argnums)(nnx.clone(network), x[2])
  _, grads = sharpness_aware(argnums)(network, x[2])
  assert error(grads, clean_grads) > 1e-2


@pytest.mark.parametrize('argnums', [0, LORA], ids=['Param', 'LoRAParam'])
def test_ascent_fun(network, x, argnums):
  """Statistics and dropout counts are those of the perturbed pass, twice."""
  expected_network = nnx.clone(network)
  for batch in x[:2]:
    expected, expected_network = on_part_by_hand(
      expected_network, batch, argnums
    )
    params = nnx.state(network, nnx.Param)
    result = sharpness_aware(argnums, ascent_fun)(network, batch)
    assert error(result, expected) < 3e-6
    assert error(variables(network), variables(expected_network)) < 3e-6
    assert_same_bits(nnx.state(network, nnx.Param), params)
  other_network = nnx.clone(network)
  (_, y), grads = sharpness_aware(argnums, ascent_fun)(network, x[2])
  (_, clean_y), other_grads = sharpness_aware(argnums)(other_network, x[2])
  assert error(y, clean_y) > 1e-2
  assert error(grads, other_grads) > 1e-2


def test_ascent_fun_leaves_the_module_as_the_last_pass_does(model):
  """New variables stay; after an error, w is not w + eps."""
  params = jax.tree.map(jnp.array, nnx.state(model))
  passes = []

  def fun(model, x):
    passes.append(model.kernel[...])
    model.last_input = nnx.Cache(x)
    if len(passes) == 4:
      raise RuntimeError
    return small_loss_fn(model, x)

  value_and_grad_fn = optax_asam.nnx.value_and_grad(
    fun, ascent_fun=lambda model, x: fun(model, x[:1])
  )
  value_and_grad_fn(model, jnp.eye(3))
  assert error(model.last_input[...], jnp.eye(3)) == 0
  assert error(nnx.state(model, nnx.Param), params) == 0
  with pytest.raises(RuntimeError):
    value_and_grad_fn(model, 2 * jnp.eye(3))
  assert error(nnx.state(model, nnx.Param), params) == 0


@pytest.mark.parametrize(
  ('ascent_fun', 'by_hand'), [(None, by_hand), (ascent_fun, on_part_by_hand)]
)
def test_in_scan(network, x, ascent_fun, by_hand):
  """Three steps of SGD in nnx.scan are three by hand."""

  @nnx.jit
  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
  def train(network, x):
    (loss, _), grads = optax_asam.nnx.value_and_grad(
      loss_fn, has_aux=True, ascent_fun=ascent_fun
    )(network, x)
    descend(network, grads)
    return network, loss

  expected_network, expected_losses = nnx.clone(network), []
  for batch in x:
    out, expected_network = by_hand(expected_network, batch, 0)
    ((loss, _), grads) = out
    descend(expected_network, grads)
    expected_losses.append(loss)

  network, losses = train(network, x)

  assert error(losses, jnp.stack(expected_losses)) < 1e-6
  assert error(variables(network), variables(expected_network)) < 1e-6


def descend(network, grads):
  """A step of gradient descent."""
  params = nnx.state(network, nnx.Param)
  nnx.update(network, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads))


@pytest.mark.parametrize(
  ('on_part', 'mask'),
  [(False, None), (True, None), (False, (True, False, True))],
)
def test_several_arguments(on_part, mask):
  """A module in part, an array and two modules in a list share norm and mask.

  The two share a variable, which counts once. Keys may be an argument of their
  own; both passes draw the same.
  """
  first, second, third = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(3))
  third.kernel = second.kernel
  scale = jnp.array([1.0, 2.0, 3.0])

  noise = jax.random.normal(nnx.Rngs(noise=0).noise(), (3, 3))
  rngs = nnx.Rngs(noise=0)

  def loss_fn(first, rngs, scale, others):
    x = jax.random.normal(rngs.noise(), (3, 3))
    for layer in others:
      x = layer(jnp.tanh(x))
    return jnp.mean((scale * first(x) - 1) ** 2)

  def pure_loss_fn(params):
    kernel, scale, (others, bias) = params
    last = {'kernel': others['kernel'], 'bias': bias['bias']}
    x = noise
    for layer in others, last:
      x = jnp.tanh(x) @ layer['kernel'] + layer['bias']
    first_out = x @ kernel['kernel'] + first.bias[...]
    return jnp.mean((scale * first_out - 1) ** 2)

  ascent_fun = pure_ascent_fun = None
  if on_part:
    ascent_fun = lambda *args: loss_fn(*args[:2], args[2] ** 2, args[3])
    pure_ascent_fun = lambda params: pure_loss_fn(
      (params[0], params[1] ** 2, params[2])
    )
  modules = first, second, third
  before = jax.tree.map(jnp.array, [nnx.state(module) for module in modules])

  kernel = nnx.DiffState(0, nnx.PathContains('kernel'))
  value, grads = optax_asam.nnx.value_and_grad(
    loss_fn, (kernel, 2, 3), mask=mask, ascent_fun=ascent_fun
  )(first, rngs, scale, [second, third])

  params = (
    {'kernel': first.kernel[...]},
    scale,
    (
      {'kernel': second.kernel[...], 'bias': second.bias[...]},
      {'bias': third.bias[...]},
    ),
  )
  expected = optax_asam.value_and_grad(
    pure_loss_fn, mask=mask, ascent_fun=pure_ascent_fun
  )(params)
  assert error([nnx.state(module) for module in modules], before) == 0
  assert isinstance(grads, tuple)
  leaves = value, jax.tree.leaves(grads)
  assert error(leaves, (expected[0], jax.tree.leaves(expected[1]))) < 1e-6
  assert rngs.noise.count[...] == 1


def small_loss_fn(model, x):
  """The loss of one dense layer."""
  return jnp.mean(model(x) ** 2)


@pytest.fixture
def model():
  """One dense layer, which has nothing but parameters."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  model.bias = nnx.Param(jnp.array([0.5, -0.5]))
  return model


def test_options(model):
  """All of them at once, in a decorator: the same as the plain function.

  That each of them reaches it shows in ``test_errors.py``.
  """
  options = {
    name: value for each in OPTIONS.values() for name, value in each.items()
  }
  options['rho'] = 1.0
  graphdef, params = nnx.split(model)
  half_loss_fn = lambda model, x: small_loss_fn(model, x[:1])

  def pure(fun):
    return lambda params: fun(nnx.merge(graphdef, params), jnp.eye(3))

  expected = optax_asam.value_and_grad(
    pure(small_loss_fn), ascent_fun=pure(half_loss_fn), **options
  )(params)
  options['ascent_fun'] = half_loss_fn
  result = optax_asam.nnx.value_and_grad(**options)(small_loss_fn)(
    model, jnp.eye(3)
  )
  grads = optax_asam.nnx.grad(**options)(small_loss_fn)(model, x=jnp.eye(3))
  assert error(result, expected) < 1e-6
  assert error(grads, expected[1]) < 1e-6
  assert error(nnx.state(model), params) == 0


def test_mask_is_a_state(model):
  """Of bools."""
  params = nnx.state(model)
  grad_fn = functools.partial(optax_asam.nnx.grad, small_loss_fn, rho=1.0)
  mask = jax.tree.map(lambda w: w.ndim > 1, params)
  grads = grad_fn(mask=mask)(model, jnp.eye(3))
  expected = grad_fn(
    mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
  )(model, jnp.eye(3))
  assert error(grads, expected) < 1e-6
  # A plain dict with the same names fits as well.
  plain_mask = {'kernel': True, 'bias': False}
  assert_same_bits(grad_fn(mask=plain_mask)(model, jnp.eye(3)), grads)
  with pytest.raises(ValueError, match='mask'):
    grad_fn(mask={**plain_mask, 'other': True})(model, jnp.eye(3))


def test_grad_with_aux(model):
  """The auxiliary data are those of the clean pass, as in nnx.grad."""

  def loss_fn(model, x):
    loss = small_loss_fn(model, x)
    return loss, {'loss': loss}

  grads, aux = optax_asam.nnx.grad(loss_fn, has_aux=True)(model, jnp.eye(3))
  loss, expected = optax_asam.nnx.value_and_grad(small_loss_fn)(
    model, jnp.eye(3)
  )
  assert error((grads, aux), (expected, {'loss': loss})) < 1e-6


def test_keywords(model):
  """A differentiated argument may be one, as in nnx.grad."""
  grad_fn = optax_asam.nnx.grad(small_loss_fn)
  x = jnp.eye(3)
  assert error(grad_fn(x=x, model=model), grad_fn(model, x)) == 0


@pytest.mark.skipif(
  not hasattr(nnx, 'as_pure'), reason='A variable was not an argument before'
)
def test_variable():
  """It may be an argument by itself."""
  loss_fn = lambda w: jnp.sum(w[...] ** 2)
  for ascent_fun in (None, loss_fn):
    w = nnx.Param(jnp.array([3.0, 4.0]))
    grads = optax_asam.nnx.grad(loss_fn, ascent_fun=ascent_fun)(w)
    np.testing.assert_allclose(grads[...], [7.477, 11.494], atol=1e-3)
    np.testing.assert_array_equal(w[...], [3, 4])


@pytest.mark.skipif(
  not hasattr(nnx, 'set_graph_updates'), reason='Flax has no tree mode yet'
)
@pytest.mark.parametrize('mode', ['set_graph_mode', 'set_graph_updates'])
@pytest.mark.parametrize('ascent_fun', [None, small_loss_fn])
@pytest.mark.parametrize('called_in_graph_mode', [True, False])
def test_raw_values_in_tree_mode(mode, called_in_graph_mode, ascent_fun):
  """They stay as they are, and the mode is that in which it was made."""

  class Bounded(nnx.Param):
    """A parameter that is used as its hyperbolic tangent."""

    def get_value(self, **kwargs):
      """What the loss sees."""
      return jnp.tanh(super().get_value(**kwargs))

  class Model(nnx.Module):
    """A product."""

    def __init__(self):
      self.w = Bounded(jnp.array([1.0, 2.0]))

    def __call__(self, x):
      """Maps x to x w."""
      return x * self.w.get_value()

  model, x = Model(), jnp.ones(2)
  with getattr(nnx, mode)(False):
    grad_fn = optax_asam.nnx.grad(small_loss_fn, rho=0.0, ascent_fun=ascent_fun)
    expected = nnx.grad(small_loss_fn)(model, x)
  with getattr(nnx, mode)(called_in_graph_mode):
    grads = grad_fn(model, x)
  raw = [each.w.get_raw_value() for each in (grads, expected)]
  assert error(*raw) < 1e-6
  assert_same_bits(model.w.get_raw_value(), jnp.array([1.0, 2.0]))


@pytest.mark.skipif(
  not hasattr(nnx, 'set_graph_updates'), reason='Flax has no tree mode yet'
)
@pytest.mark.parametrize('mode', ['set_graph_mode', 'set_graph_updates'])
def test_tree_mode(model, mode):
  """The gradient is a module, as from nnx.grad."""
  half_loss_fn = lambda model, x: small_loss_fn(model, x[:1])
  params = jax.tree.map(jnp.array, nnx.state(model))
  for ascent_fun in (None, half_loss_fn):
    make_grad_fn = functools.partial(
      optax_asam.nnx.grad, small_loss_fn, ascent_fun=ascent_fun
    )
    expected = make_grad_fn()(model, jnp.eye(3))
    with getattr(nnx, mode)(False):
      grads = make_grad_fn()(model, jnp.eye(3))
    assert isinstance(grads, nnx.Linear)
    assert error(nnx.state(grads), expected) < 1e-6
    assert error(nnx.state(model), params) == 0
  statistics = []
  for library in (nnx, optax_asam.nnx):
    with getattr(nnx, mode)(False):
      norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      library.grad(small_loss_fn)(norm, jnp.eye(3))
    statistics.append(nnx.state(norm))
  assert error(*statistics) == 0
  assert (norm.mean[...] > 0).all()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'f': 1}, 'f must be a function'),
    ({'argnums': 0.5}, 'rho=0.5'),
    ({'argnums': 2}, 'argnums must index'),
    ({'argnums': -1}, 'argnums must index'),
    ({'argnums': nnx.DiffState(2, ...)}, 'argnums must'),
  ],
)
def test_errors(model, arguments, message):
  """Name the argument, and what to write instead."""
  with pytest.raises(TypeError, match=message):
    optax_asam.nnx.grad(**{'f': small_loss_fn, **arguments})(model, jnp.eye(3))


@pytest.mark.skipif(
  not hasattr(nnx, 'set_graph_updates'), reason='earlier Flax accepts it'
)
def test_bound_method_is_an_error(model):
  """That of Flax: what is differentiated would not be an argument."""
  with pytest.raises(ValueError, match='bound method'):
    optax_asam.nnx.grad(model.__call__)


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: (m,), lambda m: [m]])
def test_module_of_other_variables_is_an_error(network, wrap):
  """In the plain functions, which would perturb its statistics."""
  with pytest.raises(TypeError, match=r'optax_asam\.nnx\.value_and_grad'):
    optax_asam.value_and_grad(lambda modules: 0.0)(wrap(network))
  with pytest.raises(TypeError, match=r'nnx\.split\(model, nnx\.Param'):
    sharpness.worst_case(lambda modules: 0.0, wrap(network), 0.1)


@pytest.mark.skipif(
  not hasattr(nnx, 'as_pure'), reason='A module was not a pytree before'
)
def test_module_of_params_is_a_pytree(model):
  """The plain function takes it, and knows its biases."""
  grads = optax_asam.grad(small_loss_fn)(model, jnp.eye(3))
  expected = optax_asam.nnx.grad(small_loss_fn)(model, jnp.eye(3))
  assert error(nnx.state(grads), expected) < 1e-6
