"""Tables in Markdown, and their places in a page."""

from collections.abc import Sequence
import re
from typing import Any


def replace_between(text: str, name: str, made: str) -> str:
  """A page with ``made`` between the comments ``name`` and ``end`` or /name."""
  return re.sub(
    f'(<!-- {name} -->\n\n).*?(\n\n<!-- (end|/{name}) -->)',
    lambda found: found[1] + made + found[2],
    text,
    flags=re.DOTALL,
  )


def table(rows: Sequence[Sequence[Any]], text_columns: int) -> str:
  """A table whose first row is its header; numbers are aligned to the right."""
  header, *body = rows
  rule = ['---' if i < text_columns else '---:' for i in range(len(header))]
  return '\n'.join(
    f'| {" | ".join(map(str, row))} |' for row in (header, rule, *body)
  )
