"""Promise: on TPU, ASAM adds scalar all-reduces to two plain gradients.

The compiler for TPU says so, for a slice that nobody has to own. It is part of
libtpu, without which these tests fail.
"""

import functools

import jax
from jax.experimental import topologies
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import compiled
import large_models
from optax_asam import asam
from optax_asam import sharpness_aware
import pages
import steps
import tpu_aot

TOPOLOGY = 'v5e:2x4'
NETWORKS = {
  'fully sharded': large_models.vit(
    8,
    layers=2,
    width=128,
    hidden=256,
    heads=4,
    pixels=32,
    patch=8,
    classes=16,
    batch_per_device=2,
  ),
  'two axes': large_models.decoder(
    8,
    tensor=4,
    layers=2,
    width=128,
    hidden=256,
    heads=8,
    kv_heads=4,
    vocabulary=256,
    length=16,
  ),
}


@functools.cache
def mesh_of(name):
  """The mesh of a network."""
  return NETWORKS[name].mesh(tpu_aot.chips(TOPOLOGY))


def cost(name, step, init):
  """The cost of a step of a network."""
  program = steps.compile_step(
    step, init, NETWORKS[name], mesh_of(name), batch=PartitionSpec('fsdp')
  )
  return compiled.read(program)


@functools.cache
def two_gradients(name):
  """The cost of two plain gradients."""
  loss_fn = NETWORKS[name].loss_fn(mesh_of(name))
  init, all_steps = steps.make_steps(loss_fn, optax.adamw(1e-3))
  return cost(name, all_steps['two gradients'], init)


def compare(name, step, init):
  """What a step adds to two plain gradients, and what is wrong with it."""
  found, reference = cost(name, step, init), two_gradients(name)
  added = compiled.added(found.collectives, reference.collectives)
  return added, steps.objections(
    added,
    found.temporary_bytes - reference.temporary_bytes,
    NETWORKS[name],
  )


@pytest.mark.parametrize('name', NETWORKS)
def test_two_gradients_communicate(name):
  """The programs are read: parameters are gathered, gradients are reduced."""
  network, found = NETWORKS[name], two_gradients(name)
  size = steps.bytes_per_device(network)
  moved = sum(
    total.bytes for total in compiled.total_by_kind(found.collectives).values()
  )
  assert moved > size
  assert found.argument_bytes > 3 * size  # parameters and Adam's moments
  assert found.alias_bytes > 3 * size
  assert found.peak_bytes < tpu_aot.HBM


@pytest.mark.parametrize('name', NETWORKS)
def test_scalar_all_reduces_alone(name):
  """At most one a way of sharding, 4 bytes a leaf, two copies of memory."""
  loss_fn = NETWORKS[name].loss_fn(mesh_of(name))
  init, all_steps = steps.make_steps(loss_fn, optax.adamw(1e-3))
  added, objections = compare(name, all_steps['asam'], init)
  assert objections == []
  assert added  # the norm is that of all shards


def test_gathering_norm_is_found():
  """A norm of ravelled parameters fails the check."""
  norm = lambda tree: jnp.linalg.norm(ravel_pytree(tree)[0])
  ascent = optax.stateless(
    lambda grads, params: optax.tree.scale(0.05 / norm(grads), grads)
  )
  tx = optax.chain(sharpness_aware(ascent), optax.adamw(1e-3))
  loss_fn = NETWORKS['two axes'].loss_fn(mesh_of('two axes'))
  _, objections = compare('two axes', steps.sharp_step(loss_fn, tx), tx.init)
  assert any('all-gather' in objection for objection in objections)


def test_your_own_train_step():
  """The code of the page says what a step needs."""
  [code] = pages.read_snippets(pages.read_page('tpu'))[
    'test_your_own_train_step'
  ]
  loss_fn = lambda params, x: jnp.mean((x @ params) ** 2)
  tx = asam(optax.adamw(1e-3), rho=0.5)

  def train_step(params, opt_state, batch):
    grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    updates, opt_state = tx.update(
      grad_fn(params), opt_state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), opt_state

  names = pages.run_snippet(
    code,
    Mesh=Mesh,
    NamedSharding=NamedSharding,
    PartitionSpec=PartitionSpec,
    batch=jax.ShapeDtypeStruct((64, 128), jnp.float32),
    init_params=lambda key: jax.random.normal(key, (128, 256)),
    np=np,
    topologies=topologies,
    train_step=train_step,
    tx=tx,
  )
  memory = names['compiled'].memory_analysis()
  # Parameters and two moments on each chip, and an eighth of the batch.
  size = 3 * 128 * 256 * 4 + 64 * 128 * 4 // 8
  assert size <= memory.argument_size_in_bytes < size + 8192
