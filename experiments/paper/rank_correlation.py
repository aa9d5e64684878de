"""Kendall's tau of a measure and what it should predict, with intervals.

Over all models, and over models that differ in one setting only (Jiang et al.,
`Fantastic Generalization Measures <https://arxiv.org/abs/1912.02178>`_, 2020).
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

NUM_RESAMPLES = 2000


def tau(x: np.ndarray, y: np.ndarray) -> float:
  """Kendall's tau-b; NaN if x or y is constant."""
  if len(x) < 2:
    return np.nan
  found: Any = scipy.stats.kendalltau(x, y)  # The stubs lack its attributes.
  return float(found.statistic)


def difference(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> float:
  """How much better ``a`` predicts ``y`` than ``b`` does."""
  return tau(a, y) - tau(b, y)


def by_setting(
  x: np.ndarray, y: np.ndarray, settings: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """For each setting, the tau of each group of models that differ only in it.

  Args:
    x: The measure, [models].
    y: What it should predict, [models].
    settings: The settings, each [models].

  Returns:
    Arrays [groups], without groups whose tau is undefined.
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


def interval(
  samples: Sequence[np.ndarray],
  statistic: Callable[..., float],
  *,
  paired: bool = False,
) -> dict[str, float]:
  """A statistic of samples and its 95% bootstrap interval.

  Args:
    samples: Arrays, each resampled on its own or, if ``paired``, together.
    statistic: A function of the samples.
    paired: Whether the i-th elements of all samples belong together.

  Returns:
    The statistic as 'tau', and 'low' and 'high', which are NaN if a sample has
    fewer than two elements.
  """
  low = high = np.nan
  if min(map(len, samples)) > 1:
    low, high = scipy.stats.bootstrap(
      samples,
      statistic,
      paired=paired,
      vectorized=False,
      n_resamples=NUM_RESAMPLES,
      method='percentile',
      rng=np.random.default_rng(0),
    ).confidence_interval
  return {
    'tau': float(statistic(*samples)),
    'low': float(low),
    'high': float(high),
  }


def format_interval(found: Mapping[str, float], spec: str = '.2f') -> str:
  """What :func:`interval` returns, as a text."""
  tau_, low, high = (format(found[x], spec) for x in ('tau', 'low', 'high'))
  return f'{tau_} [{low}, {high}]'


def mean_of_means(taus: Mapping[str, np.ndarray]) -> dict[str, float]:
  """The mean over settings of the mean over the groups of each.

  Groups are resampled as if the settings were independent. As the same models
  appear in the groups of every setting, the interval may be too narrow.
  """
  return interval(
    list(taus.values()), lambda *each: float(np.mean([x.mean() for x in each]))
  )
