"""The steps of the training program, against training by hand."""

import collections
import contextlib
import functools
import logging
import math
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import compare
from experiments import config
from experiments import data
from experiments import loop
from experiments import models
from optax_asam import asam
from optax_asam import normalization
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NUM_EXAMPLES = 18
NUM_EPOCHS = 2
# What is perturbed of the network below.
MASKS = {
  'all': None,
  'normalization': {'Dense_0': False, 'BatchNorm_0': True, 'Dense_1': False},
  'others': {'Dense_0': True, 'BatchNorm_0': False, 'Dense_1': True},
}


class Normalized(nn.Module):
  """A small classifier with BatchNorm."""

  @nn.compact
  def __call__(self, images, *, train=False):
    """Maps images to logits."""
    x = nn.Dense(4, use_bias=False)(images.reshape(len(images), -1))
    # Of two examples it amplifies rounding, the more the smaller epsilon is.
    x = nn.BatchNorm(not train, momentum=0.9, epsilon=0.1)(x)
    return nn.Dense(3)(nn.tanh(x))


def add_noise(key, images):
  """An augmentation that changes every pixel."""
  return images + 0.1 * jax.random.normal(key, images.shape)


@pytest.fixture
def dataset():
  """A small one, with labels of its own for each of two runs."""
  rng = np.random.default_rng(0)
  split = data.Split(
    rng.standard_normal((NUM_EXAMPLES, 2, 2, 1)).astype(np.float32),
    rng.integers(0, 3, NUM_EXAMPLES).astype(np.int32),
  )
  return data.add_label_noise(
    data.Dataset(3, split, split, split, augment=add_noise), 0.3, [0, 1]
  )


def make_options(**changes):
  """The options of a run, the defaults but for ``changes``."""
  return config.Config(
    **{'epochs': NUM_EPOCHS, 'batch_size': 4, 'lr': 0.1, **changes}
  )


def make_groups(method, rho, args, dataset):
  """The groups of two runs that differ in their seed."""
  programs = loop.Programs(Normalized(), dataset, args, NUM_EXAMPLES)
  runs = [loop.Run(method, rho, seed) for seed in (0, 1)]
  return loop.make_groups(runs, dataset.train, programs)


def mean(trees):
  """The mean of trees."""
  return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def make_gradient(method, rho, args):
  """A jitted gradient by hand, with ``asam`` in place of what is tested."""
  tx = asam(
    optax.identity(),
    rho=rho,
    adaptive=(
      normalization.layerwise(args.eta)
      if args.normalization == 'layerwise'
      else normalization.elementwise(args.eta, mask=None)
      if args.normalize_biases
      else method == 'asam'
    ),
    ord=args.ord,
    mask=MASKS[args.perturb],
  )
  value_and_grad = jax.value_and_grad(
    functools.partial(
      models.train_loss_fn, label_smoothing=args.label_smoothing
    ),
    has_aux=True,
  )

  @jax.jit
  def gradient(params, model_state, batch):
    grad_fn = lambda p: value_and_grad(p, model_state, Normalized(), batch)[1]
    out, grads = value_and_grad(params, model_state, Normalized(), batch)
    return out, tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]

  return gradient


def take_epoch(state, split, position, first_step, gradients, args):
  """An epoch by hand: ``(params, velocity, model_state)`` and the mean loss."""
  losses = []
  num_steps = NUM_EXAMPLES // args.batch_size
  for i in range(num_steps):
    step = first_step + i
    params, velocity, model_state = state
    indices = position.order[i * args.batch_size : (i + 1) * args.batch_size]
    images, labels = split.images[indices], split.labels[indices]
    if args.augment:
      images = add_noise(loop.augmentation_key(position.key, i), images)
    gradient = gradients[step % args.every_k == 0]
    num_groups = args.batch_size // (args.m_sharpness or args.batch_size)
    (loss, model_state), grads = mean(
      [
        gradient(
          params,
          model_state,
          data.Split(images[j::num_groups], labels[j::num_groups]),
        )
        for j in range(num_groups)
      ]
    )
    lr = 0.5 * args.lr * (1 + math.cos(math.pi * step / num_steps / NUM_EPOCHS))
    velocity = jax.tree.map(
      lambda v, g, w: 0.9 * v + g + args.weight_decay * w,
      velocity,
      grads,
      params,
    )
    params = jax.tree.map(lambda w, v, lr=lr: w - lr * v, params, velocity)
    state = params, velocity, model_state
    losses.append(loss)
  return state, np.mean(losses)


