"""The pages of LibreOffice's help in Debian's packages.

They are read from the packages as they are, with ``dpkg-deb``, from the tree
that is in them, or from where the packages are installed.
"""

import io
from pathlib import Path
import re
import subprocess
import tarfile

from experiments.data import archives

PACKAGES = {'de': 'libreoffice-help-de', 'en-US': 'libreoffice-help-en-us'}
# Of the packages, as Debian bookworm has them, and as pages state it.
VERSION, RELEASE = '4:7.4.7', '7.4'
PLACE = 'usr/share/libreoffice/help'
SYSTEM = Path('/') / PLACE
CACHE = archives.CACHE / 'libreoffice-help'

ADVICE = (
  f'Add --download, which runs `apt-get download {" ".join(PACKAGES.values())}`'
  f' and installs nothing; it needs Debian bookworm. Or name a folder with the'
  f' .deb files of version {VERSION}, or with the tree that `dpkg-deb -x` makes'
  f' of them. For example: --data-dir help.'
)

# The content of pages by name, such as 'text/swriter/main0000.html'.
Pages = dict[str, bytes]


def find(data_dir: Path | None, *, download: bool) -> dict[str, Pages]:
  """Reads the pages of each language; see :func:`corpus_libreoffice.load`."""
  if download:
    folder = data_dir or CACHE
    fetch(folder)
  else:
    folder = data_dir or (SYSTEM if SYSTEM.is_dir() else CACHE)
  return {language: read_pages(folder, language) for language in PACKAGES}


def fetch(folder: Path) -> None:
  """Downloads the packages to a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  _run('apt-get', 'download', *PACKAGES.values(), cwd=folder)


def read_pages(folder: Path, language: str) -> Pages:
  """The pages of a language, from a package or from the extracted tree."""
  for tree in (folder / PLACE, folder):
    texts = tree / language / 'text'
    if texts.is_dir():
      place = texts
      pages = {
        path.relative_to(texts.parent).as_posix(): path.read_bytes()
        for path in texts.rglob('*.html')
      }
      break
  else:
    place = find_package(folder, PACKAGES[language])
    pages = _unpack(place, f'{PLACE}/{language}/')
  if not pages:
    raise archives.DataError(f'{place} has no pages. {ADVICE}')
  for name, content in pages.items():
    stated = re.search(rb'LibreOffice (\d+\.\d+)', content)
    if not stated or stated[1].decode() != RELEASE:
      found = f'of LibreOffice {stated[1].decode()}' if stated else 'incomplete'
      raise archives.DataError(
        f'{place} must have pages of LibreOffice {RELEASE}, but {name} is'
        f' {found}. {ADVICE}'
      )
  return pages


def find_package(folder: Path, package: str) -> Path:
  """The path of a package in a folder; a DataError if there is none."""
  found = []
  for path in sorted(folder.glob(f'{package}_*.deb')):
    version = _run('dpkg-deb', '--field', path.name, 'Version', cwd=folder)
    found.append(version.decode().strip())
    if found[-1].startswith(f'{VERSION}-'):
      return path
  raise archives.DataError(
    f"argument --data-dir: '{folder}' must have the package {package} of"
    f' version {VERSION}, but has {", ".join(found) or "none"}. {ADVICE}'
  )


def _unpack(path: Path, place: str) -> Pages:
  """The pages of a package; nothing is extracted to disk."""
  content = _run('dpkg-deb', '--fsys-tarfile', path.name, cwd=path.parent)
  pages = {}
  with tarfile.open(fileobj=io.BytesIO(content)) as archive:
    for member in archive:
      name = member.name.removeprefix('./')
      file = archive.extractfile(member)
      if file and name.startswith(f'{place}text/') and name.endswith('.html'):
        pages[name.removeprefix(place)] = file.read()
  return pages


def _run(*command: str, cwd: Path) -> bytes:
  """The output of a command; a DataError if it fails."""
  try:
    return subprocess.run(
      command, cwd=cwd, check=True, capture_output=True
    ).stdout
  except FileNotFoundError as error:
    raise archives.DataError(
      f'The program {command[0]} of Debian is missing. Install it, or use'
      f' another system. {ADVICE}'
    ) from error
  except subprocess.CalledProcessError as error:
    said = ' '.join(error.stderr.decode(errors='replace').split())
    raise archives.DataError(
      f'`{" ".join(command)}` failed in {cwd}: {said}. If the file is damaged,'
      f' remove it. {ADVICE}'
    ) from error
