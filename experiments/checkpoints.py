"""Checkpoints, from which an interrupted run is resumed."""

from collections.abc import Callable
from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

from flax import serialization
import jax
import jax.numpy as jnp

from experiments.report import records

# Where a run has them, in the folder of its results.
FOLDER = 'checkpoints'

# The newest, and the one before in case a crash of the machine damaged it.
NUM_KEPT = 2

_DIGEST_SIZE = hashlib.sha256().digest_size

PyTree = Any


class Checkpoints:
  """The checkpoints in a folder, a file each: a SHA-256 digest and MessagePack.

  A file appears under its name once it is complete, so that a kill in the
  middle of a write leaves the previous checkpoint.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  @property
  def steps(self) -> list[int]:
    """The numbers of the checkpoints, ascending."""
    return sorted(
      int(file.stem) for file in self._folder.glob('[0-9]*.msgpack')
    )

  def save(
    self, step: int, states: PyTree, progress: Mapping[str, Any]
  ) -> None:
    """Writes arrays, and what JSON can hold; removes what is too old."""
    content = serialization.msgpack_serialize(
      {
        'states': serialization.to_state_dict(
          jax.device_get(_without_keys(states))
        ),
        'progress': json.dumps(progress),
      }
    )
    self._folder.mkdir(parents=True, exist_ok=True)
    with records.replacing(self._path(step)) as partial:
      partial.write_bytes(hashlib.sha256(content).digest() + content)
    for old in self.steps[:-NUM_KEPT]:
      self._path(old).unlink()

  def restore(
    self,
    make_states: Callable[[Mapping[str, Any]], PyTree],
    report: Callable[[str], None],
  ) -> tuple[PyTree, Mapping[str, Any]] | None:
    """Reads the newest checkpoint that is intact.

    Args:
      make_states: From the progress to states of the same structure, shapes and
        dtypes as those that were saved.
      report: Called with a message for each damaged checkpoint, and with one
        if no checkpoint is intact.

    Returns:
      The states and the progress, or None if no checkpoint is intact.
    """
    for step in reversed(self.steps):
      saved = self._path(step).read_bytes()
      digest, content = saved[:_DIGEST_SIZE], saved[_DIGEST_SIZE:]
      if digest != hashlib.sha256(content).digest():
        report(f'Checkpoint {step} is damaged, and is removed.')
        # Or it would count as newer than those that follow.
        self._path(step).unlink()
        continue
      read: Any = serialization.msgpack_restore(content)
      progress = json.loads(read['progress'])
      template = make_states(progress)
      states = serialization.from_state_dict(
        _without_keys(template), read['states']
      )
      return _with_keys(states, template), progress
    report('There is no intact checkpoint. The run starts from the beginning.')
    return None

  def _path(self, step: int) -> pathlib.Path:
    return self._folder / f'{step}.msgpack'


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
  """``tree`` with the data of random keys, which cannot be serialized."""
  return jax.tree.map(
    lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
  )


def _with_keys(tree: PyTree, template: PyTree) -> PyTree:
  """``tree`` on the device, with random keys where ``template`` has some."""
  return jax.tree.map(
    lambda leaf, like: (
      jax.random.wrap_key_data(jnp.asarray(leaf))
      if _is_key(like)
      else jnp.asarray(leaf)
    ),
    tree,
    template,
  )
