"""Promise: the measures of sharpness are what their formulas say.

Errors of their arguments are in test_errors.py.
"""

import functools

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from optax_asam import ascent
from optax_asam import normalization
from optax_asam.sharpness import apgd_steps
from optax_asam.sharpness import average_case
from optax_asam.sharpness import fixed_steps
from optax_asam.sharpness import loss_along
from optax_asam.sharpness import max_hessian_eigenvalue
from optax_asam.sharpness import worst_case
from optax_asam.sharpness import worst_perturbation
from tests.helpers import cases
from tests.helpers import pages
from tests.helpers import sharpness_reference
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import needs_pcast
from tests.helpers.support import shard_map

RULES = {'fixed': fixed_steps(), 'apgd': apgd_steps()}
# Each with T in NumPy.
NORMALIZATIONS = {
  **{
    name + suffix: cases.make_normalization(name, eta)
    for suffix, eta in [('', 0.01), (', eta 0', 0.0)]
    for name in cases.OPERATORS
  },
  'asam': (normalization.elementwise(0.01), None),  # not of biases
}
APGD = {'step_rule': RULES['apgd']}
UNIFORM = {'samples': 20, 'distribution': 'uniform'}
# A measure and its options.
MEASURES = {
  'fixed, ball': (worst_case, {'ord': 2}),
  'fixed, box': (worst_case, {'ord': jnp.inf}),
  'apgd, ball': (worst_case, {'ord': 2} | APGD),
  'apgd, box': (worst_case, {'ord': jnp.inf} | APGD),
  'normal': (average_case, {'samples': 20}),
  'uniform, ball': (average_case, {'ord': 2} | UNIFORM),
  'uniform, box': (average_case, {'ord': jnp.inf} | UNIFORM),
  'eigenvalue': (max_hessian_eigenvalue, {}),
}
# One of each function, with each p, rule and distribution among them.
THREE = ('apgd, box', 'uniform, ball', 'eigenvalue')
FOUR = (*THREE, 'fixed, ball')
# Where the rise is well above the rounding of the loss.
RHO = {'uniform, ball': 1.0}


def operator_at(name, params):
  """T of a normalization, a tree of arrays."""
  t = NORMALIZATIONS[name][0](jax.tree.map(jnp.asarray, params))
  return jax.tree.map(
    lambda w, t: jnp.broadcast_to(jnp.asarray(t, float), w.shape),
    params,
    t,
  )


# Skips half of the compiler's work.
quick_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@functools.cache
def compiled(measure, loss_fn, *, batched=False, quickly=True, **options):
  """``measure`` of ``loss_fn(params, data)``, compiled once for its options.

  Compilation takes nearly all the time of this file, so what can be traced is
  an argument: T, rho, the key and the data, which are batches if ``batched``.
  ``quickly`` skips optimizations.
  """

  def call(params, data, t, rho, key):
    kwargs = options | {'normalization': lambda params: t}
    args = [] if measure is max_hessian_eigenvalue else [rho]
    if measure in (average_case, max_hessian_eigenvalue):
      args.append(key)
    else:
      kwargs['key'] = key
    if batched:
      return measure(loss_fn, params, *args, **kwargs, batches=data)
    return measure(lambda p: loss_fn(p, data), params, *args, **kwargs)

  return quick_jit(call) if quickly else jax.jit(call)


def measured(
  measure,
  loss_fn,
  params,
  data,
  rho=None,
  name='elementwise, eta 0',
  seed=0,
  **options,
):
  """One of MEASURES."""
  function, own = MEASURES[measure]
  rho = RHO.get(measure, 0.1) if rho is None else rho
  return compiled(function, loss_fn, **own | options)(
    params, data, operator_at(name, params), rho, jax.random.key(seed)
  )


def quadratic(params, data):
  """<g, d> + <d, H d> / 2 with d the distance from ``data['w']``."""
  d = ravel_pytree(params)[0] - data['w']
  return data['linear'] @ d + d @ data['hessian'] @ d / 2


def cross_entropy(params, batch):
  """That of a ReLU network, for a batch of inputs [n, 3] and classes [n]."""
  x, y = batch
  hidden = jnp.einsum('ni,kio->no', x, params['kernel_1']) + params['bias_1']
  logits = jax.nn.relu(hidden) @ params['kernel_2'] + params['bias_2']
  log_p = jax.nn.log_softmax(logits)
  return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], 1))


