"""The data sets of the examples: what is read is what was published.

A file that is missing, cut off or changed is refused with what to do. Parts are
disjoint and always the same. Batches are made on the device, in the step.
"""

import functools
import gzip
import hashlib
import http.server
import io
from pathlib import Path
import subprocess
import sys
import tarfile
import threading

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archives
import augmentation
import data
import formats
import input_cost
import sources
from support import tar_gz
import timing

ROOT = Path(__file__).parents[1]

# Sizes of the small data sets that stand in for the published ones.
NUM_TRAIN, NUM_TEST, NUM_HELD_OUT = 40, 6, 10
FASHION_SHAPE = (5, 4, 1)
CIFAR_SHAPE = (32, 32, 3)


def md5(content):
  """The checksum that the published files are known by."""
  return hashlib.md5(content).hexdigest()


def idx(array):
  """``array`` as an IDX file."""
  header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
  return header + array.astype(np.uint8).tobytes()


def cifar(images, *labels):
  """A file of CIFAR: each label of a record, then its red, green and blue."""
  planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  return np.column_stack([*labels, planes]).astype(np.uint8).tobytes()


def random_part(n, shape, num_classes):
  """Images that differ, and labels."""
  rng = np.random.default_rng(n)
  images = rng.integers(0, 256, (n, *shape), np.uint8)
  return images, rng.integers(0, num_classes, n, np.int32)


def small_fashion_mnist(url):
  """Four small files by the names of the real ones, and their description."""
  train = random_part(NUM_TRAIN, FASHION_SHAPE, 10)
  test = random_part(NUM_TEST, FASHION_SHAPE, 10)
  arrays = [train[0][..., 0], train[1], test[0][..., 0], test[1]]
  real = [*sources.FASHION_MNIST.train, *sources.FASHION_MNIST.test]
  files, small = {}, []
  for array, file in zip(arrays, real, strict=True):
    name, content = file.archive.name, idx(array)
    files[name] = gzip.compress(content)
    archive = archives.Published(f'{url}/{name}', md5(files[name]))
    small.append(sources.IdxFile(archive, md5(content)))
  source = sources.FASHION_MNIST._replace(
    train=tuple(small[:2]), test=tuple(small[2:]), system_dir=Path('nowhere')
  )
  return source, files, (train, test)


