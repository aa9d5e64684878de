"""Promise: a step costs what its method says and little else, at any size.

Costs are read from traced and compiled programs, so they do not depend on the
machine.
"""

from collections.abc import Callable
import functools
from typing import ClassVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks import compiled
from benchmarks import models
from benchmarks import steps
from optax_asam import asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import looksam
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness_aware
from optax_asam import value_and_grad
from tests.helpers.cases import ASCENTS
from tests.helpers.support import SHARDY

SGD = optax.sgd(0.1, momentum=0.9)
LAYERS, WIDTH = 8, 64
# The XLA of JAX 0.4.38 writes T g once more than in the step by hand, which is
# 9% of the bytes here.
FUSES_ALIKE = jax.__version_info__ >= (0, 7)
STEEPEST = optax.chain(
  ascent.steepest_ascent(normalization.elementwise()), optax.scale(0.5)
)


class Counted(models.Deep):
  """Dense layers that count the forward passes in Python."""

  calls: ClassVar = []

  def __call__(self, x, *, train=False):
    """Maps features to logits."""
    self.calls.append(x.shape)
    return super().__call__(x, train=train)


class Case(NamedTuple):
  """A method, and the most that it may cost.

  Attributes:
    make: From a model and an optimizer to a method.
    forward: Forward passes in Python, a trace.
    like: The step by hand that it is compared with.
    instructions: Their ratio to those of two gradients.
    passes: Parameter-sized arrays written in addition, in copies of the
      parameters.
    bytes: The ratio of the bytes accessed.
    temporaries: The ratio of the peak size of temporaries.
    scalars: The numbers for each array that are summed over devices.
  """

  make: Callable[..., steps.Method]
  forward: int = 2
  like: str = 'asam'
  instructions: float = 1.7
  passes: float = 0
  bytes: float = 1.02
  temporaries: float = 1.02
  scalars: int = 2


def of(tx):
  """A transformation as a method."""
  return lambda model, base_tx: steps.sharp(model, tx)


def first_layer(params):
  """Masks out all but one layer."""
  return {
    name: jax.tree.map(lambda _, used=name == 'Dense_0': used, layer)
    for name, layer in params.items()
  }


