"""The talks of IWSLT'14, German to English.

The splits and the length filter are the usual ones, except that the filter
counts the tokens of BLEU (13a) rather than of Moses. All text is lower case.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from pathlib import Path
import re

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from experiments.data import archives
from experiments.paper import corpus

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


def load(data_dir: Path | None) -> corpus.Corpus:
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
  return corpus.Corpus(
    [pair for i, pair in enumerate(pairs) if i % VALIDATION_STEP != last],
    pairs[last::VALIDATION_STEP],
    test,
  )


def _read_pairs(
  path: Path, name: str, suffix: str, parse: Callable[[str], list[str]]
) -> list[corpus.Pair]:
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


def clean(pairs: Sequence[corpus.Pair]) -> list[corpus.Pair]:
  """Drops pairs that are empty, long, or of very different lengths."""
  tokenize = Tokenizer13a()

  def is_good(pair):
    shorter, longer = sorted(len(tokenize(side).split()) for side in pair)
    return shorter >= 1 and longer <= min(
      MAX_TOKENS_OF_SENTENCE, MAX_RATIO * shorter
    )

  return [pair for pair in pairs if is_good(pair)]
