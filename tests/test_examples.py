"""The demo program: what it writes and prints, and what it refuses."""

from concurrent import futures
import json
from pathlib import Path
import runpy
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
from matplotlib import image
import numpy as np
import pytest
import scipy.stats

import arguments
import data
import evaluation
import models
import records
import reporting
import search
from support import needs_pcast
from support import program_env

EXAMPLES = Path(__file__).parents[1] / 'examples'

SEARCHED = ['--epochs=2', '--seeds=4', '--rho=sam=0.05,0.1', '--rho=asam=0.5,1']
COMMANDS = {
  'searched': SEARCHED,
  'again': SEARCHED,
  'unperturbed': [
    *('--epochs=2', '--seeds=4,1,6,2', '--rho=0'),
    '--merge-held-out',
  ],
}


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
  """The folder of the folders of all commands, and how each command ended."""
  root = tmp_path_factory.mktemp('examples')
  env = program_env(root / 'cache')

  def run(name):
    return subprocess.run(
      [
        *(sys.executable, EXAMPLES / 'train.py', *COMMANDS[name]),
        *('--out', root / 'out' / name),
      ],
      capture_output=True,
      check=False,
      encoding='utf-8',
      env=env,
    )

  # The first fills the cache for the others.
  first, *others = COMMANDS
  with futures.ThreadPoolExecutor() as pool:
    results = [run(first), *pool.map(run, others)]
  return root / 'out', dict(zip(COMMANDS, results, strict=True))


@pytest.fixture(scope='module')
def searched(processes):
  """The folder and the results of a run with a search, and what it printed."""
  return finished(processes, 'searched')


def finished(processes, name):
  """The folder and the results of a run that succeeded, and what it printed."""
  out, ended = processes
  assert ended[name].returncode == 0, ended[name].stderr
  results = json.loads((out / name / 'results.json').read_text())
  return out / name, results, ended[name].stdout


def without_times(results):
  """``results`` without what differs between two runs that are the same."""
  times = {'ms_per_step', 'time_ratio_to_first', 'seconds_per_step'}
  if isinstance(results, dict):
    return {
      key: without_times(value)
      for key, value in results.items()
      if key not in times | {'wall_time_s', 'command', 'commit', 'out'}
    }
  return results


def test_results(searched):
  """results.json holds what ran and what came out, for every seed."""
  _, results, _ = searched
  assert set(results) == {
    *('command', 'commit', 'versions', 'device', 'config'),
    *('complete', 'search', 'optimizers', 'wall_time_s'),
  }
  assert '--rho=sam=0.05,0.1' in results['command']
  assert results['versions']['jax'] == jax.__version__
  assert results['config']['seeds'] == [0, 1, 2, 3]
  assert set(results['optimizers']) == {'sgd', 'sam', 'asam'}
  for result in results['optimizers'].values():
    curves = result['curves']
    for curve in ('train_loss', 'held_out_accuracy', 'seconds_per_step'):
      assert np.shape(curves[curve]) == (2, 4)
    accuracies = np.array(curves['held_out_accuracy'])
    np.testing.assert_array_equal(
      result['held_out_accuracy']['per_seed'], accuracies[-1]
    )
    np.testing.assert_array_equal(
      result['oracle_best_epoch_held_out_accuracy']['per_seed'],
      accuracies.max(axis=0),
    )
    for quantity in (
      *('test_accuracy', 'held_out_accuracy', 'train_loss'),
      *('sharpness_sam_ball', 'sharpness_asam_ball'),
    ):
      low, high = result[quantity]['interval_95']
      assert len(result[quantity]['per_seed']) == 4
      assert low < result[quantity]['mean'] < high
  assert results['optimizers']['sgd']['time_ratio_to_first'] == 1


