"""Eight CPU devices, float64 on request, and profiles of Hypothesis."""

import os

# Read when JAX's backend starts.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import pages

# Select one by --hypothesis-profile; the fast one is the default.
for profile, max_examples in {'fast': 20, 'thorough': 100}.items():
  hypothesis.settings.register_profile(
    profile,
    max_examples=max_examples,
    deadline=None,  # The first example of a shape compiles.
    derandomize=True,
    database=None,
    print_blob=True,
  )
hypothesis.settings.load_profile('fast')


@pytest.fixture(scope='module', autouse=True)
def compiled():
  """Frees the programs of a file, which together take gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='module')
def quickly_compiled():
  """Skips optimizations in the programs of a file."""
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
  """Parameters of a dense layer, in the default dtype."""
  rng = np.random.default_rng(0)
  return {
    'kernel': jnp.asarray(rng.standard_normal((3, 2))),
    'bias': jnp.asarray(rng.standard_normal(2)),
  }


@pytest.fixture
def snippet(request):
  """Runs a Python block from the section that the test is named after.

  The module of the test defines ``SNIPPETS`` and their ``loss_fn``.
  """
  blocks = request.module.SNIPPETS[request.function.__name__]

  def run(index=0, **names):
    return pages.run_snippet(
      blocks[index], **{'loss_fn': request.module.loss_fn, **names}
    )

  return run
