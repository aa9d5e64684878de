"""ResNet-50 on ImageNet: SGD, SAM or ASAM.

::

    python experiments/imagenet.py --data-dir imagenet --optimizer asam

The paper's recipe: SGD with momentum 0.9 of learning rate 0.2, falling by a
cosine, weight decay 1e-4, batches of 512, 100 epochs, the radii that the paper
has chosen. Label smoothing 0.1 is usual; the paper does not say. One process
with all of its devices, over which batches are split. The files for validation,
whose labels are public, are read at the end.

Repeat the command with ``--resume`` after Ctrl-C, a kill or a crash.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import os
from pathlib import Path
import shutil
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
import optax_asam
import progress
import records

MOMENTUM = 0.9
RHO = {'sgd': 0.0, 'sam': 0.05, 'asam': 1.0}
# Of each channel over the images for training, from 0 to 1, as usual.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class State(NamedTuple):
  """What a step starts from."""

  params: optax.Params
  model_state: models.ModelState
  opt_state: optax.OptState


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the options."""
  parser = arguments.Parser(
    description='Trains a ResNet-50 on ImageNet.', allow_abbrev=False
  )
  add = parser.add_argument
  positive = lambda example: arguments.number(
    lambda x: x > 0, 'a number > 0', example
  )
  radius = arguments.number(lambda x: x >= 0, 'a number >= 0', '0.5')
  add('--data-dir', type=Path, required=True, help='with train and val')
  add('--optimizer', choices=list(RHO), default='asam', help='(asam)')
  add('--rho', type=radius, help='radius (sam 0.05, asam 1)')
  add('--eta', type=radius, default=0.01, help='stabilizer of ASAM (0.01)')
  add('--epochs', type=arguments.count(100), default=100, help='(100)')
  add('--batch-size', type=arguments.count(512), default=512, help='(512)')
  add('--lr', type=positive('0.2'), default=0.2, help='learning rate (0.2)')
  add('--weight-decay', type=radius, default=1e-4, help='(1e-4)')
  add('--label-smoothing', type=radius, default=0.1, help='(0.1)')
  add('--image-size', type=arguments.count(224), default=224, help='(224)')
  add('--seed', type=int, default=0, help='(0)')
  add(
    '--threads',
    type=arguments.count(16),
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
    train, val = (
      image_folder.ImageFolder(args.data_dir / split)
      for split in ('train', 'val')
    )
  except archives.DataError as error:
    parser.error(str(error))
  if train.classes != val.classes:
    parser.error(
      f'argument --data-dir: train and val must have the same classes, but have'
      f' {len(train.classes)} and {len(val.classes)}. Write the folder that'
      f' holds both.'
    )
  n = jax.device_count()
  if args.batch_size % n or args.batch_size > len(train):
    parser.error(
      f'argument --batch-size: must be a multiple of {n}, the number of'
      f' devices, and at most {len(train)}, the number of images, but got'
      f' {args.batch_size}. Write for example --batch-size {n}.'
    )
  arguments.check_out(parser, args)
  args.train, args.val = train, val
  return args


def make_model(num_classes: int) -> nn.Module:
  """The network."""
  return bottleneck.ResNet(num_classes)


def preprocess(images: jax.Array) -> jax.Array:
  """Maps uint8 images to float32 of mean 0 and standard deviation 1."""
  return (images / 255.0 - jnp.array(MEAN)) / jnp.array(STD)


def make_value_and_grad(args: argparse.Namespace, loss_fn: Any) -> Any:
  """The gradient that is descended: of the loss, of SAM or of ASAM."""
  if args.optimizer == 'sgd':
    return jax.value_and_grad(loss_fn, has_aux=True)
  adaptive = args.optimizer == 'asam'
  return optax_asam.value_and_grad(
    loss_fn,
    has_aux=True,
    rho=args.rho,
    adaptive=adaptive,
    **({'eta': args.eta} if adaptive else {}),
  )


class Training:
  """The run; each epoch leaves a checkpoint.

  Attributes:
    train_loss: The mean loss of the steps of each epoch, before each of them.
  """

  def __init__(self, args: argparse.Namespace):
    self._args = args
    self._model = make_model(len(args.train.classes))
    num_steps = len(args.train) // args.batch_size
    self._num_steps = num_steps
    self._tx = optax.chain(
      optax.add_decayed_weights(args.weight_decay),
      optax.sgd(
        optax.cosine_decay_schedule(args.lr, args.epochs * num_steps),
        momentum=MOMENTUM,
      ),
    )
    mesh = jax.make_mesh((jax.device_count(),), ('batch',))
    spec = jax.sharding.PartitionSpec
    self._by_batch = jax.sharding.NamedSharding(mesh, spec('batch'))
    self._replicated = jax.sharding.NamedSharding(mesh, spec())
    self._checkpoints = checkpoints.Checkpoints(args.out / 'checkpoints')
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
    (loss, model_state), grads = make_value_and_grad(self._args, loss_fn)(
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
          args.train,
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
      args.val, args.batch_size, args.image_size, threads=args.threads
    ):
      # The last one need not be a multiple of the devices.
      is_full = len(batch.labels) == args.batch_size
      sharding = self._by_batch if is_full else self._replicated
      correct += np.asarray(self._count(state, jax.device_put(batch, sharding)))
    top_1, top_5 = correct / len(args.val)
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
  args = parse(argv)
  provenance = records.provenance('experiments/imagenet.py', argv)
  training = Training(args)
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
          name: value
          for name, value in vars(args).items()
          if name not in ('train', 'val')
        },
        'images': {'train': len(args.train), 'val': len(args.val)},
        'train_loss': training.train_loss,
        **accuracies,
      },
    )
  print(
    f'{args.optimizer}: {100 * accuracies["top_1_accuracy"]:.2f} % top 1,'
    f' {100 * accuracies["top_5_accuracy"]:.2f} % top 5'
  )
  (args.out / 'checkpoints.json').unlink()
  shutil.rmtree(args.out / 'checkpoints')


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except archives.DataError as error:
    sys.exit(f'{error} Then write --resume.')
  except KeyboardInterrupt:
    sys.exit(130)  # As a shell reports it.
