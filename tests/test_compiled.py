"""Promise: what a compiled program costs is read from it as it is."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import compiled
from compiled import Collective
import large_models
import pages
import steps
from support import error
from support import shard_map
import tpu_aot

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks/results/tpu_aot.json'


@pytest.fixture(scope='module')
def mesh():
  """Four by two devices."""
  return jax.make_mesh((4, 2), ('a', 'b'))


def on_each_device(mesh, function):
  """``function`` under shard_map, all arguments and results replicated."""
  return shard_map(
    function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )


def collectives_of(mesh, function, *args):
  """The collectives of a compiled function."""
  program = jax.jit(on_each_device(mesh, function)).lower(*args).compile()
  return compiled.collectives(program.as_text())


def test_collectives_of_each_kind(mesh):
  """Sizes and groups are those of the mesh; loops multiply."""

  def function(x):
    def inner(x, _):
      return jnp.sin(jax.lax.psum(x, 'a')), None

    def outer(x, _):
      x, _ = jax.lax.scan(inner, x, None, length=5)
      return jax.lax.ppermute(x, 'b', [(0, 1), (1, 0)]), None

    x, _ = jax.lax.scan(outer, x, None, length=3)
    scattered = jax.lax.psum_scatter(x, ('a', 'b'), tiled=True)
    return (
      jax.lax.all_gather(x, 'b'),
      scattered,
      jax.lax.all_to_all(x.astype(jnp.int8), 'a', 0, 0, tiled=True),
    )

  found = collectives_of(mesh, function, jnp.ones(16))
  assert sorted(found) == [
    Collective('all-gather', 2 * 64, groups=4, group_size=2, count=1),
    Collective('all-reduce', 64, groups=2, group_size=4, count=15),
    Collective('all-to-all', 16, groups=2, group_size=4, count=1),
    Collective('collective-permute', 64, groups=8, group_size=2, count=3),
    Collective('reduce-scatter', 8, groups=1, group_size=8, count=1),
  ]
  totals = compiled.total_by_kind(found)
  assert totals['all-reduce'] == (15, 15 * 64)
  assert totals['reduce-scatter'] == (1, 8)


def test_tuple_is_summed(mesh):
  """Two arrays are reduced in one or in two collectives, of the same size."""

  def function(x):
    return jax.lax.psum((x, x[:4].astype(jnp.bfloat16)), 'a')

  totals = compiled.total_by_kind(collectives_of(mesh, function, jnp.ones(16)))
  assert list(totals) == ['all-reduce']
  assert totals['all-reduce'].count <= 2
  # XLA for CPU reduces bfloat16 as float32.
  assert totals['all-reduce'].bytes in (64 + 4 * 2, 64 + 4 * 4)


def test_cost_of_a_product():
  """Arguments, results, donated memory, operations and bytes."""

  def function(x, y):
    return x @ y, x + 1

  x, y = jnp.ones((8, 16)), jnp.ones((16, 4))
  donating = jax.jit(function, donate_argnums=0).lower(x, y).compile()
  cost = compiled.read(donating)
  assert cost.argument_bytes == x.nbytes + y.nbytes
  assert x.nbytes + 8 * 4 * 4 <= cost.output_bytes < x.nbytes + 8 * 4 * 4 + 64
  assert cost.alias_bytes == x.nbytes
  assert cost.peak_bytes == (
    cost.argument_bytes + cost.output_bytes - x.nbytes + cost.temporary_bytes
  )
  assert cost.flops == 2 * 8 * 16 * 4 + 8 * 16
  assert cost.bytes_accessed > x.nbytes + y.nbytes
  assert cost.collectives == []


# As the compiler for TPU writes: no trip counts, layouts with parentheses.
LOOP = """\
HloModule loop, is_scheduled=true, num_partitions=8

%body (state: (s32[], f32[8,4], s32[])) -> (s32[], f32[8,4], s32[]) {
  %state = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %step = s32[] get-tuple-element(%state), index=2
  %next = s32[] add(%i, %step)
  %sum = f32[8,4]{1,0:T(8,128)S(1)} all-reduce(%x), replica_groups={}
  ROOT %result = (s32[], f32[8,4], s32[]) tuple(%next, %sum, %step)
}

