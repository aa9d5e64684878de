"""Trains many networks, each with settings of its own, to one training loss.

Networks that differ in learning rate, weight decay, dropout and seed alone are
one program, mapped over them.
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

import data
import models

MOMENTUM = 0.9
HIDDEN_SIZES = (256, 256)
# How often in an epoch the loss on the whole training set is looked at, from
# when a network's is at most NEAR times the target; before, once.
LOOKS, NEAR = 4, 2.0


class Settings(NamedTuple):
  """What networks are trained with, each an array [networks]."""

  batch_size: Any
  lr: Any
  weight_decay: Any
  dropout: Any
  seed: Any


class Trained(NamedTuple):
  """Networks at the first look at which their loss was low enough.

  Attributes:
    params: Their parameters, with a leading axis of networks; NaN for one that
      did not get there.
    train_loss: Their loss on the whole training set, without dropout,
      [networks].
    epochs: How long it took, [networks].
  """

  params: optax.Params
  train_loss: np.ndarray
  epochs: np.ndarray


class TrainState(NamedTuple):
  """What a step of one network starts from.

  Attributes:
    params: Its parameters.
    opt_state: The state of SGD.
    key: The random key of the epochs to come.
    step_key: That of the dropout in this epoch.
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
    """Maps images [n, ...] to logits; without a key nothing is dropped.

    Flax's own dropout wants a rate that is a Python number.
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
  logits = _apply(params, network, split.images, *dropout)
  return models.cross_entropies(logits, split.labels).mean()


def error_rate(
  params: optax.Params, network: Network, split: data.Split
) -> jax.Array:
  """The fraction of wrong predictions."""
  logits = _apply(params, network, split.images)
  return jnp.mean(jnp.argmax(logits, axis=-1) != split.labels)


def _apply(
  params: optax.Params, network: Network, images: data.Array, *dropout: Any
) -> jax.Array:
  variables: dict[str, Any] = {'params': params}
  return jnp.asarray(network.apply(variables, images, *dropout))


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
    split: What they are trained on, with images as networks take them.
    target: The loss on the whole training set at which training ends.
    max_epochs: How long a network may take.
    report: Is told how far it is, now and then.
  """
  network = Network(num_classes)
  count, n = len(settings.lr), len(split.labels)
  [batch_size] = set(settings.batch_size)
  num_steps = n // batch_size
  hyper = [jnp.asarray(x, jnp.float32) for x in settings[1:4]]
  init = functools.partial(_init, network, split)
  state = jax.jit(jax.vmap(init))(jnp.asarray(settings.seed, jnp.uint32))
  shuffle = jax.jit(jax.vmap(functools.partial(_shuffle, n)))
  step = jax.jit(
    jax.vmap(
      functools.partial(_step, network, batch_size),
      in_axes=(0, 0, 0, 0, None, None),
    )
  )
  all_losses = jax.jit(
    jax.vmap(loss_fn, in_axes=(0, None, None)), static_argnums=1
  )

  reached = Trained(
    jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), state.params),
    np.full(count, np.nan),
    np.full(count, np.nan),
  )
  active = np.arange(count)
  missing, is_near = np.full(count, True), False
  for epoch in range(max_epochs):
    state = shuffle(state)
    for i in range(num_steps):
      state = step(state, *hyper, split, i)
      done = i + 1
      is_look = is_near and done % max(1, num_steps // LOOKS) == 0
      if not is_look and done < num_steps:
        continue
      losses = np.asarray(all_losses(state.params, network, split))
      is_new = (losses <= target) & np.isnan(reached.train_loss[active])
      new = active[is_new]
      reached.train_loss[new] = losses[is_new]
      reached.epochs[new] = epoch + done / num_steps
      for mine, theirs in zip(
        jax.tree.leaves(reached.params),
        jax.tree.leaves(state.params),
        strict=True,
      ):
        mine[new] = np.asarray(theirs)[is_new]
      missing = np.isnan(reached.train_loss[active])
      is_near = np.min(losses[missing], initial=np.inf) <= NEAR * target
    report(f'epoch {epoch + 1}: {missing.sum()} of {count} networks left')
    if not missing.any():
      break
    # A program for fewer networks is compiled when that saves half of the work.
    if 2 * missing.sum() <= len(active):
      active = active[missing]
      state, hyper = jax.tree.map(lambda x, m=missing: x[m], (state, hyper))
  return reached


def _init(network: Network, split: data.Split, seed: jax.Array) -> TrainState:
  init_key, key = jax.random.split(jax.random.key(seed))
  params = network.init(init_key, split.images[:1])['params']
  order = jnp.arange(len(split.labels))
  return TrainState(params, _make_tx(0.0, 0.0).init(params), key, key, order)


def _shuffle(n: int, state: TrainState) -> TrainState:
  key, order_key, step_key = jax.random.split(state.key, 3)
  return state._replace(
    key=key, step_key=step_key, order=jax.random.permutation(order_key, n)
  )


def _make_tx(lr: Any, weight_decay: Any) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(lr, momentum=MOMENTUM)
  )


def _step(
  network: Network,
  batch_size: int,
  state: TrainState,
  lr: jax.Array,
  weight_decay: jax.Array,
  dropout: jax.Array,
  split: data.Split,
  i: jax.Array,
) -> TrainState:
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
