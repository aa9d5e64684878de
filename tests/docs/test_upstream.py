"""Promise: the patch for Optax applies, and its ASAM takes the same steps."""

import importlib.metadata
import importlib.util
import pathlib
import shutil
import subprocess
import unittest

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

from optax_asam import asam
from tests.helpers import pages
from tests.helpers.support import error

PATCH = pages.ROOT / 'docs' / 'upstream' / 'optax_asam.patch'
# What the patch changes, of what a wheel of Optax holds.
CHANGED = ('optax/contrib/__init__.py', 'optax/contrib/_common_test.py')


def git_apply(*options, cwd):
  """Runs ``git apply`` on the patch."""
  command = ['git', 'apply', *options, str(PATCH)]
  return subprocess.run(
    command, cwd=cwd, capture_output=True, text=True, check=True
  ).stdout


def load(name, path, monkeypatch):
  """Imports a new module of ``optax.contrib`` from a file."""
  spec = importlib.util.spec_from_file_location(f'optax.contrib.{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setattr(optax.contrib, name, module, raising=False)
  return module


@pytest.fixture
def contrib(tmp_path, monkeypatch):
  """The folder of new files, the first of which is in ``optax.contrib``."""
  for name in ('_asam', '_asam_test'):
    git_apply(f'--include=optax/contrib/{name}.py', cwd=tmp_path)
  folder = tmp_path / 'optax' / 'contrib'
  monkeypatch.setattr(
    optax.contrib,
    'asam',
    load('_asam', folder / '_asam.py', monkeypatch).asam,
    raising=False,
  )
  return folder


@pytest.mark.skipif(
  importlib.metadata.version('optax') != '0.2.8', reason='is for Optax 0.2.8'
)
def test_applies(tmp_path):
  """To the installed Optax, with its documentation left out."""
  site = pathlib.Path(optax.__file__).parents[1]
  for name in CHANGED:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(site / name, tmp_path / name)
  git_apply('--exclude=docs/*', cwd=tmp_path)
  init = (tmp_path / CHANGED[0]).read_text()
  assert 'from optax.contrib._asam import asam\n' in init


@pytest.mark.slow
def test_same_steps(contrib):
  """Twenty steps are those of this library, with biases or without."""
  params = {'kernel': jnp.array([[1.0, -2.0], [0.0, 0.5]]), 'bias': jnp.ones(2)}

  def loss_fn(params):
    return jnp.sum(jnp.tanh(params['kernel'] @ params['bias'] - 2) ** 2)

  grad_fn = jax.grad(loss_fn)
  kernel = {'kernel': True, 'bias': False}
  schedule = optax.linear_schedule(0.3, 0.1, 20)
  base_tx = optax.sgd(0.05, momentum=0.9)
  pairs = [
    (
      optax.contrib.asam(base_tx, schedule, normalization_mask=kernel),
      asam(base_tx, schedule),
    ),
    (
      optax.contrib.asam(base_tx, mask=kernel),
      asam(base_tx, mask=kernel),
    ),
  ]

  def train(tx):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      params = optax.apply_updates(params, updates)
      return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), length=20)[1]

  train = jax.jit(train, static_argnums=0)
  for theirs, own in pairs:
    assert error(train(theirs), train(own)) < 1e-5


@pytest.mark.slow
def test_its_own_tests(contrib, monkeypatch):
  """The tests in the patch pass on the installed Optax."""
  module = load('_asam_test', contrib / '_asam_test.py', monkeypatch)
  suite = unittest.defaultTestLoader.loadTestsFromModule(module)
  result = unittest.TestResult()
  suite.run(result)
  assert result.testsRun > 20
  assert result.wasSuccessful(), result.failures + result.errors
