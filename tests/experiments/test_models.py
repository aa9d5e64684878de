"""The models of the training program are the published ones.

Their numbers of parameters follow by hand from the papers, their initialization
is that of the papers' programs, and what they compute, in training and after
it, is written again in NumPy. A step of ASAM updates BatchNorm's statistics
once, by the unperturbed model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import models
from experiments.models import convolution
from experiments.models import resnet
from tests.helpers.support import error


def count_resnet(n):
  """Parameters of a ResNet of 6 n + 2 layers, on CIFAR-10."""
  rest = 2 * n - 1  # Convolutions of a stage after its first.
  kernels = 9 * (3 * 16 + 16 * 16 + 16 * 32 + 32 * 64)
  kernels += 9 * rest * (16**2 + 32**2 + 64**2)
  scales_and_biases = 2 * (16 + 2 * n * (16 + 32 + 64))
  return kernels + scales_and_biases + 64 * 10 + 10


def count_wide_resnet(n, k):
  """Parameters of a wide ResNet of 6 n + 4 layers, on CIFAR-10."""
  rest = 2 * n - 1
  a, b, c = 16 * k, 32 * k, 64 * k
  kernels = 9 * (3 * 16 + 16 * a + a * b + b * c)
  kernels += 9 * rest * (a**2 + b**2 + c**2)
  shortcuts = 16 * a + a * b + b * c
  # Of what comes into each convolution but the very first, and of the end.
  scales_and_biases = 2 * (16 + a + b + rest * (a + b + c) + c)
  return kernels + shortcuts + scales_and_biases + c * 10 + 10


GRAY, COLOR = (28, 28, 1), (32, 32, 3)


@functools.cache
def shapes(name, image_shape=COLOR, num_classes=10):
  """Shapes and dtypes of the parameters and the state of a model."""
  model = models.MODELS[name](num_classes)
  images = jnp.zeros((2, *image_shape))
  key = jax.random.key(0)
  return jax.eval_shape(lambda: models.init(model, key, images))


@pytest.mark.parametrize(
  ('name', 'image_shape', 'expected', 'published'),
  [
    ('mlp', GRAY, 784 * 256 + 256**2 + 256 * 10 + 2 * 256 + 10, None),
    ('cnn', GRAY, 160 + 4640 + (7 * 7 * 32 + 1) * 128 + 1290, None),
    ('resnet20', COLOR, count_resnet(3), 0.27),
    ('resnet32', COLOR, count_resnet(5), 0.46),
    ('wrn-16-4', COLOR, count_wide_resnet(2, 4), 2.75),
    ('wrn-28-10', COLOR, count_wide_resnet(4, 10), 36.5),
  ],
)
def test_number_of_parameters(name, image_shape, expected, published):
  """It is what follows by hand, and what is published, in millions."""
  params, _ = shapes(name, image_shape)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
  if published:
    decimals = len(str(published).split('.')[1])
    assert round(expected / 1e6, decimals) == published


@pytest.mark.parametrize('name', models.MODELS)
def test_logits(name):
  """A float32 logit for every class, and a state like the one before."""
  model = models.MODELS[name](7)
  params, model_state = shapes(name, (8, 8, 1), 7)
  images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
  logits, new_model_state = jax.eval_shape(
    lambda p, s, x: models.apply_train(p, s, model, x),
    *(params, model_state, images),
  )
  assert new_model_state == model_state
  assert bool(model_state) == (name not in models.WITHOUT_BATCH_NORM)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet20', 'wrn-16-4'])
def test_initialization(name):
  """Kernels are random by the published rules, BatchNorm does nothing yet."""
  model = models.MODELS[name](10)
  init = jax.jit(lambda key: models.init(model, key, jnp.zeros((1, 4, 4, 3))))
  # Of the two kinds of random numbers, this one compiles three times faster.
  params, model_state = init(jax.random.key(0, impl='rbg'))
  distributions = []
  for path, leaf in jax.tree.leaves_with_path((params, model_state)):
    kind, w = path[-1].key, np.asarray(leaf, np.float64)
    if kind != 'kernel':
      np.testing.assert_array_equal(w, 1.0 if kind in ('scale', 'var') else 0)
      continue
    if w.ndim == 4:
      height, width, _, channels = w.shape
      deviation = np.sqrt(2 / (height * width * channels))
      distribution = scipy.stats.norm(scale=deviation)
    else:
      largest = 1 / np.sqrt(len(w))
      distribution = scipy.stats.uniform(-largest, 2 * largest)
    distributions.append(distribution)
    # The standard error of a deviation is at most 1 / sqrt(2 n) of it.
    assert abs(w.std() / distribution.std() - 1) < 5 / np.sqrt(2 * w.size)
    # It tells a normal distribution from one that is cut off, too.
    assert scipy.stats.kstest(w.ravel(), distribution.cdf).pvalue > 1e-5
  assert len(distributions) == {'resnet20': 20, 'wrn-16-4': 17}[name]


def relu(x):
  """Written again, like all that follows."""
  return np.maximum(x, 0)


def convolve(x, layer, stride=1):
  """Weighted sums over windows around every ``stride``-th pixel."""
  kernel = layer['kernel']
  size = len(kernel)
  margin = (size // 2, size // 2)
  padded = np.pad(x, ((0, 0), margin, margin, (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(
    padded, (size, size), axis=(1, 2)
  )[:, ::stride, ::stride]
  y = np.einsum('nhwcij,ijcd->nhwd', windows, kernel)
  return y + layer.get('bias', 0)


def connect(x, layer):
  """A dense layer."""
  return x @ layer['kernel'] + layer['bias']


def normalizer(params, stats, train):
  """BatchNorm by name, and a dict which it fills with the new statistics."""
  new_stats = {}

  def norm(x, name):
    mean, var = stats[name]['mean'], stats[name]['var']
    new_stats[name] = stats[name]
    if train:
      batch_mean, batch_var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
      new_stats[name] = {  # By what Torch calls a momentum of 0.1.
        'mean': mean + 0.1 * (batch_mean - mean),
        'var': var + 0.1 * (batch_var - var),
      }
      mean, var = batch_mean, batch_var
    standardized = (x - mean) / np.sqrt(var + 1e-5)
    return standardized * params[name]['scale'] + params[name]['bias']

  return norm, new_stats


def residual_block(x, params, stats, stride, train):
  """He et al., 2015, figure 2, and option A."""
  norm, new_stats = normalizer(params, stats, train)
  y = relu(norm(convolve(x, params['Conv_0'], stride), 'BatchNorm_0'))
  y = norm(convolve(y, params['Conv_1']), 'BatchNorm_1')
  y[..., : x.shape[-1]] += x[:, ::stride, ::stride]
  return relu(y), new_stats


def wide_block(x, params, stats, stride, train):
  """Zagoruyko and Komodakis, 2016, figure 1 b."""
  norm, new_stats = normalizer(params, stats, train)
  activated = relu(norm(x, 'BatchNorm_0'))
  y = relu(norm(convolve(activated, params['Conv_0'], stride), 'BatchNorm_1'))
  y = convolve(y, params['Conv_1'])
  if 'Conv_2' in params:
    return y + convolve(activated, params['Conv_2'], stride), new_stats
  return y + x, new_stats


def apply_mlp(images, params, stats, train):
  """Two hidden layers."""
  del train
  x = images.reshape(len(images), -1)
  x = relu(connect(x, params['Dense_0']))
  x = relu(connect(x, params['Dense_1']))
  return connect(x, params['Dense_2']), stats


def apply_cnn(images, params, stats, train):
  """Two convolutions, one hidden layer."""
  del train
  x = images
  for name in ('Conv_0', 'Conv_1'):
    x = relu(convolve(x, params[name], 2))
  x = relu(connect(x.reshape(len(x), -1), params['Dense_0']))
  return connect(x, params['Dense_1']), stats


def apply_resnet(images, params, stats, train):
  """Three stages of two blocks."""
  norm, new_stats = normalizer(params, stats, train)
  x = relu(norm(convolve(images, params['Conv_0']), 'BatchNorm_0'))
  for i, stride in enumerate([1, 1, 2, 1, 2, 1]):
    name = f'ResidualBlock_{i}'
    x, new_stats[name] = residual_block(
      x, params[name], stats[name], stride, train
    )
  return connect(x.mean(axis=(1, 2)), params['Dense_0']), new_stats


def apply_wide_resnet(images, params, stats, train):
  """Three stages of two blocks."""
  norm, new_stats = normalizer(params, stats, train)
  x = convolve(images, params['Conv_0'])
  for i, stride in enumerate([1, 1, 2, 1, 2, 1]):
    name = f'WideBlock_{i}'
    x, new_stats[name] = wide_block(x, params[name], stats[name], stride, train)
  x = relu(norm(x, 'BatchNorm_0'))
  return connect(x.mean(axis=(1, 2)), params['Dense_0']), new_stats


def randomized(model, images):
  """Parameters and a state in float64, with nothing at zero or one."""
  rng = np.random.default_rng(1)

  def randomize(path, leaf):
    if path[-1].key == 'kernel':
      inputs = np.prod(leaf.shape[:-1])
      return rng.standard_normal(leaf.shape) / np.sqrt(inputs)
    return rng.uniform(0.5, 1.5, leaf.shape)  # Variances are positive.

  return jax.tree_util.tree_map_with_path(
    randomize,
    jax.eval_shape(lambda: models.init(model, jax.random.key(0), images)),
  )


@pytest.mark.parametrize(
  ('model', 'apply_reference'),
  [
    (models.MLP(3, hidden_sizes=(5, 4)), apply_mlp),
    (models.CNN(3, channels=(2, 4), hidden_size=5), apply_cnn),
    (
      models.CNN(3, (2, 4), 5, conv_general_dilated=convolution.convolve),
      apply_cnn,
    ),
    (resnet.ResNet(3, depth=14), apply_resnet),
    (resnet.WideResNet(3, depth=16, widening=2), apply_wide_resnet),
  ],
  ids=['mlp', 'cnn', 'cnn_of_products', 'resnet', 'wide_resnet'],
)
def test_against_numpy(model, apply_reference, x64):
  """Logits agree, and statistics after training; in evaluation they stay."""
  images = np.random.default_rng(0).standard_normal((3, 6, 7, 2))
  params, model_state = randomized(model, images)
  stats = model_state.get('batch_stats', {})
  inputs = params, model_state, model, images
  logits, new_state = models.apply_train(*inputs)
  expected, new_stats = apply_reference(images, params, stats, True)
  assert error(new_state.get('batch_stats', {}), new_stats) < 1e-12
  assert error(logits, expected) < 1e-12
  expected, _ = apply_reference(images, params, stats, False)
  assert error(models.apply_eval(*inputs), expected) < 1e-12


@pytest.mark.parametrize(
  ('make_model', 'depth', 'words'),
  [
    (resnet.ResNet, 21, ['6 n + 2', '21', 'depth=20']),
    (functools.partial(resnet.WideResNet, widening=1), 4, ['4', 'depth=22']),
  ],
)
def test_impossible_depth(make_model, depth, words):
  """The error says which depths there are."""
  with pytest.raises(ValueError) as error_info:
    models.init(
      make_model(10, depth=depth), jax.random.key(0), jnp.zeros((1, 4, 4, 3))
    )
  for word in words:
    assert word in str(error_info.value)


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_cross_entropies(label_smoothing):
  """Against (1 - a) one_hot + a / num_classes, as the label."""
  rng = np.random.default_rng(0)
  logits, labels = 3 * rng.standard_normal((5, 4)), rng.integers(0, 4, 5)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  targets = (1 - label_smoothing) * np.eye(4)[labels] + label_smoothing / 4
  losses = models.cross_entropies(
    jnp.asarray(logits, jnp.float32), labels, label_smoothing
  )
  expected = -(targets * log_p).sum(axis=1)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
