"""Promise: axis_name averages what leaves, and replicas never diverge.

On eight devices, by ``shard_map`` and ``pmap``, against one device that has all
examples: a perturbation a device (m-sharpness), or one that all share.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import network
from optax_asam import asam
from support import assert_same_bits
from support import error
from support import needs_pcast
from support import shard_map

DEVICES = 8
STEPS = 20
# After one step and after ten; rounding grows with their number.
COMPARED = (1, 10)
TOLERANCES = {np.float32: 5e-6, np.float64: 1e-12}
BASE_TX = optax.sgd(0.1, momentum=0.9)
WHOLE, SPLIT = PartitionSpec(), PartitionSpec('devices')


def product(g, perturbed_g):
  """A descent that is not linear in either gradient."""
  return jax.tree.map(lambda a, b: a * b, g, perturbed_g)


def projected(g, perturbed_g):
  """A descent whose leaves depend on all: g less its part along g~."""
  dot = optax.tree.vdot(g, perturbed_g)
  scale = dot / optax.tree.vdot(perturbed_g, perturbed_g)
  return jax.tree.map(lambda a, b: b + 0.5 * (a - scale * b), g, perturbed_g)


def rho_of(ord):
  """At p = inf, the part of itself by which each weight moves."""
  return 0.05 if ord == np.inf else 0.5


@functools.cache
def one_device(dtype, shared, ord, every_k, descent):
  """Parameters after each step that is compared, a perturbation a group.

  asam around a base that hands g~ on gives the gradients; ``every_k``, the mean
  over groups and ``descent`` are written out.
  """
  extract = asam(optax.identity(), rho_of(ord), ord=ord)

  def perturbed_grad(params, g, batch):
    grad_fn = lambda p: jax.grad(network.loss_fn)(p, batch)
    return extract.update(g, extract.init(params), params, grad_fn=grad_fn)[0]

  @functools.partial(jax.jit, static_argnums=3)
  def step(params, state, groups, perturb):
    mean = lambda tree: jax.tree.map(lambda x: x.mean(0), tree)
    local = jax.vmap(jax.grad(network.loss_fn), (None, 0))(params, groups)
    ascended = grads = mean(local)
    if perturb:
      ascended = grads if shared else local
      in_axes = (None, None if shared else 0, 0)
      perturbed = mean(
        jax.vmap(perturbed_grad, in_axes)(params, ascended, groups)
      )
      grads = descent(grads, perturbed) if descent else perturbed
    updates, state = BASE_TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state, ascended

  params = network.make_params(dtype)
  carry = params, BASE_TX.init(params)
  results = {}
  for i in range(max(COMPARED)):
    *carry, ascended = step(*carry, split(dtype), i % every_k == 0)
    results[i + 1] = jax.device_get(carry[0])
    if ord == np.inf:
      network.assert_signs_are_certain(ascended)
  return results


def split(dtype):
  """The examples of each device, [devices, examples, ...]."""
  return jax.tree.map(
    lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), network.make_batch(dtype)
  )


def make_train_step(tx, shared, *, varying):
  """A step on each device, with ``varying`` parameters for ``shard_map``."""

  def train_step(params, state, batch):
    local = params
    if varying:
      # The gradient of a replicated parameter would be summed over the axis.
      local = jax.lax.pcast(params, 'devices', to='varying')
    value_fn = lambda p: network.loss_fn(p, batch)
    grads = jax.grad(value_fn)(local)
    if shared:
      grads = jax.lax.pmean(grads, 'devices')
    updates, state = tx.update(grads, state, local, value_fn=value_fn)
    return optax.apply_updates(params, updates), state

  return train_step


def distribute(way, step, carry, dtype):
  """``step`` on all devices, with its parameters and state, and its batch."""
  if way == 'pmap':
    return (
      jax.pmap(step, axis_name='devices'),
      jax.tree.map(lambda x: jnp.stack([x] * DEVICES), carry),
      split(dtype),
    )
  mesh = Mesh(np.array(jax.devices()), ('devices',))
  step = shard_map(
    step,
    mesh=mesh,
    in_specs=(WHOLE, WHOLE, SPLIT),
    out_specs=(WHOLE, WHOLE),
    check_vma=way == 'shard_map',
  )
  return (
    jax.jit(step),
    jax.device_put(carry, NamedSharding(mesh, WHOLE)),
    jax.device_put(network.make_batch(dtype), NamedSharding(mesh, SPLIT)),
  )


def replicas(tree):
  """What each device holds of a tree, as NumPy arrays."""
  return [
    jax.tree.map(lambda x, i=i: np.asarray(x.addressable_data(i)), tree)
    for i in range(DEVICES)
  ]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize(
  ('dtype', 'ord', 'every_k', 'descent'),
  [
    (np.float32, 2, 1, None),
    (np.float32, 2, 2, None),
    (np.float32, 2, 2, product),
    (np.float64, 2, 2, projected),
    (np.float32, np.inf, 1, None),
    (np.float64, np.inf, 1, None),
  ],
)
@pytest.mark.parametrize(
  'way',
  [
    pytest.param('shard_map', marks=needs_pcast),
    'unchecked shard_map',
    'pmap',
  ],
)
def test_axis_name(request, way, dtype, ord, every_k, descent, shared):
  """Local gradients: a perturbation a device. Averaged ones: a shared one."""
  if dtype == np.float64:
    request.getfixturevalue('x64')
  tx = asam(
    BASE_TX,
    rho_of(ord),
    ord=ord,
    every_k=every_k,
    descent=descent,
    axis_name='devices',
  )
  params = network.make_params(dtype)
  step, carry, batch = distribute(
    way,
    make_train_step(tx, shared, varying=way == 'shard_map'),
    (params, tx.init(params)),
    dtype,
  )
  expected = one_device(dtype, shared, ord, every_k, descent)
  for i in range(1, STEPS + 1):
    carry = step(*carry, batch)
    first, *others = replicas(carry)
    for other in others:
      assert_same_bits(other, first)
    result, state = jax.tree.map(np.squeeze, first)
    # Steps 0, k, 2k, ... take a second gradient.
    assert np.isfinite(state[0].perturbed_value) == ((i - 1) % every_k == 0)
    if i in COMPARED:
      assert error(result, expected[i]) <= TOLERANCES[dtype]


@needs_pcast
def test_replicated_gradients_are_summed():
  """The trap: without pcast shard_map hands over sums, and pmean keeps them."""
  mesh = Mesh(np.array(jax.devices()), ('devices',))
  params = network.make_params(np.float32)
  batch = network.make_batch(np.float32)

  def grads(params, x):
    return jax.lax.pmean(jax.grad(network.loss_fn)(params, x), 'devices')

  wrong = shard_map(grads, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=WHOLE)(
    jax.device_put(params, NamedSharding(mesh, WHOLE)),
    jax.device_put(batch, NamedSharding(mesh, SPLIT)),
  )
  mean = jax.grad(network.loss_fn)(params, batch)
  assert (
    error(
      jax.tree.map(np.asarray, wrong),
      jax.tree.map(lambda g: np.asarray(DEVICES * g), mean),
    )
    < 1e-5
  )
