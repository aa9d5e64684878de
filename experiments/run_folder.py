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


def lock(out: Path, config: Mapping[str, Any]) -> filelock.AcquireReturnProxy:
  """Locks a folder, which is made if it does not exist, for a program.

  What a program finds in its folder, it keeps and goes on with.

  Args:
    out: The folder.
    config: What the results depend on, in JSON's types.

  Returns:
    The lock: a context manager that releases it. The end of the process
    releases it, too.

  Raises:
    RefusedError: Another process writes there, or it holds what was made with
      another ``config``.
    OSError: The folder cannot be written to.
  """
  locked = _lock(out)
  results = read(out).get('config', {})
  if change := find_change({**_started(out), **results}, config):
    locked.lock.release()
    raise RefusedError(
      f"argument --out: '{out}' holds results with {change}. Remove it, or"
      f' write another --out.'
    )
  return locked


def _lock(out: Path) -> filelock.AcquireReturnProxy:
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
  """Locks a folder for a run that resumes only on request, and prepares it.

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
  claimed = _lock(out)
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
  results = read(out)
  return bool(results) and results.get('complete', True)


def read(out: Path) -> dict[str, Any]:
  """The results in the folder; empty if there are none."""
  return _read(out / RESULTS)


def find_change(
  before: Mapping[str, Any], now: Mapping[str, Any], *, nested: bool = False
) -> str:
  """The first setting that differs, with both values; empty if none does.

  Args:
    before: The settings of what is there; empty if nothing is.
    now: The settings of the program. Only these are compared.
    nested: Whether these are within a setting, such as tasks. Of such, only
      those that both have are compared, unless they have none in common.
  """
  if not before:
    return ''
  names = [name for name in now if name in before] if nested else list(now)
  if nested and now and not names:
    return f'{", ".join(before)}, but got {", ".join(now)}'
  for name in names:
    old, new = before.get(name), now[name]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      if change := find_change(old, new, nested=True):
        return f'{name}: {change}'
    elif old != new:
      return f'{name} = {json.dumps(old)}, but got {json.dumps(new)}'
  return ''


def _check_fresh(out: Path, config: Mapping[str, Any]) -> None:
  if is_resumable(out):
    raise RefusedError(
      f"argument --out: '{out}' holds a run that was interrupted. Write"
      f' --resume to go on with it, or another --out; or remove'
      f' {out / STARTED_WITH}.'
    )
  if not is_finished(out):
    return
  if change := find_change(read(out).get('config', {}), config):
    raise RefusedError(
      f"argument --out: '{out}' holds the results of a run with {change}. Write"
      f' another --out; or remove {out / RESULTS}.'
    )


def _check_resumed(out: Path, config: Mapping[str, Any]) -> None:
  if change := find_change(_started(out), config):
    raise RefusedError(
      f'argument --resume: the run was started with {change}. Write the same'
      f' options again.'
    )


def _started(out: Path) -> dict[str, Any]:
  """What the run in the folder was started with."""
  started = _read(out / STARTED_WITH)
  return {x: started[x] for x in started if x not in records.BY_PROCESS}


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
