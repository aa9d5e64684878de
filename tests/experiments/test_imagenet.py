"""Promise: the program for ImageNet learns, and resumes bit for bit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn import datasets

from experiments.models import bottleneck
from experiments.paper import image_folder
from experiments.paper import imagenet
from experiments.paper import program

pytestmark = pytest.mark.usefixtures('quickly_compiled')

SIZE = 16
CLASSES = ('n01', 'n02')


def write_images(folder, n, first=0, classes=CLASSES):
  """JPEG files of handwritten digits, the first class of zeros."""
  rng = np.random.default_rng(first)
  digits = datasets.load_digits()
  for label, name in enumerate(classes):
    (folder / name).mkdir(parents=True)
    images = digits.images[digits.target == label][first : first + n]
    for i, image in enumerate(images):
      picture = Image.fromarray(np.uint8(15 * image)).convert('RGB')
      picture = picture.resize(rng.integers(SIZE, 3 * SIZE, 2))
      picture.save(folder / name / f'{name}_{i}.JPEG')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """ImageNet with two classes."""
  folder = tmp_path_factory.mktemp('imagenet')
  write_images(folder / 'train', 40)
  write_images(folder / 'val', 25, first=40)
  return folder


@pytest.mark.parametrize('method', ['sgd', 'sam', 'asam'])
def test_gradients(method):
  """On a quadratic: at w, w + rho g / ||g||, or w + rho T^2 g / ||T g||."""
  w, c, rho, eta = np.array([1.0, -2.0]), np.array([2.0, 3.0]), 0.3, 0.1
  loss_fn = lambda w: (jnp.sum(c * w**2) / 2, 7)
  (loss, aux), grad = program.value_and_grad(
    method, loss_fn, rho=rho, eta=eta, has_aux=True
  )(jnp.asarray(w))
  t = {'sgd': 0 * w, 'sam': np.ones(2), 'asam': np.abs(w) + eta}[method]
  eps = rho * t**2 * c * w / max(np.linalg.norm(t * c * w), 1e-9)
  np.testing.assert_allclose(grad, c * (w + eps), rtol=1e-5)
  assert (loss, aux) == (7, 7)


def test_size():
  """ResNet-50 has the published number of parameters."""
  shapes = jax.eval_shape(
    bottleneck.ResNet(1000).init, jax.random.key(0), jnp.zeros([1, 224, 224, 3])
  )
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == 25557032


def test_random_box():
  """It is in the image, with an area and a ratio from the ranges."""
  rng = np.random.default_rng(0)
  boxes = [image_folder.random_box(300, 200, rng) for _ in range(500)]
  left, top, right, bottom = np.transpose(boxes)
  assert ((left >= 0) & (top >= 0) & (right <= 300) & (bottom <= 200)).all()
  areas = (right - left) * (bottom - top) / 60000
  ratios = (right - left) / (bottom - top)
  for values, low, high in ((areas, 0.08, 1), (ratios, 3 / 4, 4 / 3)):
    np.testing.assert_allclose(np.min(values), low, atol=0.04)
    np.testing.assert_allclose(np.max(values), high, atol=0.15)


def test_batches(tmp_path):
  """Training: each image once, shuffled, half of them mirrored. Then centres.

  The order is that of the seed, and labels stay with their images.
  """
  pixels = np.zeros((32, 48, 3), np.uint8)
  pixels[..., 0] = 5 * np.arange(48)  # Brighter to the right,
  pixels[..., 1] = 8 * np.arange(32)[:, None]  # and to the bottom.
  for label, name in enumerate(CLASSES):
    pixels[..., 2] = 200 * label
    (tmp_path / name).mkdir()
    for i in range(33):
      Image.fromarray(pixels).save(tmp_path / name / f'{i}.png')
  images = image_folder.ImageFolder(tmp_path)
  assert images.classes == list(CLASSES)
  read = lambda seed: list(
    image_folder.train_batches(images, 32, SIZE, seed=seed, threads=2)
  )
  batches = read(0)
  assert len(batches) == 2  # Two images are left over.
  pixels, labels = (np.concatenate(x) for x in zip(*batches, strict=True))
  assert pixels.shape == (64, SIZE, SIZE, 3)
  assert pixels.dtype == np.uint8
  np.testing.assert_array_equal(pixels[:, 0, 0, 2] > 100, labels)
  assert len(set(labels[:32])) == 2
  mirrored = pixels[:, 0, 0, 0] > pixels[:, 0, -1, 0]
  assert 16 < mirrored.sum() < 48
  assert (pixels[:, 0, 0, 1] < pixels[:, -1, 0, 1]).all()
  np.testing.assert_array_equal(read(0)[0].images, batches[0].images)
  assert not np.array_equal(read(1)[0].images, batches[0].images)

  batches = list(image_folder.eval_batches(images, 40, SIZE, threads=2))
  labels = np.concatenate([batch.labels for batch in batches])
  np.testing.assert_array_equal(labels, np.repeat([0, 1], 33))
  centre = Image.open(images[0][0]).resize(
    (SIZE, SIZE), Image.Resampling.BILINEAR, box=(10, 2, 38, 30)
  )
  np.testing.assert_array_equal(batches[0].images[0], centre)


def test_preprocess_and_count():
  """Channels are standardized; a label may be first, in five, or neither."""
  images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
  expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(
    imagenet.preprocess(jnp.asarray(images)), expected, rtol=1e-5
  )
  logits = jnp.tile(jnp.arange(10.0), (4, 1))
  counts = imagenet.count_correct(logits, jnp.array([9, 5, 4, 9]))
  assert counts.tolist() == [2, 3]


def test_program(folder, tmp_path, monkeypatch, capsys):
  """ASAM tells two digits apart, with batches split over eight devices.

  An interrupted run keeps its results, and ends with the same bits.
  """
  small = functools.partial(bottleneck.ResNet, stages=(1,), width=8)
  monkeypatch.setattr(bottleneck, 'ResNet', small)

  def run(out, *options):
    imagenet.main(
      [
        *(f'--data-dir={folder}', f'--out={out}', f'--image-size={SIZE}'),
        *('--batch-size=16', '--epochs=4', '--lr=0.1', *options),
      ]
    )

  read = lambda out: json.loads((out / 'results.json').read_text())
  untouched, out = tmp_path / 'untouched', tmp_path / 'resumed'
  run(untouched)
  results = read(untouched)
  assert results['complete']
  assert results['config']['rho'] == 1
  assert results['images'] == {'train': 80, 'val': 50}
  assert results['train_loss'][-1] < results['train_loss'][0]
  accuracy = results['top_1_accuracy']
  assert accuracy > 0.8
  assert f'asam: {100 * accuracy:.2f}% top 1' in capsys.readouterr().out
  left = [path.name for path in untouched.iterdir()]
  assert [name for name in left if name[0] != '.'] == ['results.json']

  train_batches, seeds = image_folder.train_batches, []

  def interrupt(*args, **options):
    seeds.append(options['seed'])
    if len(seeds) == 3:
      raise KeyboardInterrupt
    return train_batches(*args, **options)

  with monkeypatch.context() as patch:
    patch.setattr(image_folder, 'train_batches', interrupt)
    with pytest.raises(KeyboardInterrupt):
      run(out)
  assert len(set(seeds)) == 3
  assert not read(out)['complete']
  assert read(out)['train_loss'] == results['train_loss'][:2]
  # Another machine may read with more threads.
  run(out, '--resume', '--threads=3')
  for name in ('complete', 'train_loss', 'top_1_accuracy', 'top_5_accuracy'):
    assert read(out)[name] == results[name]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--data-dir=nowhere'], 'there are no images in'),
    (['--optimizer=sgd', '--rho=1'], 'SGD has none'),
    (['--batch-size=12'], 'must be a multiple of 8, the number of devices'),
    (['--data-dir={tmp_path}'], 'must have the same classes'),
  ],
)
def test_errors(folder, tmp_path, capsys, options, message):
  """Wrong options are reported before anything is written."""
  write_images(tmp_path / 'train', 4)
  write_images(tmp_path / 'val', 1, classes=('n01', 'n03'))
  out = tmp_path / 'out'
  options = [option.format(tmp_path=tmp_path) for option in options]
  with pytest.raises(SystemExit):
    imagenet.main([f'--data-dir={folder}', f'--out={out}', *options])
  assert message in capsys.readouterr().err
  assert not out.exists()
