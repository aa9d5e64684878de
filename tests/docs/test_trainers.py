"""Promise: all code of docs/trainers.md has a test; it needs the trainers."""

import re

from tests.helpers import pages

PAGE = pages.read_page('trainers')


def test_all_code_is_tested():
  """In tests/trainers, which make test-trainers runs."""
  names = {
    name
    for path in (pages.ROOT / 'tests' / 'trainers').glob('test_*.py')
    for name in re.findall(r'^def (test_\w+)', path.read_text(), re.MULTILINE)
  }
  pages.assert_all_tested(PAGE, pages.read_snippets(PAGE), dict.fromkeys(names))