def rough(params, data):
  """A loss with many maxima."""
  w = ravel_pytree(params)[0]
  return jnp.sin(data * w).sum() + jnp.cos(3 * w).prod()


ROUGH = {'w': np.array([0.3, -1.2, 0.7, 2.0])}


def network_params(seed=0, hidden=8):
  """Parameters of the network, in float64."""
  rng = np.random.default_rng(seed)
  shapes = {
    'kernel_1': (1, 3, hidden),
    'bias_1': (hidden,),
    'kernel_2': (hidden, 3),
    'bias_2': (3,),
  }
  return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def batch_of(n, seed=0):
  """Inputs and classes."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((n, 3)), rng.integers(0, 3, n)


SHAPES = {'bias': (2,), 'kernel': (2, 1, 2)}
SIZE = 6
SPECTRA = {
  'positive': np.geomspace(1, 100, SIZE),
  'indefinite': np.geomspace(1, 100, SIZE) * [1, -1, 1, -1, 1, -1],
  'negative': -np.geomspace(1, 100, SIZE),
}


def quadratic_problem(seed, spectrum, name='identity'):
  """Parameters, data of `quadratic`, and its Hessian and gradient in u.

  ``spectrum`` is that of T H T; its eigenvectors are random.
  """
  rng = np.random.default_rng(seed)
  operator = NORMALIZATIONS[name][1]
  params = {name: rng.standard_normal(s) for name, s in SHAPES.items()}
  t = np.concatenate([operator(params[name]).ravel() for name in SHAPES])
  axes, _ = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))
  hessian = (axes * spectrum) @ axes.T
  linear = 10 * rng.standard_normal(SIZE)
  data = {
    'w': np.concatenate([params[name].ravel() for name in SHAPES]),
    'hessian': hessian / np.outer(t, t),
    'linear': linear / t,
  }
  return params, data, hessian, linear


# Checks of the exact value of a measure.


def check_ball(name, rule='fixed', spectrum='positive'):
  """The solution of a trust-region problem."""
  for seed, rho in enumerate([0.01, 0.1, 1.0, 3.0]):
    params, data, *in_u = quadratic_problem(seed, SPECTRA[spectrum], name)
    rise = measured(
      f'{rule}, ball', quadratic, params, data, rho, name, steps=1000
    )
    expected = sharpness_reference.ball_maximum(*in_u, rho)
    assert abs(rise / expected - 1) < 1e-6


def check_box(name, rule='fixed'):
  """The maximum of all faces of the box, with restarts."""
  for seed, rho in enumerate([0.1, 1.0, 3.0]):
    params, data, *in_u = quadratic_problem(seed, SPECTRA['positive'], name)
    rise = measured(
      f'{rule}, box', quadratic, params, data, rho, name, restarts=100
    )
    expected = sharpness_reference.box_maximum(*in_u, rho)
    assert abs(rise / expected - 1) < 1e-6


def check_eigenvalue(name, steps=SIZE, bound=1e-6):
  """NumPy's eigenvalue, with as many steps as dimensions, and with more."""
  spectra = [
    *SPECTRA.values(),
    np.zeros(SIZE),
    np.array([0, 0, 0, 0, 0, 7.0]),
    np.array([0, 0, 0, 0, 0, -7.0]),
    np.array([-1, -1, -1, 2, 2, 2.0]),
    np.full(SIZE, -3.0),
    np.array([-1e6, 1, 2, 3, 4, 5]),
  ]
  for seed, spectrum in enumerate(spectra):
    params, data, hessian, _ = quadratic_problem(seed, spectrum, name)
    value = measured(
      'eigenvalue', quadratic, params, data, 0.1, name, steps=steps
    )
    expected = np.linalg.eigvalsh(hessian)[-1]
    assert abs(value - expected) <= bound * np.abs(spectrum).max()