def small_cifar(real, url):
  """A small archive by the name of a real one, and its description."""
  num_files = len(real.train)
  parts = train, test = (
    random_part(NUM_TRAIN, CIFAR_SHAPE, real.num_classes),
    random_part(NUM_TEST, CIFAR_SHAPE, real.num_classes),
  )
  batches = [
    *zip(*(np.split(array, num_files) for array in train), strict=True),
    test,
  ]
  names = [*real.train, *real.test]
  # The first of two labels is that of a group of classes.
  groups = () if real.num_label_bytes == 1 else (7,)
  members = {
    f'{real.folder}/{name}': cifar(
      images, *(np.full(len(labels), group) for group in groups), labels
    )
    for name, (images, labels) in zip(names, batches, strict=True)
  }
  name, content = real.archive.name, tar_gz(members)
  source = real._replace(
    archive=archives.Published(f'{url}/{name}', md5(content)),
    train=dict.fromkeys(real.train, NUM_TRAIN // num_files),
    test=dict.fromkeys(real.test, NUM_TEST),
  )
  return source, {name: content}, parts


# How to make a small data set, and the name that it takes in `sources`.
SMALL = {
  'fashion_mnist': (small_fashion_mnist, 'FASHION_MNIST'),
  'cifar10': (functools.partial(small_cifar, sources.CIFAR10), 'CIFAR10'),
  'cifar100': (functools.partial(small_cifar, sources.CIFAR100), 'CIFAR100'),
}


@pytest.fixture
def small(monkeypatch, tmp_path):
  """Puts a small data set in the place of a published one, and an empty cache.

  It gives the files, and the parts that they hold.
  """
  monkeypatch.setattr(archives, 'CACHE', tmp_path / 'cache')
  monkeypatch.setattr(data, 'NUM_HELD_OUT', NUM_HELD_OUT)

  def make(name, url='http://localhost:1'):
    function, constant = SMALL[name]
    source, files, parts = function(url)
    monkeypatch.setattr(sources, constant, source)
    return files, parts

  return make


def write(folder, files):
  """Writes files into a folder, which it makes."""
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return folder


def extract(files):
  """The files as they are after extraction."""
  extracted = {}
  for name, content in files.items():
    if name.endswith('.tar.gz'):
      with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
          extracted[member.name] = archive.extractfile(member).read()
    else:
      extracted[name.removesuffix('.gz')] = gzip.decompress(content)
  return extracted


def in_one_folder(files):
  """The files that were extracted, without the folder in their names."""
  return {Path(name).name: content for name, content in extract(files).items()}


def assert_holds(dataset, parts):
  """Fails unless the data set is ``parts``, held out as it is said."""
  train, test = parts
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  for split, (images, labels), chosen in (
    (dataset.train, train, order[:-NUM_HELD_OUT]),
    (dataset.held_out, train, order[-NUM_HELD_OUT:]),
    (dataset.test, test, slice(None)),
  ):
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(split.images, images[chosen])
    np.testing.assert_array_equal(split.labels, labels[chosen])


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('form', [dict, extract, in_one_folder])
def test_data_dir(small, tmp_path, name, form):
  """Compressed or extracted, every pixel and label is in its place."""
  files, parts = small(name)
  folder = write(tmp_path / 'data', form(files))
  dataset = data.DATASETS[name](folder)
  assert_holds(dataset, parts)
  assert dataset.num_classes == (100 if name == 'cifar100' else 10)


def test_system_dir(small, tmp_path, monkeypatch):
  """Fashion-MNIST is read from where a distribution put it, compressed anew."""
  files, parts = small('fashion_mnist')
  files = {
    name: gzip.compress(gzip.decompress(content), compresslevel=1)
    for name, content in files.items()
  }
  folder = write(tmp_path / 'system', files)
  source = sources.FASHION_MNIST._replace(system_dir=folder)
  monkeypatch.setattr(sources, 'FASHION_MNIST', source)
  assert_holds(data.fashion_mnist(), parts)


def drop(content):
  """A missing file."""
  del content


def cut(content):
  """A file that lacks its end."""
  return content[:-40]


def flip_bit(content):
  """A file with one wrong bit, in its middle."""
  middle = len(content) // 2
  wrong = bytes([content[middle] ^ 1])
  return content[:middle] + wrong + content[middle + 1 :]


def empty(content):
  """A file without content."""
  return content[:0]


def as_page(content):
  """What some servers send instead of a file."""
  del content
  return b'<html>Not found</html>'


# Files as they lie in a folder, and what is seen there: of what was extracted
# from an archive of CIFAR no checksum is known.
DAMAGES = [drop, cut, empty, as_page]
DAMAGED = [
  ('fashion_mnist', dict, 'train-images-idx3-ubyte.gz', [*DAMAGES, flip_bit]),
  ('fashion_mnist', dict, 't10k-labels-idx1-ubyte.gz', [*DAMAGES, flip_bit]),
  ('fashion_mnist', extract, 'train-images-idx3-ubyte', [*DAMAGES, flip_bit]),
  ('cifar10', dict, 'cifar-10-binary.tar.gz', [*DAMAGES, flip_bit]),
  ('cifar10', extract, 'cifar-10-batches-bin/data_batch_3.bin', DAMAGES),
  ('cifar100', extract, 'cifar-100-binary/test.bin', DAMAGES),
]


@pytest.mark.parametrize(
  ('name', 'form', 'file', 'damage'),
  [(*case, damage) for *case, damages in DAMAGED for damage in damages],
)
def test_damaged(small, tmp_path, name, form, file, damage):
  """An error of one line names the file and says where to get it."""
  files, _ = small(name)
  files = form(files)
  content = damage(files.pop(file))
  folder = write(tmp_path / 'data', files)
  if content is not None:
    write(folder, {file: content})
  with pytest.raises(data.DataError) as error_info:
    data.DATASETS[name](folder)
  message = str(error_info.value)
  assert '\n' not in message
  assert str(folder) in message
  assert Path(file).name in message
  assert 'http://localhost:1/' in message


def test_no_data_dir(small, tmp_path):
  """The error tells what is looked for, and how to do without."""
  small('cifar10')
  with pytest.raises(data.DataError) as error_info:
    data.cifar10(tmp_path / 'nowhere')
  message = str(error_info.value)
  assert 'argument --data-dir' in message
  assert f"got '{tmp_path / 'nowhere'}'" in message
  assert 'cifar-10-binary.tar.gz or cifar-10-batches-bin' in message
  assert 'leave --data-dir out' in message


@pytest.mark.parametrize('name', ['fashion_mnist', 'cifar10'])
def test_label_out_of_range(small, tmp_path, monkeypatch, name):
  """A label of no class is refused, whatever checksums say."""
  files, (train, _) = small(name)
  _, constant = SMALL[name]
  source = getattr(sources, constant)._replace(num_classes=train[1].max())
  monkeypatch.setattr(sources, constant, source)
  with pytest.raises(data.DataError, match='labels must be less than'):
    data.DATASETS[name](write(tmp_path / 'data', files))


def test_member_is_missing(small, tmp_path, monkeypatch):
  """An archive that is whole but lacks a file is refused."""
  files, _ = small('cifar100')
  source = sources.CIFAR100._replace(folder='elsewhere')
  monkeypatch.setattr(sources, 'CIFAR100', source)
  with pytest.raises(data.DataError, match=r'elsewhere/train\.bin, elsewhere/'):
    data.cifar100(write(tmp_path / 'data', files))


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'', 'starts with nothing and has 0 bytes'),
    (bytes([0, 0, 8, 2, 0, 0, 0, 1]), 'has 8 bytes'),
    (bytes([0, 0, 9, 2, *[0] * 8]), 'starts with 00000902'),
    (bytes([0, 0, 8, 1, *[0] * 8]), 'starts with 00000801'),
    (idx(np.zeros((2, 3)))[:-1], 'must have 18 bytes, but has 17'),
    (idx(np.zeros((2, 3))) + b'0', 'must have 18 bytes, but has 19'),
    (bytes([0, 0, 8, 2, *[255] * 8]), 'must have 18446744065119617037 bytes'),
  ],
)
def test_bad_idx(content, words):
  """Whatever is wrong with a file is said, without checksums."""
  with pytest.raises(ValueError, match=words):
    formats.read_idx(content, 2)


