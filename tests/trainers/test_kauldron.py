"""Promise: what docs/trainers.md says of Kauldron gives the steps of ASAM."""

import dataclasses

from flax import linen as nn
import jax
from kauldron import kd
import numpy as np
import optax

from tests.helpers import pages
from tests.helpers.support import error
from tests.helpers.training import assert_asam
from tests.helpers.training import assert_momentum_asam

CODE = '\n'.join(
  pages.read_snippets(pages.read_page('trainers'))['test_kauldron']
)
RNG = np.random.default_rng(0)
DATA = {
  'image': RNG.standard_normal((24, 5)).astype(np.float32),
  'label': RNG.integers(3, size=(24, 1)),
}
BATCHES = [
  {name: array[i : i + 8] for name, array in DATA.items()} for i in (0, 8, 16)
]


class Network(nn.Module):
  """Dense layers, with statistics and dropout unless ``plain``."""

  image: kd.kontext.Key = 'batch.image'
  plain: bool = False
  is_training = kd.nn.train_property()

  @nn.compact
  def __call__(self, image):
    """The logits of a batch."""
    hidden = nn.relu(nn.Dense(8)(image))
    if not self.plain:
      hidden = nn.BatchNorm(not self.is_training, momentum=0.5)(hidden)
      hidden = nn.Dropout(0.3, deterministic=not self.is_training)(hidden)
    return nn.Dense(3)(hidden)


def build(tmp_path, model, **kwargs):
  """A trainer on three batches."""
  ds = kd.data.InMemoryPipeline(
    loader=lambda: DATA, batch_size=8, shuffle=False
  )
  return kd.train.Trainer(
    seed=0,
    train_ds=ds,
    eval_ds=dataclasses.replace(ds, num_epochs=1),
    model=model,
    train_losses={
      'loss': kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits='preds', labels='batch.label'
      )
    },
    num_train_steps=2,  # The first one is step 0.
    workdir=tmp_path,
    **kwargs,
  )


def mean_loss(logits, batch):
  """The loss that the trainer is told of."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['label'][:, 0]
  ).mean()


def test_kauldron(tmp_path):
  """The train step: parameters and statistics."""
  train_step = pages.run_snippet(CODE, __name__=__name__)['AsamTrainStep']
  trainer = build(
    tmp_path,
    Network(),
    optimizer=optax.sgd(0.1, momentum=0.9),
    trainstep=train_step(rho=0.5),
  )
  state = jax.device_get(trainer.init_state())

  def loss_fn(params, extra, batch):
    step, collections = extra
    logits, collections = Network().apply(
      {'params': params, **collections},
      batch['image'],
      rngs=trainer.rng_streams.train_rngs(step),
      is_training_property=True,
      mutable=['batch_stats'],
    )
    return mean_loss(logits, batch), (step + 1, collections)

  trained, _ = trainer.train()
  trained = jax.device_get(trained)
  _, collections = assert_asam(
    trained.params,
    loss_fn,
    state.params,
    BATCHES,
    optax.sgd(0.1, momentum=0.9),
    extra=(0, state.collections),
    rho=0.5,
  )
  assert error(trained.collections, jax.device_get(collections)) < 1e-5


def test_kauldron_momentum(tmp_path):
  """The optimizer, and the parameters of evaluators."""
  names = pages.run_snippet(CODE, __name__=__name__)
  model = Network(plain=True)
  trainer = build(
    tmp_path,
    model,
    optimizer=names['optimizer'],
    evals={'eval': names['evaluator']},
  )
  params = jax.device_get(trainer.init_state().params)
  trained, _ = trainer.train()
  evaluated = names['UseEvalParams']().transform(trained).params

  def loss_fn(params, batch):
    return mean_loss(model.apply({'params': params}, batch['image']), batch)

  clean = assert_momentum_asam(
    jax.device_get(trained.params),
    jax.device_get(evaluated),
    jax.grad(loss_fn),
    params,
    BATCHES,
  )
  aux = trainer.evals['eval'].evaluate(trained, 3)
  np.testing.assert_allclose(
    aux.compute().loss_values['losses/loss'],
    np.mean([loss_fn(clean, batch) for batch in BATCHES]),
    rtol=1e-5,
  )
