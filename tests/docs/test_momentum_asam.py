"""Promise: momentum_asam composes as docs/momentum_asam.md says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import eval_params
from optax_asam import momentum_asam
from tests.helpers import pages
from tests.helpers.support import error

PAGE = pages.read_page('momentum_asam')
PIECES = pages.read_pieces(PAGE)
pytestmark = pytest.mark.usefixtures('quickly_compiled')

RHO, ETA = 2.0, 0.01  # the defaults
K = 2
SGD = optax.sgd(0.1, momentum=0.9)
LABELS = {'kernel': 'train', 'bias': 'freeze'}
RNG = np.random.default_rng(0)
BATCHES = RNG.standard_normal((4, 3)).astype(np.float32).astype(np.float64)
W = np.array([0.5, -1.5, 2.0])  # the bias, and the kernel


def as_tree(w):
  """The parameters."""
  return {'bias': jnp.asarray(w[:1]), 'kernel': jnp.asarray(w[1:])}


def as_vector(tree):
  """The parameters by hand."""
  return np.concatenate([tree['bias'], tree['kernel']]).astype(np.float64)


def loss_fn(params, batch):
  """A quadratic around the batch."""
  w = jnp.concatenate([params['bias'], params['kernel']])
  return 3 * ((w - jnp.asarray(batch, w.dtype)) ** 2).sum()


def perturbed(w, m):
  """Returns w + eps against the momentum; the bias is not normalized."""
  t = np.append(1.0, np.abs(w[1:]) + ETA)
  return w - RHO * t * t * m / np.linalg.norm(t * m)


def by_hand(batches, shape=lambda g, w, p: g, keeps=lambda g: True, k=1):
  """SGD with momentum and its perturbation: w, and w + eps, after each batch.

  Args:
    batches: The batches.
    shape: From the gradient, w and w + eps to what SGD descends.
    keeps: Whether a gradient is used.
    k: The number of batches whose mean gradient is one step.
  """
  w, p, m, grads = W, W, 0 * W, []
  for batch in batches:
    g = 6 * (p - batch)
    if keeps(g):
      grads.append(g)
      if len(grads) == k:
        m = shape(np.mean(grads, axis=0), w, p) + 0.9 * m
        w = w - 0.1 * m
        p = perturbed(w, m)
        grads = []
    yield w, p


def piece(name, **names):
  """Runs a piece of the page; returns the names in it."""
  names = {
    'base_tx': SGD,
    'k': K,
    'labels': LABELS,
    'loss_fn': loss_fn,
    'momentum_asam': momentum_asam,
    'eval_params': eval_params,
    'num_steps': 10,
    'params': as_tree(W),
    'state': None,
    'batch': BATCHES[0],
    'average': as_tree(W),
    'tx': momentum_asam(SGD),
    **names,
  }
  names['state'] = names['state'] or names['tx'].init(names['params'])
  return pages.run_snippet(PIECES[name], **names)


def run(tx, batches=BATCHES, params=None, **extra_args):
  """The loop's parameters and states after each batch."""
  update = jax.jit(optax.with_extra_args_support(tx).update)
  params = as_tree(W) if params is None else params
  state = tx.init(params)
  for batch in batches:
    at = getattr(params, 'fast', params)
    grads = jax.grad(loss_fn)(at, batch)
    updates, state = update(grads, state, params, **extra_args)
    params = optax.apply_updates(params, updates)
    yield params, state


def assert_run(tx, expected, batches, tolerance, **extra_args):
  """Fails unless w and w + eps are those that are expected."""
  for (params, state), (w, p) in zip(
    run(tx, batches, **extra_args), expected, strict=True
  ):
    assert error(as_vector(params), p) < tolerance
    assert error(as_vector(eval_params(state, params)), w) < tolerance


def clipped(g, w, p):
  """A gradient of norm 1, which is longer."""
  del w, p
  assert np.linalg.norm(g) > 1
  return g / np.linalg.norm(g)


BAD = np.array([np.nan, 1.0, 1.0])
RUNS = {
  'clipping, inside': {'shape': clipped},
  'clipping, before': {'shape': clipped},
  'weight decay, inside': {'shape': lambda g, w, p: g + 5e-4 * w},
  'weight decay, before': {'shape': lambda g, w, p: g + 5e-4 * p},
  'MultiSteps, around': {'k': K},
  'reduce_on_plateau, inside': {},
  'apply_if_finite, inside': {'keeps': lambda g: np.isfinite(g).all()},
  'apply_if_finite, around': {'keeps': lambda g: np.isfinite(g).all()},
}


@pytest.mark.parametrize('row', RUNS)
def test_runs(x64, row):
  """Four steps in NumPy."""
  batches = BATCHES
  if row.startswith('apply_if_finite'):
    batches = [BATCHES[0], BAD, BATCHES[1]]
  extra_args = {'value': 1.0} if row.startswith('reduce') else {}
  expected = by_hand(batches, **RUNS[row])
  tolerance = 1e-6 if row.startswith('MultiSteps') else 1e-10  # in float32
  assert_run(piece(row)['tx'], expected, batches, tolerance, **extra_args)


