"""Promise: combinations with Optax do what docs/composition.md says of them.

A row of its table is tested by ``test_<Optax's name>_<where>``, which evaluates
the code of that row, and a section with code by ``test_<its title>``, which
runs that code. Both are compared with loops in NumPy, in float64 where Optax
does not accumulate in float32.
"""

import collections
import re
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import normalization
import pages
import reference
from support import assert_same_bits
from support import error
from support import needs_microbatching

PAGE = pages.read_page('composition')
PLACES = ('inside', 'before', 'after', 'around')
ORDERS = ('right', 'other', 'wrong', 'error')

K = 4  # micro-batches
RHO, ETA = 0.5, 0.01  # asam's defaults
ELEMENTWISE = reference.elementwise(ETA)
LEARNING_RATE = 0.1
SGD = optax.sgd(LEARNING_RATE)
TRAINABLE = {'kernel': True, 'bias': False}
LABELS = {'kernel': 'train', 'bias': 'freeze'}


def normal(seed, shape):
  """Random numbers that are the same in float32 and float64."""
  numbers = np.random.default_rng(seed).standard_normal(shape)
  return numbers.astype(np.float32).astype(np.float64)


PARAMS = {'kernel': normal(0, (3, 2)), 'bias': normal(1, 2)}
BATCHES = [(normal(10 + i, (2, 3)), normal(20 + i, (2, 2))) for i in range(K)]
BATCH = BATCHES[0]
WHOLE_BATCH = tuple(
  np.concatenate(arrays) for arrays in zip(*BATCHES, strict=True)
)
BAD_BATCH = BATCH[0], np.full((2, 2), np.nan)

tree_map = jax.tree.map


def as_jax(tree):
  """A tree of JAX arrays in the default dtype."""
  return tree_map(jnp.asarray, tree)


def loss_fn(params, batch):
  """The squared error of a dense layer."""
  x, y = batch
  residual = x @ params['kernel'] + params['bias'] - y
  return (residual**2).sum(-1).mean() / 2


GRADIENT = jax.grad(loss_fn)


def reference_grad(params, batch):
  """The gradient of ``loss_fn``, by hand."""
  x, y = batch
  residual = x @ params['kernel'] + params['bias'] - y
  return {'kernel': x.T @ residual / len(x), 'bias': residual.mean(0)}


def perturbed(
  params,
  grads,
  *,
  operator=ELEMENTWISE,
  leaves=('kernel', 'bias'),
  rho=RHO,
):
  """Returns w + eps, by hand; biases are not normalized."""
  eps = reference.perturbation(
    params, grads, operator, rho, 2, {'kernel'}, leaves
  )
  return add(params, eps)


def sharp_grad(params, batch, ascent_grads=None, **kwargs):
  """g~, by hand; eps is made from the gradient of ``batch`` by default."""
  ascent_grads = ascent_grads or reference_grad(params, batch)
  return reference_grad(perturbed(params, ascent_grads, **kwargs), batch)


def add(*trees):
  """The sum of trees."""
  return tree_map(lambda *leaves: sum(leaves), *trees)


def scale(factor, tree):
  """``factor`` times a tree."""
  return tree_map(lambda leaf: factor * leaf, tree)


def mean(trees):
  """The mean of trees."""
  return scale(1 / len(trees), add(*trees))


def norm(tree):
  """The 2-norm of a tree."""
  return np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))


def sgd(grads, learning_rate=LEARNING_RATE):
  """The updates of SGD."""
  return scale(-learning_rate, grads)


ZEROS = scale(0, PARAMS)
GRADS = reference_grad(PARAMS, BATCH)  # g
SHARP_GRADS = sharp_grad(PARAMS, BATCH)  # g~


def assert_close(tree, expected):
  """To 1e-12 in float64, and 1e-6 in float32."""
  tree = tree_map(np.asarray, tree)
  dtype = jax.tree.leaves(tree)[0].dtype
  tolerance = {'float32': 1e-6, 'float64': 1e-12}[dtype.name]
  assert error(tree, tree_map(dtype.type, expected)) < tolerance


