"""The models that are timed, and how they are trained.

Parameters and other state are shapes until :func:`fill` gives them values.
"""

from collections.abc import Callable
import functools
import math
import re
from typing import Any
from typing import NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import workloads
from experiments import models
from experiments.models import resnet

PyTree = Any


class Block(nn.Module):
  """Attention and a feed-forward layer, each after a LayerNorm."""

  heads: int
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [n, length, width] to the same shape."""
    n, length, width = x.shape
    qkv = nn.Dense(3 * width)(nn.LayerNorm()(x))
    q, k, v = jnp.split(qkv.reshape(n, length, 3 * self.heads, -1), 3, axis=2)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
    x += nn.Dense(width)(y.reshape(x.shape))
    y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
    return x + nn.Dense(width)(y)


class ViT(nn.Module):
  """A vision transformer, by default ViT-S/16."""

  num_classes: int = 1000
  layers: int = 12
  width: int = 384
  heads: int = 6
  patch: int = 16

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images [n, h, w, 3] to logits [n, num_classes]."""
    del train
    size = (self.patch, self.patch)
    x = nn.Conv(self.width, size, strides=size, padding='VALID')(images)
    x = x.reshape(len(x), -1, self.width)
    normal = nn.initializers.normal()
    first = self.param('class_token', normal, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
    x += self.param('positions', normal, (1, *x.shape[1:]))
    for _ in range(self.layers):
      x = Block(self.heads, causal=False)(x)
    return nn.Dense(self.num_classes)(nn.LayerNorm()(x)[:, 0])


class LanguageModel(nn.Module):
  """A decoder of six layers."""

  vocab_size: int = 8192
  layers: int = 6
  width: int = 512
  heads: int = 8

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps tokens [n, length] to logits [n, length, vocab_size]."""
    del train
    x = nn.Embed(self.vocab_size, self.width)(tokens)
    shape = (1, *x.shape[1:])
    x += self.param('positions', nn.initializers.normal(), shape)
    for _ in range(self.layers):
      x = Block(self.heads, causal=True)(x)
    return nn.Dense(self.vocab_size, use_bias=False)(nn.LayerNorm()(x))


class Deep(nn.Module):
  """Many small layers, unrolled: two arrays each."""

  num_classes: int = 10
  layers: int = 300
  width: int = 128

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps features [n, width] to logits [n, num_classes]."""
    del train
    for _ in range(self.layers):
      x += 0.05 * nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(self.num_classes)(x)


class Twin(NamedTuple):
  """A model as an NNX module.

  Attributes:
    loss_fn: From the module and a batch to a scalar; it updates statistics.
    graphdef: The structure of the module.
    params: A shape for each parameter, an ``nnx.State``.
    model_state: A shape for each other variable, an ``nnx.State``.
  """

  loss_fn: Callable[[Any, PyTree], jax.Array]
  graphdef: Any
  params: Any
  model_state: Any


class Model(NamedTuple):
  """What is trained.

  Attributes:
    loss_fn: From parameters, other state and a batch to a scalar and new state.
    params: A shape for each parameter.
    model_state: A shape for each other variable, such as running statistics.
    batch: A shape for each array of a batch.
    module: The Flax linen module behind the loss, for its twin.
  """

  loss_fn: Callable[..., tuple[jax.Array, PyTree]]
  params: PyTree
  model_state: PyTree
  batch: PyTree
  module: Any = None

  def twin(self) -> Twin:
    """The same as an NNX module."""

    def make_module():
      module = nnx.bridge.ToNNX(self.module, rngs=nnx.Rngs(0))
      inputs = self.batch['inputs']
      module.lazy_init(jnp.zeros(inputs.shape, inputs.dtype))
      module.to_nnx__rngs = None  # nothing is drawn in training
      return module

    def loss_fn(module, batch):
      mutable = list(self.model_state) or False
      logits = module(batch['inputs'], train=True, mutable=mutable)
      return _cross_entropy(logits, batch)

    return Twin(
      loss_fn, *nnx.split(nnx.eval_shape(make_module), nnx.Param, ...)
    )


OPTIMIZERS = {
  'sgd': lambda rate: optax.sgd(rate, momentum=0.9),
  'adamw': optax.adamw,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
  'ResNet-20': lambda: resnet.ResNet(10, depth=20),
  'ViT-S/16': ViT,
  'LM': LanguageModel,
  'WRN-16-4': lambda: resnet.WideResNet(10, depth=16, widening=4),
  'MLP': lambda: models.MLP(10, hidden_sizes=(1024, 1024, 1024)),
  '300 layers': Deep,
  'tiny': lambda: models.CNN(10, (4,), 8, batch_norm=True),
}


def make(name: str, device: str) -> Model:
  """The model of a workload, for its batches on 'cpu' or 'gpu'."""
  workload = workloads.WORKLOADS[name]
  dtype = jnp.int32 if workload.is_text else jnp.float32
  batch = {
    'inputs': jax.ShapeDtypeStruct(workload.inputs[device], dtype),
    'labels': jax.ShapeDtypeStruct(workload.labels(device), jnp.int32),
  }
  return from_module(MODULES[name](), batch)


def from_module(module: nn.Module, batch: PyTree) -> Model:
  """A model from a module that maps ``batch['inputs']`` to logits."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = dict(jax.eval_shape(module.init, key, batch['inputs']))
  return Model(
    loss_fn=functools.partial(_loss_fn, module),
    params=variables.pop('params'),
    model_state=variables,
    batch=batch,
    module=module,
  )


def optimizer(name: str) -> optax.GradientTransformation:
  """The base optimizer of a workload."""
  base = workloads.WORKLOADS[name].base
  return OPTIMIZERS[base](workloads.LEARNING_RATES[base])


def random_batch(name: str, model: Model) -> PyTree:
  """Normal inputs or tokens, and labels."""
  rng = np.random.default_rng(0)
  num_classes = workloads.WORKLOADS[name].num_classes

  def draw(leaf):
    if leaf.dtype == jnp.int32:
      return jnp.asarray(rng.integers(num_classes, size=leaf.shape), jnp.int32)
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))

  return jax.tree.map(draw, model.batch)


def fill(shapes: PyTree) -> PyTree:
  """Plausible values, by name and without compiling an initialization."""
  # Few are drawn and then repeated, which is faster.
  noise = np.random.default_rng(0).standard_normal(99_991, np.float32)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if re.search('scale|var', name):
      value = np.ones(leaf.shape)
    elif re.search('bias|mean', name):
      value = np.zeros(leaf.shape)
    else:
      fan_in = max(1, math.prod(leaf.shape[:-1]))
      value = np.resize(noise, leaf.shape) / np.float32(fan_in**0.5)
    return jnp.array(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _loss_fn(module, params, model_state, batch):
  """The mean cross-entropy of a forward pass in training, and new state."""
  logits, model_state = module.apply(
    {'params': params, **model_state},
    batch['inputs'],
    train=True,
    mutable=list(model_state),
  )
  return _cross_entropy(logits, batch), dict(model_state)


def _cross_entropy(logits, batch):
  """The mean cross-entropy."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['labels']
  ).mean()
