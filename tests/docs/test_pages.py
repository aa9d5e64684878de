"""Promise: the code of the pages named below runs, and their numbers are right.

A page's blocks run in order in one namespace, next to what the page says is
given. Numbers are compared with recorded results or with what they describe.
"""

import functools
import inspect
import json
import re
import shlex
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import config
import optax_asam
from optax_asam import normalization
from optax_asam import sharpness
from tests.helpers import pages
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import perturbed_point

pytestmark = pytest.mark.usefixtures('quickly_compiled')
RESULTS = pages.ROOT / 'experiments' / 'results'
BENCHMARKS = pages.ROOT / 'benchmarks' / 'results'
MIB, GIB = 2**20, 2**30


def run_page(name, **names):
  """Runs a page's blocks; yields the names after each."""
  names = {**pages.NAMESPACE, **names}
  for code in pages.blocks(pages.read_page(name)):
    exec(code, names)
    yield names


def read_json(path):
  """A recorded result."""
  return json.loads(path.read_text())


def table(page, name):
  """The rows of a marked table."""
  return pages.read_rows(pages.marked(pages.read_page(page), name))


def linked(cell):
  """The text of a link and the recorded result that it leads to."""
  text, path = re.fullmatch(r'\[(.*)\]\((.*)\)', cell).groups()
  return text, read_json(pages.DOCS / path)


def normal(seed, *shape):
  """Random numbers in the default dtype."""
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def loss_fn(params, batch):
  """The loss that pages take as given: a layer and a head."""
  x, y = batch
  x = jnp.tanh(x @ params['backbone']['kernel'] + params['backbone']['bias'])
  return jnp.mean((x @ params['head']['kernel'] - y) ** 2)


def make_params():
  """Its parameters."""
  return {
    'backbone': {'kernel': normal(0, 4, 4), 'bias': normal(1, 4)},
    'head': {'kernel': normal(2, 4, 1)},
  }


BATCHES = normal(3, 3, 8, 4), normal(4, 3, 8, 1)
BATCH = jax.tree.map(lambda x: x[0], BATCHES)
GIVEN = {'loss_fn': loss_fn, 'batch': BATCH}


def given():
  """What the pages take as given."""
  return {**GIVEN, 'params': make_params()}


def make_step(tx, loss_fn=loss_fn):
  """A jitted step of ``tx`` with ``grad_fn``."""

  @jax.jit
  def step(params, state, batch):
    grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return step


def test_quickstart(capsys):
  """The losses fall, and the two forms of ASAM take the same step."""
  page = run_page('quickstart')
  names = next(page)
  start = names['loss_fn'](names['params'], names['batch'])

  def losses():
    return [
      float(x) for x in re.findall(r'loss (\S+)', capsys.readouterr().out)
    ]

  plain = losses()
  assert len(plain) == 5
  assert plain[-1] < plain[0] / 2

  program = pages.blocks(pages.read_page('quickstart'))[0]
  (diff,) = pages.blocks(pages.read_page('quickstart'), 'diff')
  before, after = (line[2:] for line in diff.splitlines())
  assert program.count(before) == 1
  names_of_asam = pages.run_snippet(program.replace(before, after))
  sharp = losses()
  assert sharp[0] == plain[0]  # of the clean pass, before the first update
  assert sharp[1:] != plain[1:]
  assert sharp[-1] < sharp[0] / 2
  assert start < plain[0]

  params, batch, tx = names['params'], names['batch'], names['tx']
  expected = names_of_asam['train_step'](params, tx.init(params), batch)[0]
  names = next(page)
  assert error(names['params'], expected) < 1e-6

  for _ in ('nnx', 'linen'):
    names = next(page)
    assert names['losses'][-1] < names['losses'][0] / 2
  state = next(page)['state']
  loss = lambda params: jnp.mean(
    (state.apply_fn({'params': params}, names['x']) - names['y']) ** 2
  )
  assert loss(names['params']) < loss(state.params)
  assert next(page, None) is None


class Trial:
  """What an objective of Optuna is given."""

  params = types.MappingProxyType({'rho': 0.5})

  def suggest_float(self, name, low, high, *, log):
    """The geometric mean."""
    assert log
    assert low < self.params[name] < high
    return self.params[name]