def test_search_in_results(searched):
  """Other seeds are searched, and the best candidate is trained."""
  _, results, _ = searched
  for name, rhos in (('sam', [0.05, 0.1]), ('asam', [0.5, 1])):
    found = results['search'][name]
    scores = [c['held_out_accuracy']['mean'] for c in found['candidates']]
    assert [c['rho'] for c in found['candidates']] == rhos
    assert found['seeds'] == [4, 5]
    assert found['rho'] == rhos[np.argmax(scores)]
    assert results['optimizers'][name]['rho'] == found['rho']


def test_figure(searched):
  """The figure decodes, and no temporary file is left beside it."""
  out, _, _ = searched
  names = sorted(path.name for path in out.iterdir())
  assert names == ['curves.png', 'results.json']
  height, width, _ = image.imread(out / 'curves.png').shape
  assert (height, width) == (540, 1200)


def test_tables(searched):
  """What is printed is what the file holds, and the edges are told."""
  _, results, stdout = searched
  rows = [line.split() for line in stdout.splitlines()]
  for name, result in results['optimizers'].items():
    mean = result['test_accuracy']['mean']
    half_width = result['test_accuracy']['interval_95'][1] - mean
    assert [
      *(name, f'{result["rho"]:g}'),
      *(f'{100 * mean:.2f}', '±', f'{100 * half_width:.2f}'),
      f'{result["train_loss"]["mean"]:.3f}',
      f'{result["sharpness_sam_ball"]["mean"]:.5f}',
      f'{result["sharpness_asam_ball"]["mean"]:.5f}',
      f'{result["ms_per_step"]:.2f}',
      f'{result["time_ratio_to_first"]:.2f}',
    ] in rows
  found = results['search']
  for i in range(2):
    row = []
    for name in ('sam', 'asam'):
      candidate = found[name]['candidates'][i]
      chosen = '*' if candidate['rho'] == found[name]['rho'] else ''
      score = candidate['held_out_accuracy']['mean']
      row += [f'{candidate["rho"]:g}', f'{100 * score:.1f}{chosen}']
    assert row in rows
  for name in found:  # Of two candidates, either is at the edge.
    assert f'{name}: rho = {found[name]["rho"]:g} is at the edge' in stdout


def test_deterministic(processes, searched):
  """A second run differs in nothing but times."""
  _, results, _ = finished(processes, 'again')
  assert without_times(results) == without_times(searched[1])


def test_no_perturbation(processes):
  """At rho = 0, SAM and ASAM are SGD; single candidates are not searched."""
  _, results, stdout = finished(processes, 'unperturbed')
  assert results['search'] == {}
  assert 'Choice of rho' not in stdout
  sgd, sam, asam = (
    np.array(results['optimizers'][name]['curves']['train_loss'])
    for name in ('sgd', 'sam', 'asam')
  )
  np.testing.assert_allclose(sam, sgd, rtol=1e-5)
  np.testing.assert_allclose(asam, sgd, rtol=1e-5)
  assert np.all(sgd[0] > sgd[1])
  assert sgd[0, 0] != sgd[0, 1]  # The seeds make a difference.


