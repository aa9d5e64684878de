"""Comparisons, skips and errors that several test files share."""

import io
import os
import pathlib
import tarfile
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.helpers import reference

PyTree = Any

# Earlier versions use another partitioner for what has no explicit sharding.
SHARDY = jax.__version_info__ >= (0, 7)

needs_pcast = pytest.mark.skipif(
  not hasattr(jax.lax, 'pcast'), reason='JAX has no jax.lax.pcast yet'
)
needs_microbatching = pytest.mark.skipif(
  not hasattr(optax, 'microbatching'), reason='needs Optax 0.2.7'
)


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


def run(
  tx: optax.GradientTransformationExtraArgs,
  params: PyTree,
  steps: int,
  interface: str = 'grad_fn',
) -> tuple[PyTree, PyTree]:
  """Updates of ``tx`` on ``reference.polynomial`` in one compiled loop.

  Returns:
    A pair of the last parameters and state, and the states stacked.
  """
  polynomial = reference.polynomial
  extra_args = {
    interface: jax.grad(polynomial) if interface == 'grad_fn' else polynomial
  }

  def step(carry, _):
    params, state = carry
    grads = jax.grad(polynomial)(params)
    updates, state = tx.update(grads, state, params, **extra_args)
    return (optax.apply_updates(params, updates), state), state

  carry = params, tx.init(params)
  return jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)


def perturbed_point(
  tx: optax.GradientTransformationExtraArgs, params: PyTree, grads: PyTree
) -> tuple[PyTree, PyTree]:
  """Where ``tx`` takes its second gradient, and its updates.

  That gradient is the point itself.
  """

  @jax.jit
  def step(params, grads):
    seen = []
    grad_fn = lambda p: seen.append(p) or p
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    return seen[0], updates

  return step(params, grads)


def program_env(cache: pathlib.Path) -> dict[str, str]:
  """The environment of a program on one device that starts fast.

  ``cache`` holds what Python and XLA compiled before, and XLA skips
  optimizations: these programs compile for longer than they run.
  """
  left_out = ('XLA_FLAGS', 'PYTHONDONTWRITEBYTECODE')
  return {
    **{name: os.environ[name] for name in os.environ if name not in left_out},
    'PYTHONPYCACHEPREFIX': str(cache / 'python'),
    'PYTHONIOENCODING': 'utf-8',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(cache / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def shard_map(function, *, check_vma=True, **kwargs):
  """``jax.shard_map``, or the experimental one of an older JAX."""
  if hasattr(jax, 'shard_map'):
    return jax.shard_map(function, check_vma=check_vma, **kwargs)
  from jax.experimental.shard_map import shard_map

  return shard_map(function, check_rep=check_vma, **kwargs)


def tar_gz(files: dict[str, bytes]) -> bytes:
  """An archive with one more file, as the published ones have."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w:gz') as archive:
    for name, content in {'folder/readme.html': b'', **files}.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return stream.getvalue()