def test_loss_scaling(x64):
  """The unscaled gradient is that of the loss."""
  names = piece('loss scaling')
  (expected, _), *_ = by_hand(BATCHES[:1])
  got = optax.apply_updates(as_tree(W), names['updates'])
  got = eval_params(names['state'], got)
  assert error(as_vector(got), expected) < 1e-10


def test_nan_gradients(x64):
  """They reach w, as they reach that of the base."""
  ((params, state),) = run(piece('NaN gradients')['tx'], [BAD])
  w = as_vector(eval_params(state, params))
  assert np.isnan(w[0])
  assert np.isfinite(w[1:]).all()


def test_multi_steps_inside(x64):
  """The perturbation changes with each micro-batch, and w with k of them."""
  iterates = list(run(piece('MultiSteps, inside')['tx']))
  eps = [as_vector(state.perturbation) for _, state in iterates]
  clean = [as_vector(eval_params(state, params)) for params, state in iterates]
  assert error(clean[0], W) < 1e-12
  assert error(clean[2], clean[1]) < 1e-12
  assert min(np.abs(np.diff(eps, axis=0)).max(axis=1)) > 0.1
  p = W + eps[0]
  grads = 6 * np.mean([W - BATCHES[0], p - BATCHES[1]], axis=0)
  assert error(clean[1], W - 0.1 * grads) < 1e-6  # a mean in float32


def test_averages(x64):
  """That of clean parameters is that of w."""
  *_, (w, p) = by_hand(BATCHES)
  *_, (params, state) = run(momentum_asam(SGD))
  names = {'params': params, 'state': state}
  for row, expected in {
    'average of clean parameters': w,
    'average of parameters': p,
  }.items():
    got = piece(row, **names)['average']
    assert error(as_vector(got), 0.9 * W + 0.1 * expected) < 1e-10


def test_schedule_free_inside(x64):
  """Both functions recover the average of schedule_free."""
  names = piece('schedule_free, inside', base_tx=optax.sgd(0.1))
  *_, (params, state) = run(names['tx'])
  z = x = p = W
  m = 0 * W
  for count, batch in enumerate(BATCHES):
    g = 6 * (p - batch)
    m = 0.9 * m + 0.1 * g
    z = z - 0.1 * g
    x = (count * x + z) / (count + 1)
    p = perturbed(0.1 * z + 0.9 * x, m)
  assert error(as_vector(params), p) < 1e-10
  assert error(as_vector(names['clean'](state, params)), x) < 1e-10


# Even at a learning rate of zero, w does not stay.
WRONG = {
  'scale, after': {},
  'reduce_on_plateau, after': {'value': 1.0},
  'lookahead, around': {},
  'schedule_free, around': {},
}


@pytest.mark.parametrize('row', WRONG)
def test_wrong(x64, row):
  """The page says so, since no error can."""
  names = {'base_tx': optax.sgd(0.0, momentum=0.9), 'optax': optax}
  if row.startswith('reduce'):
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    contrib = type('contrib', (), {'reduce_on_plateau': lambda: plateau})
    names['optax'] = type(
      'optax', (), {'contrib': contrib, 'chain': optax.chain}
    )
  tx = piece(row, **names)['tx']
  params = as_tree(W)
  if row.startswith('lookahead'):
    params = optax.LookaheadParams.init_synced(params)
  *_, (params, state) = run(tx, params=params, **WRONG[row])
  params = getattr(params, 'fast', params)
  clean = as_vector(eval_params(state, params))
  assert error(clean, W) > 1e-2
  assert error(as_vector(params), W) > 1e-2


def test_partition(x64):
  """Inside it works; around, init says to put it inside."""
  *_, (params, state) = run(piece('partition, inside')['tx'])
  assert params['bias'] == W[0]
  assert error(eval_params(state, params), params) > 1e-2
  with pytest.raises(ValueError, match='Put it inside'):
    piece('partition, around')['tx'].init(as_tree(W))


def test_loop(x64):
  """The loop of the page takes the steps by hand, here of Adam."""
  state = piece('training loop', tx=None, state=1)
  w = as_vector(state['clean_params'])
  assert error(as_vector(state['params']), w) > 1e-3
  # The first step of Adam is a sign; then weights decay.
  expected = W - 1e-3 * (np.sign(W - BATCHES[0]) + 1e-4 * W)
  assert error(w, expected) < 1e-6


def test_pieces():
  """The others run, and each row of the table and each piece is tested."""
  params = {'w': jnp.ones((2, 2))}
  piece('momentum')['tx'].init(params)
  tx = piece('schedule')['tx']
  perturbed = [
    bool(jax.tree.leaves(state.perturbation)[0].any())
    for _, state in run(tx, np.tile(BATCHES[:1], (10, 1)))
  ]
  assert perturbed == [False] * 8 + [True] * 2
  rows = {
    cell.split('](')[0].strip('[').replace('`', ''): works
    for cell, works, _ in pages.read_rows(PAGE)
  }
  no = {'weight decay, before', 'average of parameters', *WRONG}
  assert {row for row in rows if rows[row] == 'no'} == no
  assert {row for row in rows if rows[row] == 'error'} == {'partition, around'}
  assert set(PIECES) == {*rows, 'training loop', 'momentum', 'schedule'}
