"""Promise: pages are plain Markdown, and their links resolve."""

import re

import pytest

from tests.helpers import pages

PAGES = sorted(
  path
  for path in pages.ROOT.rglob('*.md')
  if not {'out', '_build'} & set(path.parts)
  and not any(
    part.startswith('.') for part in path.relative_to(pages.ROOT).parts
  )
)


@pytest.mark.parametrize(
  'path', PAGES, ids=lambda path: str(path.relative_to(pages.ROOT))
)
def test_page(path):
  """Relative links, their anchors, and no syntax that only Sphinx knows."""
  page = path.read_text()
  for target, anchor in pages.links(page):
    if target.startswith(('https://', 'http://', 'mailto:')):
      continue
    linked = (path.parent / target).resolve() if target else path
    assert linked.exists(), target
    if anchor:
      assert anchor in pages.anchors(linked.read_text()), f'{target}#{anchor}'
  assert not re.search(r'\{[a-z:]+\}`', page), 'a role of Sphinx'
  directives = set(re.findall(r'^```+\{(.*?)\}', page, re.MULTILINE))
  assert directives <= {'toctree', 'eval-rst', 'include'}


def test_repository_links():
  """Those of notebooks and docstrings to files and headings of main."""
  pattern = re.compile(
    r'https://github\.com/optax-asam/optax_asam'
    r'(?:/blob/main/([\w./]+\.\w+))?(?:#([\w-]+))?(?=[)\s`>])'
  )
  for folder, suffix in ('notebooks', '.ipynb'), ('optax_asam', '.py'):
    for path in pages.ROOT.glob(f'{folder}/**/*{suffix}'):
      for target, anchor in pattern.findall(path.read_text()):
        linked = pages.ROOT / (target or 'README.md')
        assert linked.exists(), f'{path.name}: {target}'
        if anchor:
          anchors = pages.anchors(linked.read_text())
          assert anchor in anchors, f'{path.name}: {target}#{anchor}'
