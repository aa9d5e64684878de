"""Promise: each public function has a page in the API reference."""

import inspect
import re

import pytest

import optax_asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import normalization
from optax_asam import plotting
from optax_asam import sharpness
import optax_asam.equinox
import optax_asam.nnx
from tests.helpers import pages

PAGES = ''.join(path.read_text() for path in (pages.DOCS / 'api').glob('*.md'))


def listed(module):
  """The names that the pages list after naming a module."""
  name = re.escape(module.__name__)
  parts = re.findall(
    rf'module:: {name}$(.*?)(?=module::|\Z)', PAGES, re.DOTALL | re.MULTILINE
  )
  return set(re.findall(r'^   (\w+)$', ''.join(parts), re.MULTILINE))


@pytest.mark.parametrize('module', [optax_asam, sharpness])
def test_exported(module):
  """Every function and class of ``__all__``."""
  exported = {
    name
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
  }
  assert listed(module) == exported


@pytest.mark.parametrize(
  'module',
  [
    ascent,
    descent,
    normalization,
    optax_asam.equinox,
    optax_asam.nnx,
    plotting,
  ],
)
def test_functions_with_an_example(module):
  """Functions without one are for the library itself."""
  functions = inspect.getmembers(module, inspect.isfunction)
  expected = {
    name for name, function in functions if 'Examples:' in function.__doc__
  }
  assert expected
  assert expected <= listed(module)
  assert all(hasattr(module, name) for name in listed(module))
