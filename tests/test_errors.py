"""Promise: bad input says what is wrong, what came, and what to write."""

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
from optax_asam import sharpness_aware

PARAMS = {'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
SGD = optax.sgd(0.1)


def loss_fn(params):
  """A scalar of ``params``."""
  return (params['dense']['kernel'] @ params['dense']['bias']).sum()


def update(tx=None, grads=PARAMS, params=PARAMS, **extra_args):
  """One update of ``tx``, of asam by default."""
  tx = tx or asam(SGD)
  return tx.update(grads, tx.init(PARAMS), params, **extra_args)


def good_update(tx):
  """One update of ``tx`` with nothing wrong but ``tx``."""
  return update(tx, grad_fn=jax.grad(loss_fn))


def cast(tree, dtype):
  """The tree in another dtype."""
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def each_scale(name):
  """Bad values of a number >= 0, with what the message says of them."""
  write = f'Write for example {name}='
  for value in (
    -0.1,
    float('nan'),
    float('inf'),
    np.float32(-1),
    np.array(-1.0),
  ):
    yield ValueError, {name: value}, [name, str(value), write]
  for value in ('0.5', None, True, 1j, [0.5]):
    yield TypeError, {name: value}, [name, repr(value), write]
  yield TypeError, {name: jnp.ones(3)}, [name, r'shape (3,)', write]
  yield TypeError, {name: jnp.array(True)}, [name, 'bool', write]
  yield TypeError, {name: jnp.array(1j)}, [name, 'complex64', write]


def each_count(name):
  """Bad values of an int >= 1."""
  write = f'Write for example {name}='
  for value in (0, -2):
    yield ValueError, {name: value}, [name, str(value), write]
  for value in (1.0, '2', None, True, 1.5):
    yield TypeError, {name: value}, [name, repr(value), write]
  yield TypeError, {name: jnp.array(2)}, [name, 'array 2', 'static_args']


KEYWORDS = [
  *each_scale('rho'),
  *each_scale('eta'),
  *each_count('every_k'),
  *each_count('ascent_steps'),
  *[
    (ValueError, {'ord': value}, ['ord', str(value), 'ord=2'])
    for value in (1, 0.5, 0, -2, float('nan'), -float('inf'))
  ],
  *[
    (TypeError, {'ord': value}, ['ord', repr(value), 'ord=2'])
    for value in ('inf', 'fro', None, True)
  ],
  (TypeError, {'ord': jnp.array(2.0)}, ['ord', 'array 2.0', 'static_args']),
  *[
    (
      TypeError,
      {'adaptive': value},
      [
        'adaptive must be True, False or a normalization',
        repr(value),
        'normalization.filterwise(0.01)',
      ],
    )
    for value in ('filterwise', None, 0.01, 1, {'kernel': 1})
  ],
  (
    TypeError,
    {'adaptive': normalization.layerwise},
    ['adaptive', 'factory layerwise', 'adaptive=normalization.layerwise()'],
  ),
  (
    TypeError,
    {'adaptive': jnp.array(1.0)},
    ['adaptive', 'array 1.0', 'static_args'],
  ),
  (TypeError, {'descent': 0.5}, ['descent', '0.5', 'descent=lambda']),
  (
    TypeError,
    {'descent': jnp.array(1.0)},
    ['descent', 'array 1.0', 'static_args'],
  ),
  (
    TypeError,
    {'perturbed_dtype': 'halff'},
    ['perturbed_dtype', "'halff'", 'perturbed_dtype=jnp.float32'],
  ),
  (
    TypeError,
    {'perturbed_dtype': jnp.int32},
    ['perturbed_dtype', 'int32', 'perturbed_dtype=jnp.float32'],
  ),
  (
    TypeError,
    {'perturbed_dtype': jnp.float32(1)},
    ['perturbed_dtype', 'array 1.0', 'static_args'],
  ),
  (
    ValueError,
    {'mask': {'dense': False}},
    ['mask', "{'dense': False}", 'mask=None'],
  ),
]


def assert_says(info, *phrases):
  """Fails unless the message holds each phrase."""
  message = str(info.value)
  for phrase in phrases:
    assert phrase in message, (phrase, message)


@pytest.mark.parametrize(('error', 'kwargs', 'phrases'), KEYWORDS)
def test_keywords(error, kwargs, phrases):
  """In the factories, before anything is traced."""
  with pytest.raises(error) as info:
    asam(SGD, **kwargs)
  assert_says(info, *phrases)
  if 'adaptive' not in kwargs and 'eta' not in kwargs:
    with pytest.raises(error) as info:
      sam(SGD, **kwargs)
    assert_says(info, *phrases)
  if 'every_k' not in kwargs:
    for factory in (optax_asam.value_and_grad, optax_asam.grad):
      with pytest.raises(error) as info:
        factory(loss_fn, **kwargs)
      assert_says(info, *phrases)


@pytest.mark.parametrize(
  ('call', 'phrases'),
  [
    (lambda f: f(rho=0.5), ['got none']),
    (lambda f: f(0.5), ['0.5']),
    (lambda f: f(optax.sgd), ['function sgd', 'not called']),
    (lambda f: f(base_tx='sgd'), ["'sgd'"]),
    (lambda f: f(None), ['None']),
    (lambda f: f(loss_fn), ['function loss_fn', 'not called']),
  ],
)
@pytest.mark.parametrize('factory', [asam, sam])
def test_base_tx(factory, call, phrases):
  """Likely slips with the first argument."""
  with pytest.raises(TypeError) as info:
    call(factory)
  assert_says(info, 'base_tx', f'{factory.__name__}(optax.sgd(0.1))', *phrases)


def test_ascent():
  """What sharpness_aware and steepest_ascent are given."""
  with pytest.raises(TypeError) as info:
    sharpness_aware(normalization.elementwise())
  assert_says(info, 'ascent', 'not called', 'steepest_ascent(')
  with pytest.raises(TypeError) as info:
    ascent.steepest_ascent(0.01)
  assert_says(info, 'normalization', '0.01', 'normalization.filterwise(0.01)')
  with pytest.raises(TypeError) as info:
    ascent.steepest_ascent(normalization.elementwise)
  assert_says(
    info,
    'normalization must be a function from params to T_w',
    'elementwise',
    'not called',
    'normalization.elementwise()',
  )
  tx = ascent.steepest_ascent(normalization.identity())
  with pytest.raises(ValueError) as info:
    tx.update(PARAMS, tx.init(PARAMS))
  assert_says(info, 'params', 'None', 'update(grads, state, params, ')


@pytest.mark.parametrize('axis', [None, 1.0, 'output', True])
def test_axis(axis):
  """The axis of a filter is an int."""
  with pytest.raises(TypeError) as info:
    normalization.filterwise(axis=axis)
  assert_says(info, 'axis', repr(axis), 'axis=-1 (Flax, Haiku)')


@pytest.mark.parametrize('axis', [-4, 3, 4])
def test_axis_of_a_kernel(axis):
  """And one that the kernel has."""
  with pytest.raises(ValueError) as info:
    normalization.filterwise(axis=axis)({'kernel': jnp.ones((2, 2, 2))})
  assert_says(info, f'axis={axis}', '(2, 2, 2)', 'axis=0 (Equinox)')


def test_custom_normalization():
  """A normalization that returns no T_w."""
  for t, phrases in [
    (lambda params: {'dense': 1}, ["params['dense']['bias'] is missing"]),
    (
      lambda params: jax.tree.map(lambda _: jnp.ones(7), params),
      ["params['dense']['bias']", '(7,)', '(3,)'],
    ),
  ]:
    with pytest.raises(ValueError) as info:
      good_update(asam(SGD, adaptive=t))
    assert_says(info, 'normalization', 'one array or 1', *phrases)
  with pytest.raises(TypeError) as info:
    good_update(asam(SGD, adaptive=normalization.not_bias))
  assert_says(info, 'normalization', 'returned False', 'one array or 1')


def test_params():
  """Update needs params."""
  with pytest.raises(ValueError) as info:
    update(params=None, grad_fn=jax.grad(loss_fn))
  assert_says(info, 'params', 'None', 'tx.update(grads, state, params')


def test_grad_fn_or_value_fn():
  """Exactly one, and a function."""
  with pytest.raises(ValueError) as info:
    update()
  assert_says(info, 'grad_fn', 'value_fn', 'neither', 'grad_fn=grad_fn')
  with pytest.raises(ValueError) as info:
    update(grad_fn=jax.grad(loss_fn), value_fn=loss_fn)
  assert_says(info, 'grad_fn', 'value_fn', 'both', 'grad_fn=grad_fn')
  for name in ('grad_fn', 'value_fn'):
    with pytest.raises(TypeError) as info:
      update(**{name: 3.5})
    assert_says(info, name, '3.5', f'{name}=lambda params')


@pytest.mark.parametrize('every_k', [1, 2])
@pytest.mark.parametrize(
  ('error', 'grad_fn', 'phrases'),
  [
    (
      ValueError,
      lambda p: {'dense': {'kernel': p['dense']['kernel']}},
      ["params['dense']['bias'] is missing", 'grad_fn=jax.grad(loss_fn)'],
    ),
    (
      ValueError,
      lambda p: {**p, 'more': jnp.ones(2)},
      ["params['more'] is unexpected", 'grad_fn=jax.grad(loss_fn)'],
    ),
    (
      ValueError,
      lambda p: list(p.values()),
      ["params['dense']['bias'] is missing", 'got a list'],
    ),
    (
      ValueError,
      jax.grad(lambda p: (loss_fn(p), 1.0), has_aux=True),
      ['tuple of length 2', 'has_aux', '[0]'],
    ),
    (
      ValueError,
      jax.value_and_grad(loss_fn),
      ['tuple of length 2', 'value_and_grad', '[0]'],
    ),
    (ValueError, loss_fn, ['shape ()', 'grad_fn=jax.grad(loss_fn)']),
    (
      ValueError,
      lambda p: jax.tree.map(lambda x: x[:1], p),
      ["params['dense']['bias']", '(1,)', '(3,)'],
    ),
    (
      TypeError,
      lambda p: cast(p, jnp.float16),
      ["params['dense']['bias']", 'float16', 'float32'],
    ),
  ],
)
def test_result_of_grad_fn(every_k, error, grad_fn, phrases):
  """The first path that differs is named; for a tuple, has_aux."""
  with pytest.raises(error) as info:
    update(asam(SGD, every_k=every_k), grad_fn=grad_fn)
  assert_says(info, 'result of grad_fn', *phrases)


@pytest.mark.parametrize(
  ('value_fn', 'phrase'),
  [
    (lambda p: p['dense']['bias'], 'shape (3,)'),
    (lambda p: (loss_fn(p), 1.0), 'tuple of length 2'),
    (lambda p: p, 'a dict'),
    (lambda p: [loss_fn(p)], 'a list'),
    (lambda p: loss_fn, 'a function'),
    (lambda p: 'loss', 'a str'),
    (lambda p: 1, 'an int'),
    (lambda p: loss_fn(p) + 1j, 'complex64'),
    (lambda p: loss_fn(p).astype(int), 'int32'),
  ],
)
def test_result_of_value_fn(value_fn, phrase):
  """A scalar."""
  with pytest.raises(TypeError) as info:
    update(value_fn=value_fn)
  assert_says(info, 'value_fn', 'scalar', phrase, 'loss(p)')


def test_result_of_grad_fn_for_a_tuple():
  """Where params are a tuple themselves, has_aux is not the reason."""
  params = jnp.ones(2), jnp.ones(3)
  with pytest.raises(TypeError) as info:
    update(
      optax.chain(sharpness_aware(ascent.rho_ball(0.5, 0.01, True))),
      grads=params,
      params=params,
      grad_fn=lambda p: cast(p, jnp.float16),
    )
  assert_says(info, 'params[0]', 'float16', 'grad_fn=jax.grad(loss_fn)')
  assert 'has_aux' not in str(info.value)


def test_argnums():
  """What is differentiated is passed by position."""
  for kwargs in ({'argnums': 3}, {'argnums': (0, 1)}):
    with pytest.raises(TypeError) as info:
      optax_asam.grad(loss_fn, **kwargs)(PARAMS)
    assert_says(info, 'argnums', repr(kwargs['argnums']), 'by position')
  with pytest.raises(TypeError, match='by position'):
    optax_asam.grad(loss_fn)(params=PARAMS)


def test_grads():
  """The gradients that come in are like params."""
  for grads, phrase in [
    ({'dense': {'kernel': 1.0}}, "params['dense']['bias'] is missing"),
    (jax.tree.map(jnp.sum, PARAMS), "params['dense']['bias'] got ()"),
    ((PARAMS, 1.0), 'tuple of length 2'),
  ]:
    with pytest.raises(ValueError) as info:
      update(grads=grads, grad_fn=jax.grad(loss_fn))
    assert_says(info, 'grads must have', phrase, 'Pass the gradient')


def test_result_of_descent():
  """Descent returns a tree like params, too."""
  tx = asam(SGD, descent=lambda g, h: (g, h))
  with pytest.raises(ValueError) as info:
    good_update(tx)
  assert_says(info, 'result of descent', 'tuple of length 2', 'descent=lambda')


@pytest.mark.parametrize(
  ('error', 'mask', 'phrases'),
  [
    (ValueError, {'conv': True}, ["'conv'", 'mask=jax.tree.map(']),
    (
      ValueError,
      {'dense': {'kernel': True}},
      ["'kernel'", "'bias'", 'mask=jax.tree.map('],
    ),
    (ValueError, [True], ['[*]', 'mask=jax.tree.map(']),
    (ValueError, lambda p: {'conv': True}, ["'conv'", 'mask=jax.tree.map(']),
    (ValueError, lambda p: False, ['selects nothing', 'mask=None']),
    (TypeError, {'dense': 'yes'}, ["mask['dense']", "'yes'", 'bools']),
    (TypeError, {'dense': 1}, ["mask['dense']", '1', 'bools']),
    (TypeError, lambda p: p, ['bools', 'array of shape (3,)', 'static_args']),
    (TypeError, jnp.array(True), ['bools', 'array of shape ()', 'static_args']),
  ],
)
def test_mask(error, mask, phrases):
  """A mask that does not fit, selects nothing, or holds no bools."""
  with pytest.raises(error) as info:
    good_update(asam(SGD, mask=mask))
  assert_says(info, 'mask', *phrases)
  if 'selects nothing' not in phrases:
    with pytest.raises(error) as info:
      good_update(asam(SGD, adaptive=normalization.elementwise(mask=mask)))
    assert_says(info, 'mask', *phrases)


@pytest.mark.parametrize(
  'around',
  [
    lambda tx: optax.masked(tx, {'dense': {'kernel': True, 'bias': False}}),
    lambda tx: optax.partition(
      {'asam': tx, 'sgd': SGD}, {'dense': {'kernel': 'asam', 'bias': 'sgd'}}
    ),
  ],
)
def test_masked_node(around):
  """optax.masked and optax.partition go inside."""
  with pytest.raises(ValueError) as info:
    around(asam(SGD)).init(PARAMS)
  assert_says(
    info,
    "params['dense']['bias']",
    'MaskedNode',
    'asam(optax.partition(...), mask=trainable)',
  )
  masked = {'dense': {'kernel': jnp.ones((2, 3)), 'bias': optax.MaskedNode()}}
  with pytest.raises(ValueError, match='MaskedNode'):
    update(params=masked, grads=masked, grad_fn=lambda p: p)


@pytest.mark.parametrize(
  ('leaf', 'phrase'),
  [
    (jnp.arange(3), 'int32'),
    (jnp.ones(3, jnp.complex64), 'complex64'),
    (jnp.ones(3, bool), 'bool'),
    (jax.random.key(0), 'key'),
    (len, 'function len'),
    ('linear', "'linear'"),
  ],
)
def test_dtype_of_params(leaf, phrase):
  """Floating arrays alone."""
  params = {'dense': {'kernel': jnp.ones(3), 'odd': leaf}}
  for call in (
    lambda: asam(SGD).init(params),
    lambda: update(params=params, grads=params, grad_fn=lambda p: p),
    lambda: optax_asam.value_and_grad(lambda p: 0.0)(params),
  ):
    with pytest.raises(TypeError) as info:
      call()
    assert_says(info, "params['dense']['odd']", phrase, 'floating array')


def test_schedule_of_value_and_grad():
  """There is no count of updates."""
  for factory in (optax_asam.value_and_grad, optax_asam.grad):
    with pytest.raises(TypeError) as info:
      factory(loss_fn, rho=optax.constant_schedule(0.5))
    assert_says(info, 'rho', 'schedule', 'rho=schedule(step)')
    with pytest.raises(TypeError) as info:
      factory(0.5)
    assert_says(info, 'fun', '0.5', 'value_and_grad(loss_fn')


def test_inject_hyperparams():
  """Without static_args everything that shapes the program is an array."""
  for kwargs, name in [
    ({}, 'ord'),
    ({'adaptive': normalization.layerwise()}, 'adaptive'),
    ({'descent': lambda count: count}, 'descent'),
    ({'perturbed_dtype': jnp.float32}, 'perturbed_dtype'),
  ]:
    factory = optax.inject_hyperparams(
      asam,
      static_args=('every_k', 'ascent_steps', *(['ord'] if kwargs else [])),
    )
    with pytest.raises(TypeError) as info:
      factory(SGD, **kwargs).init(PARAMS)
    assert_says(info, f'{name} must be known', 'array', 'inject_hyperparams')
    assert_says(info, "static_args=('base_tx', 'adaptive', 'ord', 'mask',")
