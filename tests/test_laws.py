"""Promise: the laws of the perturbation hold, whatever the tree and numbers.

Each law is a function of what it judges and of an example. At the end of the
file wrong versions are judged, and each law fails on its own.
"""

import functools
import math

from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import sharpness_aware
from optax_asam import value_and_grad
import reference
from strategies import NORMALIZATIONS
from strategies import Example
from strategies import batches
from strategies import examples
from strategies import has_float64
from strategies import integers
from support import assert_same_bits
from support import error

SETTINGS = settings(
  max_examples=100,
  deadline=None,  # The first example of a shape compiles.
  derandomize=True,
  print_blob=True,
)
FIRST_FAILURE = [Phase.generate]  # None is made smaller.
# A number below 2^-126 (2^-1022 in float64) counts as zero. Where that befalls
# T g / ||T g||, a factor of T, up to 2^30 (2^210), follows.
FLUSHED = {4: 2.0**-96, 8: 2.0**-800}


@pytest.fixture(autouse=True, scope='module')
def x64():
  """Float64 is there for all examples, beside the other dtypes."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


# What the laws are written with.


def float64s(tree):
  """The leaves, in float64."""
  return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def operator(example):
  """T of each leaf, by the reference."""
  _, by_hand = NORMALIZATIONS[example.normalization]
  with np.errstate(over='ignore'):
    return [by_hand(w) for w in float64s(example.params)]


def norm(leaves, p):
  """The p-norm of all leaves together, for numbers of any size."""
  x = np.concatenate([[0.0], *(np.abs(leaf).ravel() for leaf in leaves)])
  peak = x.max()
  return peak and peak * np.linalg.norm(x / peak, p)


def radius(eps, t, p):
  """||T^-1 eps||_p, where T is not zero."""
  return norm([e[s > 0] / s[s > 0] for e, s in zip(eps, t, strict=True)], p)


def tolerance(tree):
  """1e-12 for a tree in float64, 1e-5 for others."""
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
  return 1e-12 if dtypes <= {jnp.dtype(jnp.float64)} else 1e-5


def rounding(values, dtype):
  """The most that rounding to a dtype below float32 changes ``values``."""
  if jnp.dtype(dtype).itemsize > 2:
    return np.zeros_like(values)
  return np.float64(np.spacing(np.abs(values).astype(dtype))) / 2


def assert_close(eps, expected, roundings=2):
  """Fails unless each element of ``eps`` is the expected one.

  To 1e-5, or 1e-12 in a tree of float64, and as many roundings to the dtype of
  its leaf: one where the expected values are exact.
  """
  for leaf, e, x in zip(
    jax.tree.leaves(eps), float64s(eps), float64s(expected), strict=True
  ):
    assert e.shape == x.shape
    allowed = (
      tolerance(eps) * np.abs(x)
      + roundings * rounding(x, leaf.dtype)
      + FLUSHED[max(4, leaf.dtype.itemsize)]
    )
    assert (np.abs(e - x) <= allowed).all(), (e, x)


def perturb(rho_ball, example, **kwargs):
  """The perturbation of ``example`` by ``rho_ball``, op by op."""
  t, _ = NORMALIZATIONS[example.normalization]
  tx = rho_ball(example.rho, 0.0, t, ord=example.ord, **kwargs)
  state = tx.init(example.params)
  eps, _ = tx.update(example.grads, state, example.params)
  return eps


def exact(example):
  """The leaves of the perturbation, by the reference."""
  if not norm(scaled(example), math.inf):
    return [0 * w for w in float64s(example.params)]
  names = [str(i) for i in range(len(jax.tree.leaves(example.params)))]
  eps = reference.perturbation(
    dict(zip(names, float64s(example.params), strict=True)),
    dict(zip(names, float64s(example.grads), strict=True)),
    NORMALIZATIONS[example.normalization][1],
    example.rho,
    example.ord,
    names,
    names,
  )
  return [eps[name] for name in names]


def scaled(example):
  """T g of each leaf, by the reference."""
  pairs = zip(operator(example), float64s(example.grads), strict=True)
  return [t * g for t, g in pairs]


def in_domain(example):
  """Whether T g is not zero, and stays in the range that the laws ask for."""
  h = norm(scaled(example), math.inf)
  smallest = min(
    (np.abs(x[x != 0]).min(initial=math.inf) for x in scaled(example)),
    default=math.inf,
  )
  decades = 150 if has_float64(example.params) else 15
  if example.ord < 2:  # |T g|^q, where q > 2
    decades *= 2 * (1 - 1 / example.ord)
  return h > 0 and smallest >= 10**-decades and h <= 10**decades


# The laws. The first argument is what is judged.


def law_steepest(rho_ball, example):
  """<g, eps> = rho ||T g||_q and ||T^-1 eps||_p = rho, which only it can do."""
  eps = perturb(rho_ball, example)
  t, p = operator(example), example.ord
  g, e = float64s(example.grads), float64s(eps)
  off = [rounding(np.float64(x), x.dtype) for x in jax.tree.leaves(eps)]
  most = example.rho * norm(scaled(example), 1 / (1 - 1 / p))
  inner = sum((a * b).sum() for a, b in zip(g, e, strict=True))
  slack = sum((np.abs(a) * b).sum() for a, b in zip(g, off, strict=True))
  assert abs(inner - most) <= tolerance(eps) * most + slack
  slack = tolerance(eps) * example.rho + radius(off, t, p)
  assert abs(radius(e, t, p) - example.rho) <= slack


def law_ball(rho_ball, example):
  """Eps is finite, in the ball, and zero where T is, for any numbers."""
  eps = perturb(rho_ball, example)
  t, p = operator(example), example.ord
  e = float64s(eps)
  assert all(np.isfinite(x).all() for x in e)
  assert not any(x[s == 0].any() for x, s in zip(e, t, strict=True))
  off = [rounding(np.float64(x), x.dtype) for x in jax.tree.leaves(eps)]
  most = example.rho * (1 + tolerance(eps)) + radius(off, t, p)
  assert radius(e, t, p) <= most


def law_closed_form(rho_ball, example):
  """Each element is the reference's, rounded to the parameter's dtype once."""
  eps = perturb(rho_ball, example)
  same_dtype = lambda e, w: e.dtype == w.dtype
  assert jax.tree.all(jax.tree.map(same_dtype, eps, example.params))
  assert_close(eps, exact(example), roundings=1)


def law_ascent_steps(asam, steps):
  """Several ascent steps stay in the ball, whatever gradients they meet."""
  params, _, rho, p, name = steps[0]
  tx = asam(
    optax.sgd(0.1),
    rho,
    adaptive=NORMALIZATIONS[name][0],
    ord=p,
    ascent_steps=len(steps),
    perturbed_dtype=jnp.float64,  # Shows eps as it is.
  )
  met = iter([*[step.grads for step in steps[1:]], params])
  seen = []

  def grad_fn(perturbed):
    seen.append(perturbed)
    return optax.tree.cast(next(met), jnp.float64)

  tx.update(steps[0].grads, tx.init(params), params, grad_fn=grad_fn)
  assert len(seen) == len(steps)
  t, w = operator(steps[0]), float64s(params)
  eps = [a - b for a, b in zip(float64s(seen[-1]), w, strict=True)]
  assert not any(x[s == 0].any() for x, s in zip(eps, t, strict=True))
  off = [  # By the rounding of the steps, and of w + eps.
    rounding(rho * s, leaf.dtype) + np.spacing(np.abs(v) + rho * s)
    for s, v, leaf in zip(t, w, jax.tree.leaves(params), strict=True)
  ]
  most = rho * (1 + tolerance(params)) + radius(off, t, p)
  assert radius(eps, t, p) <= most


def law_gradient_scale(rho_ball, example, exponent):
  """The scale of the gradient cancels: to the bit, for a power of two."""
  larger = times_power_of_two(example, exponent)
  assert_same_bits(perturb(rho_ball, larger), perturb(rho_ball, example))


def law_rescaling(rho_ball, example, factors):
  """Eps at A w, with the gradient A^-1 g that is met there, is A eps."""
  multiply = lambda x, a: np.asarray(x * a, x.dtype)
  there = example._replace(
    params=jax.tree.map(multiply, example.params, factors),
    grads=jax.tree.map(lambda g, a: multiply(g, 1 / a), example.grads, factors),
  )
  eps = perturb(rho_ball, example)
  expected = jax.tree.map(lambda e, a: np.asarray(e) * a, eps, factors)
  assert_close(perturb(rho_ball, there), expected)


def law_relu_network(rho_ball, params, factors, t):
  """A network, rescaled without a change, ascends to the same function."""
  ascended = compiled(ascended_network, rho_ball, t)
  there = ascended(rescaled(params, factors))
  assert error(there, ascended(params)) < 1e-10


def law_mask(rho_ball, example, mask):
  """What is masked is not moved, and the rest is as if it were alone."""
  eps = perturb(rho_ball, example, mask=mask)
  masked = jax.tree.map(lambda is_selected: not is_selected, mask)
  assert not any(leaf.any() for leaf in select(eps, masked))
  assert_close(select(eps, mask), perturb(rho_ball, sub_tree(example, mask)))


def law_permutation(rho_ball, example, order):
  """The order of the leaves is that of eps, and nothing else."""
  permute = lambda tree: [jax.tree.leaves(tree)[i] for i in order]
  permuted = example._replace(
    params=permute(example.params), grads=permute(example.grads)
  )
  expected = permute(perturb(rho_ball, example))
  assert_close(perturb(rho_ball, permuted), expected)


def law_value_and_grad(value_and_grad, example):
  """The clean value, and the gradient that the transformation hands on."""
  params, _, rho, *static = example
  value, grads = compiled(value_and_grad_at, value_and_grad, *static)(
    params, rho
  )
  np.testing.assert_allclose(value, loss_fn(params), rtol=1e-12)
  assert_close(grads, compiled(handed_on, *static)(params, rho))


def law_jit(rho_ball, example):
  """Compiled, eps is the same."""
  params, grads, rho, *static = example
  eps = compiled(eps_at, rho_ball, *static)(params, grads, rho)
  assert_close(eps, perturb(rho_ball, example))


def law_vmap(rho_ball, batch, over_params):
  """Mapped over rhos, and over parameters with them, eps is that of a loop."""
  static = batch[0][3:]
  if over_params:
    mapped = jax.tree.map(
      lambda *leaves: np.stack(leaves), *(example[:3] for example in batch)
    )
  else:
    batch = [batch[0]._replace(rho=example.rho) for example in batch]
    mapped = *batch[0][:2], np.stack([example.rho for example in batch])
  together = compiled(mapped_eps, rho_ball, *static, over_params)(*mapped)
  for i, example in enumerate(batch):
    alone = compiled(eps_at, rho_ball, *static)(*example[:3])
    assert_close(jax.tree.map(lambda e, i=i: e[i], together), alone)


def law_rho_derivative(asam, example):
  """The derivative of the loss after a step by rho is that of the formula."""
  params, _, rho, *static = example
  derivative = compiled(rho_derivative, asam, *static)(params, rho)[1]
  unit = exact(example._replace(grads=loss_grads(params), rho=1.0))
  total, scale = 0.0, 0.0
  for i, (w, u) in enumerate(zip(float64s(params), unit, strict=True)):
    c = i + 1  # The loss is c w^2 / 2, and its gradient c w.
    new = w - LEARNING_RATE * c * (w + rho * u)
    total += np.sum(c * new * -LEARNING_RATE * c * u)
    scale += np.sum(c * np.abs(w) * LEARNING_RATE * c * np.abs(u))
  assert abs(derivative - total) <= 1e-12 * scale


def law_derivative(asam, example):
  """The derivative through T and through the norm: by finite differences."""
  params, grads, rho, *static = example
  direction = jax.tree.map(lambda w, g: w * np.sin(g), params, grads)

  def at(x):
    return compiled(along, asam, *static)(params, direction, rho, x)

  value, derivative = at(0.0)
  difference = (at(1e-6)[0] - at(-1e-6)[0]) / 2e-6
  assert abs(derivative - difference) <= 1e-6 * (abs(derivative) + abs(value))


def law_finite_derivatives(asam, example, factor):
  """No derivative through the step is NaN, at a zero gradient least of all."""
  params, _, rho, *static = example
  params = jax.tree.map(lambda w: w * w.dtype.type(factor), params)
  derivatives = compiled(derivatives_of_step, asam, *static)(params, rho)
  assert all(np.isfinite(d).all() for d in jax.tree.leaves(derivatives))


def law_checkpoint(asam, example, interface):
  """With jax.checkpoint, the loss after a step and its derivative stay."""
  params, _, rho, *static = example
  results = [
    compiled(rho_derivative, asam, *static, *function)(params, rho)
    for function in CHECKPOINTED[interface]
  ]
  assert error(results[1], results[0]) < 1e-12


# What single laws need.

LEARNING_RATE = 0.1


def select(tree, mask):
  """The leaves at which ``mask`` is true."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True)
  return [leaf for leaf, is_selected in pairs if is_selected]


