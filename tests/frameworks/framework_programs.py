"""The train steps of the docs behind one interface, for the tests.

Every framework keeps the same network in a tree of its own. Here, weights and
statistics are dicts of the same NumPy arrays for all: kernels as Flax lays them
out, and the running sums of BatchNorm, before any debiasing.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import equinox as eqx
import equinox_step
from flax import nnx
import haiku as hk
import haiku_step
import jax
import jax.numpy as jnp
import linen_step
import nnx_step
import numpy as np
import optax

from optax_asam import asam


class Program(NamedTuple):
  """A train step.

  Attributes:
    start: from weights and a dropout key to the state before the first step.
    step: from a state and a batch to the next state and the loss.
    weights: the weights in a state.
    statistics: the statistics in a state.
    plain_pass: what one pass of the plain network at ``weights`` gives, under
      the statistics of ``state`` and the dropout key of its next step: from
      weights, state and batch to loss, new statistics and gradient.
  """

  start: Callable
  step: Callable
  weights: Callable
  statistics: Callable
  plain_pass: Callable


def make_tx(rho, **asam_args):
  """ASAM on SGD with momentum."""
  return asam(optax.sgd(0.1, momentum=0.9), rho=rho, **asam_args)


def mean_loss(logits, labels):
  """Cross-entropy."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def initial_statistics(weights):
  """Mean and variance before the first step."""
  return as_jax(
    (np.zeros_like(weights['shift']), np.ones_like(weights['scale']))
  )


def as_jax(tree):
  """The same in JAX arrays."""
  return jax.tree.map(jnp.asarray, tree)


def as_numpy(tree):
  """The same in NumPy arrays."""
  return jax.tree.map(np.asarray, tree)


def plain_pass(forward, frozen):
  """From ``forward(weights, *frozen(state), batch) -> (loss, statistics)``."""
  value_and_grad_fn = eqx.filter_jit(jax.value_and_grad(forward, has_aux=True))

  def plain_pass(weights, state, batch):
    weights, batch = as_jax((weights, batch))
    (loss, statistics), grads = value_and_grad_fn(
      weights, *frozen(state), batch
    )
    return as_numpy((loss, statistics, grads))

  return plain_pass


def linen(rho, dropout_rate, *, by_value_and_grad=False, **asam_args):
  """A linen ``TrainState``; a state is one and the dropout key."""
  network = linen_step.Network(dropout_rate)
  tx = linen_step.tx if by_value_and_grad else make_tx(rho, **asam_args)

  def make_params(weights):
    return {
      'Conv_0': {
        'kernel': weights['conv_kernel'],
        'bias': weights['conv_bias'],
      },
      'BatchNorm_0': {'scale': weights['scale'], 'bias': weights['shift']},
      'Dense_0': {
        'kernel': weights['dense_kernel'],
        'bias': weights['dense_bias'],
      },
    }

  def start(weights, key):
    mean, var = initial_statistics(weights)
    state = linen_step.TrainState.create(
      apply_fn=network.apply,
      params=as_jax(make_params(weights)),
      batch_stats={'BatchNorm_0': {'mean': mean, 'var': var}},
      tx=tx,
    )
    return state, key

  def step(state, batch):
    train_state, key = state
    step_key = jax.random.fold_in(key, train_state.step)
    train_state, loss = (
      linen_step.train_step(train_state, *batch, step_key, rho)
      if by_value_and_grad
      else linen_step.asam_train_step(train_state, *batch, step_key)
    )
    return (train_state, key), loss

  def weights(state):
    params = as_numpy(state[0].params)
    return {
      'conv_kernel': params['Conv_0']['kernel'],
      'conv_bias': params['Conv_0']['bias'],
      'scale': params['BatchNorm_0']['scale'],
      'shift': params['BatchNorm_0']['bias'],
      'dense_kernel': params['Dense_0']['kernel'],
      'dense_bias': params['Dense_0']['bias'],
    }

  def statistics(state):
    return dict(state[0].batch_stats['BatchNorm_0'])

  def frozen(state):
    train_state, key = state
    return train_state.batch_stats, jax.random.fold_in(key, train_state.step)

  def forward(weights, batch_stats, key, batch):
    images, labels = batch
    logits, updated = network.apply(
      {'params': make_params(weights), 'batch_stats': batch_stats},
      images,
      train=True,
      rngs={'dropout': key},
      mutable=['batch_stats'],
    )
    loss = mean_loss(logits, labels)
    return loss, dict(updated['batch_stats']['BatchNorm_0'])

  return Program(start, step, weights, statistics, plain_pass(forward, frozen))


