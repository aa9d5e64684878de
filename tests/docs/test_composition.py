"""Promise: combinations with Optax do what docs/composition.md says of them.

Each row of the page's table names a piece of its code. The tests run these
pieces and compare them with loops in NumPy, in which a tree is a vector.
"""

import dataclasses
import inspect

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import looksam
from optax_asam import normalization
from tests.helpers import pages
from tests.helpers.support import assert_same_bits
from tests.helpers.support import needs_microbatching

PAGE = pages.read_page('composition')
PIECES = pages.read_pieces(PAGE)

K = 4  # micro-batches
RHO, ETA = 0.5, 0.01  # asam's defaults
LEARNING_RATE = 0.1
SGD = optax.sgd(LEARNING_RATE)
LABELS = {'kernel': 'train', 'bias': 'freeze'}
TRAINABLE = {'kernel': True, 'bias': False}
pytestmark = pytest.mark.usefixtures('quickly_compiled')
KERNEL = np.arange(8) >= 2  # of a vector, which starts with the bias


def normal(seed, *shape):
  """Random numbers that are the same in float32 and float64."""
  numbers = np.random.default_rng(seed).standard_normal(shape)
  return numbers.astype(np.float32).astype(np.float64)


W = normal(0, 8)
BATCHES = [(normal(10 + i, 2, 3), normal(20 + i, 2, 2)) for i in range(K)]
BATCH = BATCHES[0]
WHOLE_BATCH = tuple(map(np.concatenate, zip(*BATCHES, strict=True)))
BAD_BATCH = BATCH[0], np.full((2, 2), np.nan)


def as_tree(vector):
  """The parameters of a dense layer in the default dtype."""
  vector = jnp.asarray(vector)
  return {'bias': vector[:2], 'kernel': vector[2:].reshape(3, 2)}


def loss_fn(params, batch):
  """The squared error of a dense layer."""
  x, y = batch
  residual = x @ params['kernel'] + params['bias'] - y
  return (residual**2).sum(-1).mean() / 2


GRADIENT = jax.jit(jax.grad(loss_fn))


def clean_grad(w, batch):
  """The gradient g of ``loss_fn``, by hand."""
  x, y = batch
  residual = x @ w[2:].reshape(3, 2) + w[:2] - y
  return np.concatenate([residual.mean(0), (x.T @ residual / len(x)).ravel()])


def elementwise(eta):
  """T of the kernel, element by element."""
  return lambda w: np.abs(w) + eta


def layerwise(eta):
  """T of the kernel, a number."""
  return lambda w: np.linalg.norm(w[KERNEL]) + eta


ELEMENTWISE = elementwise(ETA)


def perturbed(w, grads, *, rho=RHO, operator=ELEMENTWISE, frozen_bias=False):
  """Returns w + eps, by hand; the bias is not normalized."""
  t = np.where(KERNEL, operator(w), 1 - frozen_bias)
  return w + rho * t * t * grads / np.linalg.norm(t * grads)


def sharp_grad(w, batch, ascent_grads=None, **kwargs):
  """The gradient g~; eps is computed from that of ``batch`` by default."""
  if ascent_grads is None:
    ascent_grads = clean_grad(w, batch)
  return clean_grad(perturbed(w, ascent_grads, **kwargs), batch)


G = clean_grad(W, BATCH)
SHARP = sharp_grad(W, BATCH)


def assert_close(tree, expected):
  """To 1e-12 in float64, and 1e-6 in float32."""
  vector = np.asarray(ravel_pytree(tree)[0])
  tolerance = {'float32': 1e-6, 'float64': 1e-12}[vector.dtype.name]
  assert np.isfinite(vector).all()
  scale = np.abs(expected).max() or 1.0
  assert np.abs(vector - expected).max() < tolerance * scale


def piece(name, **names):
  """Runs a piece of the page; returns the names in it."""
  names = {
    'base_tx': SGD,
    'k': K,
    'labels': LABELS,
    'loss_fn': loss_fn,
    'm': 2,
    'mask': TRAINABLE,
    **names,
  }
  return pages.run_snippet(PIECES[name], **names)