%condition (state.1: (s32[], f32[8,4], s32[])) -> pred[] {
  %end = s32[] constant(12)
  %state.1 = (s32[], f32[8,4], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %end), direction=LT, \
backend_config={"calls=%body":[]}
}

ENTRY %main (x.1: f32[8,4]) -> f32[8,4] {
  %first = s32[] constant(4)
  %step.1 = s32[] constant(3)
  %start = s32[] copy(%first)
  %x.1 = f32[8,4]{1,0} parameter(0)
  %state.2 = (s32[], f32[8,4], s32[]) tuple(%start, %x.1, /*index=2*/%step.1)
  %loop = (s32[], f32[8,4], s32[]) while(%state.2), condition=%condition, \
body=%body
  ROOT %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loop_without_a_trip_count():
  """It is read from start, end and step: 4, 7 and 10 are below 12."""
  assert compiled.collectives(LOOP) == [
    Collective('all-reduce', 8 * 4 * 4, groups=1, group_size=8, count=3)
  ]


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('%end = s32[] constant(12)', '%end = s32[] custom-call()'),
    ('direction=LT', 'direction=NE'),
    ('%next = s32[] add(%i, %step)', '%next = s32[] multiply(%i, %step)'),
    ('%step.1 = s32[] constant(3)', '%step.1 = s32[] parameter(1)'),
    ('tuple(%next, %sum, %step)', 'tuple(%next, %sum, %next)'),
  ],
)
def test_loop_of_unknown_length(old, new):
  """A collective in it is an error; without one it does not matter."""
  assert old in LOOP
  text = LOOP.replace(old, new)
  with pytest.raises(ValueError, match='sum is in a loop of unknown length'):
    compiled.collectives(text)
  assert compiled.collectives(text.replace('all-reduce(', 'negate(')) == []


def in_entry(*lines):
  """A program of these lines."""
  body = '\n'.join(f'  {line}' for line in lines)
  return (
    'HloModule lines, num_replicas=2, num_partitions=4\n\n'
    f'ENTRY %main (x: f32[4]) -> f32[4] {{\n{body}\n}}\n'
  )


@pytest.mark.parametrize(
  ('lines', 'expected'),
  [
    pytest.param(
      [
        '%x = f32[4]{0} parameter(0)',
        '%s = (f32[4]{0}, f32[8]{0}) all-gather-start(%x),'
        ' replica_groups=[4,2]<=[8], dimensions={0}',
        'ROOT %d = f32[8]{0} all-gather-done(%s)',
      ],
      Collective('all-gather', 32, 4, 2, 1),
      id='start and done',
    ),
    pytest.param(
      [
        '%s = ((f32[8]{0}), f32[4]{0}, u32[]) reduce-scatter-start(%x),'
        ' replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}',
        '%u = ((f32[8]{0}), f32[4]{0}, u32[]) reduce-scatter-update(%s)',
        'ROOT %d = f32[4]{0} reduce-scatter-done(%u)',
      ],
      Collective('reduce-scatter', 16, 4, 2, 1),
      id='with an update',
    ),
    pytest.param(
      [
        'ROOT %r = (f32[4]{0:T(128)(2,1)S(1)}, /*index=1*/bf16[2,3]{1,0},'
        ' pred[], s4[3]) all-reduce(%a, %b, /*index=2*/%c, %d),'
        " replica_groups=mesh['m'=2,'n'=4], device_ids=([4,2]T(1,0)) {'n'}"
      ],
      Collective('all-reduce', 16 + 12 + 1 + 2, 2, 4, 1),
      id='tuple over a mesh',
    ),
    pytest.param(
      ["ROOT %r = f32[4]{0} all-reduce(%a), replica_groups=mesh['m'=8]"
       " {'m':(2)2}"],
      Collective('all-reduce', 16, 4, 2, 1),
      id='part of an axis',
    ),
    pytest.param(
      ['ROOT %r = f32[4]{0} all-reduce(%a), replica_groups={}'],
      Collective('all-reduce', 16, 1, 8, 1),
      id='all devices',
    ),
    pytest.param(
      ['ROOT %r = c64[4]{0} collective-permute(c64[4]{0} %a),'
       ' source_target_pairs={{0,1},{1,2},{2,0}}'],
      Collective('collective-permute', 32, 3, 2, 1),
      id='pairs',
    ),
    pytest.param(
      ['ROOT %r = (f8e4m3fn[4], token[]) ragged-all-to-all(%a),'
       ' replica_groups=[1,8]<=[8]'],
      Collective('ragged-all-to-all', 4, 1, 8, 1),
      id='ragged',
    ),
  ],
)  # fmt: skip
def test_forms(lines, expected):
  """One collective each, however it is written."""
  assert compiled.collectives(in_entry(*lines)) == [expected]