def nnx_(rho, dropout_rate, **asam_args):
  """NNX; a state is the network and the optimizer, and never changed here."""
  tx = make_tx(rho, **asam_args)

  def set_weights(network, weights):
    params = {
      'conv': {'kernel': weights['conv_kernel'], 'bias': weights['conv_bias']},
      'norm': {'scale': weights['scale'], 'bias': weights['shift']},
      'dense': {
        'kernel': weights['dense_kernel'],
        'bias': weights['dense_bias'],
      },
    }
    nnx.update(network, params)

  def start(weights, key):
    network = nnx_step.Network(dropout_rate, rngs=nnx.Rngs(key))
    set_weights(network, as_jax(weights))
    mean, var = initial_statistics(weights)
    nnx.update(network, {'norm': {'mean': mean, 'var': var}})
    return network, nnx_step.create_optimizer(network, tx)

  def step(state, batch):
    network, optimizer = nnx.clone(state)
    loss = nnx_step.train_step(network, optimizer, *batch)
    return (network, optimizer), loss

  def weights(state):
    network, _ = state
    return {
      'conv_kernel': network.conv.kernel[...],
      'conv_bias': network.conv.bias[...],
      'scale': network.norm.scale[...],
      'shift': network.norm.bias[...],
      'dense_kernel': network.dense.kernel[...],
      'dense_bias': network.dense.bias[...],
    }

  def statistics(state):
    norm = state[0].norm
    return {'mean': norm.mean[...], 'var': norm.var[...]}

  def frozen(state):
    graphdef, variables = nnx.split(state[0])
    return graphdef, nnx.as_pure(variables)

  def forward(weights, graphdef, variables, batch):
    images, labels = batch
    network = nnx.merge(graphdef, variables)
    set_weights(network, weights)
    loss = mean_loss(network(images), labels)
    return loss, statistics((network,))

  return Program(start, step, weights, statistics, plain_pass(forward, frozen))


