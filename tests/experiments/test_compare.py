"""The comparison program: what it writes, prints and refuses."""

import json
import types

import jax
import jax.numpy as jnp
from matplotlib import image
import numpy as np
import pytest
import scipy.stats

from experiments import compare
from experiments import config
from experiments import data
from experiments import evaluation
from experiments import models
from experiments import search
from experiments.report import records
from experiments.report import reporting

pytestmark = pytest.mark.usefixtures('quickly_compiled')


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """The folder and the results of a run with a search."""
  out = tmp_path_factory.mktemp('out')
  compare.main(
    [
      *('--epochs=2', '--seeds=3,1', '--train-size=300', '--every-k=2'),
      *('--rho=sam=0.05,0.1', '--rho=asam=0.5,1', f'--out={out}'),
    ]
  )
  return out, json.loads((out / 'results.json').read_text())


def test_results(ran):
  """results.json holds what ran and what came out, for every seed."""
  out, results = ran
  assert '--rho=sam=0.05,0.1' in results['command']
  assert results['versions']['jax'] == jax.__version__
  assert results['config']['seeds'] == [3, 1]
  assert list(results['optimizers']) == ['sgd', 'sam', 'asam']
  for name, result in results['optimizers'].items():
    curves = result['curves']
    assert {np.shape(curve) for curve in curves.values()} == {(2, 2)}
    accuracies = np.array(curves['held_out_accuracy'])
    np.testing.assert_array_equal(
      result['held_out_accuracy']['per_seed'], accuracies[-1]
    )
    np.testing.assert_array_equal(
      result['oracle_best_epoch_held_out_accuracy']['per_seed'],
      accuracies.max(axis=0),
    )
    low, high = result['test_accuracy']['interval_95']
    assert low < result['test_accuracy']['mean'] < high
    if name != 'sgd':  # The best candidate is trained, with new seeds.
      found = results['search'][name]
      scores = [c['held_out_accuracy']['mean'] for c in found['candidates']]
      assert found['seeds'] == [4, 5]
      best = found['candidates'][np.argmax(scores)]['rho']
      assert best == found['rho'] == result['rho']
  assert image.imread(out / 'curves.png').shape[:2] == (540, 1200)


def test_tables(ran, capsys):
  """What is printed is what the file holds."""
  _, results = ran
  reporting.print_results(compare.Console(width=80), results)
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  for name, result in results['optimizers'].items():
    mean, (_, high) = (
      result['test_accuracy'][key] for key in ('mean', 'interval_95')
    )
    assert [
      *(name, f'{result["rho"]:g}'),
      *(f'{100 * mean:.2f}', '±', f'{100 * (high - mean):.2f}'),
      f'{result["train_loss"]["mean"]:.3f}',
      f'{result["sharpness_sam_ball"]["mean"]:.5f}',
      f'{result["sharpness_asam_ball"]["mean"]:.5f}',
      f'{result["ms_per_step"]:.2f}',
      f'{result["time_ratio_to_first"]:.2f}',
    ] in rows


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    ('--dataset=mnist', "--dataset 'mnist' digits --help"),
    ('--data-dir=x', '--data-dir digits fashion_mnist'),
    ('--train-size=1001', '--train-size 1001 1000'),
    ('--augment', '--augment digits --no-augment'),
    ('--label-noise=1', "--label-noise '1' 0.4"),
    ('--label-noise=nan', "--label-noise 'nan' 0.4"),
    ('--epochs=1.5', "--epochs '1.5' 100"),
    ('--batch-size=1001', '--batch-size 1001 1000 100'),
    ('--lr=0', "--lr '0' 0.1"),
    ('--lr -inf', "--lr '-inf' 0.1"),
    ('--seeds=0', "--seeds '0' 0,1,2"),
    ('--seeds -1,2', "--seeds '-1,2' 0,1,2"),
    ('--seeds=3,3', "--seeds '3,3' 0,1,2"),
    ('--seeds=0,4294967296', "--seeds '0,4294967296' 0,1,2"),
    ('--rho -1e-3,1', "--rho '-1e-3,1' asam=0.5,1,2"),
    ('--rho=', '--rho asam=0.5,1,2'),
    ('--rho=1,1.0', "--rho '1,1.0' asam=0.5,1,2"),
    ('--rho=sgd=1', "--rho 'sgd=1' asam=0.5,1,2"),
    ('--rho=sam=0.1,0.3', '--rho sam 2 asam 5 --rho sam='),
    ('--optimizer=sam,sam', "--optimizer 'sam,sam' sgd,asam"),
    ('--optimizer=sgd --rho=1', '--rho sam asam ignored sgd,asam'),
    ('--optimizer=sgd,sam --eta=1', '--eta asam ignored sgd,sam,asam'),
    ('--optimizer=asam --rho=sam=1', '--rho sam compared asam,sam'),
    ('--ord=1', "--ord '1' inf"),
    ('--ord=inf', '--ord inf default --rho sam='),
    ('--rho=0.1 --search-seeds=3', '--search-seeds ignored --rho 0.5,1'),
    ('--normalization=filterwise', '--normalization mlp --model cnn'),
    ('--perturb=normalization', '--perturb mlp BatchNorm --model cnn-bn'),
    ('--m-sharpness=33', '--m-sharpness 33 100 1'),
    ('--m-sharpness-by=vmap', '--m-sharpness-by --m-sharpness 32'),
    (
      '--preset=paper-cifar10 --dataset=digits',
      '--dataset paper-cifar10 cifar10 digits',
    ),
    ('--resume', '--resume interrupted Leave'),
    ('--epoch=3', 'unrecognized --epoch=3 --help'),
  ],
)
def test_bad_arguments(args, words, capsys, tmp_path):
  """One line names the argument, what was given and what to write."""
  with pytest.raises(SystemExit) as exit_info:
    compare.main([*args.split(), '--out', str(tmp_path / 'out')])
  assert exit_info.value.code == 2
  message = capsys.readouterr().err
  assert message.startswith('compare: error: ')
  assert message.count('\n') == 1
  assert [word for word in words.split() if word not in message] == []
  assert not (tmp_path / 'out').exists()