class Run(NamedTuple):
  """What :func:`run` returns."""

  updates: list[Any]  # of each step
  params: Any  # after the last step
  state: Any  # after the last step


def run(
  tx,
  batches,
  perturbed_batches=None,
  params=PARAMS,
  gradient=GRADIENT,
):
  """A step of ``tx`` for each batch.

  Args:
    tx: the transformation.
    batches: the batches of the gradients that are handed to it.
    perturbed_batches: those that ``grad_fn`` sees; the same by default.
    params: the parameters to start from.
    gradient: the gradient, a function of parameters and a batch.
  """

  @jax.jit
  def step(params, state, batch, perturbed_batch):
    updates, state = tx.update(
      gradient(params, batch),
      state,
      params,
      grad_fn=lambda params: gradient(params, perturbed_batch),
    )
    return updates, optax.apply_updates(params, updates), state

  params = as_jax(params)
  state = tx.init(params)
  all_updates = []
  for batch, perturbed_batch in zip(
    *as_jax((batches, perturbed_batches or batches)), strict=True
  ):
    updates, params, state = step(params, state, batch, perturbed_batch)
    all_updates.append(updates)
  return Run(all_updates, params, state)


def update(tx):
  """The updates of one step on ``BATCH``, without :func:`jax.jit`."""
  params, batch = as_jax((PARAMS, BATCH))
  grad_fn = lambda params: GRADIENT(params, batch)
  return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]


# The page: its rows and sections by the names of their tests.


class Row(NamedTuple):
  """A row of the table."""

  name: str
  where: str
  written: str
  meaning: str
  order: str


def read_rows():
  """A list of pairs of a test's name and a row."""
  lines = [line for line in PAGE.splitlines() if line.startswith('|')]
  rows = [Row(*map(str.strip, line.split('|')[1:-1])) for line in lines[2:]]
  return [
    (f'test_{pages.slug(row.name)}_{pages.slug(row.where)}', row)
    for row in rows
  ]


ROWS = dict(read_rows())
SNIPPETS = pages.read_snippets(PAGE)


@pytest.fixture
def row(request):
  """Evaluates the third column of the test's row, with names in it given."""
  code = ROWS[request.function.__name__].written.strip('`')

  def evaluate(**names):
    return eval(code, {**pages.NAMESPACE, **names})

  return evaluate


def test_every_row_is_tested():
  """Every row of the table has its test, and every test of a row its row."""
  tests = {
    name
    for name in globals()
    if re.fullmatch(rf'test_.*_({"|".join(PLACES)})(_.*)?', name)
  }
  counts = collections.Counter(name for name, _ in read_rows())
  assert counts == dict.fromkeys(tests, 1)
  for row in ROWS.values():
    assert row.where.split(',')[0] in PLACES
    assert row.order in ORDERS


def test_every_snippet_is_tested():
  """Every section with code has its test."""
  pages.assert_all_tested(PAGE, SNIPPETS, globals())


# chain


def squared_times_params():
  """A transformation that is not linear, and needs the parameters."""
  return optax.stateless(lambda u, w: tree_map(lambda u, w: u * u * w, u, w))


def test_chain_inside(x64, row):
  """What stands inside sees g~, and the unperturbed w."""
  tx = row(tx=squared_times_params(), base_tx=SGD)
  shaped = tree_map(lambda g, w: g * g * w, SHARP_GRADS, PARAMS)
  assert_close(update(tx), sgd(shaped))


def test_chain_before(x64, row):
  """What stands before shapes eps alone: minus g descends to w + eps."""
  tx = row(tx=optax.scale(-1.0), base_tx=SGD)
  against = scale(-1, GRADS)
  expected = sgd(sharp_grad(PARAMS, BATCH, against))
  assert_close(update(tx), expected)


def test_chain_after(x64, row):
  """What stands after sees the updates, as at the end of the base."""
  tx = row(tx=squared_times_params(), base_tx=SGD)
  updates = sgd(SHARP_GRADS)
  expected = tree_map(lambda u, w: u * u * w, updates, PARAMS)
  assert_close(update(tx), expected)
  at_the_end = asam(optax.chain(SGD, squared_times_params()))
  assert_same_bits(update(tx), update(at_the_end))


