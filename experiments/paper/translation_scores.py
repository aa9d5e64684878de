"""BLEU by SacreBLEU, with bootstrap intervals over the sentences."""

from collections.abc import Sequence

import numpy as np
import sacrebleu

NUM_RESAMPLES = 1000
RESAMPLING_SEED = 0


def signature() -> str:
  """SacreBLEU's signature: its version and settings."""
  return sacrebleu.BLEU(references=[['']]).get_signature().format()


def count(translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
  """What BLEU is computed from, for each sentence.

  Returns:
    int [sentences, 10]: the n-grams that match, those that there are (n from 1
    to 4 each), the length of the translation and of the reference.
  """
  metric = sacrebleu.BLEU()
  found = [
    metric.corpus_score([translation], [[reference]])
    for translation, reference in zip(translations, references, strict=True)
  ]
  return np.array(
    [(*x.counts, *x.totals, x.sys_len, x.ref_len) for x in found]
  ).reshape(-1, 10)


def score(counts: np.ndarray) -> float:
  """The BLEU of sentences, from 0 to 100."""
  total = [int(x) for x in np.asarray(counts).reshape(-1, 10).sum(axis=0)]
  return sacrebleu.BLEU.compute_bleu(
    correct=total[:4],
    total=total[4:8],
    sys_len=total[8],
    ref_len=total[9],
    smooth_method='exp',
  ).score


def resample(counts: Sequence[np.ndarray]) -> np.ndarray:
  """The mean BLEU of some runs on sentences drawn with replacement.

  All that have as many sentences draw the same ones, which pairs them.

  Args:
    counts: Those of each run, [runs, sentences, 10].

  Returns:
    BLEU [resamples].
  """
  runs = np.asarray(counts)
  n = runs.shape[1]
  rng = np.random.default_rng(RESAMPLING_SEED)
  means = []
  for _ in range(NUM_RESAMPLES):
    weights = np.bincount(rng.integers(n, size=n), minlength=n)
    means.append(np.mean([score(weights @ run) for run in runs]))
  return np.array(means)


def interval(scores: np.ndarray) -> list[float]:
  """The 95% interval of resampled scores, by their percentiles."""
  return np.percentile(scores, [2.5, 97.5]).tolist()
