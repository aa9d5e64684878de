"""Promise: the notebooks run as they are, here and in Colab.

They are stored without outputs.
"""

import importlib.util
import os
import pathlib
import warnings

import pytest

with warnings.catch_warnings():
  # Jupyter's packages warn about each other when imported.
  warnings.simplefilter('ignore')
  from IPython.core.inputtransformer2 import TransformerManager
  import nbclient
  import nbformat

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[2].glob('notebooks/*.ipynb'))
COLAB = 'https://colab.research.google.com'
FILES = f'{COLAB}/github/optax-asam/optax_asam/blob/main/notebooks'
REPOSITORY = 'git+https://github.com/optax-asam/optax_asam'


def read(path):
  """A notebook."""
  return nbformat.read(path, as_version=4)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_stripped(path):
  """No outputs, execution counts, or metadata of an editor."""
  notebook = read(path)
  nbformat.validate(notebook)
  assert set(notebook.metadata) == {'kernelspec', 'language_info'}
  for cell in notebook.cells:
    assert cell.metadata == {}
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_head(path):
  """The badge opens this file, and the same cell as elsewhere installs."""
  head, install = read(path).cells[:2]
  badge = f'{COLAB}/assets/colab-badge.svg'
  assert f'[![Open in Colab]({badge})]({FILES}/{path.name})' in head.source
  assert 'on a CPU' in head.source
  assert 'Runtime > Change runtime type' in head.source
  assert install.source == read(NOTEBOOKS[0]).cells[1].source


@pytest.mark.parametrize(
  ('in_clone', 'expected'),
  [
    (True, '..'),
    (False, REPOSITORY),
    (False, None),
  ],
  ids=['clone', 'repository', 'installed'],
)
@pytest.mark.parametrize('missing', ['optax_asam', 'flax', 'sklearn'])
def test_install(in_clone, expected, missing, monkeypatch):
  """From the clone, or else from the repository; only if missing."""
  installed = expected is None
  names = {}
  commands = []

  class Shell:
    """What IPython does with a line magic."""

    def run_line_magic(self, magic, line):
      nonlocal installed
      assert magic == 'pip'
      commands.append(line.format(**names))
      installed = True

  def find_spec(name):
    assert name in ('optax_asam', 'flax', 'matplotlib', 'sklearn')
    return installed or name != missing or None

  monkeypatch.setattr(importlib.util, 'find_spec', find_spec)
  monkeypatch.setattr(os.path, 'exists', lambda path: in_clone)
  source = read(NOTEBOOKS[0]).cells[1].source
  names['get_ipython'] = Shell
  exec(TransformerManager().transform_cell(source), names)
  assert installed
  assert commands == [
    f'install --quiet {source} flax matplotlib scikit-learn'
    for source in ([expected] if expected else [])
  ]


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path,
      id=path.stem,
      marks=[] if path.stem == 'quickstart' else pytest.mark.slow,
    )
    for path in NOTEBOOKS
  ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # Jupyter's own
def test_runs(path, monkeypatch):
  """Every cell; warnings of JAX, Optax and Flax are errors."""
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  notebook = read(path)
  strict = nbformat.v4.new_code_cell(
    'import warnings\n'
    "warnings.filterwarnings('error', module='jax|optax|flax|__main__')"
  )
  notebook.cells.insert(0, strict)
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3')
  client.execute(cwd=path.parent)
  figures = [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if 'image/png' in output.get('data', {})
  ]
  assert figures