class Study:
  """What ``optuna.create_study`` returns."""

  def optimize(self, objective, n_trials):
    """Calls the objective once."""
    del n_trials
    self.trial = Trial()
    self.best_params = self.trial.params
    self.best_value = objective(self.trial)


def test_choosing_rho(monkeypatch):
  """The grid is that of runs one after the other; rho = 0 is the base."""
  optuna = types.ModuleType('optuna')
  optuna.create_study = lambda direction: {'minimize': Study}[direction]()
  monkeypatch.setitem(sys.modules, 'optuna', optuna)
  base_tx = optax.sgd(0.1)
  *_, names = run_page(
    'choosing_rho',
    **given(),
    base_tx=base_tx,
    batches=BATCHES,
    held_out=(normal(5, 8, 4), normal(6, 8, 1)),
  )
  params = make_params()
  state = base_tx.init(params)
  for batch in zip(*BATCHES, strict=True):
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = base_tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  losses = names['losses']
  assert error(losses[0], loss_fn(params, names['held_out'])) < 1e-5
  assert len(set(losses.tolist())) == len(losses) == 7
  at = names['rhos'].tolist().index(0.5)
  assert error(names['train'](0.5), losses[at]) < 1e-5
  assert names['study'].best_value == pytest.approx(float(losses[at]))


def default(name):
  """The default of rho."""
  parameters = inspect.signature(getattr(optax_asam, name)).parameters
  return parameters['rho'].default


def searches():
  """Name, method, scores by rho, and the selected rho, of each row."""
  for run, method, shown in table('choosing_rho', 'searches'):
    title, results = linked(run)
    name = method.strip('`')
    if 'tasks' in results:
      start = {'C': 'cnn-noise-40', 'V': 'vit-2000', 'L': 'spam-128-noise-lora'}
      task = results['tasks'][start[title[0]]]
      entry = task['methods'][name]
      score = 'held_out_' + task.get('metric', 'accuracy')
      scores = {each['values'][0]: each[score] for each in entry['search']}
      selected = entry['summary']['values'][0]
    else:
      entry = results['search'][name]
      scores = {
        each['rho']: each['held_out_accuracy']['mean']
        for each in entry['candidates']
      }
      selected = entry['rho']
    yield title, name, scores, selected, shown


def test_searches():
  """The recorded candidates, and what the page says of them."""
  collapsed, noisy = 0, 0
  for title, name, scores, selected, shown in searches():
    cells = [
      f'**{rho:g}: {100 * x:.1f}**'
      if rho == selected
      else f'{rho:g}: {100 * x:.1f}'
      for rho, x in scores.items()
    ]
    assert shown == ', '.join(cells), title
    larger = [rho for rho in scores if rho > selected]
    if '40% noise' in title:
      noisy += 1
      if larger and scores[larger[0]] < 0.2:
        assert larger[0] <= 2.5 * selected
        collapsed += 1
      if title == 'MLP, 40% noise':
        assert scores[larger[0]] > 0.95 * scores[selected]
      if name == 'momentum_asam':
        assert not larger
    elif 'LoRA' in title:
      factor = {'sam': 4, 'momentum_asam': 1}.get(name)
      if factor:
        assert scores[factor * default(name)] < 0.53
    elif 'ViT' not in title:
      trained = [x for x in scores.values() if x > 0.2]
      assert max(trained) - min(trained) < 0.01
  assert (collapsed, noisy) == (4, 6)


def test_defaults():
  """The defaults of rho in the table are those of the functions."""
  rows = pages.read_rows(pages.read_page('choosing_rho'))
  functions = {}
  for cell, shown, _ in rows[:3]:
    for name in re.findall(r'`(\w+)`', cell):
      functions[name] = float(shown)
  assert set(functions) == {
    *('asam', 'value_and_grad', 'looksam', 'sam', 'momentum_asam')
  }
  for name, shown in functions.items():
    assert default(name) == shown


