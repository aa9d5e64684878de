"""Promise: ``python -m optax_asam`` prints versions and checks a few steps."""

from importlib import metadata
import runpy

import jax
import numpy as np
import optax
import pytest

import optax_asam


@pytest.fixture
def run(capsys):
  """Runs it; returns the exit status, the output and the error output."""

  def run():
    with pytest.raises(SystemExit) as exit_:
      runpy.run_module('optax_asam', run_name='__main__')
    return exit_.value.code, *capsys.readouterr()

  return run


def test_passes(run, monkeypatch):
  """Versions of what is installed, devices, and a check that passes."""
  version = metadata.version

  def without_equinox(name):
    if name == 'equinox':
      raise metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(metadata, 'version', without_equinox)
  code, out, err = run()
  assert (code, err) == (0, '')
  lines = out.splitlines()
  assert lines[0] == f'optax_asam {optax_asam.__version__}'
  assert f'jax {jax.__version__}' in lines
  assert f'optax {optax.__version__}' in lines
  assert 'equinox is not installed' in lines
  assert 'devices: 8 x cpu' in lines
  assert lines[-1].startswith('self-check passed')


WRONG = {
  'slightly off': optax_asam.asam(optax.sgd(0.1), 0.499, 0.01),
  'nan': optax.with_extra_args_support(optax.scale(np.nan)),
}


@pytest.mark.parametrize('name', WRONG)
def test_fails(run, monkeypatch, name):
  """A wrong step is an exit status of 1, and says so."""
  monkeypatch.setattr(optax_asam, 'asam', lambda *args: WRONG[name])
  code, out, err = run()
  assert code == 1
  assert err.startswith('self-check failed')
  assert 'self-check' not in out


def test_import_is_quiet(capsys):
  """Only ``python -m`` runs the check."""
  runpy.run_module('optax_asam.__main__', run_name='imported')
  assert not any(capsys.readouterr())