def run(tx, batches, perturbed_batches=None, params=None, gradient=GRADIENT):
  """Takes a step on each batch; ``grad_fn`` sees the perturbed batches.

  Returns the updates of each step, the last parameters and the last state.
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

  params = as_tree(W) if params is None else params
  state = tx.init(params)
  all_updates = []
  for pair in zip(batches, perturbed_batches or batches, strict=True):
    pair = jax.tree.map(jnp.asarray, pair)
    updates, params, state = step(params, state, *pair)
    all_updates.append(updates)
  return all_updates, params, state


# Rows whose updates can be written as a function of one step.


@dataclasses.dataclass
class Step:
  """A step by hand."""

  w: np.ndarray
  batch: tuple = ()
  count: int = 0
  average: np.ndarray | float = 0.0

  def grad(self):
    """The gradient g."""
    return clean_grad(self.w, self.batch)

  def sharp(self, ascent_grads=None, **kwargs):
    """The gradient g~."""
    return sharp_grad(self.w, self.batch, ascent_grads, **kwargs)

  def sgd(self, grads):
    """The updates of SGD at this step's learning rate."""
    return -growing(self.count) * grads

  def friendly(self):
    """The gradient without the average of earlier ones."""
    direction = self.grad() - self.average
    self.average = 0.9 * self.average + 0.1 * self.grad()
    return direction

  def ema(self, vector, decay=0.9):
    """The debiased average of ``vector`` over the steps."""
    self.average = decay * self.average + (1 - decay) * vector
    return self.average / (1 - decay ** (self.count + 1))


def growing(count):
  """A schedule of the learning rate."""
  return LEARNING_RATE * (count + 1)


def clipped(grads):
  """Gradients of norm 1, which are longer."""
  assert np.linalg.norm(grads) > 1
  return grads / np.linalg.norm(grads)


def gsam(g, h):
  """The gradient that GSAM descends."""
  return h - 0.4 * (g - (g @ h) / (h @ h) * h)


def wsam(g, h):
  """The gradient that WSAM descends with gamma = 0.9."""
  return -8 * g + 9 * h


# Not linear, and needs the parameters.
INNER = optax.stateless(lambda u, w: jax.tree.map(lambda u, w: u * u * w, u, w))
STEPS = {
  'chain, inside': lambda s: s.sgd(s.sharp() ** 2 * s.w),
  'chain, before': lambda s: s.sgd(s.sharp(s.grad() ** 2 * s.w)),
  'chain, after': lambda s: s.sgd(s.sharp()) ** 2 * s.w,
  'partition, inside with a mask': lambda s: (
    s.sgd(s.sharp(frozen_bias=True)) * KERNEL
  ),
  'partition, inside': lambda s: s.sgd(s.sharp()) * KERNEL,
  'masked, inside': lambda s: s.sgd(
    np.where(KERNEL, s.sharp() ** 2 * s.w, s.sharp())
  ),
  'clip_by_global_norm, inside': lambda s: s.sgd(clipped(s.sharp())),
  'clip_by_global_norm, before': lambda s: s.sgd(s.sharp(clipped(s.grad()))),
  'add_decayed_weights, inside': lambda s: s.sgd(s.sharp() + 5e-4 * s.w),
  'add_decayed_weights, before': lambda s: s.sgd(
    s.sharp(s.grad() + 5e-4 * s.w)
  ),
  'gsam, clipping inside': lambda s: s.sgd(clipped(gsam(s.grad(), s.sharp()))),
  'gsam, clipping before': lambda s: s.sgd(
    gsam(clipped(s.grad()), s.sharp(clipped(s.grad())))
  ),
  'wsam, weight decay inside': lambda s: s.sgd(
    wsam(s.grad(), s.sharp()) + 5e-4 * s.w
  ),
  'wsam, weight decay before': lambda s: s.sgd(
    wsam(s.grad() + 5e-4 * s.w, s.sharp(s.grad() + 5e-4 * s.w))
  ),
  'friendly, in the ascent': lambda s: s.sgd(s.sharp(s.friendly())),
  'friendly, before': lambda s: s.sgd(s.sharp(s.friendly())),
  'ema, inside': lambda s: s.sgd(s.ema(s.sharp())),
  'ema, before': lambda s: s.sgd(s.sharp(s.ema(s.grad()))),
  'ema, after': lambda s: s.ema(s.sgd(s.sharp())),
}


