"""Two large networks in plain JAX, with their shardings."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

PyTree = Any


class Network(NamedTuple):
  """A network as a compiler needs it: shapes alone.

  Those of this module have parameters in float32, because bfloat16 ones would
  lose most of the perturbation, and compute in bfloat16.

  Attributes:
    mesh_axes: Names and sizes of the mesh axes.
    params: A shape for each parameter.
    specs: A ``PartitionSpec`` for each parameter.
    batch: A shape for each array of the global batch.
    loss_fn: From a mesh to a function of parameters and a batch.
  """

  mesh_axes: dict[str, int]
  params: PyTree
  specs: PyTree
  batch: PyTree
  loss_fn: Callable[[Mesh], Callable[[PyTree, PyTree], jax.Array]]

  def mesh(self, devices: Sequence[Any]) -> Mesh:
    """The mesh, of the first of these devices."""
    sizes = tuple(self.mesh_axes.values())
    return Mesh(
      np.array(devices[: math.prod(sizes)]).reshape(sizes),
      tuple(self.mesh_axes),
    )


def count(params: PyTree) -> int:
  """The number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def vit(
  devices: int,
  *,
  layers: int = 24,
  width: int = 1024,
  hidden: int = 4096,
  heads: int = 16,
  pixels: int = 224,
  patch: int = 16,
  classes: int = 1000,
  batch_per_device: int = 16,
) -> Network:
  """A vision transformer, by default ViT-L/16, fully sharded over all devices.

  It scans over the layers. Each parameter is sharded along its longest axis
  that divides evenly.
  """
  norm = lambda *stack: {'scale': (*stack, width), 'bias': (*stack, width)}
  dense = lambda *shape: {'kernel': shape, 'bias': (*shape[:-2], shape[-1])}
  tokens = (pixels // patch) ** 2 + 1
  params = _shapes(
    {
      'patches': dense(3 * patch**2, width),
      'class_token': (1, 1, width),
      'positions': (1, tokens, width),
      'layers': {
        'norm_1': norm(layers),
        'qkv': dense(layers, width, 3 * width),
        'out': dense(layers, width, width),
        'norm_2': norm(layers),
        'up': dense(layers, width, hidden),
        'down': dense(layers, hidden, width),
      },
      'norm': norm(),
      'head': dense(width, classes),
    }
  )

  def spec(path, leaf):
    even = [n if n % devices == 0 else 0 for n in leaf.shape]
    if path[0].key == 'layers':
      even[0] = 0  # layers are gathered one at a time
    if not any(even):
      return P()
    axis = even.index(max(even))
    return P(*[None] * axis, 'fsdp')

  def loss_fn(mesh):
    constrain = _constrain_batch(mesh)

    def attend(p, x):
      q, k, v = jnp.split(_dense(p['qkv'], x), 3, axis=-1)
      q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in (q, k, v))
      y = jax.nn.dot_product_attention(q, k, v)
      return _dense(p['out'], y.reshape(x.shape))

    def layer(x, p):
      x = constrain(x + attend(p, _layer_norm(p['norm_1'], x)))
      y = jax.nn.gelu(_dense(p['up'], _layer_norm(p['norm_2'], x)))
      return constrain(x + _dense(p['down'], y)), None

    def loss(params, batch):
      n, side = len(batch['images']), pixels // patch
      x = batch['images'].reshape(n, side, patch, side, patch, 3)
      x = x.swapaxes(2, 3).reshape(n, side**2, -1)
      x = _dense(params['patches'], constrain(x))
      first = jnp.broadcast_to(params['class_token'], (n, 1, width))
      x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
      x = constrain(x + params['positions'].astype(x.dtype))
      x, _ = jax.lax.scan(layer, x, params['layers'])
      logits = _dense(params['head'], _layer_norm(params['norm'], x[:, 0]))
      return _cross_entropy(logits, batch['labels'])

    return loss

  examples = batch_per_device * devices
  batch = {
    'images': jax.ShapeDtypeStruct((examples, pixels, pixels, 3), jnp.bfloat16),
    'labels': jax.ShapeDtypeStruct((examples,), jnp.int32),
  }
  specs = jax.tree_util.tree_map_with_path(spec, params)
  return Network({'fsdp': devices}, params, specs, batch, loss_fn)