def check_average(measured, distribution='normal'):
  """The closed form, factor x rho^2 tr(T H T), within five standard errors.

  Of a function like `measured`, which may be a wrong one.
  """
  factor, draw = {
    'normal': (1 / 2, lambda rng, n: rng.standard_normal((n, SIZE))),
    'uniform, ball': (
      1 / (2 * (SIZE + 2)),
      lambda rng, n: (
        (points := rng.standard_normal((n, SIZE)))
        * rng.uniform(size=(n, 1)) ** (1 / SIZE)
        / np.linalg.norm(points, axis=1, keepdims=True)
      ),
    ),
    'uniform, box': (1 / 6, lambda rng, n: rng.uniform(-1, 1, (n, SIZE))),
  }[distribution]
  rng = np.random.default_rng(0)
  samples, rho = 10_000, 2.0
  for seed, name in enumerate(cases.OPERATORS):
    spectrum = rng.uniform(-1, 2, SIZE)
    params, data, hessian, _ = quadratic_problem(seed, spectrum, name)
    data['linear'] = np.zeros(SIZE)  # It would but add to the errors.
    average = measured(
      distribution, quadratic, params, data, rho, name, samples=samples
    )
    points = rho * draw(rng, samples)
    rises = (points @ hessian * points).sum(1) / 2
    five_errors = 5 * rises.std() / np.sqrt(samples)
    assert abs(average - factor * rho**2 * spectrum.sum()) < five_errors


@pytest.mark.parametrize('name', cases.OPERATORS)
@pytest.mark.parametrize(
  ('check', 'kwargs'),
  [
    (check_ball, {'rule': 'fixed'}),
    (check_ball, {'rule': 'apgd', 'spectrum': 'indefinite'}),
    (check_box, {'rule': 'fixed'}),
    (check_box, {'rule': 'apgd'}),
    (check_eigenvalue, {}),
    (check_eigenvalue, {'steps': 50, 'bound': 1e-9}),
  ],
)
def test_exact(x64, check, kwargs, name):
  """Each measure of a quadratic loss, for each normalization."""
  check(name, **kwargs)


@pytest.mark.parametrize(
  'distribution', ['normal', 'uniform, ball', 'uniform, box']
)
def test_average(distribution):
  """The mean over each distribution."""
  check_average(measured, distribution)


# Wrong measures, by what they make of the arguments.
WRONG = {
  'without T': lambda m, f, params, data, rho, name, **kwargs: measured(
    m, f, params, data, rho, 'identity', **kwargs
  ),
  'beyond the ball': lambda m, f, params, data, rho, name, **kwargs: measured(
    m, f, params, data, 1.1 * rho, name, **kwargs
  ),
}


@pytest.mark.parametrize('wrong', WRONG)
def test_wrong_averages_fail(x64, wrong):
  """A bound of five standard errors is narrow enough."""
  with pytest.raises(AssertionError):
    check_average(WRONG[wrong])


@pytest.mark.parametrize('p', [2, jnp.inf])
@pytest.mark.parametrize('size', [0.1, 0.9])
def test_fixed_steps(x64, p, size):
  """A step to the surface, and one of the given size, in NumPy."""
  rho, measure = 3.0, f'fixed, {"ball" if p == 2 else "box"}'
  params, data, hessian, linear = quadratic_problem(0, SPECTRA['positive'])
  first = rho * sharpness_reference.steepest(linear, p)
  step = size * rho * sharpness_reference.steepest(linear + hessian @ first, p)
  second = sharpness_reference.project(first + step, rho, p)
  rises = [linear @ u + u @ hessian @ u / 2 for u in (first, second)]
  assert rises[1] > 1.01 * rises[0]
  options = {'steps': 2, 'step_rule': fixed_steps(size)}
  rise = measured(measure, quadratic, params, data, rho, 'identity', **options)
  assert abs(rise / rises[1] - 1) < 1e-12


@pytest.mark.parametrize('p', [2, jnp.inf])
@pytest.mark.parametrize('steps', [7, 20, 100])
def test_apgd(x64, p, steps):
  """Auto-PGD in NumPy goes the same way on a loss with many maxima."""
  value_and_grad = jax.jit(jax.value_and_grad(rough))
  measure = f'apgd, {"ball" if p == 2 else "box"}'
  w = ROUGH['w']
  for rho in (0.5, 2.0):

    def in_u(u):
      value, grads = value_and_grad({'w': w + np.abs(w) * u}, 5.0)
      return float(value), np.abs(w) * np.asarray(grads['w'])

    best = sharpness_reference.apgd(in_u, w.size, rho, p, steps)
    expected = best - rough({'w': w}, 5.0)
    rise = measured(measure, rough, ROUGH, 5.0, rho, steps=steps)
    assert abs(rise / expected - 1) < 1e-9


