"""Which runs a translation consists of, and when it stops early."""

import argparse
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import search
from experiments.paper import translation_floors as floors
from experiments.paper import translation_scores as scores

METHODS = ('adam', 'sam', 'asam')
SPLITS = ('validation', 'test')

# The results of one run so far, in JSON's types.
Run = dict[str, Any]


class BelowFloorError(Exception):
  """Adam translates no better than what needs no training."""


def rho_of(optimizer: str, args: argparse.Namespace) -> float:
  """The paper's radius of an optimizer; 0 for Adam."""
  return {'sam': args.rho_sam, 'asam': args.rho_asam}.get(optimizer, 0.0)


def candidates_of(optimizer: str, args: argparse.Namespace) -> Sequence[float]:
  """The radii that the search tries."""
  candidates = {'sam': args.search_sam, 'asam': args.search_asam}
  return sorted(candidates.get(optimizer, []))


def make_run(optimizer: str, rho: float, seed: int, *, is_search: bool) -> Run:
  """A run that has not begun."""
  return {
    'optimizer': optimizer,
    'rho': rho,
    'seed': seed,
    'is_search': is_search,
    'train_loss': [],
    'validation_loss': [],
    # The losses of the steps of the current epoch.
    'losses': [],
    'seconds': 0.0,
    # What BLEU is computed from, by split.
    'counts': {},
  }


def identity(run: Run) -> tuple[Any, ...]:
  """What distinguishes a run from others."""
  return tuple(run[x] for x in ('optimizer', 'rho', 'seed', 'is_search'))


def splits_of(run: Run) -> Sequence[str]:
  """What a run translates; a search does not read the test sentences."""
  return SPLITS[:1] if run['is_search'] else SPLITS


def is_finished(run: Run) -> bool:
  """Whether a run has translated all."""
  return set(run['counts']) == {*splits_of(run)}


def make(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Run]:
  """All runs in their order; those with the choice of the search come last."""
  for optimizer in args.optimizer:
    for seed in range(args.seeds):
      rho = rho_of(optimizer, args)
      yield make_run(optimizer, rho, seed, is_search=False)
  for optimizer in args.optimizer:
    for rho in candidates_of(optimizer, args):
      # Another seed than those of the results.
      yield make_run(optimizer, rho, args.seeds, is_search=True)
  for optimizer, found in searches(args, runs).items():
    if found.rho != rho_of(optimizer, args):
      for seed in range(args.seeds):
        yield make_run(optimizer, found.rho, seed, is_search=False)


def find_next(args: argparse.Namespace, runs: Sequence[Run]) -> Run | None:
  """The first run of the plan that has not begun; None if all have."""
  begun = {identity(run) for run in runs}
  left = (run for run in make(args, runs) if identity(run) not in begun)
  return next(left, None)


def searches(
  args: argparse.Namespace, runs: Sequence[Run]
) -> dict[str, search.Search]:
  """The searches that are finished, with BLEU on the validation set."""
  found = {}
  for optimizer in args.optimizer:
    candidates = candidates_of(optimizer, args)
    bleu = {
      run['rho']: bleu_of(run, 'validation')
      for run in runs
      if run['is_search'] and run['optimizer'] == optimizer and is_finished(run)
    }
    if candidates and len(bleu) == len(candidates):
      table = np.array([[bleu[rho]] for rho in candidates])
      found[optimizer] = search.Search(candidates, [args.seeds], table)
  return found


def bleu_of(run: Run, split: str) -> float:
  """The BLEU of a run on all sentences of a split."""
  return scores.score(run['counts'][split])


def check_floors(
  runs: Sequence[Run], measured: Mapping[str, floors.Floors]
) -> None:
  """Raises a BelowFloorError if a finished run of Adam does not beat them."""
  for run in runs:
    if run['optimizer'] != 'adam' or not is_finished(run):
      continue
    # The test set must not decide anything.
    needs_no_training = measured['validation'].bleu.items()
    name, floor = max(needs_no_training, key=lambda x: x[1])
    bleu = bleu_of(run, 'validation')
    if bleu <= floor:
      raise BelowFloorError(
        f'Adam (seed {run["seed"]}) has a BLEU of {bleu:.1f} on the validation'
        f' set, not more than the {floor:.1f} of {name}, which needs no'
        f' training. What SAM and ASAM do here would mean nothing, so they are'
        f' not trained. Train for longer, or with another learning rate. For'
        f' example: --epochs 12.'
      )
