"""Checkpoints, from which a run that was killed goes on."""

from collections.abc import Callable
from collections.abc import Mapping
import hashlib
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

# One for going on, and the one before, if a crash of the machine damaged it.
NUM_KEPT = 2

PyTree = Any


class Checkpoints:
  """The checkpoints in a folder.

  Orbax writes each beside its place, and moves it there once it is complete: a
  kill in the middle leaves the one before.
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
    states = _without_keys(states)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        states=ocp.args.StandardSave(states),
        progress=ocp.args.JsonSave(
          {**progress, 'sha256_of_states': _digest(states)}
        ),
      ),
    )

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
      try:
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
        if _digest(states) != progress['sha256_of_states']:
          raise ValueError('its arrays are not those that were written')
      except Exception as error:  # Whatever Orbax meets in a damaged file.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        report(f'Checkpoint {step} is damaged, and left out: {reason}')
        self._set_aside(step)
      else:
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


def _digest(tree: PyTree) -> str:
  """A digest of all bits of ``tree``."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()
