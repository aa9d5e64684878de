"""Promise: axis_name averages what leaves, and replicas never diverge.

On eight devices, by ``shard_map`` and ``pmap``, compared with one device that
has all examples: a perturbation per device (m-sharpness), or a shared one.
"""

import functools

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from optax_asam import asam
from optax_asam import looksam
from optax_asam import momentum_asam
from tests.helpers import network
from tests.helpers.cases import DESCENTS
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import needs_pcast
from tests.helpers.support import shard_map

pytestmark = pytest.mark.usefixtures('quickly_compiled')

DEVICES = 8
# The steps that are compared with one device; rounding grows with them.
COMPARED = (1, 10)
BASE_TX = optax.sgd(0.1, momentum=0.9)
WHOLE, SPLIT = PartitionSpec(), PartitionSpec('devices')


def rho_of(ord):
  """Rho; at p = inf it is relative to each weight."""
  return 0.05 if ord == np.inf else 0.5


@functools.cache
def one_device(shared, ord, every_k, descent, alpha=None):
  """Parameters after each step, with a perturbation per group of examples.

  With ``alpha``, updates in between are those of LookSAM.
  """
  extract = asam(optax.identity(), rho_of(ord), ord=ord)

  def perturbed_grad(params, g, batch):
    value_fn = lambda p: network.loss_fn(p, batch)
    grads, state = extract.update(
      g, extract.init(params), params, value_fn=value_fn
    )
    return grads, state[0].perturbed_value

  @functools.partial(jax.jit, static_argnums=5)
  def step(params, state, direction, value, groups, perturb):
    mean = lambda tree: jax.tree.map(lambda x: x.mean(0), tree)
    local = jax.vmap(jax.grad(network.loss_fn), (None, 0))(params, groups)
    ascended = grads = mean(local)
    g, unravel = ravel_pytree(grads)
    if perturb:
      ascended = grads if shared else local
      in_axes = (None, None if shared else 0, 0)
      perturbed, value = mean(
        jax.vmap(perturbed_grad, in_axes)(params, ascended, groups)
      )
      h, _ = ravel_pytree(perturbed)
      direction = h - (g @ h) / (g @ g) * g
      direction = unravel(direction / jnp.linalg.norm(direction))
      grads = descent(grads, perturbed) if descent else perturbed
    elif alpha:
      direction_, _ = ravel_pytree(direction)
      grads = unravel(g + alpha * jnp.linalg.norm(g) * direction_)
    updates, state = BASE_TX.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, direction, value, ascended

  params = network.make_params(np.float64)
  carry = params, BASE_TX.init(params), params, jnp.zeros([])
  results = {}
  for i in range(max(COMPARED)):
    *carry, ascended = step(*carry, split(), i % every_k == 0)
    results[i + 1] = jax.device_get((carry[0], carry[3]))
    if ord == np.inf:
      network.assert_signs_are_certain(ascended)
  return results