@pytest.mark.parametrize(
  'kwargs', [{'every_k': 2}, {'descent': lambda grads, perturbed_grads: grads}]
)
def test_incoming_gradient_that_is_descended(x64, kwargs):
  """Between the steps of every_k, and by a descent: what stood before it."""
  tx = optax.chain(optax.scale(3.0), asam(SGD, **kwargs))
  result = run(tx, BATCHES[:2])
  params = add(PARAMS, tree_map(np.asarray, result.updates[0]))
  assert_close(result.updates[1], sgd(reference_grad(params, BATCHES[1]), 0.3))


# partition and masked


def transforms():
  """What partition is given for ``LABELS``."""
  return {'train': SGD, 'freeze': optax.set_to_zero()}


def test_partition_inside_mask(x64, row):
  """Frozen leaves are neither moved nor perturbed."""
  tx = row(transforms=transforms(), labels=LABELS, trainable=TRAINABLE)
  kernel = sgd(sharp_grad(PARAMS, BATCH, leaves=['kernel']))['kernel']
  assert_close(update(tx), {**ZEROS, 'kernel': kernel})


def test_partition_inside(x64, row):
  """Without a mask, frozen leaves are perturbed."""
  tx = row(transforms=transforms(), labels=LABELS)
  kernel = sgd(SHARP_GRADS)['kernel']
  assert_close(update(tx), {**ZEROS, 'kernel': kernel})


def test_partition_around(row):
  """Around, it hides parameters: an error that says what to write."""
  tx = row(base_tx=SGD, labels=LABELS)
  with pytest.raises(ValueError, match=r'asam\(optax\.partition\(\.\.\.\), '):
    tx.init(PARAMS)


def test_masked_inside(x64, row):
  """The mask is one for g~; the gradient function sees all parameters."""
  tx = row(tx=optax.scale(3.0), mask=TRAINABLE, base_tx=SGD)
  shaped = {**SHARP_GRADS, 'kernel': 3 * SHARP_GRADS['kernel']}
  assert_close(update(tx), sgd(shaped))


def test_masked_around(row):
  """Around, it hides parameters: an error that says what to write."""
  tx = row(base_tx=SGD, mask=TRAINABLE)
  with pytest.raises(ValueError, match=r'asam\(optax\.masked\(\.\.\.\)\)'):
    tx.init(PARAMS)


# NaN


# What the passes of a bad step see: NaN in both, or in the second one alone.
BAD_STEPS = {
  'both passes': (BAD_BATCH, BAD_BATCH),
  'second pass': (BATCH, BAD_BATCH),
}


@pytest.mark.parametrize('bad', BAD_STEPS)
def test_apply_if_finite_inside(x64, row, bad):
  """A bad step changes neither parameters nor momentum, but counts for rho."""
  first, second = BAD_STEPS[bad]
  tx = row(
    asam=lambda base_tx: asam(base_tx, rho=lambda count: 0.1 * (count + 1)),
    base_tx=optax.sgd(LEARNING_RATE, momentum=0.9),
    n=3,
  )
  result = run(tx, [first, BATCHES[1]], [second, BATCHES[1]])
  assert_close(result.updates[0], ZEROS)
  expected = sgd(sharp_grad(PARAMS, BATCHES[1], rho=0.2))
  assert_close(result.updates[1], expected)
  assert optax.tree.get(result.state, 'total_notfinite') == 1


@pytest.mark.parametrize('bad', BAD_STEPS)
def test_apply_if_finite_around(row, bad):
  """Around, it lets NaN of the second pass through."""
  first, second = BAD_STEPS[bad]
  result = run(row(base_tx=SGD, n=3), [first], [second])
  seen = bad == 'both passes'
  assert np.isfinite(norm(result.params)) == seen
  assert optax.tree.get(result.state, 'total_notfinite') == seen


# Gradient accumulation


def test_multi_steps_inside(row):
  """A perturbation a micro-batch, then their mean."""
  result = run(row(base_tx=SGD, k=K), BATCHES)
  for updates in result.updates[:-1]:
    assert_close(updates, ZEROS)
  each = [sharp_grad(PARAMS, batch) for batch in BATCHES]
  assert_close(result.updates[-1], sgd(mean(each)))