@pytest.mark.parametrize('change', [-3073, -1, 1, 3073])
def test_bad_cifar(change):
  """Too few or too many records are seen, even whole ones."""
  content = bytes(2 * 3073 + change)
  with pytest.raises(ValueError, match=f'6146 bytes, but has {6146 + change}'):
    formats.read_cifar(content, 2, 1)


@pytest.fixture
def server():
  """Serves files from a dict, which is filled later, and counts requests.

  A file is cut off if ``cut_off`` says so: the header tells of more bytes than
  are sent.
  """
  files, requests, cut_off = {}, [], set()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = self.path.removeprefix('/')
      requests.append(name)
      if name not in files:
        self.send_error(404)
        return
      content = files[name]
      self.send_response(200)
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      half = content[: len(content) // 2]
      self.wfile.write(half if name in cut_off else content)

    def log_message(self, *args):
      del args

  with http.server.ThreadingHTTPServer(('localhost', 0), Handler) as running:
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    running.files, running.requests = files, requests
    running.cut_off = cut_off
    running.url = f'http://localhost:{running.server_port}'
    yield running
    running.shutdown()
    thread.join()


@pytest.mark.parametrize('name', SMALL)
def test_download(small, server, name):
  """Each file is downloaded once, and then read from the cache."""
  files, parts = small(name, server.url)
  server.files.update(files)
  for _ in range(2):
    assert_holds(data.DATASETS[name](), parts)
    assert sorted(server.requests) == sorted(files)
  assert {p.name for p in archives.CACHE.iterdir()} == set(files)


@pytest.mark.parametrize('fault', ['cut off', cut, flip_bit, empty, drop])
def test_bad_download(small, server, fault):
  """Nothing of it stays, and the next attempt succeeds."""
  files, parts = small('cifar10', server.url)
  ((file, content),) = files.items()
  if fault == 'cut off':
    server.files[file] = content
    server.cut_off.add(file)
  elif fault is not drop:
    server.files[file] = fault(content)
  with pytest.raises(data.DataError) as error_info:
    data.cifar10()
  message = str(error_info.value)
  assert '\n' not in message
  assert f'{server.url}/{file} could not be downloaded' in message
  assert '--data-dir' in message
  assert list(archives.CACHE.iterdir()) == []
  server.files[file] = content
  server.cut_off.clear()
  assert_holds(data.cifar10(), parts)


def test_killed_download(small, server):
  """What a killed process leaves is not taken for the file."""
  files, parts = small('cifar10', server.url)
  server.files.update(files)
  # The process dies once a file is there to write to, and cannot clean up.
  program = """
import os, pathlib, sys
import requests
import archives

requests.get = lambda *args, **kwargs: os._exit(9)
archives.CACHE = pathlib.Path(sys.argv[1])
archives.download(archives.Published(*sys.argv[2:]))
"""
  ended = subprocess.run(
    [
      *(sys.executable, '-c', program),
      *(archives.CACHE, *sources.CIFAR10.archive),
    ],
    capture_output=True,
    check=False,
    cwd=ROOT / 'examples',
  )
  assert ended.returncode == 9, ended.stderr
  (left,) = archives.CACHE.iterdir()
  assert left.name not in files
  assert_holds(data.cifar10(), parts)


def test_damaged_cache(small, server):
  """A file in the cache that has changed is downloaded again."""
  files, parts = small('cifar10', server.url)
  server.files.update(files)
  write(archives.CACHE, {name: cut(files[name]) for name in files})
  assert_holds(data.cifar10(), parts)
  assert server.requests == list(files)


def rows(split):
  """Each image of a split as bytes."""
  return [image.tobytes() for image in split.images]


@pytest.mark.parametrize('name', ['digits', 'fashion_mnist', 'cifar10'])
def test_train_size(small, tmp_path, name):
  """Smaller training sets lie in larger ones; no other part changes."""
  folder = None
  if name != 'digits':
    folder = write(tmp_path / 'data', small(name)[0])
  load = functools.partial(data.DATASETS[name], folder)
  whole, large, less = load(), load(train_size=20), load(train_size=7)
  assert [len(d.train.labels) for d in (large, less)] == [20, 7]
  for small_one, large_one in ((less, large), (large, whole)):
    n = len(small_one.train.labels)
    np.testing.assert_array_equal(
      small_one.train.images, large_one.train.images[:n]
    )
    np.testing.assert_array_equal(
      small_one.train.labels, large_one.train.labels[:n]
    )
    for part in ('held_out', 'test'):
      jax.tree.map(
        np.testing.assert_array_equal,
        getattr(small_one, part),
        getattr(large_one, part),
      )
  everything = rows(whole.train) + rows(whole.held_out) + rows(whole.test)
  assert len(set(everything)) == len(everything)


@pytest.mark.parametrize('train_size', [-1, 0, NUM_TRAIN - NUM_HELD_OUT + 1])
def test_bad_train_size(small, tmp_path, train_size):
  """The error says how many there are, and what to write instead."""
  folder = write(tmp_path / 'data', small('fashion_mnist')[0])
  with pytest.raises(data.DataError) as error_info:
    data.fashion_mnist(folder, train_size)
  assert str(error_info.value) == (
    f'argument --train-size: must be an integer from 1 to 30, the number of'
    f' examples for training, but got {train_size}. Write for example'
    f' --train-size 30.'
  )


@pytest.mark.parametrize('noise_first', [False, True])
def test_merge_held_out(small, tmp_path, noise_first):
  """All that is not for the test is trained on, and nothing is left over."""
  files, (train, test) = small('fashion_mnist')
  dataset = data.fashion_mnist(write(tmp_path / 'data', files))
  steps = [
    functools.partial(data.add_label_noise, fraction=0.5, seeds=[0, 1]),
    data.merge_held_out,
  ]
  for step in steps if noise_first else reversed(steps):
    dataset = step(dataset)
  order = np.random.default_rng(0).permutation(NUM_TRAIN)
  np.testing.assert_array_equal(dataset.train.images, train[0][order])
  assert dataset.held_out.images.shape == (0, *FASHION_SHAPE)
  assert dataset.held_out.labels.shape == (2, 0)
  wrong = dataset.train.labels != train[1][order]
  np.testing.assert_array_equal(wrong.sum(axis=1), [NUM_TRAIN / 2] * 2)
  np.testing.assert_array_equal(dataset.test.labels, [test[1]] * 2)


@pytest.mark.parametrize(
  'source', [sources.FASHION_MNIST, sources.CIFAR10, sources.CIFAR100]
)
def test_preprocess(source):
  """In float32, with the mean and the deviation of each channel."""
  shape = (3, 4, 5, len(source.mean))
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  preprocess = data.make_standardize(source.mean, source.std)
  expected = (images / 255.0 - source.mean) / source.std
  result = preprocess(images)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, expected, atol=1e-6)
  assert data.make_standardize(source.mean, source.std) is preprocess