def test_eigenvalue_after_the_end():
  """Rounding errors are not taken for another vector of Lanczos."""
  hessian = jnp.diag(jnp.array([3.0, 2.0, 2.0, -1.0]))
  value = max_hessian_eigenvalue(
    lambda w: w @ hessian @ w / 2,
    jnp.ones(4),
    jax.random.key(0),
    normalization=normalization.identity(),
    steps=200,
  )
  assert abs(value - 3) < 3e-6


def test_eigenvalue_of_one_dimension():
  """The zeros after the last vector of Lanczos are no eigenvalues."""
  params = {'w': np.array([2.0])}
  data = {'w': params['w'], 'linear': np.ones(1), 'hessian': np.array([[-3.0]])}
  value = measured('eigenvalue', quadratic, params, data, name='identity')
  assert abs(value + 3) < 1e-5


def rescaled(params, name):
  """Parameters of the same function: factors of a neuron or of a layer."""
  factors = 10 ** np.random.default_rng(0).uniform(-3, 3, 8)
  factors[:2] = 1e3, 1e-3
  if name == 'layerwise, eta 0':
    factors = np.full(8, 1e3)
  return params | {
    'kernel_1': params['kernel_1'] * factors,
    'bias_1': params['bias_1'] * factors,
    'kernel_2': params['kernel_2'] / factors[:, None],
  }


@pytest.mark.parametrize('measure', FOUR)
def test_invariance(x64, measure):
  """Rescaled by up to 1e3: normalized the same, plain more than tenfold."""
  params, batch = network_params(), batch_of(16)
  for name in NORMALIZATIONS:
    before, after = (
      measured(measure, cross_entropy, p, batch, name=name)
      for p in (params, rescaled(params, name))
    )
    if name == 'identity':
      assert max(after / before, before / after) > 10
    elif 'eta 0' in name and 'identity' not in name:
      assert abs(after / before - 1) < 1e-10, name


@pytest.mark.parametrize('p', [2, jnp.inf])
@pytest.mark.parametrize('rule', RULES)
def test_one_step(x64, p, rule):
  """The loss at the perturbation of asam, if that is no less than at w.

  The first step of APGD is twice as long, and ends on the surface, too.
  """
  params, batch = network_params(), batch_of(16)
  measure = f'{rule}, {"ball" if p == 2 else "box"}'
  loss_fn = quick_jit(cross_entropy)
  grads = quick_jit(jax.grad(cross_entropy))(params, batch)
  for name in cases.OPERATORS:
    tx = ascent.rho_ball(0.1, 0.0, NORMALIZATIONS[name][0], ord=p)
    eps, _ = tx.update(grads, tx.init(params), params)
    perturbed = {key: params[key] + eps[key] for key in params}
    expected = loss_fn(perturbed, batch) - loss_fn(params, batch)
    rise = measured(measure, cross_entropy, params, batch, name=name, steps=1)
    assert expected > 0
    assert abs(rise / expected - 1) < 1e-12


@pytest.mark.parametrize(
  ('measure', 'option', 'numbers'),
  [
    # The runs of fewer restarts are among those of more.
    ('fixed, ball', {'steps': 3}, [{'restarts': n} for n in (1, 2, 20)]),
    # The points of fewer fixed steps are among those of more.
    ('fixed, ball', {}, [{'steps': n} for n in (1, 2, 6)]),
  ],
)
def test_never_falls(measure, option, numbers):
  """More restarts and more steps never give less: the best point counts."""
  args = measure, rough, ROUGH, 5.0, 2.0, 'identity'
  values = [measured(*args, **option, **number) for number in numbers]
  assert (np.diff(values) >= 0).all()
  assert values[-1] > values[0]


def test_derivative_by_rho():
  """Of (5 + rho)^2 - 25, and zero where the run stays, not NaN."""

  def rise(rho, w):
    return worst_case(
      lambda w: w @ w,
      w,
      rho,
      normalization=normalization.identity(),
      steps=2,
    )

  derivative = quick_jit(jax.grad(rise))
  np.testing.assert_allclose(derivative(0.5, jnp.array([3.0, 4.0])), 11)
  assert derivative(0.5, jnp.zeros(2)) == 0