def test_multi_steps_around(row):
  """Eps comes from the mean, and g~ from the last micro-batch alone."""
  result = run(row(base_tx=SGD, k=K), BATCHES)
  for updates in result.updates[:-1]:
    assert_close(updates, ZEROS)
  mean_grads = reference_grad(PARAMS, WHOLE_BATCH)
  of_the_last = sharp_grad(PARAMS, BATCHES[-1], mean_grads)
  assert_close(result.updates[-1], sgd(of_the_last))


@pytest.mark.parametrize('bad', BAD_STEPS)
def test_skip_not_finite_inside(row, bad):
  """The mean is taken over k good micro-batches."""
  first, second = BAD_STEPS[bad]
  result = run(
    row(base_tx=SGD, k=2),
    [BATCH, first, BATCHES[1]],
    [BATCH, second, BATCHES[1]],
  )
  for updates in result.updates[:-1]:
    assert_close(updates, ZEROS)
  each = [sharp_grad(PARAMS, batch) for batch in BATCHES[:2]]
  assert_close(result.updates[-1], sgd(mean(each)))


@pytest.mark.parametrize('bad', BAD_STEPS)
def test_skip_not_finite_around(row, bad):
  """Around, it lets NaN of the second pass through."""
  first, second = BAD_STEPS[bad]
  result = run(row(base_tx=SGD, k=2), [BATCH, first], [BATCH, second])
  assert np.isfinite(norm(result.params)) == (bad == 'both passes')


def microbatches_of_two(row):
  """The function of the row, for two examples at a time."""
  average = optax.microbatching.AccumulationType.MEAN
  return row(loss_fn=loss_fn, m=2, MEAN=average)


@needs_microbatching
def test_microbatching_inside(row):
  """One perturbation for the whole batch, as without it."""
  gradient = microbatches_of_two(row)
  result = run(asam(SGD), [WHOLE_BATCH], gradient=gradient)
  assert_close(result.updates[0], sgd(sharp_grad(PARAMS, WHOLE_BATCH)))


@needs_microbatching
def test_microbatching_inside_sum(row):
  """The sum of k gradients, at the same perturbation."""
  gradient = microbatches_of_two(row)
  result = run(asam(SGD), [WHOLE_BATCH], gradient=gradient)
  expected = sgd(sharp_grad(PARAMS, WHOLE_BATCH), K * LEARNING_RATE)
  assert_close(result.updates[0], expected)


@needs_microbatching
def test_microbatching_around(row):
  """The mean of the micro-batches' ASAM gradients."""
  gradient = microbatches_of_two(row)
  result = run(SGD, [WHOLE_BATCH], gradient=gradient)
  # Optax takes every k-th example into a micro-batch.
  groups = [tuple(array[i::K] for array in WHOLE_BATCH) for i in range(K)]
  each = [sharp_grad(PARAMS, group) for group in groups]
  assert_close(result.updates[0], sgd(mean(each)))


def test_gradient_accumulation(snippet):
  """Both snippets take the step of the whole batch, to 1e-6 in float32."""
  tx, params = asam(SGD), as_jax(PARAMS)
  expected = sgd(sharp_grad(PARAMS, WHOLE_BATCH))
  micro_batches = tree_map(lambda *arrays: jnp.stack(arrays), *BATCHES)

  def accumulated(params, _):
    names = snippet(1, params=params, micro_batches=micro_batches, k=K)
    return names['grad_fn'](params)

  assert_close(run(tx, BATCHES[:1], gradient=accumulated).updates[0], expected)
  if hasattr(optax, 'microbatching'):
    batch, state = as_jax(WHOLE_BATCH), tx.init(params)
    step = jax.jit(
      lambda params: snippet(0, tx=tx, params=params, state=state, batch=batch)[
        'updates'
      ]
    )
    assert_close(step(params), expected)


# Clipping and weight decay


