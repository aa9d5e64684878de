"""Hypothesis strategies: random trees and gradients at them."""

import functools
import operator
from typing import Any
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import cases

PyTree = Any

# Few, since each operation is compiled for each: a scalar, an empty leaf and a
# kernel, whose filters are the entries of its last axis.
SHAPES = ((), (0,), (2, 1, 3))
# Each dtype, and the largest power of two by which its values are scaled; in
# float16 there is room for a norm and another factor of 2^4.
DTYPES = {jnp.float16: 5, jnp.bfloat16: 20, jnp.float32: 20, jnp.float64: 200}
# The smallest and the largest one where values come from all of the dtype,
# denormals included.
WILD = {
  jnp.float16: (-24, 8),
  jnp.bfloat16: (-133, 120),
  jnp.float32: (-149, 120),
  jnp.float64: (-1074, 1000),
}
ORDS = [*cases.ORDS, 10]
# Each as the library has it, and as the reference has it.
NORMALIZATIONS = {
  f'{name}, eta={eta}': cases.make_normalization(name, eta)
  for name in cases.OPERATORS
  for eta in (0.0, 0.01)
}


class Example(NamedTuple):
  """What a perturbation depends on. Leaves are NumPy arrays."""

  params: PyTree
  grads: PyTree
  rho: float
  ord: float
  normalization: str


def has_float64(tree):
  """Whether a leaf is in float64."""
  return any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(tree))


# Strategies are costly to make, so they are kept.
@functools.cache
def specs(dtypes):
  """Random trees of shapes and dtypes, of four leaves at most."""
  names = st.sampled_from(['kernel', 'bias', 'dense'])
  return st.recursive(
    st.builds(
      jax.ShapeDtypeStruct, st.sampled_from(SHAPES), st.sampled_from(dtypes)
    ),
    lambda children: st.one_of(
      st.lists(children, min_size=1, max_size=3),
      st.dictionaries(names, children, min_size=1, max_size=3),
      st.tuples(children, st.none(), children),
    ),
    max_leaves=4,
  )


@functools.cache
def integers(shape, low, high):
  """Arrays of integers, which are drawn several times as fast as floats."""
  return hnp.arrays(
    int, shape, elements=st.integers(low, high), fill=st.nothing()
  )


@st.composite
def batches(
  draw,
  size,
  *,
  reach=1000,
  wild=False,
  smallest=0,
  normalizations=tuple(NORMALIZATIONS),
  compiled=None,
):
  """Lists of ``size`` examples that differ in their numbers alone.

  Args:
    draw: given by Hypothesis.
    size: how many.
    reach: the largest power of two of a scale, where ``DTYPES`` has more.
    wild: whether values come from all of their dtype.
    smallest: the smallest magnitude before scaling, in sixteenths.
    normalizations: the names of the normalizations.
    compiled: for what must be compiled, a list from which all but the numbers
      is drawn: triples of a tree of shapes and dtypes, p and a normalization.
  """
  if compiled is None:
    # Trees of one dtype, and of all.
    dtypes = draw(st.sampled_from([(d,) for d in DTYPES] + [tuple(DTYPES)]))
    spec = draw(specs(dtypes))
    # With p = 1.05, and so q = 21, |T g|^q leaves float32.
    p = draw(st.sampled_from([*ORDS, 1.05] if has_float64(spec) else ORDS))
    name = draw(st.sampled_from(normalizations))
  else:
    spec, p, name = draw(st.sampled_from(compiled))
  exponents = {
    jnp.dtype(dtype): WILD[dtype] if wild else (-min(k, reach), min(k, reach))
    for dtype, k in DTYPES.items()
  }

  def values(leaf):
    scale = draw(st.floats(1, 2)) * 2.0 ** draw(
      st.integers(*exponents[leaf.dtype])
    )
    sixteenths = draw(integers(leaf.shape, -256, 256))
    sixteenths = sixteenths + np.where(sixteenths < 0, -smallest, smallest)
    return np.asarray(sixteenths / 16 * scale).astype(leaf.dtype)

  def tree():
    return jax.tree.map(values, spec)

  return [
    Example(tree(), tree(), draw(st.floats(1e-3, 1)), p, name)
    for _ in range(size)
  ]


def examples(**kwargs):
  """One example, with the arguments of ``batches``."""
  return batches(1, **kwargs).map(operator.itemgetter(0))