@pytest.mark.parametrize('row', STEPS)
def test_steps(x64, row):
  """Two steps with a growing learning rate."""
  tx = piece(row, base_tx=optax.sgd(growing), inner=INNER)['tx']
  by_hand = Step(W)
  for count, updates in enumerate(run(tx, BATCHES[:2])[0]):
    by_hand.batch, by_hand.count = BATCHES[count], count
    expected = STEPS[row](by_hand)
    assert_close(updates, expected)
    by_hand.w = by_hand.w + expected


@pytest.mark.parametrize(
  'kwargs', [{'every_k': 2}, {'descent': lambda grads, perturbed_grads: grads}]
)
def test_incoming_gradient_that_is_descended(x64, kwargs):
  """On skipped updates and by a descent: as the chain before it shaped it."""
  tx = optax.chain(optax.scale(3.0), asam(SGD, **kwargs))
  updates, params, _ = run(tx, BATCHES[:2])
  w = np.asarray(ravel_pytree(params)[0])
  last = np.asarray(ravel_pytree(updates[1])[0])
  assert_close(updates[1], -0.3 * clean_grad(w - last, BATCHES[1]))


ERRORS = {
  'partition, around': (ValueError, 'optax.partition'),
  'masked, around': (ValueError, 'optax.masked'),
  'lookahead, around': (TypeError, 'grad_fn'),
}


@pytest.mark.parametrize('row', ERRORS)
def test_errors(row):
  """The errors name the wrapper, or the argument that it does not take."""
  kind, message = ERRORS[row]
  tx = piece(row)['tx']
  names = {}
  if row.startswith('lookahead'):
    names['params'] = optax.LookaheadParams.init_synced(as_tree(W))
    names['gradient'] = lambda params, batch: GRADIENT(params.fast, batch)
    with pytest.raises(ValueError, match=message):
      run(optax.chain(tx), [BATCH], **names)
  with pytest.raises(kind, match=message):
    run(tx, [BATCH], **names)


# Non-finite gradients in both passes, or in the second pass alone.
BAD_STEPS = {
  'both passes': (BAD_BATCH, BAD_BATCH),
  'second pass': (BATCH, BAD_BATCH),
}
each_bad_step = pytest.mark.parametrize('bad', BAD_STEPS)


@each_bad_step
def test_apply_if_finite_inside(x64, bad):
  """A bad step changes neither parameters nor momentum, but counts for rho."""
  first, second = BAD_STEPS[bad]
  tx = piece(
    'apply_if_finite, inside',
    asam=lambda base_tx: asam(base_tx, rho=lambda count: 0.1 * (count + 1)),
    base_tx=optax.sgd(LEARNING_RATE, momentum=0.9),
  )['tx']
  updates, _, state = run(tx, [first, BATCHES[1]], [second, BATCHES[1]])
  assert_close(updates[0], 0 * W)
  assert_close(updates[1], -0.1 * sharp_grad(W, BATCHES[1], rho=0.2))
  assert optax.tree.get(state, 'total_notfinite') == 1


@each_bad_step
def test_skip_not_finite_inside(bad):
  """The mean is taken over k finite micro-batches."""
  first, second = BAD_STEPS[bad]
  tx = piece('skip_not_finite, inside', k=2)['tx']
  batches = [BATCH, first, BATCHES[1]], [BATCH, second, BATCHES[1]]
  *zeros, updates = run(tx, *batches)[0]
  assert_close(zeros, np.zeros(16))
  each = [sharp_grad(W, batch) for batch in BATCHES[:2]]
  assert_close(updates, -0.1 * np.mean(each, axis=0))


@each_bad_step
@pytest.mark.parametrize(
  'row', ['apply_if_finite, around', 'skip_not_finite, around']
)
def test_non_finite_around(row, bad):
  """Around, they let NaN of the second pass through."""
  first, second = BAD_STEPS[bad]
  _, params, _ = run(piece(row, k=2)['tx'], [BATCH, first], [BATCH, second])
  finite = np.isfinite(ravel_pytree(params)[0]).all()
  assert finite == (bad == 'both passes')


def looksam_grads(batches, before=lambda g: g, w=W, update=lambda g: 0):
  """The gradients that LookSAM descends, the second one in the first alone."""
  grads = []
  for i, batch in enumerate(batches):
    g = before(clean_grad(w, batch))
    if i == 0:
      grads.append(sharp_grad(w, batch))
      g_v = grads[0] - (g @ grads[0]) / (g @ g) * g
      direction = g_v / np.linalg.norm(g_v)
    else:
      grads.append(g + 0.1 * np.linalg.norm(g) * direction)
    w = w + update(grads[-1])
  return grads