def test_clip_by_global_norm_inside(x64, row):
  """The norm of g~ is at most c."""
  assert norm(SHARP_GRADS) > 0.2
  updates = update(row(c=0.01, base_tx=optax.sgd(1.0)))
  assert_close(updates, sgd(SHARP_GRADS, 0.01 / norm(SHARP_GRADS)))


def test_clip_by_global_norm_before(x64, row):
  """Nothing is clipped: updates of norm 0.2 and more."""
  updates = update(row(c=0.01, base_tx=optax.sgd(1.0)))
  assert norm(updates) > 0.2
  assert_close(updates, sgd(SHARP_GRADS, 1.0))


DECAY = 0.5


def test_add_decayed_weights_inside(x64, row):
  """What is descended is g~ and the decay of the unperturbed weights."""
  expected = sgd(add(SHARP_GRADS, scale(DECAY, PARAMS)))
  assert_close(update(row(decay=DECAY, base_tx=SGD)), expected)


def test_add_decayed_weights_before(x64, row):
  """The decay tilts eps, and no weight decays."""
  tilted = add(GRADS, scale(DECAY, PARAMS))
  expected = sgd(sharp_grad(PARAMS, BATCH, tilted))
  assert_close(update(row(decay=DECAY, base_tx=SGD)), expected)


def test_clipping_and_weight_decay(x64, snippet):
  """The snippet clips g~, adds the decay, and steps with momentum."""
  result = run(snippet()['tx'], BATCHES[:2])
  params, trace = PARAMS, ZEROS
  for batch, updates in zip(BATCHES[:2], result.updates, strict=True):
    grads = sharp_grad(params, batch)
    assert norm(grads) > 1
    clipped = scale(1 / norm(grads), grads)
    trace = add(clipped, scale(5e-4, params), scale(0.9, trace))
    assert_close(updates, sgd(trace))
    params = add(params, sgd(trace))


def test_frozen_parameters(x64, snippet):
  """The snippet moves and perturbs what is not frozen."""
  kernel = sgd(sharp_grad(PARAMS, BATCH, leaves=['kernel']))['kernel']
  assert_close(update(snippet()['tx']), {**ZEROS, 'kernel': kernel})


# Averages


def average(old, new, decay=0.9):
  """A step of an exponential moving average, by hand."""
  return add(scale(decay, old), scale(1 - decay, new))


def debiased(ema, count, decay=0.9):
  """An average that started from zeros, ``count`` steps before this one."""
  return scale(1 / (1 - decay ** (count + 1)), ema)


def growing(count):
  """A schedule of the learning rate."""
  return LEARNING_RATE * (count + 1)


def assert_averages(row, step_by_hand):
  """Fails unless the row's steps are those of ``step_by_hand``.

  Args:
    row: the fixture.
    step_by_hand: a function from the count of steps, the average so far, the
      parameters and a batch to the new average and the updates.
  """
  result = run(row(decay=0.9, base_tx=optax.sgd(growing)), BATCHES)
  params, ema = PARAMS, ZEROS
  for count, batch in enumerate(BATCHES):
    ema, expected = step_by_hand(count, ema, params, batch)
    assert_close(result.updates[count], expected)
    params = add(params, expected)


def test_ema_inside(x64, row):
  """The average of g~ is descended."""

  def step(count, ema, params, batch):
    ema = average(ema, sharp_grad(params, batch))
    return ema, sgd(debiased(ema, count), growing(count))

  assert_averages(row, step)


def test_ema_before(x64, row):
  """Eps is made from the average of g; g~ is that of this step."""

  def step(count, ema, params, batch):
    ema = average(ema, reference_grad(params, batch))
    return ema, sgd(sharp_grad(params, batch, ema), growing(count))

  assert_averages(row, step)


def test_ema_after(x64, row):
  """The average of the updates, each with its own learning rate."""

  def step(count, ema, params, batch):
    ema = average(ema, sgd(sharp_grad(params, batch), growing(count)))
    return ema, debiased(ema, count)

  assert_averages(row, step)


def reference_lookahead(batches, k, a):
  """Lookahead over ASAM around SGD, by hand: its two nested loops."""
  slow = PARAMS
  for start in range(0, len(batches), k):
    fast = slow
    for batch in batches[start : start + k]:
      fast = add(fast, sgd(sharp_grad(fast, batch)))
    slow = add(scale(1 - a, slow), scale(a, fast))
  return optax.LookaheadParams(fast=slow, slow=slow)


