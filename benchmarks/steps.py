"""The train steps that are compared: every way to descend, and its peers."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from benchmarks import compiled
from benchmarks import large_models
from benchmarks import models
from benchmarks.workloads import ETA
from benchmarks.workloads import RHO
from benchmarks.workloads import SAM_RHO
import optax_asam
from optax_asam import normalization
import optax_asam.nnx

PyTree = Any
# From parameters, the model's other state and a batch to a scalar and the new
# state.
LossFn = Callable[[optax.Params, PyTree, Any], tuple[jax.Array, PyTree]]


class Carry(NamedTuple):
  """What a train step maps to its successor.

  Attributes:
    params: The parameters.
    opt_state: The state of the optimizer.
    model_state: What else the model keeps, such as running statistics.
  """

  params: optax.Params
  opt_state: optax.OptState
  model_state: PyTree


Step = Callable[[Carry, Any], Carry]


class Method(NamedTuple):
  """A way to train.

  Attributes:
    model: What is trained: its ``params`` and ``model_state`` are shapes.
    init: From parameters to the state of the optimizer.
    cycle: The steps that are repeated in turn; most often one.
  """

  model: models.Model | models.Twin
  init: Callable[[optax.Params], optax.OptState]
  cycle: Sequence[Step]

  @property
  def carry(self) -> Carry:
    """The shapes of what a step takes."""
    opt_state = jax.eval_shape(self.init, self.model.params)
    return Carry(self.model.params, opt_state, self.model.model_state)

  @property
  def programs(self) -> list[Step]:
    """The different steps of the cycle."""
    return list(dict.fromkeys(self.cycle))


def plain_step(
  loss_fn: LossFn, base_tx: optax.GradientTransformation, gradients: int = 1
) -> Step:
  """A step with several gradients, each at w + 0.01 times the last."""

  def step(carry, batch):
    grads, model_state = _clean_pass(loss_fn, carry, batch)
    for _ in range(gradients - 1):
      params = jax.tree.map(
        lambda w, g: w + 0.01 * g.astype(w.dtype), carry.params, grads
      )
      grads = _grad_fn(loss_fn, carry.model_state, batch)(params)
    return _descend(base_tx, carry, grads, model_state)

  return step


def sharp_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformationExtraArgs,
  *,
  ascent_batch: Callable[[Any], Any] = lambda batch: batch,
) -> Step:
  """The train step of a transformation that takes a second gradient.

  Args:
    loss_fn: The loss.
    tx: The transformation.
    ascent_batch: From a batch to the part of it for the first gradient.
  """

  def step(carry, batch):
    grads, model_state = _clean_pass(loss_fn, carry, ascent_batch(batch))
    grad_fn = _grad_fn(loss_fn, carry.model_state, batch)
    updates, opt_state = tx.update(
      grads, carry.opt_state, carry.params, grad_fn=grad_fn
    )
    params = optax.apply_updates(carry.params, updates)
    return Carry(params, opt_state, model_state)

  return step


def sharp(
  model: models.Model,
  tx: optax.GradientTransformationExtraArgs,
  *,
  period: int = 1,
  **kwargs: Any,
) -> Method:
  """A transformation that takes a second gradient, as a way to train.

  Args:
    model: What is trained.
    tx: The transformation.
    period: The number of steps after which its costs repeat.
    kwargs: For :func:`sharp_step`.
  """
  step = sharp_step(model.loss_fn, tx, **kwargs)
  return Method(model, tx.init, [step] * period)


def estimator(
  model: models.Model,
  base_tx: optax.GradientTransformation,
  value_and_grad_fn: Callable[..., Any],
) -> Method:
  """A replacement of ``jax.value_and_grad``, as a way to train."""

  def step(carry, batch):
    (_, model_state), grads = value_and_grad_fn(
      carry.params, carry.model_state, batch
    )
    return _descend(base_tx, carry, grads, model_state)

  return Method(model, base_tx.init, [step])


def inlined_asam(
  params: optax.Params,
  grads: optax.Updates,
  *,
  normalized: Callable[[optax.Params], Any] = normalization.not_bias,
  selected: Callable[[optax.Params], Any] | None = None,
) -> optax.Params:
  """The perturbed parameters of ASAM for p = 2, as one would inline them.

  There is no guard against gradients that are zero or not finite.

  Args:
    params: The parameters.
    grads: The gradient at them.
    normalized: Which leaves have T = abs(w) + eta.
    selected: Which leaves are perturbed; all by default.
  """
  leaves = jax.tree.leaves
  mask = selected(params) if selected else jax.tree.map(lambda w: True, params)
  ws, treedef = jax.tree.flatten(params)
  ts = [
    jnp.abs(w) + ETA if is_normalized else 1
    for w, is_normalized in zip(ws, leaves(normalized(params)), strict=True)
  ]
  scaled = [t * g for t, g in zip(ts, leaves(grads), strict=True)]
  chosen = [x for x, used in zip(scaled, leaves(mask), strict=True) if used]
  factor = RHO / jnp.sqrt(sum(jnp.sum(x * x) for x in chosen))
  return treedef.unflatten(
    w + factor * (t * x) if used else w
    for w, t, x, used in zip(ws, ts, scaled, leaves(mask), strict=True)
  )


def by_hand(
  perturb: Callable[[optax.Params, optax.Updates], optax.Params],
  base_tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """A transformation with the gradient at what a function perturbs to."""

  def update_fn(updates, state, params: Any = None, *, grad_fn: Any = None):
    perturbed_params = perturb(params, updates)
    return base_tx.update(grad_fn(perturbed_params), state, params)

  return optax.GradientTransformationExtraArgs(base_tx.init, update_fn)


def inside(step: Step) -> Step:
  """A step of the base optimizer on the state of SAM or ASAM around it."""

  def step_inside(carry, batch):
    outer_state, base_state = carry.opt_state
    carry = step(carry._replace(opt_state=base_state), batch)
    return carry._replace(opt_state=(outer_state, carry.opt_state))

  return step_inside


def _clean_pass(loss_fn, carry, batch):
  """The gradient at the parameters, and the state that the pass leaves."""
  (_, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    carry.params, carry.model_state, batch
  )
  return grads, model_state


def _grad_fn(loss_fn, model_state, batch):
  """From parameters to a gradient."""
  grad_fn = jax.grad(loss_fn, has_aux=True)
  return lambda params: grad_fn(params, model_state, batch)[0]


def _base(model, base_tx, gradients=1):
  step = plain_step(model.loss_fn, base_tx, gradients)
  return Method(model, base_tx.init, [step])


def _contrib_sam(model, base_tx):
  """Optax's own SAM, in the mode that takes both gradients in one update."""
  adv_tx = optax.chain(optax.contrib.normalize(), optax.sgd(SAM_RHO))
  tx = optax.contrib.sam(base_tx, adv_tx, opaque_mode=True)

  def update_fn(updates, state, params=None, *, grad_fn: Any = None):
    # It passes the number of the ascent step, too.
    grad_fn_of_step = lambda params, i: grad_fn(params)
    return tx.update(updates, state, params, grad_fn=grad_fn_of_step)

  return sharp(model, optax.GradientTransformationExtraArgs(tx.init, update_fn))


