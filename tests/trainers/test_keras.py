"""Promise: the Keras model of docs/trainers.md descends ASAM's gradient."""

import keras
import numpy as np
import optax

from optax_asam import normalization
from tests.helpers import pages
from tests.helpers.support import error
from tests.helpers.training import assert_asam

(SNIPPET,) = pages.read_snippets(pages.read_page('trainers'))['test_keras']
BATCHES = [
  (rng.standard_normal((8, 5)).astype(np.float32), rng.integers(3, size=8))
  for rng in map(np.random.default_rng, range(3))
]


def build(cls):
  """A network with statistics, dropout keys and biases of two names."""
  keras.utils.set_random_seed(0)
  inputs = keras.Input((5,))
  hidden = keras.layers.Dense(8, activation='relu')(inputs)
  hidden = keras.layers.BatchNormalization(momentum=0.5)(hidden)
  hidden = keras.layers.Dropout(0.3)(hidden)
  return cls(inputs, keras.layers.Dense(3)(hidden))


def arrays(variables):
  """The values of variables."""
  return [np.asarray(variable.value) for variable in variables]


def test_keras():
  """Weights, statistics and keys after ``fit``, and its logs."""
  model = build(pages.run_snippet(SNIPPET, __name__=__name__)['AsamModel'])
  model.compile(
    keras.optimizers.SGD(0.1, momentum=0.9),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=['accuracy'],
  )
  reference = build(keras.Model)
  names = [v.path.split('/')[-1] for v in model.trainable_variables]
  assert names == ['kernel', 'bias', 'gamma', 'beta', 'kernel', 'bias']

  def loss_fn(params, extra, batch):
    x, y = batch
    (losses, correct), state = extra
    logits, state = reference.stateless_call(params, state, x, training=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    accuracy = (logits.argmax(-1) == y).mean()
    return loss, ((losses + loss, correct + accuracy), state)

  params = arrays(model.trainable_variables)
  state = arrays(model.non_trainable_variables)
  x, y = map(np.concatenate, zip(*BATCHES, strict=True))
  history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
  (loss, accuracy), state = assert_asam(
    arrays(model.trainable_variables),
    loss_fn,
    params,
    BATCHES,
    optax.sgd(0.1, momentum=0.9),
    extra=((0.0, 0.0), state),
    rho=0.5,
    adaptive=normalization.elementwise(
      mask=[name in ('kernel', 'gamma') for name in names]
    ),
  )
  trained_state = arrays(model.non_trainable_variables)
  assert error(trained_state, list(map(np.asarray, state))) < 1e-5
  np.testing.assert_allclose(history['loss'], loss / 3, rtol=1e-5)
  np.testing.assert_allclose(history['accuracy'], accuracy / 3, rtol=1e-5)
