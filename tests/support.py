"""What several test files use."""

from typing import Any

import jax
import numpy as np

PyTree = Any


def error(tree: PyTree, expected: PyTree) -> float:
  """The error of a tree: the largest max|a - b| / max|b| of its leaves.

  Absolute where b is zero. Structures, shapes and dtypes must agree, and an
  error that is not a number is infinite.
  """
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  errors = [0.0]
  for a, b in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if a.size:
      a, b = a.astype(np.float64), b.astype(np.float64)
      scale = np.abs(b).max()
      errors.append(np.abs(a - b).max() / (scale if scale else 1.0))
  return float(np.nan_to_num(np.max(errors), nan=np.inf))


def assert_same_bits(tree: PyTree, expected: PyTree) -> None:
  """Fails unless both trees hold the same bits, -0.0 and NaN included."""
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes(), f'{a} is not {b}'
