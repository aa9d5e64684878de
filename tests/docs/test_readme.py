"""Promise: the README's programs run and its numbers are in the results."""

import json
import re

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import optax

from experiments.paper import tables
import optax_asam
import optax_asam.equinox
import optax_asam.nnx
from tests.helpers import pages
from tests.helpers.support import error

README = (pages.ROOT / 'README.md').read_text()
TEXT = ' '.join(README.split())
BATCH = jnp.ones((4, 3)), jnp.zeros((4, 2))


def loss_fn(params, batch):
  """The loss of the first program."""
  x, y = batch
  return jnp.mean((x @ params['kernel'] + params['bias'] - y) ** 2)


def test_train_step():
  """The first program descends the sharpness-aware gradient."""
  (program,) = pages.blocks(README)
  assert pages.blocks(pages.read_page('index'))[0] in program
  params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}
  grads = optax_asam.grad(loss_fn, rho=0.5)(params, BATCH)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  names = {}
  exec(program, names)
  assert error(names['params'], expected) < 1e-6


def lines(index):
  """The line before and after the change of a diff."""
  before, after = pages.blocks(README, 'diff')[index].splitlines()
  return before.removeprefix('- '), after.removeprefix('+ ')


def results(names, code):
  """The loss and the gradient, as a tuple of kernel and bias."""
  names = pages.run_snippet(code, **names)
  return names['loss'], names['grads'], names.get('aux')


def assert_drop_in(index, names, leaves, params):
  """Both lines give the same loss, the second one the gradient of ASAM."""
  (loss, grads, aux), (sharp_loss, sharp_grads, sharp_aux) = (
    results(names, code) for code in lines(index)
  )
  assert error(sharp_loss, loss) < 1e-6
  assert sharp_aux == aux
  expected = optax_asam.grad(loss_fn, rho=0.5)(params, BATCH)
  assert error(leaves(sharp_grads), expected) < 1e-5
  assert error(leaves(grads), expected) > 1e-3


def test_value_and_grad(params):
  """The drop-in for JAX."""
  with_aux = lambda params, batch: (loss_fn(params, batch), 'aux')
  names = {'loss_fn': with_aux, 'params': params, 'batch': BATCH}
  assert_drop_in(0, names, lambda grads: grads, params)


def test_nnx():
  """The drop-in for Flax NNX."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  leaves = lambda tree: {name: tree[name][...] for name in ('kernel', 'bias')}
  params = {'kernel': model.kernel[...], 'bias': model.bias[...]}
  names = {
    'nnx': nnx,
    'model': model,
    'batch': BATCH,
    'loss_fn': lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2),
  }
  assert_drop_in(1, names, leaves, params)


def test_equinox():
  """The drop-in for Equinox."""
  model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
  leaves = lambda tree: {'kernel': tree.weight.T, 'bias': tree.bias}
  names = {
    'eqx': eqx,
    'model': model,
    'batch': BATCH,
    'loss_fn': lambda model, batch: jnp.mean(
      (jax.vmap(model)(batch[0]) - batch[1]) ** 2
    ),
  }
  assert_drop_in(2, names, leaves, leaves(model))


def test_momentum_asam(params):
  """An ordinary loop, whose clean parameters the text tells how to get."""
  diff = pages.blocks(README, 'diff')[3]
  (line,) = [x[2:] for x in diff.splitlines() if x.startswith('+')]
  tx = pages.run_snippet(line)['tx']
  state = tx.init(params)
  grads = jax.grad(loss_fn)(params, BATCH)
  updates, state = tx.update(grads, state, params)
  looped = optax.apply_updates(params, updates)
  clean = optax_asam.eval_params(state, looped)
  assert error(looped, clean) > 1e-3
  assert error(clean, params) < 1e-2


def read(name):
  """Committed results."""
  return json.loads((pages.ROOT / name).read_text())


def test_table():
  """Every number of the demo's table is in the committed results."""
  name = 'experiments/results/demo/results.json'
  recorded = read(name)
  assert recorded['complete']
  assert not recorded['commit'].endswith('dirty')
  expected = []
  for optimizer, result in recorded['optimizers'].items():
    mean = result['test_accuracy']['mean']
    half_width = result['test_accuracy']['interval_95'][1] - mean
    expected.append(
      [
        optimizer.upper(),
        f'{result["rho"]:g}' if result['rho'] else '',
        f'{100 * mean:.2f} ± {100 * half_width:.2f}',
        f'{result["train_loss"]["mean"]:.3f}',
        f'{result["sharpness_sam_ball"]["mean"]:.5f}',
        f'{result["sharpness_asam_ball"]["mean"]:.5f}',
        f'{result["time_ratio_to_first"]:.2f}',
      ]
    )
    best = result['oracle_best_epoch_held_out_accuracy']['mean']
    assert f'{100 * best:.1f}%' in README
  assert pages.read_rows(pages.marked(README, name)) == expected
  sgd, *others = (
    result['test_accuracy']['mean']
    for result in recorded['optimizers'].values()
  )
  gains = {f'{100 * (accuracy - sgd):.0f}' for accuracy in others}
  assert gains == set(re.findall(r'gain about (\S+) points over SGD', TEXT))


def budget():
  """Methods on 2,000 images, and their results."""
  name = 'experiments/results/budget/results.json'
  methods = read(name)['tasks']['vit-2000']['methods']
  return {name: method['summary'] for name, method in methods.items()}


def test_caption():
  """The accuracies and losses that the caption of the picture compares."""
  for quantity, text in (
    ('test_accuracy', '{1:.1%}, compared with {0:.1%} for the tuned base'),
    ('test_loss', 'a test loss of {1:.2f}, compared with {0:.2f}'),
  ):
    means = (
      budget()[method][quantity]['mean']
      for method in ('base_tuned', 'asam_tuned')
    )
    expected = text.format(*means)
    assert expected in TEXT


def span(values):
  """The smallest and the largest value, in words."""
  ends = [f'{end:.1f}' for end in (min(values), max(values))]
  return ends[0] if ends[0] == ends[1] else ' to '.join(ends)


def test_limitations():
  """Step times and gains, and the accuracies in the paper."""
  times = [
    row['step_over_base']
    for row in read('benchmarks/results/step_time.json')['rows']
    if row['method'] in ('sam', 'asam', 'value_and_grad')
  ]
  assert f'twice the time of one ({span(times)} times in' in TEXT

  def gains(suffix):
    sam, asam, base = (
      100 * budget()[f'{name}{suffix}']['test_accuracy']['mean']
      for name in ('sam', 'asam', 'base')
    )
    return span([sam - base, asam - base])

  assert (
    f'clean images does gain {gains("")} points, or {gains("_tuned")} over a'
    ' base whose weight decay is tuned, too'
  ) in TEXT

  sgd, _, asam = tables.PUBLISHED_NOISE[80]
  assert f'80% label noise ({asam}% compared with {sgd}%)' in TEXT
