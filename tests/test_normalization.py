"""Promise: T_w is the operator of its docstring, 1 where a mask says so."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_asam import normalization
from tests.helpers import cases
from tests.helpers.support import error

SHAPES = [(), (3,), (2, 3), (4, 2, 3), (3, 4, 2, 5), (2, 2, 3, 2, 2)]
# With eta = 0.5, those whose T is not 1.
NOT_ONE = {
  name: cases.make_normalization(name, 0.5)[0]
  for name in cases.OPERATORS
  if name != 'identity'
}


def test_operator(x64):
  """Each operator against NumPy, on every number of dimensions."""
  rng = np.random.default_rng(0)
  params = [rng.standard_normal(shape) for shape in SHAPES]
  for name in cases.NORMALIZATIONS:
    t, operator = cases.make_normalization(name, 0.1)
    broadcast = jax.tree.map(
      lambda t, w: jnp.broadcast_to(jnp.asarray(t, float), w.shape),
      t(params),
      params,
    )
    assert error(broadcast, jax.tree.map(operator, params)) < 1e-14, name


def test_bad_weights():
  """NaN and infinity reach T, so that the perturbation is zero."""
  for bad in (jnp.nan, jnp.inf):
    for name, expected in [
      ('elementwise', [[[bad, 1.5]]]),
      ('filterwise', [[[bad, 1.5]]]),
      ('layerwise', [[[bad]]]),
    ]:
      t = NOT_ONE[name](jnp.array([[[bad, 1.0]]]))
      np.testing.assert_array_equal(t, expected)


def test_at_least_float32(x64):
  """T of a 16-bit parameter is float32: |w| + eta would round eta away."""
  for dtype, wide in [
    (jnp.float16, jnp.float32),
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.float64, jnp.float64),
  ]:
    for name in NOT_ONE:
      for eta in (0.01, jnp.float64(0.01), np.float32(0.01)):
        t, _ = cases.make_normalization(name, eta)
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
  # Nothing to normalize is a SAM step, not an error.
  assert normalization.elementwise()({'bias': jnp.ones(2)}) == {'bias': 1}
  none = {'kernel': False, 'bias': False}
  assert normalization.elementwise(mask=none)(params) == {
    'kernel': 1,
    'bias': 1,
  }


class Layer(NamedTuple):
  """A container whose fields are names on the path."""

  w: jax.Array
  b: jax.Array


def test_not_bias():
  """The last name on the path that is not a wrapper decides."""
  x = jnp.ones(2)
  names = ('bias', 'biases', 'bias_hh', 'in_proj_bias', 'b', 'b1', 'b_hh')
  names += ('beta', 'offset')
  others = ('biased', 'unbiased', 'kernel', 'embedding', 'scale')
  others += ('bw', 'lora_b', 'relative_position_bias_table')
  params = {
    'biases': {
      **dict.fromkeys((*names, 'net/dense/bias', 'layers.0.bias'), x),
      'listed': {'bias': [x, x]},
      'variable': {'bias': {'value': x}},
      'raw': {'bias': {'raw_value': x}},
      'flat': {('net', 'dense', 'bias'): x},
    },
    'others': {
      **dict.fromkeys((*others, 'layers.0.weight'), x),
      'nested': {'bias': {'kernel': x}},
      'attention': {'value': x, 'query': {'kernel': x}},
      'flat': {('bias', 'kernel'): x},
      'numbered': {7: x},
      'lora': {'a': x, 'b': x},
    },
  }
  expected = {
    'biases': jax.tree.map(lambda _: False, params['biases']),
    'others': jax.tree.map(lambda _: True, params['others']),
  }
  assert normalization.not_bias(params) == expected
  assert normalization.not_bias(Layer(x, x)) == Layer(True, False)
  # In a tree without names everything is normalized.
  assert normalization.not_bias([x, (x, x)]) == [True, (True, True)]
  assert normalization.not_bias(x) is True


def test_normalization_layers():
  """The layer's name, class or position decides, and its parameters."""
  x = jnp.ones(2)
  norm = {'scale': x, 'bias': x}
  names = ('BatchNorm_0', 'RMSNorm', 'block/~/batch_norm_1', 'norm', 'norm1')
  names += ('bn1', 'ln_f', 'GN', 'input_layernorm', 'batch_normalization')
  names += ('layers.0.norm', 'layernorm_before', 'pre_norm', 'layers_1')
  others = ('WeightNorm_0', 'spectral_norm', 'normal', 'in', 'norma', 'ls1')
  others += ('LayerNormLSTMCell_0/hi', 'lnorma', 'column', 'layers_x')
  params = {
    'norms': {
      **dict.fromkeys(names, norm),
      'haiku': {'layer_norm': {'scale': x, 'offset': x}},
      'keras': {'batch_normalization': {'gamma': x, 'beta': x}},
      'torch': {'norms': [{'weight': x, 'bias': x}]},
      'tuples': {('net', 'norm', 'scale'): x},
      'joined': {'net/norm/bias': x},
      'listed': [norm, {'scale': x}],
      'variable': {'norm': {'scale': {'value': x}}},
    },
    'others': {
      **dict.fromkeys(others, norm),
      'norm': {'kernel': x, 'bias': x},
      'norm_block': {'dense': {'kernel': x, 'bias': x}},
      'layers_2': {'kernel': x, 'bias': x},
      'listed': [{'weight': x, 'bias': x}, {'bias': x}],
      'scale': x,
      'weight': [x],
    },
  }
  expected = {
    'norms': jax.tree.map(lambda _: True, params['norms']),
    'others': jax.tree.map(lambda _: False, params['others']),
  }
  assert normalization.normalization_layers(params) == expected
  assert normalization.normalization_layers(norm) == {
    'scale': False,
    'bias': False,
  }
  for unnamed in (x, [x]):
    assert not any(jax.tree.leaves(normalization.normalization_layers(unnamed)))


class RMSNorm(NamedTuple):
  """A class whose name is that of a normalization layer."""

  weight: jax.Array
  kernel: jax.Array


@jax.tree_util.register_pytree_with_keys_class
class Closed(list):
  """A container with keys that lead nowhere."""

  def tree_flatten_with_keys(self):
    """With the name of an attribute that it lacks."""
    return [(jax.tree_util.GetAttrKey('norm'), self[0])], None

  @classmethod
  def tree_unflatten(cls, _, children):
    """From its only child."""
    return cls(children)


def test_normalization_layers_of_classes():
  """The class of a layer decides even where its name says nothing."""
  x = jnp.ones(2)
  params = {'a': RMSNorm(x, x), 'b': Layer(x, x), 'c': Closed([{'scale': x}])}
  mask = normalization.normalization_layers(params)
  assert mask['a'] == RMSNorm(True, False)
  assert mask['b'] == Layer(False, False)
  assert mask['c'][0] == {'scale': True}


def test_mask_function_in_a_pytree():
  """A function whose leaves are not functions, as Optimistix makes of one."""

  @jax.tree_util.register_pytree_node_class
  class Closure:
    """A function with its closure as children."""

    def __init__(self, code):
      self.code = code

    def __call__(self, params):
      return normalization.not_bias(params)

    def tree_flatten(self):
      return (self.code,), None

    @classmethod
    def tree_unflatten(cls, _, children):
      return cls(*children)

  params = {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}
  for mask in (
    Closure(object()),
    jax.tree_util.Partial(normalization.not_bias),  # without leaves
  ):
    t = normalization.elementwise(0.5, mask=mask)(params)
    np.testing.assert_allclose(t['kernel'], 1.5)
    assert t['bias'] == 1
