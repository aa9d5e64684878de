"""A small smooth network: a small change of w or eps changes it a little."""

import jax
import jax.numpy as jnp
import numpy as np

INPUTS, HIDDEN, OUTPUTS, EXAMPLES = 16, 32, 8, 16


def make_params(dtype):
  """Parameters of a network with one hidden layer."""
  rng = np.random.default_rng(0)
  shapes = {
    'kernel': (INPUTS, HIDDEN),
    'bias': (HIDDEN,),
    'out_kernel': (HIDDEN, OUTPUTS),
    'out_bias': (OUTPUTS,),
  }
  return {
    name: (rng.standard_normal(shape) / 4).astype(dtype)
    for name, shape in shapes.items()
  }


def make_batch(dtype):
  """Inputs and targets; the seed is one for which signs are certain."""
  rng = np.random.default_rng(14)
  return tuple(
    rng.standard_normal((EXAMPLES, size)).astype(dtype)
    for size in (INPUTS, OUTPUTS)
  )


def loss_fn(params, batch):
  """The mean square error of a batch."""
  x, y = batch
  hidden = jnp.tanh(x @ params['kernel'] + params['bias'])
  return jnp.mean((hidden @ params['out_kernel'] + params['out_bias'] - y) ** 2)


def assert_signs_are_certain(grads):
  """Fails if rounding may decide on the sign of a gradient, for p = inf."""
  sizes = np.concatenate([abs(g).ravel() for g in jax.tree.leaves(grads)])
  assert sizes.min() > 1e-6 * sizes.max()