@pytest.mark.parametrize('measure', ['fixed, ball', 'normal'])
def test_no_radius(measure):
  """At rho = 0 the loss does not rise, to the last bit.

  Not where XLA sums up L(w) in one order and L(w + 0) in another, either.
  """
  for seed in range(6):
    params, batch = network_params(seed, hidden=4), batch_of(5)
    rise = measured(measure, cross_entropy, params, batch, 0.0, quickly=False)
    assert rise == 0


@pytest.mark.parametrize('measure', THREE)
def test_defaults(measure):
  """The T of asam, without biases; rho as a number, not traced."""
  params, batch = network_params(), batch_of(16)
  function, own = MEASURES[measure]
  rho, key = RHO.get(measure, 0.1), jax.random.key(0)
  args = {
    worst_case: (rho,),
    average_case: (rho, key),
    max_hessian_eigenvalue: (key,),
  }[function]
  loss_fn = lambda params: cross_entropy(params, batch)
  run = quick_jit(lambda params: function(loss_fn, params, *args, **own))
  value = run(params)
  asams = measured(measure, cross_entropy, params, batch, rho, 'asam')
  assert abs(value / asams - 1) < 1e-5
  other = measured(measure, cross_entropy, params, batch, rho, 'elementwise')
  assert abs(other / asams - 1) > 1e-3


def log_beyond(params, data):
  """NaN where the first weight is above ``data``."""
  w = ravel_pytree(params)[0]
  return -jnp.log(data - w[0]) + (w**2).sum()


@pytest.mark.parametrize('measure', FOUR)
def test_nan(measure):
  """NaN at w, or at a point on the way, is not hidden."""
  params = {'w': np.array([1.0, 1.0])}
  at_w, beyond, nowhere, everywhere = (
    measured(measure, log_beyond, params, data, 1.0)
    for data in (0.5, 1.1, 100.0, np.nan)
  )
  assert np.isfinite(nowhere)
  assert np.isnan(everywhere)
  if measure != 'eigenvalue':  # of log it is finite on both sides
    assert np.isnan([at_w, beyond]).all()


def test_bfloat16():
  """Of bfloat16 parameters w + eps is float32: none of eps is rounded away."""
  w = jnp.full(64, 0.5, jnp.bfloat16)
  loss_fn = lambda w: jnp.sum(jnp.asarray(w, jnp.float32) ** 2)
  key = jax.random.key(0)
  for rho in (0.01, 0.05):
    options = {'normalization': normalization.identity(), 'steps': 1}
    rise = worst_case(loss_fn, w, rho, **options)
    np.testing.assert_allclose(rise, 8 * rho + rho**2, rtol=1e-3)
    mean = [
      average_case(
        loss_fn,
        w.astype(dtype),
        rho,
        key,
        normalization=normalization.identity(),
        samples=10,
      )
      for dtype in (jnp.bfloat16, jnp.float32)
    ]
    assert error(*mean) < 1e-6
    ray = loss_along(loss_fn, w, (w, np.array([0, rho])))
    np.testing.assert_allclose(ray, [16, 16 * (1 + rho) ** 2], rtol=1e-6)
  assert not worst_case(loss_fn, w, 0.01, **options, perturbed_dtype=None)


SELECTED = ('bias_2', 'kernel_1')


def select(params):
  """A mask."""
  return {name: name in SELECTED for name in params}