LOOKSAM = {
  'looksam': (lambda g: g, lambda g: g),
  'looksam, clipping inside': (lambda g: g, clipped),
  'looksam, clipping before': (clipped, lambda g: g),
}


@pytest.mark.parametrize('row', LOOKSAM)
def test_looksam(x64, row):
  """A second gradient, and its direction used again."""
  before, inside = LOOKSAM[row]
  update = lambda g: -0.1 * inside(g)
  grads = looksam_grads(BATCHES[:2], before, update=update)
  for got, g in zip(run(piece(row)['tx'], BATCHES[:2])[0], grads, strict=True):
    assert_close(got, update(g))


def test_looksam_in_python(x64):
  """Two steps chosen in Python are LookSAM."""
  names = {'params': as_tree(W), 'state': looksam(SGD).init(as_tree(W))}
  for i, batch in enumerate(BATCHES):
    names = piece('looksam, in Python', **names, i=i, k=3, batch=batch)
    names = {name: names[name] for name in ('params', 'state')}
  tx = looksam(SGD, every_k=3)
  assert_close(names['params'], ravel_pytree(run(tx, BATCHES)[1])[0])


ACCUMULATED = {
  'MultiSteps, inside': np.mean([sharp_grad(W, b) for b in BATCHES], axis=0),
  'MultiSteps, around': sharp_grad(W, BATCHES[-1], clean_grad(W, WHOLE_BATCH)),
  'looksam, MultiSteps inside': np.mean(looksam_grads(BATCHES), axis=0),
}
ACCUMULATED['looksam, MultiSteps around'] = ACCUMULATED['MultiSteps, around']


@pytest.mark.parametrize('row', ACCUMULATED)
def test_multi_steps(row):
  """A perturbation for each micro-batch, or g~ of the last one."""
  *zeros, updates = run(piece(row)['tx'], BATCHES)[0]
  assert_close(zeros, np.zeros(24))
  assert_close(updates, -0.1 * ACCUMULATED[row])


# Optax takes every k-th example into a micro-batch.
GROUPS = [tuple(array[i::K] for array in WHOLE_BATCH) for i in range(K)]
MICROBATCHED = {
  'microbatch, inside': sharp_grad(W, WHOLE_BATCH),
  'microbatch, inside with a sum': K * sharp_grad(W, WHOLE_BATCH),
  'microbatch, around': np.mean([sharp_grad(W, b) for b in GROUPS], axis=0),
}


@needs_microbatching
@pytest.mark.parametrize('row', MICROBATCHED)
def test_microbatch(row):
  """One perturbation for the batch, or the mean over the micro-batches."""
  tx = SGD if row.endswith('around') else asam(SGD)

  @jax.jit
  def step(params, state, batch):
    names = {'tx': tx, 'params': params, 'state': state, 'batch': batch}
    return piece(row, **names)['updates']

  params = as_tree(W)
  updates = step(
    params, tx.init(params), jax.tree.map(jnp.asarray, WHOLE_BATCH)
  )
  assert_close(updates, -0.1 * MICROBATCHED[row])


@pytest.mark.parametrize(
  'row', ['part of the batch', 'part of the batch, with every_k']
)
def test_part_of_the_batch(row):
  """Two updates: the second one is skipped if every_k is 2."""
  skips = row.endswith('every_k')
  tx = piece(row)['tx'] if skips else asam(SGD)
  params = as_tree(W)
  names = {'tx': tx, 'params': params, 'state': tx.init(params)}
  part = [array[::4] for array in WHOLE_BATCH]
  part_grad = clean_grad(W, part)
  sharp = sharp_grad(W, WHOLE_BATCH, part_grad)
  for expected in (sharp, part_grad if skips else sharp):
    batch = jax.tree.map(jnp.asarray, WHOLE_BATCH)
    names = piece('part of the batch', **{**names, 'batch': batch})
    assert_close(names['updates'], -0.1 * expected)


def test_scan():
  """The gradient of the whole batch, without Optax's micro-batches."""
  micro_batches = jax.tree.map(lambda *arrays: jnp.stack(arrays), *BATCHES)
  grad_fn = piece('scan', micro_batches=micro_batches)['grad_fn']
  assert_close(jax.jit(grad_fn)(as_tree(W)), clean_grad(W, WHOLE_BATCH))


