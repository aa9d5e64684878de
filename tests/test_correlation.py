"""Promise: networks of one training loss, and rank correlations, are right."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import correlation
import data
import equal_loss
import rank_correlation
import records
from support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NUM_EXAMPLES, NUM_CLASSES = 24, 3
TARGET = 0.4


@pytest.fixture(scope='module')
def split():
  """A few images that a network soon knows by heart."""
  rng = np.random.default_rng(0)
  return data.Split(
    jnp.asarray(rng.standard_normal((NUM_EXAMPLES, 4, 4, 1)), jnp.float32),
    jnp.asarray(rng.integers(0, NUM_CLASSES, NUM_EXAMPLES), jnp.int32),
  )


def make_settings(**changes):
  """Four networks, of which some are faster than others."""
  settings = {
    'batch_size': np.full(4, 8),
    'lr': np.array([0.003, 0.01, 0.02, 0.05]),
    'weight_decay': np.array([0.0, 1e-3, 0.0, 1e-3]),
    'dropout': np.array([0.0, 0.0, 0.3, 0.3]),
    'seed': np.arange(4),
  }
  return equal_loss.Settings(**settings | changes)


def train(settings, split, max_epochs=200):
  """Trains without a word."""
  return equal_loss.train(
    settings,
    NUM_CLASSES,
    split,
    target=TARGET,
    max_epochs=max_epochs,
    report=lambda line: None,
  )


def take(tree, i):
  """One network's part."""
  return jax.tree.map(lambda x: x[i], tree)


def test_each_reaches_the_loss(split):
  """The loss of what is returned is the recorded one, and low enough.

  Those that are soon there do not change what becomes of the others.
  """
  settings = make_settings()
  trained = train(settings, split)
  network = equal_loss.Network(NUM_CLASSES)
  assert len(set(trained.epochs)) > 2
  for i in range(4):
    params = take(trained.params, i)
    loss = equal_loss.loss_fn(params, network, split)
    assert loss <= TARGET
    assert loss == pytest.approx(trained.train_loss[i], rel=1e-5)
  slowest = int(np.argmax(trained.epochs))
  alone = train(take(settings, slice(slowest, slowest + 1)), split)
  assert alone.epochs[0] == trained.epochs[slowest]
  assert error(take(alone.params, 0), take(trained.params, slowest)) < 1e-3


def test_steps(split):
  """Batches of everything make the steps of SGD by its formula."""
  settings = make_settings(
    batch_size=np.full(4, NUM_EXAMPLES), dropout=np.zeros(4)
  )
  trained = train(settings, split)
  network = equal_loss.Network(NUM_CLASSES)
  i = 3
  init_key, _ = jax.random.split(jax.random.key(i))
  params = network.init(init_key, split.images[:1])['params']
  velocity = jax.tree.map(jnp.zeros_like, params)
  losses = []
  for _ in range(int(trained.epochs[i])):
    grads = jax.grad(equal_loss.loss_fn)(params, network, split)
    velocity = jax.tree.map(
      lambda v, g, w: 0.9 * v + g + 1e-3 * w, velocity, grads, params
    )
    params = jax.tree.map(lambda w, v: w - 0.05 * v, params, velocity)
    losses.append(float(equal_loss.loss_fn(params, network, split)))
  assert error(take(trained.params, i), jax.device_get(params)) < 1e-4
  assert losses[-1] <= TARGET < min(losses[:-1])


def test_those_that_do_not_get_there(split):
  """What was not reached is NaN, not what happened to be there."""
  trained = train(
    make_settings(lr=np.array([0.0, 0.03, 0.03, 0.03])), split, 60
  )
  assert np.isnan(trained.train_loss[0])
  assert np.isnan(trained.epochs[0])
  assert all(np.isnan(x[0]).all() for x in jax.tree.leaves(trained.params))
  assert np.isfinite(trained.train_loss[1:]).all()