def decoder(
  devices: int,
  *,
  tensor: int = 4,
  layers: int = 32,
  width: int = 4096,
  hidden: int = 14336,
  heads: int = 32,
  kv_heads: int = 8,
  vocabulary: int = 128256,
  length: int = 4096,
  sequences_per_row: int = 2,
) -> Network:
  """A decoder, by default with 8B parameters, on a mesh of fsdp x tensor.

  It scans over the layers, each of which is rematerialized. Heads, hidden units
  and vocabulary are sharded over 'tensor'.
  """
  size = width // heads
  columns, rows = P(None, 'fsdp', 'tensor'), P(None, 'tensor', 'fsdp')
  layout = {
    'embedding': ((vocabulary, width), P('tensor', 'fsdp')),
    'layers': {
      'norm_1': ((layers, width), P()),
      'q': ((layers, width, heads * size), columns),
      'k': ((layers, width, kv_heads * size), columns),
      'v': ((layers, width, kv_heads * size), columns),
      'out': ((layers, heads * size, width), rows),
      'norm_2': ((layers, width), P()),
      'gate': ((layers, width, hidden), columns),
      'up': ((layers, width, hidden), columns),
      'down': ((layers, hidden, width), rows),
    },
    'norm': ((width,), P()),
    'head': ((width, vocabulary), P('fsdp', 'tensor')),
  }
  pair = lambda leaf: isinstance(leaf, tuple)
  params = _shapes(jax.tree.map(lambda leaf: leaf[0], layout, is_leaf=pair))
  specs = jax.tree.map(lambda leaf: leaf[1], layout, is_leaf=pair)

  def loss_fn(mesh):
    constrain = _constrain_batch(mesh)

    def attend(p, x):
      split = lambda name: (x @ _bf16(p[name])).reshape(*x.shape[:2], -1, size)
      q, k, v = _rotate(split('q')), _rotate(split('k')), split('v')
      y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
      return y.reshape(x.shape) @ _bf16(p['out'])

    @jax.checkpoint
    def layer(x, p):
      x = constrain(x + attend(p, _rms_norm(p['norm_1'], x)))
      y = _rms_norm(p['norm_2'], x)
      y = jax.nn.silu(y @ _bf16(p['gate'])) * (y @ _bf16(p['up']))
      return constrain(x + y @ _bf16(p['down'])), None

    def loss(params, batch):
      # Gather the parameter over 'fsdp'; else XLA would gather the tokens.
      embedding = jax.lax.with_sharding_constraint(
        _bf16(params['embedding']), NamedSharding(mesh, P('tensor'))
      )
      x = constrain(embedding[batch['tokens']])
      x, _ = jax.lax.scan(layer, x, params['layers'])
      logits = _rms_norm(params['norm'], x) @ _bf16(params['head'])
      return _cross_entropy(logits, batch['targets'])

    return loss

  fsdp = devices // tensor
  tokens = jax.ShapeDtypeStruct((fsdp * sequences_per_row, length), jnp.int32)
  batch = {'tokens': tokens, 'targets': tokens}
  axes = {'fsdp': fsdp, 'tensor': tensor}
  return Network(axes, params, specs, batch, loss_fn)


def _shapes(tree: PyTree) -> PyTree:
  """A float32 ``ShapeDtypeStruct`` for each shape."""
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    tree,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def _constrain_batch(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Keeps activations sharded by examples, so that parameters are gathered."""
  sharding = NamedSharding(mesh, P('fsdp'))
  return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def _bf16(x: jax.Array) -> jax.Array:
  return x.astype(jnp.bfloat16)


def _dense(p: PyTree, x: jax.Array) -> jax.Array:
  return x @ _bf16(p['kernel']) + _bf16(p['bias'])


def _layer_norm(p: PyTree, x: jax.Array) -> jax.Array:
  y = x.astype(jnp.float32)
  y = jax.nn.standardize(y, epsilon=1e-6)
  return _bf16(y * p['scale'] + p['bias'])


def _rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
  return _bf16(y * scale)


def _rotate(x: jax.Array) -> jax.Array:
  """Rotary embeddings of queries or keys [batch, length, heads, size]."""
  half = x.shape[-1] // 2
  frequencies = 500000.0 ** (-jnp.arange(half) / half)
  angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  return _bf16(jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  ).mean()
