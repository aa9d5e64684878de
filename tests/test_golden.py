"""Promise: the trajectories are those of the authors' own implementation."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from tests.helpers.support import error

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FILES = {
  'asam_mlp': 1e-12,
  'sam_mlp': 1e-12,
  'asam_convnet_batchnorm': 1e-12,
  'asam_attention_adam': 1e-8,
}


def linear(params, name, x):
  """PyTorch's linear layer: the weight is [out, in]."""
  return x @ params[f'{name}.weight'].T + params[f'{name}.bias']


def mlp(params, x):
  """12-16-16-5 with tanh."""
  x = jnp.tanh(linear(params, 'layers.0', x))
  x = jnp.tanh(linear(params, 'layers.1', x))
  return linear(params, 'layers.2', x)


def convolution(params, name, x):
  """3x3, stride 1, padding 1, on NCHW images with an OIHW kernel."""
  return jax.lax.conv_general_dilated(
    x,
    params[f'{name}.weight'],
    window_strides=(1, 1),
    padding='SAME',
    dimension_numbers=('NCHW', 'OIHW', 'NCHW'),
  )


def batchnorm(params, name, x):
  """BatchNorm in training mode on NCHW, with the biased variance."""
  mean = x.mean((0, 2, 3), keepdims=True)
  variance = x.var((0, 2, 3), keepdims=True)
  scale = params[f'{name}.weight'][:, None, None]
  shift = params[f'{name}.bias'][:, None, None]
  return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + shift


def convnet(params, x):
  """Convolution, BatchNorm, tanh, twice; mean pool; dense."""
  x = convolution(params, 'conv1', x) + params['conv1.bias'][:, None, None]
  x = jnp.tanh(batchnorm(params, 'bn1', x))
  x = jnp.tanh(batchnorm(params, 'bn2', convolution(params, 'conv2', x)))
  return linear(params, 'head', x.mean((2, 3)))


def attention(params, tokens):
  """Embedding, LayerNorm, one attention head, mean of the logits."""
  x = params['embed.weight'][tokens]
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  h = (x - mean) / jnp.sqrt(variance + 1e-5)
  h = h * params['norm.weight'] + params['norm.bias']
  q, k, v = jnp.split(linear(params, 'qkv', h), 3, axis=-1)
  scores = q @ k.swapaxes(-1, -2) / jnp.sqrt(q.shape[-1])
  x = x + linear(params, 'out', jax.nn.softmax(scores) @ v)
  return linear(params, 'head', x).mean(1)


MODELS = {'mlp': mlp, 'convnet': convnet, 'attention': attention}


def base_optimizer(name, lr, momentum=None, weight_decay=0.0):
  """The base optimizer of a file's config."""
  if name == 'adam':
    return optax.adam(lr)
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(lr, momentum)
  )


def make_step(loss_fn, config):
  """``step(params, state, batch) -> (params, state, loss)`` and its init."""
  tx = optax_asam.asam(
    base_optimizer(**config['base']),
    config['rho'],
    config['eta'],
    adaptive=config['minimizer'] == 'asam',
  )

  @jax.jit
  def step(params, state, inputs, labels):
    value_fn = lambda params: loss_fn(params, inputs, labels)
    value, grads = jax.value_and_grad(value_fn)(params)
    updates, state = tx.update(grads, state, params, value_fn=value_fn)
    return optax.apply_updates(params, updates), state, value

  return step, tx.init


@pytest.mark.parametrize('file', FILES)
def test_trajectory(x64, file):
  """Fifty steps: losses, perturbed losses and parameters are the authors'."""
  data = np.load(GOLDEN / f'{file}.npz')
  config = json.loads(str(data['config']))
  tolerance = FILES[file]
  names = [key[5:] for key in data.files if key.startswith('init/')]

  def stored(when):
    return {name: jnp.asarray(data[f'{when}/{name}']) for name in names}

  passes = []  # (params, loss) of every forward pass, clean ones and perturbed

  def loss_fn(params, inputs, labels):
    logits = MODELS[config['model']](params, inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()
    jax.debug.callback(
      lambda *seen: passes.append(seen), params, loss, ordered=True
    )
    return loss

  step, init = make_step(loss_fn, config)
  params = stored('init')
  state = init(params)
  losses = []
  for i in range(config['steps']):
    params, state, loss = step(
      params, state, data['inputs'][i], data['labels'][i]
    )
    losses.append(loss)
    perturbed_loss = data['perturbed_loss'][i]
    assert error(state[0].perturbed_value, perturbed_loss) < tolerance
    if i + 1 in (1, 10, 50):
      assert error(params, stored(f'after_{i + 1}')) < tolerance
  jax.effects_barrier()

  assert len(passes) == 2 * config['steps']
  assert error(passes[1][0], stored('perturbed_step_0')) < tolerance
  assert error(np.stack(losses), data['loss']) < tolerance
  perturbed_losses = np.stack([loss for _, loss in passes[1::2]])
  assert error(perturbed_losses, data['perturbed_loss']) < tolerance
