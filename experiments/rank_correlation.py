"""Kendall's rank correlation of a measure with what it should predict.

Over all models, and over models that differ in one setting alone (Jiang et al.,
`Fantastic Generalization Measures <https://arxiv.org/abs/1912.02178>`_, 2020).
Intervals are bootstrapped: over models, or over the groups of models that share
all other settings.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import Any
from typing import NamedTuple

import numpy as np
import scipy.stats

NUM_RESAMPLES = 2000


class Correlation(NamedTuple):
  """A rank correlation and its 95 % bootstrap interval."""

  tau: float
  low: float
  high: float


def tau(x: np.ndarray, y: np.ndarray) -> float:
  """Kendall's tau-b; NaN where x or y is constant."""
  if len(x) < 2:
    return np.nan
  found: Any = scipy.stats.kendalltau(x, y)  # Its stubs lack the attributes.
  return float(found.statistic)


def overall(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Correlation:
  """The correlation over all models, which are resampled in pairs."""
  return _bootstrap((x, y), tau, seed, paired=True)


def difference(
  x: np.ndarray, other: np.ndarray, y: np.ndarray, seed: int = 0
) -> Correlation:
  """By how much the tau of x and y exceeds that of another measure and y.

  Of all models, which are resampled with both of their measures.
  """
  return _bootstrap(
    (x, other, y),
    lambda x, other, y: tau(x, y) - tau(other, y),
    seed,
    paired=True,
  )


def by_setting(
  x: np.ndarray,
  y: np.ndarray,
  settings: Mapping[str, Sequence[Any] | np.ndarray],
) -> dict[str, np.ndarray]:
  """For each setting, the tau of each group that differs in it alone.

  Args:
    x: The measure, [models].
    y: What it should predict, [models].
    settings: The settings, each [models].

  Returns:
    Arrays [groups]. Groups in which a tau is not defined are left out.
  """
  taus = {}
  for name in settings:
    rest = [values for other, values in settings.items() if other != name]
    others = list(zip(*rest, strict=True))
    groups = [
      [i for i, other in enumerate(others) if other == group]
      for group in dict.fromkeys(others)
    ]
    each = np.array([tau(x[group], y[group]) for group in groups])
    taus[name] = each[np.isfinite(each)]
  return taus


def mean_over_groups(taus: np.ndarray, seed: int = 0) -> Correlation:
  """The mean over the groups of one setting, which are resampled."""
  return _bootstrap((taus,), np.mean, seed)


def mean_over_settings(
  taus: Mapping[str, np.ndarray], seed: int = 0
) -> Correlation:
  """The mean of the means over groups; the groups of each are resampled.

  As if the settings were independent: the same models are in the groups of
  each, so that the interval may be too narrow.
  """
  return _bootstrap(
    tuple(taus.values()),
    lambda *each: float(np.mean([np.mean(one) for one in each])),
    seed,
  )


def _bootstrap(samples, statistic, seed, paired=False) -> Correlation:
  if any(len(sample) < 2 for sample in samples):
    return Correlation(float(statistic(*samples)), np.nan, np.nan)
  interval = scipy.stats.bootstrap(
    samples,
    statistic,
    paired=paired,
    vectorized=False,
    n_resamples=NUM_RESAMPLES,
    method='percentile',
    rng=np.random.default_rng(seed),
  ).confidence_interval
  return Correlation(
    float(statistic(*samples)), float(interval.low), float(interval.high)
  )


def make_grid(values: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
  """All combinations of the values of settings, each an array [models]."""
  rows = itertools.product(*values.values())
  return dict(zip(values, map(np.array, zip(*rows, strict=True)), strict=True))
