"""Promise: the steps of docs/devices.md do what the page says of them.

A section with code is tested by ``test_<its title>``, which runs that code. The
gradient that is expected is made of one group after the other, on one device.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from optax_asam import asam
import pages
from support import error
from support import needs_microbatching
from support import needs_pcast

PAGE = pages.read_page('devices')
SNIPPETS = pages.read_snippets(PAGE)

EXAMPLES, M = 16, 4
RHO, LEARNING_RATE = 0.5, 0.1
BASE_TX = optax.sgd(LEARNING_RATE)


def loss_fn(params, batch):
  """The squared error of a layer."""
  x, y = batch
  return ((jnp.tanh(x @ params['kernel'] + params['bias']) - y) ** 2).mean()


@pytest.fixture
def batch():
  """Inputs [n, 3] and targets [n, 2]."""
  rng = np.random.default_rng(1)
  return tuple(
    jnp.asarray(rng.standard_normal((EXAMPLES, size)), jnp.float32)
    for size in (3, 2)
  )


def take(batch, indices):
  """Some examples of a batch."""
  return jax.tree.map(lambda x: x[np.asarray(indices)], batch)


def descended(params, batch, groups):
  """Parameters after SGD on the mean of the groups' gradients of ASAM.

  Args:
    params: the parameters.
    batch: the batch.
    groups: the indices of the examples of each group.
  """
  tx = asam(optax.identity(), rho=RHO)
  each = []
  for indices in groups:
    grad_fn = lambda p, indices=indices: jax.grad(loss_fn)(
      p, take(batch, indices)
    )
    updates, _ = tx.update(
      grad_fn(params), tx.init(params), params, grad_fn=grad_fn
    )
    each.append(updates)
  return jax.tree.map(
    lambda w, *g: w - LEARNING_RATE * sum(g) / len(g), params, *each
  )


def every_nth(n):
  """The groups of optax.microbatching, n of them."""
  return [range(j, EXAMPLES, n) for j in range(n)]


def side_by_side(size):
  """The groups of ``size`` examples that follow one another."""
  return [range(i, i + size) for i in range(0, EXAMPLES, size)]


def on_mesh(train_step, mesh, tx, params, batch):
  """Parameters after a step inside of shard_map over all axes of a mesh."""
  whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
  step = jax.shard_map(
    train_step, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole
  )
  return jax.jit(step)(params, tx.init(params), batch)[0]


def test_every_snippet_is_tested():
  """Every section with code has its test."""
  pages.assert_all_tested(PAGE, SNIPPETS, globals())


def test_sharded_arrays(snippet, params, batch):
  """One perturbation for the whole batch, and the kernel stays split."""
  mesh = Mesh(np.array(jax.devices()[:2]), ('data',))
  split = NamedSharding(mesh, PartitionSpec(None, 'data'))
  tx = asam(BASE_TX, rho=RHO)

  def train_step(params, opt_state, batch):
    grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    updates, opt_state = tx.update(
      grad_fn(params), opt_state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), opt_state

  names = snippet(
    params=params,
    shardings={'kernel': split, 'bias': NamedSharding(mesh, PartitionSpec())},
    batch=batch,
    mesh=mesh,
    tx=tx,
    train_step=train_step,
    NamedSharding=NamedSharding,
    PartitionSpec=PartitionSpec,
  )
  result = names['params']
  assert error(result, descended(params, batch, side_by_side(EXAMPLES))) < 1e-6
  shards = {shard.data.shape for shard in result['kernel'].addressable_shards}
  assert shards == {(3, 1)}
  for scalar in jax.tree.leaves(names['opt_state']):
    assert len(scalar.sharding.device_set) == 2


@needs_pcast
def test_shard_map_and_pmap(snippet, params, batch):
  """A perturbation for the examples of each device."""
  mesh = Mesh(np.array(jax.devices()[: EXAMPLES // M]), ('devices',))
  names = snippet(base_tx=BASE_TX)
  result = on_mesh(names['train_step'], mesh, names['tx'], params, batch)
  assert error(result, descended(params, batch, side_by_side(M))) < 1e-6


def run_recipe(snippet, params, batch):
  """Parameters after the code of a section."""
  names = snippet(
    params=params,
    batch=batch,
    m=M,
    base_tx=BASE_TX,
    opt_state=BASE_TX.init(params),
  )
  assert names['loss'] == pytest.approx(loss_fn(params, batch))
  return optax.apply_updates(params, names['updates'])


def test_all_groups_at_once(snippet, params, batch):
  """Groups of every n-th example."""
  expected = descended(params, batch, every_nth(EXAMPLES // M))
  assert error(run_recipe(snippet, params, batch), expected) < 1e-6


@needs_microbatching
def test_one_group_after_the_other(snippet, params, batch):
  """The same groups."""
  expected = descended(params, batch, every_nth(EXAMPLES // M))
  assert error(run_recipe(snippet, params, batch), expected) < 1e-6


@needs_pcast
def test_a_group_on_several_devices(snippet, params, batch):
  """Two devices of two examples share a perturbation, four pairs do not."""
  devices = np.array(jax.devices()).reshape(EXAMPLES // M, 2)
  mesh = Mesh(devices, ('groups', 'members'))
  names = snippet(base_tx=BASE_TX)
  result = on_mesh(names['train_step'], mesh, names['tx'], params, batch)
  assert error(result, descended(params, batch, side_by_side(M))) < 1e-6


def test_groups_matter(params, batch):
  """What the tests above would not see is a perturbation for other groups."""
  results = [
    descended(params, batch, groups)
    for groups in (
      side_by_side(EXAMPLES),
      side_by_side(M),
      side_by_side(M // 2),
      every_nth(EXAMPLES // M),
    )
  ]
  for one, other in itertools.combinations(results, 2):
    assert error(one, other) > 1e-4
