"""Promise: around every base, what Optax asks of its optimizers holds.

The names of the tests say what that is. Where a base alone breaks a promise,
it is in a table here with the reason, and what is promised is that nothing is
added to that.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness_aware
from support import BASES
from support import LINE_SEARCHES
from support import assert_same_bits
from support import error
from support import update_on

RHO, ETA = 0.3, 0.05

# The public transformations, around a base ...
WRAPPERS = {
  'asam': lambda base_tx: asam(base_tx, RHO, ETA),
  'sam': lambda base_tx: sam(base_tx, RHO),
  'sharpness_aware': lambda base_tx: optax.chain(
    sharpness_aware(
      optax.chain(
        ascent.steepest_ascent(normalization.filterwise(ETA), ord=jnp.inf),
        optax.scale(RHO),
      )
    ),
    base_tx,
  ),
  'every_k': lambda base_tx: asam(
    base_tx,
    RHO,
    ord=3,
    ascent_steps=2,
    every_k=2,
    descent=lambda g, perturbed_g: optax.tree.add(g, perturbed_g),
  ),
}
# ... and on their own.
ASCENTS = {
  'steepest_ascent': ascent.steepest_ascent(normalization.layerwise(ETA)),
  'rho_ball': ascent.rho_ball(RHO, ETA, True),
}

DTYPES = {
  **{
    dtype: {'kernel': dtype, 'bias': dtype}
    for dtype in ('float16', 'bfloat16', 'float32', 'float64')
  },
  'mixed': {'kernel': 'bfloat16', 'bias': 'float32'},
  'mixed with float64': {'kernel': 'float16', 'bias': 'float64'},
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
UNSHARDED = {  # Raises for a sharded tree, so it gets a replicated one.
  'muon': 'multiplies the sharded kernel by its transpose',
  'lbfgs': 'optax.tree.vdot does not say how its result is sharded',
  'backtracking': 'optax.tree.vdot does not say how its result is sharded',
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
  'descent',
  'perturbed_dtype',
)


def loss_fn(params):
  """A bounded smooth function of any tree."""
  return sum(jnp.sum(jnp.sin(w) ** 2) for w in jax.tree.leaves(params))


update = functools.partial(update_on, loss_fn)


def make_params(dtypes='float32'):
  """A dense layer whose dimensions eight devices can share."""
  rng = np.random.default_rng(0)
  return {
    'kernel': jnp.asarray(
      rng.standard_normal((8, 4)), DTYPES[dtypes]['kernel']
    ),
    'bias': jnp.asarray(rng.standard_normal(4), DTYPES[dtypes]['bias']),
  }


def types(tree):
  """What JAX compiles for: shape, dtype, weak type and sharding of leaves."""

  def sharding_type(x):
    return jax.typeof(x).sharding.spec if hasattr(jax, 'typeof') else None

  return {
    jax.tree_util.keystr(path): (
      x.shape,
      x.dtype,
      x.weak_type,
      sharding_type(x),
    )
    for path, x in jax.tree.leaves_with_path(tree)
  }


def retyped(base, tx, params):
  """The leaves of updates and state whose types an update of ``tx`` changes.

  ``lax.cond`` and ``lax.scan`` check structures, shapes, dtypes and shardings,
  for which nothing needs to be compiled.
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


def assert_types_kept(base, params, wrappers=WRAPPERS):
  """Fails if a wrapper changes types that ``base`` alone does not change."""
  try:
    alone = retyped(base, BASES[base](), params)
  except TypeError as exception:
    if KNOWN:
      raise
    pytest.skip(f'in this Optax {base} alone is not stable: {exception}')
  assert not KNOWN or bool(alone) == (base in RETYPES)
  for name in wrappers:
    changed = retyped(base, WRAPPERS[name](BASES[base]()), params)
    # The state of the base is the second of two.
    assert changed == {path.replace('state', 'state[1]') for path in alone}


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('base', BASES)
def test_types(base, dtypes, request):
  """Updates and states keep structure, shapes and dtypes in cond and scan."""
  if 'float64' in dtypes:
    request.getfixturevalue('x64')
  # The wrappers differ where dtypes do, if anywhere.
  wrappers = WRAPPERS if dtypes == 'mixed' else ('asam',)
  assert_types_kept(base, make_params(dtypes), wrappers)


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('tx', ASCENTS)
def test_types_of_ascents(tx, dtypes, request):
  """A perturbation has the types of the parameters."""
  if 'float64' in dtypes:
    request.getfixturevalue('x64')
  assert not retyped('sgd', ASCENTS[tx], make_params(dtypes))


