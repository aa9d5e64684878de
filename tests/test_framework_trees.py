"""Promise: biases and normalization layers are found in all frameworks' trees.

The lists are written by hand. Where a framework initializes biases, and
nothing else, to zero, the arrays confirm them.
"""

import functools

import equinox as eqx
from flax import linen
from flax import nnx
import haiku as hk
import jax
import numpy as np
import pytest

from optax_asam import normalization


class Stack(linen.Module):
  """Layers whose names are positions."""

  def setup(self):
    """Names them."""
    self.stack = linen.Sequential([linen.Dense(4), linen.LayerNorm()])

  def __call__(self, x):
    """One after the other."""
    return self.stack(x)


class Linen(linen.Module):
  """One layer of each kind."""

  @linen.compact
  def __call__(self, x):
    """From images [2, 4, 4, 1]."""
    x = linen.Conv(4, (3, 3))(x)
    x = linen.BatchNorm(use_running_average=False)(x)
    x = linen.LayerNorm()(x).reshape(2, 16, 4)
    x = linen.MultiHeadDotProductAttention(2)(x)
    x = linen.RNN(linen.LSTMCell(4))(x)
    x = linen.RNN(linen.GRUCell(4))(x)
    x = linen.GroupNorm(2)(linen.InstanceNorm()(linen.RMSNorm(name='ln_f')(x)))
    x = linen.WeightNorm(linen.Dense(4))(Stack()(x))
    return linen.Dense(3)(x)


class Nnx(nnx.Module):
  """One layer of each kind."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.batch_norm = nnx.BatchNorm(4, rngs=rngs)
    self.layer_norm = nnx.LayerNorm(4, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    self.lstm = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs))
    self.optimized_lstm = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs))
    self.gru = nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs))
    self.norm1 = nnx.RMSNorm(4, rngs=rngs)
    self.stack = nnx.Sequential(
      nnx.Linear(4, 4, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)
    )
    self.dense = nnx.Linear(4, 3, rngs=rngs)


class Equinox(eqx.Module):
  """One layer of each kind, the last ones in a list."""

  conv: eqx.nn.Conv2d
  batch_norm: eqx.nn.BatchNorm
  layer_norm: eqx.nn.LayerNorm
  attention: eqx.nn.MultiheadAttention
  lstm: eqx.nn.LSTMCell
  gru: eqx.nn.GRUCell
  norm_proj: list[eqx.nn.Linear]  # the class tells that it is no norm
  stack: eqx.nn.Sequential
  other: list[eqx.Module]

  def __init__(self, key):
    self.conv = eqx.nn.Conv2d(1, 4, 3, key=key)
    self.batch_norm = eqx.nn.BatchNorm(4, 'batch', mode='batch')
    self.layer_norm = eqx.nn.LayerNorm((4, 5))
    self.attention = eqx.nn.MultiheadAttention(
      2,
      4,
      use_query_bias=True,
      use_key_bias=True,
      use_value_bias=True,
      use_output_bias=True,
      key=key,
    )
    self.lstm = eqx.nn.LSTMCell(4, 4, key=key)
    self.gru = eqx.nn.GRUCell(4, 4, key=key)
    self.stack = eqx.nn.Sequential(
      [eqx.nn.Linear(4, 4, key=key), eqx.nn.GroupNorm(2, 4)]
    )
    self.other = [
      eqx.nn.RMSNorm(4),
      eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=key)),
    ]
    self.norm_proj = [
      eqx.nn.Linear(4, 4, key=key),
      eqx.nn.Linear(4, 3, key=key),
    ]


class Block(hk.Module):
  """A module that makes another one in its constructor."""

  def __init__(self):
    super().__init__()
    self.norm = hk.GroupNorm(2)

  def __call__(self, x):
    """Normalizes."""
    return self.norm(x)


def haiku(x):
  """One layer of each kind, from images [2, 4, 4, 1]."""
  x = hk.Conv2D(4, 3)(x)
  x = hk.BatchNorm(True, True, 0.9)(x, True)
  x = hk.LayerNorm(-1, True, True)(x).reshape(2, 16, 4)
  x = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal())(
    x, x, x
  )
  for core in hk.LSTM(4), hk.GRU(4):
    x, _ = hk.dynamic_unroll(core, x, core.initial_state(2), time_major=False)
  x = Block()(hk.RMSNorm(-1, name='bn2')(x))
  return hk.Linear(3)(hk.Bias()(x))


IMAGES = np.ones((2, 4, 4, 1), np.float32)


def linen_params():
  """The tree of linen: nested dicts."""
  return jax.jit(Linen().init)(jax.random.key(0), IMAGES)['params']


@functools.cache
def nnx_params():
  """The tree of NNX: a State of variables."""
  _, params, _ = nnx.split(nnx.jit(Nnx)(nnx.Rngs(0)), nnx.Param, ...)
  return params


def nnx_arrays():
  """The tree that nnx.Optimizer passes on: a State of arrays."""
  if not hasattr(nnx, 'as_pure'):
    pytest.skip('Flax 0.12.7 is the first with as_pure')
  return nnx.as_pure(nnx_params())


def nnx_dict():
  """The same in nested dicts."""
  if not hasattr(nnx, 'to_pure_dict'):
    pytest.skip('Flax 0.10.4 is the first with to_pure_dict')
  return nnx.to_pure_dict(nnx_params())


def equinox_params():
  """The tree of Equinox: a module, with None where there is no parameter."""
  make_network = eqx.filter_jit(eqx.nn.make_with_state(Equinox))
  network, _ = make_network(jax.random.key(0))
  return eqx.filter(network, eqx.is_inexact_array)


def haiku_params():
  """The tree of Haiku: dicts of two levels."""
  init = jax.jit(hk.transform_with_state(haiku).init)
  params, _ = init(jax.random.key(0), IMAGES)
  return params


LINEN_BIASES = """
  Conv_0/bias BatchNorm_0/bias LayerNorm_0/bias Dense_0/bias
  MultiHeadDotProductAttention_0/query/bias
  MultiHeadDotProductAttention_0/key/bias
  MultiHeadDotProductAttention_0/value/bias
  MultiHeadDotProductAttention_0/out/bias
  LSTMCell_0/hi/bias LSTMCell_0/hf/bias LSTMCell_0/hg/bias LSTMCell_0/ho/bias
  GRUCell_0/ir/bias GRUCell_0/iz/bias GRUCell_0/in/bias GRUCell_0/hn/bias
  GroupNorm_0/bias InstanceNorm_0/bias Dense_1/bias
  Stack_0/stack/layers_0/bias Stack_0/stack/layers_1/bias