def noise_40(results):
  """The runs of SGD, SAM and ASAM with 40% label noise, and their settings."""
  if 'tasks' not in results:
    assert results['config']['label_noise'] == 0.4
    return results['optimizers'], results['config']
  methods = results['tasks']['cnn-noise-40']['methods']
  settings = results['config']['tasks']['cnn-noise-40']
  assert settings['label_noise'] == 0.4
  return {
    name: {
      'rho': methods[key]['summary']['values'][0],
      **methods[key]['summary'],
    }
    for name, key in {'sgd': 'base', 'sam': 'sam', 'asam': 'asam'}.items()
  }, {**settings, 'lr': 0.03}  # experiments.paper.budget_tasks


def accuracy(run):
  """A cell: the mean, half of its interval, and rho."""
  mean = run['test_accuracy']['mean']
  half_width = run['test_accuracy']['interval_95'][1] - mean
  rho = f' ({run["rho"]:g})' if run['rho'] else ''
  return f'{100 * mean:.2f} ± {100 * half_width:.2f}{rho}'


def test_label_noise():
  """The table, and each decimal number of the text."""
  rows = table('label_noise', 'label noise')
  known = {'67.69', '68.35', '2.0', '0.2', '0.01', '1.2'}  # paper's; settings
  for network, *cells in rows:
    runs, settings = noise_40(linked(network)[1])
    seeds = len(runs['sgd']['test_accuracy']['per_seed'])
    numbers = [settings[x] for x in ('epochs', 'lr', 'weight_decay')]
    shown = [f'{x:g}' for x in (*numbers, seeds)]
    assert cells == [*shown, *map(accuracy, runs.values())]
  demo = read_json(RESULTS / 'demo' / 'results.json')['optimizers']
  known |= {
    f'{100 * demo[x][what]["mean"]:.1f}'
    for x in demo
    for what in (
      *('train_accuracy', 'held_out_accuracy'),
      'oracle_best_epoch_held_out_accuracy',
    )
  }
  fewer_gradients = {
    'momentum_asam': '80.54 ± 0.62 (8)',
    'every_5': '82.32 ± 0.75 (4)',
    'looksam': '82.88 ± 0.40 (2)',
  }
  budget = read_json(RESULTS / 'budget' / 'results.json')['tasks']
  for name, each in budget['cnn-noise-40']['methods'].items():
    summary = each['summary']
    known.add(f'{summary["test_loss"]["mean"]:.3f}')
    for quantity in 'test_calibration_error', 'test_accuracy':
      known.add(f'{100 * summary[quantity]["mean"]:.1f}')
    run = {'rho': summary['values'][0], **summary}
    known |= {f'{x:g}' for x in summary['values'] if name == 'looksam'}
    if name in fewer_gradients:
      assert accuracy(run) == fewer_gradients[name]
      known |= set(re.findall(r'\d+\.\d+', accuracy(run)))
  for network in ('mlp', 'cnn'):
    run = read_json(RESULTS / f'comparisons/{network}-noise-80/results.json')
    sgd, asam = (run['optimizers'][x]['test_accuracy'] for x in ('sgd', 'asam'))
    assert asam['mean'] > sgd['mean']
    assert run['config']['epochs'] == 30
    known |= {f'{100 * x["mean"]:.2f}' for x in (sgd, asam)}
  page = pages.without_code(pages.read_page('label_noise'))
  prose = re.sub(r'^\|.*$|\]\(.*?\)', '', page, flags=re.MULTILINE)
  assert set(re.findall(r'\d+\.\d+', prose)) <= known

  per_seed = lambda row, name: sorted(
    noise_40(linked(rows[row][0])[1])[0][name]['test_accuracy']['per_seed']
  )
  failed, *others = per_seed(-2, 'asam')
  assert round(failed, 2) == 0.1
  assert min(others) > 0.73
  failed, *others = per_seed(2, 'sam')
  assert round(failed, 2) == 0.5
  assert min(others) > 0.83
  last = linked(rows[-1][0])[1]['optimizers']
  assert min(run['train_accuracy']['mean'] for run in last.values()) > 0.99
  gains = [
    float(row[-1].split()[0]) - float(row[-3].split()[0]) for row in rows
  ]
  assert max(gains) > 20
  assert min(gains) < 0


def test_commands_of_label_noise():
  """The comparison program accepts them."""
  *_, script = pages.blocks(pages.read_page('label_noise'), 'sh')
  _, command = script.replace('\\\n', '').splitlines()
  python, flag, module, *options = shlex.split(command)
  assert (python, flag, module) == ('python', '-m', 'experiments.compare')
  assert config.parse(options).label_noise == 0.4