SYNCED = optax.LookaheadParams.init_synced(PARAMS)


def test_lookahead_after(x64, row):
  """Under lookahead, ASAM is a gradient, taken at the fast parameters."""
  result = run(
    optax.with_extra_args_support(row(base_tx=SGD, k=2, a=0.3)),
    BATCHES,
    params=SYNCED,
    gradient=lambda p, batch: optax_asam.grad(loss_fn)(p.fast, batch),
  )
  assert_close(result.params, reference_lookahead(BATCHES, 2, 0.3))


def test_lookahead_inside(x64, row):
  """The fast parameters are perturbed, and the slow ones are not."""
  gradient = jax.grad(lambda params, batch: loss_fn(params.fast, batch))
  tx = row(base_tx=SGD, k=2, a=0.3)
  result = run(tx, BATCHES, params=SYNCED, gradient=gradient)
  assert_close(result.params, reference_lookahead(BATCHES, 2, 0.3))
  seen = []
  tx.update(
    gradient(SYNCED, BATCH),
    tx.init(SYNCED),
    SYNCED,
    grad_fn=lambda params: seen.append(params) or params,
  )
  assert_close(seen[0].fast, perturbed(PARAMS, GRADS))
  assert_close(seen[0].slow, PARAMS)


def test_lookahead_around(row):
  """It takes no extra arguments: an error, and another one in a chain."""
  tx = row(base_tx=SGD, k=2, a=0.3)
  params, grads = as_jax((SYNCED, GRADS))
  for transformation, kind, message in [
    (tx, TypeError, "unexpected keyword argument 'grad_fn'"),
    (optax.chain(tx), ValueError, 'grad_fn and value_fn .* got neither'),
  ]:
    state = transformation.init(params)
    with pytest.raises(kind, match=message):
      transformation.update(grads, state, params, grad_fn=GRADIENT)


# snapshot


needs_snapshot = pytest.mark.skipif(
  not hasattr(optax, 'snapshot'), reason='it came with Optax 0.2.6'
)


def recorded(row):
  """What the row's snapshot holds after a step."""
  tx = row(name='seen', measure=lambda u: u, base_tx=SGD)
  return optax.tree.get(run(tx, BATCHES[:1]).state, 'seen')


@needs_snapshot
def test_snapshot_before(x64, row):
  """It records g."""
  assert_close(recorded(row), GRADS)


@needs_snapshot
def test_snapshot_inside(x64, row):
  """It records g~."""
  assert_close(recorded(row), SHARP_GRADS)


@needs_snapshot
def test_snapshot_after(x64, row):
  """It records the updates."""
  assert_close(recorded(row), sgd(SHARP_GRADS))


# The other sections


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.named_chain(('asam', tx)),
    lambda tx: optax.inject_hyperparams(lambda a: optax.chain(tx))(a=1.0),
    lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
  ],
)
def test_grad_fn_is_handed_on(wrap):
  """By wrappers that have no row of their own."""
  assert_close(update(wrap(asam(SGD))), sgd(SHARP_GRADS))


def test_multi_steps_in_a_chain():
  """There its transformation hands no grad_fn on."""
  tx = optax.MultiSteps(asam(SGD), 1).gradient_transformation()
  with pytest.raises(ValueError, match='got neither'):
    update(optax.chain(tx))


@pytest.mark.parametrize(
  ('kwargs', 'operators'),
  [
    ({}, [ELEMENTWISE, reference.elementwise(0.1)]),
    (
      {'adaptive': normalization.layerwise(0.2), 'every_k': 2},
      [reference.layerwise(0.2)] * 2,
    ),
  ],
)
def test_hyperparameters_that_change(snippet, kwargs, operators):
  """Rho and eta alone are injected; new ones work, and compile nothing."""
  params, batch = as_jax((PARAMS, BATCH))
  names = snippet(params=params)
  assert names['state'].hyperparams['rho'] == jnp.float32(0.2)
  tx = names['injected'](SGD, rho=0.3, **kwargs)

  @jax.jit
  def step(state):
    grad_fn = lambda params: GRADIENT(params, batch)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]

  state = tx.init(params)
  assert set(state.hyperparams) == {'rho', 'eta'}
  for rho, eta, operator in zip((0.3, 0.6), (ETA, 0.1), operators, strict=True):
    state.hyperparams.update(rho=jnp.float32(rho), eta=jnp.float32(eta))
    expected = sharp_grad(PARAMS, BATCH, operator=operator, rho=rho)
    assert_close(step(state), sgd(expected))
  assert step._cache_size() == 1


