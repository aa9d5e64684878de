"""Promise: a step costs two gradients and little else, at any size.

Instructions, temporaries and bytes are read from compiled programs.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import asam
from optax_asam import ascent
from optax_asam import looksam
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness_aware
from optax_asam import value_and_grad

WIDTH = 64
SGD = optax.sgd(0.1, momentum=0.9)
STEEPEST = optax.chain(
  ascent.steepest_ascent(normalization.elementwise()), optax.scale(0.5)
)

# Each transformation, and the largest ratio of its instructions to those of two
# gradients.
TRANSFORMATIONS = {
  'asam': (asam(SGD), 1.7),
  'sam': (sam(SGD), 1.7),
  'asam-inf': (asam(SGD, ord=jnp.inf), 1.7),
  'sam-inf': (sam(SGD, ord=jnp.inf), 1.7),
  'asam-3': (asam(SGD, ord=3), 2.4),
  'layerwise': (asam(SGD, adaptive=normalization.layerwise()), 2.0),
  'filterwise': (asam(SGD, adaptive=normalization.filterwise()), 2.0),
  'every_k': (asam(SGD, every_k=2), 2.0),
  'when': (asam(SGD, when=lambda step: step >= 9), 2.0),
  'looksam': (looksam(SGD), 4.0),
  'ascent_steps': (asam(SGD, ascent_steps=2), 3.2),
  'pieces': (optax.chain(sharpness_aware(STEEPEST), SGD), 1.7),
}


def mlp(num_arrays, width=WIDTH):
  """Parameters of dense layers, as shapes: nothing here is run."""
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  return [
    {'kernel': shape(width, width), 'bias': shape(width)}
    for _ in range(num_arrays // 2)
  ]


def loss_fn(params):
  """The mean cross-entropy on one batch."""
  x = jnp.ones((8, params[0]['kernel'].shape[0]))
  for layer in params:
    x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
  labels = jnp.zeros(8, jnp.int32)
  return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


grad_fn = jax.grad(loss_fn)


def compiled(step, *args):
  """The optimized program; what LLVM makes of it is not looked at."""
  options = {'xla_llvm_disable_expensive_passes': True}
  return jax.jit(step).lower(*args).compile(compiler_options=options)


def instructions(step, *args):
  """The number of instructions in all computations of the program."""
  text = compiled(step, *args).as_text()
  return len(re.findall(r'^\s+(?:ROOT )?%?[\w.-]+ = ', text, re.MULTILINE))


def step_of(tx):
  """A train step with ``tx``."""

  def step(params, state):
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return step


def count(tx, num_arrays):
  """The instructions of a train step with ``tx``."""
  params = mlp(num_arrays)
  return instructions(step_of(tx), params, jax.eval_shape(tx.init, params))


@pytest.fixture(scope='module')
def two_gradients():
  """The instructions of a step with two gradients, without ASAM."""

  def update_fn(updates, state, params=None, *, grad_fn):
    del updates, state
    step = jax.tree.map(lambda w, g: w + 0.1 * g, params, grad_fn(params))
    return grad_fn(step), optax.EmptyState()

  init_fn = lambda params: optax.EmptyState()
  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return count(optax.chain(tx, SGD), 20)


SLOW = ('sam-inf', 'filterwise', 'when', 'ascent_steps', 'pieces')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in TRANSFORMATIONS
  ],
)
def test_instructions(name, two_gradients):
  """Linear in the number of arrays, and not many more than two gradients."""
  tx, bound = TRANSFORMATIONS[name]
  few, many = count(tx, 20), count(tx, 60)
  assert many < 3.1 * few
  assert few < bound * two_gradients


def dot(a, b):
  """The inner product of two trees."""
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return sum(jnp.sum(x * y) for x, y in leaves)


def looksam_direction(g, h):
  """What LookSAM keeps, by hand."""
  projection = dot(g, h) / dot(g, g)
  g_v = jax.tree.map(lambda g, h: h - projection * g, g, h)
  norm = jnp.sqrt(dot(g_v, g_v))
  return jax.tree.map(lambda x: x / norm, g_v)


def by_hand(adaptive, perturbed, name):
  """The best train step that can be written by hand for one configuration."""

  def perturbed_grads(params, grads):
    norm_of = lambda i: [
      (jnp.abs(w) + 0.01 if adaptive and w.ndim > 1 else 1, w, g)
      for w, g in zip(
        jax.tree.leaves(params[i]), jax.tree.leaves(grads[i]), strict=True
      )
    ]
    leaves = [leaf for i in perturbed for leaf in norm_of(i)]
    norm = jnp.sqrt(sum(jnp.sum((t * g) ** 2) for t, _, g in leaves))
    perturbed_params = list(params)
    for i in perturbed:
      treedef = jax.tree.structure(params[i])
      perturbed_params[i] = treedef.unflatten(
        w + 0.5 * t * (t * g / norm) for t, w, g in norm_of(i)
      )
    return grad_fn(perturbed_params)

  def look(params, grads):
    descended = perturbed_grads(params, grads)
    return descended, looksam_direction(grads, descended)

  def reuse(grads, direction):
    norm = 0.1 * jnp.sqrt(dot(grads, grads))
    descended = jax.tree.map(lambda g, d: g + norm * d, grads, direction)
    return descended, direction

  def step(params, state, direction, count):
    grads = grad_fn(params)
    if name == 'looksam':
      grads, direction = jax.lax.cond(
        count % 2 == 0,
        lambda: look(params, grads),
        lambda: reuse(grads, direction),
      )
    elif name != 'every_k':
      grads = perturbed_grads(params, grads)
    else:
      grads = jax.lax.cond(
        count % 2 == 0,
        lambda: perturbed_grads(params, grads),
        lambda: grads,
      )
    updates, state = SGD.update(grads, state, params)
    return optax.apply_updates(params, updates), state, direction, count + 1

  return step


@functools.cache
def memory_by_hand(adaptive, perturbed, name):
  """Of :func:`by_hand`."""
  params = mlp(12, 256)
  return memory(
    by_hand(adaptive, perturbed, name),
    params,
    jax.eval_shape(SGD.init, params),
    params if name == 'looksam' else [],
    jax.ShapeDtypeStruct([], jnp.int32),
  )


def memory(step, *args):
  """Temporaries and bytes accessed."""
  program = compiled(step, *args)
  cost = program.cost_analysis()
  cost = cost if isinstance(cost, dict) else cost[0]
  return np.array(
    [program.memory_analysis().temp_size_in_bytes, cost['bytes accessed']]
  )


@pytest.mark.parametrize('perturbed', [(0, 1, 2, 3, 4, 5), (5,)])
@pytest.mark.parametrize(
  'name', ['asam', 'sam', 'value_and_grad', 'every_k', 'looksam']
)
def test_memory(name, perturbed):
  """Temporaries and bytes within 2 % of a step by hand, frozen layers or not.

  A copy of a parameter that is masked out, a pass over the gradient for a
  guard, or a perturbation computed outside the conditional would be more.
  """
  params = mlp(12, 256)
  mask = [i in perturbed for i in range(6)]
  kind = name if name in ('every_k', 'looksam') else 'every step'
  hand = memory_by_hand(name != 'sam', perturbed, kind)
  if name == 'value_and_grad':

    def step(params, state):
      _, grads = value_and_grad(loss_fn, mask=mask)(params)
      updates, state = SGD.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    got = memory(step, params, jax.eval_shape(SGD.init, params))
  else:
    tx = {
      'asam': asam(SGD, mask=mask),
      'sam': sam(SGD, 0.5, mask=mask),
      'every_k': asam(SGD, mask=mask, every_k=2),
      'looksam': looksam(SGD, mask=mask, every_k=2),
    }[name]
    got = memory(step_of(tx), params, jax.eval_shape(tx.init, params))
  assert (got <= 1.02 * hand + 1024).all(), (got, hand)


def test_part_of_the_batch():
  """Computes a quarter of one gradient, and one: no forward pass besides.

  A forward pass on a quarter of the batch would be a fifteenth more.
  """
  params = mlp(12)
  x = jax.ShapeDtypeStruct((256, WIDTH), jnp.float32)

  def loss_fn(params, x):
    for layer in params:
      x = jnp.tanh(x @ layer['kernel'] + layer['bias'])
    return jnp.mean(x**2)

  def part_loss_fn(params, x):
    return loss_fn(params, x[::4])

  def flops(step):
    cost = compiled(step, params, x).cost_analysis()
    return (cost if isinstance(cost, dict) else cost[0])['flops']

  alone = flops(jax.grad(part_loss_fn)) + flops(jax.value_and_grad(loss_fn))
  ours = flops(value_and_grad(loss_fn, ascent_fun=part_loss_fn))
  assert 0.99 * alone < ours < 1.02 * alone
  assert ours < 0.65 * flops(value_and_grad(loss_fn))
