"""The data sets: what is read is what was published, or an error says why not.

Files in the two formats are written here, with few small images.
"""

import gzip
import hashlib
import http.server
import io
from pathlib import Path
import tarfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.data import archives
from experiments.data import augmentation
from experiments.data import sources
from tests.helpers.support import tar_gz

NUM_TRAIN, NUM_TEST, NUM_HELD_OUT = 40, 6, 10
NAMES = {
  'fashion_mnist': 'FASHION_MNIST',
  'cifar10': 'CIFAR10',
  'cifar100': 'CIFAR100',
}


def md5(content):
  """The checksum that published files are known by."""
  return hashlib.md5(content).hexdigest()


def idx(array):
  """``array`` as an IDX file."""
  header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
  return header + array.astype(np.uint8).tobytes()


def cifar(images, *labels):
  """A file of CIFAR: the labels of a record, then its red, green and blue."""
  planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  return np.column_stack([*labels, planes]).astype(np.uint8).tobytes()


def make_part(n, shape, num_classes):
  """Random images and labels."""
  rng = np.random.default_rng(n)
  images = rng.integers(0, 256, (n, *shape), np.uint8)
  return images, rng.integers(0, num_classes, n, np.int32)


def make_small(source, url):
  """A small data set in place of ``source``, its files and its parts."""
  shape = (5, 4, 1) if isinstance(source, sources.Idx) else (32, 32, 3)
  parts = [make_part(n, shape, source.num_classes) for n in (40, 6)]
  if isinstance(source, sources.Idx):
    files, small = {}, []
    arrays = [x for images, labels in parts for x in (images[..., 0], labels)]
    for array, file in zip(arrays, source.train + source.test, strict=True):
      name, content = file.archive.name, idx(array)
      files[name] = gzip.compress(content)
      archive = archives.Published(f'{url}/{name}', md5(files[name]))
      small.append(sources.IdxFile(archive, md5(content)))
    train, test = tuple(small[:2]), tuple(small[2:])
    source = source._replace(train=train, test=test, system_dir=Path('none'))
    return source, files, parts
  (images, labels), test = parts
  n = NUM_TRAIN // len(source.train)
  chunks = [
    *((images[i : i + n], labels[i : i + n]) for i in range(0, NUM_TRAIN, n)),
    test,
  ]
  # The first of two labels is that of a group of classes.
  groups = [7] * (source.num_label_bytes - 1)
  members = {
    f'{source.folder}/{name}': cifar(x, *([g] * len(y) for g in groups), y)
    for name, (x, y) in zip([*source.train, *source.test], chunks, strict=True)
  }
  name, content = source.archive.name, tar_gz(members)
  source = source._replace(
    archive=archives.Published(f'{url}/{name}', md5(content)),
    train=dict.fromkeys(source.train, n),
    test=dict.fromkeys(source.test, NUM_TEST),
  )
  return source, {name: content}, parts


@pytest.fixture
def small(monkeypatch, tmp_path):
  """Replaces a published data set; returns the files and the parts."""
  monkeypatch.setattr(archives, 'CACHE', tmp_path / 'cache')
  monkeypatch.setattr(data, 'NUM_HELD_OUT', NUM_HELD_OUT)

  def replace(name, url='http://localhost:1'):
    source, files, parts = make_small(getattr(sources, NAMES[name]), url)
    monkeypatch.setattr(sources, NAMES[name], source)
    return files, parts

  return replace


def write(folder, files):
  """Writes files into a folder."""
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
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


def assert_holds(dataset, parts):
  """Fails unless the data set holds ``parts``."""
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


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('form', [dict, extract])
def test_data_dir(small, tmp_path, name, form):
  """Compressed or extracted, every pixel and label is in its place."""
  files, parts = small(name)
  folder = write(tmp_path / 'data', form(files))
  dataset = data.DATASETS[name](folder)
  assert_holds(dataset, parts)
  assert dataset.num_classes == (100 if name == 'cifar100' else 10)
  fewer = data.DATASETS[name](folder, train_size=7)
  np.testing.assert_array_equal(fewer.train.labels, dataset.train.labels[:7])
  np.testing.assert_array_equal(fewer.held_out.images, dataset.held_out.images)
  with pytest.raises(data.DataError, match=r'--train-size: must be .* 1 to 30'):
    data.DATASETS[name](folder, train_size=31)


def cut(content):
  """A file that lacks its end."""
  return content[:-40]


def flip_bit(content):
  """A file with one wrong bit, in its middle."""
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
  ('name', 'form', 'file', 'damages'),
  [
    ('fashion_mnist', dict, 't10k-labels-idx1-ubyte.gz', (None, cut, flip_bit)),
    ('fashion_mnist', extract, 'train-images-idx3-ubyte', (cut, flip_bit)),
    ('cifar10', dict, 'cifar-10-binary.tar.gz', (None, cut, flip_bit)),
    # The checksum of what was extracted is not published.
    ('cifar100', extract, 'cifar-100-binary/test.bin', (None, cut)),
  ],
)
def test_damaged(small, tmp_path, name, form, file, damages):
  """An error of one line names the file and says where to get it."""
  files = form(small(name)[0])
  content = files.pop(file)
  folder = write(tmp_path / 'data', files)
  for damage in damages:
    write(folder, {file: damage(content)} if damage else {})
    with pytest.raises(data.DataError) as error_info:
      data.DATASETS[name](folder)
    message = str(error_info.value)
    for word in (str(folder), Path(file).name, 'http://localhost:1/'):
      assert word in message
    assert '\n' not in message