def every_other(perturb, reuse=None):
  """A step by hand that perturbs on every second update.

  In between, the gradient is descended, or with ``reuse`` that of LookSAM.
  """

  def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))

  def look(params, g, grad_fn):
    h = grad_fn(perturb(params, g))
    if reuse is None:
      return h, None
    factor = dot(g, h) / dot(g, g)
    g_v = jax.tree.map(lambda x, y: y - factor * x, g, h)
    norm = jnp.sqrt(dot(g_v, g_v))
    return h, jax.tree.map(lambda x: x / norm, g_v)

  def between(g, direction):
    if reuse is None:
      return g, None
    norm = reuse * jnp.sqrt(dot(g, g))
    return jax.tree.map(lambda x, d: x + norm * d, g, direction), direction

  def init_fn(params):
    direction = None if reuse is None else jax.tree.map(jnp.zeros_like, params)
    return jnp.zeros([], jnp.int32), direction, SGD.init(params)

  def update_fn(updates, state, params=None, *, grad_fn):
    count, direction, state = state
    grads, direction = jax.lax.cond(
      count % 2 == 0,
      lambda: look(params, updates, grad_fn),
      lambda: between(updates, direction),
    )
    updates, state = SGD.update(grads, state, params)
    return updates, (count + 1, direction, state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


FIRST_LAYER = functools.partial(steps.inlined_asam, selected=first_layer)


def ascent_fun(model, base_tx):
  """The perturbation from a quarter of the batch, in one call."""

  def part_fn(params, model_state, batch):
    part = jax.tree.map(lambda x: x[::4], batch)
    return model.loss_fn(params, model_state, part)

  return steps.estimator(
    model,
    base_tx,
    value_and_grad(model.loss_fn, has_aux=True, ascent_fun=part_fn),
  )


def adam(make):
  """A method with Adam in place of SGD."""
  return lambda model, _: make(model, optax.adam(1e-3))


BY_HAND = {
  'base': steps.METHODS['base'],
  'base, adam': adam(steps.METHODS['base']),
  'two gradients': steps.METHODS['two_gradients'],
  'asam': steps.METHODS['inlined_asam'],
  'sam': of(
    steps.by_hand(
      functools.partial(
        steps.inlined_asam,
        normalized=lambda params: jax.tree.map(lambda _: False, params),
      ),
      SGD,
    )
  ),
  'one layer': of(steps.by_hand(FIRST_LAYER, SGD)),
  'every_k': of(every_other(steps.inlined_asam)),
  'every_k, one layer': of(every_other(FIRST_LAYER)),
  'looksam': of(every_other(steps.inlined_asam, reuse=0.1)),
  'looksam, one layer': of(every_other(FIRST_LAYER, reuse=0.1)),
}
# It writes the clean parameters and the perturbation, too. Neither the update
# nor the perturbation so far is kept beside w.
MOMENTUM = Case(
  steps.METHODS['momentum_asam'],
  forward=1,
  like='base',
  instructions=1.4,
  passes=2.4,
  bytes=1.75,
  temporaries=1.2,
)
CASES = {
  'asam': Case(steps.METHODS['asam']),
  'sam': Case(steps.METHODS['sam'], like='sam'),
  'value_and_grad': Case(steps.METHODS['value_and_grad']),
  'nnx': Case(steps.METHODS['nnx_value_and_grad']),
  'one layer': Case(of(asam(SGD, mask=first_layer)), like='one layer'),
  'every_k': Case(of(asam(SGD, every_k=2)), like='every_k', instructions=2.0),
  'every_k, one layer': Case(
    of(asam(SGD, every_k=2, mask=first_layer)),
    like='every_k, one layer',
    instructions=2.0,
  ),
  'looksam': Case(
    of(looksam(SGD, every_k=2)),
    like='looksam',
    instructions=4.0,
    scalars=5,
  ),
  'looksam, one layer': Case(
    of(looksam(SGD, every_k=2, mask=first_layer)),
    like='looksam, one layer',
    instructions=4.0,
    scalars=5,
  ),
  'when': Case(
    of(asam(SGD, when=lambda step: step >= 9)), like='every_k', instructions=2.0
  ),
  'every_5': Case(steps.METHODS['every_5']),
  'quarter_batch_ascent': Case(steps.METHODS['quarter_batch_ascent']),
  'ascent_fun': Case(ascent_fun),
  'momentum_asam': MOMENTUM,
  'momentum_asam, adam': MOMENTUM._replace(
    make=adam(MOMENTUM.make),
    like='base, adam',
    instructions=1.8 if FUSES_ALIKE else 1.9,
    bytes=1.6,
  ),
  'asam-inf': Case(of(asam(SGD, ord=jnp.inf))),
  'sam-inf': Case(of(sam(SGD, ord=jnp.inf))),
  # One more pass for the largest element, with which it is scaled.
  'asam-3': Case(
    of(asam(SGD, ord=3)),
    instructions=2.4,
    passes=2.2,
    bytes=1.3,
    temporaries=1.7,
  ),
  'layerwise': Case(
    of(asam(SGD, adaptive=normalization.layerwise())), instructions=2.0
  ),
  'filterwise': Case(
    of(asam(SGD, adaptive=normalization.filterwise())), instructions=2.0
  ),
  'ascent_steps': Case(
    of(asam(SGD, ascent_steps=2)),
    forward=3,
    instructions=3.2,
    passes=4,
    bytes=1.7,
    temporaries=2.2,
  ),
  'gsam': Case(
    of(asam(SGD, descent=descent.gsam(0.4))),
    instructions=2.4,
    bytes=1.2,
    temporaries=1.6,
    scalars=3,  # with two inner products
  ),
  # The clean gradient is kept for the second pass.
  'wsam': Case(
    of(asam(SGD, descent=descent.wsam(0.7))),
    instructions=1.8,
    bytes=1.1,
    temporaries=1.6,
  ),
  # It keeps an average of the gradients, which enters only if it is finite.
  'friendly': Case(
    of(optax.chain(sharpness_aware(ASCENTS['friendly']), SGD)),
    instructions=2.2,
    passes=3.1,
    bytes=1.3,
    temporaries=1.3,
    scalars=3,
  ),
  'pieces': Case(of(optax.chain(sharpness_aware(STEEPEST), SGD))),
}


FAST = {
  'asam',
  'sam',
  'nnx',
  'one layer',
  'every_k',
  'momentum_asam, adam',
  'asam-inf',
  'asam-3',
}
FAST_ON_MESH = {'asam', 'every_k'}


def cases(fast, left_out=()):
  """The names of the cases; all but some are marked as slow."""
  return [
    pytest.param(name, marks=[] if name in fast else [pytest.mark.slow])
    for name in CASES
    if name not in left_out
  ]


@functools.cache
def method(make, layers):
  """A method on dense layers, as shapes: nothing here is run."""
  batch = {
    'inputs': jax.ShapeDtypeStruct((32, WIDTH), jnp.float32),
    'labels': jax.ShapeDtypeStruct((32,), jnp.int32),
  }
  model = models.from_module(Counted(layers=layers, width=WIDTH), batch)
  return make(model, SGD), batch


@functools.cache
def program(make, layers=LAYERS, mesh=None):
  """The first step, compiled; what LLVM makes of it is not looked at."""
  each, batch = method(make, layers)
  carry, shardings = each.carry, None
  if mesh is not None:
    carry, batch = sharded(carry, mesh), sharded(batch, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
  step = jax.jit(each.cycle[0], donate_argnums=0, out_shardings=shardings)
  return step.lower(carry, batch).compile(
    compiler_options={'xla_llvm_disable_expensive_passes': True}
  )


def sharded(tree, mesh):
  """Arrays that are sharded along their first axis, if it divides evenly."""

  def leaf(x):
    spec = P('data') if x.shape and x.shape[0] % mesh.size == 0 else P()
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)


def avals(tree):
  """What decides whether a jitted function compiles for these arguments."""
  leaves, treedef = jax.tree.flatten(tree)
  return [(x.shape, x.dtype, x.weak_type) for x in leaves], treedef


@pytest.mark.parametrize('name', cases(FAST))
def test_cost(name):
  """Forward passes, recompilations, instructions, and traffic of memory."""
  case = CASES[name]
  each, batch = method(case.make, LAYERS)
  for step in each.programs:
    Counted.calls.clear()
    out = jax.eval_shape(functools.partial(step), each.carry, batch)
    forward = case.forward if step is each.cycle[0] else 1
    assert len(Counted.calls) == forward
    assert avals(out) == avals(each.carry)  # the second call compiles nothing
  own = program(case.make)
  hand, two = program(BY_HAND[case.like]), program(BY_HAND['two gradients'])
  ratio = compiled.instructions(own) / compiled.instructions(two)
  assert ratio < case.instructions
  if not FUSES_ALIKE:
    return
  kernels = [(WIDTH, WIDTH)]
  more = compiled.passes(own, kernels) - compiled.passes(hand, kernels)
  assert more <= case.passes * LAYERS
  accessed = [compiled.bytes_accessed(each) for each in (own, hand)]
  assert accessed[0] <= case.bytes * accessed[1] + 1024, accessed
  temporaries = [compiled.temp_bytes(each) for each in (own, hand)]
  assert temporaries[0] <= case.temporaries * temporaries[1] + 1024, temporaries


@pytest.mark.skipif(not SHARDY, reason='the old partitioner divides otherwise')
@pytest.mark.parametrize(
  'name',
  # A part of a batch must be distributed again; three gradients are not two.
  cases(
    FAST_ON_MESH,
    left_out=('quarter_batch_ascent', 'ascent_fun', 'ascent_steps'),
  ),
)
def test_collectives(name):
  """On sharded parameters, nothing but scalars in addition."""
  case = CASES[name]
  mesh = Mesh(np.array(jax.devices()), ('data',))
  like = 'base' if case.forward == 1 else 'two gradients'
  found, reference = (
    compiled.collectives(program(make, 3, mesh=mesh).as_text())
    for make in (case.make, BY_HAND[like])
  )
  added = compiled.added(found, reference)
  more = [each for each in added if each.bytes > 0]
  assert {each.kind for each in more} <= {'all-reduce'}, added
  arrays = len(jax.tree.leaves(method(case.make, 3)[0].model.params))
  assert sum(each.bytes for each in more) <= 4 * case.scalars * arrays, added
