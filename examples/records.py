"""Files of results: what ran, in JSON, whole or not at all."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import math
import os
from pathlib import Path
import platform
import shlex
import subprocess
from typing import Any

import flax
import jax
import numpy as np
import optax
import scipy

import optax_asam


def provenance(
  program: str, argv: Sequence[str], started: Path | None = None
) -> dict[str, Any]:
  """What runs and on what.

  To be called at the start: what is committed later has no part in it.

  Args:
    program: The file, such as 'examples/train.py'.
    argv: Its options.
    started: The file of :func:`write_started`, of a program that can be
      resumed.
  """
  earlier = _commits(started)[:-1] if started else []
  return {
    'command': command_line(program, argv),
    'commit': git_commit(),
    **({'resumed_from': earlier} if earlier else {}),
    'versions': {
      'python': platform.python_version(),
      **{
        module.__name__: module.__version__
        for module in (jax, flax, optax, np, scipy, optax_asam)
      },
    },
    'device': jax.devices()[0].device_kind,
  }


def command_line(program: str, argv: Sequence[str]) -> str:
  """What a person would type to run a program with these options."""
  return shlex.join(['python', program, *argv])


def git_commit() -> str | None:
  """The commit that ran, ``-dirty`` with changes since; None without git."""
  command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
  try:
    return subprocess.run(
      [*command, '--abbrev=40'],
      cwd=Path(__file__).parent,
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A file beside ``path`` that takes its place once it is complete."""
  partial = path.with_name(f'.partial-{path.name}')
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def to_json(value: Any) -> Any:
  """``value`` in the types of JSON; NaN and infinity, which it lacks, as null.

  They come from a training that diverged or from an interval of a single seed.
  """
  if isinstance(value, Mapping):
    return {key: to_json(item) for key, item in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return to_json(value.tolist())
  if isinstance(value, Path):
    return str(value)
  if isinstance(value, list):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def write_json(path: Path, results: Mapping[str, Any]) -> None:
  """Writes ``results``, all of them or nothing."""
  text = json.dumps(to_json(results), indent=2, allow_nan=False)
  with replacing(path) as partial:
    partial.write_text(text + '\n')


def write_started(file: Path, config: Mapping[str, Any]) -> None:
  """Writes what a run is started or resumed with, and the commits of its parts.

  Args:
    file: The file; what is resumed has one already.
    config: What must be the same in all parts.
  """
  write_json(file, {**config, 'commits': [*_commits(file), git_commit()]})


def read_started(file: Path) -> dict[str, Any]:
  """What a run was started with, less its commits."""
  started = json.loads(file.read_text())
  del started['commits']
  return started


def _commits(file: Path) -> list[str | None]:
  """The commit of each part of a run so far."""
  return json.loads(file.read_text())['commits'] if file.exists() else []