def test_injected_schedule():
  """inject_hyperparams evaluates a schedule of rho at each step."""
  params = as_jax(PARAMS)
  code = SNIPPETS['test_hyperparameters_that_change'][0]
  names = pages.run_snippet(code, params=params)
  tx = names['injected'](SGD, rho=lambda count: 0.1 * (count + 1))
  params = PARAMS
  for step, updates in enumerate(run(tx, BATCHES).updates):
    expected = sgd(sharp_grad(params, BATCHES[step], rho=0.1 * (step + 1)))
    assert_close(updates, expected)
    params = add(params, expected)


def test_every_k_th_step(x64, snippet):
  """Two steps chosen in Python, and every_k, are ASAM on each k-th step."""
  base_tx = optax.sgd(LEARNING_RATE, momentum=0.9)

  def make_step(value_and_grad):
    def step(params, opt_state, batch):
      _, grads = value_and_grad(loss_fn)(params, batch)
      updates, opt_state = base_tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)

  steps = {
    'sharp_step': make_step(optax_asam.value_and_grad),
    'plain_step': make_step(jax.value_and_grad),
  }
  names = {'params': PARAMS, 'opt_state': base_tx.init(PARAMS)}
  params, trace = PARAMS, ZEROS
  for i, batch in enumerate(BATCHES):
    carry = {name: names[name] for name in ('params', 'opt_state')}
    names = snippet(i=i, k=3, batch=batch, **steps, **carry)
    grads = (sharp_grad if i in (0, 3) else reference_grad)(params, batch)
    trace = add(grads, scale(0.9, trace))
    params = add(params, sgd(trace))
    assert_close(names['params'], params)
  assert_close(run(asam(base_tx, every_k=3), BATCHES).params, params)


@pytest.mark.parametrize(
  'base_tx',
  [
    optax.lbfgs(),
    optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
  ],
  ids=['L-BFGS', 'backtracking'],
)
def test_line_searches_and_l_bfgs(x64, snippet, base_tx):
  """The first step goes along -g~ and lowers the clean loss."""
  tx = asam(base_tx)
  params, batch = as_jax((PARAMS, BATCH))
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    names = snippet(params=params, state=state, batch=batch, tx=tx)
    return names['value'], names['updates'], names['state']

  value, updates, state = step(params, state)
  length = norm(updates) / norm(SHARP_GRADS)
  assert_close(updates, sgd(SHARP_GRADS, length))
  assert loss_fn(add(params, updates), batch) < 0.9 * value
  perturbed_value = loss_fn(perturbed(PARAMS, GRADS), BATCH)
  assert_close(state[0].perturbed_value, perturbed_value)


def test_line_searches_reject_grad_fn():
  """They miss value_fn, beside what they are given anyway."""
  base_tx = optax.scale_by_backtracking_linesearch(20)
  with pytest.raises(TypeError, match='value_fn'):
    update(asam(base_tx))


def test_the_state(snippet):
  """Optax's tools find our fields, and tell parameters from other leaves."""
  tx = asam(optax.adam(0.1))
  state = run(tx, BATCHES[:1]).state
  names = snippet(tx=tx, state=state)
  assert names['step'] == 1
  assert jnp.isnan(names['perturbed_value'])
  halved_moments = state[1][0]._replace(
    mu=scale(0.5, state[1][0].mu), nu=scale(0.5, state[1][0].nu)
  )
  assert_same_bits(names['halved'][1][0], halved_moments)
  assert_same_bits(names['halved'][0], state[0])
