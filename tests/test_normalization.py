"""Promise: T_w is the operator of its docstring, 1 where a mask says so."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_asam import normalization
import reference
from support import error

CASES = {
  'elementwise': (normalization.elementwise(0.1), reference.elementwise(0.1)),
  'filterwise': (normalization.filterwise(0.1), reference.filterwise(0.1)),
  'axis 0': (
    normalization.filterwise(0.1, axis=0),
    reference.filterwise(0.1, axis=0),
  ),
  'axis 1': (
    normalization.filterwise(0.1, axis=1),
    reference.filterwise(0.1, axis=1),
  ),
  'axis -3': (
    normalization.filterwise(0.1, axis=-3),
    reference.filterwise(0.1, axis=-3),
  ),
  'layerwise': (normalization.layerwise(0.1), reference.layerwise(0.1)),
}


@pytest.mark.parametrize('case', CASES)
def test_operator(x64, case):
  """Each operator against NumPy, on every number of dimensions."""
  rng = np.random.default_rng(0)
  params = [
    rng.standard_normal(shape)
    for shape in [(), (3,), (2, 3), (4, 2, 3), (3, 4, 2, 5), (2, 2, 3, 2, 2)]
  ]
  library, operator = CASES[case]
  t = jax.jit(library)(params)
  broadcast = jax.tree.map(lambda t, w: jnp.broadcast_to(t, w.shape), t, params)
  assert error(broadcast, jax.tree.map(operator, params)) < 1e-14


def test_zero_filters():
  """Where a filter or a leaf is zero, T = eta."""
  kernel = jnp.array([[[3.0, 0.0], [4.0, 0.0]]])
  t = normalization.filterwise(0.5)(kernel)
  np.testing.assert_array_equal(t, [[[5.5, 0.5]]])
  assert normalization.layerwise(0.5)(0 * kernel) == 0.5


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_bad_weights(bad):
  """NaN and infinity reach T, so that nothing is perturbed by guesswork."""
  kernel = jnp.array([[[bad, 1.0]]])
  for t in (normalization.elementwise(0.5), normalization.filterwise(0.5)):
    np.testing.assert_array_equal(t(kernel), [[[bad, 1.5]]])
  np.testing.assert_array_equal(normalization.layerwise(0.5)(kernel), [[[bad]]])


def test_at_least_float32(x64):
  """T of a 16-bit parameter is float32: |w| + eta would round eta away."""
  for dtype, wide in [
    (jnp.float16, jnp.float32),
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.float64, jnp.float64),
  ]:
    for t in (
      normalization.elementwise(0.01),
      normalization.filterwise(jnp.float64(0.01)),
      normalization.layerwise(np.float32(0.01)),
    ):
      leaf = t({'kernel': jnp.full((1, 1, 1), 2, dtype)})['kernel']
      assert leaf.dtype == wide
      np.testing.assert_allclose(np.float64(leaf), 2.01, rtol=1e-6)


def test_python_ones():
  """Where nothing is normalized, T is the Python number 1."""
  params = {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}
  for t in (
    normalization.elementwise(),
    normalization.filterwise(),
    normalization.layerwise(),
  ):
    assert t(params)['bias'] is 1  # noqa: F632
    assert t(params)['kernel'] is not 1  # noqa: F632
  assert normalization.identity()(params) == {'kernel': 1, 'bias': 1}


def test_traced_eta():
  """Eta may be a tracer."""
  t = jax.jit(lambda eta: normalization.elementwise(eta)({'w': jnp.ones(2)}))
  np.testing.assert_allclose(t(0.5)['w'], [1.5, 1.5])


class Layer(NamedTuple):
  """A container whose fields are names on the path."""

  w: jax.Array
  b: jax.Array


def test_not_bias():
  """The last name on the path decides, and wrappers are no names."""
  x = jnp.ones(2)
  params = {
    'biases': {
      'bias': x,
      'bias_hh': x,
      'bias_n': x,
      'b': x,
      'beta': x,
      'offset': x,
      'listed': {'bias': [x, x]},
      'variable': {'bias': {'value': x}},
      'raw': {'bias': {'raw_value': x}},
      'net/dense/bias': x,
      'layers.0.bias': x,
      'flat': {('net', 'dense', 'bias'): x},
    },
    'others': {
      'biased': x,
      'unbiased': x,
      'kernel': x,
      'embedding': x,
      'scale': x,
      'nested': {'bias': {'kernel': x}},
      'attention': {'value': x, 'query': {'kernel': x}},
      'layers.0.weight': x,
      'flat': {('bias', 'kernel'): x},
      'numbered': {7: x},
    },
  }
  expected = {
    'biases': jax.tree.map(lambda _: False, params['biases']),
    'others': jax.tree.map(lambda _: True, params['others']),
  }
  assert normalization.not_bias(params) == expected
  assert normalization.not_bias(Layer(x, x)) == Layer(True, False)


def test_not_bias_without_names():
  """In a tree without names everything is normalized."""
  x = jnp.ones(2)
  assert normalization.not_bias([x, (x, x)]) == [True, (True, True)]
  assert normalization.not_bias(x) is True


def test_only_biases():
  """A tree of biases alone is a SAM step, not an error."""
  assert normalization.elementwise()({'bias': jnp.ones(2)}) == {'bias': 1}


def test_callable_mask_of_bools():
  """A module that is callable itself is a mask if its leaves are bools."""

  @jax.tree_util.register_pytree_node_class
  class Module:
    """Callable, as Equinox modules are."""

    def __init__(self, kernel, shift):
      self.kernel, self.shift = kernel, shift

    def __call__(self, x):
      raise AssertionError('The mask was called.')

    def tree_flatten(self):
      return (self.kernel, self.shift), None

    @classmethod
    def tree_unflatten(cls, _, children):
      return cls(*children)

  params = Module(jnp.ones(2), jnp.ones(2))
  t = normalization.elementwise(0.5, mask=Module(True, False))(params)
  np.testing.assert_allclose(t.kernel, 1.5)
  assert t.shift == 1


def test_none_in_params():
  """None is no leaf: Equinox's filtered trees hold it."""
  params = {'w': jnp.ones(2), 'activation': None}
  t = normalization.elementwise(0.5)(params)
  assert t['activation'] is None
  mask = {'w': False, 'activation': None}
  with pytest.raises(ValueError, match='selects nothing'):
    normalization.elementwise(0.5, mask=mask)