def test_out_in_a_file(capsys, tmp_path):
  """A folder that cannot be made is refused like any bad argument."""
  (tmp_path / 'file').write_text('kept')
  with pytest.raises(SystemExit):
    compare.main([f'--out={tmp_path / "file" / "folder"}'])
  assert "/folder' (Not a directory)" in capsys.readouterr().err
  assert (tmp_path / 'file').read_text() == 'kept'


def test_options():
  """Candidates become ascending; options override a preset, a name wins."""
  options = config.parse(['--seeds', '7,2', '--rho=0.2,0.1', '--rho=asam=2,1'])
  assert options.seeds == [7, 2]
  assert options.rho == {'sam': [0.1, 0.2], 'asam': [1, 2]}
  options = config.parse(['--preset=paper-cifar100', '--epochs=3'])
  assert (options.dataset, options.model) == ('cifar100', 'resnet20')
  assert (options.epochs, options.batch_size, options.augment) == (3, 128, True)
  assert options.rho == {'sam': [0.1], 'asam': [1.0]}


@pytest.fixture
def linear():
  """Two linear classifiers, and data with labels of its own for each."""
  rng = np.random.default_rng(0)
  kernels, biases = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 3))
  split = data.Split(
    images=rng.uniform(size=(6, 2, 2, 1)).astype(np.float32),
    labels=rng.integers(0, 3, (2, 6)).astype(np.int32),
  )
  return kernels, biases, split


def evaluate(measure, linear):
  """A measure of both classifiers, in one group and in two."""
  kernels, biases, split = linear
  arrays = {'kernel': kernels, 'bias': biases}
  params = {
    'Dense_0': jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
  }

  def group(*runs):
    mine = jax.tree.map(lambda x: x[jnp.array(runs)], params)
    state = types.SimpleNamespace(params=mine, model_state={})
    return types.SimpleNamespace(runs=runs, state=state)

  model = models.MLP(num_classes=3, hidden_sizes=())
  values = [
    evaluation.evaluate(measure, groups, model, jnp.asarray, split)
    for groups in ([group(0, 1)], [group(0), group(1)])
  ]
  np.testing.assert_allclose(*values, rtol=1e-5)
  return values[0]


