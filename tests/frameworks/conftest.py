"""Fast compilation: nearly all the time of these tests is that."""

import jax
import pytest


@pytest.fixture(autouse=True)
def fast_compilation():
  """Leaves optimizations out, and draws random bits by a short program."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, True)
  with jax.default_prng_impl('rbg'):
    yield
  jax.config.update(name, before)