def make_mesh():
  """Eight devices, and shardings that are part of the types."""
  if not hasattr(jax, 'set_mesh'):
    pytest.skip('this JAX has no explicit meshes')
  explicit = jax.sharding.AxisType.Explicit
  return jax.make_mesh((4, 2), ('x', 'y'), axis_types=(explicit, explicit))


def shard(mesh, params):
  """The kernel over both axes, the bias over one."""
  specs = {'kernel': PartitionSpec('x', 'y'), 'bias': PartitionSpec('y')}
  return {
    name: jax.device_put(w, NamedSharding(mesh, specs[name]))
    for name, w in params.items()
  }


@pytest.mark.parametrize('base', [*BASES, *ASCENTS])
def test_sharding_types(base):
  """Updates and states keep their shardings, too."""
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    params = shard(mesh, make_params())
    if base in ASCENTS:
      assert not retyped('sgd', ASCENTS[base], params)
      return
    if base in UNSHARDED:
      with pytest.raises(Exception, match='sharded'):
        retyped(base, BASES[base](), params)
      replicated = NamedSharding(mesh, PartitionSpec())
      params = jax.device_put(params, replicated)
    assert_types_kept(base, params)


def test_sharded_steps():
  """Two steps on eight devices are those on one, and move no parameter."""
  tx = asam(optax.adam(0.1), RHO, ETA)
  step = jax.jit(functools.partial(update, 'adam', tx))

  def run(params):
    state = tx.init(params)
    for _ in range(2):
      updates, state = step(state, params)
      params = optax.apply_updates(params, updates)
    return params

  expected = run(make_params())
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    params = shard(mesh, make_params())
    result = run(params)
  assert all(result[k].sharding == params[k].sharding for k in params)
  assert error(jax.device_get(result), jax.device_get(expected)) < 1e-6


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


@functools.cache
def started(name):
  """A compiled step, parameters and state after a step, number of compilations.

  In a mixed tree, so that bfloat16 is written and read, too.
  """
  base, tx = RUNS[name]

  @jax.jit
  def step(params, state):
    updates, state = update(base, tx, state, params)
    return optax.apply_updates(params, updates), state

  params, state = make_params('mixed'), tx.init(make_params('mixed'))
  # Without the weak types of RETYPES, which would compile once more.
  state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)
  carry = step(params, state)
  step(*carry)
  return step, carry, step._cache_size()


def fresh(name):
  """Parameters and state before the first step."""
  params = make_params('mixed')
  return jax.tree.map(jnp.zeros_like, params), RUNS[name][1].init(params)


@pytest.mark.parametrize('name', RUNS)
def test_compiled_once(name):
  """The second call compiles nothing."""
  _, _, compilations = started(name)
  assert compilations == 1


@pytest.mark.parametrize('name', RUNS)
def test_flax_serialization(name, tmp_path):
  """Restored from a file of flax.serialization, the next step is the same."""
  serialization = pytest.importorskip('flax.serialization')
  step, carry, _ = started(name)
  path = tmp_path / 'checkpoint'
  path.write_bytes(serialization.to_bytes(carry))
  restored = serialization.from_bytes(fresh(name), path.read_bytes())
  assert_same_bits(step(*restored), step(*carry))


def test_orbax(tmp_path):
  """Restored from a checkpoint of Orbax, the next steps are the same."""
  orbax = pytest.importorskip('orbax.checkpoint')
  carries = {name: started(name)[1] for name in RUNS}
  targets = {name: fresh(name) for name in RUNS}
  with orbax.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'checkpoint', carries)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'checkpoint', targets)
  for name, carry in carries.items():
    step, _, _ = started(name)
    # Orbax commits arrays to a device, which would compile once more.
    assert_same_bits(step(*jax.device_get(restored[name])), step(*carry))


@pytest.mark.parametrize('base', BASES)
def test_init_under_eval_shape(base):
  """The structure of a state is known without making one."""
  params = make_params('mixed')
  for wrap in WRAPPERS.values():
    tx = wrap(BASES[base]())
    state, abstract = tx.init(params), jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)


