r"""Sharpness-aware versions of any Optax optimizer."""

from collections.abc import Hashable
from typing import Any

import chex
import optax

from optax_asam import _checks
from optax_asam import _trees
from optax_asam import ascent as _ascent
from optax_asam import descent as _descent
from optax_asam import normalization as _normalization
from optax_asam import transform


@_checks.checks_base_tx
def asam(
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric | optax.Schedule = 0.5,
  eta: chex.Numeric = 0.01,
  adaptive: bool | _normalization.Normalization = True,
  *,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  ascent_steps: int = 1,
  every_k: int = 1,
  when: transform.When | None = None,
  descent: _descent.Descent | None = None,
  axis_name: Hashable | None = None,
  perturbed_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adaptive Sharpness-Aware Minimization around any Optax optimizer.

  .. math::
    \epsilon = \rho \, \frac{T_w^2 g}{\|T_w g\|_2}, \quad
    T_w = \operatorname{diag}(|w| + \eta), \quad
    u = \mathrm{base\_tx}\big(\nabla L(w + \epsilon)\big)

  Equivalent to ``optax.chain(sharpness_aware(...), base_tx)``: the gradient at
  the perturbed parameters is passed to ``base_tx`` at the unperturbed ones.
  Clipping and weight decay belong inside ``base_tx``.

  Args:
    base_tx: The optimizer, such as ``optax.sgd(0.1, momentum=0.9)``.
    rho: The radius :math:`\rho \ge 0` of the perturbation: a number, a traced
      scalar, or an Optax schedule of the number of updates; only a concrete
      number is checked. The default is for element-wise normalization and
      ``ord=2``. SAM usually needs 0.05. With ``ord=inf``, the default would
      move every weight by half its magnitude.
    eta: The constant :math:`\eta \ge 0` of element-wise normalization, used if
      ``adaptive`` is True.
    adaptive: True for element-wise normalization of all but biases, False for
      none (SAM), or a normalization such as ``normalization.filterwise(0.01)``.
    ord: The order p of the norm, in [1.001, inf]: the perturbation is in the
      ball :math:`\|T_w^{-1} \epsilon\|_p \le \rho`. The formula above is for
      p = 2.
    mask: Which leaves are perturbed: a pytree of bools with the structure of
      ``params`` or a prefix of it (but not a single bool), a function from
      ``params`` to one, or None for all. The norm is taken over those leaves
      alone.
    ascent_steps: Number of ascent steps, each of which costs a gradient.
    every_k: The second gradient is taken on updates 0, k, 2k, ...; all other
      updates are those of ``base_tx``.
    when: A function from the number of updates so far to a bool that says
      whether to take the second gradient on this update, as in
      :func:`sharpness_aware`.
    descent: A function from the clean and the perturbed gradient to the one
      passed to ``base_tx``; by default the perturbed one.
    axis_name: Name of the mapped axis over which gradients are averaged, as in
      :func:`sharpness_aware`.
    perturbed_dtype: The dtype in which w + eps is formed, as in
      :func:`sharpness_aware`; by default each parameter's own.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``update(grads,
    state, params, ...)`` takes ``grad_fn(params) -> grads`` or
    ``value_fn(params) -> scalar`` by keyword, passes ``base_tx`` a gradient in
    the dtypes of ``grads``, and returns its updates. Its state is a
    tuple of :class:`SharpnessAwareState` and the state of ``base_tx``.

  Raises:
    TypeError: An argument or the result of a function has the wrong type.
    ValueError: An argument is out of its range, or ``update`` lacks ``params``
      or a function for the second gradient.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_asam import asam
    >>> loss_fn = lambda params: jnp.sum(params**2)
    >>> tx = asam(optax.sgd(0.1), rho=0.5)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> for _ in range(5):
    ...   grad_fn = jax.grad(loss_fn)
    ...   updates, state = tx.update(
    ...     grad_fn(params), state, params, grad_fn=grad_fn
    ...   )
    ...   params = optax.apply_updates(params, updates)
    >>> print(np.asarray(params).round(3))
    [0.262 0.349]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.

  .. note::
    A line search or L-BFGS as ``base_tx`` needs ``value_fn`` in place of
    ``grad_fn``. It then evaluates the clean loss along the direction of the
    perturbed gradient.
  """
  return optax.chain(
    transform.sharpness_aware(
      _ascent.rho_ball(rho, eta, adaptive, ord=ord, mask=mask),
      descent,
      ascent_steps=ascent_steps,
      every_k=every_k,
      when=when,
      axis_name=axis_name,
      perturbed_dtype=perturbed_dtype,
    ),
    base_tx,
  )


@_checks.checks_base_tx
def sam(
  base_tx: optax.GradientTransformation,
  rho: chex.Numeric | optax.Schedule = 0.05,
  *,
  ord: float = 2,
  mask: _trees.Mask | None = None,
  ascent_steps: int = 1,
  every_k: int = 1,
  when: transform.When | None = None,
  descent: _descent.Descent | None = None,
  axis_name: Hashable | None = None,
  perturbed_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Sharpness-Aware Minimization around any Optax optimizer.

  .. math::
    \epsilon = \rho \, \frac{g}{\|g\|_2}, \quad
    u = \mathrm{base\_tx}\big(\nabla L(w + \epsilon)\big)

  Equivalent to :func:`asam` with ``adaptive=False``.

  Args:
    base_tx: The optimizer, such as ``optax.sgd(0.1, momentum=0.9)``.
    rho: The radius :math:`\rho \ge 0` of the perturbation: a number, a traced
      scalar, or an Optax schedule of the number of updates.
    ord: The order p of the norm. This and the following arguments are as in
      :func:`asam`.
    mask: Which leaves are perturbed.
    ascent_steps: Number of ascent steps.
    every_k: The second gradient is taken on updates 0, k, 2k, ...
    when: Whether to take the second gradient on an update.
    descent: A function from the clean and the perturbed gradient to the one
      passed to ``base_tx``.
    axis_name: Name of the mapped axis over which gradients are averaged.
    perturbed_dtype: The dtype in which w + eps is formed.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`, as from :func:`asam`.

  Raises:
    TypeError: An argument or the result of a function has the wrong type.
    ValueError: An argument is out of its range, or ``update`` lacks ``params``
      or a function for the second gradient.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_asam import sam
    >>> grad_fn = jax.grad(lambda params: jnp.sum(params**2))
    >>> tx = sam(optax.sgd(0.1), rho=0.05)
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(
    ...   grad_fn(params), tx.init(params), params, grad_fn=grad_fn
    ... )
    >>> print(np.asarray(updates).round(3))
    [-0.606 -0.808]

  References:
    Foret et al., `Sharpness-Aware Minimization
    <https://arxiv.org/abs/2010.01412>`_, 2021, algorithm 1.
  """
  return asam(
    base_tx,
    rho,
    adaptive=False,
    ord=ord,
    mask=mask,
    ascent_steps=ascent_steps,
    every_k=every_k,
    when=when,
    descent=descent,
    axis_name=axis_name,
    perturbed_dtype=perturbed_dtype,
  )
