"""Promise: Optimistix takes ``asam`` as docs/trainers.md says."""

import jax.numpy as jnp
import numpy as np
import optax

from tests.helpers import pages
from tests.helpers.training import assert_asam

(SNIPPET,) = pages.read_snippets(pages.read_page('trainers'))['test_optimistix']


def loss_fn(params, batch):
  """The squared error of a dense layer."""
  x, y = batch
  return jnp.mean((jnp.tanh(x @ params['kernel']) + params['bias'] - y) ** 2)


def test_optimistix():
  """Five steps on one batch: ``OptaxMinimiser`` passes ``value_fn``."""
  rng = np.random.default_rng(0)
  batch = jnp.asarray(rng.random((8, 3))), jnp.asarray(rng.random((8, 2)))
  params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}
  names = pages.run_snippet(
    SNIPPET, loss_fn=loss_fn, params=params, batch=batch
  )
  assert_asam(
    names['solution'].value,
    lambda params, extra, batch: (loss_fn(params, batch), extra),
    params,
    [batch] * 5,
    optax.sgd(0.1, momentum=0.9),
    rho=0.5,
  )