"""
NNX_BIASES = """
  conv/bias batch_norm/bias layer_norm/bias dense/bias
  attention/query/bias attention/key/bias attention/value/bias
  attention/out/bias
  lstm/cell/hi/bias lstm/cell/hf/bias lstm/cell/hg/bias lstm/cell/ho/bias
  optimized_lstm/cell/dense_h/bias gru/cell/dense_i/bias
  stack/layers/0/bias stack/layers/1/bias
"""
EQUINOX_BIASES = """
  conv/bias batch_norm/bias layer_norm/bias norm_proj/0/bias norm_proj/1/bias
  attention/query_proj/bias attention/key_proj/bias attention/value_proj/bias
  attention/output_proj/bias lstm/bias gru/bias gru/bias_n
  stack/layers/0/bias stack/layers/1/bias other/0/bias other/1/layer/bias
"""
HAIKU_BIASES = """
  conv2_d/b batch_norm/offset layer_norm/offset linear/b bias/b
  multi_head_attention/query/b multi_head_attention/key/b
  multi_head_attention/value/b multi_head_attention/linear/b
  lstm/linear/b gru/b block/~/group_norm/offset
"""
LINEN_NORMS = """
  BatchNorm_0/scale BatchNorm_0/bias LayerNorm_0/scale LayerNorm_0/bias
  GroupNorm_0/scale GroupNorm_0/bias InstanceNorm_0/scale InstanceNorm_0/bias
  ln_f/scale Stack_0/stack/layers_1/scale Stack_0/stack/layers_1/bias
"""
NNX_NORMS = """
  batch_norm/scale batch_norm/bias layer_norm/scale layer_norm/bias norm1/scale
  stack/layers/1/scale stack/layers/1/bias
"""
EQUINOX_NORMS = """
  batch_norm/weight batch_norm/bias layer_norm/weight layer_norm/bias
  stack/layers/1/weight stack/layers/1/bias other/0/weight other/0/bias
"""
HAIKU_NORMS = """
  batch_norm/scale batch_norm/offset layer_norm/scale layer_norm/offset
  bn2/scale block/~/group_norm/scale block/~/group_norm/offset
"""


def path_name(path):
  """A key path as in the lists above."""
  names = [
    str(
      getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', '')))
    )
    for entry in path
  ]
  wrapped = names[-1] in ('value', 'raw_value')  # An NNX variable.
  return '/'.join(names[:-1] if wrapped else names)


def names(mask, value):
  """The names at which the mask is ``value``."""
  leaves = jax.tree.leaves_with_path(mask)
  return {path_name(path) for path, leaf in leaves if leaf is value}


@pytest.mark.parametrize(
  ('make_params', 'biases', 'norms', 'zero_biases'),
  [
    pytest.param(linen_params, LINEN_BIASES, LINEN_NORMS, True, id='linen'),
    pytest.param(nnx_params, NNX_BIASES, NNX_NORMS, True, id='nnx'),
    pytest.param(nnx_arrays, NNX_BIASES, NNX_NORMS, True, id='nnx arrays'),
    pytest.param(nnx_dict, NNX_BIASES, NNX_NORMS, True, id='nnx dict'),
    pytest.param(
      equinox_params, EQUINOX_BIASES, EQUINOX_NORMS, False, id='equinox'
    ),
    pytest.param(haiku_params, HAIKU_BIASES, HAIKU_NORMS, True, id='haiku'),
  ],
)
def test_masks(make_params, biases, norms, zero_biases):
  """True at the leaves in the list of ``norms`` or not of biases alone."""
  params = make_params()
  mask = normalization.not_bias(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  assert names(mask, False) == set(biases.split())
  if zero_biases:
    zeros = jax.tree.map(lambda w: bool((w == 0).all()), params)
    assert jax.tree.leaves(zeros) == [not x for x in jax.tree.leaves(mask)]
  mask = normalization.normalization_layers(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  assert names(mask, True) == set(norms.split())


class ActorCritic(nnx.Module):
  """Two heads, one of which is called as NNX calls the array of a variable."""

  def __init__(self):
    self.fc, self.value = Head(), Head()


class Head(nnx.Module):
  """A layer."""

  def __init__(self):
    self.fc = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def test_layer_called_value():
  """Masks by name tell it from the other one, whole or as a prefix."""
  params = nnx.state(ActorCritic(), nnx.Param)
  layer = lambda selected: {'kernel': selected, 'bias': selected}
  for mask in (
    {'fc': True, 'value': False},
    {'fc': {'fc': layer(True)}, 'value': {'fc': layer(False)}},
    {'fc': {'fc': True}, 'value': False},
  ):
    t = normalization.elementwise(0.5, mask=mask)(params)
    selected = {
      path_name(path)
      for path, x in jax.tree.leaves_with_path(t)
      if not isinstance(x, int)
    }
    assert selected == {'fc/fc/kernel', 'fc/fc/bias'}