LOOKAHEAD = {
  'lookahead, with a gradient': lambda params, batch: optax_asam.grad(loss_fn)(
    params.fast, batch
  ),
  'lookahead, inside': jax.grad(
    lambda params, batch: loss_fn(params.fast, batch)
  ),
}


@pytest.mark.parametrize('row', LOOKAHEAD)
def test_lookahead(x64, row):
  """The nested loops of lookahead around those of ASAM, by hand."""
  tx = optax.with_extra_args_support(piece(row)['tx'])
  params = optax.LookaheadParams.init_synced(as_tree(W))
  _, params, _ = run(tx, BATCHES, params=params, gradient=LOOKAHEAD[row])
  slow = W
  for start in (0, 2):
    fast = slow
    for batch in BATCHES[start : start + 2]:
      fast = fast - 0.1 * sharp_grad(fast, batch)
    slow = 0.7 * slow + 0.3 * fast
  assert_close(params.fast, slow)
  assert_close(params.slow, slow)


RECORDED = {
  'snapshot, before': G,
  'snapshot, inside': SHARP,
  'snapshot, after': -0.1 * SHARP,
}


@pytest.mark.skipif(
  not hasattr(optax, 'snapshot'), reason='it came with Optax 0.2.6'
)
@pytest.mark.parametrize('row', RECORDED)
def test_snapshot(x64, row):
  """What it holds after a step."""
  tx = piece(row, measure=lambda updates: updates)['tx']
  _, _, state = run(tx, [BATCH])
  assert_close(optax.tree.get(state, 'seen'), RECORDED[row])


def test_schedule_free(x64):
  """SGD and averaging by hand; the average is what is evaluated."""
  _, params, state = run(piece('schedule_free, inside')['tx'], BATCHES)
  y = z = x = W
  for count, batch in enumerate(BATCHES):
    z = z - 0.1 * sharp_grad(y, batch)
    x = (count * x + z) / (count + 1)
    y = 0.1 * z + 0.9 * x
  assert_close(params, y)
  names = piece('schedule_free', state=state, params=params)
  assert_close(names['clean_params'], x)


@pytest.mark.parametrize(
  ('kwargs', 'operators'),
  [
    ({}, [ELEMENTWISE, elementwise(0.1)]),
    (
      {'adaptive': normalization.layerwise(0.2), 'every_k': 2},
      [layerwise(0.2)] * 2,
    ),
  ],
)
def test_inject_hyperparams(kwargs, operators):
  """Only rho and eta are injected; new values work and compile nothing."""
  params = as_tree(W)
  names = piece('inject_hyperparams, around', params=params)
  assert names['state'].hyperparams['rho'] == jnp.float32(0.2)
  code = PIECES['inject_hyperparams, around']
  for name in set(inspect.signature(asam).parameters) - {'rho', 'eta'}:
    assert f"'{name}'" in code or name == 'axis_name'  # a string stays as it is
  tx = names['injected'](SGD, rho=0.3, **kwargs)

  @jax.jit
  def step(state):
    grad_fn = lambda params: GRADIENT(params, BATCH)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)[0]

  state = tx.init(params)
  assert set(state.hyperparams) == {'rho', 'eta'}
  for rho, eta, operator in zip((0.3, 0.6), (ETA, 0.1), operators, strict=True):
    state.hyperparams.update(rho=jnp.float32(rho), eta=jnp.float32(eta))
    expected = sharp_grad(W, BATCH, operator=operator, rho=rho)
    assert_close(step(state), -0.1 * expected)
  assert step._cache_size() == 1


LINE_SEARCHES = ['lbfgs, inside', 'line search, inside']


@pytest.mark.parametrize('row', LINE_SEARCHES)
def test_line_searches(x64, row):
  """The first step goes along -g~ to a lower clean loss, which is kept."""
  tx = piece(row)['tx']
  params, batch = as_tree(W), jax.tree.map(jnp.asarray, BATCH)

  @jax.jit
  def step(params, state):
    names = {'tx': tx, 'params': params, 'state': state, 'batch': batch}
    names = piece('value_fn', **names)
    return names['value'], names['updates'], names['state']

  value, updates, state = step(params, tx.init(params))
  length = np.linalg.norm(ravel_pytree(updates)[0]) / np.linalg.norm(SHARP)
  assert_close(updates, -length * SHARP)
  after = loss_fn(optax.apply_updates(params, updates), batch)
  assert after < 0.9 * value
  assert_close(state[1][-1].value, after)
  expected = loss_fn(as_tree(perturbed(W, G)), batch)
  assert_close(state[0].perturbed_value, expected)


