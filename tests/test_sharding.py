"""Promise: eight devices take the steps of one, however arrays are sharded.

Under ``jax.jit``; for ``shard_map`` and ``pmap`` see test_axis_name.py.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from optax_asam import asam
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import sharpness_aware
from tests.helpers import network
from tests.helpers.cases import ASCENTS
from tests.helpers.support import SHARDY
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

STEPS = 10


class Layout(NamedTuple):
  """Sizes of the mesh's axes, shardings, and whether they are explicit."""

  mesh: dict[str, int]
  params: dict[str, P]
  batch: P
  explicit: bool = False


WHOLE = {'kernel': P(), 'bias': P(), 'out_kernel': P(), 'out_bias': P()}
SPLIT = {
  'kernel': P('data', None),
  'bias': P('data'),
  'out_kernel': P('data', None),
  'out_bias': P('data'),
}
LAYOUTS = {
  'data parallel': Layout({'data': 8}, WHOLE, P('data')),
  'fully sharded': Layout({'data': 8}, SPLIT, P('data')),
  'tensor parallel': Layout(
    {'model': 8},
    {
      'kernel': P(None, 'model'),
      'bias': P('model'),
      'out_kernel': P('model', None),
      'out_bias': P(),
    },
    P(),
  ),
  '2-D': Layout(
    {'data': 4, 'model': 2},
    {
      'kernel': P('data', 'model'),
      'bias': P('model'),
      'out_kernel': P('model', 'data'),
      'out_bias': P('data'),
    },
    P('data'),
  ),
  'explicit, data parallel': Layout({'data': 8}, WHOLE, P('data'), True),
  'explicit, fully sharded': Layout({'data': 8}, SPLIT, P('data'), True),
}


def make_mesh(layout):
  """The mesh of a layout, in the kind that it asks for."""
  shape, names = tuple(layout.mesh.values()), tuple(layout.mesh)
  if layout.explicit:
    types = (jax.sharding.AxisType.Explicit,) * len(names)
    return jax.make_mesh(shape, names, axis_types=types)
  return Mesh(mesh_utils.create_device_mesh(shape), names)


def make_train_step(tx, gather=lambda params: params, out_shardings=None):
  """A step as in the README; ``gather`` makes parameters whole on a device."""

  @functools.partial(jax.jit, out_shardings=out_shardings)
  def train_step(params, state, batch):
    value_fn = lambda p: network.loss_fn(gather(p), batch)
    grads = jax.grad(value_fn)(params)
    updates, state = tx.update(grads, state, params, value_fn=value_fn)
    return optax.apply_updates(params, updates), state, grads

  return train_step


def init(tx, params, mesh):
  """The state, its scalars on all devices, where a step leaves them."""
  whole = NamedSharding(mesh, P())
  return jax.tree.map(
    lambda x: x if x.shape else jax.device_put(x, whole), tx.init(params)
  )


SGD = optax.sgd(0.1, momentum=0.9)
# At p = inf rho is relative to weights.
TRANSFORMATIONS = {
  'asam': asam(SGD),
  'asam, p = inf': asam(SGD, 0.05, ord=np.inf),
  'looksam': looksam(SGD, every_k=2),
  'momentum_asam': momentum_asam(SGD, rho=0.5),
  'friendly and gsam': optax.chain(
    sharpness_aware(ASCENTS['friendly'], descent.gsam()), SGD
  ),
}


def assert_split_like(tree, params, mesh, specs):
  """What has a parameter's shape is split like it; the rest are scalars."""
  shapes = {params[name].shape: name for name in specs}
  leaves = jax.tree.leaves(tree)
  for leaf in leaves:
    if leaf.shape == ():
      assert leaf.sharding.is_fully_replicated
      continue
    name = shapes[leaf.shape]
    expected = NamedSharding(mesh, specs[name]).shard_shape(leaf.shape)
    assert {s.data.shape for s in leaf.addressable_shards} == {expected}, name
  return len(leaves)


@functools.cache
def one_device(name):
  """Parameters, state and the gradient before, of each step on one device."""
  tx = TRANSFORMATIONS[name]
  params = network.make_params(np.float64)
  step, carry = make_train_step(tx), (params, tx.init(params))
  results = []
  for _ in range(STEPS):
    *carry, grads = step(*carry, network.make_batch(np.float64))
    results.append(jax.device_get((*carry, grads)))
  return results


@pytest.mark.parametrize('tx_name', TRANSFORMATIONS)
@pytest.mark.parametrize('name', LAYOUTS)
def test_layout(x64, name, tx_name):
  """One step and ten are those of one device, and shardings are kept."""
  layout = LAYOUTS[name]
  if layout.explicit and not hasattr(jax.sharding, 'AxisType'):
    pytest.skip('JAX has no explicit meshes yet')
  mesh = make_mesh(layout)

  def gather(tree):
    if not layout.explicit:
      return tree
    return jax.tree.map(
      lambda x: jax.sharding.reshard(x, NamedSharding(mesh, P())), tree
    )

  tx = TRANSFORMATIONS[tx_name]
  params = jax.device_put(
    network.make_params(np.float64),
    {leaf: NamedSharding(mesh, spec) for leaf, spec in layout.params.items()},
  )
  batch = jax.device_put(
    network.make_batch(np.float64), NamedSharding(mesh, layout.batch)
  )
  carry = params, init(tx, params, mesh)
  out_shardings = None
  if not SHARDY:  # Results that are not laid out may be split further.
    out_shardings = jax.tree.map(lambda x: x.sharding, (*carry, params))
  step = make_train_step(tx, gather, out_shardings)
  # Parameters, as many of momentum, of a direction, a perturbation or an
  # average, and scalars.
  num_leaves = {
    'looksam': 15,
    'momentum_asam': 13,
    'friendly and gsam': 15,
  }.get(tx_name, 11)
  assert assert_split_like(carry, params, mesh, layout.params) == num_leaves
  for i, expected in enumerate(one_device(tx_name)):
    *carry, grads = step(*carry, batch)
    assert_split_like((carry, grads), params, mesh, layout.params)
    if tx_name.endswith('inf'):
      network.assert_signs_are_certain(expected[2])
    if i in (0, STEPS - 1):
      assert error((*carry, grads), expected) < 1e-12