def sub_tree(example, mask):
  """The example with the leaves that ``mask`` selects, and no others."""
  return example._replace(
    params=select(example.params, mask), grads=select(example.grads, mask)
  )


def times_power_of_two(example, exponent):
  """The example with another scale of the gradient."""
  factor = 2.0**exponent
  return example._replace(
    grads=jax.tree.map(lambda g: np.asarray(factor * g, g.dtype), example.grads)
  )


def loss_fn(params):
  """Half the square of each weight, times the number of its leaf."""
  leaves = [jnp.asarray(w, jnp.float64) for w in jax.tree.leaves(params)]
  return sum((i + 1) * jnp.sum(w * w) / 2 for i, w in enumerate(leaves))


def loss_grads(params):
  """The gradient of ``loss_fn``, by hand."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten([(i + 1) * w for i, w in enumerate(leaves)])


CHECKPOINTED = {  # Interfaces, each with a function and its rematerialization.
  'grad_fn': (
    ('grad_fn', loss_grads),
    ('grad_fn', jax.checkpoint(loss_grads)),
  ),
  'value_fn': (('value_fn', loss_fn), ('value_fn', jax.checkpoint(loss_fn))),
  'jax.grad': (
    ('grad_fn', jax.grad(loss_fn)),
    ('grad_fn', jax.grad(jax.checkpoint(loss_fn))),
  ),
}


@functools.cache
def compiled(function, *static):
  """``function`` at static arguments, compiled once for all examples."""
  return jax.jit(functools.partial(function, *static))


def eps_at(rho_ball, p, name, params, grads, rho):
  """The perturbation as a function of arrays."""
  return perturb(rho_ball, Example(params, grads, rho, p, name))


def value_and_grad_at(value_and_grad, p, name, params, rho):
  """The value and the gradient of ``loss_fn``."""
  t, _ = NORMALIZATIONS[name]
  return value_and_grad(loss_fn, rho=rho, adaptive=t, ord=p)(params)


def handed_on(p, name, params, rho):
  """The gradient that the transformation hands on."""
  t, _ = NORMALIZATIONS[name]
  tx = asam(optax.identity(), rho, adaptive=t, ord=p)
  state = tx.init(params)
  return tx.update(loss_grads(params), state, params, grad_fn=loss_grads)[0]


def mapped_eps(rho_ball, p, name, over_params, params, grads, rho):
  """``eps_at`` of several rhos, and of as many parameters or of one."""
  axes = (0, 0, 0) if over_params else (None, None, 0)
  function = functools.partial(eps_at, rho_ball, p, name)
  return jax.vmap(function, axes)(params, grads, rho)


def loss_after_step(
  asam, p, name, params, rho, interface='grad_fn', function=loss_grads
):
  """The loss after a step of gradient descent, for meta-learning."""
  t, _ = NORMALIZATIONS[name]
  tx = asam(optax.sgd(LEARNING_RATE), rho, adaptive=t, ord=p)
  updates, _ = tx.update(
    loss_grads(params), tx.init(params), params, **{interface: function}
  )
  return loss_fn(optax.apply_updates(params, updates))


def rho_derivative(asam, p, name, *rest):
  """The loss after a step, and its derivative by rho."""
  *function, params, rho = rest
  return jax.value_and_grad(
    lambda rho: loss_after_step(asam, p, name, params, rho, *function)
  )(rho)


def derivatives_of_step(asam, p, name, params, rho):
  """Those of the loss after a step by the parameters and by rho."""
  loss = functools.partial(loss_after_step, asam, p, name)
  return jax.grad(loss, (0, 1))(params, rho)


def along(asam, p, name, params, direction, rho, x):
  """The loss after a step, and its derivative, at ``x`` along a line."""

  def loss(x):
    moved = jax.tree.map(lambda w, d: w + x * d, params, direction)
    return loss_after_step(asam, p, name, moved, rho * (1 + x))

  return jax.jvp(loss, (x,), (1.0,))


def network(params):
  """Two layers with a ReLU between, at four inputs."""
  x = jnp.array([[1.0, 0.0], [0.5, -1.0], [-2.0, 1.0], [-1.0, -1.0]])
  hidden, out = params['hidden'], params['out']
  x = jax.nn.relu(x @ hidden['kernel'][0] + hidden.get('bias', 0))
  return x @ out['kernel'][0] + out.get('bias', 0)


def ascended_network(rho_ball, t, params):
  """What the network computes at w + eps."""
  grads = jax.grad(lambda w: jnp.sum((network(w) - 1) ** 2))(params)
  tx = rho_ball(0.5, 0.0, t)
  eps, _ = tx.update(grads, tx.init(params), params)
  return network(optax.apply_updates(params, eps))


def rescaled(params, factors):
  """The network with its hidden units scaled, and their sum scaled back."""
  hidden, out = params['hidden'], params['out']
  return {
    'hidden': {name: w * factors for name, w in hidden.items()},
    'out': {**out, 'kernel': out['kernel'] / factors[:, None]},
  }


# The examples of each law.

IN_DOMAIN = examples().filter(in_domain)
ETA_ZERO = tuple(name for name in NORMALIZATIONS if name.endswith('eta=0.0'))
# What is compiled is so for these trees alone.
TREE = {
  'a': [
    jax.ShapeDtypeStruct((2, 1, 3), jnp.float32),
    jax.ShapeDtypeStruct((0,), jnp.bfloat16),
  ],
  'b': (jax.ShapeDtypeStruct((), jnp.float16), None),
  'c': jax.ShapeDtypeStruct((), jnp.bfloat16),
}
TREE64 = (
  jax.ShapeDtypeStruct((), jnp.float64),
  {'a': jax.ShapeDtypeStruct((2, 1, 3), jnp.float64)},
)
CASES64 = [
  (TREE64, 2, 'filterwise, eta=0.01'),
  (TREE64, math.inf, 'identity'),
  (TREE64, 3, 'layerwise, eta=0.01'),
  (TREE64, 1.05, 'elementwise, eta=0.0'),
]
CASES = [
  (TREE, 2, 'elementwise, eta=0.01'),
  (TREE, math.inf, 'layerwise, eta=0.0'),
  (TREE, 10, 'filterwise, eta=0.0'),
  *CASES64,
]


def also(strategy, more):
  """Pairs of an example and of what ``more(example)`` draws for it."""
  pair = lambda example: st.tuples(st.just(example), more(example))
  return strategy.flatmap(pair)


def powers_of_two(example):
  """Factors A on each leaf: with a power of two, A w is exact."""
  layerwise = example.normalization.startswith('layerwise')
  filterwise = example.normalization.startswith('filterwise')

  def shape(w):
    if layerwise:
      return ()
    return (1, 1, w.shape[-1]) if filterwise and w.ndim == 3 else w.shape

  leaves, treedef = jax.tree.flatten(example.params)
  return st.tuples(*(integers(shape(w), -4, 4) for w in leaves)).map(
    lambda powers: treedef.unflatten([2.0**power for power in powers])
  )


def masks(example):
  """Masks that select something, with T g in the domain there."""
  leaves, treedef = jax.tree.flatten(example.params)
  mask = st.tuples(*(st.booleans() for _ in leaves)).map(treedef.unflatten)
  wide = lambda part: example.ord != 1.05 or has_float64(part.params)
  return mask.filter(
    lambda mask: in_domain(part := sub_tree(example, mask)) and wide(part)
  )


def exponents(example):
  """Powers of two by which the gradient stays exact, and in the domain."""
  narrow = any(
    leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(example.grads)
  )
  most = 4 if narrow else 20
  return st.integers(-most, most).filter(
    lambda exponent: in_domain(times_power_of_two(example, exponent))
  )


def orders(example):
  """Permutations of the leaves."""
  return st.permutations(range(len(jax.tree.leaves(example.params))))


@st.composite
def networks(draw, ts, biases):
  """Parameters of ``network``, factors that do not change it, and a T."""
  array = lambda shape: draw(integers(shape, -64, 64)) / 16
  params = {
    'hidden': {'kernel': array((1, 2, 3))},
    'out': {'kernel': array((1, 3, 2))},
  }
  if biases:
    params['hidden']['bias'] = array((3,))
    params['out']['bias'] = array((2,))
  t, of_units = draw(st.sampled_from(ts))
  factors = draw(integers((3,) if of_units else (1,), -4, 4))
  return params, np.broadcast_to(2.0**factors, (3,)), t


# With eta = 0, and whether each unit may have a factor of its own.
ALL_NORMALIZED = [
  (normalization.elementwise(0.0, mask=None), True),
  (normalization.filterwise(0.0, mask=None), False),
  (normalization.layerwise(0.0, mask=None), False),
]
# What ``adaptive=True`` stands for.
BIASES_EXCEPTED = [(normalization.elementwise(0.0), True)]

LAWS = {
  'steepest': (law_steepest, ascent.rho_ball, st.tuples(IN_DOMAIN)),
  'ball': (law_ball, ascent.rho_ball, st.tuples(examples(wild=True))),
  'closed form': (law_closed_form, ascent.rho_ball, st.tuples(IN_DOMAIN)),
  'ascent steps': (
    law_ascent_steps,
    asam,
    st.tuples(st.integers(1, 3).flatmap(lambda n: batches(n, reach=10))),
  ),
  'gradient scale': (
    law_gradient_scale,
    ascent.rho_ball,
    also(IN_DOMAIN, exponents),
  ),
  'rescaling': (
    law_rescaling,
    ascent.rho_ball,
    also(examples(normalizations=ETA_ZERO), powers_of_two),
  ),
  'ReLU network': (
    law_relu_network,
    ascent.rho_ball,
    networks(ALL_NORMALIZED, biases=True),
  ),
  'ReLU network without biases': (
    law_relu_network,
    ascent.rho_ball,
    networks(BIASES_EXCEPTED, biases=False),
  ),
  'mask': (law_mask, ascent.rho_ball, also(IN_DOMAIN, masks)),
  'permutation': (law_permutation, ascent.rho_ball, also(IN_DOMAIN, orders)),
  'value_and_grad': (
    law_value_and_grad,
    value_and_grad,
    st.tuples(examples(cases=CASES)),
  ),
  'jit': (law_jit, ascent.rho_ball, st.tuples(examples(cases=CASES))),
  'vmap': (
    law_vmap,
    ascent.rho_ball,
    st.tuples(batches(2, cases=CASES[::2]), st.booleans()),
  ),
  'derivative by rho': (
    law_rho_derivative,
    asam,
    st.tuples(examples(cases=CASES64, reach=18)),
  ),
  'derivative': (
    law_derivative,
    asam,
    st.tuples(examples(cases=CASES64, reach=1, smallest=16)),
  ),
  'finite derivatives': (
    law_finite_derivatives,
    asam,
    st.tuples(examples(cases=CASES[::2], reach=3), st.sampled_from([0.0, 1.0])),
  ),
  'checkpoint': (
    law_checkpoint,
    asam,
    st.tuples(
      examples(cases=CASES64[:1], reach=20), st.sampled_from([*CHECKPOINTED])
    ),
  ),
}


def check(law, subject, cases, **changes):
  """Runs a law on all its examples."""

  @settings(SETTINGS, **changes)
  @given(cases)
  def holds(case):
    law(subject, *case)

  holds()


@pytest.mark.parametrize('name', LAWS)
def test_law(name):
  """The library keeps it."""
  check(*LAWS[name])


# Wrong versions.


def formula(compute):
  """A ``rho_ball`` without a mask, of ``compute(t, g, p) -> eps / rho``."""

  def rho_ball(rho, eta, adaptive, *, ord=2):
    del eta

    def update(grads, params):
      wide = lambda x: jnp.asarray(x, jnp.float64)
      w, treedef = jax.tree.flatten(params)
      g = [wide(leaf) for leaf in jax.tree.leaves(grads)]
      t = [
        jnp.broadcast_to(wide(leaf), x.shape)
        for leaf, x in zip(jax.tree.leaves(adaptive(params)), w, strict=True)
      ]
      unit = compute(t, g, ord)
      return treedef.unflatten(
        [(rho * u).astype(x.dtype) for u, x in zip(unit, w, strict=True)]
      )

    return optax.stateless(update)

  rho_ball.__name__ = compute.__name__
  return rho_ball


def pairwise(function, *lists):
  """A list of ``function`` at the elements of lists."""
  return [function(*leaves) for leaves in zip(*lists, strict=True)]


def multiply(t, x):
  """The product, leaf by leaf."""
  return pairwise(jnp.multiply, t, x)


def dual_norm(h, p):
  """||h||_q, or 1 where that is zero."""
  q = 1 / (1 - 1 / p)
  total = sum(jnp.sum(jnp.abs(leaf) ** q) for leaf in h)
  return jnp.where(total > 0, total, 1) ** (1 / q)


def powers(h, p):
  """sign(h) |h|^(q - 1), of norm ||h||_q^(q - 1)."""
  return [
    jnp.sign(leaf) * jnp.where(leaf == 0, 0, jnp.abs(leaf) ** (1 / (p - 1)))
    for leaf in h
  ]


def steepest(h, p, norm=dual_norm):
  """The point of the unit ball that is farthest along ``h``."""
  of_h = norm(h, p)
  return powers([leaf / of_h for leaf in h], p)


@formula
def right(t, g, p):
  """The formula, as a control."""
  return multiply(t, steepest(multiply(t, g), p))


@formula
def another_exponent(t, g, p):
  """The exponent is a little larger."""
  return multiply(t, steepest(multiply(t, g), p * 1.01))


@formula
def not_mapped_back(t, g, p):
  """A step in the normalized space."""
  return steepest(multiply(t, g), p)


@formula
def sheared(t, g, p):
  """Along T^2 g, in a ball without T."""
  return steepest(multiply(t, multiply(t, g)), p)


@formula
def norm_of_each_leaf(t, g, p):
  """The norm is taken leaf by leaf."""
  h = multiply(t, g)
  return multiply(t, [steepest([leaf], p)[0] for leaf in h])


@formula
def norm_of_first_leaf(t, g, p):
  """The norm is that of one leaf."""
  return multiply(
    t, steepest(multiply(t, g), p, lambda h, p: dual_norm(h[:1], p))
  )


@formula
def descending(t, g, p):
  """The wrong sign."""
  return [-x for x in multiply(t, steepest(multiply(t, g), p))]


@formula
def a_little_longer(t, g, p):
  """The radius is off by 2e-5."""
  return [1.00002 * x for x in multiply(t, steepest(multiply(t, g), p))]


@formula
def not_divided(t, g, p):
  """T^2 g, as it is."""
  return multiply(t, multiply(t, g))


@formula
def constant_in_the_norm(t, g, p):
  """The norm plus 1e-12, as many guard a division."""
  return multiply(
    t, steepest(multiply(t, g), p, lambda h, p: dual_norm(h, p) + 1e-12)
  )


@formula
def constant_in_t(t, g, p):
  """T is a little larger."""
  t = [s + 1e-4 for s in t]
  return multiply(t, steepest(multiply(t, g), p))


@formula
def summed_in_float32(t, g, p):
  """For p = 2, squares overflow and vanish; other p have no perturbation."""
  h = [leaf.astype(jnp.float32) for leaf in multiply(t, g)]
  total = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in h))
  usable = (p == 2) & (total > 0)
  return multiply(t, [jnp.where(usable, leaf / total, 0) for leaf in h])


@formula
def norm_of_the_batch(t, g, p):
  """Under vmap, the norm is that of all examples."""
  h = multiply(t, g)
  return multiply(t, steepest(h, p, lambda h, p: batch_norm(p)(*h)))


@functools.cache
def batch_norm(p):
  """``dual_norm`` with a wrong rule for vmap."""

  @jax.custom_batching.custom_vmap
  def norm(*h):
    return dual_norm(h, p)

  @norm.def_vmap
  def _(size, batched, *h):
    del batched
    return jnp.full(size, dual_norm(h, p)), True

  return norm


@formula
def no_derivative_of_the_norm(t, g, p):
  """The norm counts as a constant."""
  constant = lambda h, p: jax.lax.stop_gradient(dual_norm(h, p))
  return multiply(t, steepest(multiply(t, g), p, constant))


@formula
def guarded_outside(t, g, p):
  """Where the norm is zero, the derivative of the root is infinite."""
  h = multiply(t, g)
  total = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in h))
  return multiply(t, [jnp.where(total > 0, leaf / total, 0) for leaf in h])


def without_normalization(rho, eta, adaptive, **kwargs):
  """SAM."""
  del adaptive
  return ascent.rho_ball(rho, eta, False, **kwargs)


def rounded_before_rho(rho, eta, adaptive, **kwargs):
  """The unit perturbation is rounded, and its product with rho again."""
  unit = ascent.rho_ball(1.0, eta, adaptive, **kwargs)
  return optax.chain(unit, optax.scale(rho))


def raw_gradient_where_masked(rho, eta, adaptive, *, ord, mask=None):
  """What ``optax.masked`` around an ascent would do."""
  tx = ascent.rho_ball(rho, eta, adaptive, ord=ord, mask=mask)

  def update(grads, params):
    eps, _ = tx.update(grads, tx.init(params), params)
    if mask is None:
      return eps
    choose = lambda is_selected, e, g: e if is_selected else jnp.asarray(g)
    return jax.tree.map(choose, mask, eps, grads)

  return optax.stateless(update)


def norm_of_masked(rho, eta, adaptive, *, ord, mask=None):
  """The norm is taken over masked leaves, too."""
  everywhere = ascent.rho_ball(rho, eta, adaptive, ord=ord)
  if mask is None:
    return everywhere
  zero = lambda e, is_selected: e if is_selected else 0 * e
  keep = optax.stateless(lambda eps, _: jax.tree.map(zero, eps, mask))
  return optax.chain(everywhere, keep)


def remembering(factory):
  """Each call reaches a little farther than the last."""
  calls = []

  def wrong(*args, **kwargs):
    tx = factory(*args, **kwargs)

    def update(updates, state, params, **extra_args):
      calls.append(None)
      updates, state = tx.update(updates, state, params, **extra_args)
      factor = 1 + len(calls) / 8
      scale = lambda u: (factor * u).astype(u.dtype)
      return jax.tree.map(scale, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)

  wrong.__name__ = f'remembering_{factory.__name__}'
  return wrong


def full_steps(base_tx, rho, *, ascent_steps, **kwargs):
  """Each of the ascent steps is of length rho."""
  return asam(base_tx, rho * ascent_steps, ascent_steps=ascent_steps, **kwargs)


def constant_rho(base_tx, rho, **kwargs):
  """No derivative by rho."""
  return asam(base_tx, jax.lax.stop_gradient(rho), **kwargs)


def clean_gradient(fun, **kwargs):
  """The gradient at w."""
  del kwargs
  return jax.value_and_grad(fun)


def perturbed_value(fun, **kwargs):
  """The right gradient, and the value at w + eps."""
  value_and_grad_fn = value_and_grad(fun, **kwargs)

  def wrong(params):
    tx = asam(optax.identity(), **kwargs)
    _, state = tx.update(
      jax.grad(fun)(params), tx.init(params), params, value_fn=fun
    )
    return state[0].perturbed_value, value_and_grad_fn(params)[1]

  return wrong


def asam_of(rho_ball):
  """``asam`` with another ascent."""

  def wrong(base_tx, rho, *, adaptive, ord, **kwargs):
    perturbation = rho_ball(rho, 0.0, adaptive, ord=ord)
    return optax.chain(sharpness_aware(perturbation, **kwargs), base_tx)

  wrong.__name__ = f'asam_of_{rho_ball.__name__}'
  return wrong


WRONG = {
  'steepest': [
    another_exponent,
    not_mapped_back,
    sheared,
    norm_of_each_leaf,
    descending,
    a_little_longer,
    without_normalization,
  ],
  'ball': [summed_in_float32, a_little_longer, constant_in_t],
  'closed form': [another_exponent, constant_in_t, rounded_before_rho],
  'ascent steps': [full_steps, asam_of(norm_of_each_leaf)],
  'gradient scale': [not_divided, constant_in_the_norm],
  'rescaling': [without_normalization, constant_in_t, sheared],
  'ReLU network': [without_normalization, constant_in_t],
  'ReLU network without biases': [without_normalization],
  'mask': [raw_gradient_where_masked, norm_of_masked],
  'permutation': [norm_of_first_leaf],
  'value_and_grad': [clean_gradient, perturbed_value],
  'jit': [remembering(ascent.rho_ball)],
  'vmap': [norm_of_the_batch, remembering(ascent.rho_ball)],
  'derivative by rho': [constant_rho, asam_of(norm_of_each_leaf)],
  'derivative': [asam_of(no_derivative_of_the_norm)],
  'finite derivatives': [asam_of(guarded_outside)],
  'checkpoint': [remembering(asam)],
}


@pytest.mark.parametrize(
  ('name', 'wrong'), [(name, wrong) for name in LAWS for wrong in WRONG[name]]
)
def test_law_fails(name, wrong):
  """On a wrong version, within ten times as many examples."""
  law, _, cases = LAWS[name]
  with pytest.raises(AssertionError):
    check(law, wrong, cases, phases=FIRST_FAILURE, max_examples=1000)


def test_control():
  """What is planted is all that makes them fail: the formula itself passes."""
  law, _, cases = LAWS['steepest']
  check(law, right, cases)


def test_relu_network_with_biases():
  """Its function changes under the default rule: biases have T = 1."""
  cases = networks(BIASES_EXCEPTED, biases=True)
  with pytest.raises(AssertionError):
    check(law_relu_network, ascent.rho_ball, cases, phases=FIRST_FAILURE)