def test_refused(monkeypatch, capsys):
  """A bad argument ends the program with status 2 and nothing but one line."""
  program = str(EXAMPLES / 'train.py')
  monkeypatch.setattr(sys, 'argv', [program, '--epochs=0'])
  with pytest.raises(SystemExit) as exit_info:
    runpy.run_path(program, run_name='__main__')
  assert exit_info.value.code == 2
  assert capsys.readouterr() == (
    '',
    "train.py: error: argument --epochs: must be an integer >= 1, but got '0'."
    ' Write for example 100.\n',
  )


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (['--dataset=mnist'], ['--dataset', "'mnist'", 'digits']),
    (['--data-dir=x'], ['--data-dir', 'digits', 'fashion_mnist']),
    (['--train-size=1001'], ['--train-size', '1001', '1000']),
    (['--augment'], ['--augment', 'digits', '--no-augment']),
    (['--model=vgg'], ['--model', "'vgg'", 'resnet20']),
    (['--label-noise=1'], ['--label-noise', "'1'", '0.4']),
    (['--label-noise', '-0.1'], ['--label-noise', "'-0.1'", '0.4']),
    (['--label-noise=nan'], ['--label-noise', "'nan'", '0.4']),
    (['--epochs=0'], ['--epochs', "'0'", '100']),
    (['--epochs=1.5'], ['--epochs', "'1.5'", '100']),
    (['--batch-size=0'], ['--batch-size', "'0'", '100']),
    (['--batch-size=1001'], ['--batch-size', '1001', '1000', '100']),
    (['--lr=0'], ['--lr', "'0'", '0.1']),
    (['--lr', '-inf'], ['--lr', "'-inf'", '0.1']),
    (['--lr=nan'], ['--lr', "'nan'", '0.1']),
    (['--seeds=0'], ['--seeds', "'0'", '5 or 0,1,2']),
    (['--seeds', '-1,2'], ['--seeds', "'-1,2'", '5 or 0,1,2']),
    (['--seeds=3,3'], ['--seeds', "'3,3'", '5 or 0,1,2']),
    (['--seeds=0,4294967296'], ['--seeds', "'0,4294967296'", '5 or 0,1,2']),
    (['--rho', '-1e-3,1'], ['--rho', "'-1e-3,1'", 'asam=0.5,1,2']),
    (['--rho=sam=nan,1'], ['--rho', "'sam=nan,1'", 'asam=0.5,1,2']),
    (['--rho='], ['--rho', 'asam=0.5,1,2']),
    (['--rho=inf'], ['--rho', "'inf'", 'asam=0.5,1,2']),
    (['--rho=1,1.0'], ['--rho', "'1,1.0'", 'asam=0.5,1,2']),
    (['--rho=sgd=1'], ['--rho', "'sgd=1'", 'asam=0.5,1,2']),
    (['--rho=sam=0.1,0.3'], ['--rho', 'sam 2', 'asam 5', '--rho sam=']),
    (['--optimizer=adam'], ['--optimizer', "'adam'", 'sgd,asam']),
    (['--optimizer=sam,sam'], ['--optimizer', "'sam,sam'", 'sgd,asam']),
    (
      ['--optimizer=sgd', '--rho=1'],
      ['--rho', 'sam and asam', 'ignored', '--optimizer sgd,asam'],
    ),
    (
      ['--optimizer=sgd,sam', '--eta=1'],
      ['--eta', 'asam', 'ignored', '--optimizer sgd,sam,asam'],
    ),
    (
      ['--optimizer=asam', '--rho=sam=1'],
      ['--rho', 'sam', 'not compared', '--optimizer asam,sam'],
    ),
    (['--ord=1'], ['--ord', "'1'", '2 or inf']),
    (['--ord=inf'], ['--ord', 'inf', 'by default', '--rho sam=']),
    (
      ['--rho=0.1', '--search-seeds=3'],
      ['--search-seeds', 'ignored', '--rho 0.5,1'],
    ),
    (
      ['--normalization=filterwise'],
      ['--normalization', 'mlp', 'elementwise', '--model cnn'],
    ),
    (
      ['--perturb=normalization'],
      ['--perturb', 'mlp', 'BatchNorm', '--model cnn-bn'],
    ),
    (
      ['--optimizer=sam', '--normalize-biases'],
      ['--normalize-biases', 'ignored', '--optimizer sam,asam'],
    ),
    (['--every-k=0'], ['--every-k', "'0'"]),
    (['--m-sharpness=33'], ['--m-sharpness', '33', '100', '--m-sharpness 1']),
    (['--m-sharpness-by=vmap'], ['--m-sharpness-by', '--m-sharpness 32']),
    pytest.param(
      ['--m-sharpness=25', '--m-sharpness-by=shard_map'],
      ['--m-sharpness-by', '8', '4', '--batch-size 200'],
      marks=needs_pcast,
    ),
    (
      ['--preset=paper-cifar10', '--dataset=digits'],
      ['--dataset', 'paper-cifar10', 'cifar10', 'digits'],
    ),
    (['--resume'], ['--resume', 'no interrupted run', 'Leave it']),
    (['--epoch=3'], ['unrecognized arguments', '--epoch=3', 'Write --help']),
  ],
)
def test_bad_arguments(args, words, capsys, tmp_path):
  """One line names the argument, what came and what to write."""
  with pytest.raises(SystemExit) as exit_info:
    arguments.parse([*args, '--out', str(tmp_path / 'out')])
  assert exit_info.value.code == 2
  message = capsys.readouterr().err
  assert message.count('\n') == 1
  for word in words:
    assert word in message
  assert not (tmp_path / 'out').exists()