@pytest.mark.parametrize(('p', 'rule'), [(2, 'fixed'), (jnp.inf, 'apgd')])
def test_perturbation(p, rule):
  """It is in the ball, gives the rise, and moves selected leaves alone."""
  params = jax.tree.map(jnp.float32, network_params())
  batch = jnp.float32(batch_of(16)[0]), batch_of(16)[1]
  loss_fn = jax.jit(lambda params: cross_entropy(params, batch))

  @quick_jit
  def run(params, rho):
    return worst_perturbation(
      loss_fn,
      params,
      rho,
      normalization=NORMALIZATIONS['elementwise'][0],
      ord=p,
      step_rule=RULES[rule],
      restarts=2,
      key=jax.random.key(0),
      mask=select,
    )

  for rho in (0.01, 0.3):
    rise, eps = run(params, rho)
    assert rise.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(eps))
    u = [
      np.asarray(eps[name] / (np.abs(params[name]) + 0.01)).ravel()
      for name in params
    ]
    assert np.linalg.norm(np.concatenate(u), p) <= rho * (1 + 1e-6)
    perturbed = jax.tree.map(jnp.add, params, eps)
    assert abs(rise - (loss_fn(perturbed) - loss_fn(params))) < 1e-6
    assert rise > 0
    assert {name: bool(e.any()) for name, e in eps.items()} == select(params)


def of_selected(selected, data):
  """The loss as a function of the selected leaves."""
  rest, batch = data
  return cross_entropy(rest | selected, batch)


@pytest.mark.parametrize('measure', ['uniform, ball', 'eigenvalue'])
def test_mask(measure):
  """It is the measure of the loss of the selected leaves alone."""
  params, batch = network_params(), batch_of(16)
  selected = {name: params[name] for name in SELECTED}
  masked = measured(measure, cross_entropy, params, batch, mask=select)
  alone = measured(measure, of_selected, selected, (params, batch))
  everything = measured(measure, cross_entropy, params, batch)
  assert abs(masked / alone - 1) < 1e-5
  assert abs(masked / everything - 1) > 1e-3


def test_mask_of_nothing():
  """The rise is zero if what is selected has no elements."""
  params = {'a': jnp.ones(2), 'b': jnp.zeros((0, 2))}
  rise = average_case(
    *(lambda p: jnp.sum(p['a'] ** 2), params, 0.1, jax.random.key(0)),
    distribution='uniform',
    mask={'a': False, 'b': True},
  )
  assert rise == 0


@pytest.mark.parametrize(
  ('measure', 'options'),
  [
    ('fixed, ball', {'steps': 1, 'restarts': 4}),
    ('uniform, ball', {}),
    ('eigenvalue', {'steps': 1}),
  ],
)
def test_keys(measure, options):
  """The same key gives the same bits, another one another value."""
  args = measure, rough, ROUGH, 5.0
  values = [measured(*args, 3.0, seed=seed, **options) for seed in (0, 0, 1)]
  assert_same_bits(values[0], values[1])
  assert values[2] != values[0]


@pytest.mark.parametrize('measure', ['apgd, box', 'eigenvalue'])
def test_batches(x64, measure):
  """The mean over batches of what each gives alone."""
  problems = [quadratic_problem(s, SPECTRA['indefinite']) for s in range(3)]
  params, first, *_ = problems[0]
  batches = [problem[1] | {'w': first['w']} for problem in problems]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  mean = measured(measure, quadratic, params, stacked, 0.5, batched=True)
  each = [measured(measure, quadratic, params, b, 0.5) for b in batches]
  assert np.std(each) > 1e-3
  assert abs(mean / np.mean(each) - 1) < 1e-9


def test_points_of_batches():
  """Each batch has its own: 2000 equal ones tell as much as 2000 keys."""
  params, data, *_ = quadratic_problem(0, SPECTRA['positive'])
  args = 'uniform, ball', quadratic, params
  singles = [measured(*args, data, seed=seed) for seed in range(30)]
  batches = jax.tree.map(lambda x: np.stack([x] * 2000), data)
  means = [measured(*args, batches, seed=s, batched=True) for s in range(2)]
  deviation = np.std(singles)
  assert abs(means[0] - np.mean(singles)) < 5 * deviation / np.sqrt(30)
  assert 0 < abs(means[0] - means[1]) < 10 * deviation / np.sqrt(2000)