def equinox(rho, dropout_rate, **asam_args):
  """Equinox, whose kernels have the output channels first.

  Its BatchNorm computes what the others do in mode 'batch' alone.
  """
  tx = make_tx(rho, **asam_args)

  def set_weights(network, weights):
    dense_kernel = weights['dense_kernel'].reshape(8, 8, 4, 10)
    return eqx.tree_at(
      lambda network: (
        network.conv.weight,
        network.conv.bias,
        network.norm.weight,
        network.norm.bias,
        network.dense.weight,
        network.dense.bias,
      ),
      network,
      (
        weights['conv_kernel'].transpose(3, 2, 0, 1),
        weights['conv_bias'].reshape(4, 1, 1),
        weights['scale'],
        weights['shift'],
        dense_kernel.transpose(3, 2, 0, 1).reshape(10, -1),
        weights['dense_bias'],
      ),
    )

  def start(weights, key):
    network, state = eqx.nn.make_with_state(equinox_step.Network)(
      dropout_rate, key=key
    )
    network = set_weights(network, as_jax(weights))
    state = state.set(
      network.norm.batch_state_index, initial_statistics(weights)
    )
    opt_state = tx.init(eqx.filter(network, eqx.is_inexact_array))
    return network, state, opt_state, key, 0

  def step(state, batch):
    *state, key, n = state
    images, labels = batch
    *state, loss = equinox_step.train_step(
      *state,
      jnp.moveaxis(images, -1, 1),
      labels,
      jax.random.fold_in(key, n),
      tx,
    )
    return (*state, key, n + 1), loss

  def weights(state):
    network = state[0]
    dense_kernel = network.dense.weight.reshape(10, 4, 8, 8)
    return {
      'conv_kernel': network.conv.weight.transpose(2, 3, 1, 0),
      'conv_bias': network.conv.bias.reshape(4),
      'scale': network.norm.weight,
      'shift': network.norm.bias,
      'dense_kernel': dense_kernel.transpose(2, 3, 1, 0).reshape(-1, 10),
      'dense_bias': network.dense.bias,
    }

  def statistics(state):
    network, state = state[:2]
    mean, var = state.get(network.norm.batch_state_index)
    return {'mean': mean, 'var': var}

  def frozen(state):
    network, state, _, key, n = state
    return network, state, jax.random.fold_in(key, n)

  def forward(weights, network, state, key, batch):
    images, labels = batch
    network = set_weights(network, weights)
    logits, state = jax.vmap(
      network, axis_name='batch', in_axes=(0, None, 0), out_axes=(0, None)
    )(
      jnp.moveaxis(images, -1, 1),
      state,
      jax.random.split(key, len(images)),
    )
    return mean_loss(logits, labels), statistics((network, state))

  return Program(start, step, weights, statistics, plain_pass(forward, frozen))


def haiku(rho, dropout_rate, **asam_args):
  """Haiku, whose BatchNorm has four dimensions."""
  tx = make_tx(rho, **asam_args)
  network = hk.transform_with_state(
    functools.partial(haiku_step.forward, dropout_rate=dropout_rate)
  )

  def make_params(weights):
    return {
      'conv2_d': {'w': weights['conv_kernel'], 'b': weights['conv_bias']},
      'batch_norm': {
        'scale': weights['scale'].reshape(1, 1, 1, 4),
        'offset': weights['shift'].reshape(1, 1, 1, 4),
      },
      'linear': {'w': weights['dense_kernel'], 'b': weights['dense_bias']},
    }

  def start(weights, key):
    images = jnp.zeros((1, 8, 8, 1), weights['scale'].dtype)
    _, state = network.init(key, images, train=True)
    params = as_jax(make_params(weights))
    return params, state, tx.init(params), key, 0

  def step(state, batch):
    *state, key, n = state
    *state, loss = haiku_step.train_step(
      *state, *batch, jax.random.fold_in(key, n), network, tx
    )
    return (*state, key, n + 1), loss

  def weights(state):
    params = as_numpy(state[0])
    return {
      'conv_kernel': params['conv2_d']['w'],
      'conv_bias': params['conv2_d']['b'],
      'scale': params['batch_norm']['scale'].reshape(4),
      'shift': params['batch_norm']['offset'].reshape(4),
      'dense_kernel': params['linear']['w'],
      'dense_bias': params['linear']['b'],
    }

  def statistics(state):
    state = state[1]
    return {
      'mean': state['batch_norm/~/mean_ema']['hidden'].reshape(4),
      'var': state['batch_norm/~/var_ema']['hidden'].reshape(4),
    }

  def frozen(state):
    _, state, _, key, n = state
    return state, jax.random.fold_in(key, n)

  def forward(weights, state, key, batch):
    images, labels = batch
    params = make_params(weights)
    logits, state = network.apply(params, state, key, images, train=True)
    return mean_loss(logits, labels), statistics((params, state))

  return Program(start, step, weights, statistics, plain_pass(forward, frozen))


PROGRAMS = {
  'linen_value_and_grad': functools.partial(linen, by_value_and_grad=True),
  'linen': linen,
  'nnx': nnx_,
  'equinox': equinox,
  'haiku': haiku,
}
