"""Promise: around every base, what Optax asks of its optimizers holds.

Where a base alone breaks a promise, it is in a table here with the reason, and
the wrapper must not add to it.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import MomentumASAMState
from optax_asam import asam
from optax_asam import ascent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import sam
from optax_asam import sharpness_aware
from tests.helpers.cases import ASCENTS
from tests.helpers.cases import BASES
from tests.helpers.cases import FAST_BASES
from tests.helpers.cases import LINE_SEARCHES
from tests.helpers.cases import WRAPPERS
from tests.helpers.cases import update_on
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error

RHO, ETA = 0.3, 0.05
DTYPES = {
  **{dtype: (dtype, dtype) for dtype in ('bfloat16', 'float32', 'float64')},
  'mixed': ('bfloat16', 'float32'),
  'mixed with float64': ('float16', 'float64'),
}

# What of Optax breaks a promise alone: in 0.2.7 and later exactly this, so that
# a test fails when an entry is no longer true; in earlier versions more.
KNOWN = hasattr(optax, 'microbatching')
RETYPES = {  # Changes types: in the second call JAX compiles once more.
  'lbfgs': (
    'the report of its search starts with weakly typed numbers, and in a mixed'
    ' tree the step size promotes the updates'
  ),
  'backtracking': 'the report of the search starts with a weakly typed number',
}
UNMAPPED = {  # optax.tree.map_params raises.
  'lbfgs': 'init asks for the dtype of the first leaf of a tree without any',
  'backtracking': 'init asks for the dtype of the first leaf, likewise',
}

STATIC_ARGS = (  # Those of docs/composition.md.
  'base_tx',
  'adaptive',
  'ord',
  'mask',
  'ascent_steps',
  'every_k',
  'when',
  'descent',
  'perturbed_dtype',
)


def loss_fn(params):
  """A bounded smooth function of any tree."""
  return sum(jnp.sum(jnp.sin(w) ** 2) for w in jax.tree.leaves(params))


update = functools.partial(update_on, loss_fn)


def make_params(dtypes='float32'):
  """A dense layer."""
  rng = np.random.default_rng(0)
  kernel, bias = DTYPES[dtypes]
  return {
    'kernel': jnp.asarray(rng.standard_normal((8, 4)), kernel),
    'bias': jnp.asarray(rng.standard_normal(4), bias),
  }


def types(tree):
  """What JAX compiles for: shape, dtype and weak type of leaves."""
  return {
    jax.tree_util.keystr(path): (x.shape, x.dtype, x.weak_type)
    for path, x in jax.tree.leaves_with_path(tree)
  }


def retyped(base, tx, params):
  """The leaves of updates and state whose types an update of ``tx`` changes.

  ``lax.cond`` and ``lax.scan`` check structures, shapes and dtypes, for which
  nothing needs to be compiled.
  """
  changed = set()

  def compare(name, before, after):
    before, after = types(before), types(after)
    assert before.keys() == after.keys()
    changed.update(name + k for k in before if before[k] != after[k])

  def step(params, state):
    updates, new_state = update(base, tx, state, params)
    compare('updates', params, updates)
    compare('state', state, new_state)
    return optax.apply_updates(params, updates), new_state

  def body(carry, i):
    return jax.lax.cond(i % 2 == 0, step, lambda *carry: carry, *carry), None

  jax.eval_shape(
    lambda carry: jax.lax.scan(body, carry, jnp.arange(2)),
    (params, tx.init(params)),
  )
  return changed


@pytest.mark.parametrize(
  'tx',
  [
    asam(optax.sgd(0.1)),
    looksam(optax.sgd(0.1)),
    momentum_asam(optax.sgd(0.1, 0.9)),
  ],
)
def test_unusual_trees(tx):
  """Parameters may be none, shapes, or of NumPy, whose float64 is float32."""
  grads_of = lambda params: jax.tree.map(jnp.asarray, params)
  step = lambda params: tx.update(
    grads_of(params), tx.init(params), params, grad_fn=grads_of
  )
  assert step({})[0] == {}
  shapes = jax.eval_shape(tx.init, {'w': np.ones(2)})
  state = tx.init({'w': jax.ShapeDtypeStruct((2,), jnp.float32)})
  chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
  params = {'w': np.array([1.0, 2.0])}
  assert step(params)[0]['w'].dtype == jnp.float32


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('base', BASES)
def test_types(base, dtypes, request):
  """Updates and states keep structure, shapes and dtypes in cond and scan."""
  if 'float64' in dtypes:
    request.getfixturevalue('x64')
  params = make_params(dtypes)
  try:
    alone = retyped(base, BASES[base](), params)
  except TypeError as exception:
    if KNOWN:
      raise
    pytest.skip(f'in this Optax {base} alone is not stable: {exception}')
  assert not KNOWN or bool(alone) == (base in RETYPES)
  # The wrappers differ where dtypes do, if anywhere.
  for name in WRAPPERS if dtypes == 'mixed' else ('asam',):
    changed = retyped(base, WRAPPERS[name](BASES[base]()), params)
    in_base = re.compile(r'state(\[1\]|\.base_state)')
    assert {in_base.sub('state', path, count=1) for path in changed} == alone
  for tx in ASCENTS.values() if base == 'sgd' else ():
    assert not retyped('sgd', tx, params)


# What is compiled and run: asam around every base, and the others once each.
RUNS = {
  **{base: (base, asam(make(), RHO, ETA)) for base, make in BASES.items()},
  **{
    f'{wrapper} of adam': ('adam', WRAPPERS[wrapper](BASES['adam']()))
    for wrapper in WRAPPERS
    if wrapper != 'asam'
  },
  **{name: ('sgd', tx) for name, tx in ASCENTS.items()},
}
SLOW = [base for base in BASES if base not in FAST_BASES]


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in RUNS
  ],
)
def test_compiled_once_and_restored(name, tmp_path):
  """A step compiles once; from a file, the next step is the same.

  In a mixed tree, so that bfloat16 is written and read, too.
  """
  serialization = pytest.importorskip('flax.serialization')
  base, tx = RUNS[name]

  @jax.jit
  def step(params, state):
    updates, state = update(base, tx, state, params)
    return optax.apply_updates(params, updates), state

  params, state = make_params('mixed'), tx.init(make_params('mixed'))
  # Without the weak types of RETYPES, which would compile once more.
  state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)
  carry = step(params, state)
  after = step(*carry)
  assert step._cache_size() == 1
  path = tmp_path / 'checkpoint'
  path.write_bytes(serialization.to_bytes(carry))
  fresh = jax.tree.map(jnp.zeros_like, params), tx.init(params)
  restored = serialization.from_bytes(fresh, path.read_bytes())
  assert_same_bits(step(*restored), after)


@pytest.mark.parametrize('base', BASES)
def test_init_and_map_params(base):
  """``eval_shape`` works, and ``map_params`` maps what is like params.

  That is the base's state, LookSAM's direction, the perturbation and the
  average of momentum ASAM, and the average of F-SAM.
  """
  params, add_one = make_params(), lambda x: x + 1
  base_tx = BASES[base]()
  if base in UNMAPPED:
    for tx in (base_tx, asam(base_tx)):
      with pytest.raises(IndexError):
        optax.tree.map_params(tx, add_one, tx.init(params))
    return
  of_base = optax.tree.map_params(base_tx, add_one, base_tx.init(params))
  for wrapper, wrap in WRAPPERS.items():
    tx = wrap(base_tx)
    state, abstract = tx.init(params), jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    mapped = optax.tree.map_params(tx, add_one, state)
    own = state if isinstance(state, MomentumASAMState) else state[0]
    more = {
      name: jax.tree.map(add_one, getattr(own, name))
      for name in ('direction', 'perturbation', 'momentum')
      if hasattr(own, name)
    }
    if wrapper == 'friendly':
      (average,), *rest = own.ascent_state
      mapped_average = ascent.FriendlyState(jax.tree.map(add_one, average))
      more['ascent_state'] = (mapped_average, *rest)
    if own is state:
      assert_same_bits(mapped, own._replace(base_state=of_base, **more))
    else:
      assert_same_bits(mapped, (own._replace(**more), of_base))


def spy(seen, name=None):
  """Writes extra arguments into ``seen``; multiplies by that of ``name``."""

  def update_fn(updates, state, params=None, **extra_args):
    del params
    seen.update(extra_args)
    factor = extra_args.get(name, 1)
    return jax.tree.map(lambda u: factor * u, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


@pytest.mark.parametrize('base', [b for b in BASES if b not in LINE_SEARCHES])
def test_extra_args(base):
  """Ascent and base see them, and transformations that take none do not."""
  params = make_params()
  in_ascent, in_base = {}, {}
  tx = optax.chain(
    sharpness_aware(
      optax.chain(ascent.rho_ball(1.0, ETA, True), spy(in_ascent, 'radius'))
    ),
    BASES[base](),
    spy(in_base, 'factor'),
  )
  own = {'radius': RHO, 'factor': 2.0}
  updates, _ = update(base, tx, tx.init(params), params, **own)
  assert in_ascent == own
  assert in_base.keys() == {*own, 'grad_fn'}
  tx = asam(BASES[base](), RHO, ETA)
  expected, _ = update(base, tx, tx.init(params), params, unknown=1)
  assert error(updates, jax.tree.map(lambda u: 2 * u, expected)) < 1e-5


@pytest.mark.parametrize('base', LINE_SEARCHES)
def test_extra_args_of_line_searches(base):
  """They reject unknown ones by themselves; the ascent sees theirs."""
  params, seen = make_params(), {}
  tx = optax.chain(
    sharpness_aware(optax.chain(ASCENTS['rho_ball'], spy(seen))), BASES[base]()
  )

  def trace(tx, **extra_args):
    step = functools.partial(update, base, tx, **extra_args)
    jax.eval_shape(step, tx.init(params), params)

  if KNOWN:  # Earlier versions took them.
    for each in (BASES[base](), tx):
      with pytest.raises(TypeError):
        trace(each, unknown=1)
    seen.clear()
  trace(tx)
  assert seen.keys() == {'value', 'grad'}


SGD = BASES['sgd']()
INJECTED_BALL = optax.inject_hyperparams(
  ascent.rho_ball, static_args=('adaptive', 'ord', 'mask')
)(RHO, ETA, True)
# Transformations whose radius is in the state, and the same with a number.
INJECTED = {
  'asam': (
    optax.inject_hyperparams(asam, static_args=STATIC_ARGS)(SGD, RHO, ETA),
    lambda rho: asam(SGD, rho, ETA),
  ),
  'sam': (
    optax.inject_hyperparams(
      sam, static_args=[a for a in STATIC_ARGS if a != 'adaptive']
    )(SGD, RHO),
    lambda rho: sam(SGD, rho),
  ),
  'looksam': (
    optax.inject_hyperparams(
      looksam,
      static_args=[
        a for a in STATIC_ARGS if a not in ('ascent_steps', 'when', 'descent')
      ],
    )(SGD, RHO, ETA, every_k=1),
    # A compiled branch, as with every_k=2, would fold a number: an ulp.
    lambda rho: looksam(SGD, rho, ETA, every_k=1),
  ),
  'sharpness_aware': (
    optax.chain(sharpness_aware(INJECTED_BALL), SGD),
    lambda rho: asam(SGD, rho, ETA),
  ),
  'rho_ball': (INJECTED_BALL, lambda rho: ascent.rho_ball(rho, ETA, True)),
}


@pytest.mark.parametrize('name', INJECTED)
def test_inject_hyperparams(name):
  """An injected radius gives the bits of a number, and of a schedule."""
  injected, plain = INJECTED[name]
  params = make_params()
  state = injected.init(params)
  for rho in (RHO, 2 * RHO):
    # What is written into the state counts from the next step on.
    state = optax.tree.set(state, rho=jnp.float32(rho))
    updates, state = update('sgd', injected, state, params)
    for tx in (plain(rho), plain(optax.constant_schedule(rho))):
      expected, _ = update('sgd', tx, tx.init(params), params)
      assert_same_bits(updates, expected)