def loss_and_grads(kernel, bias, images, labels):
  """Cross-entropy of a linear classifier in float64, and its gradient."""
  x = images.reshape(len(images), -1).astype(np.float64)
  logits = x @ kernel + bias
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  residual = (np.exp(log_p) - np.eye(3)[labels]) / len(labels)
  loss = -log_p[np.arange(len(labels)), labels].mean()
  return loss, x.T @ residual, residual.sum(axis=0)


@pytest.mark.parametrize('batch_size', [1000, 4])
def test_measures(linear, batch_size, monkeypatch):
  """Loss, accuracy and sharpness in both balls, against closed forms."""
  monkeypatch.setattr(evaluation, 'BATCH_SIZE', batch_size)
  kernels, biases, split = linear
  expected = {
    'train_loss': [],
    'train_accuracy': [],
    'sharpness_sam_ball': [],
    'sharpness_asam_ball': [],
  }
  for kernel, bias, labels in zip(kernels, biases, split.labels, strict=True):
    inputs = split.images, labels
    loss, *_ = loss_and_grads(kernel, bias, *inputs)
    logits = split.images.reshape(6, 4) @ kernel + bias
    expected['train_loss'].append(loss)
    expected['train_accuracy'].append(np.mean(logits.argmax(axis=1) == labels))
    for ball, rho, t in (
      ('sam', 0.05, np.ones_like(kernel)),
      ('asam', 0.5, np.abs(kernel) + 0.01),
    ):
      parts = []
      for start in range(0, 6, batch_size):
        part = [x[start : start + batch_size] for x in inputs]
        loss, kernel_grad, bias_grad = loss_and_grads(kernel, bias, *part)
        # Biases have T = 1 in both balls.
        norm = np.sqrt(np.sum((t * kernel_grad) ** 2) + np.sum(bias_grad**2))
        perturbed_loss, *_ = loss_and_grads(
          kernel + rho * t**2 * kernel_grad / norm,
          bias + rho * bias_grad / norm,
          *part,
        )
        parts += [perturbed_loss - loss] * len(part[0])
      expected[f'sharpness_{ball}_ball'].append(np.mean(parts))
  for name, measure in evaluation.ON_TRAINING_SET.items():
    np.testing.assert_allclose(
      evaluate(measure, linear), expected[name], rtol=1e-4, err_msg=name
    )


def test_search():
  """Seeds are new, and the candidate with the best mean is chosen."""
  rhos = {'sam': [0.1, 0.2, 0.5], 'asam': [1.0]}
  runs = search.make_runs(rhos, [3, 7, 1], 2)
  assert [run[1:] for run in runs] == [
    (rho, seed) for rho in rhos['sam'] for seed in (8, 9)
  ]
  found = search.make_searches(runs, [1, 0, 1, 1, 0, 0])
  assert set(found) == {'sam'}
  np.testing.assert_array_equal(found['sam'].scores, [[1, 0], [1, 1], [0, 0]])
  assert (found['sam'].rho, found['sam'].at_edge) == (0.2, False)
  for scores, rho, at_edge in (
    *(([3, 2, 1], 1, True), ([1, 2, 3], 4, True), ([1, 2, 2], 2, False)),
  ):
    tried = search.Search([1, 2, 4], [0], np.array(scores)[:, None])
    assert (tried.rho, tried.at_edge) == (rho, at_edge)


def test_interval():
  """Against SciPy's t-test; that of a single value is unknown."""
  values = np.random.default_rng(0).normal(size=(3, 5))
  mean, half_width = reporting.t_interval(values)
  for i, row in enumerate(values):
    interval = scipy.stats.ttest_1samp(row, 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean[i] - half_width[i], interval.low)
    np.testing.assert_allclose(mean[i] + half_width[i], interval.high)
  assert np.isnan(reporting.t_interval([2.0])[1])


def test_json(tmp_path):
  """What is not finite is null; an interrupted write leaves the old file."""
  path = tmp_path / 'results.json'
  results = {'a': np.array([[np.nan, 1.5]]), 'b': (np.float32(np.inf), None)}
  records.write_json(path, results)

  def write():
    with records.replacing(path) as partial:
      partial.write_text('ne')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write()
  assert [file.name for file in tmp_path.iterdir()] == ['results.json']
  assert json.loads(path.read_text()) == {
    'a': [[None, 1.5]],
    'b': [None, None],
  }
