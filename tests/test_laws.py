"""Promise: the laws of the perturbation hold, whatever the tree and numbers.

Each law judges a subject: a function like ``ascent.rho_ball`` or ``asam``.
``WRONG`` lists wrong subjects, each of which must fail the law it is listed
under. Laws that compare with the reference to 1e-12 need none.
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
from optax_asam import descent
from optax_asam import looksam
from optax_asam import momentum_asam
from optax_asam import normalization
from optax_asam import sharpness_aware
from tests.helpers import reference
from tests.helpers.cases import DESCENTS
from tests.helpers.cases import ORDS
from tests.helpers.strategies import NORMALIZATIONS
from tests.helpers.strategies import Example
from tests.helpers.strategies import batches
from tests.helpers.strategies import examples
from tests.helpers.strategies import has_float64
from tests.helpers.support import error
from tests.helpers.support import run

# A number below 2^-126 (2^-1022 in float64) counts as zero. Where that befalls
# T g / ||T g||, a factor of T, up to 2^30 (2^210), follows.
FLUSHED = {4: 2.0**-96, 8: 2.0**-800}


@pytest.fixture(autouse=True, scope='module')
def x64():
  """All examples may have leaves in float64, among other dtypes."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


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


def exact(example, mask=None):
  """The leaves of the perturbation, by the reference."""
  w, g = float64s(example.params), float64s(example.grads)
  selected = np.ones(len(w), bool) if mask is None else mask
  if not norm(
    [h for h, m in zip(scaled(example), selected, strict=True) if m], math.inf
  ):
    return [0 * leaf for leaf in w]
  eps = reference.perturbation(
    dict(enumerate(w)),
    dict(enumerate(g)),
    NORMALIZATIONS[example.normalization][1],
    example.rho,
    example.ord,
    range(len(w)),
    np.flatnonzero(selected),
  )
  return list(eps.values())


def scaled(example):
  """T g of each leaf, by the reference."""
  pairs = zip(operator(example), float64s(example.grads), strict=True)
  return [t * g for t, g in pairs]


def in_domain(example):
  """Whether T g is not zero, and in the range that the laws ask for."""
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


def law_mask(rho_ball, example):
  """Every other leaf is masked: it does not move, and is not in the norm."""
  leaves, treedef = jax.tree.flatten(example.params)
  mask = [i % 2 == 0 for i in range(len(leaves))]
  eps = perturb(rho_ball, example, mask=treedef.unflatten(mask))
  is_masked = lambda e: isinstance(e, optax.MaskedNode)
  eps = jax.tree.map(
    lambda e, w: jnp.zeros_like(w) if is_masked(e) else e,
    eps,
    example.params,
    is_leaf=is_masked,
  )
  assert_close(eps, exact(example, mask), roundings=1)


def law_vmap(rho_ball, batch):
  """Mapped over parameters, gradients and rho, eps is that of a loop."""
  mapped = jax.tree.map(
    lambda *leaves: np.stack(leaves), *(example[:3] for example in batch)
  )
  together = compiled(mapped_eps, rho_ball, *batch[0][3:])(*mapped)
  for i, example in enumerate(batch):
    alone = perturb(rho_ball, example)
    assert_close(jax.tree.map(lambda e, i=i: e[i], together), alone)


def law_derivative(asam, example):
  """The derivative of a step by w and rho is that of finite differences."""
  params, grads, rho, *static = example
  direction = jax.tree.map(lambda w, g: w * np.sin(g), params, grads)

  def at(x):
    return compiled(along, asam, *static)(params, direction, rho, x)

  value, derivative = at(0.0)
  difference = (at(1e-6)[0] - at(-1e-6)[0]) / 2e-6
  assert abs(derivative - difference) <= 1e-6 * (abs(derivative) + abs(value))


def law_finite_derivatives(rho_ball, p):
  """No derivative of eps is NaN where a gradient or weights are zero."""
  w = jnp.array([[[1.0, 0.0], [2.0, 0.0]]])
  g = jnp.array([[[1.0, 2.0], [0.0, 3.0]]])
  txs = [
    rho_ball(0.5, 0.0, NORMALIZATIONS[name][0], ord=p) for name in ETA_ZERO
  ]
  total = lambda w, g: sum(tx.update(g, tx.init(w), w)[0].sum() for tx in txs)
  derivatives = jax.jit(jax.grad(total, (0, 1)))
  for grads in (g, 0 * g):
    assert all(np.isfinite(d).all() for d in derivatives(w, grads))


