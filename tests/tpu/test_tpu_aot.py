"""Promise: what ASAM adds to two gradients on TPU, by its compiler.

The compiler is part of libtpu and needs no TPU; without it these tests fail.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax
import pytest

from benchmarks import compiled
from benchmarks import large_models
from benchmarks import steps
from benchmarks import tpu_aot
from optax_asam import asam
from optax_asam import sam
from tests.helpers import pages

TOPOLOGY = 'v5e:2x4'
SIZES = {'layers': 2, 'width': 128, 'hidden': 256}
NETWORKS = {
  'fully sharded': large_models.vit(
    8, **SIZES, heads=4, pixels=32, patch=8, classes=16, batch_per_device=2
  ),
  'two axes': large_models.decoder(
    8, **SIZES, heads=8, kv_heads=4, vocabulary=256, length=16
  ),
}


def dense_layers(arrays):
  """A network of so many parameter arrays, on one chip."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = [(array(128, 128), array(128)) for _ in range(arrays // 2)]

  def loss_fn(params, x):
    for kernel, bias in params:
      x = jnp.tanh(x @ kernel + bias)
    return jnp.mean(x**2)

  return large_models.Network(
    mesh_axes={'fsdp': 1},
    params=params,
    specs=jax.tree.map(lambda leaf: P(), params),
    batch=array(8, 128),
    loss_fn=lambda mesh: loss_fn,
  )


def compile_step(network, make_method):
  """Compiles the step of a method."""
  return steps.compile_step(
    make_method, optax.adamw(1e-3), network, tpu_aot.chips(TOPOLOGY)
  )


@pytest.mark.parametrize('name', NETWORKS)
def test_scalar_all_reduces_alone(name):
  """At most one per sharding, 4 bytes per array, two copies of memory."""
  network = NETWORKS[name]
  found, reference = (
    compiled.read(compile_step(network, steps.METHODS[method]))
    for method in ('asam', 'two_gradients')
  )
  added = compiled.added(found.collectives, reference.collectives)
  temporary_bytes = found.temporary_bytes - reference.temporary_bytes
  assert steps.objections(added, temporary_bytes, network) == []
  assert added  # the norm is that of all shards
  totals = compiled.total_by_kind(reference.collectives).values()
  assert sum(each.bytes for each in totals) > steps.bytes_per_device(network)


@functools.cache
def count(arrays, make_method):
  """The number of instructions of a step with so many parameter arrays."""
  return compiled.instructions(compile_step(dense_layers(arrays), make_method))


@pytest.mark.parametrize('ord', [2, jnp.inf])
@pytest.mark.parametrize('alias', [sam, asam])
def test_instructions(alias, ord):
  """The program grows linearly, and by little compared with two gradients."""
  method = lambda model, tx: steps.sharp(model, alias(tx, ord=ord))
  for arrays in (40, 120):
    two = count(arrays, steps.METHODS['two_gradients'])
    assert count(arrays, method) <= 1.7 * two
  assert count(120, method) <= 3.2 * count(40, method)


def test_your_own_train_step():
  """The program of the page reports what a step needs."""
  [code] = pages.read_snippets(pages.read_page('tpu'))[
    'test_your_own_train_step'
  ]
  memory = pages.run_snippet(code)['compiled'].memory_analysis()
  # Parameters and two moments on each chip, and an eighth of the batch.
  size = 3 * 128 * 256 * 4 + 64 * 128 * 4 // 8
  assert size <= memory.argument_size_in_bytes < size + 8192
