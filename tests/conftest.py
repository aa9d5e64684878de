"""Eight CPU devices for the tests of parallelism, and float64 on request."""

import os

# Read when JAX's backend starts, which nothing here has done yet.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pages


@pytest.fixture(scope='module', autouse=True)
def compiled():
  """Forgets what a file has compiled, or the programs of all take gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='module')
def quickly_compiled():
  """Leaves out what makes the programs of a file fast, for a short life."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def x64():
  """Turns float64 on for one test."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


@pytest.fixture
def params():
  """Parameters of a dense layer, in float32."""
  rng = np.random.default_rng(0)
  return {
    'kernel': jnp.asarray(rng.standard_normal((3, 2)), jnp.float32),
    'bias': jnp.asarray(rng.standard_normal(2), jnp.float32),
  }


@pytest.fixture
def snippet(request):
  """Runs a Python block of the section of a page that the test is named after.

  The module of the test has ``SNIPPETS`` and the ``loss_fn`` that they use.
  """
  blocks = request.module.SNIPPETS[request.function.__name__]

  def run(index=0, **names):
    return pages.run_snippet(
      blocks[index], **{'loss_fn': request.module.loss_fn, **names}
    )

  return run
