"""Promise: axis_name averages what leaves, and replicas never diverge."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from optax_asam import asam
from support import error

DEVICES = 8


def loss_fn(params, x):
  """A smooth loss of a batch [n, 3]."""
  return jnp.mean((jnp.tanh(x * params['w']) + params['b']) ** 2)


needs_pcast = pytest.mark.skipif(
  not hasattr(jax.lax, 'pcast'), reason='JAX has no jax.lax.pcast yet'
)


def shard_map(function, *, check_vma=True, **kwargs):
  """``jax.shard_map``, also where JAX keeps it in its experimental part."""
  if hasattr(jax, 'shard_map'):
    return jax.shard_map(function, check_vma=check_vma, **kwargs)
  from jax.experimental.shard_map import shard_map

  return shard_map(function, check_rep=check_vma, **kwargs)


def average_descent(g, perturbed_g):
  """A descent that depends on both gradients, and not linearly."""
  return jax.tree.map(lambda a, b: a * b, g, perturbed_g)


@pytest.fixture
def params():
  """A vector and a bias."""
  return {'w': jnp.arange(1.0, 4.0), 'b': jnp.ones(3)}


@pytest.fixture
def batch():
  """Two examples a device."""
  x = np.random.default_rng(0).standard_normal((2 * DEVICES, 3))
  return jnp.asarray(x, jnp.float32)


def reference_run(params, batch, tx, steps, *, shared, every_k, descent):
  """On one device: a perturbation a group, then the mean of the gradients.

  ``tx`` here is the base; the perturbations come from asam around sgd(1).
  """
  groups = batch.reshape(DEVICES, -1, 3)
  mean = lambda tree: jax.tree.map(lambda x: x.mean(0), tree)
  extract = asam(optax.scale(1.0), rho=0.5)  # hands g~ on
  state = tx.init(params)
  for step in range(steps):
    local = jax.vmap(jax.grad(loss_fn), (None, 0))(params, groups)
    grads = mean(local)
    if step % every_k == 0:

      def perturbed_grad(g, x, params=params):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        return extract.update(g, extract.init(params), params, grad_fn=grad_fn)[
          0
        ]

      if shared:
        perturbed = jax.vmap(perturbed_grad, (None, 0))(grads, groups)
      else:
        perturbed = jax.vmap(perturbed_grad)(local, groups)
      perturbed = mean(perturbed)
      grads = descent(grads, perturbed) if descent else perturbed
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('descent', [None, average_descent])
@pytest.mark.parametrize('every_k', [1, 2])
@pytest.mark.parametrize(
  'way',
  [
    pytest.param('shard_map', marks=needs_pcast),
    'unchecked shard_map',
    'pmap',
  ],
)
def test_axis_name(params, batch, way, every_k, descent, shared):
  """Local gradients: a perturbation a device. Averaged ones: a shared one."""
  tx = asam(
    optax.sgd(0.1, momentum=0.9),
    every_k=every_k,
    descent=descent,
    axis_name='devices',
  )
  checked = way == 'shard_map'

  def step(params, state, x):
    local = params
    if checked:
      # The gradient of a replicated parameter would be summed over the axis.
      local = jax.lax.pcast(params, 'devices', to='varying')
    value_fn = lambda p: loss_fn(p, x)
    grads = jax.grad(value_fn)(local)
    if shared:
      grads = jax.lax.pmean(grads, 'devices')
    updates, state = tx.update(grads, state, local, value_fn=value_fn)
    return optax.apply_updates(params, updates), state

  carry = params, tx.init(params)
  if way == 'pmap':
    step = jax.pmap(step, axis_name='devices')
    carry = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), carry)
    batch_in = batch.reshape(DEVICES, -1, 3)
  else:
    mesh = jax.make_mesh((DEVICES,), ('devices',))
    replicated, split = PartitionSpec(), PartitionSpec('devices')
    step = jax.jit(
      shard_map(
        step,
        mesh=mesh,
        in_specs=(replicated, replicated, split),
        out_specs=(replicated, replicated),
        check_vma=checked,
      )
    )
    batch_in = jax.device_put(batch, NamedSharding(mesh, split))
    carry = jax.device_put(carry, NamedSharding(mesh, replicated))
  for _ in range(3):
    carry = step(*carry, batch_in)

  expected = reference_run(
    params,
    batch,
    optax.sgd(0.1, momentum=0.9),
    3,
    shared=shared,
    every_k=every_k,
    descent=descent,
  )
  replicas = [
    jax.tree.map(lambda x, i=i: np.asarray(x.addressable_data(i)), carry)
    for i in range(DEVICES)
  ]
  for replica in replicas[1:]:
    np.testing.assert_equal(replica, replicas[0])
  result, state = replicas[0]
  assert (
    error(jax.tree.map(np.squeeze, result), jax.tree.map(np.asarray, expected))
    < 1e-5
  )
  # The last of three steps takes a second gradient, every_k being 1 or 2.
  assert np.isfinite(state[0].perturbed_value).all()


@needs_pcast
def test_replicated_gradients_are_summed(params, batch):
  """The trap: without pcast shard_map hands over sums, and pmean keeps them."""
  mesh = jax.make_mesh((DEVICES,), ('devices',))

  def grads(params, x):
    return jax.lax.pmean(jax.grad(loss_fn)(params, x), 'devices')

  split = PartitionSpec('devices')
  wrong = shard_map(
    grads,
    mesh=mesh,
    in_specs=(PartitionSpec(), split),
    out_specs=PartitionSpec(),
  )(
    jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
    jax.device_put(batch, NamedSharding(mesh, split)),
  )
  mean = jax.grad(loss_fn)(params, batch)
  assert (
    error(
      jax.tree.map(np.asarray, wrong),
      jax.tree.map(lambda g: np.asarray(DEVICES * g), mean),
    )
    < 1e-5
  )
