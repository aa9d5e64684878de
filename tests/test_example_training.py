"""The steps of the training program, against training by hand."""

import argparse
import collections
import contextlib
import functools
import json
import logging
import math
import re
import struct

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2

import checkpoints
import data
import groups
import m_sharpness
import models
from optax_asam import asam
from optax_asam import normalization
import presets
import summaries
from support import assert_same_bits
from support import error
import train
import training

NUM_EXAMPLES = 18
NUM_EPOCHS = 2
# What is perturbed of the network below.
MASKS = {
  'all': None,
  'normalization': {'Dense_0': False, 'BatchNorm_0': True, 'Dense_1': False},
  'others': {'Dense_0': True, 'BatchNorm_0': False, 'Dense_1': True},
}


def newer_for(way):
  """Skips a test of a way for which what is installed is too old."""
  missing = m_sharpness.missing(way)
  return pytest.mark.skipif(bool(missing), reason=f'needs {missing}')


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
  """The options of a run, those of the defaults but for ``changes``."""
  options = {'epochs': NUM_EPOCHS, 'batch_size': 4, 'seed_axis': 'loop'}
  return argparse.Namespace(**presets.DEFAULTS | options | changes)


def make_programs(optimizer, args, dataset, mapped):
  """What is compiled for an optimizer."""
  return training.make_programs(
    optimizer,
    Normalized(),
    dataset,
    args,
    num_steps=NUM_EXAMPLES // args.batch_size,
    mapped=mapped,
  )


def make_groups(optimizer, rho, args, dataset):
  """The groups of two runs that differ in their seed."""
  programs = functools.cache(
    lambda optimizer, _, mapped: make_programs(optimizer, args, dataset, mapped)
  )
  runs = [training.Run(optimizer, rho, seed) for seed in (0, 1)]
  return groups.make_groups(runs, dataset, programs, args)


def mean(trees):
  """The mean of trees."""
  return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def gradient(tx, params, model_state, batch, label_smoothing):
  """The clean loss and state of a pass, and the gradient that is descended."""
  value_and_grad = jax.value_and_grad(
    functools.partial(models.train_loss_fn, label_smoothing=label_smoothing),
    has_aux=True,
  )
  grad_fn = lambda p: value_and_grad(p, model_state, Normalized(), batch)[1]
  out, grads = value_and_grad(params, model_state, Normalized(), batch)
  return out, tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]