# Beside other operations, TPU writes a collective into all of them.
FUSED = """\
HloModule fused, num_partitions=8

%begin (a: f32[4]) -> (f32[4], f32[8]) {
  %a = f32[4] parameter(0)
  %g = f32[8] all-gather(%a), channel_id=6, replica_groups=[4,2]<=[8], \
frontend_attributes={chain_id="0"}
  ROOT %c = (f32[4], f32[8]) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%beside (b: f32[4]) -> (f32[4], f32[8]) {
  %b = f32[4] parameter(0)
  %g.1 = f32[8] all-gather(%b), channel_id=6, replica_groups=[4,2]<=[8], \
frontend_attributes={chain_id="0"}
  %n = f32[4] negate(%b)
  ROOT %t = (f32[4], f32[8]) tuple(%n, %g.1)
}

%all-reduce-scatter.1 (c.1: f32[16]) -> f32[4] {
  %c.1 = f32[16] parameter(0)
  %r = f32[16] all-reduce(%c.1), replica_groups={{0,2,4,6},{1,3,5,7}}
  ROOT %s = f32[4] dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}

%wrapped (d: f32[4]) -> f32[4] {
  %d = f32[4] parameter(0)
  ROOT %p = f32[4] all-reduce(%d), replica_groups={{0,1,2,3,4,5,6,7}}
}

ENTRY %main (x: f32[16]) -> f32[4] {
  %x = f32[16] parameter(0)
  %f = (f32[4], f32[8]) fusion(%x), kind=kCustom, calls=%begin
  %h = (f32[4], f32[8]) fusion(%f), kind=kOutput, calls=%beside
  %k = f32[4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %m = ((f32[4]), f32[4], u32[]) async-start(%k), calls=%wrapped
  ROOT %q = f32[4] async-done(%m), calls=%wrapped
}
"""


def test_fusions_of_tpu():
  """What is fused counts once, and an all-reduce-scatter as what it is."""
  assert compiled.collectives(FUSED) == [
    Collective('all-gather', 32, 4, 2, 1),
    Collective('reduce-scatter', 16, 2, 4, 1),
    Collective('all-reduce', 16, 1, 8, 1),
  ]


def test_text_that_is_no_program():
  """The error says what to write."""
  with pytest.raises(ValueError, match=r'compile\(\).as_text\(\)'):
    compiled.collectives('module @jit_f {}')


def test_added():
  """Merged and split collectives are the same; more and less are told."""
  scalar = Collective('all-reduce', 4, 1, 8, 1)
  other = Collective('all-reduce', 8, 2, 4, 3)
  assert compiled.added([scalar, other], [scalar, other]) == []
  assert compiled.added([scalar, other], [scalar]) == [other._replace(bytes=24)]
  assert compiled.added([], [other]) == [other._replace(bytes=-24, count=-3)]
  merged = scalar._replace(bytes=12)
  assert compiled.added([merged], [scalar] * 3) == [
    scalar._replace(bytes=0, count=-2)
  ]


TINY = {
  'vit': functools.partial(
    large_models.vit,
    layers=2,
    width=32,
    hidden=64,
    heads=2,
    pixels=8,
    patch=4,
    classes=16,
    batch_per_device=1,
  ),
  'decoder': functools.partial(
    large_models.decoder,
    layers=2,
    width=32,
    hidden=64,
    heads=8,
    kv_heads=4,
    vocabulary=16,
    length=8,
    sequences_per_row=1,
  ),
}


def test_sizes_of_networks():
  """They have the numbers of parameters of what they are named after."""
  for make_network, parameters in tpu_aot.MODELS.values():
    for devices in (8, 256):
      assert large_models.count(make_network(devices).params) == parameters