@pytest.fixture
def server():
  """Serves files from a dict, and counts requests."""
  files, requests = {}, []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      name = self.path.removeprefix('/')
      requests.append(name)
      content, size = files[name]
      self.send_response(200)
      self.send_header('Content-Length', str(size))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *args):
      del args

  with http.server.ThreadingHTTPServer(('localhost', 0), Handler) as running:
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    running.files, running.requests = files, requests
    running.url = f'http://localhost:{running.server_port}'
    yield running
    running.shutdown()
    thread.join()


@pytest.mark.parametrize('name', ['fashion_mnist', 'cifar10'])
def test_download(small, server, name):
  """A bad download leaves nothing; a good one is read from the cache."""
  files, parts = small(name, server.url)
  for bad in (cut, flip_bit):
    for file, content in files.items():
      server.files[file] = bad(content), len(content)
    with pytest.raises(data.DataError, match='could not be downloaded'):
      data.DATASETS[name]()
    assert list(archives.CACHE.iterdir()) == []
  server.files |= {file: (each, len(each)) for file, each in files.items()}
  server.requests.clear()
  for _ in range(2):
    assert_holds(data.DATASETS[name](), parts)
  assert sorted(server.requests) == sorted(files)
  write(archives.CACHE, {file: cut(each) for file, each in files.items()})
  assert_holds(data.DATASETS[name](), parts)  # Downloaded again.
  assert len(server.requests) == 2 * len(files)


def test_label_noise():
  """Exactly a fraction of train and held-out labels, by seed; test is clean."""
  clean = data.digits()
  noisy = data.add_label_noise(clean, 0.29, [3, 8, 3])
  for part, size in (('train', 1000), ('held_out', 300)):
    labels = getattr(noisy, part).labels
    changed = labels != getattr(clean, part).labels
    np.testing.assert_array_equal(changed.sum(axis=1), [29 * size // 100] * 3)
    np.testing.assert_array_equal(labels[0], labels[2])
    assert np.any(changed[0] != changed[1])
  np.testing.assert_array_equal(noisy.test.labels, [clean.test.labels] * 3)
  rng = np.random.default_rng(0)
  flipped = data.flip_labels(np.full(9000, 2, np.int32), 0.5, 10, rng)
  counts = np.bincount(flipped, minlength=10)
  # 4500 stay, 500 of each other class; five standard deviations.
  assert counts[2] == 4500
  assert np.all(np.abs(np.delete(counts, 2) - 500) < 5 * 500**0.5)
  merged = data.merge_held_out(noisy)
  np.testing.assert_array_equal(
    merged.train.labels,
    np.concatenate([noisy.train.labels, noisy.held_out.labels], axis=1),
  )
  assert merged.held_out.labels.shape == (3, 0)


def test_digits():
  """Every image is in one part."""
  dataset = data.digits()
  parts = [dataset.train, dataset.held_out, dataset.test]
  images = np.concatenate([part.images for part in parts]).reshape(1797, 64)
  assert len(np.unique(images, axis=0)) == 1797
  assert (images.min(), images.max()) == (0, 1)


def test_crop_and_flip():
  """An image becomes one of its crops; all of them are equally likely."""
  image = np.random.default_rng(0).integers(1, 256, (4, 5, 3), np.uint8)
  padded = np.pad(image, [(1, 1), (1, 1), (0, 0)])
  expected = [
    padded[top : top + 4, left : left + 5][:, ::step].tobytes()
    for step in (1, -1)
    for top in range(3)
    for left in range(3)
  ]
  batch = np.repeat(image[None], 9000, axis=0)
  result = augmentation.crop_and_flip(jax.random.key(0), batch, padding=1)
  assert (result.shape, result.dtype) == (batch.shape, jnp.uint8)
  found, counts = np.unique(
    np.asarray(result).reshape(9000, -1), axis=0, return_counts=True
  )
  assert {each.tobytes() for each in found} == set(expected)
  # 500 of each; five standard deviations.
  assert max(abs(counts - 500)) < 5 * 500**0.5


def test_batch(small, tmp_path):
  """Images with their labels: augmented with a key, and standardized."""
  dataset = data.cifar10(write(tmp_path / 'data', small('cifar10')[0]))
  indices, key = np.array([7, 3]), jax.random.key(0)
  images = dataset.train.images[indices]
  augmented = np.asarray(augmentation.crop_and_flip(key, images))
  assert np.any(images != augmented)
  source = sources.CIFAR10
  for used_key, expected in ((None, images), (key, augmented)):
    batch = data.make_batch(dataset, dataset.train, indices, used_key)
    np.testing.assert_array_equal(batch.labels, dataset.train.labels[indices])
    np.testing.assert_allclose(
      batch.images, (expected / 255.0 - source.mean) / source.std, atol=1e-6
    )
    assert batch.images.dtype == jnp.float32
