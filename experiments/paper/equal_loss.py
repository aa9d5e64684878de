"""Trains many networks, each with its own settings, to the same training loss.

Networks that differ only in learning rate, weight decay, dropout and seed share
one compiled step, mapped over them.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data

MOMENTUM = 0.9
HIDDEN_SIZES = (256, 256)
# How often per epoch the loss on the whole training set is checked, once that
# of some network is at most NEAR times the target; until then, once.
LOOKS, NEAR = 4, 2.0


class Settings(NamedTuple):
  """What networks are trained with, each an array [networks]."""

  batch_size: Any
  lr: Any
  weight_decay: Any
  dropout: Any
  seed: Any


class Trained(NamedTuple):
  """Networks at the first check at which their loss was low enough.

  Attributes:
    params: Their parameters with a leading axis of networks; NaN for a network
      that did not reach the target.
    train_loss: Their loss on the whole training set, without dropout,
      [networks].
    epochs: How long it took, [networks].
  """

  params: optax.Params
  train_loss: np.ndarray
  epochs: np.ndarray


class TrainState(NamedTuple):
  """The state of one network between steps.

  Attributes:
    params: Its parameters.
    opt_state: The state of SGD.
    key: The random key of the epochs to come.
    step_key: The random key of this epoch's dropout.
    order: The order of the examples in this epoch.
  """

  params: optax.Params
  opt_state: optax.OptState
  key: jax.Array
  step_key: jax.Array
  order: jax.Array


class Network(nn.Module):
  """A multilayer perceptron with dropout after each hidden layer."""

  num_classes: int

  @nn.compact
  def __call__(
    self, images: jax.Array, dropout: Any = 0.0, key: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [n, ...] to logits; without a key, nothing is dropped.

    ``nn.Dropout`` takes no traced rate.
    """
    x = images.reshape(images.shape[0], -1)
    for i, size in enumerate(HIDDEN_SIZES):
      x = nn.relu(nn.Dense(size)(x))
      if key is not None:
        keep = jax.random.bernoulli(
          jax.random.fold_in(key, i), 1 - dropout, x.shape
        )
        x = jnp.where(keep, x / (1 - dropout), 0)
    return nn.Dense(self.num_classes)(x)


def loss_fn(
  params: optax.Params, network: Network, split: data.Split, *dropout: Any
) -> jax.Array:
  """The mean cross-entropy; ``dropout`` is a rate and a key, or nothing."""
  variables: Any = {'params': params}
  logits: Any = network.apply(variables, split.images, *dropout)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, split.labels
  ).mean()


def error_rate(
  params: optax.Params, network: Network, split: data.Split
) -> jax.Array:
  """The fraction of wrong predictions."""
  variables: Any = {'params': params}
  logits: Any = network.apply(variables, split.images)
  return jnp.mean(jnp.argmax(logits, axis=-1) != split.labels)


def train(
  settings: Settings,
  num_classes: int,
  split: data.Split,
  *,
  target: float,
  max_epochs: int,
  report: Callable[[str], None],
) -> Trained:
  """Trains networks of one batch size until each has reached a loss.

  Args:
    settings: Their settings, all with the same batch size.
    num_classes: The number of classes.
    split: The training set, preprocessed.
    target: The loss on the whole training set at which training ends.
    max_epochs: The number of epochs after which a network is given up.
    report: Called with a line of progress after each epoch.
  """
  network = Network(num_classes)
  count, n = len(settings.lr), len(split.labels)
  [batch_size] = set(settings.batch_size)
  num_steps = n // batch_size
  hyper = [jnp.asarray(x, jnp.float32) for x in settings[1:4]]
  state = _init(network, split, jnp.asarray(settings.seed, jnp.uint32))
  reached = Trained(
    jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), state.params),
    np.full(count, np.nan),
    np.full(count, np.nan),
  )
  active = np.arange(count)
  missing, is_near = np.full(count, True), False
  for epoch in range(max_epochs):
    state = _shuffle(state)
    for done in range(1, num_steps + 1):
      state = _step(network, batch_size, state, *hyper, split, done - 1)
      is_look = is_near and done % max(1, num_steps // LOOKS) == 0
      if not is_look and done < num_steps:
        continue
      losses = np.asarray(_losses(state.params, network, split))
      is_new = (losses <= target) & np.isnan(reached.train_loss[active])
      new = active[is_new]
      reached.train_loss[new] = losses[is_new]
      reached.epochs[new] = epoch + done / num_steps
      for kept, now in zip(
        jax.tree.leaves(reached.params),
        jax.tree.leaves(state.params),
        strict=True,
      ):
        kept[new] = np.asarray(now)[is_new]
      missing = np.isnan(reached.train_loss[active])
      is_near = np.min(losses[missing], initial=np.inf) <= NEAR * target
    report(f'epoch {epoch + 1}: {missing.sum()} of {count} networks left')
    if not missing.any():
      break
    # Recompile for fewer networks only when that halves the work.
    if 2 * missing.sum() <= len(active):
      active = active[missing]
      state, hyper = jax.tree.map(lambda x, m=missing: x[m], (state, hyper))
  return reached


# Each of these maps over networks.
_losses = jax.jit(jax.vmap(loss_fn, (0, None, None)), static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def _init(network: Network, split: data.Split, seed: jax.Array) -> TrainState:
  init_key, key = jax.random.split(jax.random.key(seed))
  params = network.init(init_key, split.images[:1])['params']
  order = jnp.arange(len(split.labels))
  return TrainState(params, _make_tx(0.0, 0.0).init(params), key, key, order)


@jax.jit
@jax.vmap
def _shuffle(state: TrainState) -> TrainState:
  key, order_key, step_key = jax.random.split(state.key, 3)
  return state._replace(
    key=key,
    step_key=step_key,
    order=jax.random.permutation(order_key, len(state.order)),
  )


def _make_tx(lr: Any, weight_decay: Any) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(lr, momentum=MOMENTUM)
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, 0, 0, None, None))
def _step(network, batch_size, state, lr, weight_decay, dropout, split, i):
  """The i-th step of an epoch of one network."""
  indices = jax.lax.dynamic_slice_in_dim(
    state.order, i * batch_size, batch_size
  )
  batch = jax.tree.map(lambda x: x[indices], split)
  grads = jax.grad(loss_fn)(
    state.params, network, batch, dropout, jax.random.fold_in(state.step_key, i)
  )
  updates, opt_state = _make_tx(lr, weight_decay).update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  return state._replace(params=params, opt_state=opt_state)