def test_bytes_per_device():
  """They are what one of eight devices holds of the parameters."""
  for make_network in TINY.values():
    network = make_network(8)
    mesh = network.mesh(jax.devices())
    held = [
      jax.device_put(
        np.zeros(leaf.shape, leaf.dtype), NamedSharding(mesh, spec)
      ).addressable_data(0)
      for leaf, spec in zip(
        jax.tree.leaves(network.params),
        jax.tree.leaves(network.specs),
        strict=True,
      )
    ]
    assert sum(leaf.nbytes for leaf in held) == steps.bytes_per_device(network)


@pytest.mark.parametrize('name', TINY)
def test_networks_train(name):
  """The loss is that of a guess among 16, and all parameters matter."""
  network = TINY[name](1, **({'tensor': 1} if name == 'decoder' else {}))
  rng = np.random.default_rng(0)

  def draw(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.asarray(rng.integers(0, 16, leaf.shape), leaf.dtype)
    return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

  params, batch = jax.tree.map(draw, (network.params, network.batch))
  loss_fn = network.loss_fn(network.mesh(jax.devices()))
  loss, grads = (
    jax.jit(jax.value_and_grad(loss_fn))
    .lower(params, batch)
    .compile({'xla_backend_optimization_level': 0})  # it runs once
  )(params, batch)
  assert abs(loss - np.log(16)) < 0.3
  for grad in jax.tree.leaves(grads):
    assert np.isfinite(grad).all()
    assert np.any(grad)


@pytest.mark.parametrize('ord', [2, jnp.inf])
def test_steps(ord):
  """The four steps are those of their names, on one structure of state."""
  loss_fn = lambda w, x: jnp.sum((w - x) ** 2) / 2
  w, x = np.array([1.0, -2.0, 3.0]), np.array([4.0, 2.0, -1.0])
  init, all_steps = steps.make_steps(
    loss_fn, optax.sgd(0.1), rho=0.2, sam_rho=0.3, eta=0.5, ord=ord
  )
  g, t = w - x, np.abs(w) + 0.5
  if ord == 2:
    sam = 0.3 * g / np.linalg.norm(g)
    asam = 0.2 * t**2 * g / np.linalg.norm(t * g)
  else:
    sam, asam = 0.3 * np.sign(g), 0.2 * t * np.sign(g)
  perturbations = {'base': 0, 'two gradients': 0.01 * g, 'sam': sam}
  perturbations['asam'] = asam
  assert set(all_steps) == set(perturbations)
  params = jnp.asarray(w, jnp.float32)
  for name, step in all_steps.items():
    state = init(params)
    result, new_state = step(params, state, jnp.asarray(x, jnp.float32))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    expected = w - 0.1 * (w + perturbations[name] - x)
    assert error(result, np.asarray(expected, np.float32)) < 1e-6


def test_objections():
  """What exceeds a scalar all-reduce a sharding, and two copies, is told."""
  network = TINY['decoder'](8)
  copies = 2 * steps.bytes_per_device(network) + 2**20
  scalars = [Collective('all-reduce', 4 * 9, 1, 8, 2)]
  check = lambda added, size: steps.objections(added, size, network)
  assert check(scalars, copies) == []
  assert check([], 0) == []
  assert len(check(scalars, copies + 1)) == 1
  assert len(check([scalars[0]._replace(bytes=40)], 0)) == 1
  assert len(check([scalars[0]._replace(count=3)], 0)) == 1
  assert len(check([Collective('all-gather', 1, 4, 2, 1)], 0)) == 1
  assert len(check([Collective('all-gather', -1, 4, 2, -1)], 0)) == 1


def test_page_has_the_tables():
  """docs/tpu.md shows what was recorded."""
  cases = json.loads(RESULTS.read_text())['cases']
  page = pages.read_page('tpu')
  for table in tpu_aot.tables(cases):
    assert table in page


def test_recorded_results():
  """All cases are there, and none has more than scalar all-reduces allow."""
  cases = json.loads(RESULTS.read_text())['cases']
  assert len(cases) == 16
  assert any('added' in case for case in cases)
  for case in cases:
    if 'added' in case:
      make_network, _ = tpu_aot.MODELS[case['model']]
      found = steps.objections(
        [Collective(**each) for each in case['added']['collectives']],
        case['added']['temporary_bytes'],
        make_network(math.prod(case['mesh'].values())),
      )
      assert found == case['added']['objections'] == []
