"""The runs of ``experiments.paper.translation``, one after the other."""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
import time
from typing import Any

import numpy as np
import sentencepiece

from experiments import checkpoints
from experiments.models import transformer
from experiments.paper import corpus
from experiments.paper import seq2seq
from experiments.paper import translation_floors as floors
from experiments.paper import translation_plan as plan
from experiments.paper import translation_scores as scores
from experiments.report import progress


class OutOfTime(Exception):  # noqa: N818
  """The deadline has passed; what was computed is in a checkpoint."""


class Training:
  """All runs, one after the other, with a checkpoint after each epoch.

  Attributes:
    runs: The results of each run that has begun; the last one is under way.
  """

  def __init__(
    self,
    args: argparse.Namespace,
    pairs: corpus.Corpus,
    vocabulary: bytes,
    measured: Mapping[str, floors.Floors],
    is_late: Callable[[], bool],
  ):
    self._args = args
    self._corpus = pairs
    self._vocabulary = sentencepiece.SentencePieceProcessor(
      model_proto=vocabulary
    )
    self._pieces = {
      split: corpus.encode(self._vocabulary, getattr(pairs, split))
      for split in ('train', 'validation')
    }
    self._floors = measured
    self._is_late = is_late
    self._checkpoints = checkpoints.Checkpoints(args.out / checkpoints.FOLDER)
    self.runs: list[plan.Run] = []

  def _programs_of(self, optimizer: str) -> seq2seq.Programs:
    args = self._args
    # Hashable, which its type does not say.
    model: Any = transformer.Transformer(
      self._vocabulary.vocab_size(),
      args.layers,
      args.width,
      args.hidden_size,
      args.heads,
      args.dropout,
    )
    return seq2seq.make_programs(
      model,
      optimizer,
      eta=args.eta,
      lr=args.lr,
      warmup=args.warmup,
      weight_decay=args.weight_decay,
      label_smoothing=args.label_smoothing,
      beam=args.beam,
    )

  def run(self) -> None:
    """Trains and translates what is left.

    Raises:
      OutOfTime: It is late.
      plan.BelowFloorError: Adam does not beat the floors.
    """
    args = self._args
    state = self._restore() if args.resume else None
    epochs = [self._epochs_of(run) for run in plan.make(args, self.runs)]
    done = sum(len(run['train_loss']) for run in self.runs)
    with progress.shown(done, max(done, sum(epochs))) as advance:
      while True:
        plan.check_floors(self.runs, self._floors)
        if not self.runs or plan.is_finished(self.runs[-1]):
          run = plan.find_next(args, self.runs)
          if run is None:
            return
          self.runs.append(run)
          state = self._programs_of(run['optimizer']).init(run['seed'])
        state = self._train(state, self.runs[-1], advance)

  def _epochs_of(self, run: plan.Run) -> int:
    return self._args.search_epochs if run['is_search'] else self._args.epochs

  def _train(self, state, run, advance) -> seq2seq.State:
    size = self._args.max_tokens
    programs = self._programs_of(run['optimizer'])
    while (epoch := len(run['train_loss'])) < self._epochs_of(run):
      rng = np.random.default_rng([run['seed'], epoch])
      start = time.monotonic()
      state, losses, is_complete = seq2seq.train_epoch(
        programs,
        state,
        corpus.batches(self._pieces['train'], size, rng),
        run['rho'],
        losses=run['losses'],
        is_late=self._is_late,
      )
      run['seconds'] += time.monotonic() - start
      run['losses'] = losses
      if not is_complete:
        self._save(state)
        raise OutOfTime
      run['losses'] = []
      run['train_loss'].append(float(np.mean(np.asarray(losses, np.float32))))
      run['validation_loss'].append(
        seq2seq.validation_loss(
          programs, state.params, self._pieces['validation'], size
        )
      )
      self._save(state)
      advance(1)
    for split in plan.splits_of(run):
      if split in run['counts']:
        continue
      if self._is_late():
        raise OutOfTime
      pairs = getattr(self._corpus, split)
      german, english = zip(*pairs, strict=True)
      translations = seq2seq.translate(
        programs, state.params, german, self._vocabulary, size
      )
      run['counts'][split] = scores.count(translations, english).tolist()
      self._save(state)
    return state

  def _save(self, state: seq2seq.State) -> None:
    step = sum(len(run['train_loss']) for run in self.runs)
    self._checkpoints.save(step, state, {'runs': self.runs})

  def _restore(self) -> seq2seq.State | None:
    def make_state(saved: Mapping[str, Any]) -> seq2seq.State:
      self.runs += saved['runs']
      run = self.runs[-1]
      return self._programs_of(run['optimizer']).init(run['seed'])

    restored = self._checkpoints.restore(make_state, print)
    return restored[0] if restored else None
