"""Promise: the table of docs/which_one.md is what the methods cost and need."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import optax_asam
from optax_asam import asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import sharpness_aware
from tests.helpers import pages

pytestmark = pytest.mark.usefixtures('quickly_compiled')

PAGE = pages.read_page('which_one')
TABLE = {
  cell.replace('`', ''): rest
  for cell, *rest in pages.read_rows(pages.marked(PAGE, 'methods'))
}
BASE = optax.sgd(0.1, momentum=0.9)
(CODE,) = pages.blocks(PAGE)
F_SAM = pages.run_snippet(
  CODE, base_tx=BASE, ascent=ascent, sharpness_aware=sharpness_aware
)['tx']
STEPS = 20
TRANSFORMATIONS = {
  'asam, sam': asam(BASE),
  'asam, every_k=5': asam(BASE, every_k=5),
  'asam, when for the last fifth': asam(BASE, when=lambda step: step >= 16),
  'looksam, every_k=5': looksam(BASE, every_k=5),
  'momentum_asam': momentum_asam(BASE),
  'momentum_asam, momentum=0.9': momentum_asam(optax.sgd(0.1), momentum=0.9),
  'asam, descent.gsam or wsam': asam(BASE, descent=descent.gsam(0.4)),
  'sharpness_aware, ascent.friendly': F_SAM,
  'asam, ascent_steps=3': asam(BASE, ascent_steps=3),
}
ESTIMATORS = {
  'value_and_grad, grad': {},
  'value_and_grad, ascent_fun on a quarter': {
    'ascent_fun': lambda params, loss_fn: loss_fn(params, 0.25)
  },
}
PARAMS = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
ARRAYS = {'none': 0, 'three scalars': 0, 'one array': 1, 'two arrays': 2}


def counting(counts):
  """A loss function whose gradients count their share of the batch."""

  def loss_fn(params, share=1.0):
    jax.debug.callback(lambda: counts.append(share))
    return sum((w**2).sum() for w in params.values())

  return loss_fn


@pytest.mark.parametrize('row', TRANSFORMATIONS)
def test_transformation(row):
  """Gradients, copies of the parameters, and what ``update`` asks for."""
  gradients, state, needs = TABLE[row]
  tx, counts = TRANSFORMATIONS[row], []
  grad_fn = jax.grad(counting(counts))

  @jax.jit
  def step(params, opt_state):
    updates, opt_state = optax.with_extra_args_support(tx).update(
      grad_fn(params), opt_state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), opt_state

  carry = PARAMS, tx.init(PARAMS)
  for _ in range(STEPS):
    carry = step(*carry)
  jax.effects_barrier()
  assert sum(counts) / STEPS == pytest.approx(float(gradients))
  base = optax.sgd(0.1) if row.endswith('momentum=0.9') else BASE
  further = sum(x.size for x in jax.tree.leaves(tx.init(PARAMS))) - sum(
    x.size for x in jax.tree.leaves(base.init(PARAMS))
  )
  size = sum(w.size for w in PARAMS.values())
  assert further // size == ARRAYS[state.split(' per ')[0]]
  assert further % size == (1 if row.startswith('momentum') else 3)
  if 'grad_fn' in needs:
    with pytest.raises(ValueError, match='grad_fn'):
      tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  else:
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    if needs != 'nothing':
      with pytest.raises(ValueError, match='momentum'):
        momentum_asam(optax.sgd(0.1)).init(PARAMS)


@pytest.mark.parametrize('row', ESTIMATORS)
def test_estimator(row):
  """Gradients of the functions, which keep no state."""
  gradients, *rest = TABLE[row]
  assert rest == ['none', 'nothing']
  counts = []
  loss_fn = counting(counts)
  options = ESTIMATORS[row]
  if options:
    part = options['ascent_fun']
    options = {'ascent_fun': lambda params: part(params, loss_fn)}
  jax.jit(optax_asam.grad(loss_fn, **options))(PARAMS)
  jax.effects_barrier()
  assert sum(counts) == pytest.approx(float(gradients))


def test_momentum_or_a_quarter():
  """The recorded differences in accuracy, paired by seed."""
  path = pages.ROOT / 'experiments' / 'results' / 'budget' / 'results.json'
  tasks = json.loads(path.read_text())['tasks']
  (line,) = [line for line in PAGE.splitlines() if 'on a quarter of' in line]
  for task, ahead, text in (
    ('vit-2000', 1, '{} points ahead on a transformer'),
    ('cnn-noise-40', -1, '{} behind on a CNN'),
  ):
    momentum, quarter = (
      {
        run['seed']: run['test_accuracy']
        for run in tasks[task]['methods'][name]['runs']
      }
      for name in ('momentum_asam', 'quarter')
    )
    differences = [
      100 * ahead * (momentum[seed] - quarter[seed]) for seed in momentum
    ]
    n = len(differences)
    margin = stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1)
    margin /= math.sqrt(n)
    assert text.format(f'{np.mean(differences):.2f} ± {margin:.2f}') in line


def test_rows():
  """Each row is tested."""
  assert set(TABLE) == {*TRANSFORMATIONS, *ESTIMATORS}
