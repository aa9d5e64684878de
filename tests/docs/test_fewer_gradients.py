"""Promise: the recipes of docs/fewer_gradients.md do what the page says.

Their steps are compared with loops in NumPy, and their gradients are counted.
"""

import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from examples.frameworks import train_linen
from examples.frameworks import train_nnx
import optax_asam.nnx
from tests.helpers import pages
from tests.helpers import reference
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

PAGE = pages.read_page('fewer_gradients')
SNIPPETS = pages.read_snippets(PAGE)
ON_PART = SNIPPETS['test_with_the_transformation'][0]

STEPS, EXAMPLES, K = 100, 16, 5
START = 90
SGD = optax.sgd(0.1, momentum=0.9)


def normal(seed, *shape):
  """Random numbers."""
  return np.random.default_rng(seed).standard_normal(shape)


PARAMS = {'kernel': normal(0, 3, 2), 'bias': normal(1, 2)}
BATCHES = normal(2, STEPS, EXAMPLES, 3), normal(3, STEPS, EXAMPLES, 2)


def learning_rate(step):
  """The page's cosine decay from 0.1 to 0.001."""
  return 0.1 * (0.99 * (1 + np.cos(np.pi * step / STEPS)) / 2 + 0.01)


def by_hand(
  is_sharp=lambda step: True,
  rho=lambda step: 0.5,
  stride=1,
  learning_rate=lambda step: 0.1,
):
  """ASAM around SGD with momentum; every ``stride``-th example for eps."""
  params, trace = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
  for step, batch in enumerate(zip(*BATCHES, strict=True)):
    point = params
    if is_sharp(step):
      part = [array[::stride] for array in batch]
      eps = reference.perturbation(
        params,
        reference.squared_error_grad(params, part),
        reference.elementwise(0.01),
        rho(step),
        2,
        {'kernel'},
        set(params),
      )
      point = jax.tree.map(np.add, params, eps)
    grads = reference.squared_error_grad(point, batch)
    trace = jax.tree.map(lambda g, t: g + 0.9 * t, grads, trace)
    lr = learning_rate(step)
    params = jax.tree.map(lambda w, t, lr=lr: w - lr * t, params, trace)
  return params


# The code of each row of the page's table, and its steps by hand, unless
# test_looksam and test_momentum compare them.
ROWS = {
  'ASAM': ('tx = asam(base_tx, rho=0.5)', {}),
  'Part of the batch': (ON_PART, {'stride': 4}),
  'Every k-th step': (
    SNIPPETS['test_every_k_th_step'][0],
    {'is_sharp': lambda step: step % K == 0},
  ),
  'Late phase': (
    SNIPPETS['test_late_phase'][0],
    {'is_sharp': lambda step: step >= START},
  ),
  'Late phase, every k-th step': (
    SNIPPETS['test_late_phase'][1],
    {'is_sharp': lambda step: step >= START and step % 2 == 0},
  ),
  'LookSAM': (SNIPPETS['test_look_sam'][0], None),
  'Momentum ASAM': (SNIPPETS['test_momentum_asam'][0], None),
  'A schedule of rho': (
    SNIPPETS['test_a_schedule_of_rho'][0],
    {
      'learning_rate': learning_rate,
      'rho': lambda step: 0.1 + 0.4 * (learning_rate(step) - 0.001) / 0.099,
    },
  ),
}


class Counted:
  """A loss function that counts the examples that it sees when it is run."""

  def __init__(self):
    self.examples = 0

  def add(self, examples):
    """Called on each run."""
    self.examples += examples

  def loss_fn(self, params, batch):
    """The squared error of a layer."""
    jax.debug.callback(lambda: self.add(len(batch[0])))
    return reference.squared_error(params, batch)

  def gradients_per_step(self):
    """In gradients of the whole batch."""
    jax.effects_barrier()
    return self.examples / (EXAMPLES * STEPS)


@pytest.mark.parametrize('row', ROWS)
def test_rows(x64, row):
  """The parameters after a hundred steps, and the number of gradients."""
  code, options = ROWS[row]
  counted = Counted()
  loss_fn = counted.loss_fn
  names = pages.run_snippet(code, loss_fn=loss_fn, base_tx=SGD, num_steps=STEPS)
  tx = names['tx']

  def train_step(params, opt_state, batch):
    grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    updates, opt_state = tx.update(
      grad_fn(params), opt_state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), opt_state

  train_step = names.get('train_step', train_step)

  @jax.jit
  def train(params, batches):
    return jax.lax.scan(
      lambda carry, batch: (train_step(*carry, batch), None),
      (params, tx.init(params)),
      batches,
    )[0]

  params, _ = train(jax.tree.map(jnp.asarray, PARAMS), BATCHES)
  if options is not None:
    expected = by_hand(**options)
    assert error(jax.tree.map(np.asarray, params), expected) < 1e-10
  table = {
    re.sub(r'[\[\]]|\(.*\)', '', name): float(gradients)
    for name, _, gradients in pages.read_rows(pages.marked(PAGE, 'cost'))
  }
  assert set(table) == set(ROWS)
  assert counted.gradients_per_step() == pytest.approx(table[row])


def test_every_snippet_is_tested():
  """By the tables above, or a test with the name of the section."""
  sections = {name for name in SNIPPETS if name not in globals()}
  assert sections == {
    'test_with_the_transformation',
    'test_every_k_th_step',
    'test_late_phase',
    'test_look_sam',
    'test_momentum_asam',
    'test_a_schedule_of_rho',
  }
  assert sum(map(len, SNIPPETS.values())) == PAGE.count('```python')


