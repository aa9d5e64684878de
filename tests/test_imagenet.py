"""Promise: the program of the paper's ImageNet does what it says."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import archives
import bottleneck
import data
import image_folder
import imagenet
import models

pytestmark = pytest.mark.usefixtures('quickly_compiled')

SIZE = 16
CLASSES = ('n01', 'n02')


def write_images(folder, n, seed=0):
  """JPEG files of two classes: what is in the red one, is not in the other."""
  rng = np.random.default_rng(seed)
  for label, name in enumerate(CLASSES):
    (folder / name).mkdir(parents=True)
    for i in range(n):
      height, width = rng.integers(SIZE, 3 * SIZE, 2)
      pixels = rng.integers(0, 60, (height, width, 3), np.uint8)
      pixels[..., label] += 150
      Image.fromarray(pixels).save(folder / name / f'{name}_{i}.JPEG')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """ImageNet with two classes."""
  folder = tmp_path_factory.mktemp('imagenet')
  write_images(folder / 'train', 16)
  write_images(folder / 'val', 5, seed=1)
  return folder


def test_size():
  """ResNet-50 has the published number of parameters."""
  images = jnp.zeros([1, 224, 224, 3])
  shapes = jax.eval_shape(
    bottleneck.ResNet(1000).init, jax.random.key(0), images
  )
  count = sum(x.size for x in jax.tree.leaves(shapes['params']))
  assert count == 25557032


def test_random_box():
  """It lies in the image, with an area and a ratio as they are asked for."""
  rng = np.random.default_rng(0)
  areas, ratios = [], []
  for _ in range(500):
    left, top, right, bottom = image_folder.random_box(300, 200, rng)
    assert 0 <= left < right <= 300
    assert 0 <= top < bottom <= 200
    areas.append((right - left) * (bottom - top) / 60000)
    ratios.append((right - left) / (bottom - top))
  assert 0.08 <= min(areas) < 0.12
  assert 0.85 < max(areas) <= 1
  assert 3 / 4 <= min(ratios) < 0.77
  assert 1.3 < max(ratios) <= 4 / 3 + 1e-9
  # Nothing of such a ratio covers as much of a line.
  box = image_folder.random_box(300, 1, rng)
  assert box == pytest.approx((149.5, 0, 150.5, 1))


def test_train_batches(folder):
  """Each image once in the order of a seed, with its label."""
  images = image_folder.ImageFolder(folder / 'train')
  assert images.classes == list(CLASSES)

  def read(seed):
    batches = image_folder.train_batches(images, 10, SIZE, seed=seed, threads=2)
    return list(batches)

  batches = read(0)
  assert len(batches) == 3  # Of 32 images two are left.
  for batch in batches:
    assert batch.images.shape == (10, SIZE, SIZE, 3)
    assert batch.images.dtype == np.uint8
    colors = batch.images.mean(axis=(1, 2))
    np.testing.assert_array_equal(colors[:, 1] > colors[:, 0], batch.labels)
  again, other = read(0), read(1)
  for first, second in zip(batches, again, strict=True):
    np.testing.assert_array_equal(first.images, second.images)
  assert not np.array_equal(batches[0].images, other[0].images)


def test_half_of_the_crops_are_mirrored(tmp_path):
  """Left and right, not up and down."""
  pixels = np.zeros((32, 32, 3), np.uint8)
  pixels[..., 0] = 8 * np.arange(32)  # Brighter to the right,
  pixels[..., 1] = 8 * np.arange(32)[:, None]  # and to the bottom.
  (tmp_path / 'n01').mkdir()
  for i in range(64):
    Image.fromarray(pixels).save(tmp_path / 'n01' / f'{i}.png')
  [batch] = image_folder.train_batches(
    image_folder.ImageFolder(tmp_path), 64, SIZE, seed=0, threads=2
  )
  images = batch.images.astype(int)
  mirrored = images[:, 0, 0, 0] > images[:, 0, -1, 0]
  assert 16 < mirrored.sum() < 48
  assert (images[:, 0, 0, 1] < images[:, -1, 0, 1]).all()


def test_preprocess():
  """Each channel by the mean and the deviation that are usual."""
  images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
  expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(
    imagenet.preprocess(jnp.asarray(images)), expected, rtol=1e-5
  )


def test_count_correct(monkeypatch, folder, tmp_path):
  """A label may be the first guess, among the first five, or neither."""
  logits = jnp.tile(jnp.arange(10.0), (4, 1))
  monkeypatch.setattr(models, 'apply_eval', lambda *args: logits)
  batch = data.Split(jnp.zeros([4, 2, 2, 3]), jnp.array([9, 5, 4, 9]))
  args, images = imagenet.parse(
    [f'--data-dir={folder}', f'--out={tmp_path / "out"}', '--batch-size=8']
  )
  state = imagenet.State(None, None, None)
  counts = imagenet.Training(args, images)._count_correct(state, batch)
  assert counts.tolist() == [2, 3]


def test_eval_batches(folder):
  """All images in their order, the middle of each."""
  images = image_folder.ImageFolder(folder / 'val')
  batches = list(image_folder.eval_batches(images, 4, SIZE, threads=2))
  assert [len(batch.labels) for batch in batches] == [4, 4, 2]
  labels = np.concatenate([batch.labels for batch in batches])
  np.testing.assert_array_equal(labels, [0] * 5 + [1] * 5)
  path, _ = images[0]
  image = Image.open(path)
  side = 0.875 * min(image.size)
  left, top = (np.array(image.size) - side) / 2
  expected = image.resize(
    (SIZE, SIZE),
    Image.Resampling.BILINEAR,
    box=(left, top, left + side, top + side),
  )
  np.testing.assert_array_equal(batches[0].images[0], expected)


@pytest.fixture
def run(folder, monkeypatch):
  """Runs the program with a small network in a folder."""
  small = functools.partial(bottleneck.ResNet, stages=(1,), width=8)
  monkeypatch.setattr(bottleneck, 'ResNet', small)

  def run_in(out, *options):
    imagenet.main(
      [
        *(f'--data-dir={folder}', f'--out={out}', f'--image-size={SIZE}'),
        *('--batch-size=16', '--epochs=3', '--lr=0.02', *options),
      ]
    )
    return json.loads((out / 'results.json').read_text())

  return run_in


@pytest.mark.parametrize('optimizer', ['sgd', 'sam', 'asam'])
def test_it_learns(run, tmp_path, capsys, optimizer):
  """It tells two colours apart, with batches over eight devices."""
  results = run(tmp_path, f'--optimizer={optimizer}')
  assert results['complete']
  assert (
    results['config']['rho'] == {'sgd': 0, 'sam': 0.05, 'asam': 1}[optimizer]
  )
  assert results['images'] == {'train': 32, 'val': 10}
  assert results['train_loss'][-1] < results['train_loss'][0]
  assert results['top_1_accuracy'] == 1
  assert f'{optimizer}: 100.00 % top 1' in capsys.readouterr().out
  assert [path.name for path in tmp_path.iterdir()] == ['results.json']


def test_interrupted(run, tmp_path, monkeypatch):
  """What is resumed ends with the bits of what was not interrupted."""
  untouched = run(tmp_path / 'untouched')
  train_batches = image_folder.train_batches
  epochs = []

  def interrupt(*args, **options):
    epochs.append(options['seed'])
    if len(epochs) == 3:
      raise KeyboardInterrupt
    return train_batches(*args, **options)

  out = tmp_path / 'resumed'
  with monkeypatch.context() as patch:
    patch.setattr(image_folder, 'train_batches', interrupt)
    with pytest.raises(KeyboardInterrupt):
      run(out)
  assert len(set(epochs)) == 3
  results = json.loads((out / 'results.json').read_text())
  assert not results['complete']
  assert results['train_loss'] == untouched['train_loss'][:2]
  # Another machine may read with more threads.
  resumed = run(out, '--resume', '--threads=3')
  for name in ('complete', 'train_loss', 'top_1_accuracy', 'top_5_accuracy'):
    assert resumed[name] == untouched[name]


def test_damaged_file(tmp_path):
  """The error names it."""
  write_images(tmp_path, 2)
  file = tmp_path / 'n02' / 'n02_1.JPEG'
  file.write_bytes(b'no image')
  images = image_folder.ImageFolder(tmp_path)
  with pytest.raises(archives.DataError, match=r'n02_1.JPEG cannot be used'):
    list(image_folder.eval_batches(images, 2, SIZE, threads=2))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--data-dir=nowhere'], 'there are no images in'),
    (['--optimizer=sgd', '--rho=1'], 'SGD has none'),
    (['--batch-size=12'], 'must be a multiple of 8, the number of devices'),
    (['--batch-size=64'], 'at most 32, the number of images'),
    (['--label-smoothing=1'], 'must be a number in [0, 1), but got'),
  ],
)
def test_errors(folder, tmp_path, capsys, options, message):
  """Bad options are said before anything is written."""
  out = tmp_path / 'out'
  with pytest.raises(SystemExit):
    imagenet.main([f'--data-dir={folder}', f'--out={out}', *options])
  assert message in capsys.readouterr().err
  assert not out.exists()


def test_other_classes(tmp_path, capsys):
  """Files for validation of other classes are an error."""
  write_images(tmp_path / 'train', 4)
  write_images(tmp_path / 'val', 1)
  (tmp_path / 'val' / 'n02').rename(tmp_path / 'val' / 'n03')
  with pytest.raises(SystemExit):
    imagenet.main([f'--data-dir={tmp_path}', '--batch-size=8'])
  assert 'must have the same classes' in capsys.readouterr().err