def _value_and_grad(model, base_tx):
  return estimator(
    model,
    base_tx,
    optax_asam.value_and_grad(model.loss_fn, has_aux=True, rho=RHO, eta=ETA),
  )


def _nnx_value_and_grad(model, base_tx):
  twin = model.twin()
  value_and_grad_fn = optax_asam.nnx.value_and_grad(
    twin.loss_fn, rho=RHO, eta=ETA
  )

  def step(carry, batch):
    module = nnx.merge(twin.graphdef, carry.params, carry.model_state)
    _, grads = value_and_grad_fn(module, batch)
    _, _, model_state = nnx.split(module, nnx.Param, ...)
    return _descend(base_tx, carry, grads, model_state)

  return Method(twin, base_tx.init, [step])


def _momentum_asam(model, base_tx):
  tx = optax_asam.momentum_asam(base_tx, RHO, ETA)
  return Method(model, tx.init, [plain_step(model.loss_fn, tx)])


def _every_5(model, base_tx):
  """Two jitted steps, chosen in Python: every fifth is ASAM's."""
  tx = optax_asam.asam(base_tx, RHO, ETA)
  skipped = inside(plain_step(model.loss_fn, base_tx))
  cycle = [sharp_step(model.loss_fn, tx), *[skipped] * 4]
  return Method(model, tx.init, cycle)