def test_digits_are_as_models_take_them():
  """Their images stay bit for bit as they are, and are never augmented."""
  dataset = data.digits()
  indices = np.array([3, 0])
  batch = data.make_batch(dataset, dataset.train, indices, jax.random.key(0))
  np.testing.assert_array_equal(batch.images, dataset.train.images[indices])
  assert (dataset.augment, batch.images.dtype) == (None, jnp.float32)


def crops(image, padding):
  """All crops of an image, and all of its mirror image, in NumPy."""
  height, width, _ = image.shape
  sides = (padding, padding)
  padded = np.pad(image, [sides, sides, (0, 0)])
  places = range(2 * padding + 1)
  for is_flipped in (False, True):
    for top in places:
      for left in places:
        crop = padded[top : top + height, left : left + width]
        yield crop[:, ::-1] if is_flipped else crop


@pytest.mark.parametrize('shape', [(4, 5, 3), (7, 3, 1)])
def test_crop_and_flip(shape):
  """Each image is one of its crops; all of them are equally likely."""
  images = np.random.default_rng(0).integers(1, 256, (2, *shape), np.uint8)
  n = 9000
  batch = np.repeat(images, n, axis=0)
  result = augmentation.crop_and_flip(jax.random.key(0), batch, padding=1)
  assert (result.shape, result.dtype) == (batch.shape, jnp.uint8)
  for i, image in enumerate(images):
    expected = [crop.tobytes() for crop in crops(image, 1)]
    assert len(set(expected)) == 18
    counts = dict.fromkeys(expected, 0)
    for changed in np.asarray(result[i * n : (i + 1) * n]):
      counts[changed.tobytes()] += 1
    # 500 of each; five standard deviations.
    assert max(abs(np.array([*counts.values()]) - 500)) < 5 * 500**0.5


