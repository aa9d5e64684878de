r"""ASAM with one gradient per step: perturbs against the momentum."""

from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _momentum_buffer
from optax_asam import _trees
from optax_asam import ascent as _ascent
from optax_asam import normalization as _normalization


class MomentumASAMState(NamedTuple):
  """State of :func:`momentum_asam`.

  Attributes:
    perturbation: The difference between ``params`` and w, a pytree like
      ``params`` in at least float32, with an :class:`optax.MaskedNode` for each
      leaf that is masked out.
    momentum: The average of gradients, a pytree like ``perturbation``, or None
      if ``base_tx`` keeps it.
    rho_state: The number of updates so far, for a schedule of ``rho``.
    base_state: State of ``base_tx``.
  """

  perturbation: optax.Updates
  momentum: Any
  rho_state: optax.OptState
  base_state: optax.OptState


@_checks.checks_base_tx
def momentum_asam(
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric | optax.Schedule = 2.0,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  *,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  momentum: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""ASAM with one gradient per step: perturbs against the momentum.

  .. math::
    g_t = \nabla L(w_t + \epsilon_t), \quad
    w_{t + 1} = w_t + \mathrm{base\_tx}(g_t; w_t), \quad
    \epsilon_{t + 1} = - \rho \, \frac{T_{w_{t + 1}}^2 m_{t + 1}}
    {\|T_{w_{t + 1}} m_{t + 1}\|_2}

  where :math:`m_{t + 1}` is the momentum, a decaying sum or average of
  gradients that includes :math:`g_t`, and :math:`\epsilon_0 = 0`. **The
  parameters of the training loop are** :math:`w + \epsilon`, so an ordinary
  loop that calls ``tx.update(grads, state, params)`` computes its gradients
  there. To evaluate, average or export the clean parameters :math:`w`, use
  :func:`eval_params`. ``base_tx`` sees w, so weight decay applies to w.

  Args:
    base_tx: The optimizer, such as ``optax.sgd(0.1, momentum=0.9)``.
    rho: The radius :math:`\rho \ge 0` of the perturbation: a number, a traced
      scalar, or an Optax schedule of the number of updates. A schedule that is
      zero at first perturbs only in the late phase of training.
    eta: The constant :math:`\eta \ge 0` of element-wise normalization, used if
      ``adaptive`` is True.
    adaptive: True for element-wise normalization of all but biases, False for
      none, or a normalization such as ``normalization.filterwise(0.01)``.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which leaves are perturbed, as in :func:`asam`.
    momentum: The decay :math:`0 \le \beta < 1` of an average of gradients,
      :math:`m_{t + 1} = \beta m_t + (1 - \beta) g_t`, that is kept in addition
      to the state of ``base_tx``. Non-finite gradients do not enter it. By
      default, m is the momentum of ``base_tx``. SGD with momentum, Adam,
      AdamW, NAdam, RAdam, LAMB, Lion, AdaBelief, Yogi, AMSGrad and AdaMax keep
      one.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` whose ``update`` needs
    ``params`` and returns updates in the dtypes of those of ``base_tx``. Its
    state is a :class:`MomentumASAMState`: the state of ``base_tx`` and the
    perturbation, one array in at least float32 for each leaf that ``mask``
    selects. With ``momentum``, there is another such array.

  Raises:
    TypeError: An argument is of the wrong type.
    ValueError: An argument is out of its range; ``update`` is called without
      ``params``; or ``momentum`` is None, and ``init`` does not find exactly
      one average of gradients in the state of ``base_tx``. To find out,
      ``init`` takes two updates of ``base_tx`` on small arrays.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_asam import eval_params, momentum_asam
    >>> loss_fn = lambda params: jnp.sum(params**2)
    >>> tx = momentum_asam(optax.sgd(0.1, momentum=0.9), rho=0.5)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> for _ in range(5):
    ...   grads = jax.grad(loss_fn)(params)
    ...   updates, state = tx.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(np.asarray(params).round(3))
    [-0.592 -0.842]
    >>> print(np.asarray(eval_params(state, params)).round(3))
    [-0.493 -0.574]

  References:
    Becker et al., `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024,
    algorithm 1; Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021.

  .. note::
    Scaling or averaging the updates or the parameters after this
    transformation would affect the perturbation, too. Put such transformations
    inside, as part of ``base_tx``.
  """
  normalization = _normalization.of(eta, adaptive)
  scale = _ascent.scale_by_rho(rho)
  _checks.check_ord(ord)
  _trees.check_mask(mask)
  if momentum is not None:
    _checks.check_scale('momentum', momentum, '0.9', below_one=True)
  base_tx = optax.with_extra_args_support(base_tx)

  def init_fn(params):
    _checks.check_params(params)
    base_state = base_tx.init(params)
    perturbation = _zeros(params, mask)
    if momentum is None:
      _momentum_buffer.check_found(base_tx, base_state, params, perturbation)
    return MomentumASAMState(
      perturbation=perturbation,
      momentum=None if momentum is None else _zeros(params, mask),
      rho_state=scale.init(params),
      base_state=base_state,
    )

  def update_fn(updates, state, params=None, **extra_args):
    params = _checks.checked_params(params, updates)
    clean_params = jax.tree.map(
      _clean, state.perturbation, params, is_leaf=_checks.is_masked
    )
    base_updates, base_state = base_tx.update(
      updates, state.base_state, clean_params, **extra_args
    )
    base_updates = _rounded(base_updates)
    if momentum is None:
      average, (m,) = None, _momentum_buffer.find(base_state, params)
    else:
      average = m = _trees.finite_ema(momentum, state.momentum, updates)

    # The update but for the next perturbation. Nothing below reads the previous
    # one, so XLA can reuse its memory.
    moves = jax.tree.map(
      lambda old, u: (
        u if _checks.is_masked(old) else jnp.asarray(u, old.dtype) - old
      ),
      state.perturbation,
      base_updates,
      is_leaf=_checks.is_masked,
    )
    w = _rounded(_geometry.perturb(params, moves))
    w = jax.tree.map(_trees.widen, w)

    def pull(w, m):
      coordinates = _geometry.coordinates(w, normalization, mask)
      return coordinates, coordinates.pull(m)

    _, h = pull(w, m)
    scalars = _geometry.reduce(h, ord)
    # T m is computed again: kept until the norm of all leaves is known, it
    # would take as much memory as the parameters.
    w, m, scalars = _barrier((w, m, scalars))
    coordinates, h = pull(w, m)
    eps = coordinates.push(*_geometry.direction(h, scalars, ord))
    eps, rho_state = scale.update(eps, state.rho_state, w)

    def update(e, s, u):
      if _checks.is_masked(e):
        return s
      # Without a perturbation, the update is that of `base_tx`, bit for bit:
      # -0.0 minus -0.0 would be 0.0.
      return jnp.where(e == 0, s, s - e).astype(_checks.dtype_of(u))

    updates = jax.tree.map(
      update, eps, moves, base_updates, is_leaf=_checks.is_masked
    )
    updates = _rounded(updates)
    # What `optax.apply_updates` will round to, or the roundings would add up.
    perturbed_params = _rounded(optax.apply_updates(params, updates))
    perturbation = jax.tree.map(
      lambda e, p, w: (
        e if _checks.is_masked(e) else jnp.asarray(p, w.dtype) - w
      ),
      eps,
      perturbed_params,
      w,
      is_leaf=_checks.is_masked,
    )
    return updates, MomentumASAMState(
      perturbation, average, rho_state, base_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def eval_params(opt_state: Any, params: optax.Params) -> optax.Params:
  r"""Returns the clean parameters w of :func:`momentum_asam`.

  .. math::
    w = (w + \epsilon) - \epsilon

  The parameters of the training loop are :math:`w + \epsilon`. Evaluate,
  average and export w instead. To resume training, save ``opt_state`` and
  ``params``.

  Args:
    opt_state: The state of :func:`momentum_asam`, or of an optimizer that
      contains it, such as an ``optax.chain``, ``optax.inject_hyperparams`` or
      ``optax.MultiSteps``. It may have been converted to nested dictionaries.
      An object with such a state as its attribute ``opt_state``, such as Flax's
      ``TrainState`` or ``nnx.Optimizer``, also works.
    params: The parameters of the training loop at the same step, not what this
      function returned: a pytree of arrays or of Flax NNX variables, such as
      ``nnx.state(model, nnx.Param)``.

  Returns:
    A pytree like ``params``, in the same dtypes. Leaves that are masked out are
    returned unchanged.

  Raises:
    ValueError: ``opt_state`` does not contain exactly one perturbation of
      ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_asam import eval_params, momentum_asam
    >>> tx = momentum_asam(optax.sgd(0.1, momentum=0.9), rho=0.5, eta=0.0)
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(jnp.zeros(2), tx.init(params), params)
    >>> print(eval_params(state, optax.apply_updates(params, updates)))
    [3. 4.]
  """
  leaves, treedef = jax.tree.flatten_with_path(params)
  if not leaves:
    return params
  leaves = [(_momentum_buffer.names(path), w) for path, w in leaves]
  shapes = {path: jnp.shape(w) for path, w in leaves}
  _checks.check_distinct([path for path, _ in leaves])
  found = [
    dict(field)
    for field in _momentum_buffer.fields(
      getattr(opt_state, 'opt_state', opt_state), ('perturbation',)
    )
    if all(shapes.get(path) == jnp.shape(e) for path, e in field)
  ]
  _checks.check_one_perturbation(len(found))
  # What is masked out has none.
  return treedef.unflatten(
    _clean(found[0].get(path, optax.MaskedNode()), w) for path, w in leaves
  )


def _zeros(params: optax.Params, mask: _trees.Mask | None) -> optax.Updates:
  """No perturbation, with a :class:`optax.MaskedNode` where masked out."""
  if not jax.tree.leaves(params):  # A placeholder of optax.tree.map_params.
    return params
  return jax.tree.map(
    lambda is_selected, w: (
      _trees.zeros_like(w) if is_selected else optax.MaskedNode()
    ),
    _trees.resolve_mask(mask, params),
    params,
  )


def _clean(e: Any, w: Any) -> Any:
  """A parameter without its perturbation, in its dtype."""
  if _checks.is_masked(e):
    return w
  return (jnp.asarray(w, e.dtype) - e).astype(_checks.dtype_of(w))


def _rounded(tree: Any) -> Any:
  """``tree``, whose leaves hold numbers of their dtypes in compiled code, too.

  XLA may drop a cast to 16 bits and back.
  """

  def leaf(x):
    x, dtype = _trees.widen(x), _checks.dtype_of(x)
    if x.dtype == dtype:
      return x
    if dtype not in (jnp.float16, jnp.bfloat16):
      # Of float8, not all have infinity, which reduce_precision presumes.
      return _barrier(x.astype(dtype))
    narrow = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
    if narrow.nexp < jnp.finfo(x.dtype).nexp:
      # Subnormal numbers, such as float16 below 6e-5, would become zero.
      ulp = float(narrow.smallest_subnormal)
      is_normal = jnp.abs(x) >= float(narrow.smallest_normal)
      rounded = jnp.where(is_normal, rounded, jnp.round(x / ulp) * ulp)
    return rounded.astype(dtype)

  return jax.tree.map(leaf, tree)


@jax.custom_jvp
def _barrier(tree: Any) -> Any:
  """An optimization barrier that JAX before 0.5.3 can differentiate, too."""
  return jax.lax.optimization_barrier(tree)


@_barrier.defjvp
def _(primals, tangents):
  return _barrier(*primals), *tangents
