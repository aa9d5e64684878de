"""Promise: lanes are single runs; costs are counted; a stopped run resumes."""

import json
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from experiments import data
from experiments import models
from experiments.models import vit
from experiments.paper import budget
from experiments.paper import budget_lanes
from experiments.paper import budget_methods
from experiments.paper import budget_report
from experiments.paper import budget_sharpness
from experiments.paper import budget_tasks
from experiments.paper import budget_training
from experiments.paper import rank_correlation
from experiments.paper import sharpness_measures as measures
from experiments.paper import tables
from experiments.report import records
from experiments.report import reporting
import optax_asam
from optax_asam import asam
from optax_asam import normalization
from optax_asam import sharpness
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NUM_EXAMPLES, BATCH, EPOCHS = 40, 8, 2


def make_dataset():
  """Random images of three classes."""
  rng = np.random.default_rng(0)
  split = lambda n: data.Split(
    rng.integers(0, 256, (n, 8, 8, 1), np.uint8),
    rng.integers(0, 3, n, np.int32),
  )
  return data.Dataset(
    3,
    *(split(NUM_EXAMPLES), split(12), split(20)),
    preprocess=data.make_standardize((0.5,), (0.3,)),
    augment=data.augmentation.crop_and_flip,
  )


class Normalized(nn.Module):
  """A small classifier with a normalization layer."""

  @nn.compact
  def __call__(self, images, *, train=False):
    """Maps images to logits."""
    del train
    x = nn.Dense(6)(images.reshape(len(images), -1))
    return nn.Dense(3)(nn.relu(nn.LayerNorm()(x)))