def test_out_beneath_a_file(capsys, tmp_path):
  """A folder that cannot be made is refused like any bad argument."""
  file = tmp_path / 'file'
  file.write_text('kept')
  with pytest.raises(SystemExit) as exit_info:
    arguments.parse(['--out', str(file / 'folder')])
  assert exit_info.value.code == 2
  assert (
    f'argument --out: must be a folder that can be written to, but got'
    f" '{file}/folder' (Not a directory). Write for example --out out/train.\n"
  ) in capsys.readouterr().err
  assert file.read_text() == 'kept'


def test_arguments(tmp_path):
  """Lists are read; candidates become ascending, and what is named wins."""
  out = f'--out={tmp_path}'
  args, dataset = arguments.parse(
    ['--seeds', '7,2', '--rho', '0.2,0.1', '--rho=asam=2,1', out]
  )
  assert args.seeds == [7, 2]
  assert args.rho == {'sam': [0.1, 0.2], 'asam': [1, 2]}
  assert len(dataset.train.labels) == 1000


def test_preset(tmp_path, monkeypatch):
  """A preset is the paper's recipe, and other options change it."""
  monkeypatch.setitem(
    data.DATASETS,
    'cifar100',
    lambda *_: data.digits()._replace(augment=lambda key, images: images),
  )
  args, _ = arguments.parse(
    [f'--out={tmp_path}', '--preset=paper-cifar100', '--epochs=3']
  )
  assert (args.dataset, args.model) == ('cifar100', 'resnet20')
  assert (args.epochs, args.batch_size, args.augment) == (3, 128, True)
  assert (args.label_smoothing, args.weight_decay) == (0.1, 5e-4)
  assert args.rho == {'sam': [0.1], 'asam': [1.0]}


@pytest.mark.parametrize(
  ('fraction', 'n', 'wrong'),
  [(0, 50, 0), (0.4, 1000, 400), (0.29, 100, 29), (0.999, 7, 6)],
)
def test_label_noise_is_exact(fraction, n, wrong):
  """Exactly that many labels become another class."""
  labels = np.arange(n, dtype=np.int32) % 3
  rng = np.random.default_rng(0)
  noisy = data.flip_labels(labels, fraction, 3, rng)
  assert np.sum(noisy != labels) == wrong
  assert set(noisy.tolist()) <= {0, 1, 2}
  assert noisy.dtype == labels.dtype


def test_label_noise_is_uniform():
  """Wrong labels are spread over the other classes."""
  labels = np.full(9000, 2, np.int32)
  rng = np.random.default_rng(0)
  noisy = data.flip_labels(labels, 0.5, 10, rng)
  counts = np.bincount(noisy[noisy != 2], minlength=10)
  # 500 each, but none of the true class; five standard deviations.
  assert counts[2] == 0
  assert np.all(np.abs(np.delete(counts, 2) - 500) < 5 * 500**0.5)


