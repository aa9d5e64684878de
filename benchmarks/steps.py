"""The train steps that are compared: one gradient, two gradients, SAM, ASAM."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from benchmarks import compiled
from benchmarks import large_models
import optax_asam

LossFn = Callable[[optax.Params, Any], jax.Array]
Step = Callable[
  [optax.Params, optax.OptState, Any], tuple[optax.Params, optax.OptState]
]


NAMES = ('base', 'two gradients', 'sam', 'asam')


class Steps(NamedTuple):
  """Train steps that take the same arguments.

  Attributes:
    init: From parameters to the state of the optimizer, one for all steps.
    steps: From (parameters, state, batch) to (parameters, state).
  """

  init: Callable[[optax.Params], optax.OptState]
  steps: dict[str, Step]


def make_steps(
  loss_fn: LossFn,
  base_tx: optax.GradientTransformation,
  *,
  rho: float = 0.5,
  sam_rho: float = 0.05,
  eta: float = 0.01,
  ord: float = 2,
) -> Steps:
  """Makes the four train steps, by name.

  All have the state of SAM and ASAM, which is passed through by the others, so
  that the programs differ only in what they compute.

  Args:
    loss_fn: From parameters and a batch to a scalar.
    base_tx: The optimizer.
    rho: The radius of ASAM.
    sam_rho: The radius of SAM.
    eta: The constant of ASAM's normalization.
    ord: The exponent p of both balls.
  """
  txs = {
    'sam': optax_asam.sam(base_tx, sam_rho, ord=ord),
    'asam': optax_asam.asam(base_tx, rho, eta, ord=ord),
  }
  steps = {
    'base': _plain_step(loss_fn, base_tx, gradients=1),
    'two gradients': _plain_step(loss_fn, base_tx, gradients=2),
    **{name: sharp_step(loss_fn, tx) for name, tx in txs.items()},
  }
  return Steps(txs['asam'].init, steps)


def compile_step(
  step: Step,
  init: Callable[[optax.Params], optax.OptState],
  network: large_models.Network,
  mesh: Mesh,
  *,
  batch: PartitionSpec,
) -> jax.stages.Compiled:
  """Compiles a step with donated parameters and state, as in training.

  Args:
    step: The step.
    init: Makes its state, which is sharded like the parameters.
    network: The network; none of its arrays is allocated.
    mesh: The devices, which need not exist.
    batch: How the batch is sharded.
  """

  def shaped(leaf, spec):
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )

  params = jax.tree.map(shaped, network.params, network.specs)
  opt_state = optax.tree.map_params(
    init,
    shaped,
    jax.eval_shape(init, params),
    network.specs,
    transform_non_params=lambda leaf: shaped(leaf, PartitionSpec()),
  )
  examples = jax.tree.map(lambda leaf: shaped(leaf, batch), network.batch)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
  jitted = jax.jit(step, out_shardings=shardings, donate_argnums=(0, 1))
  return jitted.lower(params, opt_state, examples).compile()


def objections(
  added: Sequence[compiled.Collective],
  added_temporary_bytes: int,
  network: large_models.Network,
  *,
  by_axis: bool = False,
) -> list[str]:
  """What a step should not have in addition to two plain gradients.

  Allowed are scalar all-reduces, one for each order of mesh axes by which
  parameters are sharded, of four bytes for each parameter array, and the memory
  of the perturbed parameters and their gradient.

  Args:
    added: What ``compiled.added`` found.
    added_temporary_bytes: The difference in peak temporary memory.
    network: The network.
    by_axis: Whether the compiler sums over one mesh axis after the other, as
      that for CPU does: then four bytes for each axis are allowed, in as many
      all-reduces.
  """
  orders = [
    tuple(axis for axis in spec if axis)
    for spec in jax.tree.leaves(network.specs)
    if any(spec)
  ]
  scalars = sum(map(len, orders)) if by_axis else len(orders)
  allowed = scalars if by_axis else len(set(orders))
  found = [
    f'{collective} is not an all-reduce'
    for collective in added
    if collective.kind != 'all-reduce'
  ]
  count = sum(collective.count for collective in added)
  size = sum(collective.bytes for collective in added)
  if count > allowed or size > 4 * scalars:
    found.append(
      f'{count} collectives of {size} bytes, not {allowed} of {4 * scalars}'
    )
  limit = 2 * bytes_per_device(network) + 2**20
  if added_temporary_bytes > limit:
    found.append(f'{added_temporary_bytes} bytes of memory, not {limit}')
  return found


def bytes_per_device(network: large_models.Network) -> int:
  """The size of the float32 parameters on one device."""
  return sum(
    4
    * math.prod(leaf.shape)
    // math.prod(network.mesh_axes[axis] for axis in spec if axis)
    for leaf, spec in zip(
      jax.tree.leaves(network.params),
      jax.tree.leaves(network.specs),
      strict=True,
    )
  )


def sharp_step(
  loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs
) -> Step:
  """The train step of a transformation that takes a second gradient."""

  def step(params, opt_state, batch):
    grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    updates, opt_state = tx.update(
      grad_fn(params), opt_state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), opt_state

  return step


def _plain_step(
  loss_fn: LossFn, base_tx: optax.GradientTransformation, gradients: int
) -> Step:
  """A step with several gradients, each at w + 0.01 times the last."""

  def step(params, opt_state, batch):
    grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    sharpness_aware_state, base_state = opt_state
    grads = grad_fn(params)
    for _ in range(gradients - 1):
      grads = grad_fn(
        jax.tree.map(lambda w, g: w + 0.01 * g.astype(w.dtype), params, grads)
      )
    updates, base_state = base_tx.update(grads, base_state, params)
    params = optax.apply_updates(params, updates)
    return params, (sharpness_aware_state, base_state)

  return step
