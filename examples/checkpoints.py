"""Checkpoints, from which a run that was killed goes on."""

from collections.abc import Callable
from collections.abc import Mapping
import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import records

# Where a run has them, in the folder of its results.
FOLDER = 'checkpoints'

# One for going on, and the one before, if a crash of the machine damaged it.
NUM_KEPT = 2

# In the folder of each: the SHA-256 of its files.
DIGESTS = 'sha256.json'

PyTree = Any


class Checkpoints:
  """The checkpoints in a folder.

  Orbax writes each beside its place, and moves it there once it is complete: a
  kill in the middle leaves the one before. The digests of the files come last,
  so that one that is damaged is known before Orbax reads it.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder.absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=NUM_KEPT, enable_async_checkpointing=False
      ),
    )

  @property
  def steps(self) -> list[int]:
    """The numbers of the checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, states: PyTree, progress: Mapping[str, Any]
  ) -> None:
    """Writes arrays, and what JSON can hold."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        states=ocp.args.StandardSave(_without_keys(states)),
        progress=ocp.args.JsonSave(progress),
      ),
    )
    folder = self._folder / str(step)
    records.write_json(folder / DIGESTS, _digests(folder))

  def restore(
    self,
    make_states: Callable[[Mapping[str, Any]], PyTree],
    report: Callable[[str], None],
  ) -> tuple[PyTree, Mapping[str, Any]] | None:
    """Reads the newest checkpoint that is whole.

    Args:
      make_states: From the progress to states of the same structure, shapes and
        dtypes as those that were saved.
      report: Is told of each damaged checkpoint.

    Returns:
      The states and the progress, or None where there is no whole checkpoint.
    """
    for step in reversed(self.steps):
      if not _is_whole(self._folder / str(step)):
        report(
          f'Checkpoint {step} is damaged, and left out: its files are not those'
          f' that were written.'
        )
        self._set_aside(step)
        continue
      progress = self._manager.restore(
        step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
      )['progress']
      template = make_states(progress)
      states = self._manager.restore(
        step,
        args=ocp.args.Composite(
          states=ocp.args.StandardRestore(_without_keys(template))
        ),
      )['states']
      return _with_keys(states, template), progress
    return None

  def _set_aside(self, step: int) -> None:
    """Renames a checkpoint: Orbax writes none whose number is not new."""
    aside = self._folder / f'damaged-{step}'
    shutil.rmtree(aside, ignore_errors=True)
    (self._folder / str(step)).rename(aside)
    self._manager.reload()

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.close()


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
  """``tree`` with the data of random keys, which Orbax cannot write."""
  return jax.tree.map(
    lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
  )


def _with_keys(tree: PyTree, template: PyTree) -> PyTree:
  """``tree`` with random keys where ``template`` has some."""
  return jax.tree.map(
    lambda leaf, like: (
      jax.random.wrap_key_data(leaf) if _is_key(like) else leaf
    ),
    tree,
    template,
  )


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """The digest of each file that Orbax wrote, by its path in ``folder``."""
  return {
    file.relative_to(folder).as_posix(): _digest(file)
    for file in sorted(folder.rglob('*'))
    if file.is_file() and file.name != DIGESTS
  }


def _digest(file: pathlib.Path) -> str:
  with file.open('rb') as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()


def _is_whole(folder: pathlib.Path) -> bool:
  """Whether the files are there, bit for bit, and no others."""
  try:
    written = json.loads((folder / DIGESTS).read_text())
  except (OSError, ValueError):  # Killed before they were written; damaged.
    return False
  return written == _digests(folder)