@pytest.mark.parametrize(
  ('seed_axis', 'method', 'changes'),
  [
    ('loop', 'sgd', {'weight_decay': 0.1}),
    ('vmap', 'sam', {'label_smoothing': 0.1, 'perturb': 'others'}),
    ('loop', 'asam', {'augment': True, 'ord': math.inf, 'every_k': 2}),
    ('vmap', 'asam', {'normalize_biases': True, 'perturb': 'normalization'}),
    ('loop', 'asam', {'normalization': 'layerwise', 'eta': 0.1}),
    ('vmap', 'asam', {'m_sharpness': 4, 'batch_size': 8}),
    (
      'loop',
      'asam',
      {'m_sharpness': 4, 'm_sharpness_by': 'microbatching', 'batch_size': 8},
    ),
  ],
)
def test_against_training_by_hand(dataset, seed_axis, method, changes):
  """Two epochs of two runs give the parameters that they should."""
  args = make_options(seed_axis=seed_axis, **changes)
  rho = {'sgd': 0.0, 'sam': 0.3, 'asam': 0.5}[method]
  gradients = {
    True: make_gradient(method, rho, args),
    False: make_gradient(method, 0.0, args),
  }
  trained = make_groups(method, rho, args, dataset)
  assert [len(group.runs) for group in trained] == (
    [1, 1] if seed_axis == 'loop' else [2]
  )

  def each_run():
    for group in trained:
      for i in range(len(group.runs)):
        yield jax.tree.map(lambda x, i=i: x[i], group.state)

  expected = []
  for state in each_run():
    velocity = jax.tree.map(jnp.zeros_like, state.params)
    expected.append((state.params, velocity, state.model_state))
  assert error(expected[0][0], expected[1][0]) > 0.1  # The seeds differ.
  orders = []
  for epoch in range(NUM_EPOCHS):
    losses = np.concatenate([group.train_epoch(epoch)[0] for group in trained])
    for i, state in enumerate(each_run()):
      orders.append(np.asarray(state.position.order))
      expected[i], expected_loss = take_epoch(
        expected[i],
        dataset.train._replace(labels=dataset.train.labels[i]),
        state.position,
        epoch * (NUM_EXAMPLES // args.batch_size),
        gradients,
        args,
      )
      assert error(state.params, expected[i][0]) < 1e-5
      assert error(state.model_state, expected[i][2]) < 1e-5
      np.testing.assert_allclose(losses[i], expected_loss, rtol=1e-5)
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(NUM_EXAMPLES))
  assert len({order.tobytes() for order in orders}) == 2 * NUM_EPOCHS


@contextlib.contextmanager
def count_compilations(caplog):
  """Counts what is compiled, by name."""
  counts = collections.Counter()
  with jax.log_compiles(), caplog.at_level(logging.WARNING, 'jax'):
    caplog.clear()
    yield counts
  pattern = r'Compiling (?:jit\()?(\w+)\)? with global shapes and types'
  for message in caplog.messages:
    match = re.match(pattern, message)
    if match:
      counts[match[1]] += 1


@pytest.mark.slow
@pytest.mark.parametrize('seed_axis', ['loop', 'vmap'])
def test_nothing_is_compiled_twice(seed_axis, tmp_path, caplog):
  """A step is compiled once for all radii, seeds, epochs and stages."""
  jax.clear_caches()
  with count_compilations(caplog) as counts:
    compare.main(
      [
        *('--optimizer=sgd,asam', '--rho=0.1,0.2', '--every-k=2'),
        *('--epochs=2', '--seeds=2', '--train-size=200'),
        *(f'--seed-axis={seed_axis}', f'--out={tmp_path}'),
      ]
    )
  # A step of each method; SGD's is that between perturbed ones. Mapped over
  # runs, those of the search have another shape.
  is_loop = seed_axis == 'loop'
  assert counts['train_step'] == (2 if is_loop else 4)
  assert counts['init_run'] == 1
  assert counts['start_epoch'] == (1 if is_loop else 2)
  # Accuracy on three parts of the data, loss and sharpness in two balls on one.
  assert counts['measure_batch'] == (6 if is_loop else 7)


def test_no_key_is_used_twice():
  """Those of augmentation differ from each other and from the next epochs'."""
  position = loop.Position(
    jax.random.key(0), jnp.arange(4), jnp.int32(4), jnp.float32(0)
  )
  used = []
  for _ in range(3):
    used += [*jax.random.split(position.key), position.key]
    used += [loop.augmentation_key(position.key, step) for step in range(4)]
    position = loop.start_epoch(position)
  # What an epoch is given as its key was made by the one before.
  assert len({bytes(jax.random.key_data(key)) for key in used}) == 3 * 7 - 2


def test_input_never_leaves_the_device(dataset):
  """An epoch transfers nothing from the host, and calls nothing there."""
  args = make_options(augment=True)
  group, _ = make_groups('asam', 0.5, args, dataset)
  group.compile()
  with jax.transfer_guard('disallow'):
    group.train_epoch(0)
  inputs = group.state, jnp.full(1, 0.5), group.labels, group.images
  compiled = group._step(0).lower(*inputs).compile()
  for word in ('callback"', 'infeed', 'outfeed'):  # The names of targets.
    assert word not in compiled.as_text()
