"""Promise: to two gradients ASAM adds scalars that are sent, and little memory.

Read from programs that are compiled for eight devices, and not run.
"""

import functools
import json
import pathlib

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import optax
import pytest

import collectives
import compiled
from optax_asam import sharpness_aware
import pages
import steps
from support import SHARDY

needs_shardy = pytest.mark.skipif(
  not SHARDY, reason='the old partitioner divides other work than is given'
)
RESULTS = (
  pathlib.Path(collectives.__file__).parent / 'results' / 'collectives.json'
)
DEVICES = 8


@functools.cache
def cost(layout, step):
  """The cost of one of the steps that are compared."""
  return collectives.measure(layout, DEVICES, step)


def compare(layout, found):
  """What a cost has beyond that of two gradients, and what is wrong with it."""
  reference = cost(layout, 'two gradients')
  added = compiled.added(found.collectives, reference.collectives)
  return added, steps.objections(
    added,
    found.temporary_bytes - reference.temporary_bytes,
    collectives.network(layout, DEVICES),
    by_axis=True,
  )


@pytest.mark.parametrize('layout', collectives.LAYOUTS)
def test_two_gradients_communicate(layout):
  """The programs are read: all that is sharded is sent about, twice."""
  one, two = (
    sum(each.bytes * each.count for each in cost(layout, name).collectives)
    for name in ('base', 'two gradients')
  )
  assert one > 2**20
  assert two >= 1.2 * one


@needs_shardy
@pytest.mark.parametrize('step', ['sam', 'asam'])
@pytest.mark.parametrize('layout', collectives.LAYOUTS)
def test_scalars_alone(layout, step):
  """Four bytes for a leaf and axis by which it is sharded; two copies."""
  added, objections = compare(layout, cost(layout, step))
  assert objections == []
  # A norm of all shards takes a sum over devices; of whole arrays, none.
  assert bool(added) == (layout != 'replicated')


def ravelled_norm(grads):
  """The norm of one long vector."""
  return jnp.linalg.norm(ravel_pytree(grads)[0])


def vdot_norm(grads):
  """The norm by products of flattened arrays."""
  return jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))


@pytest.mark.parametrize('norm', [ravelled_norm, vdot_norm])
def test_gathering_norms_are_found(norm):
  """Norms that gather what is sharded fail the check above."""
  ascent = optax.stateless(
    lambda grads, params: optax.tree.scale(0.05 / norm(grads), grads)
  )
  tx = optax.chain(sharpness_aware(ascent), collectives.BASE_TX)
  step = steps.sharp_step(collectives.loss_fn, tx)
  net = collectives.network('2-D', DEVICES)
  found = collectives.compile_for(net, step, tx.init)
  _, objections = compare('2-D', compiled.read(found))
  assert any('all-gather' in objection for objection in objections)


def test_page():
  """The page has the recorded table."""
  results = json.loads(RESULTS.read_text())
  assert collectives.table(results) in pages.read_page('devices')


def test_recorded_results():
  """Every case is there, and devices that share parameters send gradients."""
  results = json.loads(RESULTS.read_text())
  cases = {
    (case['layout'], case['devices'], case['step']) for case in results['cases']
  }
  assert cases == {
    (layout, devices, step)
    for layout in collectives.LAYOUTS
    for devices in collectives.DEVICES
    for step in steps.NAMES
  }
  for case in results['cases']:
    if case['layout'] == 'replicated':
      total = sum(each['bytes'] for each in case['collectives'].values())
      # The gradients; one device sends nothing.
      assert (total > 0) == (case['devices'] > 1)
