"""Promise: the notebooks run as they are and are stored without outputs."""

import pathlib
import warnings

import pytest

with warnings.catch_warnings():
  # Jupyter's packages warn about each other when imported.
  warnings.simplefilter('ignore')
  import nbclient
  import nbformat

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[2].glob('notebooks/*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_stripped(path):
  """No outputs and no execution counts."""
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None


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
  """Every cell, on one device; warnings of JAX, Optax and Flax are errors."""
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  notebook = nbformat.read(path, as_version=4)
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
