"""Promise: networks of equal training loss; rank correlations are right."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.paper import correlation
from experiments.paper import equal_loss
from experiments.paper import rank_correlation
from experiments.paper import sharpness_measures as measures
from experiments.paper import tables
from experiments.report import records
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NUM_EXAMPLES, NUM_CLASSES = 24, 3
TARGET = 0.4


def make_split(n=NUM_EXAMPLES):
  """A few images that a network soon memorizes."""
  rng = np.random.default_rng(0)
  return data.Split(
    jnp.asarray(rng.standard_normal((n, 4, 4, 1)), jnp.float32),
    jnp.asarray(rng.integers(0, NUM_CLASSES, n), jnp.int32),
  )


def take(tree, i):
  """The part of one network."""
  return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.slow
def test_training():
  """Networks stop at the target, after the steps of SGD by its formula.

  The first one does not get there, and so is NaN.
  """
  split, network = make_split(), equal_loss.Network(NUM_CLASSES)
  settings = equal_loss.Settings(
    batch_size=np.full(4, 12),
    lr=np.array([0.0, 0.01, 0.02, 0.05]),
    weight_decay=np.array([0.0, 1e-3, 0.0, 1e-3]),
    dropout=np.zeros(4),
    seed=np.arange(4),
  )
  trained = equal_loss.train(
    settings,
    NUM_CLASSES,
    split,
    target=TARGET,
    max_epochs=60,
    report=lambda line: None,
  )
  assert np.isnan(trained.train_loss[0])
  assert all(np.isnan(x[0]).all() for x in jax.tree.leaves(trained.params))
  assert len(set(trained.epochs[1:])) > 1
  value_and_grad = jax.jit(
    jax.value_and_grad(equal_loss.loss_fn), static_argnums=1
  )
  for i in (1, 2, 3):
    loss, _ = value_and_grad(take(trained.params, i), network, split)
    assert loss <= TARGET
    assert loss == pytest.approx(trained.train_loss[i], rel=1e-5)

  init_key, key = jax.random.split(jax.random.key(3))
  params = network.init(init_key, split.images[:1])['params']
  velocity = jax.tree.map(jnp.zeros_like, params)
  for step in range(round(2 * trained.epochs[3])):
    if step % 2 == 0:
      assert value_and_grad(params, network, split)[0] > TARGET
      key, order_key, _ = jax.random.split(key, 3)
      halves = jax.random.permutation(order_key, NUM_EXAMPLES).reshape(2, 12)
    _, grads = value_and_grad(params, network, take(split, halves[step % 2]))
    velocity = jax.tree.map(
      lambda v, g, w: 0.9 * v + g + 1e-3 * w, velocity, grads, params
    )
    params = jax.tree.map(lambda w, v: w - 0.05 * v, params, velocity)
  assert error(take(trained.params, 3), jax.device_get(params)) < 1e-4


def test_dropout():
  """Hidden units are dropped, and the others scaled."""
  images = make_split().images
  network = equal_loss.Network(NUM_CLASSES)
  params = network.init(jax.random.key(0), images)['params']
  key, x = jax.random.key(1), images.reshape(NUM_EXAMPLES, -1)
  for i in range(2):
    x = jax.nn.relu(x @ params[f'Dense_{i}']['kernel'])
    keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.7, x.shape)
    x = x * keep / 0.7
  result = network.apply({'params': params}, images, 0.3, key)
  want = x @ params['Dense_2']['kernel']
  np.testing.assert_allclose(result, want, atol=1e-5)


def count_tau(x, y):
  """Concordant less discordant pairs over those without ties in x and in y."""
  signs = np.array(
    [
      (np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
      for i, j in itertools.combinations(range(len(x)), 2)
    ]
  )
  ties = np.prod(np.abs(signs).sum(axis=0))
  return np.prod(signs, axis=1).sum() / np.sqrt(ties)


def test_rank_correlation():
  """Tau counts pairs; a group differs in one setting only."""
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 12))
  found = rank_correlation.interval((x, y), rank_correlation.tau, paired=True)
  assert found['tau'] == pytest.approx(count_tau(x, y))
  assert found['low'] < found['tau'] < found['high']
  settings = {'a': np.repeat([0, 1, 2], 2), 'b': np.tile([0, 1], 3)}
  y = np.array([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])
  taus = rank_correlation.by_setting(np.arange(6.0), y, settings)
  # Along a, y rises where b = 0 and falls where b = 1; along b, it rises.
  np.testing.assert_allclose(taus['a'], [1, -1])
  np.testing.assert_allclose(taus['b'], [1, 1, 1])
  assert rank_correlation.mean_of_means(taus)['tau'] == pytest.approx(0.5)


@pytest.fixture
def small(monkeypatch):
  """The program on few images; returns its data set.

  A third of its networks does not reach the target.
  """
  split = make_split()
  dataset = data.Dataset(
    train=split,
    held_out=None,
    test=take(split, slice(8)),
    preprocess=lambda images: images,
    num_classes=NUM_CLASSES,
  )
  monkeypatch.setitem(
    data.DATASETS, 'fashion_mnist', lambda data_dir, train_size: dataset
  )
  for name, value in {
    'GRID': {
      'batch_size': (8, 12),
      'lr': (0.0, 0.02, 0.03),
      'weight_decay': (0.0, 1e-3),
      'dropout': (0.0, 0.1),
    },
    'TARGET': TARGET,
    'MAX_EPOCHS': 40,
    **{'POINTS': 16, 'BATCH': 8},
  }.items():
    monkeypatch.setattr(correlation, name, value)
  for name, value in {
    **{'STEPS': 2, 'SAMPLES': 2},
    # One norm for each case: each is compiled.
    'RADII': {
      key: radii
      for key, radii in measures.RADII.items()
      if key[1:] in {('worst', 2), ('average', np.inf)}
    },
  }.items():
    monkeypatch.setattr(measures, name, value)
  monkeypatch.setattr(rank_correlation, 'NUM_RESAMPLES', 9)
  return dataset


def test_program(small, tmp_path, monkeypatch, capsys):
  """It resumes, records everything, and trains nothing twice."""
  argv = [f'--out={tmp_path}']

  def interrupt(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(correlation, 'measure_or_load', interrupt)
    with pytest.raises(KeyboardInterrupt):
      correlation.main(argv)
  [trained] = tmp_path.glob('*.npz')
  written = trained.stat().st_mtime_ns
  correlation.main(argv)
  assert trained.stat().st_mtime_ns == written
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['resumed_from'] == [records.git_commit()]
  assert (results['networks'], results['networks_at_target']) == (24, 16)
  assert max(results['train_loss']) <= TARGET
  assert 0.0 not in results['settings']['lr']
  assert len(set(results['seeds'])) == 16
  measured = results['measured']
  gap = np.subtract(measured['test error'], measured['train error'])
  plain, adaptive = (
    count_tau(measured[measures.name((name, 'worst', 2), rho)], gap)
    for name, rho in (('sharpness', 0.05), ('adaptive sharpness', 0.5))
  )
  out = capsys.readouterr().out
  assert f'| sharpness, worst case, p = 2 | {plain:.2f} [' in out
  difference = results['differences'][1]
  assert difference['rho'] == {'sharpness': 0.05, 'adaptive sharpness': 0.5}
  assert difference['overall']['tau'] == pytest.approx(adaptive - plain)
  assert (tmp_path / 'correlation.png').exists()

  correlation.main(argv)
  assert ' after ' not in capsys.readouterr().out
  again = json.loads((tmp_path / 'results.json').read_text())
  assert again['correlations'] == results['correlations']
  monkeypatch.setattr(measures, 'STEPS', 3)
  with pytest.raises(SystemExit):
    correlation.main(argv)
  assert 'steps = 2, but got 3' in capsys.readouterr().err


def test_recorded(monkeypatch):
  """The recorded taus follow from the recorded measures."""
  file = tables.RESULTS / 'correlation' / 'results.json'
  recorded = json.loads(file.read_text())
  assert recorded['config'] == correlation.make_config()
  assert not recorded['commit'].endswith('-dirty')
  assert max(recorded['train_loss']) <= correlation.TARGET
  monkeypatch.setattr(rank_correlation, 'NUM_RESAMPLES', 2)
  settings, measured = (
    {name: np.array(each) for name, each in recorded[part].items()}
    for part in ('settings', 'measured')
  )

  def taus(found):
    leaves, _ = jax.tree.flatten_with_path(found)
    return {path: x for path, x in leaves if path[-1].key == 'tau'}

  for part, found in (
    (
      'correlations',
      correlation.correlate(
        settings, measured, np.array(recorded['train_loss'])
      ),
    ),
    ('differences', correlation.compare(settings, measured)),
  ):
    assert taus(found) == pytest.approx(taus(recorded[part]))