def test_where_labels_are_noisy():
  """Training and held-out labels alike, test labels not; seeds decide which."""
  clean = data.digits()
  noisy = data.add_label_noise(clean, 0.4, [3, 8, 3])
  for part, size in (('train', 1000), ('held_out', 300)):
    labels = getattr(noisy, part).labels
    wrong = labels != getattr(clean, part).labels
    np.testing.assert_array_equal(wrong.sum(axis=1), [0.4 * size] * 3)
    np.testing.assert_array_equal(labels[0], labels[2])
    assert np.any(wrong[0] != wrong[1])
  for labels in noisy.test.labels:
    np.testing.assert_array_equal(labels, clean.test.labels)


def test_digits():
  """Every image is in one part."""
  dataset = data.digits()
  parts = [dataset.train, dataset.held_out, dataset.test]
  images = np.concatenate([part.images for part in parts]).reshape(1797, 64)
  assert len(np.unique(images, axis=0)) == 1797
  assert (images.min(), images.max()) == (0, 1)


@pytest.fixture
def linear():
  """Two linear classifiers, and data with labels of its own for each."""
  rng = np.random.default_rng(0)
  model = models.MLP(num_classes=3, hidden_sizes=())
  kernels, biases = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 3))
  split = data.Split(
    images=rng.uniform(size=(6, 2, 2, 1)).astype(np.float32),
    labels=rng.integers(0, 3, (2, 6)).astype(np.int32),
  )
  return model, kernels, biases, split


def flax_params(kernels, biases):
  """The parameters of linear classifiers, one a run, as Flax names them."""
  arrays = {'kernel': kernels, 'bias': biases}
  return {
    'Dense_0': jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
  }


def evaluate(measure, linear):
  """A measure of both classifiers, in one group and in two."""
  model, kernels, biases, split = linear
  params = flax_params(kernels, biases)
  dataset = data.Dataset(3, split, split, split)

  def group(params, n):
    state = types.SimpleNamespace(params=params, model_state={})
    return types.SimpleNamespace(runs=[None] * n, mapped=n > 1, state=state)

  together = [group(params, 2)]
  alone = [
    group(jax.tree.map(lambda x, i=i: x[i], params), 1) for i in range(2)
  ]
  values = [
    evaluation.evaluate(measure, groups, model, dataset, split)
    for groups in (together, alone)
  ]
  np.testing.assert_allclose(*values, rtol=1e-5)
  return values[0]


def numpy_loss_and_grads(kernel, bias, images, labels):
  """Cross-entropy of a linear classifier in float64, and its gradient."""
  x = images.reshape(len(images), -1).astype(np.float64)
  logits = x @ kernel + bias
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  residual = (np.exp(log_p) - np.eye(3)[labels]) / len(labels)
  loss = -log_p[np.arange(len(labels)), labels].mean()
  return loss, x.T @ residual, residual.sum(axis=0)


@pytest.mark.parametrize(
  ('quantity', 'rho', 'normalize'),
  [
    ('sharpness_sam_ball', 0.05, np.ones_like),
    ('sharpness_asam_ball', 0.5, lambda kernel: np.abs(kernel) + 0.01),
  ],
)
def test_sharpness(linear, quantity, rho, normalize):
  """Both balls against closed forms in float64."""
  _, kernels, biases, split = linear
  expected = []
  for kernel, bias, labels in zip(kernels, biases, split.labels, strict=True):
    inputs = split.images, labels
    loss, kernel_grad, bias_grad = numpy_loss_and_grads(kernel, bias, *inputs)
    t = normalize(kernel)  # Biases have T = 1 in both balls.
    norm = np.sqrt(np.sum((t * kernel_grad) ** 2) + np.sum(bias_grad**2))
    perturbed_loss, _, _ = numpy_loss_and_grads(
      kernel + rho * t**2 * kernel_grad / norm,
      bias + rho * bias_grad / norm,
      *inputs,
    )
    expected.append(perturbed_loss - loss)
  measure = evaluation.ON_TRAINING_SET[quantity]
  np.testing.assert_allclose(evaluate(measure, linear), expected, rtol=1e-4)