DATASET = make_dataset()
RECIPE = budget_tasks.Recipe(
  model=Normalized(),
  make_tx=budget_tasks.make_adamw(),
  lr=1e-3,
  weight_decay=1e-4,
  weight_decays=(1e-3, 1e-2),
  batch_size=BATCH,
  has_normalization=True,
)
TASK = budget_tasks.Task(
  'tiny',
  RECIPE,
  lambda data_dir: DATASET,
  train_size=33,
  epochs=EPOCHS,
  label_noise=0.4,
  augment=True,
)
STEPS = EPOCHS * (33 // BATCH)


def train_by_hand(method, seed, rho):
  """A run, by a loop in Python over the formulas of the program."""
  init_key, augment_key = jax.random.split(jax.random.key(seed))
  labels = data.flip_labels(
    DATASET.train.labels[:33], 0.4, 3, np.random.default_rng(seed)
  )
  images = jnp.asarray(DATASET.train.images[:33])
  model = RECIPE.model
  params, _ = models.init(model, init_key, DATASET.preprocess(images[:1]))
  base_tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS), weight_decay=1e-4),
  )
  tx = {
    'asam': lambda: asam(base_tx, rho),
    'quarter': lambda: asam(base_tx, rho),
    'every_5': lambda: asam(base_tx, rho, every_k=5),
    'late_20': lambda: asam(base_tx, rho, when=lambda step: step >= 6.4),
    'momentum_asam': lambda: optax_asam.momentum_asam(base_tx, rho=rho),
  }[method]()
  takes_grad_fn = method != 'momentum_asam'
  state = tx.init(params)

  @jax.jit
  def step(params, state, x, y):
    def grad_fn(params, n=BATCH):
      return jax.grad(
        lambda params: models.cross_entropies(
          model.apply({'params': params}, x[:n]), y[:n]
        ).mean()
      )(params)

    grads = grad_fn(params, BATCH // 4 if method == 'quarter' else BATCH)
    extra = {'grad_fn': grad_fn} if takes_grad_fn else {}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  rng = np.random.default_rng(seed)
  orders = [rng.permutation(33)[: STEPS // EPOCHS * BATCH] for _ in range(2)]
  for i, batch in enumerate(np.reshape(orders, (STEPS, BATCH))):
    x = data.augmentation.crop_and_flip(
      jax.random.fold_in(augment_key, i), images[batch]
    )
    y = labels[batch]
    params, state = step(params, state, DATASET.preprocess(x), y)
  return params if takes_grad_fn else optax_asam.eval_params(state, params)


@pytest.mark.slow
@pytest.mark.parametrize(
  'method', ['momentum_asam', 'asam', 'quarter', 'every_5', 'late_20']
)
def test_lanes(method):
  """Lanes, on their own or together, are runs of a loop in Python."""
  lanes = [
    budget_lanes.Lane(0, (0.5, 0.0)),
    budget_lanes.Lane(3, (2.0, 0.0)),
  ]
  expected = [
    train_by_hand(method, lane.seed, lane.values[0]) for lane in lanes
  ]
  together = budget_training.Trainer(DATASET, max_lanes=2)
  trained = together.train(TASK, method, lanes)
  alone = budget_training.Trainer(DATASET, max_lanes=1)
  first = alone.train(TASK, method, lanes[:1])
  take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  assert error(take(first, 0), expected[0]) < 1e-4
  for i, params in enumerate(expected):
    assert error(take(trained, i), params) < 1e-4


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('base_twice', 'quarter', 'looksam')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in budget_methods.METHODS
  ],
)
def test_gradients(name):
  """A step takes as many gradients as the table says, in lanes, too."""
  method = budget_methods.METHODS[name]
  examples = []

  class Counted(Normalized):
    """Counts the examples of each pass."""

    @nn.compact
    def __call__(self, images, *, train=False):
      """Maps images to logits."""
      jax.debug.callback(lambda x: examples.append(len(x)), images)
      return super().__call__(images, train=train)

  recipe = RECIPE._replace(model=Counted())
  task = TASK._replace(recipe=recipe, train_size=40, label_noise=0.0)
  trainer = budget_training.Trainer(DATASET, max_lanes=2)
  lanes = [budget_lanes.Lane(i, (0.5, 0.1)) for i in (0, 1)]
  trainer.train(task, name, lanes)
  jax.effects_barrier()
  examples = [n for n in examples if n > 1]  # Of the initialization.
  steps = 10 * method.epochs
  per_lane = sum(examples) / len(lanes)
  assert per_lane / BATCH / steps == method.gradients


def apply_vit(images, params, *, size, depth, heads):
  """A vision transformer, written again."""

  def dense(x, name, layer=params):
    return x @ layer[name]['kernel'] + layer[name]['bias']

  def norm(x, i):
    layer = params[f'LayerNorm_{i}']
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * layer['scale'] + layer['bias']

  def attend(x, layer):
    q, k, v = np.split(dense(x, 'Dense_0', layer), 3, axis=-1)
    y = np.zeros_like(x)
    for part in np.split(np.arange(x.shape[-1]), heads):
      weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(len(part)))
      y[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v[:, part]
    return dense(y, 'Dense_1', layer)

  def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  logits = []
  for image in images:
    rows = range(0, image.shape[0], size)
    columns = range(0, image.shape[1], size)
    x = dense(
      np.array(
        [
          image[i : i + size, j : j + size].ravel()
          for i in rows
          for j in columns
        ]
      ),
      'Dense_0',
    )
    x = x + params['position']
    for i in range(depth):
      x = x + attend(norm(x, 2 * i), params[f'Attention_{i}'])
      y = gelu(dense(norm(x, 2 * i + 1), f'Dense_{2 * i + 1}'))
      x = x + dense(y, f'Dense_{2 * i + 2}')
    x = norm(x, 2 * depth).mean(axis=0)
    logits.append(dense(x, f'Dense_{2 * depth + 1}'))
  return np.array(logits)


def test_vit(x64):
  """Its logits are those of NumPy, and it has the parameters it should."""
  images = np.random.default_rng(0).standard_normal((3, 4, 6, 2))
  options = {'depth': 2, 'heads': 2}
  model = vit.ViT(3, patch_size=2, width=4, hidden_size=5, **options)
  params, _ = jax.eval_shape(
    lambda: models.init(model, jax.random.key(0), jnp.asarray(images))
  )
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.uniform(-1, 1, x.shape), params)
  logits = model.apply({'params': params}, images)
  expected = apply_vit(images, params, size=2, **options)
  assert error(logits, expected) < 1e-12
  model = vit.ViT(10)
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  )
  width, hidden = 64, 256
  block = 4 * width + 4 * width * (width + 1)
  block += width * (hidden + 1) + hidden * (width + 1)
  expected = (49 + 1) * width + 16 * width + 4 * block + 2 * width
  expected += (width + 1) * 10
  assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_calibration_error():
  """By hand: bins (6/15, 7/15], (11/15, 12/15] and the last one."""
  confidence = np.array([0.45, 0.46, 0.8, 0.75, 1.0])
  is_right = np.array([True, False, False, True, False])
  by_hand = (abs(1 - 0.91) + abs(1 - 1.55) + abs(0 - 1)) / 5
  found = budget_report.calibration_error(confidence, is_right)
  assert found == pytest.approx(by_hand, rel=1e-12)
  logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]) + 7
  assert budget_report.measure(logits, np.array([0, 1])) == pytest.approx(
    {
      'accuracy': 0.5,
      'balanced_accuracy': 0.5,
      'loss': -(math.log(0.7) + math.log(0.1)) / 2,
      'calibration_error': (0.3 + 0.8) / 2,
    }
  )
  # A network that diverged must not end the program.
  diverged = budget_report.measure(np.full((4, 3), np.nan), np.arange(4) % 3)
  assert math.isnan(diverged['loss'] + diverged['calibration_error'])
  summary = records.to_json([0.5, diverged['loss']])
  assert reporting.format_mean(summary) == 'nan'


