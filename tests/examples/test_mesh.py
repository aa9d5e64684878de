"""Promise: examples/mesh.py trains, and eight devices compute what one does."""

import functools
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import mesh
import optax_asam
from tests.helpers import reference
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')


def test_program(monkeypatch, capsys):
  """It learns on eight devices, after an epoch in bfloat16."""
  monkeypatch.setattr('sys.argv', ['mesh.py', '--epochs', '1'])
  runpy.run_path(mesh.__file__, run_name='__main__')
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first == "mesh: {'data': 4, 'model': 2}"
  assert float(re.fullmatch(r'test accuracy: ([\d.]+)%', last)[1]) > 80


def test_shards():
  """Arrays are split over model where that is possible; any mesh will do."""
  shapes = {
    (3, 3, 1, 16): (3, 3, 1, 8),
    (256, 10): (256, 5),
    (): (),
    (3,): (3,),
  }
  eight = mesh.make_mesh(jax.devices())
  three = mesh.make_mesh(jax.devices()[:3])
  assert (eight.devices.shape, three.devices.shape) == ((4, 2), (3, 1))
  for shape, shard in shapes.items():
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert mesh.make_shardings(eight, array).shard_shape(shape) == shard
    assert mesh.make_shardings(three, array).shard_shape(shape) == shape


def test_step_is_asam(monkeypatch):
  """Its gradient is the plain one at w + eps, with the same dropout."""
  tx = optax.sgd(1.0)
  make_state = functools.partial(mesh.init, mesh.Network(jnp.float32), 8)
  state = jax.jit(make_state)(jax.random.key(0))
  state = state.replace(tx=tx, opt_state=tx.init(state.params))
  images = np.random.default_rng(0).uniform(size=(16, 8, 8, 1))

  def gradient(step, params):
    after, _ = step(state.replace(params=params), (images, np.arange(16) % 10))
    return jax.tree.map(jnp.subtract, params, after.params)

  found = gradient(jax.jit(mesh.train_step), state.params)
  monkeypatch.setattr(
    optax_asam,
    'value_and_grad',
    lambda fun, rho, has_aux: jax.value_and_grad(fun, has_aux=has_aux),
  )
  plain = jax.jit(lambda *args: mesh.train_step(*args))
  clean = gradient(plain, state.params)
  perturbed = reference.perturb(state.params, clean)
  assert error(found, gradient(plain, perturbed)) < 1e-3
  assert error(found, clean) > 0.1


@pytest.mark.slow
def test_eight_devices_equal_one():
  """The same state after an epoch, and the kernels are sharded."""
  one, eight = (
    mesh.train(mesh.make_mesh(jax.devices()[:n]), 1, jnp.float32)[0]
    for n in (1, 8)
  )
  arrays = lambda state: (state.params, state.opt_state, state.batch_stats)
  assert error(arrays(eight), arrays(one)) < 1e-5
  kernel = eight.params['Dense_0']['kernel']
  assert {x.data.shape for x in kernel.addressable_shards} == {(256, 5)}
