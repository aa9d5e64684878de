"""Tables in Markdown, and their places in a page."""

from collections.abc import Sequence
import re
from typing import Any


def replace_between(text: str, name: str, made: str) -> str:
  """A page with ``made`` between the comments ``name`` and ``end`` or /name.

  Raises:
    ValueError: The page does not have these comments exactly once.
  """
  text, count = re.subn(
    f'(<!-- {name} -->\n\n)(?:(?!<!-- ).)*(\n\n<!-- (end|/{name}) -->)',
    lambda found: found[1] + made + found[2],
    text,
    flags=re.DOTALL,
  )
  if count != 1:
    raise ValueError(
      f'expected <!-- {name} --> and <!-- end --> around one table, but found'
      f' {count} such pairs.'
    )
  return text


def table(rows: Sequence[Sequence[Any]], text_columns: int) -> str:
  """A table whose first row is its header; numbers are aligned to the right."""
  header, *body = rows
  rule = ['---' if i < text_columns else '---:' for i in range(len(header))]
  return '\n'.join(
    f'| {" | ".join(map(str, row))} |' for row in (header, rule, *body)
  )
