"""Pairs of sentences, German and English, as batches of subword pieces."""

from collections.abc import Iterator
from collections.abc import Sequence
import hashlib
import io
import json
from typing import Any
from typing import NamedTuple

import numpy as np
import sentencepiece

from experiments.models import transformer

PAD = transformer.PAD
BOS, EOS, UNKNOWN = (PAD + i for i in range(1, 4))

# German, English.
Pair = tuple[str, str]
Pieces = tuple[list[int], list[int]]


class Corpus(NamedTuple):
  """Pairs of sentences."""

  train: list[Pair]
  validation: list[Pair]
  test: list[Pair]


def describe(corpus: Corpus) -> dict[str, Any]:
  """The number of pairs of each split, and a digest of all text."""
  text = json.dumps(corpus, ensure_ascii=False)
  return {
    'pairs': {split: len(each) for split, each in corpus._asdict().items()},
    'sha256': hashlib.sha256(text.encode()).hexdigest(),
  }


def train_vocabulary(pairs: Sequence[Pair], size: int) -> bytes:
  """A joint byte-pair encoding, as a serialized SentencePiece model.

  Raises:
    ValueError: There is too little text for so many pieces.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(side for pair in pairs for side in pair),
      model_writer=model,
      model_type='bpe',
      vocab_size=size,
      character_coverage=1.0,
      pad_id=PAD,
      bos_id=BOS,
      eos_id=EOS,
      unk_id=UNKNOWN,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise ValueError(
      f'argument --vocab-size: {size} does not fit this text ({error}). Write'
      f' a smaller one.'
    ) from error
  return model.getvalue()


def encode(
  vocabulary: sentencepiece.SentencePieceProcessor, pairs: Sequence[Pair]
) -> list[Pieces]:
  """Sentences as pieces: the source with EOS, the target with BOS and EOS."""
  german, english = zip(*pairs, strict=True)
  return [
    ([*source, EOS], [BOS, *target, EOS])
    for source, target in zip(
      vocabulary.encode(list(german)),
      vocabulary.encode(list(english)),
      strict=True,
    )
  ]


class Batch(NamedTuple):
  """Pairs of similar length, padded to a shape that many batches share.

  Attributes:
    indices: Which pairs, int [pairs]; fewer than n in the last batch of a
      shape.
    source: int32 [n, length].
    target: int32 [n, length].
  """

  indices: np.ndarray
  source: np.ndarray
  target: np.ndarray


def batches(
  pairs: Sequence[Pieces], max_tokens: int, rng: np.random.Generator | None
) -> Iterator[Batch]:
  """Batches of all pairs in few shapes, each of which is compiled once.

  Args:
    pairs: Sentences as pieces.
    max_tokens: The size of a batch in pieces of one language; a longer pair is
      a batch of its own.
    rng: Shuffles pairs and batches; without it, they are ordered by length.
  """
  lengths = np.array([padded_length(max(map(len, pair))) for pair in pairs])
  order = np.arange(len(pairs)) if rng is None else rng.permutation(len(pairs))
  plan = []
  for length in np.unique(lengths):
    indices = order[lengths[order] == length]
    n = max(1, max_tokens // length)
    plan += [(indices[i : i + n], n, length) for i in range(0, len(indices), n)]
  if rng is not None:
    rng.shuffle(plan)
  for indices, n, length in plan:
    sides = np.full([2, n, length], PAD, np.int32)
    for row, i in enumerate(indices):
      for side, pieces in zip(sides, pairs[i], strict=True):
        side[row, : len(pieces)] = pieces
    yield Batch(indices, *sides)


def padded_length(length: int) -> int:
  """Rounds up to a multiple of 8, and of 16, 32, ... for longer sentences."""
  step = 8
  while length > 4 * step:
    step *= 2
  return -(-length // step) * step