def test_loss_and_accuracy(linear):
  """Against float64, with labels of its own for each run."""
  _, kernels, biases, split = linear
  losses, accuracies = [], []
  for kernel, bias, labels in zip(kernels, biases, split.labels, strict=True):
    losses.append(numpy_loss_and_grads(kernel, bias, split.images, labels)[0])
    logits = split.images.reshape(6, 4) @ kernel + bias
    accuracies.append(np.mean(logits.argmax(axis=1) == labels))
  assert accuracies[0] != accuracies[1]
  np.testing.assert_allclose(evaluate(evaluation.loss, linear), losses, 1e-5)
  np.testing.assert_allclose(evaluate(evaluation.accuracy, linear), accuracies)


def test_batches_of_measures(linear, monkeypatch):
  """A loss is the same in batches, the last of which is smaller."""
  whole = evaluate(evaluation.loss, linear)
  monkeypatch.setattr(evaluation, 'BATCH_SIZE', 4)
  np.testing.assert_allclose(evaluate(evaluation.loss, linear), whole, 1e-6)


def test_search():
  """Seeds are new, and the candidate is taken that does best over them all."""
  rhos = {'sam': [0.1, 0.2, 0.5], 'asam': [1.0]}
  runs = search.make_runs(rhos, [3, 7, 1], 2)
  assert [run[1:] for run in runs] == [
    (rho, seed) for rho in rhos['sam'] for seed in (8, 9)
  ]
  found = search.make_searches(runs, [1, 0, 1, 1, 0, 0])
  assert set(found) == {'sam'}
  np.testing.assert_array_equal(found['sam'].scores, [[1, 0], [1, 1], [0, 0]])
  assert (found['sam'].rho, found['sam'].at_edge) == (0.2, False)


@pytest.mark.parametrize(
  ('scores', 'rho', 'at_edge'),
  [([3, 2, 1], 1, True), ([1, 2, 3], 4, True), ([1, 2, 2], 2, False)],
)
def test_edges_and_ties(scores, rho, at_edge):
  """An edge is told, and the smallest of equals is taken."""
  found = search.Search([1, 2, 4], [0], np.array(scores)[:, None])
  assert (found.rho, found.at_edge) == (rho, at_edge)


def test_interval():
  """Against SciPy's t-test."""
  values = np.random.default_rng(0).normal(size=(3, 5))
  mean, half_width = reporting.t_interval(values)
  for i, row in enumerate(values):
    interval = scipy.stats.ttest_1samp(row, 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean[i] - half_width[i], interval.low)
    np.testing.assert_allclose(mean[i] + half_width[i], interval.high)


def test_interval_of_few():
  """Equal values have no spread, and that of one value is unknown."""
  assert reporting.t_interval([2.0, 2.0]) == (2, 0)
  mean, half_width = reporting.t_interval([2.0])
  assert mean == 2
  assert np.isnan(half_width)


def test_json_without_nan(tmp_path):
  """What is not finite is null in the file."""
  path = tmp_path / 'results.json'
  results = {'a': np.array([[np.nan, 1.5]]), 'b': [np.float32(np.inf), None]}
  records.write_json(path, results | {'c': reporting.summarize([2.0])})
  assert json.loads(path.read_text()) == {
    'a': [[None, 1.5]],
    'b': [None, None],
    'c': {'per_seed': [2.0], 'mean': 2.0, 'interval_95': [None, None]},
  }


def test_interrupted_write(tmp_path):
  """The old file stays, and no part of the new one."""
  path = tmp_path / 'results.json'
  path.write_text('old')

  def write():
    with records.replacing(path) as partial:
      partial.write_text('ne')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write()
  assert [file.name for file in tmp_path.iterdir()] == ['results.json']
  assert path.read_text() == 'old'
