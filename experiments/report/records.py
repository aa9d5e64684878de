"""Files of results: what ran and on what, as JSON, replaced atomically."""

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
from matplotlib.figure import Figure
import numpy as np
import optax
import scipy

import optax_asam

# How the names of files begin that are not yet complete.
PARTIAL = '.partial-'

# What a file of `write_started` has besides what must not change.
BY_PROCESS = ('commits', 'pid')


def provenance(
  program: str, argv: Sequence[str], started: Path | None = None
) -> dict[str, Any]:
  """The command, the commit, the versions and the device.

  Call it at the start: what is committed later is not what runs.

  Args:
    program: The module, such as 'experiments.compare'.
    argv: Its options.
    started: The file of :func:`write_started`, of a program that can be
      resumed.
  """
  earlier = _commits(started)[:-1] if started else []
  return {
    'command': shlex.join(['python', '-m', program, *argv]),
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


def git_commit() -> str | None:
  """The commit, ``-dirty`` if there are changes since.

  Without git, what the environment variable COMMIT says, or None.
  """
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
    return os.environ.get('COMMIT')


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A file in the same folder that replaces ``path`` once it is complete."""
  partial = path.with_name(f'{PARTIAL}{path.name}')
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def to_json(value: Any) -> Any:
  """``value`` in JSON's types, with null for NaN and infinity.

  They come from a training that diverged or from an interval of a single seed.
  """
  if isinstance(value, Mapping):
    return {key: to_json(item) for key, item in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return to_json(value.tolist())
  if isinstance(value, Path):
    return str(value)
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def write_json(path: Path, results: Mapping[str, Any]) -> None:
  """Writes ``results`` as a whole, or leaves the file as it was."""
  text = json.dumps(to_json(results), indent=2, allow_nan=False)
  with replacing(path) as partial:
    partial.write_text(text + '\n')


def write_figure(path: Path, figure: Figure) -> None:
  """Writes a figure as a whole, or leaves the file as it was."""
  with replacing(path) as partial:
    figure.savefig(partial, format=path.suffix[1:])


def write_started(file: Path, config: Mapping[str, Any]) -> None:
  """Writes what a run is started or resumed with, by which process and commits.

  Args:
    file: The file, which exists if the run is resumed.
    config: What must not change when the run is resumed.
  """
  commits = [*_commits(file), git_commit()]
  write_json(file, {**config, 'commits': commits, 'pid': os.getpid()})


def _commits(file: Path) -> list[str | None]:
  """The commit of each part of a run so far."""
  return json.loads(file.read_text())['commits'] if file.exists() else []
