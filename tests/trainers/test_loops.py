"""Promise: ASAM works in trainers that are not in this environment.

Each loop passes the optimizer what that trainer passes, in its kinds of trees.
docs/trainers.md names the file that it was read from.
"""

import functools

import equinox as eqx
from flax import nnx
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_asam
from optax_asam import asam
from tests.helpers import pages
from tests.helpers.support import error
from tests.helpers.training import assert_asam
from tests.helpers.training import assert_momentum_asam

PAGE = pages.read_page('trainers')
SNIPPETS = pages.read_snippets(PAGE)
SGD = optax.sgd(0.1, momentum=0.9)
BATCHES = [
  (rng.standard_normal((8, 5)).astype(np.float32), rng.integers(3, size=8))
  for rng in map(np.random.default_rng, range(3))
]


def cross_entropy(logits, labels):
  """The mean over a batch."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.tree_util.register_pytree_node_class
class Named:
  """An array with named axes: a node whose child has no name on its path."""

  def __init__(self, array, axes):
    self.array, self.axes = array, axes

  def tree_flatten(self):
    """The array, and the names."""
    return (self.array,), self.axes

  @classmethod
  def tree_unflatten(cls, axes, children):
    """The inverse."""
    return cls(*children, axes)


class Linear(eqx.Module):
  """A dense layer of named arrays, and a scale that is not trained."""

  weight: Named
  bias: Named
  scale: jax.Array

  def __call__(self, x):
    """The logits of a batch."""
    return self.scale * (x @ self.weight.array + self.bias.array)


def test_levanter():
  """``obj_fn`` of the trainable part, with other extra arguments."""
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((5, 3)).astype(np.float32)
  model = Linear(
    Named(kernel, ('embed', 'label')),
    Named(np.zeros(3, np.float32), ('label',)),
    np.float32(2.0),
  )
  trainable = Linear(True, True, False)
  params = eqx.filter(model, trainable)
  optimizer = pages.run_snippet(SNIPPETS['test_levanter'][0])['optimizer']

  def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])

  @eqx.filter_jit
  def train_step(model, opt_state, batch):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
    updates, opt_state = optimizer.update(
      eqx.filter(grads, trainable),
      opt_state,
      params=eqx.filter(model, trainable),
      obj_fn=lambda part: loss_fn(eqx.combine(part, model), batch),
      loss=loss,
      grams=None,
    )
    return eqx.apply_updates(model, updates), opt_state

  trained, opt_state = model, optimizer.init(params)
  for batch in BATCHES:
    trained, opt_state = train_step(trained, opt_state, batch)

  # The names of the leaves are lost here, and the bias is still one.
  def pure_loss_fn(params, extra, batch):
    logits = model.scale * (batch[0] @ params['kernel'] + params['bias'])
    return cross_entropy(logits, batch[1]), extra

  assert trained.scale == model.scale
  assert_asam(
    {'kernel': trained.weight.array, 'bias': trained.bias.array},
    pure_loss_fn,
    {'kernel': kernel, 'bias': np.zeros(3, np.float32)},
    BATCHES,
    optax.sgd(0.1, momentum=0.9),
    rho=0.5,
  )


def network_and_params():
  """An NNX network, its graph, and a copy of its parameters."""
  network = nnx.Sequential(
    nnx.Linear(5, 8, rngs=nnx.Rngs(0)),
    nnx.relu,
    nnx.Linear(8, 3, rngs=nnx.Rngs(1)),
  )
  graphdef, params = nnx.split(network, nnx.Param)

  def loss_fn(params, batch):
    logits = nnx.merge(graphdef, params)(batch[0])
    return cross_entropy(logits, batch[1])

  return network, params, loss_fn, jax.device_get(nnx.to_pure_dict(params))


def test_maxtext():
  """An ``nnx.Optimizer`` gets gradients of a split state, and their norm."""
  network, _, loss_fn, initial = network_and_params()
  tx = optax_asam.momentum_asam(SGD, rho=1.0)
  state = nnx.Module()
  state.model = network
  state.optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
  graphdef, variables = nnx.split(state)

  @jax.jit
  def train_step(variables, batch):
    state = nnx.merge(graphdef, variables)
    params = nnx.state(state.model, nnx.Param)
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    norm = optax.tree.norm(grads)
    state.optimizer.update(state.model, grads, loss=loss, grad_norm=norm)
    return nnx.state(state)

  for batch in BATCHES:
    variables = train_step(variables, batch)
  state = nnx.merge(graphdef, variables)
  params = nnx.state(state.model, nnx.Param)
  assert_momentum_asam(
    nnx.to_pure_dict(params),
    nnx.to_pure_dict(optax_asam.eval_params(state.optimizer, params)),
    jax.grad(loss_fn),
    initial,
    BATCHES,
  )


def test_easydel():
  """``update`` by keywords, on a donated state, inside ``lax.cond``."""
  _, params, loss_fn, initial = network_and_params()
  tx = optax_asam.momentum_asam(SGD, rho=1.0)

  def apply_gradients(operand):
    params, opt_state, grads = operand
    updates, opt_state = tx.update(
      updates=grads, state=opt_state, params=params
    )
    return optax.apply_updates(params, updates), opt_state

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    return jax.lax.cond(
      jnp.isnan(loss),
      lambda operand: operand[:2],
      apply_gradients,
      (params, opt_state, grads),
    )

  opt_state = tx.init(params)
  for batch in BATCHES:
    params, opt_state = train_step(params, opt_state, batch)
  assert_momentum_asam(
    nnx.to_pure_dict(params),
    nnx.to_pure_dict(optax_asam.eval_params(opt_state, params)),
    jax.grad(loss_fn),
    initial,
    BATCHES,
  )


def test_hugging_face_flax_examples():
  """The changed line, under ``pmap``: a perturbation per device."""
  (diff,) = pages.blocks(PAGE, 'diff')
  before, after = (line[1:].strip() for line in diff.splitlines())
  assert before == 'grad_fn = jax.value_and_grad(loss_fn)'
  devices = jax.local_devices()[:2]
  params = {
    'kernel': np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
    'bias': np.zeros(3, np.float32),
  }

  def apply_fn(inputs, params, dropout_rng):
    keep = jax.random.bernoulli(dropout_rng, 0.7, inputs.shape)
    return jnp.where(keep, inputs, 0) @ params['kernel'] + params['bias']

  def train_step(state, batch, dropout_rng):
    def loss_fn(params):
      logits = state.apply_fn(batch[0], params, dropout_rng)
      return cross_entropy(logits, batch[1])

    names = pages.run_snippet(after, loss_fn=loss_fn)
    loss, grads = names['grad_fn'](state.params)
    grads = jax.lax.pmean(grads, 'batch')
    return state.apply_gradients(grads=grads), jax.lax.pmean(loss, 'batch')

  state = TrainState.create(apply_fn=apply_fn, params=params, tx=SGD)
  replicated = jax.tree.map(lambda x: jnp.stack([x, x]), state)
  p_train_step = jax.pmap(train_step, axis_name='batch', devices=devices)
  keys = jax.random.split(jax.random.key(0), 2)
  shards = [
    jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    for batch in BATCHES
  ]
  for shard in shards:
    replicated, _ = p_train_step(replicated, shard, keys)

  # The mean of what ASAM descends on each device.
  second_gradient = asam(optax.identity(), rho=0.5)
  for x, y in shards:
    grads = []
    for i in range(2):

      def grad_fn(params, i=i, x=x, y=y):
        logits = lambda p: apply_fn(x[i], p, keys[i])
        return jax.grad(lambda p: cross_entropy(logits(p), y[i]))(params)

      sharp, _ = second_gradient.update(
        grad_fn(state.params),
        second_gradient.init(state.params),
        state.params,
        grad_fn=grad_fn,
      )
      grads.append(sharp)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    state = state.apply_gradients(grads=mean)
  trained = jax.tree.map(lambda x: x[0], replicated.params)
  assert error(trained, state.params) < 1e-5
