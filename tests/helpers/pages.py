"""The code, tables and links of the documentation."""

from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_asam
from optax_asam import asam
from optax_asam import looksam
from optax_asam import momentum_asam

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / 'docs'
NAMESPACE = {
  'asam': asam,
  'jax': jax,
  'jnp': jnp,
  'looksam': looksam,
  'momentum_asam': momentum_asam,
  'optax': optax,
  'optax_asam': optax_asam,
}


def read_page(name: str) -> str:
  """The text of a page in ``docs/``."""
  return (DOCS / f'{name}.md').read_text()


def slug(text: str) -> str:
  """``text`` as part of a function's name: MultiSteps is multi_steps."""
  text = re.sub('(?<=[a-z])(?=[A-Z])', '_', text).lower()
  return re.sub('[^a-z0-9]+', '_', text).strip('_')


def blocks(page: str, language: str = 'python') -> list[str]:
  """The fenced code of a page in ``language``."""
  return re.findall(
    rf'^ *```{language}\n(.*?)^ *```', page, re.DOTALL | re.MULTILINE
  )


def read_snippets(page: str) -> dict[str, list[str]]:
  """The Python blocks of each section that has one, by the test's name."""
  sections = re.split('^##+ (.*)$', page, flags=re.MULTILINE)[1:]
  snippets = {
    f'test_{slug(title)}': blocks(text)
    for title, text in zip(sections[::2], sections[1::2], strict=True)
  }
  return {name: code for name, code in snippets.items() if code}


def read_pieces(page: str) -> dict[str, str]:
  """The pieces of a page's code, by the comments that head them.

  A piece starts at a comment in the first column. Its name is the comment up to
  a colon.
  """
  pieces = {}
  for block in blocks(page):
    parts = re.split('^# (.*)$', block, flags=re.MULTILINE)
    assert parts[0] == '', f'no comment heads the block {block!r}'
    for comment, code in zip(parts[1::2], parts[2::2], strict=True):
      name = comment.split(':')[0]
      assert name not in pieces, f'two pieces are called {name!r}'
      pieces[name] = code
  return pieces


def read_rows(text: str) -> list[list[str]]:
  """The cells of the first table in ``text``, without its header."""
  lines = [line for line in text.splitlines() if line.startswith('|')]
  return [
    [cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]
  ]


def marked(page: str, name: str) -> str:
  """The part of a page between the comments ``<!-- name -->`` and /name."""
  (text,) = re.findall(
    f'<!-- {re.escape(name)} -->(.*?)<!-- /{re.escape(name)} -->',
    page,
    re.DOTALL,
  )
  return text


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


def without_code(page: str) -> str:
  """A page without its fenced blocks."""
  return re.sub('^( *)```.*?^ *```', '', page, flags=re.DOTALL | re.MULTILINE)


def links(page: str) -> Iterator[tuple[str, str]]:
  """The path and the anchor of each link and image outside of code."""
  text = re.sub('`[^`]*`', '', without_code(page).replace('\n', ' '))
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    path, _, anchor = target.partition('#')
    yield path, anchor


def anchors(page: str) -> set[str]:
  """The anchors of a page's headings, as code hosts derive them."""
  titles = re.findall('^#+ (.*)$', without_code(page), re.MULTILINE)
  return {
    re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles
  }