def test_fine_tuning():
  """What is frozen stays, is not perturbed, and costs nothing."""
  page = run_page('fine_tuning', **given())
  params, tx = make_params(), next(page)['tx']
  updated, _ = make_step(tx)(params, tx.init(params), BATCH)
  assert error(updated['backbone'], params['backbone']) > 0

  def head_loss_fn(head, batch):
    return loss_fn({'backbone': params['backbone'], 'head': head}, batch)

  def run(tx, loss_fn, params):
    args = params, tx.init(params), BATCH
    step = make_step(tx, loss_fn).lower(*args).compile()
    updated, _ = step(*args)
    return updated, step.cost_analysis()['flops']

  updated, cost = run(next(page)['tx'], loss_fn, params)
  assert_same_bits(updated['backbone'], params['backbone'])
  tx = optax_asam.asam(optax.adamw(1e-3), rho=0.5)
  head, cost_of_head = run(tx, head_loss_fn, params['head'])
  assert error(updated['head'], head) < 1e-6
  assert cost == pytest.approx(cost_of_head, rel=0.02)

  names = next(page)
  network, loss = names['Network'](nnx.Rngs(0)), names['network_loss_fn']
  graphdef, lora, rest = nnx.split(network, nnx.LoRAParam, ...)
  grads = jax.jit(
    optax_asam.grad(
      lambda lora: loss(nnx.merge(graphdef, lora, rest), *BATCH), rho=0.5
    )
  )(lora)
  mu = optax.tree.get(nnx.to_pure_dict(nnx.state(names['optimizer'])), 'mu')
  first_moment = [0.1 * g for g in jax.tree.leaves(grads)]
  assert error(jax.tree.leaves(mu), first_moment) < 1e-5
  before = dict(nnx.to_flat_state(nnx.state(network)))
  for path, variable in nnx.to_flat_state(nnx.state(names['network'])):
    is_changed = bool((variable[...] != before[path][...]).any())
    # One factor starts at zero, and so does the gradient of the other.
    assert is_changed <= isinstance(variable, nnx.LoRAParam), path
  assert names['loss'] > names['train_step'](
    names['network'], names['optimizer'], *BATCH
  )

  tx = next(page)['tx']
  state = tx.init(params)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  added = size(state) - size(state.base_state)
  assert added // size(params['head']) == 2
  assert added % size(params['head']) <= 1  # the count of a schedule
  grads = jax.grad(loss_fn)(params, BATCH)
  updates, state = jax.jit(tx.update)(grads, state, params)
  looped = optax.apply_updates(params, updates)
  clean = optax_asam.eval_params(state, looped)
  assert_same_bits(looped['backbone'], params['backbone'])
  assert error(clean['head'], looped['head']) > 1e-3


class Run:
  """What ``wandb.init`` returns."""

  def __init__(self, project, config):
    del project, config
    self.logged = {}

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    pass

  def log(self, data, step):
    """Keeps the data of a step."""
    self.logged[step] = data


def test_logging(tmp_path, monkeypatch):
  """What is logged is the rise after one ascent step."""
  wandb = types.ModuleType('wandb')
  wandb.init = Run
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  batches = list(zip(*BATCHES, strict=True))
  names = {**given(), 'log_dir': str(tmp_path), 'batches': batches}
  page = run_page('logging', **names)
  next(page)
  names = next(page)
  (events,) = tmp_path.iterdir()
  assert b'train/sharpness' in events.read_bytes()
  names['params'] = make_params()
  run = next(page)['run']
  assert next(page, None) is None
  clean_loss = lambda params: loss_fn(params, batches[0])
  rise = sharpness.worst_case(clean_loss, make_params(), 0.5, steps=1)
  logged = run.logged[0]
  assert logged['loss'] == pytest.approx(float(clean_loss(make_params())))
  assert logged['sharpness'] == pytest.approx(float(rise), rel=1e-5)


