"""m-sharpness: each group of m examples of a batch has its own perturbation.

Each function maps ``value_and_grad(params, model_state, batch)``, which returns
``((loss, model_state), grads)`` of a batch, to one that returns their mean over
groups. The groups are the same for all: the j-th of n has the examples j, j +
n, j + 2 n, ..., as in ``optax.microbatching``. They differ in memory and time:
all groups at once, one after the other, or one on each device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from experiments import data

ValueAndGrad = Callable[..., Any]

AXIS = 'groups'


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


def by_shard_map(value_and_grad: ValueAndGrad, m: int) -> ValueAndGrad:
  """A group on each device, and one mean over the devices."""

  def on_each_device(params, model_state, batch):
    # The gradient with respect to replicated parameters would be a sum.
    params = jax.lax.pcast(params, AXIS, to='varying')
    group = jax.tree.map(lambda x: x[:, 0], batch)
    return jax.lax.pmean(value_and_grad(params, model_state, group), AXIS)

  whole, split = PartitionSpec(), PartitionSpec(None, AXIS)
  mapped = jax.shard_map(
    on_each_device,
    mesh=_mesh(),
    in_specs=(whole, whole, split),
    out_specs=whole,
  )
  return lambda params, model_state, batch: mapped(
    params, model_state, _split(batch, m)
  )


WAYS = {
  'vmap': by_vmap,
  'microbatching': by_microbatching,
  'shard_map': by_shard_map,
}


def missing(way: str) -> str:
  """What is needed but not in the installed version; empty if nothing."""
  if way == 'microbatching' and not hasattr(optax, 'microbatching'):
    return 'optax.microbatching'
  if way == 'shard_map' and not hasattr(jax.lax, 'pcast'):
    return 'jax.lax.pcast'
  return ''


def placement(way: str) -> NamedSharding | None:
  """The sharding of parameters and examples; None for the default device."""
  return NamedSharding(_mesh(), PartitionSpec()) if way == 'shard_map' else None


def _mesh() -> jax.sharding.Mesh:
  return jax.make_mesh(
    (jax.device_count(),),
    (AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def _split(batch: data.Split, m: int) -> data.Split:
  """A batch whose axis of examples is split into two: m, and groups."""
  return jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), batch)