def test_line_searches_reject_grad_fn():
  """They lack value_fn."""
  with pytest.raises(TypeError, match='value_fn'):
    run(piece(LINE_SEARCHES[1])['tx'], [BATCH])


def test_every_k_in_python(x64):
  """Two steps chosen in Python, and every_k, are ASAM on each k-th step."""
  base_tx = optax.sgd(LEARNING_RATE, momentum=0.9)

  def make_step(value_and_grad):
    def step(params, opt_state, batch):
      _, grads = value_and_grad(loss_fn)(params, batch)
      updates, opt_state = base_tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)

  names = {
    'sharp_step': make_step(optax_asam.value_and_grad),
    'plain_step': make_step(jax.value_and_grad),
    'params': as_tree(W),
    'opt_state': base_tx.init(as_tree(W)),
  }
  w, trace = W, 0 * W
  for i, batch in enumerate(BATCHES):
    names = piece(
      'every_k, in Python', **{**names, 'i': i, 'k': 3, 'batch': batch}
    )
    trace = (sharp_grad if i in (0, 3) else clean_grad)(w, batch) + 0.9 * trace
    w = w - 0.1 * trace
    assert_close(names['params'], w)
  assert_close(run(asam(base_tx, every_k=3), BATCHES)[1], w)


@pytest.mark.parametrize(
  ('name', 'sharp'), [('every_k', (True, False)), ('when', (False, False))]
)
def test_skipped_updates(x64, name, sharp):
  """The first updates that the page's options take."""
  w = W
  for i, updates in enumerate(run(piece(name)['tx'], BATCHES[:2])[0]):
    expected = -0.1 * (sharp_grad if sharp[i] else clean_grad)(w, BATCHES[i])
    assert_close(updates, expected)
    w = w + expected


def test_state():
  """Optax's tools find our fields, and tell parameters from other leaves."""
  tx = asam(optax.adam(0.1))
  _, _, state = run(tx, [BATCH])
  state = (state[0]._replace(perturbed_value=jnp.float32(2.0)), *state[1:])
  names = piece('state', tx=tx, state=state)
  assert (names['step'], names['count'], names['perturbed_value']) == (1, 1, 2)
  adam = state[1][0]
  halved = jax.tree.map(lambda moment: moment / 2, (adam.mu, adam.nu))
  assert_same_bits(names['halved'][1][0][1:], halved)
  assert_same_bits(names['halved'][0], state[0])


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
def test_grad_fn_is_passed_on(wrap):
  """By wrappers that have no row of their own."""
  assert_close(run(wrap(asam(SGD)), [BATCH])[0][0], -0.1 * SHARP)


def test_multi_steps_in_a_chain():
  """There its transformation does not pass grad_fn on."""
  tx = optax.MultiSteps(asam(SGD), 1).gradient_transformation()
  with pytest.raises(ValueError, match='grad_fn'):
    run(optax.chain(tx), [BATCH])


ROWS = {
  *(*STEPS, *ERRORS, *ACCUMULATED, *MICROBATCHED, *LOOKAHEAD, *RECORDED),
  *('apply_if_finite, inside', 'apply_if_finite, around'),
  *('skip_not_finite, inside', 'skip_not_finite, around'),
  *('looksam, clipping inside', 'looksam, clipping before'),
  *('schedule_free, inside', 'inject_hyperparams, around', *LINE_SEARCHES),
  *('part of the batch', 'part of the batch, with every_k'),
}
OTHERS = {
  *('schedule_free', 'scan', 'value_fn', 'state'),
  *('every_k', 'when', 'every_k, in Python'),
  *('looksam', 'looksam, in Python'),
}


def test_rows():
  """Each row and each piece is tested, and errors are called errors."""
  rows = {}
  for cell, works, _ in pages.read_rows(PAGE):
    name = cell.split('](')[0].strip('[').replace('`', '')
    assert name not in rows
    rows[name] = works
  assert set(rows) == ROWS
  assert set(PIECES) == ROWS | OTHERS
  assert set(rows.values()) == {'yes', 'no', 'depends', 'error'}
  assert {name for name in rows if rows[name] == 'error'} == set(ERRORS)
