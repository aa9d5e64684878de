"""Promise: the wheel is the package alone, and importing it is harmless."""

import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]

IMPORT = """
import socket, sys

def refuse(*args, **kwargs):
  raise AssertionError('The import touched the network.')

socket.socket.connect = socket.getaddrinfo = refuse
import optax_asam
assert optax_asam.__version__ == '0.1.0'
for name in ('flax', 'equinox', 'haiku', 'matplotlib', 'sklearn'):
  assert name not in sys.modules, name
print(optax_asam.__file__)
"""


def run(*command, **kwargs):
  """The output of a command that must succeed."""
  return subprocess.run(
    [str(part) for part in command],
    check=True,
    capture_output=True,
    text=True,
    **kwargs,
  ).stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The wheel, built in isolation from the tree."""
  folder = tmp_path_factory.mktemp('dist')
  run(sys.executable, '-m', 'build', '--wheel', '--outdir', folder, ROOT)
  (path,) = folder.glob('*.whl')
  return path


def test_wheel(wheel):
  """The package and its metadata, nothing else; typed."""
  assert wheel.name == 'optax_asam-0.1.0-py3-none-any.whl'
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    (metadata,) = [name for name in names if name.endswith('/METADATA')]
    text = archive.read(metadata).decode()
  sources = (ROOT / 'optax_asam').rglob('*.py')
  modules = {str(path.relative_to(ROOT)) for path in sources}
  package = {name for name in names if '.dist-info/' not in name}
  assert package == modules | {'optax_asam/py.typed'}
  requirements = {
    line.split(': ')[1].split('>')[0]
    for line in text.splitlines()
    if line.startswith('Requires-Dist') and 'extra ==' not in line
  }
  assert requirements == {'chex', 'jax', 'jaxlib', 'optax'}
  extras = {
    line.split(': ')[1]
    for line in text.splitlines()
    if line.startswith('Provides-Extra')
  }
  assert extras == {
    *('flax', 'examples', 'translation', 'test', 'docs'),
    *('cuda12', 'cuda13', 'tpu'),
  }


def test_empty_environment(wheel, tmp_path):
  """With the runtime dependencies only it imports and takes a step."""
  venv.create(tmp_path / 'env', with_pip=True)
  python = tmp_path / 'env' / 'bin' / 'python'
  run(python, '-m', 'pip', 'install', '--quiet', '--no-compile', wheel)
  listed = run(python, '-m', 'pip', 'list', '--format=freeze').lower()
  assert 'flax' not in listed
  assert 'scikit' not in listed
  # No such platform exists: a touched device would be an error.
  output = run(
    python, '-c', IMPORT, cwd=tmp_path, env={'JAX_PLATFORMS': 'no_such_device'}
  )
  assert str(tmp_path / 'env') in output
  step = """
import jax, jax.numpy as jnp, optax, optax_asam
grad_fn = jax.grad(lambda w: (w**2).sum())
tx, w = optax_asam.asam(optax.sgd(0.1)), jnp.ones(3)
updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
assert (updates < -0.2).all()
"""
  run(python, '-W', 'error', '-c', step, cwd=tmp_path)
