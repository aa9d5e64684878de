"""Promise: what the benchmarks read from compiled programs is what is there.

And ASAM adds to two gradients nothing but all-reduces of scalars.
"""

import functools
import json
import math
import pathlib
import re
import shlex

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks import collectives
from benchmarks import compiled
from benchmarks import large_models
from benchmarks import markdown
from benchmarks import models
from benchmarks import step_time_report
from benchmarks import steps
from benchmarks import tpu_aot
from benchmarks.compiled import Collective
from benchmarks.workloads import ETA
from benchmarks.workloads import RHO
from benchmarks.workloads import SAM_RHO
from experiments.report import records
from optax_asam import sharpness_aware
from tests.helpers.support import SHARDY
from tests.helpers.support import error
from tests.helpers.support import shard_map

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 8


def test_program():
  """Collectives of each kind with their sizes and groups; loops multiply."""
  mesh = jax.make_mesh((4, 2), ('a', 'b'))

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

  mapped = shard_map(
    function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  program = jax.jit(mapped).lower(jnp.ones(16)).compile()
  assert sorted(compiled.read(program).collectives) == [
    Collective('all-gather', 2 * 64, groups=4, group_size=2, count=1),
    Collective('all-reduce', 64, groups=2, group_size=4, count=15),
    Collective('all-to-all', 16, groups=2, group_size=4, count=1),
    Collective('collective-permute', 64, groups=8, group_size=2, count=3),
    Collective('reduce-scatter', 8, groups=1, group_size=8, count=1),
  ]
  lines = re.findall(r'^ .* = ', program.as_text(), re.MULTILINE)
  assert compiled.instructions(program) == len(lines)


# As XLA for TPU writes programs: loops without trip counts, layouts with
# parentheses, and asynchronous collectives repeated in what they overlap with.
LOOP = """\
HloModule loop, num_partitions=8

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
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
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
FUSED = """\
HloModule fused, num_replicas=2, num_partitions=4

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

ENTRY %main (x: f32[16]) -> f32[4] {
  %x = f32[16] parameter(0)
  %f = (f32[4], f32[8]) fusion(%x), kind=kCustom, calls=%begin
  %h = (f32[4], f32[8]) fusion(%f), kind=kOutput, calls=%beside
  %k = f32[4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %u = (f32[4]{0}, f32[8]{0}) all-gather-start(%k), replica_groups=[2,4]<=[8]
  %d = f32[8]{0} all-gather-done(%u)
  ROOT %m = (f32[4]{0:T(128)(2,1)S(1)}, /*index=1*/bf16[2,3]) all-reduce(%k, \
%k), replica_groups=mesh['m'=2,'n'=4], device_ids=([4,2]T(1,0)) {'n'}
}
"""


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    # Iterations 4, 7 and 10 are below 12.
    (LOOP, [Collective('all-reduce', 8 * 4 * 4, 1, 8, 3)]),
    (
      FUSED,
      [
        Collective('all-gather', 32, 4, 2, 1),
        Collective('reduce-scatter', 16, 2, 4, 1),
        Collective('all-gather', 32, 2, 4, 1),
        Collective('all-reduce', 16 + 12, 2, 4, 1),
      ],
    ),
  ],
)
def test_tpu_programs(text, expected):
  """The collectives of programs in the form of TPU's compiler."""
  assert compiled.collectives(text) == expected


def test_loop_of_unknown_length():
  """A collective in it is an error."""
  text = LOOP.replace('constant(12)', 'custom-call()')
  with pytest.raises(ValueError, match='sum is in a loop of unknown length'):
    compiled.collectives(text)


@functools.cache
def cost(layout, step):
  """The cost of one of the steps that are compared."""
  return collectives.measure(layout, DEVICES, step)


def compare(layout, found):
  """What a cost has in addition to two gradients, and what is wrong with it."""
  reference = cost(layout, 'two_gradients')
  added = compiled.added(found.collectives, reference.collectives)
  return added, steps.objections(
    added,
    found.temporary_bytes - reference.temporary_bytes,
    collectives.network(layout, DEVICES),
    by_axis=True,
  )


@pytest.mark.skipif(not SHARDY, reason='the old partitioner divides otherwise')
@pytest.mark.parametrize('layout', collectives.LAYOUTS)
def test_scalars_alone(layout):
  """ASAM adds scalar all-reduces, and at most two copies of parameters."""
  added, objections = compare(layout, cost(layout, 'asam'))
  assert objections == []
  # The norm of shards takes a sum over devices, that of whole arrays none.
  assert bool(added) == (layout != 'replicated')


def test_gathering_norm_is_found():
  """A norm that gathers the parameters fails the check above."""
  norm = lambda grads: jnp.linalg.norm(ravel_pytree(grads)[0])
  ascent = optax.stateless(
    lambda grads, params: optax.tree.scale(0.05 / norm(grads), grads)
  )
  found = steps.compile_step(
    lambda model, tx: steps.sharp(
      model, optax.chain(sharpness_aware(ascent), tx)
    ),
    collectives.BASE_TX,
    collectives.network('2-D', DEVICES),
    jax.devices(),
  )
  _, objections = compare('2-D', compiled.read(found))
  assert any('all-gather' in objection for objection in objections)


def test_steps():
  """The steps that devices share are those of their names."""
  w, x = np.array([1.0, -2.0, 3.0]), np.array([4.0, 2.0, -1.0])
  params, batch = jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)
  model = models.Model(
    lambda w, _, x: (jnp.sum((w - x) ** 2) / 2, {}), params, {}, batch
  )
  g, t = w - x, np.abs(w) + ETA
  perturbations = {
    'base': 0,
    'two_gradients': 0.01 * g,
    'sam': SAM_RHO * g / np.linalg.norm(g),
    'asam': RHO * t**2 * g / np.linalg.norm(t * g),
  }
  assert list(perturbations) == list(steps.PARTITIONED)
  for name in perturbations:
    method = steps.METHODS[name](model, optax.sgd(0.1))
    carry = steps.Carry(params, method.init(params), {})
    result = method.cycle[0](carry, batch)
    assert jax.tree.structure(result) == jax.tree.structure(carry)
    expected = w - 0.1 * (w + perturbations[name] - x)
    assert error(result.params, np.asarray(expected, np.float32)) < 1e-6


def test_networks():
  """They have as many parameters as what they are named after."""
  parameters = {'vit-l16': 304_326_632, 'decoder-8b': 8_030_261_248}
  for name, make_network in tpu_aot.MODELS.items():
    assert large_models.count(make_network(8).params) == parameters[name]


def test_tpu_aot(tmp_path, capsys, monkeypatch):
  """A case has the command that made it; one of another commit is named."""
  network = functools.partial(collectives.network, 'fully sharded')
  monkeypatch.setattr(tpu_aot, 'MODELS', {'small': network})
  monkeypatch.setattr(tpu_aot, 'chips', lambda topology: jax.devices())
  monkeypatch.setattr(tpu_aot, 'compiler_version', lambda: '1.2.3')
  argv = ['--topologies', 'v5e:2x4', '--out', str(tmp_path), '--steps']
  for commit, names in {'a': ['base'], 'b': ['base', 'asam']}.items():
    monkeypatch.setattr(records, 'git_commit', lambda commit=commit: commit)
    capsys.readouterr()
    tpu_aot.main([*argv, *names])
  kept, made, *_ = capsys.readouterr().out.splitlines()
  assert kept.startswith('small, v5e:2x4, base ')
  assert kept.endswith(' s, kept from commit a')
  assert re.fullmatch(r'small, v5e:2x4, asam \d+ s', made)
  results = json.loads((tmp_path / 'tpu_aot.json').read_text())
  command = shlex.join(['python', '-m', 'benchmarks.tpu_aot', *argv])
  commands = [f'{command} base', f'{command} base asam']
  assert results['command'] == commands[1]
  assert [case['command'] for case in results['cases']] == commands
  for case in results['cases']:
    assert case['versions']['libtpu'] == '1.2.3'
    assert case['collectives']['all-reduce']['count'] > 0


def recorded(name):
  """The recorded results of a benchmark."""
  path = ROOT / 'benchmarks' / 'results' / f'{name}.json'
  return json.loads(path.read_text())


def test_step_time_page():
  """The tables of step times are those of the recorded results."""
  text = step_time_report.PAGE.read_text()
  recorded = step_time_report.load()
  assert step_time_report.page(text, recorded) == text
  first = step_time_report.FIRST_PAGE.read_text()
  assert step_time_report.first_page(first, recorded) == first


@pytest.mark.parametrize(
  'text',
  [
    'no markers',
    '<!-- cost -->\n\nno end',
    '<!-- cost -->\n\nno end\n\n<!-- other -->\n\n1\n\n<!-- end -->',
    '<!-- cost -->\n\n1\n\n<!-- end -->\n\n' * 2,
  ],
)
def test_missing_markers(text):
  """A page without the place of a table is an error."""
  with pytest.raises(ValueError, match=r'<!-- cost --> .* found [02]'):
    markdown.replace_between(text, 'cost', 'new')


@pytest.mark.parametrize(
  ('page', 'name', 'make_table'),
  [
    ('docs/devices.md', 'collectives', collectives.table),
    ('docs/tpu.md', 'tpu_aot memory', tpu_aot.memory_table),
    ('docs/tpu.md', 'tpu_aot collectives', tpu_aot.collectives_table),
    ('docs/tpu.md', 'tpu_aot added', tpu_aot.added_table),
    (
      'benchmarks/README.md',
      'collectives',
      functools.partial(collectives.table, numbers=(8,)),
    ),
    ('benchmarks/README.md', 'tpu_aot added', tpu_aot.added_table),
  ],
)
def test_pages(page, name, make_table):
  """The marked tables are those of the recorded results."""
  results = recorded(name.split()[0])
  if 'tpu_aot' in name:
    results = results['cases']
  mark = f'<!-- {name} -->\n\n{make_table(results)}\n\n<!-- end -->'
  assert mark in (ROOT / page).read_text()


def test_recorded_results():
  """None of the recorded programs has more than scalars in addition."""
  cases = [case for case in recorded('tpu_aot')['cases'] if 'added' in case]
  assert len(cases) == 6
  for case in cases:
    network = tpu_aot.MODELS[case['model']](math.prod(case['mesh'].values()))
    added = [Collective(**each) for each in case['added']['collectives']]
    temporary_bytes = case['added']['temporary_bytes']
    assert steps.objections(added, temporary_bytes, network) == []
    more = [each._replace(bytes=each.bytes + 4096) for each in added]
    assert steps.objections(more, temporary_bytes, network)
    assert steps.objections(added, 2**40, network)