def test_checkpoints(tmp_path):
  """What is restored is what was saved; a state of the base is taken over."""
  page = run_page(
    'checkpoints',
    **given(),
    path=tmp_path / 'training',
    export_path=tmp_path / 'export',
  )
  names = next(page)
  assert_same_bits(names['restored'], names['state'])
  assert int(names['restored']['opt_state'][0].step) == 1
  names = next(page)
  assert_same_bits(names['restored'], names['state'])
  for x in jax.tree.leaves(names['restored']):
    assert x.sharding == names['replicated']
  names = next(page)
  params, ocp = names['clean_params'], names['ocp']
  with ocp.StandardCheckpointer() as checkpointer:
    assert_same_bits(checkpointer.restore(tmp_path / 'export'), params)
  assert error(params, names['params']) > 1e-3
  names = next(page)
  tx, state = names['tx'], names['opt_state']
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
  step = functools.partial(make_step(tx), batch=BATCH)
  assert_same_bits(step(params, state), step(params, tx.init(params)))
  schedule = optax.linear_schedule(0.5, 0.1, 10)
  for options in (
    *({'rho': 1.0}, {'rho': schedule}, {'eta': 0.0}, {'ord': jnp.inf}),
    *({'every_k': 5}, {'when': lambda step: step > 5}),
  ):
    other = optax_asam.asam(names['base_tx'], **options).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(other)


def test_migrating():
  """The same steps as optax.contrib.sam, and those of PyTorch's formula."""
  page = run_page('migrating', **given())
  theirs = next(page)
  params = make_params()
  carry = params, theirs['tx'].init(params)
  for _ in range(3):
    carry = theirs['old_train_step'](*carry, BATCH)
  ours = next(page)
  ours_carry = params, ours['tx'].init(params)
  for _ in range(3):
    ours_carry = ours['train_step'](*ours_carry, BATCH)
  assert error(ours_carry[0], carry[0]) < 1e-6
  assert error(ours_carry[0], params) > 1e-2

  tx = next(page)['tx']
  assert next(page, None) is None
  grads = jax.grad(loss_fn)(params, BATCH)
  norm = optax.tree.norm(jax.tree.map(lambda w, g: abs(w) * g, params, grads))
  expected = jax.tree.map(
    lambda w, g: w + w**2 * g * 2.0 / (norm + 1e-12), params, grads
  )
  assert error(perturbed_point(tx, params, grads)[0], expected) < 1e-6


def perturbed(params, loss_fn, **options):
  """Where ``asam`` takes its second gradient, w + eps."""
  seen = []

  def grad_fn(params):
    seen.append(params)
    return jax.grad(loss_fn)(params)

  tx = optax_asam.asam(optax.identity(), 0.5, **options)
  grads = jax.grad(loss_fn)(params)
  tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
  return seen[-1]


def product_loss(params):
  """A loss of two layers that may be rescaled against each other."""
  return ((params['kernel'] * params['out'] - 1) ** 2).sum()


RULES = {
  'elementwise': (normalization.elementwise, (3, 3, 2)),
  'filterwise': (normalization.filterwise, (2,)),
  'layerwise': (normalization.layerwise, ()),
}


@pytest.mark.parametrize('ord', [2, 3, jnp.inf])
@pytest.mark.parametrize('ascent_steps', [1, 3])
def test_theorem(x64, ord, ascent_steps):
  """eps(A w) = A eps(w), in the ball, for the A that the table allows."""
  params = {'kernel': normal(0, 3, 3, 2), 'out': normal(1, 3, 3, 2)}
  options = {'ord': ord, 'ascent_steps': ascent_steps}

  def error_at(rule, shape):
    factor = jnp.exp(normal(2, *shape))
    scale = lambda tree: {
      'kernel': tree['kernel'] * factor,
      'out': tree['out'] / factor,
    }
    scaled = scale(params)
    assert error(product_loss(scaled), product_loss(params)) < 1e-12
    results = [
      perturbed(w, product_loss, adaptive=rule, **options)
      for w in (params, scaled)
    ]
    return error(results[1], scale(results[0])), results[0]

  for make, shape in RULES.values():
    rule = make(eta=0.0, mask=None)
    difference, point = error_at(rule, shape)
    assert difference < 1e-12
    u = np.concatenate(
      [
        np.ravel((point[name] - w) / np.broadcast_to(t, w.shape))
        for name, w, t in (
          (name, params[name], rule(params)[name]) for name in params
        )
      ]
    )
    assert 0.1 < np.linalg.norm(u, ord) < 0.5 * (1 + 1e-12)
  elementwise, filterwise, layerwise, identity = (
    getattr(normalization, name)
    for name in ('elementwise', 'filterwise', 'layerwise', 'identity')
  )
  for rule, shape in (
    (filterwise(0.0, mask=None), (3, 3, 2)),
    (layerwise(0.0, mask=None), (2,)),
    (identity(), ()),
    (elementwise(0.01, mask=None), ()),
    (elementwise(0.0, mask={'kernel': True, 'out': False}), ()),
  ):
    assert error_at(rule, shape)[0] > 1e-4


