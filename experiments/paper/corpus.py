"""The talks of IWSLT'14, German to English, as batches of subword pieces.

The splits and the length filter are the usual ones, except that the filter
counts the tokens of BLEU (13a) rather than of Moses. All text is lower case.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import io
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
import sentencepiece

from experiments.data import archives
from experiments.models import transformer

ARCHIVE = archives.Published(
  'https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz', md5=None
)
FOLDER = 'de-en'
LANGUAGES = ('de', 'en')
TRAIN = 'train.tags.de-en'
TESTS = tuple(
  f'IWSLT14.{name}.de-en'
  for name in (
    *('TED.dev2010', 'TEDX.dev2012'),
    *('TED.tst2010', 'TED.tst2011', 'TED.tst2012'),
  )
)
# Tags of lines in the training file that are not part of the talk.
NOT_TEXT = ('<url>', '<talkid>', '<keywords>')
MAX_TOKENS_OF_SENTENCE, MAX_RATIO = 175, 1.5
# Every 23rd pair of those for training.
VALIDATION_STEP = 23

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


def load(data_dir: Path | None) -> Corpus:
  """Reads the corpus from its archive, which is downloaded if missing.

  Args:
    data_dir: The folder with the archive, or with its extracted files.

  Raises:
    archives.DataError: A file is missing, truncated or damaged.
  """
  path = archives.find(ARCHIVE, data_dir, extracted=[FOLDER])
  with archives.explaining(path, ARCHIVE):
    read = functools.partial(_read_pairs, path)
    pairs = clean(read(TRAIN, '', talk_lines))
    test = [pair for name in TESTS for pair in read(name, '.xml', segments)]
  last = VALIDATION_STEP - 1
  return Corpus(
    [pair for i, pair in enumerate(pairs) if i % VALIDATION_STEP != last],
    pairs[last::VALIDATION_STEP],
    test,
  )


def _read_pairs(
  path: Path, name: str, suffix: str, parse: Callable[[str], list[str]]
) -> list[Pair]:
  """Reads a file in both languages; a ValueError if their lengths differ."""
  names = [f'{name}.{language}{suffix}' for language in LANGUAGES]
  contents = archives.read_members(path, ARCHIVE.md5, FOLDER, names)
  german, english = (parse(contents[name].decode('utf-8')) for name in names)
  if not german or len(german) != len(english):
    raise ValueError(
      f'{" and ".join(names)} must have equally many sentences, but have'
      f' {len(german)} and {len(english)}'
    )
  return list(zip(german, english, strict=True))


def talk_lines(text: str) -> list[str]:
  """The text, titles and summaries of a training file."""
  # Not splitlines, which also splits at characters that some lines contain.
  return [
    re.sub('</?(title|description)>', '', line).strip().lower()
    for line in text.removesuffix('\n').split('\n')
    if not any(tag in line for tag in NOT_TEXT)
  ]


def segments(text: str) -> list[str]:
  """The sentences of a test file."""
  found = re.findall(r'<seg id="\d+">(.*?)</seg>', text, re.DOTALL)
  return [segment.strip().lower() for segment in found]


def clean(pairs: Sequence[Pair]) -> list[Pair]:
  """Drops pairs that are empty, long, or of very different lengths."""
  tokenize = Tokenizer13a()

  def is_good(pair):
    shorter, longer = sorted(len(tokenize(side).split()) for side in pair)
    return shorter >= 1 and longer <= min(
      MAX_TOKENS_OF_SENTENCE, MAX_RATIO * shorter
    )

  return [pair for pair in pairs if is_good(pair)]


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


CORPORA = {'iwslt': load}
