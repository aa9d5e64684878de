"""The code of a page of the documentation, by the names of its tests."""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_asam
from optax_asam import asam

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
NAMESPACE = {
  'asam': asam,
  'jax': jax,
  'jnp': jnp,
  'optax': optax,
  'optax_asam': optax_asam,
}


def read_page(name: str) -> str:
  """The text of a page."""
  return (DOCS / f'{name}.md').read_text()


def slug(text: str) -> str:
  """``text`` as a part of a function's name: MultiSteps is multi_steps."""
  text = re.sub('(?<=[a-z])(?=[A-Z])', '_', text).lower()
  return re.sub('[^a-z0-9]+', '_', text).strip('_')


def read_snippets(page: str) -> dict[str, list[str]]:
  """The Python blocks of each section that has one, by the test's name."""
  sections = re.split('^##+ (.*)$', page, flags=re.MULTILINE)[1:]
  snippets = {
    f'test_{slug(title)}': re.findall(
      '^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE
    )
    for title, text in zip(sections[::2], sections[1::2], strict=True)
  }
  return {name: blocks for name, blocks in snippets.items() if blocks}


def run_snippet(code: str, **names: Any) -> dict[str, Any]:
  """Runs code in which the library is known; returns the names in it."""
  namespace = {**NAMESPACE, **names}
  exec(code, namespace)
  return namespace


def assert_all_tested(
  page: str, snippets: Mapping[str, list[str]], names: Mapping[str, Any]
) -> None:
  """Fails unless every section with code has its test among ``names``."""
  assert set(snippets) <= set(names)
  assert sum(map(len, snippets.values())) == page.count('```python')