def test_crop_and_flip_depends_on_the_key_alone():
  """The same key gives the same images; so does each run of several."""
  images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
  keys = jax.random.split(jax.random.key(1), 2)
  first, second = (augmentation.crop_and_flip(key, images) for key in keys)
  assert np.any(first != second)
  np.testing.assert_array_equal(
    augmentation.crop_and_flip(keys[0], images), first
  )
  of_runs = jax.vmap(augmentation.crop_and_flip, in_axes=(0, None))
  np.testing.assert_array_equal(of_runs(keys, images), [first, second])
  black = np.zeros_like(images)
  np.testing.assert_array_equal(
    augmentation.crop_and_flip(keys[0], black), black
  )


class Linear(nn.Module):
  """A classifier that starts from zero, which compiles faster than chance."""

  @nn.compact
  def __call__(self, images, *, train=False):
    """Maps images to logits."""
    del train
    x = images.reshape(len(images), -1)
    return nn.Dense(10, kernel_init=nn.initializers.zeros)(x)


@pytest.fixture
def random_dataset(monkeypatch):
  """A small one of random pixels."""
  shape = (NUM_TRAIN, 6, 6, 3)
  monkeypatch.setattr(timing, 'SHAPES', {'small': (sources.CIFAR10, shape)})
  monkeypatch.setattr(data, 'NUM_HELD_OUT', NUM_HELD_OUT)
  return timing.random_dataset('small')


