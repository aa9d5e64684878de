"""m-sharpness: each group of m examples of a batch has its own perturbation.

Each function maps ``value_and_grad(params, model_state, batch)``, which returns
``((loss, model_state), grads)`` of a batch, to one that returns their mean over
groups. The groups are the same for all: the j-th of n has the examples j, j +
n, j + 2 n, ..., as in ``optax.microbatching``. They differ in memory and time:
all groups at once, or one after the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments import data

ValueAndGrad = Callable[..., Any]


def by_vmap(value_and_grad: ValueAndGrad, m: int) -> ValueAndGrad:
  """All groups at once, in the memory of the whole batch.

  The perturbed parameters differ between groups, so that convolutions become
  grouped ones, which are slow on CPU.
  """

  def averaged(params, model_state, batch):
    results = jax.vmap(value_and_grad, in_axes=(None, None, 1))(
      params, model_state, _split(batch, m)
    )
    return jax.tree.map(lambda x: x.mean(0), results)

  return averaged


def by_microbatching(value_and_grad: ValueAndGrad, m: int) -> ValueAndGrad:
  """One group after the other, in the memory of one.

  This is a loop, in which convolutions are slow on CPU.
  """
  return optax.microbatching.microbatch(
    value_and_grad,
    argnums=2,
    microbatch_size=m,
    accumulator=optax.microbatching.AccumulationType.MEAN,
  )


WAYS = {'vmap': by_vmap, 'microbatching': by_microbatching}


def _split(batch: data.Split, m: int) -> data.Split:
  """A batch whose axis of examples is split into two: m, and groups."""
  return jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), batch)
