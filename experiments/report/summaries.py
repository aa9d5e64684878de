"""Curves for TensorBoard, with a folder for each run."""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
import shutil

import numpy as np
import tensorboardX

from experiments.loop import Run


class Summaries:
  """Writes event files, with epochs as TensorBoard's steps.

  The folder is cleared first: a run that is resumed writes all of its epochs
  again.
  """

  def __init__(self, folder: pathlib.Path | None):
    """Writes to ``folder``, or nothing if it is None."""
    self._folder = folder
    if folder:
      shutil.rmtree(folder, ignore_errors=True)
    self._writers: dict[pathlib.Path, tensorboardX.SummaryWriter] = {}
    self._num_epochs: dict[str, int] = {}

  def add_epochs(
    self,
    stage: str,
    runs: Sequence[Run],
    history: Mapping[str, Sequence[Sequence[float]]],
  ) -> None:
    """Writes the epochs of a stage that are not yet written.

    Args:
      stage: The name of the stage.
      runs: Its runs.
      history: Quantities [epochs, runs].
    """
    first = self._num_epochs.get(stage, 0)
    for name, values in history.items():
      self._num_epochs[stage] = len(values)
      for epoch in range(first, len(values)):
        self._add(stage, runs, name, values[epoch], epoch + 1)

  def add_measured(
    self,
    stage: str,
    runs: Sequence[Run],
    measured: Mapping[str, np.ndarray],
  ) -> None:
    """Writes quantities [runs] of trained models, at the last epoch."""
    for name, values in measured.items():
      self._add(stage, runs, f'final/{name}', values, self._num_epochs[stage])

  def close(self) -> None:
    """Flushes and closes all files."""
    for writer in self._writers.values():
      writer.close()

  def _add(self, stage, runs, name, values, step):
    if not self._folder:
      return
    for run, value in zip(runs, values, strict=True):
      folder = self._folder / stage / f'{run.optimizer}-{run.rho:g}-{run.seed}'
      if folder not in self._writers:
        self._writers[folder] = tensorboardX.SummaryWriter(str(folder))
      self._writers[folder].add_scalar(name, value, step)