def test_dropout(split):
  """After each ReLU units are dropped, and those that stay are scaled."""
  network = equal_loss.Network(NUM_CLASSES)
  params = network.init(jax.random.key(0), split.images)['params']
  rate, key = 0.3, jax.random.key(1)
  x, count = np.asarray(split.images).reshape(NUM_EXAMPLES, -1), 0
  for i in range(len(equal_loss.HIDDEN_SIZES)):
    layer = params[f'Dense_{i}']
    x = np.maximum(x @ layer['kernel'] + layer['bias'], 0)
    keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
    count += keep.mean() / len(equal_loss.HIDDEN_SIZES)
    x = x * keep / (1 - rate)
  layer = params[f'Dense_{i + 1}']
  result = network.apply({'params': params}, split.images, rate, key)
  np.testing.assert_allclose(
    result, x @ layer['kernel'] + layer['bias'], atol=1e-5
  )
  assert count == pytest.approx(1 - rate, abs=0.03)
  kept = network.apply({'params': params}, split.images, 0.0, key)
  clean = network.apply({'params': params}, split.images)
  np.testing.assert_array_equal(clean, kept)


def count_tau(x, y):
  """Concordant less discordant pairs, of all; without ties."""
  signs = [
    np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
    for i, j in itertools.combinations(range(len(x)), 2)
  ]
  return np.mean(signs)


def test_tau():
  """It is what counting pairs gives."""
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 12))
  assert rank_correlation.tau(x, y) == pytest.approx(count_tau(x, y))
  found = rank_correlation.overall(x, y)
  assert found.tau == pytest.approx(count_tau(x, y))
  assert found.low < found.tau < found.high
  assert rank_correlation.overall(x, x) == pytest.approx((1, 1, 1))
  assert rank_correlation.difference(x, -x, x) == pytest.approx((2, 2, 2))
  assert rank_correlation.difference(x, y, y).tau == pytest.approx(
    found.tau - 1
  )


