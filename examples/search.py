"""The choice of rho on held-out data."""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import itertools
from typing import NamedTuple

from flax import linen as nn
import numpy as np
import optax

import data
import evaluation
import training


class Search(NamedTuple):
  """Candidates for rho, and how they did.

  Attributes:
    candidates: The radii that were tried, ascending.
    seeds: The seeds that each was tried with.
    scores: Held-out accuracies [candidates, seeds].
  """

  candidates: Sequence[float]
  seeds: Sequence[int]
  scores: np.ndarray

  @property
  def best(self) -> int:
    """Position of the candidate with the best mean, the smallest of equals."""
    return int(np.argmax(self.scores.mean(axis=1)))

  @property
  def rho(self) -> float:
    """The candidate that was chosen."""
    return self.candidates[self.best]

  @property
  def at_edge(self) -> bool:
    """Whether a rho outside of what was tried may be better still."""
    return self.best in (0, len(self.candidates) - 1)


def search_rho(
  train: Callable[..., training.Training],
  candidates: Sequence[float],
  seeds: Sequence[int],
  *,
  model: nn.Module,
  add_label_noise: Callable[[Sequence[int]], data.Dataset],
  track: Callable[[training.Training], Iterable[tuple[optax.Params, float]]],
) -> Search:
  """Tries every candidate with every seed, all of them at once.

  Args:
    train: From rhos, seeds and a training set to parameters, epoch by epoch:
      :func:`training.train` for one optimizer.
    candidates: Radii, ascending.
    seeds: Seeds, none of which is used for what is reported.
    model: The model.
    add_label_noise: From seeds to the data set. Its held-out labels are as
      noisy as those for training: who has clean ones would train on them.
    track: What shows the progress of an iteration over epochs.

  Returns:
    The search; the test data is not touched.
  """
  rhos, run_seeds = zip(*itertools.product(candidates, seeds), strict=True)
  dataset = add_label_noise(run_seeds)
  # A deque of one keeps the last epoch, which alone is scored.
  epochs = track(train(rhos, run_seeds, dataset.train))
  params, _ = collections.deque(epochs, maxlen=1).pop()
  scores = evaluation.accuracy(params, model, dataset.held_out)
  return Search(
    candidates, seeds, np.reshape(scores, (len(candidates), len(seeds)))
  )
