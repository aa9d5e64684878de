"""The folder of a run: who writes to it, and what it holds.

A run that was interrupted there is neither lost nor mixed with another, and the
results of one that finished are never replaced by less.
"""

from collections.abc import Mapping
import json
from pathlib import Path
import shutil
from typing import Any

import filelock

from experiments import checkpoints
from experiments.report import records

# What an unfinished run was started with, next to its checkpoints.
STARTED_WITH = 'checkpoints.json'
RESULTS = 'results.json'
LOCK = '.lock'


class RefusedError(Exception):
  """The folder cannot be used; the message says why, and what to do."""


def lock(out: Path) -> filelock.AcquireReturnProxy:
  """Locks a folder, which is made if it does not exist.

  Returns:
    The lock: a context manager that releases it. The end of the process
    releases it, too.

  Raises:
    RefusedError: Another process writes there.
    OSError: The folder cannot be written to.
  """
  out.mkdir(parents=True, exist_ok=True)
  try:
    return filelock.FileLock(out / LOCK, timeout=0).acquire()
  except filelock.Timeout:
    raise RefusedError(
      f"argument --out: a run is in progress in '{out}'{_process(out)}. Wait"
      f' until it has ended, or write another --out.'
    ) from None


def claim(
  out: Path, config: Mapping[str, Any], *, resume: bool
) -> filelock.AcquireReturnProxy:
  """Locks a folder for a run as :func:`lock` does, and prepares it.

  Args:
    out: The folder.
    config: The options that determine what the run computes, in JSON's types.
    resume: Whether the run in the folder goes on.

  Raises:
    RefusedError: Another process writes there, a run of other options has
      finished there, one was interrupted there, or, with ``resume``, none was.
    OSError: The folder cannot be written to.
  """
  if resume and not (out / STARTED_WITH).exists():
    raise RefusedError(
      f"argument --resume: there is no interrupted run in '{out}'. Leave it"
      f' out, or write the --out of one.'
    )
  claimed = lock(out)
  try:
    if resume:
      _check_resumed(out, config)
    else:
      _check_fresh(out, config)
      clear(out)
    records.write_started(out / STARTED_WITH, config)
  except BaseException:
    claimed.lock.release()
    raise
  return claimed


def clear(out: Path) -> None:
  """Removes what a run needs to be resumed, and what a crash left behind."""
  (out / STARTED_WITH).unlink(missing_ok=True)
  if (out / checkpoints.FOLDER).exists():
    shutil.rmtree(out / checkpoints.FOLDER)
  for partial in out.glob(f'{records.PARTIAL}*'):
    partial.unlink()


def is_resumable(out: Path) -> bool:
  """Whether the folder holds an interrupted run that has a checkpoint."""
  saved = checkpoints.Checkpoints(out / checkpoints.FOLDER)
  return (out / STARTED_WITH).exists() and bool(saved.steps)


def is_finished(out: Path) -> bool:
  """Whether the folder holds the results of a run that finished."""
  results = _read(out / RESULTS)
  return bool(results) and results.get('complete', True)


def _check_fresh(out: Path, config: Mapping[str, Any]) -> None:
  if is_resumable(out):
    raise RefusedError(
      f"argument --out: '{out}' holds a run that was interrupted. Write"
      f' --resume to go on with it, or another --out; or remove'
      f' {out / STARTED_WITH}.'
    )
  if not is_finished(out):
    return
  change = _find_change(_read(out / RESULTS).get('config', {}), config)
  if change:
    raise RefusedError(
      f"argument --out: '{out}' holds the results of a run with {change}. Write"
      f' another --out; or remove {out / RESULTS}.'
    )


def _check_resumed(out: Path, config: Mapping[str, Any]) -> None:
  change = _find_change(records.read_started(out / STARTED_WITH), config)
  if change:
    raise RefusedError(
      f'argument --resume: the run was started with {change}. Write the same'
      f' options again.'
    )


def _find_change(before: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  """The first option that differs, with both values; empty if none does."""
  for name, value in config.items():
    if before.get(name) != value:
      old, new = json.dumps(before.get(name)), json.dumps(value)
      return f'{name} = {old}, but got {new}'
  return ''


def _process(out: Path) -> str:
  """The process that holds the lock, as far as it is known."""
  pid = _read(out / STARTED_WITH).get('pid')
  return f' by process {pid}' if pid else ''


def _read(file: Path) -> dict[str, Any]:
  """A JSON file; empty if it is missing or damaged."""
  try:
    return json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