def test_program(tmp_path, monkeypatch, capsys):
  """It stops in time, resumes, repeats nothing, and draws what it has."""
  chosen = ('base', 'sam', 'every_5')
  monkeypatch.setattr(budget_tasks, 'TASKS', {'tiny': TASK})
  monkeypatch.setattr(
    budget_methods,
    'METHODS',
    {
      name: budget_methods.METHODS[name]._replace(
        candidates=budget_methods.METHODS[name].candidates[:3]
      )
      for name in chosen
    },
  )
  trained = []
  train = budget_training.Trainer.train

  def stopping(trainer, task, name, lanes):
    if len(trained) == 3 and trained[-1] is not None:
      trained.append(None)
      raise budget_training.OutOfTime
    trained.append((name, len(lanes)))
    return train(trainer, task, name, lanes)

  monkeypatch.setattr(budget_training.Trainer, 'train', stopping)
  argv = [
    *(f'--out={tmp_path}', '--seeds=2', '--search-seeds=1', '--lanes=2'),
    '--minutes=60',
  ]
  read = lambda: json.loads((tmp_path / 'results.json').read_text())
  budget.main(argv)
  assert 'Out of time' in capsys.readouterr().out
  stopped = read()
  assert not stopped['complete']
  older = {'search': [], 'runs': []}  # A method that the program had before.
  stopped['tasks']['tiny']['methods']['older'] = older
  (tmp_path / 'results.json').write_text(json.dumps(stopped))
  budget.main(argv)
  # The search of SAM, three candidates in two groups, was finished.
  sam, every_5 = 2 * [('sam', 2)], 3 * [('every_5', 2)]
  assert trained == [('base', 2), *sam, None, ('sam', 2), *every_5]
  results = read()
  assert results['complete']
  found = results['tasks']['tiny']['methods']
  assert found.pop('older') == older
  assert [len(found[name]['search']) for name in chosen] == [0, 3, 3]
  for method in found.values():
    assert [run['seed'] for run in method['runs']] == [0, 1]
    assert all(0 <= run['test_accuracy'] <= 1 for run in method['runs'])
    # The choice does not depend on the test data.
    assert not any('test' in key for run in method['search'] for key in run)
  assert (tmp_path / 'budget.png').exists()
  (table,) = budget_report.tables(results).values()
  assert table in capsys.readouterr().out
  # Another task does not make those that are finished obsolete.
  monkeypatch.setitem(budget_tasks.TASKS, 'other', TASK)
  budget.main([*argv, '--tasks=tiny'])
  assert len(trained) == 8
  with pytest.raises(SystemExit):
    budget.main([*argv, '--seeds=3'])
  assert 'seeds = [0, 1], but got [0, 1, 2]' in capsys.readouterr().err