def law_trajectory(asam, options):
  """Four steps of ASAM around SGD are those of the reference."""
  rhos = np.linspace(0.5, 0.2, 4)
  rng = np.random.default_rng(0)
  params = {
    'kernel': rng.standard_normal((3, 2)),
    'bias': rng.standard_normal(2),
  }
  tx = asam(
    optax.sgd(0.1, momentum=0.9),
    lambda count: jnp.asarray(rhos)[count],
    adaptive=normalization.elementwise(0.01),
    **{'ord' if k == 'p' else k: v for k, v in options.items()},
  )
  (result, _), _ = run(tx, jax.tree.map(jnp.asarray, params), 4)
  expected, _ = reference.asam_run(
    params, 4, lambda step: rhos[step], **options
  )
  assert error(result, expected) < 1e-12


# What single laws need.


def loss_fn(params):
  """Half the square of each weight, times the number of its leaf."""
  leaves = [jnp.asarray(w, jnp.float64) for w in jax.tree.leaves(params)]
  return sum((i + 1) * jnp.sum(w * w) / 2 for i, w in enumerate(leaves))


def loss_grads(params):
  """The gradient of ``loss_fn``, by hand."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten([(i + 1) * w for i, w in enumerate(leaves)])


@functools.cache
def compiled(function, *static):
  """``function`` at static arguments, compiled once for all examples."""
  return jax.jit(functools.partial(function, *static))


def mapped_eps(rho_ball, p, name, params, grads, rho):
  """The perturbation at several parameters, gradients and radii."""
  return jax.vmap(lambda *arrays: perturb(rho_ball, Example(*arrays, p, name)))(
    params, grads, rho
  )


def loss_after_step(asam, p, name, params, rho):
  """The loss after a step of gradient descent, for meta-learning."""
  t, _ = NORMALIZATIONS[name]
  tx = asam(optax.sgd(0.1), rho, adaptive=t, ord=p)
  updates, _ = tx.update(
    loss_grads(params), tx.init(params), params, grad_fn=loss_grads
  )
  return loss_fn(optax.apply_updates(params, updates))


def along(asam, p, name, params, direction, rho, x):
  """The loss after a step, and its derivative, at ``x`` along a line."""

  def loss(x):
    moved = jax.tree.map(lambda w, d: w + x * d, params, direction)
    return loss_after_step(asam, p, name, moved, rho * (1 + x))

  return jax.jvp(loss, (x,), (1.0,))


# The examples of each law.

IN_DOMAIN = examples().filter(in_domain)
ETA_ZERO = tuple(name for name in NORMALIZATIONS if name.endswith('eta=0.0'))
# What is compiled is compiled for these trees alone.
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
  (TREE64, math.inf, 'identity, eta=0.0'),
  (TREE64, 3, 'layerwise, eta=0.01'),
  (TREE64, 1.05, 'elementwise, eta=0.0'),
]
CASES = [(TREE, 2, 'elementwise, eta=0.01'), *CASES64[::2]]


TRAJECTORIES = {
  'trajectory': {},
  'trajectory, every_k': {'every_k': 3},
  'trajectory, ascent steps': {'ascent_steps': 3},
  'trajectory, p = 3': {'p': 3, 'ascent_steps': 3},
  'trajectory, p = inf': {'p': np.inf, 'ascent_steps': 3, 'every_k': 3},
  **{
    f'trajectory, {name} descent': {'every_k': 2, 'descent': descent}
    for name, descent in DESCENTS.items()
  },
}


def friendly(*args, **kwargs):
  """A ``rho_ball`` of F-SAM; at its first update the average is zero."""
  return optax.chain(ascent.friendly(), ascent.rho_ball(*args, **kwargs))


# Transformations whose step is differentiated.
KIN = {
  'gsam': functools.partial(asam, descent=descent.gsam(0.4)),
  'wsam': functools.partial(asam, descent=descent.wsam(0.7)),
  'looksam': looksam,
  'momentum_asam': functools.partial(momentum_asam, momentum=0.9),
}
LAWS = {
  'steepest': (law_steepest, ascent.rho_ball, st.tuples(IN_DOMAIN)),
  'ball': (law_ball, ascent.rho_ball, st.tuples(examples(wild=True))),
  'closed form': (law_closed_form, ascent.rho_ball, st.tuples(IN_DOMAIN)),
  'mask': (
    law_mask,
    ascent.rho_ball,
    st.tuples(IN_DOMAIN.filter(lambda e: len(jax.tree.leaves(e.params)) > 1)),
  ),
  'vmap': (law_vmap, ascent.rho_ball, st.tuples(batches(2, compiled=CASES))),
  **{
    f'derivative{name}': (
      law_derivative,
      subject,
      st.tuples(examples(compiled=cases, reach=1, smallest=16)),
    )
    for name, subject, cases in (
      ('', asam, CASES64),
      *((f', {name}', subject, CASES64[:1]) for name, subject in KIN.items()),
    )
  },
  'closed form, friendly': (law_closed_form, friendly, st.tuples(IN_DOMAIN)),
  'ball, friendly': (law_ball, friendly, st.tuples(examples(wild=True))),
  'finite derivatives': (
    law_finite_derivatives,
    ascent.rho_ball,
    st.tuples(st.sampled_from(ORDS)),
  ),
  **{
    name: (law_trajectory, asam, st.just([options]))
    for name, options in TRAJECTORIES.items()
  },
}


def check(law, subject, examples, **changes):
  """Runs a law on its examples, as many as the profile says."""

  @settings(**changes)
  @given(examples)
  def holds(case):
    law(subject, *case)

  holds()


@pytest.mark.parametrize('name', LAWS)
def test_law(name):
  """The library keeps it."""
  check(*LAWS[name])


# Wrong ascents.


def of_formula(compute):
  """A ``rho_ball`` without a mask, of ``compute(t, g, p, ends) -> eps / rho``.

  T and g are vectors of all leaves, in float64; ``ends`` are those of leaves.
  """

  def rho_ball(rho, eta, adaptive, *, ord=2):
    del eta

    def update(grads, params):
      w, treedef = jax.tree.flatten(params)
      ends = np.cumsum([leaf.size for leaf in w])[:-1]
      t, g = (
        jnp.concatenate(
          [
            jnp.broadcast_to(jnp.asarray(leaf, float), x.shape).ravel()
            for leaf, x in zip(jax.tree.leaves(tree), w, strict=True)
          ]
        )
        for tree in (adaptive(params), grads)
      )
      unit = jnp.split(compute(t, g, ord, ends), ends)
      return treedef.unflatten(
        [
          (rho * u).reshape(x.shape).astype(x.dtype)
          for u, x in zip(unit, w, strict=True)
        ]
      )

    return optax.stateless(update)

  return rho_ball


def dual_norm(h, p):
  """||h||_q, or 1 where that is zero."""
  q = 1 / (1 - 1 / p)
  total = jnp.sum(jnp.abs(h) ** q)
  return jnp.where(total > 0, total, 1) ** (1 / q)


def steepest(h, p, norm=dual_norm):
  """The point of the unit ball that is farthest along ``h``."""
  magnitude = jnp.where(h == 0, 1, jnp.abs(h / norm(h, p))) ** (1 / (p - 1))
  return jnp.sign(h) * magnitude


def with_norm(norm):
  """The formula with ``norm(t, g, p, ends)`` in the denominator."""
  return lambda t, g, p, ends: (
    t * steepest(t * g, p, lambda h, p: norm(t, g, p, ends))
  )


def guarded_outside(t, g, p, ends):
  """Where the norm is zero, the derivative of the root is infinite."""
  del p, ends
  total = jnp.sqrt(jnp.sum((t * g) ** 2))
  return t * jnp.where(total > 0, t * g / total, 0)


@functools.cache
def batch_norm(p):
  """``dual_norm`` with a wrong rule for vmap."""
  norm = jax.custom_batching.custom_vmap(lambda h: dual_norm(h, p))
  norm.def_vmap(lambda size, _, h: (jnp.full(size, dual_norm(h, p)), True))
  return norm


FORMULAS = {
  'right': lambda t, g, p, _: t * steepest(t * g, p),
  'another exponent': lambda t, g, p, _: t * steepest(t * g, p * 1.01),
  'not mapped back': lambda t, g, p, _: steepest(t * g, p),
  'sheared': lambda t, g, p, _: steepest(t * t * g, p),
  'descending': lambda t, g, p, _: -t * steepest(t * g, p),
  'a little longer': lambda t, g, p, _: 1.00002 * t * steepest(t * g, p),
  'constant in T': lambda t, g, p, _: (t + 1e-4) * steepest((t + 1e-4) * g, p),
  'norm of each leaf': lambda t, g, p, ends: (
    t * jnp.concatenate([steepest(h, p) for h in jnp.split(t * g, ends)])
  ),
  'norm of the gradient': with_norm(lambda t, g, p, _: dual_norm(g, p)),
  'norm of the batch': with_norm(lambda t, g, p, _: batch_norm(p)(t * g)),
  'constant in the norm': with_norm(
    lambda t, g, p, _: dual_norm(t * g, p) + 1e-12
  ),
  'summed in float32': with_norm(
    lambda t, g, p, _: dual_norm(jnp.float32(t * g), p)
  ),
  'no derivative of the norm': with_norm(
    lambda t, g, p, _: jax.lax.stop_gradient(dual_norm(t * g, p))
  ),
  'guarded outside': guarded_outside,
}
BALLS = {name: of_formula(compute) for name, compute in FORMULAS.items()}


def rounded_before_rho(rho, eta, adaptive, **kwargs):
  """The unit perturbation is rounded, and its product with rho again."""
  unit = ascent.rho_ball(1.0, eta, adaptive, **kwargs)
  return optax.chain(unit, optax.scale(rho))


def masked_afterwards(replace):
  """An ascent that ignores ``mask``, with ``replace(e, g)`` where it masks."""

  def rho_ball(rho, eta, adaptive, *, ord, mask=None):
    tx = ascent.rho_ball(rho, eta, adaptive, ord=ord)

    def update(grads, params):
      eps, _ = tx.update(grads, tx.init(params), params)
      if mask is None:
        return eps
      choose = lambda is_selected, e, g: e if is_selected else replace(e, g)
      return jax.tree.map(choose, mask, eps, grads)

    return optax.stateless(update)

  return rho_ball


def with_normalization(wrong):
  """An ascent in which ``wrong(t)`` takes the place of the normalization."""
  return lambda rho, eta, adaptive, **kwargs: ascent.rho_ball(
    rho, eta, wrong(adaptive), **kwargs
  )


# Wrong transformations.


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

  return wrong


def asam_of(rho_ball):
  """``asam`` with another ascent."""

  def wrong(base_tx, rho, *, adaptive, ord):
    first = sharpness_aware(rho_ball(rho, 0.0, adaptive, ord=ord))
    return optax.chain(first, base_tx)

  return wrong


def constant_rho(base_tx, rho, **kwargs):
  """No derivative by rho."""
  return asam(base_tx, jax.lax.stop_gradient(rho), **kwargs)


# For each law the names in BALLS that must fail it, and other wrong subjects.
WRONG = {
  'steepest': (
    [
      *('another exponent', 'not mapped back', 'sheared', 'descending'),
      *('norm of the gradient', 'norm of each leaf', 'a little longer'),
    ],
    {'without T': with_normalization(lambda t: False)},
  ),
  'ball': (['summed in float32', 'a little longer', 'constant in T'], {}),
  'closed form': (
    ['constant in the norm'],
    {'rounded before rho': rounded_before_rho},
  ),
  'mask': (
    [],
    {
      'as optax.masked': masked_afterwards(lambda e, g: jnp.asarray(g)),
      'norm of masked': masked_afterwards(lambda e, g: 0 * e),
      'ignored': masked_afterwards(lambda e, g: e),
    },
  ),
  'vmap': (
    ['norm of the batch'],
    {'remembering': remembering(ascent.rho_ball)},
  ),
  'derivative': (
    [],
    {
      'constant rho': constant_rho,
      'constant norm': asam_of(BALLS['no derivative of the norm']),
    },
  ),
  'finite derivatives': (['guarded outside'], {}),
}


@pytest.mark.parametrize(
  ('name', 'wrong'),
  [
    (name, wrong)
    for name, (balls, others) in WRONG.items()
    for wrong in (*balls, *others)
  ],
)
def test_law_fails(name, wrong):
  """For a wrong subject, within a thousand examples."""
  law, _, examples = LAWS[name]
  subject = WRONG[name][1].get(wrong) or BALLS[wrong]
  with pytest.raises(AssertionError):
    check(law, subject, examples, phases=[Phase.generate], max_examples=1000)


@pytest.mark.parametrize('name', ['steepest', 'closed form'])
def test_control(name):
  """The same machinery with the right formula passes."""
  law, _, examples = LAWS[name]
  check(law, BALLS['right'], examples)
