"""What several test files use."""

import io
import os
import pathlib
import tarfile
from typing import Any

import jax
import numpy as np
import optax
import pytest

PyTree = Any

# Before, another partitioner decided how work is divided that nobody laid out.
SHARDY = jax.__version_info__ >= (0, 7)

needs_pcast = pytest.mark.skipif(
  not hasattr(jax.lax, 'pcast'), reason='JAX has no jax.lax.pcast yet'
)
needs_microbatching = pytest.mark.skipif(
  not hasattr(optax, 'microbatching'), reason='it came with Optax 0.2.7'
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


def program_env(cache: pathlib.Path) -> dict[str, str]:
  """The environment of a program on one device that shall start fast.

  Nothing is compiled again, Python or XLA, that ``cache`` holds, and XLA leaves
  out what makes programs faster: they run for less time than they compile.
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
  """``jax.shard_map``, also where JAX keeps it in its experimental part."""
  if hasattr(jax, 'shard_map'):
    return jax.shard_map(function, check_vma=check_vma, **kwargs)
  from jax.experimental.shard_map import shard_map

  return shard_map(function, check_rep=check_vma, **kwargs)


def tar_gz(files: dict[str, bytes]) -> bytes:
  """An archive, with a file in it that is not needed, like the published."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w:gz') as archive:
    for name, content in {'folder/readme.html': b'', **files}.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return stream.getvalue()


# At learning rates that lead to the targets of test_convergence.py.
BASES = {
  'sgd': lambda: optax.sgd(1e-3),
  'momentum': lambda: optax.sgd(1e-3, momentum=0.9),
  'adam': lambda: optax.adam(1e-2),
  'adamw': lambda: optax.adamw(1e-2),
  'lamb': lambda: optax.lamb(1e-3),
  'lion': lambda: optax.lion(3e-3),
  'rmsprop': lambda: optax.rmsprop(5e-3),
  'adafactor': lambda: optax.adafactor(5e-3, min_dim_size_to_factor=2),
  'adabelief': lambda: optax.adabelief(1e-2),
  'sm3': lambda: optax.sm3(1.0),
  'muon': lambda: optax.contrib.muon(1e-2),
  'schedule_free': lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
  'lbfgs': optax.lbfgs,
  'backtracking': lambda: optax.chain(
    optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)
  ),
}
LINE_SEARCHES = ('lbfgs', 'backtracking')


def update_on(loss_fn, base, tx, state, params, **extra_args):
  """One update of ``tx``, given what ``base``, which is inside, asks for."""
  value, grads = jax.value_and_grad(loss_fn)(params)
  if base in LINE_SEARCHES:
    extra_args |= {'value': value, 'grad': grads, 'value_fn': loss_fn}
  else:
    extra_args |= {'grad_fn': jax.grad(loss_fn)}
  tx = optax.with_extra_args_support(tx)
  return tx.update(grads, state, params, **extra_args)
