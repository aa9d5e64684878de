"""Promise: the wheel is the package alone, and importing it is harmless.

Releases and CI's workflows agree with the repository.
"""

import pathlib
import re
import subprocess
import sys
import venv
import zipfile

import pytest
import yaml

import optax_asam

ROOT = pathlib.Path(__file__).parents[1]

IMPORT = """
import socket, sys

def refuse(*args, **kwargs):
  raise AssertionError('The import touched the network.')

socket.socket.connect = socket.getaddrinfo = refuse
import optax_asam, optax_asam.plotting
for name in ('flax', 'equinox', 'haiku', 'matplotlib', 'sklearn'):
  assert name not in sys.modules, name
print(optax_asam.__file__)
"""
STEP = """
import jax, jax.numpy as jnp, optax, optax_asam
grad_fn = jax.grad(lambda w: (w**2).sum())
tx, w = optax_asam.asam(optax.sgd(0.1)), jnp.ones(3)
updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
assert (updates < -0.2).all()
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


@pytest.mark.slow
def test_wheel(tmp_path):
  """The package and its metadata; it runs on its dependencies alone."""
  run(sys.executable, '-m', 'build', '--wheel', '--outdir', tmp_path, ROOT)
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    (metadata,) = [name for name in names if name.endswith('/METADATA')]
    lines = archive.read(metadata).decode().splitlines()
  sources = (ROOT / 'optax_asam').rglob('*.py')
  modules = {str(path.relative_to(ROOT)) for path in sources}
  package = {name for name in names if '.dist-info/' not in name}
  assert package == modules | {'optax_asam/py.typed'}
  requirements = {
    line.split(': ')[1].split('>')[0]
    for line in lines
    if line.startswith('Requires-Dist') and 'extra ==' not in line
  }
  assert requirements == {'chex', 'jax', 'jaxlib', 'optax'}
  # PyPI shows the README, where a relative link would lead nowhere.
  assert not re.findall(r'\]\((?!https?:|#).*', '\n'.join(lines))

  venv.create(tmp_path / 'env', with_pip=True)
  python = tmp_path / 'env' / 'bin' / 'python'
  run(python, '-m', 'pip', 'install', '--quiet', '--no-compile', wheel)
  # No such platform exists: a touched device would be an error.
  output = run(
    python, '-c', IMPORT, cwd=tmp_path, env={'JAX_PLATFORMS': 'no_such_device'}
  )
  assert str(tmp_path / 'env') in output
  run(python, '-W', 'error', '-c', STEP, cwd=tmp_path)


def test_version():
  """The changelog and the citation are about this version."""
  version = optax_asam.__version__
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == version
  headings = re.findall(
    r'^## \[(.*)\] - (.*)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE
  )
  release, date = headings[0]
  is_development = version == f'{release}.dev0' and date == 'unreleased'
  is_release = version == release and re.fullmatch(r'\d{4}-\d\d-\d\d', date)
  assert is_development or is_release


WORKFLOWS = {
  path.stem: path.read_text()
  for path in (ROOT / '.github' / 'workflows').glob('*.yml')
}


def test_workflows_run_what_ci_runs():
  """All suites of .ci/run, by targets that the Makefile has."""
  makefile = (ROOT / 'Makefile').read_text()
  targets = set(re.findall(r'^([a-z-]+):', makefile, re.MULTILINE))
  jobs = yaml.safe_load(WORKFLOWS['tests'])['jobs']
  matrix = jobs['make']['strategy']['matrix']['include']
  tested = {job['target'] for job in matrix}
  made = set(re.findall(r'run: make ([a-z-]+)', ''.join(WORKFLOWS.values())))
  assert tested | made <= targets
  script = (ROOT / '.ci' / 'run').read_text()
  suites = set(re.findall(r'\b(?:test-[a-z]+|docs)\b', script))
  assert suites == (tested | made) - {'test', 'dist'}
  pythons = {version for job in matrix for version in job['python'].split()}
  pyproject = (ROOT / 'pyproject.toml').read_text()
  assert pythons == set(re.findall(r':: Python :: (3\.\d+)', pyproject))


def test_actions_are_pinned():
  """By their commits, with the version for the reader."""
  used = re.findall(r'uses: (?!\./)(.*)', ''.join(WORKFLOWS.values()))
  assert used
  for action in used:
    assert re.fullmatch(r'[\w/-]+@[0-9a-f]{40} # v[\d.]+', action), action
