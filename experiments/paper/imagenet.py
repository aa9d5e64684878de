"""ResNet-50 on ImageNet: SGD, SAM or ASAM.

::

    python -m experiments.paper.imagenet --data-dir imagenet --optimizer asam

The recipe, of which only the radii have been verified against the paper: SGD
with momentum 0.9, learning rate 0.2 with a cosine schedule, weight decay 1e-4,
label smoothing 0.1, batches of 512, 100 epochs (SGD: 200). One process splits
batches over all of its devices, with one perturbation for the whole batch. The
validation set, whose labels are public, is evaluated once at the end.

Repeat the command with ``--resume`` after Ctrl-C, a kill or a crash.
"""

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
import sys
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import checkpoints
from experiments import cli
from experiments import methods
from experiments import models
from experiments.data import archives
from experiments.models import bottleneck
from experiments.paper import image_folder
from experiments.paper import program
from experiments.report import progress

RHO = {'sgd': 0.0, 'sam': 0.05, 'asam': 1.0}
# The usual statistics of the training set, per channel, for values in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class State(NamedTuple):
  """All that a step changes."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState


class Images(NamedTuple):
  """The files for training and those for validation."""

  train: image_folder.ImageFolder
  val: image_folder.ImageFolder


def make_parser() -> cli.Parser:
  """The options and their help."""
  parser = cli.Parser(
    prog='imagenet',
    description='Trains a ResNet-50 on ImageNet.',
  )
  add = parser.add_argument
  add('--data-dir', type=Path, required=True, help='with train and val')
  add('--optimizer', choices=list(RHO), default='asam', help='(asam)')
  add('--rho', type=cli.nonnegative(0.5), help='radius (sam 0.05, asam 1)')
  program.add_numbers(
    parser,
    ('eta', cli.nonnegative, 0.01, 'eta of ASAM'),
    ('epochs', cli.count, 100, 'number of epochs'),
    ('batch-size', cli.count, 512, 'examples a step'),
    ('lr', cli.positive, 0.2, 'initial learning rate'),
    ('weight-decay', cli.nonnegative, 1e-4, 'L2 penalty'),
    ('label-smoothing', cli.fraction, 0.1, 'in training'),
    ('image-size', cli.count, 224, 'height and width'),
    ('threads', cli.count, os.cpu_count() or 1, 'files read in parallel'),
  )
  add('--seed', type=cli.natural(0), default=0, help='(0)')
  add('--out', type=Path, default=Path('out/imagenet'), help='for results')
  add('--resume', action='store_true', help='resume the run in --out')
  return parser


def parse(
  parser: cli.Parser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Images]:
  """Reads the command line; exits if it is wrong."""
  args = parser.parse_args(argv)
  if args.optimizer == 'sgd' and args.rho is not None:
    parser.error('argument --rho: SGD has none. Leave it out.')
  if args.rho is None:
    args.rho = RHO[args.optimizer]
  try:
    images = Images(
      *(image_folder.ImageFolder(args.data_dir / x) for x in Images._fields)
    )
  except archives.DataError as error:
    parser.error(str(error))
  classes = [each.classes for each in images]
  if classes[0] != classes[1]:
    parser.error(
      f'argument --data-dir: train and val must have the same classes, but have'
      f' {len(classes[0])} and {len(classes[1])}. Write the folder that holds'
      f' both.'
    )
  n = jax.device_count()
  if args.batch_size % n or args.batch_size > len(images.train):
    parser.error(
      f'argument --batch-size: must be a multiple of {n}, the number of'
      f' devices, and at most {len(images.train)}, the number of images, but'
      f' got {args.batch_size}. For example: --batch-size {n}.'
    )
  return args, images


def preprocess(images: jax.Array) -> jax.Array:
  """Maps uint8 images to float32 with mean 0 and standard deviation 1."""
  return (images / 255.0 - jnp.array(MEAN)) / jnp.array(STD)


def count_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """How many labels are the first guess, and among the first five, [2]."""
  guesses = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
  is_right = guesses == labels[:, None]
  return jnp.stack([is_right[:, 0].sum(), is_right.sum()])


class Training:
  """A run with a checkpoint after each epoch.

  Attributes:
    results: The mean training loss of each epoch and, at the end, accuracies.
  """

  def __init__(self, args: argparse.Namespace, images: Images):
    self._args = args
    self._images = images
    self._model: nn.Module = bottleneck.ResNet(len(images.train.classes))
    self._num_steps = len(images.train) // args.batch_size
    self._tx = methods.make_base_tx(args, args.epochs * self._num_steps)
    mesh = jax.make_mesh((jax.device_count(),), ('batch',))
    spec = jax.sharding.PartitionSpec
    self._by_batch = jax.sharding.NamedSharding(mesh, spec('batch'))
    self._replicated = jax.sharding.NamedSharding(mesh, spec())
    self._checkpoints = checkpoints.Checkpoints(args.out / checkpoints.FOLDER)
    self.results: dict[str, Any] = {'train_loss': []}
    self._step = jax.jit(self._take_step, donate_argnums=0)
    self._count = jax.jit(self._count_batch)

  def _init(self) -> State:
    size = self._args.image_size
    params, model_state = models.init(
      self._model,
      jax.random.key(self._args.seed),
      jnp.zeros([1, size, size, 3]),
    )
    return State(params, model_state, self._tx.init(params))

  def _take_step(self, state, batch):
    args = self._args

    def loss_fn(params, model_state):
      return models.train_loss_fn(
        params,
        model_state,
        self._model,
        batch._replace(images=preprocess(batch.images)),
        label_smoothing=args.label_smoothing,
      )

    value_and_grad = program.value_and_grad(
      args.optimizer, loss_fn, rho=args.rho, eta=args.eta, has_aux=True
    )
    (loss, model_state), grads = value_and_grad(state.params, state.model_state)
    updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, model_state, opt_state), loss

  def _count_batch(self, state, batch):
    logits = models.apply_eval(
      state.params, state.model_state, self._model, preprocess(batch.images)
    )
    return count_correct(logits, batch.labels)

  def run(self) -> None:
    """Trains the remaining epochs, and evaluates on the validation set."""
    args, losses = self._args, self.results['train_loss']
    state, restored = self._init(), None
    if args.resume:
      restored = self._checkpoints.restore(lambda _: state, print)
    if restored:
      state, saved = restored
      losses += saved['train_loss']
    state = jax.device_put(state, self._replicated)
    total = args.epochs * self._num_steps
    with progress.shown(len(losses) * self._num_steps, total) as advance:
      for epoch in range(len(losses), args.epochs):
        state, loss = self._train_epoch(state, epoch, advance)
        losses.append(loss)
        self._checkpoints.save(epoch, state, {'train_loss': losses})
    self.results |= self._evaluate(state)

  def _train_epoch(self, state, epoch, advance) -> tuple[State, float]:
    losses = []
    for batch in image_folder.train_batches(
      self._images.train,
      self._args.batch_size,
      self._args.image_size,
      seed=seed_of_epoch(self._args.seed, epoch),
      threads=self._args.threads,
    ):
      batch = jax.device_put(batch, self._by_batch)
      state, loss = self._step(state, batch)
      losses.append(loss)
      advance(1)
    return state, float(np.mean(jax.device_get(losses)))

  def _evaluate(self, state: State) -> dict[str, float]:
    args = self._args
    correct = np.zeros(2)
    for batch in image_folder.eval_batches(
      self._images.val, args.batch_size, args.image_size, threads=args.threads
    ):
      # The last batch need not be divisible by the number of devices.
      is_full = len(batch.labels) == args.batch_size
      sharding = self._by_batch if is_full else self._replicated
      correct += np.asarray(self._count(state, jax.device_put(batch, sharding)))
    top_1, top_5 = (correct / len(self._images.val)).tolist()
    return {'top_1_accuracy': top_1, 'top_5_accuracy': top_5}


def seed_of_epoch(seed: int, epoch: int) -> int:
  """A seed for the order and crops of an epoch."""
  [state] = np.random.SeedSequence([seed, epoch]).generate_state(1)
  return int(state) // 2  # Grain needs an int32.


def main(argv: Sequence[str]) -> None:
  """Trains, evaluates and records."""
  parser = make_parser()
  args, images = parse(parser, argv)
  training = Training(args, images)
  results = training.results
  describe = lambda: {
    'complete': 'top_1_accuracy' in results,
    'config': {**vars(args), 'momentum': methods.MOMENTUM},
    'images': {name: len(each) for name, each in images._asdict().items()},
    **results,
  }
  with program.recorded(parser, argv, args, describe):
    training.run()
  top_1, top_5 = results['top_1_accuracy'], results['top_5_accuracy']
  print(f'{args.optimizer}: {top_1:.2%} top 1, {top_5:.2%} top 5')


if __name__ == '__main__':
  try:
    cli.run(main)
  except archives.DataError as error:
    sys.exit(f'{error} Then write --resume.')
