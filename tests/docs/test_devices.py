"""Promise: the programs of docs/devices.md do what the page says.

``test_<title>`` runs the code of a section. Its gradient must be the mean of
gradients of groups, taken one after the other on one device.
"""

import itertools
import re
import textwrap

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from optax_asam import asam
from tests.helpers import pages
from tests.helpers.support import error
from tests.helpers.support import needs_microbatching
from tests.helpers.support import needs_pcast

PAGE = pages.read_page('devices')
SNIPPETS = pages.read_snippets(PAGE)

EXAMPLES, M = 16, 4
RHO, LEARNING_RATE = 0.5, 0.1
BASE_TX = optax.sgd(LEARNING_RATE)


def loss_fn(params, batch):
  """The squared error of a layer."""
  x, y = batch
  return ((jnp.tanh(x @ params['kernel'] + params['bias']) - y) ** 2).mean()


@pytest.fixture
def batch():
  """Inputs [n, 3] and targets [n, 2]."""
  rng = np.random.default_rng(1)
  return tuple(
    jnp.asarray(rng.standard_normal((EXAMPLES, size)), jnp.float32)
    for size in (3, 2)
  )


def descended(params, batch, groups):
  """Parameters after SGD on the mean of the gradients of groups of indices."""
  tx = asam(optax.identity(), rho=RHO)
  each = []
  for indices in groups:
    examples = jax.tree.map(lambda x, i=indices: x[np.asarray(i)], batch)
    grad_fn = lambda p, examples=examples: jax.grad(loss_fn)(p, examples)
    updates, _ = tx.update(
      grad_fn(params), tx.init(params), params, grad_fn=grad_fn
    )
    each.append(updates)
  return jax.tree.map(
    lambda w, *g: w - LEARNING_RATE * sum(g) / len(g), params, *each
  )


def every_nth(n):
  """Groups like those of optax.microbatching."""
  return [range(j, EXAMPLES, n) for j in range(n)]


def consecutive(size):
  """Groups of ``size`` consecutive examples."""
  return [range(i, i + size) for i in range(0, EXAMPLES, size)]


def test_every_snippet_is_tested():
  """Every section with code has its test."""
  pages.assert_all_tested(PAGE, SNIPPETS, globals())


def on(mesh, spec, tree):
  """A tree on a mesh, all its arrays with the same spec."""
  return jax.device_put(tree, NamedSharding(mesh, spec))


def run_step(names, params, batch):
  """Parameters after a step of a program with a mesh and shard_map."""
  mesh, tx = names['mesh'], names['tx']
  carry = on(mesh, PartitionSpec(), (params, tx.init(params)))
  batch = on(mesh, PartitionSpec(mesh.axis_names), batch)
  return names['step'](*carry, batch)[0]


def assert_close(result, params, batch, groups):
  """Fails unless the parameters are those after a step with these groups."""
  expected = descended(params, batch, groups)
  assert error(jax.tree.map(np.asarray, result), expected) < 1e-6


def test_sharded_arrays(snippet, params, batch):
  """One perturbation for the whole batch, and shardings stay."""
  names = snippet()
  mesh, state, tx = names['mesh'], names['opt_state'], names['tx']
  kernel, *momentum = (
    x for x in jax.tree.leaves((names['params'], state)) if x.ndim == 2
  )
  for array in (kernel, *momentum):
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 1)}
  for scalar in jax.tree.leaves(state):
    assert len(scalar.sharding.device_set) == mesh.size
  specs = jax.tree.map(lambda x: x.sharding.spec, names['params'])
  result, _ = names['train_step'](
    names['shard'](params, specs),
    jax.tree.map(lambda x: on(mesh, PartitionSpec(), x), tx.init(params)),
    on(mesh, PartitionSpec('data'), batch),
  )
  assert_close(result, params, batch, consecutive(EXAMPLES))


@needs_pcast
def test_manual_sharding(snippet, params, batch):
  """A perturbation for each device."""
  result = run_step(snippet(), params, batch)
  assert_close(result, params, batch, consecutive(EXAMPLES // 8))


@needs_pcast
def test_without_pcast(params, batch):
  """An error, but for unchecked types and a loss that is averaged already."""
  pcast = "jax.lax.pcast(params, 'devices', to='varying')"
  code = SNIPPETS['test_manual_sharding'][0].replace(pcast, 'params')
  with pytest.raises(ValueError, match=re.escape(pcast)):
    pages.run_snippet(code)
  unchecked = code.replace('mesh=mesh,', 'mesh=mesh, check_vma=False,')
  result = run_step(pages.run_snippet(unchecked), params, batch)
  assert_close(result, params, batch, consecutive(EXAMPLES // 8))
  averaged = (
    code.replace(", axis_name='devices'", '')
    .replace('jnp.mean(', 'jax.lax.pmean(jnp.mean(', 1)
    .replace('** 2)', "** 2), 'devices')")
  )
  result = run_step(pages.run_snippet(averaged), params, batch)
  assert_close(result, params, batch, consecutive(EXAMPLES))


@needs_pcast
def test_groups_that_span_devices(snippet, params, batch):
  """Two devices of two examples share a perturbation; four pairs do not."""
  program = pages.run_snippet(SNIPPETS['test_manual_sharding'][0])
  result = run_step(snippet(**program), params, batch)
  assert_close(result, params, batch, consecutive(M))


def run_recipe(snippet, params, batch):
  """Parameters after the code of a section."""
  names = snippet(
    params=params,
    batch=batch,
    m=M,
    base_tx=BASE_TX,
    opt_state=BASE_TX.init(params),
  )
  assert names['loss'] == pytest.approx(loss_fn(params, batch))
  return optax.apply_updates(params, names['updates'])


def test_vmap_over_groups(snippet, params, batch):
  """Groups of every n-th example."""
  result = run_recipe(snippet, params, batch)
  assert_close(result, params, batch, every_nth(EXAMPLES // M))


@needs_microbatching
def test_microbatching(snippet, params, batch):
  """The same groups."""
  result = run_recipe(snippet, params, batch)
  assert_close(result, params, batch, every_nth(EXAMPLES // M))


def test_pods():
  """The train step of docs/pods.md is that of examples/multihost.py."""
  program = pages.DOCS.parent / 'examples' / 'multihost.py'
  [code] = re.findall(
    r'^```python\n(.*?)^```', pages.read_page('pods'), re.DOTALL | re.MULTILINE
  )
  assert textwrap.indent(code, '  ') in program.read_text()


def test_groups_matter(params, batch):
  """The tests above would see a perturbation for other groups."""
  results = [
    descended(params, batch, groups)
    for groups in (
      consecutive(EXAMPLES),
      consecutive(M),
      consecutive(EXAMPLES // 8),
      every_nth(EXAMPLES // M),
    )
  ]
  for one, other in itertools.combinations(results, 2):
    assert error(one, other) > 1e-4