@pytest.mark.parametrize('stride', [1, 4])
def test_two_jitted_steps(x64, stride):
  """On every other step of the last tenth, and on part of the batch."""
  counted = Counted()
  (code,) = SNIPPETS['test_two_jitted_steps']
  if stride > 1:
    code = code.replace(
      'rho=0.5',
      'rho=0.5, ascent_fun=lambda p, b: loss_fn(p, [x[::4] for x in b])',
    )
  names = pages.run_snippet(
    code,
    loss_fn=counted.loss_fn,
    base_tx=SGD,
    params=jax.tree.map(jnp.asarray, PARAMS),
    batches=list(zip(*BATCHES, strict=True)),
    start=START,
    k=2,
  )
  expected = by_hand(
    lambda step: step >= START and step % 2 == 0, stride=stride
  )
  params = jax.tree.map(np.asarray, names['params'])
  assert error(params, expected) < 1e-10
  assert counted.gradients_per_step() == pytest.approx(1 + 0.05 / stride)


def test_loss_of_the_whole_batch(x64):
  """With value_fn in place of grad_fn, the state holds L(w + eps)."""
  code = ON_PART.replace(
    'grad_fn=grad_fn', 'value_fn=lambda p: loss_fn(p, batch)'
  )
  assert code != ON_PART
  batch = [array[0] for array in BATCHES]
  names = pages.run_snippet(code, loss_fn=reference.squared_error, base_tx=SGD)
  _, opt_state = names['train_step'](PARAMS, names['tx'].init(PARAMS), batch)
  part = [array[::4] for array in batch]
  grads = reference.squared_error_grad(PARAMS, part)
  expected = reference.squared_error(reference.perturb(PARAMS, grads), batch)
  assert error(opt_state[0].perturbed_value, expected) < 1e-12


def test_sharded_batch():
  """Every fourth example stays on its device; the first quarter moves."""
  mesh = jax.make_mesh((8,), ('data',))
  batch = jax.device_put(
    (jnp.ones((64, 3)), jnp.ones((64, 2))),
    NamedSharding(mesh, PartitionSpec('data')),
  )
  params = jax.device_put(
    jax.tree.map(jnp.float32, PARAMS), NamedSharding(mesh, PartitionSpec())
  )

  def moves(code):
    names = pages.run_snippet(
      code, loss_fn=reference.squared_error, base_tx=optax.sgd(0.1)
    )
    opt_state = jax.device_put(
      names['tx'].init(params), NamedSharding(mesh, PartitionSpec())
    )
    program = names['train_step'].lower(params, opt_state, batch).compile()
    text = program.as_text()
    assert 'all-reduce(' in text
    return set(re.findall('collective-permute|all-gather|all-to-all', text))

  assert not moves(ON_PART)
  assert moves(ON_PART.replace('x[::4]', 'x[:16]'))


def images_and_labels():
  """A batch of random images."""
  images = jnp.asarray(normal(4, 8, 8, 8, 1), jnp.float32)
  return images, jnp.arange(8)


def test_flax_linen():
  """Gradient, loss and statistics are those of two passes by hand."""
  network = train_linen.Network()
  images, labels = images_and_labels()
  key = jax.random.key(1)
  state = train_linen.TrainState.create(
    apply_fn=network.apply,
    tx=optax.sgd(1.0),
    **network.init(jax.random.key(0), images, train=False),
  )
  loss_fn = train_linen.loss_fn
  plain = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

  (code,) = SNIPPETS['test_flax_linen']
  names = pages.run_snippet(code, loss_fn=loss_fn)
  new_state, loss = names['train_step'](state, images, labels, key)

  _, grads = plain(state.params, state, images[::4], labels[::4], key)
  perturbed = reference.perturb(state.params, grads)
  (expected, batch_stats), grads = plain(perturbed, state, images, labels, key)
  params = jax.tree.map(lambda w, g: w - g, state.params, grads)
  assert error(loss, expected) < 1e-6
  assert error(new_state.batch_stats, batch_stats) < 1e-6
  assert error(new_state.params, params) < 1e-5
  clean = state.apply_gradients(
    grads=optax_asam.grad(loss_fn, has_aux=True)(
      state.params, state, images, labels, key
    )[0]
  )
  assert error(clean.params, params) > 1e-4


def test_flax_nnx():
  """What is left in the module, too."""
  network = train_nnx.Network(rngs=nnx.Rngs(0))
  images, labels = images_and_labels()
  loss_fn = train_nnx.loss_fn
  plain = nnx.jit(nnx.value_and_grad(loss_fn))
  ascent, perturbed = nnx.clone(network), nnx.clone(network)

  optimizer = nnx.Optimizer(network, optax.sgd(1.0), wrt=nnx.Param)
  params = nnx.state(nnx.clone(network), nnx.Param)
  (code,) = SNIPPETS['test_flax_nnx']
  names = pages.run_snippet(code, loss_fn=loss_fn, nnx=nnx)
  loss = names['train_step'](network, optimizer, images, labels)

  _, grads = plain(ascent, images[::4], labels[::4])
  nnx.update(perturbed, reference.perturb(params, grads))
  expected, grads = plain(perturbed, images, labels)
  assert error(loss, expected) < 1e-6
  descended = jax.tree.map(lambda w, g: w - g, params, grads)
  assert error(nnx.state(network, nnx.Param), descended) < 1e-5
  initial = train_nnx.Network(rngs=nnx.Rngs(0))
  for kind in (nnx.BatchStat, nnx.RngCount):
    state = nnx.state(network, kind)
    assert error(state, nnx.state(perturbed, kind)) < 1e-6
    assert error(state, nnx.state(initial, kind)) > 1e-2
