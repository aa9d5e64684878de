"""Promise: where ASAM is something else, it is that bit for bit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import sam
from support import assert_same_bits
from support import error


def mlp(params, x):
  """Two dense layers."""
  h = jax.nn.relu(x @ params['hidden']['kernel'] + params['hidden']['bias'])
  return h @ params['out']['kernel'] + params['out']['bias']


def convnet(params, x):
  """Convolution, batch normalization, relu, mean pool, dense."""
  x = x.reshape(-1, 8, 8, 1)
  x = jax.lax.conv_general_dilated(
    x,
    params['conv']['kernel'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
  x = jax.nn.relu(x * params['norm']['scale'] + params['norm']['bias'])
  return x.mean((1, 2)) @ params['out']['kernel'] + params['out']['bias']


SHAPES = {
  mlp: {
    'hidden': {'kernel': (64, 32), 'bias': (32,)},
    'out': {'kernel': (32, 10), 'bias': (10,)},
  },
  convnet: {
    'conv': {'kernel': (3, 3, 1, 16)},
    'norm': {'scale': (16,), 'bias': (16,)},
    'out': {'kernel': (16, 10), 'bias': (10,)},
  },
}


def make_problem(model):
  """A loss of a parameter tree and a batch, parameters, and 50 batches."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda shape: jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32),
    SHAPES[model],
    is_leaf=lambda x: isinstance(x, tuple),
  )
  inputs = jnp.asarray(rng.standard_normal((50, 32, 64)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 10, (50, 32)))

  def loss_fn(params, batch):
    x, y = batch
    logits = model(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  return loss_fn, params, (inputs, labels)


def train(
  tx, loss_fn, params, batches, steps=50, value_and_grad=None, extra=None
):
  """Some steps, one jitted step at a time."""

  @jax.jit
  def step(params, state, batch):
    grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
    _, grads = (value_and_grad or jax.value_and_grad(loss_fn))(params, batch)
    updates, state = tx.update(
      grads, state, params, **(extra(grad_fn) if extra else {})
    )
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for i in range(steps):
    params, state = step(
      params, state, jax.tree.map(lambda x, i=i: x[i], batches)
    )
  return params


def asam_extra(grad_fn):
  """What the transformation is given."""
  return {'grad_fn': grad_fn}


def contrib_extra(grad_fn):
  """What optax.contrib.sam is given."""
  return {'grad_fn': lambda params, _: grad_fn(params)}


BASES = {
  'sgd': lambda: optax.sgd(0.1, momentum=0.9),
  'adamw': lambda: optax.adamw(1e-2),
}


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('adaptive', [True, False])
def test_contrib_sam(base, adaptive):
  """optax.contrib.sam in opaque mode with our ascent, over 50 steps."""
  loss_fn, params, batches = make_problem(mlp)
  t = normalization.elementwise() if adaptive else normalization.identity()
  contrib = optax.contrib.sam(
    BASES[base](),
    optax.chain(ascent.steepest_ascent(t), optax.sgd(0.3)),
    opaque_mode=True,
  )
  theirs = train(
    contrib,
    loss_fn,
    params,
    batches,
    extra=contrib_extra,
  )
  ours = train(
    asam(BASES[base](), 0.3, adaptive=adaptive),
    loss_fn,
    params,
    batches,
    extra=asam_extra,
  )
  assert_same_bits(ours, theirs)


def test_contrib_sam_as_documented_there():
  """With its own normalize(), to rounding: that sums in another order."""
  loss_fn, params, batches = make_problem(mlp)
  contrib = optax.contrib.sam(
    optax.sgd(0.1),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.3)),
    opaque_mode=True,
  )
  theirs = train(
    contrib,
    loss_fn,
    params,
    batches,
    steps=5,
    extra=contrib_extra,
  )
  tx = sam(optax.sgd(0.1), 0.3)
  ours = train(tx, loss_fn, params, batches, steps=5, extra=asam_extra)
  assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
  ('model', 'base'), [(mlp, 'sgd'), (mlp, 'adamw'), (convnet, 'sgd')]
)
def test_rho_zero_is_the_base(model, base):
  """Rho = 0, by the transformation and by value_and_grad, over 50 steps."""
  loss_fn, params, batches = make_problem(model)
  plain = train(BASES[base](), loss_fn, params, batches)
  for tx in (asam(BASES[base](), 0.0), sam(BASES[base](), 0.0)):
    result = train(tx, loss_fn, params, batches, extra=asam_extra)
    assert_same_bits(result, plain)
  estimator = optax_asam.value_and_grad(loss_fn, rho=0.0)
  result = train(
    BASES[base](), loss_fn, params, batches, value_and_grad=estimator
  )
  assert_same_bits(result, plain)


@pytest.mark.parametrize('model', SHAPES)
def test_value_and_grad_is_the_transformation(model):
  """Both ways to ASAM, over 50 steps."""
  loss_fn, params, batches = make_problem(model)
  base = BASES['sgd']
  estimator = optax_asam.value_and_grad(loss_fn, rho=0.5)
  assert_same_bits(
    train(base(), loss_fn, params, batches, value_and_grad=estimator),
    train(asam(base()), loss_fn, params, batches, extra=asam_extra),
  )


def test_sam_is_asam_without_normalization():
  """sam(...) is asam(adaptive=False, ...), every argument passed on."""
  params = {'kernel': jnp.arange(1.0, 4.0), 'bias': jnp.ones(2)}
  loss_fn = lambda params, x: sum(
    (jnp.sin(x * w) ** 2).sum() for w in params.values()
  )
  batches = jnp.ones(3)
  kwargs = {
    'ord': 3,
    'mask': normalization.not_bias,
    'ascent_steps': 2,
    'every_k': 2,
    'descent': lambda g, h: jax.tree.map(lambda a, b: (a + b) / 2, g, h),
    'perturbed_dtype': jnp.float16,
  }

  def run(tx):
    return train(tx, loss_fn, params, batches, steps=2, extra=asam_extra)

  ours = run(sam(optax.sgd(0.1), 0.1, **kwargs))
  assert_same_bits(
    ours, run(asam(optax.sgd(0.1), 0.1, adaptive=False, **kwargs))
  )
  for name in kwargs:
    rest = {k: v for k, v in kwargs.items() if k != name}
    other = run(sam(optax.sgd(0.1), 0.1, **rest))
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), ours, other)
    assert any(jax.tree.leaves(differs)), name


def test_contrib_sam_at_zero_gradient():
  """Where optax.contrib.sam's step is NaN, ours is the base's."""
  params, grad_fn = jnp.zeros(3), lambda params, *_: params
  contrib = optax.contrib.sam(
    optax.sgd(0.1),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
    opaque_mode=True,
  )
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    updates, _ = contrib.update(
      params, contrib.init(params), params, grad_fn=grad_fn
    )
  assert jnp.isnan(updates).all()
  tx = sam(optax.sgd(0.1), 0.1)
  updates, _ = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
  assert (updates == 0).all()
