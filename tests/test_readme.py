"""Promise: the README's programs run and its numbers are in the results."""

import json
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
import reporting
from support import error

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language):
  """The code blocks of the README in ``language``."""
  return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


def loss_fn(params, batch):
  """A loss for the first sample."""
  x, y = batch
  return ((x @ params['kernel'] + params['bias'] - y) ** 2).mean()


def test_train_step(params):
  """The sample of the transformation descends the sharpness-aware gradient."""
  namespace = {
    'jax': jax,
    'optax': optax,
    'asam': optax_asam.asam,
    'loss_fn': loss_fn,
  }
  exec(blocks('python')[0], namespace)
  batch = jnp.ones((4, 3)), jnp.zeros((4, 2))
  opt_state = namespace['tx'].init(params)
  result, _ = namespace['train_step'](params, opt_state, batch)
  grads = optax_asam.grad(loss_fn, rho=0.5)(params, batch)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  assert error(result, expected) < 1e-6


def test_diff(params):
  """Both lines of the diff give the same value, and the second one ASAM's."""
  lines = blocks('diff')[0].splitlines()
  batch = jnp.ones((4, 3)), jnp.zeros((4, 2))
  results = []
  for line in lines:
    namespace = {
      'jax': jax,
      'optax_asam': optax_asam,
      'loss_fn': lambda params, batch: (loss_fn(params, batch), 'aux'),
      'params': params,
      'batch': batch,
    }
    exec(line[2:], namespace)
    results.append([namespace[name] for name in ('loss', 'aux', 'grads')])
  plain, sharp = results
  assert plain[:2] == sharp[:2]
  expected = optax_asam.grad(loss_fn, rho=0.5)(params, batch)
  np.testing.assert_allclose(sharp[2]['kernel'], expected['kernel'], rtol=1e-6)
  assert abs(plain[2]['kernel'] - expected['kernel']).max() > 1e-3


@pytest.mark.skipif(
  not hasattr(nnx, 'as_pure'), reason='the sample is for Flax 0.12.7'
)
def test_nnx():
  """The sample for NNX makes one update."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  tx = optax_asam.asam(optax.sgd(0.1))
  batch = jnp.ones((4, 3)), jnp.zeros((4, 2))

  def loss_fn(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()

  plain_loss = lambda p, batch: (
    (batch[0] @ p['kernel'] + p['bias'] - batch[1]) ** 2
  ).mean()
  start = {'kernel': model.kernel[...], 'bias': model.bias[...]}
  grads = optax_asam.grad(plain_loss, rho=0.5)(start, batch)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, start, grads)
  namespace = {
    'jax': jax,
    'nnx': nnx,
    'model': model,
    'batch': batch,
    'loss_fn': loss_fn,
    'optimizer': nnx.Optimizer(model, tx, wrt=nnx.Param),
    'grads': nnx.grad(loss_fn)(model, batch),
  }
  exec(blocks('python')[1], namespace)
  result = {'kernel': model.kernel[...], 'bias': model.bias[...]}
  assert error(result, expected) < 1e-6


def test_table():
  """Every number of the demo's table is in the committed results."""
  results = json.loads((ROOT / 'docs/demo/results.json').read_text())
  assert results['command'] == 'python examples/train.py --out out/demo'
  assert not results['commit'].endswith('dirty')
  for name, result in results['optimizers'].items():
    row = (
      name.upper(),
      f'{result["rho"]:g}' if result['rho'] else '',
      reporting.format_accuracy(result['test_accuracy']['per_seed']),
      f'{result["train_loss"]["mean"]:.3f}',
      f'{result["sharpness_sam_ball"]["mean"]:.5f}',
      f'{result["sharpness_asam_ball"]["mean"]:.5f}',
      f'{result["time_ratio_to_first"]:.2f}',
    )
    line = re.sub(' +', ' ', f'| {" | ".join(row)} |')
    assert line in README


def test_links():
  """Every file that the README points to exists."""
  for target in re.findall(r'\]\(([^)#]+)\)', README):
    assert target.startswith('https://') or (ROOT / target).exists(), target