def _quarter(batch):
  """The first quarter of the examples."""
  return jax.tree.map(lambda x: x[: max(1, len(x) // 4)], batch)


def _descend(base_tx, carry, grads, model_state):
  """The update with a gradient."""
  updates, opt_state = base_tx.update(grads, carry.opt_state, carry.params)
  params = optax.apply_updates(carry.params, updates)
  return Carry(params, opt_state, model_state)


# From a model and an optimizer to a way to train.
MakeMethod = Callable[[models.Model, optax.GradientTransformation], Method]
METHODS: dict[str, MakeMethod] = {
  'base': _base,
  'two_gradients': functools.partial(_base, gradients=2),
  'inlined_asam': lambda model, tx: sharp(model, by_hand(inlined_asam, tx)),
  'contrib_sam': _contrib_sam,
  'sam': lambda model, tx: sharp(model, optax_asam.sam(tx, SAM_RHO)),
  'asam': lambda model, tx: sharp(model, optax_asam.asam(tx, RHO, ETA)),
  'value_and_grad': _value_and_grad,
  'nnx_value_and_grad': _nnx_value_and_grad,
  'momentum_asam': _momentum_asam,
  'every_5': _every_5,
  'quarter_batch_ascent': lambda model, tx: sharp(
    model, optax_asam.asam(tx, RHO, ETA), ascent_batch=_quarter
  ),
  'looksam_5': lambda model, tx: sharp(
    model, optax_asam.looksam(tx, RHO, ETA, every_k=5), period=5
  ),
}
# Those whose programs are compared on many devices.
PARTITIONED = ('base', 'two_gradients', 'sam', 'asam')


def compile_step(
  make_method: MakeMethod,
  base_tx: optax.GradientTransformation,
  network: large_models.Network,
  devices: Sequence[Any],
) -> jax.stages.Compiled:
  """Compiles a step with donated parameters and state, as in training.

  Args:
    make_method: Makes the method; its first step is compiled.
    base_tx: The optimizer; its state is sharded like the parameters.
    network: The network; none of its arrays is allocated. The batch is sharded
      over the first axis of its mesh.
    devices: The devices, which need not exist.
  """
  mesh = network.mesh(devices)
  loss_fn = network.loss_fn(mesh)
  model = models.Model(
    lambda params, _, batch: (loss_fn(params, batch), {}),
    network.params,
    model_state={},
    batch=network.batch,
  )
  method = make_method(model, base_tx)

  def shaped(leaf, spec):
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )

  carry = method.carry._replace(
    params=jax.tree.map(shaped, network.params, network.specs),
    opt_state=optax.tree.map_params(
      method.init,
      shaped,
      method.carry.opt_state,
      network.specs,
      transform_non_params=lambda leaf: shaped(leaf, PartitionSpec()),
    ),
  )
  examples = PartitionSpec(next(iter(network.mesh_axes)))
  batch = jax.tree.map(lambda leaf: shaped(leaf, examples), network.batch)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
  jitted = jax.jit(method.cycle[0], out_shardings=shardings, donate_argnums=0)
  return jitted.lower(carry, batch).compile()


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
    4 * leaf.size // math.prod(network.mesh_axes[axis] for axis in spec if axis)
    for leaf, spec in zip(
      jax.tree.leaves(network.params),
      jax.tree.leaves(network.specs),
      strict=True,
    )
  )
