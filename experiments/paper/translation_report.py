"""What ``experiments.paper.translation`` records of its runs."""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import sklearn

from experiments.paper import corpus
from experiments.paper import translation_floors as floors
from experiments.paper import translation_plan as plan
from experiments.paper import translation_scores as scores
from experiments.report import reporting

# In the name of an optimizer with the rho of its search.
SEARCHED = ', rho searched'


def select(
  args: argparse.Namespace, runs: Sequence[plan.Run]
) -> dict[str, list[plan.Run]]:
  """The finished runs of the results, by optimizer.

  Those with the rho that the search chose have a name of their own.
  """
  found: dict[str, list[plan.Run]] = {}
  for run in runs:
    if not run['is_search'] and plan.is_finished(run):
      name = run['optimizer']
      if run['rho'] != plan.rho_of(name, args):
        name += SEARCHED
      found.setdefault(name, []).append(run)
  return found


def summarize(
  runs: Sequence[plan.Run],
  base: Sequence[plan.Run],
  measured: Mapping[str, floors.Floors],
) -> dict[str, Any]:
  """The statistics of an optimizer, and its differences from Adam.

  Intervals are over seeds (``interval_95``, of Student's t), and over the
  sentences (``bootstrap_95``, of the mean over seeds).
  """
  result: dict[str, Any] = {
    'rho': runs[0]['rho'],
    'seeds': [run['seed'] for run in runs],
  }
  base_of = {run['seed']: run for run in base}
  paired = [run for run in runs if run['seed'] in base_of]
  for split in plan.SPLITS:
    all_rows = np.full(len(measured[split].is_far), True)
    subsets = {split: all_rows}
    if split == 'test':
      subsets['test_far'] = measured[split].is_far
    for name, rows in subsets.items():
      take = lambda run, split=split, rows=rows: np.array(run['counts'][split])[
        rows
      ]
      mine = [take(run) for run in runs]
      result[f'{name}_bleu'] = {
        **reporting.summarize([scores.score(x) for x in mine]),
        'bootstrap_95': scores.interval(scores.resample(mine)),
      }
      if paired:
        mine = [take(run) for run in paired]
        theirs = [take(base_of[run['seed']]) for run in paired]
        differences = [
          scores.score(a) - scores.score(b)
          for a, b in zip(mine, theirs, strict=True)
        ]
        result[f'{name}_bleu_minus_adam'] = {
          **reporting.summarize(differences),
          'bootstrap_95': scores.interval(
            scores.resample(mine) - scores.resample(theirs)
          ),
        }
  result['curves'] = {
    key: np.array([run[key] for run in runs])
    for key in ('train_loss', 'validation_loss')
  }
  return result


def describe(
  args: argparse.Namespace,
  pairs: corpus.Corpus,
  measured: Mapping[str, floors.Floors],
  runs: Sequence[plan.Run],
  stopped: str = '',
) -> dict[str, Any]:
  """The results of all finished runs, by optimizer."""
  selected = select(args, runs)
  base = selected.get('adam', [])
  ended = bool(runs) and plan.find_next(args, runs) is None
  return {
    'complete': not stopped and ended and plan.is_finished(runs[-1]),
    **({'stopped': stopped} if stopped else {}),
    'config': vars(args),
    **corpus.describe(pairs),
    'bleu': scores.signature(),
    'bootstrap': {
      'resamples': scores.NUM_RESAMPLES,
      'seed': scores.RESAMPLING_SEED,
    },
    'text_versions': {
      module.__name__: module.__version__ for module in (sentencepiece, sklearn)
    },
    'floors': {split: each.bleu for split, each in measured.items()},
    # Without near-duplicates of training sentences.
    'far': {split: int(each.is_far.sum()) for split, each in measured.items()},
    'search': {
      name: {
        'rho': found.rho,
        'at_edge': found.at_edge,
        'seeds': list(found.seeds),
        'candidates': [
          {'rho': rho, 'validation_bleu': score}
          for rho, (score,) in zip(found.candidates, found.scores, strict=True)
        ],
      }
      for name, found in plan.searches(args, runs).items()
    },
    'training_seconds': {
      name: [run['seconds'] for run in each] for name, each in selected.items()
    },
    'optimizers': {
      name: summarize(each, base if name != 'adam' else (), measured)
      for name, each in selected.items()
    },
  }
