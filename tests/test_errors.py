"""Promise: an error says what is wrong, what was given, and what to write.

Of a message, only names, values and code are checked, not its wording: the
phrases of a case, with ' & ' between them.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from optax_asam import asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness
from optax_asam import sharpness_aware
import optax_asam.equinox
import optax_asam.nnx

PARAMS = {'dense': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
BIAS = "params['dense']['bias']"
SGD = optax.sgd(0.1)
KEY = jax.random.key(0)
T = jnp.arange(3.0)


def loss_fn(params):
  """A scalar of ``params``."""
  return (params['dense']['kernel'] @ params['dense']['bias']).sum()


def update(tx=None, grads=PARAMS, params=PARAMS, **extra_args):
  """One update of ``tx``, of asam by default."""
  tx = tx or asam(SGD)
  return tx.update(grads, tx.init(PARAMS), params, **extra_args)


GRAD_FN = jax.grad(loss_fn)
good_update = functools.partial(update, grad_fn=GRAD_FN)


def assert_raises(error, call, phrases):
  """Fails unless ``call()`` raises a message with these phrases."""
  with pytest.raises(error) as info:
    call()
  for phrase in phrases.split(' & '):
    assert phrase in str(info.value), (phrase, str(info.value))


# Bad values of a keyword: tuples of error, keyword, value and phrases.


def each(error, name, values, phrases='{} & {name}='):
  """A case for each value, which is ``{}`` in the phrases."""
  got = str if error is ValueError else repr
  return [
    (error, name, value, phrases.format(got(value), name=name))
    for value in values
  ]


def each_scale(name):
  """Bad values of a number >= 0."""
  return [
    *each(
      ValueError, name, (-0.1, np.nan, np.inf, np.float32(-1), np.array(-1.0))
    ),
    *each(ValueError, name, (jnp.array(-1.0), jnp.bfloat16(-1), np.int8(-1))),
    *each(TypeError, name, ('0.5', None, True, 1j, [0.5])),
    (TypeError, name, jnp.ones(3), f'(3,) & {name}='),
    (TypeError, name, jnp.array(True), f'bool & {name}='),
    (TypeError, name, jnp.array(1j), f'complex64 & {name}='),
  ]


def each_decay(name):
  """Bad values of a number in [0, 1)."""
  return [
    *each(ValueError, name, (-0.1, 1.0, np.nan, jnp.array(1.5))),
    *each(TypeError, name, ('0.9', True)),
  ]


def each_count(name):
  """Bad values of an int >= 1."""
  return [
    *each(ValueError, name, (0, -2)),
    *each(TypeError, name, (1.0, '2', None, True, 1.5)),
    (TypeError, name, jnp.array(2), f'{name} & 2 & static_args'),
  ]


NOT_CALLED = normalization.layerwise
KEYWORDS = [
  *each_scale('rho'),
  *each_scale('eta'),
  *each_scale('alpha'),
  *each_scale('sigma'),
  *each_decay('decay'),
  *each_decay('gamma'),
  *each_decay('momentum'),
  *each_count('every_k'),
  *each_count('ascent_steps'),
  *each(ValueError, 'ord', (1, 1.0001, 0.5, 0, np.nan, -np.inf), '{} & ord=2'),
  *each(TypeError, 'ord', ('inf', 'fro', None, True), '{} & ord=2'),
  *each(
    TypeError,
    'adaptive',
    ('filterwise', None, 0.01, 1, {'kernel': 1}),
    '{} & adaptive=normalization.',
  ),
  (TypeError, 'adaptive', NOT_CALLED, 'adaptive=normalization.layerwise()'),
  *each(TypeError, 'descent', (0.5,)),
  (TypeError, 'descent', optax_asam.descent.gsam, 'descent=descent.gsam()'),
  *each(TypeError, 'perturbed_dtype', ('halff',), "'halff' & {name}=jnp."),
  (TypeError, 'perturbed_dtype', jnp.int32, 'int32 & perturbed_dtype=jnp.'),
  *[  # As optax.inject_hyperparams makes them.
    (TypeError, name, jnp.array(1.0), f'{name} & 1.0 & static_args')
    for name in ('ord', 'adaptive', 'descent', 'perturbed_dtype')
  ],
  *each(ValueError, 'mask', ({'dense': False},), '{} & mask=None'),
]


WRAPPERS = (asam, sam, looksam, momentum_asam)
ESTIMATORS = (
  optax_asam.value_and_grad,
  optax_asam.grad,
  optax_asam.nnx.value_and_grad,
  optax_asam.nnx.grad,
  optax_asam.equinox.filter_value_and_grad,
  optax_asam.equinox.filter_grad,
)
FACTORIES = [
  *[functools.partial(wrapper, SGD) for wrapper in WRAPPERS],
  *[functools.partial(estimator, loss_fn) for estimator in ESTIMATORS],
  *(ascent.friendly, descent.gsam, descent.wsam),
]


@pytest.mark.parametrize(('error', 'name', 'value', 'phrases'), KEYWORDS)
def test_keywords(error, name, value, phrases):
  """In all that take it, before anything is traced."""
  for factory in FACTORIES:
    if name in inspect.signature(factory).parameters:
      call = functools.partial(factory, **{name: value})
      assert_raises(error, call, f'{name} & {phrases}')


@pytest.mark.parametrize('factory', WRAPPERS)
def test_base_tx(factory):
  """Likely slips with the first argument."""
  for call, got in [
    (lambda f: f(rho=0.5), 'base_tx'),
    (lambda f: f(0.5), '0.5'),
    (lambda f: f(optax.sgd), 'sgd'),
    (lambda f: f(base_tx='sgd'), "'sgd'"),
    (lambda f: f(None), 'None'),
    (lambda f: f(loss_fn), 'loss_fn'),
  ]:
    phrases = f'base_tx & {got} & {factory.__name__}(optax.sgd(0.1))'
    assert_raises(TypeError, functools.partial(call, factory), phrases)


STEEPEST = ascent.steepest_ascent(normalization.identity())
KERNEL = {'kernel': jnp.ones((2, 2, 2))}
MASK = {'dense': {'kernel': True, 'bias': False}}
MASKED = {'dense': {'kernel': jnp.ones((2, 3)), 'bias': optax.MaskedNode()}}
LABELS = {'dense': {'kernel': 'asam', 'bias': 'sgd'}}
NEEDS_PARAMS = 'params & None & update(grads, state, params)'
GOES_INSIDE = (
  f'{BIAS} & MaskedNode & asam(optax.partition(...), mask=trainable)'
)
AXIS = 'axis=-1 & axis=0'
BY_POSITION = 'argnums & argnums=0'
SCHEDULE = optax.constant_schedule(0.5)


def partitioned():
  """The state of a partition around asam."""
  return optax.partition({'asam': asam(SGD), 'sgd': SGD}, LABELS).init(PARAMS)


def as_ascent(eps):
  """An ascent that returns ``eps``."""
  return optax.stateless(lambda grads, params: eps)


TYPE_ERRORS = [
  (lambda: sharpness_aware(normalization.elementwise()), 'steepest_ascent('),
  *[
    (lambda tx=tx: tx.init({'w': 1}), "params['w'] & 1")
    for tx in (STEEPEST, ascent.friendly())
  ],
  (lambda: ascent.steepest_ascent(0.01), '0.01 & normalization=normalization.'),
  (
    lambda: ascent.steepest_ascent(NOT_CALLED),
    'normalization=normalization.layerwise()',
  ),
  *[
    (
      functools.partial(normalization.filterwise, axis=axis),
      f'{axis!r} & {AXIS}',
    )
    for axis in (None, 1.0, 'output', True)
  ],
  (
    lambda: good_update(asam(SGD, adaptive=normalization.not_bias)),
    f'normalization & {BIAS} & False',
  ),
  (lambda: update(grad_fn=3.5), '3.5 & grad_fn='),
  (lambda: update(value_fn=3.5), '3.5 & value_fn='),
  (lambda: optax_asam.grad(loss_fn, 0.5), 'argnums & 0.5 & rho=0.5'),
  (lambda: optax_asam.grad(loss_fn, True), 'argnums & True'),
  (lambda: asam(SGD, when=10), 'when & 10 & when=lambda step:'),
  *[
    (
      lambda radius=radius: good_update(asam(SGD, rho=lambda step: radius)),
      f'rho must return & {got} & schedule',
    )
    for radius, got in ((jnp.ones(1), '(1,)'), (None, 'NoneType'))
  ],
  (lambda: asam(SGD, mask={'dense': 1}), "mask['dense'] & 1 & mask="),
  (
    lambda: asam(optax.MultiSteps(SGD, 2)),
    'base_tx & MultiSteps & base_tx=multi_steps.gradient_transformation()',
  ),
  (
    lambda: good_update(asam(SGD, when=lambda step: step)),
    'when & int32 & when=lambda step:',
  ),
  (
    lambda: good_update(grads=jax.tree.map(lambda x: x > 0, PARAMS)),
    f'grads & {BIAS} & bool',
  ),
  (lambda: optax_asam.grad(loss_fn, 3)(PARAMS), f'3 & {BY_POSITION}'),
  (lambda: optax_asam.grad(loss_fn, (0, 1))(PARAMS), f'(0, 1) & {BY_POSITION}'),
  (lambda: optax_asam.grad(loss_fn)(params=PARAMS), BY_POSITION),
  *[
    case
    for factory in (optax_asam.value_and_grad, optax_asam.grad)
    for case in [
      (
        functools.partial(factory, loss_fn, rho=SCHEDULE),
        'rho & schedule & rho=schedule(step)',
      ),
      (functools.partial(factory, 0.5), 'fun & 0.5 & value_and_grad(loss_fn'),
      *[
        (
          lambda factory=factory, fun=fun, has_aux=has_aux: factory(
            loss_fn, has_aux=has_aux, ascent_fun=fun
          )(PARAMS),
          f'ascent_fun & {got} & ascent_fun=lambda params, batch: loss_fn(',
        )
        for fun, has_aux, got in [
          (PARAMS, False, 'kernel'),
          (loss_fn, True, 'float32'),
          (lambda p: (loss_fn(p), 1), False, 'tuple of length 2'),
          (lambda p: p['dense']['bias'], False, '(3,)'),
        ]
      ],
    ]
  ],
]
VALUE_ERRORS = [
  *[
    (
      lambda axis=axis: normalization.filterwise(axis=axis)(KERNEL),
      f'axis={axis} & (2, 2, 2) & {AXIS}',
    )
    for axis in (-4, 3, 4)
  ],
  (
    lambda: asam(SGD, mask={'w': False, 'activation': None}),
    "mask & 'w': False & mask=None",
  ),
  (
    lambda: ascent.friendly().update({}, ascent.friendly().init(PARAMS)),
    'grads & is missing',
  ),
  (  # As optax.inject_hyperparams makes it of a function.
    lambda: good_update(asam(SGD, mask=True)),
    'mask & True & mask=None & static_args',
  ),
  (
    lambda: good_update(asam(SGD, adaptive=lambda params: {'dense': 1})),
    f'normalization & {BIAS}',
  ),
  (
    lambda: good_update(
      asam(SGD, adaptive=lambda p: jax.tree.map(lambda _: jnp.ones(7), p))
    ),
    f'normalization & {BIAS} & (7,) & (3,)',
  ),
  (lambda: STEEPEST.update(PARAMS, STEEPEST.init(PARAMS)), NEEDS_PARAMS),
  (lambda: good_update(params=None), NEEDS_PARAMS),
  (
    update,
    'grad_fn=grad_fn & value_fn=value_fn & neither & apply_gradients'
    ' & optax_asam.value_and_grad',
  ),
  (
    lambda: good_update(value_fn=loss_fn, obj_fn=loss_fn),
    'grad_fn=grad_fn & got grad_fn and value_fn',
  ),
  (lambda: good_update(grads={'dense': {'kernel': 1.0}}), f'grads & {BIAS}'),
  (
    lambda: good_update(grads=jax.tree.map(jnp.sum, PARAMS)),
    f'grads & {BIAS} & () & (3,)',
  ),
  (lambda: good_update(grads=(PARAMS, 1.0)), 'grads & tuple'),
  (
    lambda: STEEPEST.update([jnp.ones(2)], (), (jnp.ones(2),)),
    'grads & list & tuple',
  ),
  (
    lambda: good_update(asam(SGD, descent=lambda g, h: (g, h))),
    'descent & tuple & descent=lambda',
  ),
  *[
    (
      lambda eps=eps: good_update(sharpness_aware(as_ascent(eps))),
      f'ascent & {BIAS} & {got} & rho_ball',
    )
    for eps, got in (
      (
        {'dense': {**PARAMS['dense'], 'bias': jnp.ones((3, 3))}},
        '(3, 3) & (3,)',
      ),
      ({'dense': {'kernel': jnp.ones((2, 3))}}, 'is missing'),
    )
  ],
  (lambda: optax.masked(asam(SGD), MASK).init(PARAMS), GOES_INSIDE),
  (partitioned, GOES_INSIDE),
  (lambda: good_update(grads=MASKED, params=MASKED), 'MaskedNode'),
]


@pytest.mark.parametrize(
  ('error', 'call', 'phrases'),
  [
    *[(TypeError, *case) for case in TYPE_ERRORS],
    *[(ValueError, *case) for case in VALUE_ERRORS],
  ],
)
def test_calls(error, call, phrases):
  """Of all that is not a keyword of asam."""
  assert_raises(error, call, phrases)


@pytest.mark.parametrize('every_k', [1, 2])
@pytest.mark.parametrize(
  ('grad_fn', 'phrases'),
  [
    (lambda p: {'dense': {'kernel': p['dense']['kernel']}}, BIAS),
    (lambda p: {**p, 'more': jnp.ones(2)}, "params['more']"),
    (lambda p: list(p.values()), f'{BIAS} & list'),
    (jax.grad(lambda p: (loss_fn(p), 1), has_aux=True), 'has_aux=True & )[0]'),
    (jax.value_and_grad(loss_fn), 'has_aux=True & )[0]'),
    (loss_fn, '() & grad_fn=jax.grad(loss_fn)'),
    (lambda p: jax.tree.map(lambda x: x[:1], p), f'{BIAS} & (1,) & (3,)'),
  ],
)
def test_result_of_grad_fn(every_k, grad_fn, phrases):
  """The first path that differs is named; for a tuple, has_aux."""
  call = lambda: update(asam(SGD, every_k=every_k), grad_fn=grad_fn)
  assert_raises(ValueError, call, f'grad_fn & {phrases}')


def test_result_of_grad_fn_for_a_tuple():
  """Where params are a tuple themselves, has_aux is not the reason."""
  params = (jnp.ones(2), jnp.ones(3))
  tx = sharpness_aware(ascent.rho_ball(0.5, 0.01, True))
  with pytest.raises(ValueError) as info:
    update(tx, params, params, grad_fn=lambda p: (p[0], p[1][:1]))
  assert 'params[1]' in str(info.value)
  assert 'has_aux' not in str(info.value)
  value_and_grad = jax.value_and_grad(lambda p: jnp.sum(p[0]))
  with pytest.raises(ValueError, match='has_aux'):
    update(tx, params, params, grad_fn=value_and_grad)


@pytest.mark.parametrize(
  ('value_fn', 'got'),
  [
    (lambda p: p['dense']['bias'], '(3,)'),
    (lambda p: (loss_fn(p), 1.0), 'tuple'),
    (lambda p: p, 'dict'),
    (lambda p: np.float32, 'type'),
    (lambda p: [loss_fn(p)], 'list'),
    (lambda p: loss_fn, 'function'),
    (lambda p: 'loss', 'str'),
    (lambda p: 1, 'int'),
    (lambda p: loss_fn(p) + 1j, 'complex64'),
    (lambda p: loss_fn(p).astype(int), 'int32'),
  ],
)
def test_result_of_value_fn(value_fn, got):
  """A real scalar."""
  call = lambda: update(value_fn=value_fn)
  assert_raises(TypeError, call, f'value_fn & {got} & loss(p)')


FITS = 'mask=jax.tree.map('


@pytest.mark.parametrize(
  ('error', 'mask', 'phrases'),
  [
    (ValueError, {'conv': True}, f'{BIAS} & {FITS}'),
    (ValueError, {'dense': {'kernel': True}}, f'{BIAS} & {FITS}'),
    (ValueError, {'dense': True, 'conv': True}, f"no params['conv'] & {FITS}"),
    (ValueError, [True], f'{BIAS} & {FITS}'),
    (ValueError, lambda p: {'conv': True}, f'{BIAS} & {FITS}'),
    (ValueError, lambda p: False, 'mask=None'),
    (ValueError, normalization.normalization_layers, 'mask=None'),
    (TypeError, {'dense': 'yes'}, f"mask['dense'] & 'yes' & {FITS}"),
    (TypeError, {'dense': 1}, f"mask['dense'] & 1 & {FITS}"),
    (TypeError, lambda p: p, f'(3,) & static_args & {FITS}'),
    (TypeError, jnp.array(True), f'() & static_args & {FITS}'),
  ],
)
def test_mask(error, mask, phrases):
  """A mask that does not fit, selects nothing, or holds other than bools."""
  assert_raises(error, lambda: good_update(asam(SGD, mask=mask)), phrases)
  if phrases != 'mask=None':
    call = lambda: normalization.elementwise(mask=mask)(PARAMS)
    assert_raises(error, call, phrases)


@pytest.mark.parametrize(
  ('leaf', 'got'),
  [
    (jnp.arange(3), 'int32'),
    (jnp.ones(3, jnp.complex64), 'complex64'),
    (jnp.ones(3, bool), 'bool'),
    (KEY, 'key'),
    (len, 'len'),
    ('linear', "'linear'"),
  ],
)
def test_leaves_of_params(leaf, got):
  """Floating arrays alone."""
  params = {'dense': {'kernel': jnp.ones(3), 'odd': leaf}}
  for call in (
    lambda: asam(SGD).init(params),
    lambda: update(params=params, grads=params, grad_fn=lambda p: p),
    lambda: optax_asam.value_and_grad(lambda p: 0.0)(params),
    lambda: sharpness.worst_case(lambda p: 0.0, params, 0.1),
  ):
    assert_raises(TypeError, call, f"params['dense']['odd'] & {got}")


def test_inject_hyperparams():
  """Without static_args, what shapes the program becomes an array."""
  static_args = ['every_k', 'ascent_steps']
  for kwargs, name in [
    ({}, 'ord'),
    ({'adaptive': normalization.layerwise()}, 'adaptive'),
    ({'descent': lambda count: count}, 'descent'),
    ({'perturbed_dtype': jnp.float32}, 'perturbed_dtype'),
  ]:
    injected = optax.inject_hyperparams(asam, static_args)(SGD, **kwargs)
    call = functools.partial(injected.init, PARAMS)
    write = "static_args=('base_tx', 'adaptive', 'ord', 'mask',"
    assert_raises(TypeError, call, f'{name} & {write}')
    static_args = ['every_k', 'ascent_steps', 'ord']


# The measures of sharpness.

WORST = (sharpness.worst_case, sharpness.worst_perturbation)
AVERAGE = (sharpness.average_case,)
EIGENVALUE = (sharpness.max_hessian_eigenvalue,)
WITH_RHO = WORST + AVERAGE
ALL = WITH_RHO + EIGENVALUE
WITH_BATCHES = (WORST[0], *AVERAGE, *EIGENVALUE)
BATCHES = 'x.reshape(-1, 128'
RULE = 'step_rule=sharpness.fixed_steps('
A_KEY = 'key=jax.random.key(0)'
# The measures, the error, the keyword, its value, and phrases.
SHARPNESS = [
  *[(WITH_RHO, *case) for case in each_scale('rho')],
  *[(WORST + EIGENVALUE, *case) for case in each_count('steps')],
  *[(WORST, *case) for case in each_count('restarts')],
  *[(AVERAGE, *case) for case in each_count('samples')],
  (WITH_RHO, TypeError, 'rho', loss_fn, 'loss_fn & rho=0.5'),
  (ALL, TypeError, 'loss_fn', 3.5, '3.5 & lambda params'),
  (ALL, TypeError, 'loss_fn', jnp.ones([]), 'function, but got an array'),
  (ALL, TypeError, 'loss_fn', lambda p: p['dense']['bias'], '(3,) & .mean()'),
  (ALL, TypeError, 'loss_fn', lambda p: (1.0, 1.0), 'tuple & loss(p)[0]'),
  (
    ALL,
    TypeError,
    'normalization',
    0.01,
    '0.01 & normalization=normalization.',
  ),
  (ALL, TypeError, 'normalization', NOT_CALLED, '=normalization.layerwise()'),
  (ALL, ValueError, 'mask', False, 'mask=None'),
  (ALL, ValueError, 'mask', lambda p: False, 'mask=None'),
  *[(WITH_RHO, *case) for case in each(ValueError, 'ord', (1, 3, np.nan))],
  (WITH_RHO, TypeError, 'ord', 'inf', "'inf' & ord="),
  (AVERAGE, ValueError, 'distribution', 'gauss', "'gauss' & ='normal'"),
  (WORST, TypeError, 'step_rule', sharpness.apgd_steps, f'apgd_steps & {RULE}'),
  (WORST, TypeError, 'step_rule', 0.25, f'0.25 & {RULE}'),
  (WORST, ValueError, 'restarts', 2, f'restarts=2 & {A_KEY}'),
  (ALL, TypeError, 'key', 0, f'0 & {A_KEY}'),
  (ALL, TypeError, 'key', jnp.ones(2), f'1. & {A_KEY}'),
  (AVERAGE + EIGENVALUE, TypeError, 'key', None, f'None & {A_KEY}'),
  (ALL, ValueError, 'params', {}, 'params & dict'),
  (ALL, ValueError, 'params', jnp.ones((0, 2)), 'params & (0, 2)'),
  *[
    (WITH_BATCHES, ValueError, 'batches', batches, f'{got} & {BATCHES}')
    for batches, got in [
      ((jnp.ones(3), jnp.ones(2)), '[(3,), (2,)]'),
      (jnp.ones((0, 2)), '[(0, 2)]'),
      ((jnp.ones(3), 1.0), '[(3,), ()]'),
      ((), '[]'),
    ]
  ],
]


@pytest.mark.parametrize(
  ('measures', 'error', 'name', 'value', 'phrases'), SHARPNESS
)
def test_sharpness(measures, error, name, value, phrases):
  """Of the measures of sharpness."""
  right = {'loss_fn': loss_fn, 'params': PARAMS, 'rho': 0.1, 'key': KEY}
  if name == 'restarts':
    del right['key']
  for measure in measures:
    given = right | {name: value}
    if measure in EIGENVALUE:
      del given['rho']
    call = functools.partial(measure, **given)
    assert_raises(error, call, f'{name} & {phrases}')


@pytest.mark.parametrize(
  ('error', 'name', 'value', 'phrases'),
  [
    case[1:]
    for case in SHARPNESS
    if set(case[0]) >= set(WITH_BATCHES) and case[2] in ('loss_fn', 'batches')
  ],
)
def test_loss_along(error, name, value, phrases):
  """Of a grid of losses: what it shares with the measures."""
  given = {'loss_fn': loss_fn, 'batches': None} | {name: value}
  call = lambda: sharpness.loss_along(
    given['loss_fn'], PARAMS, (PARAMS, T), batches=given['batches']
  )
  assert_raises(error, call, f'{name} & {phrases}')


AXES = [
  ((), ValueError, 'none'),
  ((PARAMS,), TypeError, 'dict'),
  (((PARAMS,),), TypeError, 'a tuple of length 1'),
  (((PARAMS, 0.5),), TypeError, 'float'),
  (((PARAMS, [0.0, 1.0]),), TypeError, 'list'),
  (((PARAMS, T), (PARAMS, T[None])), TypeError, '(1, 3)'),
  (((PARAMS, T * 1j),), TypeError, 'complex64'),
  (((T, PARAMS),), ValueError, "direction & params['dense']"),
]


@pytest.mark.parametrize(('axes', 'error', 'phrases'), AXES)
def test_axes(axes, error, phrases):
  """Of a grid of losses."""
  call = functools.partial(sharpness.loss_along, loss_fn, PARAMS, *axes)
  assert_raises(error, call, f'axes & {phrases} & (eps, jnp.linspace(')


@pytest.mark.parametrize(
  ('error', 'name', 'value', 'phrases'), each_scale('size')
)
def test_size(error, name, value, phrases):
  """Of the fixed steps."""
  call = functools.partial(sharpness.fixed_steps, **{name: value})
  assert_raises(error, call, f'{name} & {phrases}')