@pytest.mark.parametrize('base', BASES)
def test_map_params(base):
  """It maps what the base keeps for each parameter; ours it leaves alone."""
  params, add_one = make_params(), lambda x: x + 1
  base_tx = BASES[base]()
  if base in UNMAPPED:
    for tx in (base_tx, asam(base_tx)):
      with pytest.raises(IndexError):
        optax.tree.map_params(tx, add_one, tx.init(params))
    return
  of_base = optax.tree.map_params(base_tx, add_one, base_tx.init(params))
  for wrap in WRAPPERS.values():
    tx = wrap(base_tx)
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert_same_bits(same, state)
    mapped = optax.tree.map_params(tx, add_one, state)
    assert_same_bits(mapped, (state[0], of_base))


def spy(seen):
  """Writes the extra arguments that reach it into ``seen``."""

  def update_fn(updates, state, params=None, **extra_args):
    del params
    seen.update(extra_args)
    return updates, state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


@pytest.mark.parametrize('base', [b for b in BASES if b not in LINE_SEARCHES])
def test_extra_args(base):
  """Unknown ones reach ascent and base, and disturb none that takes none."""
  params = make_params()
  in_ascent, in_base = {}, {}
  tx = optax.chain(
    sharpness_aware(
      optax.chain(ASCENTS['rho_ball'], spy(in_ascent)),
    ),
    BASES[base](),
    spy(in_base),
  )
  updates, _ = update(base, tx, tx.init(params), params, unknown=1)
  assert in_ascent == {'unknown': 1}
  assert in_base.keys() == {'unknown', 'grad_fn'}
  tx = asam(BASES[base](), RHO, ETA)
  expected, _ = update(base, tx, tx.init(params), params)
  assert_same_bits(updates, expected)


@pytest.mark.parametrize('tx', ASCENTS)
def test_extra_args_of_ascents(tx):
  """On their own they take none, and ``with_extra_args_support`` drops them."""
  tx, params = ASCENTS[tx], make_params()
  updates, _ = update('sgd', tx, tx.init(params), params, unknown=1)
  expected, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
  assert_same_bits(updates, expected)


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


# L-BFGS would compile its search five times; backtracking stands for it.
@pytest.mark.parametrize('base', [b for b in BASES if b != 'lbfgs'])
def test_ways_to_give_rho(base):
  """A number, a constant schedule and an injected number: the same bits.

  What is written into the injected state counts from the next step on.
  """
  params = make_params()
  plain = asam(BASES[base](), RHO, ETA)
  scheduled = asam(BASES[base](), optax.constant_schedule(RHO), ETA)
  injected = optax.inject_hyperparams(asam, static_args=STATIC_ARGS)(
    BASES[base](), RHO, ETA
  )
  updates, state = update(base, plain, plain.init(params), params)
  of_schedule = update(base, scheduled, scheduled.init(params), params)
  assert_same_bits(of_schedule, (updates, state))
  of_injected = update(base, injected, injected.init(params), params)
  assert_same_bits(of_injected[0], updates)
  assert_same_bits(of_injected[1].inner_state, state)

  changed = asam(BASES[base](), 2 * RHO, 3 * ETA)
  expected, _ = update(base, changed, state, params)
  of_injected[1].hyperparams['rho'] *= 2
  of_injected[1].hyperparams['eta'] *= 3
  assert_same_bits(update(base, injected, of_injected[1], params)[0], expected)


SGD = BASES['sgd']()
INJECTED_BALL = optax.inject_hyperparams(
  ascent.rho_ball, static_args=('adaptive', 'ord', 'mask')
)(RHO, ETA, True)


@pytest.mark.parametrize(
  ('injected', 'plain'),
  [
    (
      optax.inject_hyperparams(
        sam, static_args=[a for a in STATIC_ARGS if a != 'adaptive']
      )(SGD, RHO),
      lambda rho: sam(SGD, rho),
    ),
    (
      optax.chain(sharpness_aware(INJECTED_BALL), SGD),
      lambda rho: asam(SGD, rho, ETA),
    ),
    (INJECTED_BALL, lambda rho: ascent.rho_ball(rho, ETA, True)),
  ],
  ids=['sam', 'sharpness_aware', 'rho_ball'],
)
def test_inject_hyperparams(injected, plain):
  """The same for the other transformations that have a radius."""
  params = make_params()
  state = injected.init(params)
  for rho in (RHO, 2 * RHO):
    state = optax.tree.set(state, rho=jnp.float32(rho))
    updates, state = update('sgd', injected, state, params)
    tx = plain(rho)
    expected, _ = update('sgd', tx, tx.init(params), params)
    assert_same_bits(updates, expected)