@pytest.mark.parametrize(
  ('measure', 'options', 'n'),
  [
    ('fixed, ball', {'steps': 1, 'restarts': 2}, 1),
    ('eigenvalue', {'steps': 3}, 2),
  ],
)
def test_unroll(measure, options, n):
  """The same value without a loop over steps, restarts or batches."""
  function, own = MEASURES[measure]
  params, data, *_ = quadratic_problem(0, SPECTRA['indefinite'])
  batches = jax.tree.map(lambda x: np.stack([x, 2 * x][:n]), data)
  key = jax.random.key(0, impl='unsafe_rbg')  # Others draw in a loop on CPU.
  args = params, batches, operator_at('identity', params), 0.5, key
  options = own | options | {'batched': True}
  rolled, unrolled = (
    compiled(function, quadratic, **options, **unroll).lower(*args)
    for unroll in ({}, {'unroll': True})
  )
  assert 'stablehlo.while' in rolled.as_text()
  assert 'stablehlo.while' not in unrolled.as_text()
  values = [program.compile()(*args) for program in (rolled, unrolled)]
  assert abs(values[0] / values[1] - 1) < 1e-6


@needs_pcast
def test_shard_map():
  """Each device measures its own loss at the parameters that all share."""
  params, data, *_ = quadratic_problem(0, SPECTRA['indefinite'])
  losses = jax.tree.map(lambda x: np.stack([x, 2 * x]), data)
  mesh = Mesh(np.array(jax.devices()[:2]), ('devices',))
  split = PartitionSpec('devices')
  names = *FOUR, 'apgd, ball', 'uniform, box'

  def measure(params, data):
    data = jax.tree.map(lambda x: x[0], data)
    return [
      (
        function(lambda p: quadratic(p, data), params, key, steps=3)
        if function is max_hessian_eigenvalue
        else function(
          lambda p: quadratic(p, data), params, 0.5, key=key, **options
        )
      )[None]
      for function, options in map(MEASURES.get, names)
    ]

  key = jax.random.key(0)
  together = quick_jit(
    shard_map(
      measure, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split
    )
  )(params, losses)
  alone = quick_jit(measure)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], losses)
    expected = alone(params, one)
    got = [value[i : i + 1] for value in together]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_wrong_key_with_batches():
  """It is named before JAX derives the keys of the batches from it."""
  key = jnp.ones(2)
  with pytest.raises(TypeError, match='key must be a random key'):
    worst_case(rough, ROUGH, 0.1, key=key, batches=jnp.ones(3))


def test_loss_along(x64):
  """A curve and a surface of a quadratic loss, and the mean over batches."""
  w, d1, d2 = np.random.default_rng(0).standard_normal((3, SIZE))
  t1, t2 = np.linspace(-2, 2, 5), np.arange(3)
  batches = [quadratic_problem(s, SPECTRA['indefinite'])[1] for s in range(2)]

  def by_hand(data, x, y):
    d = w + x * d1 + y * d2 - data['w']
    return data['linear'] @ d + d @ data['hessian'] @ d / 2

  def tree(vector):
    return {'bias': vector[:2], 'kernel': vector[2:].reshape(2, 1, 2)}

  @jax.jit
  def run(data, *axes, **batches):
    loss_fn = lambda params, batch=data: quadratic(params, batch)
    return loss_along(loss_fn, tree(w), *axes, **batches)

  surfaces = [
    np.array([[by_hand(data, x, y) for y in t2] for x in t1])
    for data in batches
  ]
  axes = (tree(d1), t1), (tree(d2), t2)
  assert error(run(batches[0], *axes), surfaces[0]) < 1e-12
  assert error(run(batches[0], axes[0]), surfaces[0][:, 0]) < 1e-12
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  mean = run(None, *axes, batches=stacked)
  assert error(mean, np.mean(surfaces, 0)) < 1e-12


def test_page():
  """The code of docs/sharpness.md runs on a convex loss."""
  code = '\n'.join(pages.blocks(pages.read_page('sharpness')))
  namespace = pages.run_snippet(
    code, loss_fn=lambda params, batch: (batch @ params['kernel']).var()
  )
  key = jax.random.key(0)
  args = {'kernel': jnp.ones((2, 3))}, jax.random.normal(key, (2, 4, 2)), key
  measures = namespace['measure'](*args)
  assert set(measures) == {'worst case', 'average case', 'eigenvalue'}
  assert measures['worst case'] > abs(measures['average case']) > 0
  assert measures['eigenvalue'] > 0
  curve, surface = namespace['curve_and_surface'](*args)
  assert curve.shape == (21,)
  assert surface.shape == (21, 21)
  np.testing.assert_allclose(surface[:, 10], curve, rtol=1e-5)
  assert curve.max() > curve[10]
