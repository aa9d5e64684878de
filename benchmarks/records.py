"""What every benchmark writes: results with their provenance, and tables."""

from collections.abc import Mapping
from collections.abc import Sequence
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import re
import shlex
import subprocess
from typing import Any

import optax_asam

PACKAGES = ('jax', 'jaxlib', 'optax', 'optax-asam')


def provenance(
  program: str, argv: Sequence[str], packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
  """The command, the commit and the versions of a run."""
  git = ['git', 'describe', '--always', '--dirty', '--exclude=*', '--abbrev=40']
  commit = subprocess.run(
    git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
  )
  return {
    'command': shlex.join(['python', '-m', program, *argv]),
    'commit': commit.stdout.strip() or None,
    'versions': {
      'python': platform.python_version(),
      **{name: _version(name) for name in packages},
    },
  }


def _version(package: str) -> str:
  """The version of a package; this one may be run without being installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    if package != 'optax-asam':
      raise
    return optax_asam.__version__


def write_json(path: Path, results: Mapping[str, Any]) -> None:
  """Writes ``results`` in one step, so that a file is complete or absent."""
  partial = path.with_name(f'.{path.name}.partial')
  partial.write_text(json.dumps(results, indent=2, allow_nan=False) + '\n')
  os.replace(partial, path)


def replace_between(text: str, name: str, made: str) -> str:
  """A page with ``made`` between the comments ``name`` and ``end`` or /name."""
  return re.sub(
    f'(<!-- {name} -->\n\n).*?(\n\n<!-- (end|/{name}) -->)',
    lambda found: found[1] + made + found[2],
    text,
    flags=re.DOTALL,
  )


def markdown(rows: Sequence[Sequence[Any]], text_columns: int) -> str:
  """A table whose first row is its header; numbers are aligned to the right."""
  header, *body = rows
  rule = ['---' if i < text_columns else '---:' for i in range(len(header))]
  return '\n'.join(
    f'| {" | ".join(map(str, row))} |' for row in (header, rule, *body)
  )