def split():
  """The examples of each device, [devices, examples, ...]."""
  return jax.tree.map(
    lambda x: x.reshape(DEVICES, -1, *x.shape[1:]),
    network.make_batch(np.float64),
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


def distribute(way, step, carry):
  """``step`` on all devices, with its parameters and state, and its batch."""
  if way == 'pmap':
    return (
      jax.pmap(step, axis_name='devices'),
      jax.tree.map(lambda x: jnp.stack([x] * DEVICES), carry),
      split(),
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
    jax.device_put(network.make_batch(np.float64), NamedSharding(mesh, SPLIT)),
  )


def replicas(tree):
  """What each device holds of a tree, as NumPy arrays."""
  return [
    jax.tree.map(lambda x, i=i: np.asarray(x.addressable_data(i)), tree)
    for i in range(DEVICES)
  ]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize(
  ('ord', 'every_k', 'descent', 'alpha'),
  [
    (2, 2, DESCENTS['nonlinear'], None),
    (2, 2, None, 0.3),  # LookSAM
    pytest.param(2, 1, None, None, marks=pytest.mark.slow),
    pytest.param(np.inf, 1, None, None, marks=pytest.mark.slow),
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
def test_axis_name(x64, way, ord, every_k, descent, alpha, shared):
  """Local gradients: a perturbation a device. Averaged ones: a shared one."""
  options = {'ord': ord, 'every_k': every_k, 'axis_name': 'devices'}
  if alpha:
    tx = looksam(BASE_TX, rho_of(ord), alpha=alpha, **options)
  else:
    tx = asam(BASE_TX, rho_of(ord), descent=descent, **options)
  params = network.make_params(np.float64)
  step, carry, batch = distribute(
    way,
    make_train_step(tx, shared, varying=way == 'shard_map'),
    (params, tx.init(params)),
  )
  expected = one_device(shared, ord, every_k, descent, alpha)
  for i in range(1, max(COMPARED) + 1):
    carry = step(*carry, batch)
    first, *others = replicas(carry)
    for other in others:
      assert_same_bits(other, first)
    result, state = jax.tree.map(np.squeeze, first)
    assert state[0].step == i
    if i in COMPARED:
      assert error((result, state[0].perturbed_value), expected[i]) < 1e-12


@needs_pcast
@pytest.mark.parametrize('wrap', [asam, looksam])
def test_parameters_per_device(wrap):
  """Without ``axis_name``, each device trains its own, value and all."""
  tx = wrap(BASE_TX, every_k=2)

  def step(params, batch):
    value_fn = lambda p: network.loss_fn(p, batch)
    params = jax.lax.pcast(params, 'devices', to='varying')
    state = tx.init(params)
    grads = jax.grad(value_fn)(params)
    _, (state, _) = tx.update(grads, state, params, value_fn=value_fn)
    return state.perturbed_value[None]

  mesh = Mesh(jax.devices(), ('devices',))
  specs = {'in_specs': (WHOLE, SPLIT), 'out_specs': SPLIT}
  values = jax.eval_shape(
    shard_map(step, mesh=mesh, **specs),
    network.make_params(np.float32),
    network.make_batch(np.float32),
  )
  assert values.shape == (DEVICES,)


def test_momentum_asam(x64):
  """It needs no ``axis_name``: gradients are averaged before it."""
  tx = momentum_asam(BASE_TX, rho_of(2))
  params, whole = (
    network.make_params(np.float64),
    network.make_batch(np.float64),
  )
  alone = jax.jit(
    lambda params, state: make_train_step(tx, False, varying=False)(
      params, state, whole
    )
  )
  expected = params, tx.init(params)
  step, carry, batch = distribute(
    'pmap', make_train_step(tx, True, varying=False), expected
  )
  for _ in range(5):
    expected, carry = alone(*expected), step(*carry, batch)
  first, *others = replicas(carry)
  for other in others:
    assert_same_bits(other, first)
  assert error(jax.tree.map(np.squeeze, first), expected) < 1e-12


@needs_pcast
@pytest.mark.parametrize('kind', ['grad_fn', 'value_fn'])
@pytest.mark.parametrize('every_k', [1, 2])
def test_summed_gradients_are_an_error(kind, every_k):
  """``shard_map`` sums the gradient of replicated parameters: 8 times the mean.

  Where types do not tell, with ``check_vma=False``, there is no error.
  """
  params, batch = (
    network.make_params(np.float32),
    network.make_batch(np.float32),
  )
  tx = asam(BASE_TX, axis_name='devices', every_k=every_k)
  mesh = Mesh(jax.devices(), ('devices',))

  def step(params, batch):
    value_fn = lambda p: network.loss_fn(p, batch)
    fun = {'grad_fn': jax.grad(value_fn), 'value_fn': value_fn}[kind]
    updates, _ = tx.update(
      jax.grad(value_fn)(params), tx.init(params), params, **{kind: fun}
    )
    return updates

  def trace(**kwargs):
    specs = {'in_specs': (WHOLE, SPLIT), 'out_specs': WHOLE}
    jax.eval_shape(shard_map(step, mesh=mesh, **specs, **kwargs), params, batch)

  with pytest.raises(ValueError, match=r"jax\.lax\.pcast\(params, 'devices'"):
    trace()
  trace(check_vma=False)
