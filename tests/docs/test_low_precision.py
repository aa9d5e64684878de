"""Promise: the docs say how much of a perturbation low precision preserves.

The table in ``docs/low_precision.md`` is computed here, cell by cell.
"""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_asam import asam
from tests.helpers import pages
from tests.helpers.support import perturbed_point

PAGE = pages.read_page('low_precision')
SIZES = (10**4, 10**6, pytest.param(10**8, marks=pytest.mark.slow))
LEAF = 10**7  # Larger trees have several leaves.
RHO, ETA = 0.5, 0.01


def table(size):
  """Pairs of a row's dtypes and its numbers for trees of ``size`` weights."""
  dtype = {'-': None, 'bfloat16': jnp.bfloat16, 'float32': jnp.float32}
  column = 3 + (10**4, 10**6, 10**8).index(size)
  for row in pages.read_rows(pages.marked(PAGE, 'table')):
    dtypes = [dtype[cell.strip('`')] for cell in row[:3]]
    yield dtypes, [float(number) for number in row[column].split(' / ')]


def repeated(rng, scale, period, size):
  """Normal numbers, of which ``period`` are drawn and the rest repeat them."""
  values = rng.normal(0, scale, min(period, size)).astype(np.float32)
  leaves = np.split(np.resize(values, size), range(LEAF, size, LEAF))
  return [jnp.asarray(leaf) for leaf in leaves]


def chunks(leaves):
  """The elements of all leaves in float64, a million at a time."""
  for leaf in map(np.asarray, leaves):
    for start in range(0, leaf.size, 10**6):
      yield np.float64(leaf[start : start + 10**6])


def exact_perturbation(params, grads):
  """The perturbation rho T^2 g / ||T g||_2 in float64, in chunks."""

  def pairs():
    for w, g in zip(chunks(params), chunks(grads), strict=True):
      yield np.abs(w) + ETA, g

  norm = np.sqrt(sum(((t * g) ** 2).sum() for t, g in pairs()))
  return (RHO * t * t * g / norm for t, g in pairs())


def realized_perturbation(params, grads, perturbed_dtype, compute_dtype):
  """What the loss sees at w + eps, minus what it sees at w, in chunks."""
  tx = asam(optax.sgd(0.1), rho=RHO, eta=ETA, perturbed_dtype=perturbed_dtype)
  after, _ = perturbed_point(tx, params, grads)
  after = optax.tree.cast(after, compute_dtype)
  before = optax.tree.cast(params, compute_dtype)
  return (a - b for a, b in zip(chunks(after), chunks(before), strict=True))


@pytest.mark.parametrize('size', SIZES)
def test_table(size):
  """Cosine, norm ratio and component along the exact perturbation."""
  rng = np.random.default_rng(0)
  w = repeated(rng, 0.1, 10**6, size)
  g = repeated(rng, 1e-3, 999_983, size)
  rows = list(table(size))
  assert len(rows) == 5
  for (dtype, perturbed_dtype, compute_dtype), numbers in rows:
    params, grads = optax.tree.cast((w, g), dtype)
    dot = realized = exact = 0.0
    for eps, want in zip(
      realized_perturbation(params, grads, perturbed_dtype, compute_dtype),
      exact_perturbation(params, grads),
      strict=True,
    ):
      dot += eps @ want
      realized += eps @ eps
      exact += want @ want
    cosine, norm = dot / np.sqrt(realized * exact), np.sqrt(realized / exact)
    measured = [cosine, norm, dot / exact]
    np.testing.assert_allclose(measured, numbers, atol=0.0051)
    if perturbed_dtype == compute_dtype == jnp.float32:
      assert cosine >= 0.999
      assert abs(norm - 1) <= 0.01


def test_second_pass_of_the_page():
  """The page's loss computes in float32 at the perturbed parameters only."""
  (snippet,) = pages.blocks(PAGE)
  program = {'jnp': jnp, 'optax': optax, 'asam': asam}
  exec(textwrap.dedent(snippet), program)
  params = {
    'kernel': jnp.ones((4, 3), jnp.bfloat16),
    'bias': jnp.zeros(3, jnp.bfloat16),
  }
  batch = {'image': jnp.ones((2, 4)), 'label': jnp.array([0, 2])}
  dtypes = []

  def value_fn(params):
    value = program['loss_fn'](params, batch)
    dtypes.append(value.dtype)
    return value

  def update(params):
    tx = program['tx']
    grads = jax.grad(value_fn)(params)
    return tx.update(grads, tx.init(params), params, value_fn=value_fn)

  jax.eval_shape(update, params)
  assert dtypes == [jnp.bfloat16, jnp.float32]