def test_batch(random_dataset):
  """Images with their labels: augmented with a key, else as they are."""
  indices, key = np.array([7, 3]), jax.random.key(0)
  split = random_dataset.train
  images = split.images[indices]
  for used_key, expected in (
    (None, images),
    (key, augmentation.crop_and_flip(key, images)),
  ):
    batch = data.make_batch(random_dataset, split, indices, used_key)
    np.testing.assert_array_equal(
      batch.images, random_dataset.preprocess(expected)
    )
    np.testing.assert_array_equal(batch.labels, split.labels[indices])
    assert np.any(expected != images) == (used_key is not None)


def test_input_cost(random_dataset):
  """What the program measures: a time for each input in each round."""
  measures = input_cost.make_measures(random_dataset, Linear(), 8, steps=1)
  seconds = timing.time_in_turn(measures, rounds=2)
  assert set(seconds) == {'ready', 'gathered', 'augmented'}
  assert all(len(values) == 2 for values in seconds.values())
  assert min(map(min, seconds.values())) > 0


def real_fashion_mnist():
  """The folder of the real files, None if there is none."""
  for root in (Path('/'), ROOT / 'out' / 'fashion-mnist'):
    folder = root / sources.FASHION_MNIST.system_dir.relative_to('/')
    if folder.is_dir():
      return folder
  return None


needs_fashion_mnist = pytest.mark.skipif(
  real_fashion_mnist() is None,
  reason="needs the files of Debian's package dataset-fashion-mnist: install"
  ' it, or "apt-get download" it and "dpkg-deb -x" it into out/fashion-mnist',
)


@needs_fashion_mnist
def test_real_fashion_mnist():
  """The published files: sizes, classes, and the constants of preprocessing."""
  dataset = data.fashion_mnist(real_fashion_mnist())
  for split, n in ((dataset.held_out, 5000), (dataset.test, 10_000)):
    assert split.images.shape == (n, 28, 28, 1)
  train = data.merge_held_out(dataset).train
  assert train.images.shape == (60_000, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(train.labels), [6000] * 10)
  np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1000] * 10)
  counts = np.bincount(train.images.reshape(-1), minlength=256)
  pixels = np.arange(256) / 255
  mean = np.average(pixels, weights=counts)
  std = np.average((pixels - mean) ** 2, weights=counts) ** 0.5
  assert round(mean, 4) == sources.FASHION_MNIST.mean[0]
  assert round(std, 4) == sources.FASHION_MNIST.std[0]


@needs_fashion_mnist
@pytest.mark.parametrize(
  'file', [*sources.FASHION_MNIST.train, *sources.FASHION_MNIST.test]
)
def test_published_checksums(file):
  """Of a file and of its content: the content is that of the published file.

  Debian left the time and the name out of the header; with them back in, the
  compressed file has the checksum that its authors publish.
  """
  name = file.archive.name.removesuffix('.gz')
  compressed = (real_fashion_mnist() / file.archive.name).read_bytes()
  time = 1504176606 if name.startswith('train') else 1504176627
  header = bytes([0x1F, 0x8B, 8, 8, *time.to_bytes(4, 'little'), 0, 3])
  restored = header + name.encode() + b'\0' + compressed[10:]
  assert md5(restored) == file.archive.md5
  assert md5(gzip.decompress(restored)) == file.md5
