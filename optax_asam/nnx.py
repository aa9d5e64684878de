r"""Drop-in replacements for ``nnx.value_and_grad`` and ``nnx.grad`` of Flax.

Import this module explicitly; ``import optax_asam`` does not import Flax.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import inspect
from typing import Any

import chex
from flax import nnx
import jax

from optax_asam import _checks
from optax_asam import _estimator
from optax_asam import _trees
from optax_asam import descent as _descent
from optax_asam import normalization as _normalization

Argnum = int | nnx.DiffState


@_estimator.usable_as_decorator
def value_and_grad(
  f: Callable[..., Any],
  argnums: Argnum | Sequence[Argnum] = 0,
  has_aux: bool = False,
  *,
  rho: chex.Numeric = 0.5,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  ascent_steps: int = 1,
  descent: _descent.Descent | None = None,
  perturbed_dtype: Any = None,
  ascent_fun: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  r"""The value of ``f`` and its sharpness-aware gradient, for NNX modules.

  .. math::
    (L(w), \nabla L(w + \epsilon)), \quad
    \epsilon = \rho \, \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}

  A drop-in replacement for ``nnx.value_and_grad`` with any optimizer. The
  value, the auxiliary data, and the batch statistics and RNG counts that are
  left in the modules are those of the clean pass. The perturbed pass starts
  from the same statistics and keys, so both passes use the same dropout masks,
  and its changes are discarded. With ``ascent_fun``, the value, the auxiliary
  data, the statistics and the counts are those of the perturbed pass. Only the
  differentiated variables are perturbed.

  Args:
    f: A function that returns a scalar, or with ``has_aux`` a pair of a
      scalar and auxiliary data. Its arguments are modules and other pytrees.
    argnums: Which positional arguments are differentiated and perturbed: an
      index, for a module's ``nnx.Param``; an ``nnx.DiffState``, for what its
      filter selects; or a sequence of these. With several, the norm is taken
      over all of them.
    has_aux: Whether ``f`` returns auxiliary data.
    rho: The radius :math:`\rho \ge 0`, a number or a traced scalar. For a
      schedule, pass ``rho=schedule(step)``: this function keeps no step count.
      The default is for element-wise normalization and ``ord=2``; SAM usually
      takes 0.05.
    eta: The constant :math:`\eta \ge 0` of element-wise normalization.
    adaptive: True for element-wise normalization of all but biases, False for
      none (SAM), or a normalization such as ``normalization.filterwise(0.01)``.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which of the differentiated variables are perturbed: a pytree of bools
      like their ``nnx.State`` or a prefix of it, or a function from it to one.
      With several ``argnums`` it is a mask for the tuple of those states.
    ascent_steps: Number of ascent steps, each of which costs a gradient.
    descent: A function from the clean and the perturbed gradient to the one
      that is returned; by default the perturbed one.
    perturbed_dtype: The dtype in which w + eps is formed, as in
      :func:`optax_asam.sharpness_aware`; by default each parameter's own.
    ascent_fun: The function whose gradient determines the perturbation; by
      default ``f``. It takes the same arguments as ``f`` and returns a scalar,
      or with ``has_aux`` a pair. For example, the loss of a quarter of the
      batch: ``ascent_fun=lambda model, batch: loss_fn(model,
      jax.tree.map(lambda x: x[::4], batch))``. All ascent steps use it, on
      copies of the modules. ``f`` is evaluated only at w + eps, so the value,
      the auxiliary data, the batch statistics and the RNG counts are those at
      w + eps. Changes that ``f`` makes to the differentiated variables are
      discarded. The first argument of ``descent`` is the gradient of
      ``ascent_fun``.

  Returns:
    A function of the arguments of ``f`` that returns ``(value, grads)``, or
    ``((value, aux), grads)`` with ``has_aux``. As from ``nnx.value_and_grad``,
    the gradient of a module is an ``nnx.State``. Without ``f``, a decorator.

  Raises:
    TypeError: An argument is of the wrong type, or ``rho`` is a schedule.
    ValueError: An argument is out of its range, or ``f`` is a bound method.

  Examples:
    >>> from flax import nnx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_asam.nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    >>> value_and_grad_fn = optax_asam.nnx.value_and_grad(loss_fn, rho=0.5)
    >>> loss, grads = value_and_grad_fn(model, jnp.ones((1, 2)))
    >>> print([grad.shape for grad in jax.tree.leaves(grads)])
    [(3,), (2, 3)]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.

  .. note::
    In place of the argument ``graph`` of ``nnx.value_and_grad``, call this
    function under ``nnx.set_graph_mode``. In tree mode, everything that an
    argument holds is differentiated, as by ``nnx.value_and_grad``, and
    perturbed: split off its ``nnx.Param``. With ``ascent_fun``, what ``f``
    changes in the rest is then discarded, too.
  """
  _checks.check_function('f', f, 'value_and_grad(loss_fn, rho=0.5)')
  _check_argnums(argnums)
  estimate = _estimator.estimator(
    rho,
    eta,
    adaptive,
    ord=ord,
    mask=mask,
    ascent_steps=ascent_steps,
    descent=descent,
    perturbed_dtype=perturbed_dtype,
    has_ascent_fun=ascent_fun is not None,
  )
  # Of these functions, whatever the mode is when they are called.
  is_graph_mode = _is_graph_mode()
  value_and_grad_pass = nnx.value_and_grad(f, argnums=argnums, has_aux=has_aux)
  ascent_grad_pass = nnx.grad(
    _checks.checked_ascent_fun(f, ascent_fun, has_aux),
    argnums=argnums,
    has_aux=has_aux,
  )

  @functools.wraps(f)
  def value_and_grad_fn(*args, **kwargs):
    if kwargs:  # A differentiated argument may be among them.
      bound = inspect.signature(f).bind(*args, **kwargs)
      args, kwargs = bound.args, bound.kwargs
    # Before the first pass, which changes the modules in place.
    params, restore, put = _snapshot(args, kwargs, argnums, is_graph_mode)
    _checks.check_params(params)

    def value_and_grad_at(params):
      # In the modules themselves, which keep what this pass changes in them.
      perturbed_args = put(params)
      return value_and_grad_pass(*perturbed_args, **kwargs)

    def ascent_grad_at(params):
      args, kwargs = restore(params)
      grads = ascent_grad_pass(*args, **kwargs)
      return grads[0] if has_aux else grads

    try:
      return estimate(params, value_and_grad_at, ascent_grad_at)
    finally:
      if ascent_fun is not None:  # The modules hold w + eps.
        put(params)

  return value_and_grad_fn


@_estimator.usable_as_decorator
def grad(
  f: Callable[..., Any],
  argnums: Argnum | Sequence[Argnum] = 0,
  has_aux: bool = False,
  *,
  rho: chex.Numeric = 0.5,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  ascent_steps: int = 1,
  descent: _descent.Descent | None = None,
  perturbed_dtype: Any = None,
  ascent_fun: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  r"""The sharpness-aware gradient of ``f``, a drop-in for ``nnx.grad``.

  .. math::
    \nabla L(w + \epsilon), \quad
    \epsilon = \rho \, \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}

  Args:
    f: A function that returns a scalar, or with ``has_aux`` a pair of a
      scalar and auxiliary data.
    argnums: Which arguments are differentiated. This and the following
      arguments are as in :func:`value_and_grad`.
    has_aux: Whether ``f`` returns auxiliary data.
    rho: The radius, a number or a traced scalar.
    eta: The constant of element-wise normalization.
    adaptive: True, False or a normalization.
    ord: The order p of the norm, in [1.001, inf].
    mask: Which variables are perturbed.
    ascent_steps: Number of ascent steps.
    descent: A function from the clean and the perturbed gradient to the one
      that is returned.
    perturbed_dtype: The dtype in which w + eps is formed.
    ascent_fun: The function whose gradient determines the perturbation.

  Returns:
    A function of the arguments of ``f`` that returns the gradient, or
    ``(grads, aux)`` with ``has_aux``.

  Raises:
    TypeError: An argument is of the wrong type, or ``rho`` is a schedule.
    ValueError: An argument is out of its range, or ``f`` is a bound method.

  Examples:
    >>> from flax import nnx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_asam.nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    >>> grads = optax_asam.nnx.grad(loss_fn, rho=0.5)(model, jnp.ones((1, 2)))
    >>> print([grad.shape for grad in jax.tree.leaves(grads)])
    [(3,), (2, 3)]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.
  """
  value_and_grad_fn = value_and_grad(
    f,
    argnums,
    has_aux,
    rho=rho,
    eta=eta,
    adaptive=adaptive,
    ord=ord,
    mask=mask,
    ascent_steps=ascent_steps,
    descent=descent,
    perturbed_dtype=perturbed_dtype,
    ascent_fun=ascent_fun,
  )
  return _estimator.without_value(value_and_grad_fn, has_aux)


def _diff_states(argnums: Argnum | Sequence[Argnum]) -> list[nnx.DiffState]:
  """What is differentiated of each argument: by default its parameters."""
  return [
    argnum
    if isinstance(argnum, nnx.DiffState)
    else nnx.DiffState(argnum, nnx.Param)
    for argnum in ([argnums] if isinstance(argnums, Argnum) else argnums)
  ]


def _check_argnums(argnums: Any) -> None:
  """Raises unless ``argnums`` are numbers of arguments or ``DiffState``s."""
  several = isinstance(argnums, (tuple, list))
  for argnum in argnums if several else (argnums,):
    if isinstance(argnum, bool) or not isinstance(argnum, Argnum):
      raise TypeError(
        f'argnums must be an int, an nnx.DiffState or a sequence of these, but'
        f' got {argnums!r}. Pass other options by keyword. For example:'
        f' value_and_grad(loss_fn, rho=0.5).'
      )


def _snapshot(
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  argnums: Argnum | Sequence[Argnum],
  is_graph_mode: bool,
) -> tuple[Any, Callable[[Any], tuple[Any, Any]], Callable[[Any], list[Any]]]:
  """The differentiated parameters, and two functions that replace them.

  Args:
    args: The positional arguments.
    kwargs: The keyword arguments.
    argnums: Which arguments are differentiated.
    is_graph_mode: Whether ``nnx.grad`` splits modules.

  Returns:
    The parameters, a pytree like the gradient; a function from parameters to
    fresh ``(args, kwargs)`` that hold them, and are otherwise as they are now,
    whatever happens to the modules later; and a function from parameters to
    ``args`` that hold them, with the modules themselves, changed in place.
  """
  single = isinstance(argnums, Argnum)
  diff_states = _diff_states(argnums)
  positions = [diff_state.argnum for diff_state in diff_states]
  if not all(0 <= i < len(args) for i in positions):
    raise TypeError(
      f'argnums must index positional arguments from 0, but got {argnums!r} for'
      f' {len(args)} of them. Pass differentiated arguments by position. For'
      f' example: argnums=0.'
    )

  def split(ctx, path, diff_state, node):
    del path
    if diff_state is None or isinstance(node, nnx.Variable):
      return nnx.NodeStates.from_split(*ctx.split(node))
    return nnx.NodeStates.from_split(*ctx.split(node, diff_state.filter, ...))

  # As nnx.grad splits its arguments: all at once, so that a variable which
  # several of them share is one variable in the copies, too. Flax compares the
  # prefixes of a shared variable, so they must not differ in the position.
  prefixes = {
    diff_state.argnum: dataclasses.replace(diff_state, argnum=-1)
    for diff_state in diff_states
  }
  prefix = tuple(prefixes.get(i) for i in range(len(args)))
  arguments = (args, kwargs)
  if is_graph_mode:
    arguments = nnx.to_tree(arguments, prefix=(prefix, None), split_fn=split)
  # Arrays, since the variables among them change with their modules.
  leaves, treedef = jax.tree.flatten(arguments)

  def select(args):
    selected = tuple(
      jax.tree.map(_differentiated, args[i], is_leaf=_is_node)
      for i in positions
    )
    return selected[0] if single else selected

  def replace(replace_node, split_args, params, args):
    replaced = list(args)
    for i, argument in zip(
      positions, (params,) if single else params, strict=True
    ):
      replaced[i] = jax.tree.map(
        replace_node, split_args[i], argument, args[i], is_leaf=_is_node
      )
    return replaced

  def restore(params):
    args, kwargs = jax.tree.unflatten(treedef, leaves)
    args = replace(_replace_in_copy, args, params, args)
    return nnx.from_tree((args, kwargs))

  split_args, _ = jax.tree.unflatten(treedef, leaves)

  def put(params):
    return replace(_replace_in_place, split_args, params, args)

  return select(split_args), restore, put


def _is_graph_mode() -> bool:
  """Whether ``nnx.grad`` splits modules, as older versions of Flax always do.

  Otherwise modules are pytrees that it passes on to ``jax.grad`` unchanged.
  """
  modes = (
    getattr(nnx, name, None) for name in ('set_graph_mode', 'set_graph_updates')
  )
  return all(mode is None or mode.current_value() for mode in modes)


def _is_node(node: Any) -> bool:
  """Whether ``node`` is a split module, or in tree mode a variable."""
  return isinstance(node, (nnx.NodeStates, nnx.Variable))


def _differentiated(node: Any) -> Any:
  """What is differentiated of an argument: the first state of a module."""
  return node.states[0] if isinstance(node, nnx.NodeStates) else node


def _replace_in_copy(node: Any, params: Any, _: Any) -> Any:
  """``node`` with ``params`` in place of what :func:`_differentiated` gives."""
  if isinstance(node, nnx.NodeStates):
    return node.replace(states=(params, *node.states[1:]))
  return params


def _replace_in_place(node: Any, params: Any, argument: Any) -> Any:
  """``argument``, of which ``node`` is the split, with ``params`` in it."""
  if isinstance(node, nnx.NodeStates):
    nnx.update(argument, params)
    return argument
  if isinstance(node, nnx.Variable):
    argument.set_raw_value(params.get_raw_value())
    return argument
  return params