def take_epoch(state, split, position, first_step, optimizer, rho, args):
  """An epoch by hand: ``(params, velocity, model_state)`` and the mean loss.

  The second gradient comes from ``asam``, and SGD from its formula.
  """
  losses = []
  num_steps = NUM_EXAMPLES // args.batch_size
  for i in range(num_steps):
    step = first_step + i
    params, velocity, model_state = state
    indices = position.order[i * args.batch_size : (i + 1) * args.batch_size]
    images, labels = split.images[indices], split.labels[indices]
    if args.augment:
      images = add_noise(training.augmentation_key(position.key, i), images)
    perturbed = optimizer != 'sgd' and step % args.every_k == 0
    tx = asam(
      optax.identity(),
      rho=rho if perturbed else 0.0,
      adaptive=(
        normalization.layerwise(args.eta)
        if args.normalization == 'layerwise'
        else normalization.elementwise(args.eta, mask=None)
        if args.normalize_biases
        else optimizer == 'asam'
      ),
      ord=args.ord,
      mask=MASKS[args.perturb],
    )
    num_groups = args.batch_size // (args.m_sharpness or args.batch_size)
    (loss, model_state), grads = mean(
      [
        gradient(
          tx,
          params,
          model_state,
          data.Split(images[j::num_groups], labels[j::num_groups]),
          args.label_smoothing,
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


@pytest.mark.parametrize('seed_axis', ['loop', 'vmap'])
@pytest.mark.parametrize(
  ('optimizer', 'changes'),
  [
    ('sgd', {'every_k': 2}),
    ('sam', {'label_smoothing': 0.1}),
    ('asam', {'augment': True}),
    ('asam', {'ord': math.inf, 'every_k': 2}),
    ('asam', {'normalization': 'layerwise', 'eta': 0.1}),
    ('asam', {'normalize_biases': True, 'perturb': 'normalization'}),
    ('sam', {'perturb': 'others'}),
    ('asam', {'m_sharpness': 4, 'batch_size': 8, 'weight_decay': 0.1}),
    pytest.param(
      'asam',
      {'m_sharpness': 4, 'm_sharpness_by': 'microbatching', 'batch_size': 8},
      marks=newer_for('microbatching'),
    ),
    pytest.param(
      'asam',
      {'m_sharpness': 2, 'm_sharpness_by': 'shard_map', 'batch_size': 16},
      marks=newer_for('shard_map'),
    ),
  ],
)
def test_against_training_by_hand(dataset, seed_axis, optimizer, changes):
  """Two epochs of two runs give the parameters that they should."""
  args = make_options(seed_axis=seed_axis, **changes)
  rho = {'sgd': 0.0, 'sam': 0.3, 'asam': 0.5}[optimizer]
  trained = make_groups(optimizer, rho, args, dataset)
  assert [len(group.runs) for group in trained] == (
    [1, 1] if seed_axis == 'loop' else [2]
  )

  def each_run():
    for group in trained:
      for i in range(len(group.runs)):
        yield jax.tree.map(
          lambda x, i=i, group=group: x[i] if group.mapped else x, group.state
        )

  expected = []
  for state in each_run():  # Copies: a step takes its buffers.
    params, model_state = jax.tree.map(jnp.copy, state[:2])
    velocity = jax.tree.map(jnp.zeros_like, params)
    expected.append((params, velocity, model_state))
  assert error(expected[0][0], expected[1][0]) > 0.1  # The seeds differ.
  orders = []
  for epoch in range(NUM_EPOCHS):
    losses = np.concatenate([group.train_epoch(epoch)[0] for group in trained])
    for i, state in enumerate(each_run()):
      orders.append(np.asarray(state.position.order))
      labels = dataset.train.labels[i]
      expected[i], expected_loss = take_epoch(
        expected[i],
        dataset.train._replace(labels=labels),
        state.position,
        epoch * (NUM_EXAMPLES // args.batch_size),
        optimizer,
        rho,
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


@pytest.mark.parametrize('seed_axis', ['loop', 'vmap'])
def test_nothing_is_compiled_twice(seed_axis, tmp_path, caplog, capsys):
  """A step is compiled once for all radii, seeds, epochs and stages."""
  jax.clear_caches()
  with count_compilations(caplog) as counts:
    train.main(
      [
        *('--rho=0.1,0.2', '--epochs=2', '--seeds=2', '--every-k=2'),
        *(f'--seed-axis={seed_axis}', f'--out={tmp_path}'),
      ]
    )
  capsys.readouterr()
  # A perturbed and a plain step of SAM and ASAM, and a step of SGD. Mapped over
  # runs, those of the search have another shape.
  steps = 5 if seed_axis == 'loop' else 9
  assert counts['train_step'] == steps
  assert counts['init_run'] == 1
  assert counts['start_epoch'] == (1 if seed_axis == 'loop' else 2)
  # Accuracy on three parts of the data, loss and sharpness in two balls on one.
  assert counts['measure_batch'] == (6 if seed_axis == 'loop' else 7)


def test_no_key_is_used_twice():
  """Those of augmentation differ from each other and from the next epochs'."""
  position = training.Position(
    jax.random.key(0), jnp.arange(4), jnp.int32(4), jnp.float32(0)
  )
  used = []
  for _ in range(3):
    used += [*jax.random.split(position.key), position.key]
    used += [training.augmentation_key(position.key, step) for step in range(4)]
    position = training.start_epoch(position)
  # What an epoch is given as its key was made by the one before.
  assert len({bytes(jax.random.key_data(key)) for key in used}) == 3 * 7 - 2


def test_input_never_leaves_the_device(dataset):
  """An epoch transfers nothing from the host, and calls nothing there."""
  args = make_options(augment=True)
  group, _ = make_groups('asam', 0.5, args, dataset)
  group.compile()
  with jax.transfer_guard('disallow'):
    group.train_epoch(0)
  step = make_programs('asam', args, dataset, mapped=False).sharp_step
  compiled = step.lower(group.state, jnp.float32(0.5), group.split).compile()
  for word in ('callback"', 'infeed', 'outfeed'):  # The names of targets.
    assert word not in compiled.as_text()


def states(seed):
  """What a checkpoint may hold: arrays of several dtypes, and keys."""
  key = jax.random.key(seed)
  return {
    'weights': jax.random.normal(key, (300,)),
    'half': jax.random.normal(key, (3,), jnp.bfloat16),
    'step': jnp.int32(seed),
    'key': key,
  }


def data_of(tree):
  """``tree`` with the data of its keys."""
  return {**tree, 'key': jax.random.key_data(tree['key'])}


def test_checkpoints(tmp_path):
  """The newest of two that are kept comes back bit for bit, keys and all."""
  saved = checkpoints.Checkpoints(tmp_path)
  for step in (1, 2, 3):
    saved.save(step, states(step), {'losses': [0.1 * step, None]})
  saved.close()
  reports = []
  opened = checkpoints.Checkpoints(tmp_path)
  assert opened.steps == [2, 3]
  restored, progress = opened.restore(lambda _: states(0), reports.append)
  assert_same_bits(data_of(restored), data_of(states(3)))
  assert progress['losses'] == [0.1 * 3, None]
  assert reports == []


def damage_flip(file):
  """Changes a bit in the middle."""
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def damage_cut(file):
  """Cuts the second half off."""
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2])


def remove_digests(file):
  """As a kill before they are written leaves it."""
  next(
    folder / checkpoints.DIGESTS
    for folder in file.parents
    if (folder / checkpoints.DIGESTS).exists()
  ).unlink()


@pytest.mark.parametrize('damage', [damage_flip, damage_cut, remove_digests])
@pytest.mark.parametrize('damaged', [(2,), (1, 2)])
def test_damaged_checkpoints(tmp_path, damage, damaged):
  """Damaged ones are reported, and the one before is used, if there is one."""
  saved = checkpoints.Checkpoints(tmp_path)
  for step in (1, 2):
    saved.save(step, states(step), {})
  saved.close()
  for step in damaged:
    files = [f for f in (tmp_path / str(step)).rglob('*') if f.is_file()]
    damage(max(files, key=lambda file: file.stat().st_size))
  reports = []
  opened = checkpoints.Checkpoints(tmp_path)
  restored = opened.restore(lambda _: states(0), reports.append)
  assert len(reports) == len(damaged)
  for step, report in zip(reversed(damaged), reports, strict=True):
    assert report.startswith(f'Checkpoint {step} is damaged, and left out: ')
  for step in damaged:  # Their numbers are free again.
    opened.save(step, states(5), {})
  assert opened.steps == [1, 2]
  again, _ = opened.restore(lambda _: states(0), reports.append)
  assert_same_bits(data_of(again), data_of(states(5)))
  if len(damaged) == 2:
    assert restored is None
  else:
    assert_same_bits(data_of(restored[0]), data_of(states(1)))


def read_scalars(folder):
  """What the event files in ``folder`` hold: (tag, step) to values."""
  scalars = collections.defaultdict(list)
  for file in folder.iterdir():
    content = file.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      for value in event.summary.value:
        scalars[value.tag, event.step].append(value.simple_value)
  return dict(scalars)


def test_summaries(tmp_path):
  """Each epoch is written once, by its run; what was there is replaced."""
  runs = [training.Run('sgd', 0.0, 3), training.Run('asam', 0.5, 3)]
  epochs = [[2.0, 4.0], [1.0, 3.0], [0.5, 2.0]]
  for num_before in (1, 3):  # Interrupted after the first, then resumed.
    curves = summaries.Summaries(tmp_path / 'tensorboard')
    for num_epochs in (num_before, 3):
      curves.add_epochs('final', runs, {'train_loss': epochs[:num_epochs]})
    curves.add_measured('final', runs, {'test_accuracy': np.array([0.5, 0.75])})
    curves.close()
  for i, folder in enumerate(('sgd-0-3', 'asam-0.5-3')):
    scalars = read_scalars(tmp_path / 'tensorboard' / 'final' / folder)
    assert scalars == {
      **{('train_loss', 1 + n): [epoch[i]] for n, epoch in enumerate(epochs)},
      ('final/test_accuracy', 3): [0.5 + 0.25 * i],
    }


def test_tensorboard(tmp_path, capsys):
  """What the program writes for TensorBoard is what results.json holds."""
  train.main(
    [
      *('--optimizer=asam', '--rho=0.5', '--epochs=2', '--seeds=1'),
      *('--train-size=200', '--tensorboard', f'--out={tmp_path}'),
    ]
  )
  capsys.readouterr()
  results = json.loads((tmp_path / 'results.json').read_text())
  result = results['optimizers']['asam']
  scalars = read_scalars(tmp_path / 'tensorboard' / 'final' / 'asam-0.5-0')
  for quantity, values in result['curves'].items():
    for epoch in range(2):
      np.testing.assert_allclose(
        scalars[quantity, epoch + 1], values[epoch], rtol=1e-6
      )
  for quantity in ('test_accuracy', 'sharpness_asam_ball'):
    np.testing.assert_allclose(
      scalars[f'final/{quantity}', 2], result[quantity]['per_seed'], rtol=1e-6
    )