def test_picture():
  """The table next to the picture is of what it shows."""
  balls = read_json(RESULTS / 'trajectories' / 'results.json')['balls']
  assert balls['settings'] == {'rho': 0.3, 'eta': 0.0, 'scaling': [3, 1 / 3]}
  assert table('mathematics', 'invariance') == [
    [name.upper(), *(f'{x:.3f}' for x in rises)]
    for name, rises in balls['sharpness'].items()
  ]


def test_m_sharpness():
  """The table is recorded, and its intervals overlap."""
  rows = table('m_sharpness', 'm-sharpness')
  means = {'sam': [], 'asam': []}
  ends = []
  for cell, *cells in rows:
    text, results = linked(cell)
    m = results['config']['m_sharpness'] or results['config']['batch_size']
    assert text.split(',')[0] == str(m)
    runs = results['optimizers']
    assert cells == [
      accuracy(runs[name]) if name in runs else ''
      for name in ('sgd', 'sam', 'asam')
    ]
    ends += [run['test_accuracy']['interval_95'] for run in runs.values()]
    for name, each in means.items():
      each.append(runs[name]['test_accuracy']['mean'])
  assert max(low for low, _ in ends) < min(high for _, high in ends)
  assert all(each == sorted(each) for each in means.values())


def total(collectives):
  """Bytes and number of collectives."""
  each = collectives.values()
  return sum(x['bytes'] for x in each), sum(x['count'] for x in each)


def test_cost():
  """The tables are those of the compiled programs that are recorded."""
  cases = {
    (case['layout'], case['devices'], case['step']): case
    for case in read_json(BENCHMARKS / 'collectives.json')['cases']
  }
  steps = 'base', 'two_gradients', 'asam'
  for layout, devices, *cells in table('cost', 'temporaries'):
    found = [cases[layout, int(devices), step] for step in steps]
    assert cells == [f'{x["temporary_bytes"] / MIB:.2f} MiB' for x in found]
  rows = table('cost', 'communication')
  assert len(rows) == 4
  for layout, two, added in rows:
    size, count = total(cases[layout, 8, 'two_gradients']['collectives'])
    assert two == f'{size / MIB:.2f} MiB in {count} collectives'
    more, number = total(cases[layout, 8, 'asam']['collectives'])
    text = f'{more - size} bytes in {number - count}'
    assert added == (text if more - size else 'none')
  networks = {
    (case['model'], case['topology'], case['step']): case
    for case in read_json(BENCHMARKS / 'tpu_aot.json')['cases']
  }
  names = {
    'ViT-L/16': 'vit-l16',
    'decoder, 8 billion parameters': 'decoder-8b',
  }
  for name, topology, *cells in table('cost', 'peaks'):
    key = names[name], f'v5e:{topology.replace(" ", "")}'
    found = [networks[*key, step] for step in steps]
    assert cells == [f'{x["peak_bytes"] / GIB:.2f} GiB' for x in found]


def test_index():
  """Each page is in one table of contents, and in the list."""
  page = pages.read_page('index')
  entries = [
    line
    for block in re.findall(r'^```\{toctree\}\n(.*?)^```', page, re.S | re.M)
    for line in block.splitlines()
    if line and not line.startswith(':')
  ]
  assert len(entries) == len(set(entries))
  listed = {path.removesuffix('.md') for path, _ in pages.links(page)}
  # On the site, these show other files of the repository, which are listed.
  others = {'notebooks', 'evidence', 'benchmarks', 'changelog'}
  for path in pages.DOCS.glob('*.md'):
    if path.stem != 'index':
      assert path.stem in entries
      assert path.stem in listed | others
