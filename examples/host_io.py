"""What the processes of a job read and write together: batches, checkpoints.

The global batch of a step is the same examples in the same order, however many
processes read it. So the position in the data follows from the number of steps,
and a checkpoint serves any number of processes and devices.
"""

from collections.abc import Iterator
import os
from typing import Any

from etils import epath
import grain
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

import data

# The examples lie in memory. Read from files, they want threads.
READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Examples:
  """A split, example by example, as Grain reads it.

  For a data set that no host can hold, read one example from a file here.
  """

  def __init__(self, split: data.Split):
    self._split = split

  def __len__(self) -> int:
    return len(self._split.labels)

  def __getitem__(self, index: int) -> data.Split:
    """The example at ``index``."""
    return data.Split(self._split.images[index], self._split.labels[index])


def local_batches(
  split: data.Split,
  batch_size: int,
  *,
  epochs: int,
  seed: int,
  process_index: int,
  process_count: int,
  first_step: int = 0,
) -> Iterator[data.Split]:
  """The parts of the global batches that a process reads.

  Args:
    split: What to read.
    batch_size: The size of a global batch, a multiple of ``process_count``.
    epochs: How often the data is read, each time in another order. What fills
      no batch sits an epoch out.
    seed: The seed of these orders.
    process_index: Which process reads.
    process_count: How many processes read.
    first_step: The number of the step to go on with.

  Returns:
    Batches of ``batch_size // process_count`` examples. Those of one step, one
    process after the other, are the global batch.
  """
  num_batches = len(split.labels) // batch_size
  order = grain.MapDataset.source(Examples(split)).seed(seed).shuffle()
  # Cut the order first and deal the pieces out then: dealt out example by
  # example, a batch would be in another order for each number of processes.
  pieces = order[: num_batches * batch_size].batch(batch_size // process_count)
  mine = pieces[process_index::process_count].repeat(epochs)
  return iter(mine[first_step:].to_iter_dataset(READ_OPTIONS))


def check_batch_size(batch_size: int, split: data.Split) -> None:
  """Raises an error if batches fit neither the devices nor the data."""
  n, size = jax.device_count(), len(split.labels)
  if batch_size % n or batch_size > size:
    raise data.DataError(
      f'argument --batch-size: must be a multiple of {n}, the number of'
      f' devices, and at most {size}, the size of the training set, but got'
      f' {batch_size}. Write for example --batch-size {min(16, size // n) * n}.'
    )


def to_global(
  local_batch: data.Split, sharding: jax.sharding.Sharding
) -> data.Split:
  """Joins the parts that all processes have read, without moving them."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (len(x) * jax.process_count(), *x.shape[1:])
    ),
    local_batch,
  )


class CheckpointError(Exception):
  """Checkpoints that cannot be used; the message says why, and what to do."""


class Checkpoints:
  """The checkpoints of a run, in a folder that all processes share.

  Args:
    folder: A path on this machine or of a bucket, such as ``gs://bucket/run``.
    config: The options that must be the same when the run goes on.

  Raises:
    CheckpointError: The folder is not shared.
  """

  def __init__(self, folder: str, config: dict[str, Any]):
    is_in_bucket = '://' in folder
    path = epath.Path(folder if is_in_bucket else os.path.abspath(folder))
    check_shared(path)
    self._folder = folder
    self._config = config
    self._manager = ocp.CheckpointManager(
      path,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
      ),
    )

  def save(self, step: int, state: Any, losses: list[float]) -> None:
    """Writes a state, each process its part, and the losses so far."""
    progress = {'config': self._config, 'losses': losses}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
      ),
      force=True,  # When to save is not the manager's choice.
    )

  def restore(
    self, shapes: Any, shardings: Any, *, resume: bool
  ) -> tuple[Any, list[float]] | None:
    """Reads the newest checkpoint, whatever devices it was written from.

    Args:
      shapes: The shapes and dtypes of a state, as of ``jax.eval_shape``.
      shardings: Where its arrays shall lie now.
      resume: Whether there may be one.

    Returns:
      The state and the losses; None where there is no checkpoint.

    Raises:
      CheckpointError: There is one that may not be, or is of another run.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    if not resume:
      raise CheckpointError(
        f"argument --resume: '{self._folder}' holds the checkpoints of a run."
        f' Write --resume to go on with it, or another folder.'
      )
    progress = self._manager.restore(
      step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
    )['progress']
    for name, value in self._config.items():
      started = progress['config'][name]
      if value != started:
        raise CheckpointError(
          f'argument --resume: the run was started with {name} = {started}, but'
          f' got {value}. Write the same options again.'
        )
    like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      shardings,
    )
    state = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
    )['state']
    return state, progress['losses']

  def is_preempted(self, step: int) -> bool:
    """Whether SIGTERM told a process that its machine is taken away.

    All processes learn it at the same step.
    """
    return self._manager.reached_preemption(step)


def check_shared(folder: epath.Path) -> None:
  """Raises an error unless all processes see the same folder; makes it."""
  seen = folder / '.seen'
  token = np.frombuffer(os.urandom(8), np.uint8)
  token = multihost_utils.broadcast_one_to_all(token).tobytes()
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    seen.write_bytes(token)
  multihost_utils.sync_global_devices('written')
  is_seen = seen.exists() and seen.read_bytes() == token
  is_seen = np.atleast_1d(multihost_utils.process_allgather(np.array(is_seen)))
  if not is_seen.all():
    raise CheckpointError(
      f'argument --checkpoint-dir: all hosts must share this folder, but'
      f" '{folder}' of process {np.flatnonzero(~is_seen)[0]} is not that of"
      f' process 0. Write a path in a bucket or on a network file system, for'
      f' example gs://my-bucket/run.'
    )