@pytest.mark.slow
# Resampled, a few networks may all have the same gap.
@pytest.mark.filterwarnings('ignore:The BCa confidence interval')
def test_sharpness(tmp_path, monkeypatch, capsys):
  """Networks are trained once, and measured."""
  recipe = RECIPE._replace(make_tx=lambda *args: optax.sgd(0.5), rho_scale=4.0)
  task = TASK._replace(train_size=32, recipe=recipe)
  for module, values in (
    (
      budget_sharpness,
      {
        'TASKS': {'tiny': task},
        'METHODS': ('base', 'sam'),
        **{'PARTS': (2, 1), 'POINTS': 16, 'BATCH': 8},
      },
    ),
    (
      measures,
      {
        **{'STEPS': 2, 'SAMPLES': 2},
        'RADII': {
          key: radii
          for key, radii in measures.RADII.items()
          if key[1:] == ('worst', 2)
        },
      },
    ),
    (rank_correlation, {'NUM_RESAMPLES': 9}),
  ):
    for name, value in values.items():
      monkeypatch.setattr(module, name, value)
  trained = []
  train = budget_training.Trainer.train

  def interrupted(trainer, task, name, lanes):
    trained.append((task.train_size, name, lanes[0].values[0]))
    if len(trained) == 3:
      raise KeyboardInterrupt
    return train(trainer, task, name, lanes)

  monkeypatch.setattr(budget_training.Trainer, 'train', interrupted)
  argv = [f'--out={tmp_path}']
  read = lambda: json.loads((tmp_path / 'results.json').read_text())
  with pytest.raises(KeyboardInterrupt):
    budget_sharpness.main(argv)
  assert not read()['complete']
  budget_sharpness.main(argv)
  per_size = [('base', 0.0), *(('sam', rho) for rho in (0.2, 0.4, 0.8, 1.6))]
  expected = [(size, *each) for size in (16, 32) for each in per_size]
  assert trained == [*expected[:3], *expected[2:]]
  results = read()
  assert results['complete']
  found = results['tasks']['tiny']
  networks = found['networks']

  trainer = budget_training.Trainer(DATASET, max_lanes=1)
  for network in (networks[4], networks[-1]):
    smaller = task._replace(train_size=network['train_size'])
    lanes = [budget_lanes.Lane(0, (network['rho'], 0.0))]
    params = train(trainer, smaller, network['method'], lanes)
    params = jax.tree.map(lambda x: x[0], params)
    noisy = budget_training.dataset_of_seed(DATASET, smaller, 0).train
    images, labels = DATASET.preprocess(noisy.images), jnp.asarray(noisy.labels)
    logits = RECIPE.model.apply({'params': params}, images)
    error_rate = (logits.argmax(axis=1) != labels).mean()
    assert network['train_error'] == pytest.approx(float(error_rate))

    def loss_fn(params, part, images=images, labels=labels):
      logits = RECIPE.model.apply({'params': params}, images[part])
      return models.cross_entropies(logits, labels[part]).mean()

    by_hand = sharpness.worst_case(
      *(loss_fn, params, 0.05),
      steps=2,
      batches=jnp.arange(16).reshape(2, 8),
      normalization=normalization.identity(),
    )
    measured = network['measured']['sharpness, worst case, p = 2, rho = 0.05']
    assert measured == pytest.approx(float(by_hand), rel=1e-4)

  assert (tmp_path / 'budget_sharpness.png').exists()
  tau = found['correlations']['training loss']['gap']['tau']
  assert f'{tau:.2f} [' in capsys.readouterr().out
  monkeypatch.setattr(measures, 'STEPS', 3)
  with pytest.raises(SystemExit):
    budget_sharpness.main(argv)
  assert 'steps = 2, but got 3' in capsys.readouterr().err


def test_sharpness_recorded():
  """The recorded taus follow from the recorded networks, with SciPy."""
  recorded = tables.read('budget_sharpness')
  assert recorded['config'] == budget_sharpness.make_config()
  assert recorded['complete']
  assert not recorded['commit'].endswith('-dirty')
  for task in recorded['tasks'].values():
    networks = task['networks']
    gap = [each['test_error'] - each['train_error'] for each in networks]
    tau = {}
    for name, found in task['correlations'].items():
      x = [each['measured'].get(name, each['train_loss']) for each in networks]
      tau[name] = scipy.stats.kendalltau(x, gap).statistic
      assert found['gap']['tau'] == pytest.approx(tau[name])
      for size, each in found['gap_by_train_size'].items():
        mine = [str(network['train_size']) == size for network in networks]
        part = scipy.stats.kendalltau(
          np.array(x)[mine], np.array(gap)[mine]
        ).statistic
        assert each['tau'] == pytest.approx(part)
    for key, radii in measures.RADII.items():
      if key[0] != 'sharpness':
        continue
      plain = tau[measures.name(key, radii[1])]
      adaptive = tau[measures.middle(('adaptive sharpness', *key[1:]))]
      found = task['differences'][f'{key[1]} case, p = {key[2]:g}']
      assert found['tau'] == pytest.approx(adaptive - plain)