def test_by_setting():
  """Each group differs in one setting alone."""
  settings = rank_correlation.make_grid({'a': (0, 1, 2), 'b': (0, 1)})
  np.testing.assert_array_equal(settings['a'], [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(settings['b'], [0, 1, 0, 1, 0, 1])
  x = np.arange(6.0)
  y = np.array([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])
  taus = rank_correlation.by_setting(x, y, settings)
  # Along a, y rises where b = 0 and falls where b = 1; along b it rises.
  np.testing.assert_allclose(taus['a'], [1, -1])
  np.testing.assert_allclose(taus['b'], [1, 1, 1])
  found = rank_correlation.mean_over_groups(taus['b'])
  assert found == pytest.approx((1, 1, 1))
  assert rank_correlation.mean_over_settings(taus).tau == pytest.approx(0.5)
  # Without models 0 and 1, a group of one for each b is left.
  rest = {name: values[2:] for name, values in settings.items()}
  np.testing.assert_allclose(
    rank_correlation.by_setting(x[2:], y[2:], rest)['b'], [1, 1]
  )


def test_names_of_measures():
  """Each measure and radius has a name of its own."""
  names = [
    correlation.measure_name(*measure, rho)
    for measure, radii in correlation.RADII.items()
    for rho in radii
  ]
  assert len(set(names)) == 3 * len(correlation.RADII)


# Of each case one norm: a program is compiled for each.
RADII = {
  measure: radii
  for measure, radii in correlation.RADII.items()
  if measure[1:] in {('worst', 2), ('average', np.inf)}
}


@pytest.fixture
def small(monkeypatch):
  """The program on few images; a third of its networks does not get there."""
  rng = np.random.default_rng(0)

  def load(data_dir, train_size):
    del data_dir, train_size
    part = lambda n: data.Split(
      rng.integers(0, 256, (n, 4, 4, 1), np.uint8),
      rng.integers(0, NUM_CLASSES, n).astype(np.int32),
    )
    return data.Dataset(
      train=part(NUM_EXAMPLES),
      held_out=None,
      test=part(8),
      preprocess=lambda images: (jnp.asarray(images) - 128.0) / 64.0,
      num_classes=NUM_CLASSES,
    )

  monkeypatch.setitem(data.DATASETS, 'fashion_mnist', load)
  grid = {
    'batch_size': (8, 12),
    'lr': (0.0, 0.01, 0.03),
    'weight_decay': (0.0, 1e-3),
    'dropout': (0.0, 0.1),
  }
  for name, value in {
    **{
      'GRID': grid,
      'TARGET': TARGET,
      'MAX_EPOCHS': 100,
      'COLORS': ('C0', 'C1'),
    },
    **{'POINTS': 16, 'BATCH': 8, 'STEPS': 2, 'SAMPLES': 2, 'RADII': RADII},
  }.items():
    monkeypatch.setattr(correlation, name, value)


def test_program(small, tmp_path, capsys):
  """All is recorded; repeated, nothing is trained or measured again."""
  argv = [f'--out={tmp_path}']
  correlation.main(argv)
  first = capsys.readouterr().out
  results = json.loads((tmp_path / 'results.json').read_text())
  assert (results['networks'], results['networks_at_target']) == (24, 16)
  assert max(results['train_loss']) <= TARGET
  assert 0.0 not in results['settings']['lr']
  assert correlation.table(results) in first
  gap = np.subtract(
    results['measured']['test error'], results['measured']['train error']
  )
  name = correlation.measure_name('sharpness', 'worst', 2, 0.05)
  expected = count_tau_b(results['measured'][name], gap)
  assert results['correlations'][name]['overall']['tau'] == pytest.approx(
    expected
  )
  assert f'| sharpness, worst case, p = 2 | {expected:.2f} [' in first
  adaptive = correlation.measure_name('adaptive sharpness', 'worst', 2, 0.5)
  difference = count_tau_b(results['measured'][adaptive], gap) - expected
  compared = results['differences'][1]
  assert compared['rho'] == {'sharpness': 0.05, 'adaptive sharpness': 0.5}
  assert compared['overall']['tau'] == pytest.approx(difference)
  assert f'| {difference:+.2f} [' in first
  means = [
    results['correlations'][each]['mean_over_settings']['tau']
    for each in (adaptive, name)
  ]
  assert compared['mean_over_settings']['tau'] == pytest.approx(
    means[0] - means[1]
  )
  assert len(set(results['seeds'])) == 16
  assert (tmp_path / 'correlation.png').exists()

  correlation.main(argv)
  assert capsys.readouterr().out in first
  again = json.loads((tmp_path / 'results.json').read_text())
  assert again.pop('resumed_from') == [results['commit']]
  assert again == results


def count_tau_b(x, y):
  """Concordant less discordant pairs, of those without ties in x and in y."""
  signs = np.array(
    [
      (np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
      for i, j in itertools.combinations(range(len(x)), 2)
    ]
  )
  return np.prod(signs, axis=1).sum() / np.sqrt(
    np.prod(np.abs(signs).sum(axis=0))
  )


def test_other_settings(small, tmp_path, capsys):
  """What other settings have left is not mixed with these."""
  records.write_started(tmp_path / correlation.CONFIG, {'grid': {}})
  with pytest.raises(SystemExit):
    correlation.main([f'--out={tmp_path}'])
  assert 'holds results of other settings' in capsys.readouterr().err


def test_measures(small):
  """They are the library's; the adaptive one is invariant, the other is not."""
  rescale = jnp.float32(4.0)
  dataset = data.DATASETS['fashion_mnist'](None, None)
  dataset = dataset._replace(
    train=data.Split(
      dataset.preprocess(dataset.train.images),
      jnp.asarray(dataset.train.labels),
    ),
    test=data.Split(
      dataset.preprocess(dataset.test.images), jnp.asarray(dataset.test.labels)
    ),
  )
  network = equal_loss.Network(NUM_CLASSES)
  params = network.init(jax.random.key(0), dataset.train.images)['params']
  # The ReLU between the first two layers lets a factor through.
  scaled = dict(params)
  scaled['Dense_0'] = jax.tree.map(lambda w: w * rescale, params['Dense_0'])
  scaled['Dense_1'] = {
    **params['Dense_1'],
    'kernel': params['Dense_1']['kernel'] / rescale,
  }
  both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, scaled)
  quantities = correlation.make_quantities(dataset)
  for measure, radii in correlation.RADII.items():
    name, case, _ = measure
    before, after = quantities[measure](both, radii[-1])
    is_adaptive = name == 'adaptive sharpness'
    is_equal = abs(after - before) < 0.01 * abs(before)
    assert is_equal == is_adaptive, measure
    if case == 'worst':
      assert before > 0
