"""The choice of rho on held-out data."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np

from experiments.loop import Run


class Search(NamedTuple):
  """The candidates for rho of a method, and their scores.

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
    """Index of the candidate with the best mean, the first of several."""
    return int(np.argmax(self.scores.mean(axis=1)))

  @property
  def rho(self) -> float:
    """The candidate that was chosen."""
    return self.candidates[self.best]

  @property
  def at_edge(self) -> bool:
    """Whether a rho outside the range of candidates may be better."""
    return self.best in (0, len(self.candidates) - 1)


def make_runs(
  candidates: Mapping[str, Sequence[float]],
  seeds: Sequence[int],
  num_seeds: int,
) -> list[Run]:
  """The runs of a search, for each method with more than one candidate.

  Each candidate is tried with ``num_seeds`` seeds that follow the largest of
  ``seeds``, which are for the results.
  """
  first = max(seeds) + 1
  return [
    Run(*run)
    for name, rhos in candidates.items()
    if len(rhos) > 1
    for run in itertools.product([name], rhos, range(first, first + num_seeds))
  ]


def make_searches(
  runs: Sequence[Run], scores: Sequence[float]
) -> dict[str, Search]:
  """The search of each method.

  Args:
    runs: Those that :func:`make_runs` returns.
    scores: The held-out accuracy of each run after its last epoch. Held-out
      labels are as noisy as training labels: clean ones would be trained on.
  """
  searches = {}
  for name, group in itertools.groupby(
    zip(runs, scores, strict=True), key=lambda pair: pair[0].optimizer
  ):
    pairs = list(group)
    rhos = sorted({run.rho for run, _ in pairs})
    seeds = sorted({run.seed for run, _ in pairs})
    table = np.reshape([score for _, score in pairs], (len(rhos), len(seeds)))
    searches[name] = Search(rhos, seeds, table)
  return searches
