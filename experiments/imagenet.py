"""ResNet-50 on ImageNet: SGD, SAM or ASAM.

::

    python experiments/imagenet.py --data-dir imagenet --optimizer asam

The paper's recipe: SGD with momentum 0.9 of learning rate 0.2, falling by a
cosine, weight decay 1e-4, batches of 512, 100 epochs, the radii that the paper
has chosen; SGD had twice the epochs. Label smoothing 0.1 is usual; the paper
does not say. One process with all of its devices, over which batches are split;
the perturbation is one for the whole batch, where the paper's, as recalled, is
that of each device. The files for validation, whose labels are public, are read
at the end.

Repeat the command with ``--resume`` after Ctrl-C, a kill or a crash.
"""

import argparse
from collections.abc import Mapping
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

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
import archives
import arguments
import bottleneck
import checkpoints
import image_folder
import models
import optimizers
import presets
import progress
import records

# Of what the optimizers of examples/ can vary, the paper's.
FIXED = {
  name: presets.DEFAULTS[name]
  for name in (
    *('normalization', 'normalize_biases', 'ord', 'perturb', 'm_sharpness'),
  )
}
# Kwon et al., 2021: accuracies in %, top 1 and top 5, as recalled: nobody has
# read them again in the paper.
PAPER = {
  'sgd': (75.79, 92.62),
  'sam': (76.39, 92.97),
  'asam': (76.63, 93.16),
}
RHO = {'sgd': 0.0, 'sam': 0.05, 'asam': 1.0}
# Of each channel over the images for training, from 0 to 1, as usual.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class State(NamedTuple):
  """What a step starts from."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState


class Images(NamedTuple):
  """The files for training and those for validation."""

  train: image_folder.ImageFolder
  val: image_folder.ImageFolder


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Images]:
  """Reads the command line, with an exit if it cannot be done as it says."""
  parser = arguments.Parser(
    description='Trains a ResNet-50 on ImageNet.', allow_abbrev=False
  )
  parser.set_defaults(**FIXED)
  add = parser.add_argument
  nonnegative, count = arguments.nonnegative, arguments.count
  add('--data-dir', type=Path, required=True, help='with train and val')
  add('--optimizer', choices=list(RHO), default='asam', help='(asam)')
  add('--rho', type=nonnegative(0.5), help='radius (sam 0.05, asam 1)')
  add('--eta', type=nonnegative(0.01), default=0.01, help='of ASAM (0.01)')
  add('--epochs', type=count(100), default=100, help='(100)')
  add('--batch-size', type=count(512), default=512, help='(512)')
  add('--lr', type=arguments.positive(0.2), default=0.2, help='at first (0.2)')
  add('--weight-decay', type=nonnegative(1e-4), default=1e-4, help='(1e-4)')
  add(
    '--label-smoothing',
    type=arguments.fraction(0.1),
    default=0.1,
    help='(0.1)',
  )
  add('--image-size', type=count(224), default=224, help='(224)')
  add('--seed', type=int, default=0, help='(0)')
  add(
    '--threads',
    type=count(16),
    default=os.cpu_count() or 1,
    help='files that are read at a time (one for each core)',
  )
  add('--out', type=Path, default=Path('out/imagenet'), help='for results')
  add('--resume', action='store_true', help='go on where a run was interrupted')
  args = parser.parse_args(argv)
  if args.optimizer == 'sgd' and args.rho is not None:
    parser.error('argument --rho: SGD has none. Leave it out.')
  if args.rho is None:
    args.rho = RHO[args.optimizer]
  try:
    images = Images(
      *(
        image_folder.ImageFolder(args.data_dir / split)
        for split in Images._fields
      )
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
      f' got {args.batch_size}. Write for example --batch-size {n}.'
    )
  arguments.check_out(parser, args)
  return args, images


def preprocess(images: jax.Array) -> jax.Array:
  """Maps uint8 images to float32 of mean 0 and standard deviation 1."""
  return (images / 255.0 - jnp.array(MEAN)) / jnp.array(STD)


class Training:
  """The run; each epoch leaves a checkpoint.

  Attributes:
    train_loss: The mean loss of the steps of each epoch, before each of them.
  """

  def __init__(self, args: argparse.Namespace, images: Images):
    self._args = args
    self._images = images
    self._model: nn.Module = bottleneck.ResNet(len(images.train.classes))
    self._num_steps = len(images.train) // args.batch_size
    self._tx = optimizers.make_base_tx(args, args.epochs * self._num_steps)
    mesh = jax.make_mesh((jax.device_count(),), ('batch',))
    spec = jax.sharding.PartitionSpec
    self._by_batch = jax.sharding.NamedSharding(mesh, spec('batch'))
    self._replicated = jax.sharding.NamedSharding(mesh, spec())
    self._checkpoints = checkpoints.Checkpoints(args.out / checkpoints.FOLDER)
    self.train_loss: list[float] = []
    self._step = jax.jit(self._take_step, donate_argnums=0)
    self._count = jax.jit(self._count_correct)

  def _init(self) -> State:
    size = self._args.image_size
    params, model_state = models.init(
      self._model,
      jax.random.key(self._args.seed),
      jnp.zeros([1, size, size, 3]),
    )
    return State(params, model_state, self._tx.init(params))

  def _take_step(self, state, batch):
    def loss_fn(params, model_state, batch):
      return models.train_loss_fn(
        params,
        model_state,
        self._model,
        batch,
        label_smoothing=self._args.label_smoothing,
      )

    batch = batch._replace(images=preprocess(batch.images))
    value_and_grad = optimizers.make_value_and_grad(
      self._args.optimizer, loss_fn, self._args.rho, self._args
    )
    (loss, model_state), grads = value_and_grad(
      state.params, state.model_state, batch
    )
    updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, model_state, opt_state), loss

  def _count_correct(self, state, batch):
    """How many labels are the first guess, and among the first five."""
    logits = models.apply_eval(
      state.params, state.model_state, self._model, preprocess(batch.images)
    )
    guesses = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    is_right = guesses == batch.labels[:, None]
    return jnp.stack([is_right[:, 0].sum(), is_right.sum()])

  def train(self) -> dict[str, float]:
    """Trains what is left; returns the accuracies on the validation set."""
    args = self._args
    state = self._restore() if args.resume else None
    state = self._init() if state is None else state
    state = jax.device_put(state, self._replicated)
    done = len(self.train_loss) * self._num_steps
    with progress.shown(done, args.epochs * self._num_steps) as advance:
      for epoch in range(len(self.train_loss), args.epochs):
        losses = []
        for batch in image_folder.train_batches(
          self._images.train,
          args.batch_size,
          args.image_size,
          seed=seed_of_epoch(args.seed, epoch),
          threads=args.threads,
        ):
          batch = jax.device_put(batch, self._by_batch)
          state, loss = self._step(state, batch)
          losses.append(loss)
          advance(1)
        self.train_loss.append(float(np.mean(jax.device_get(losses))))
        self._checkpoints.save(epoch, state, {'train_loss': self.train_loss})
    return self._evaluate(state)

  def _evaluate(self, state: State) -> dict[str, float]:
    args = self._args
    correct = np.zeros(2)
    for batch in image_folder.eval_batches(
      self._images.val, args.batch_size, args.image_size, threads=args.threads
    ):
      # The last one need not be a multiple of the devices.
      is_full = len(batch.labels) == args.batch_size
      sharding = self._by_batch if is_full else self._replicated
      correct += np.asarray(self._count(state, jax.device_put(batch, sharding)))
    top_1, top_5 = correct / len(self._images.val)
    return {'top_1_accuracy': float(top_1), 'top_5_accuracy': float(top_5)}

  def _restore(self) -> State | None:
    def make_state(saved: Mapping[str, Any]) -> State:
      self.train_loss = saved['train_loss']
      return self._init()

    restored = self._checkpoints.restore(make_state, print)
    return restored[0] if restored else None


def seed_of_epoch(seed: int, epoch: int) -> int:
  """A seed for order and crops of an epoch."""
  [state] = np.random.SeedSequence([seed, epoch]).generate_state(1)
  return int(state) // 2  # Grain wants an int32.


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  args, images = parse(argv)
  provenance = records.provenance(
    'experiments/imagenet.py', argv, args.out / arguments.STARTED_WITH
  )
  training = Training(args, images)
  accuracies = {}
  try:
    accuracies = training.train()
  finally:
    # Ctrl-C, too, leaves what there is.
    records.write_json(
      args.out / 'results.json',
      {
        **provenance,
        'complete': bool(accuracies),
        'config': {
          **vars(args),
          'ord': f'{args.ord:g}',  # JSON has no inf.
          'momentum': optimizers.MOMENTUM,
        },
        'images': {name: len(each) for name, each in images._asdict().items()},
        'train_loss': training.train_loss,
        **accuracies,
      },
    )
  top_1, top_5 = PAPER[args.optimizer]
  print(
    f'{args.optimizer}: {100 * accuracies["top_1_accuracy"]:.2f} % top 1,'
    f' {100 * accuracies["top_5_accuracy"]:.2f} % top 5; in the paper, as'
    f' recalled, {top_1:.2f} and {top_5:.2f} %'
  )
  arguments.finish(args.out)


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except archives.DataError as error:
    sys.exit(f'{error} Then write --resume.')
  except KeyboardInterrupt:
    sys.exit(130)  # As a shell reports it.
