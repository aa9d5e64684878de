"""The curvature in the coordinates of a normalized ball."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _geometry
from optax_asam import _trees
from optax_asam import normalization as _normalization
from optax_asam._geometry import Arrays
from optax_asam.sharpness import _ball


def max_hessian_eigenvalue(
  loss_fn: _ball.LossFn,
  params: optax.Params,
  key: jax.Array,
  *,
  normalization: _normalization.Normalization = _ball.ELEMENTWISE,
  steps: int = 50,
  mask: _trees.Mask | None = None,
  perturbed_dtype: Any = jnp.float32,
  batches: Any = None,
  unroll: int | bool = 1,
) -> jax.Array:
  r"""The largest eigenvalue of the normalized Hessian.

  .. math::
    \lambda_{\max}(T_w \nabla^2 L(w) \, T_w)

  by the Lanczos method from a random vector, with Hessian-vector products. At a
  minimum, where the gradient vanishes, the maximum that :func:`worst_case`
  searches for with p = 2 (with restarts) is :math:`\rho^2
  \lambda_{\max} / 2` for small :math:`\rho`. Three vectors of the size of
  ``params`` are kept: without reorthogonalization the method finds eigenvalues
  repeatedly, but the largest one stays correct.

  Args:
    loss_fn: As in :func:`worst_case`, twice differentiable.
    params: The parameters w, a pytree of floating-point arrays.
    key: A random key.
    normalization: A function from ``params`` to :math:`T_w`.
    steps: Number of steps, each of which costs about two gradients. The larger
      the gap to the second eigenvalue, the fewer steps are needed.
    mask: Which leaves span the block of the Hessian, as in
      :func:`optax_asam.asam`.
    perturbed_dtype: As in :func:`worst_case`.
    batches: As in :func:`worst_case`; the result is the mean eigenvalue.
    unroll: As in :func:`worst_case`.

  Returns:
    The eigenvalue, a scalar, at least float32. It may be negative.

  Raises:
    TypeError: An argument is of the wrong type, or the loss is not a real
      scalar.
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization, sharpness
    >>> loss_fn = lambda params: 0.5 * params[0]**2 + 2.0 * params[1]**2
    >>> eigenvalue = sharpness.max_hessian_eigenvalue(
    ...     loss_fn, jnp.array([3.0, 4.0]), jax.random.key(0),
    ...     normalization=normalization.identity())
    >>> print(f'{eigenvalue:.3f}')
    4.000

  References:
    Paige, `Computational Variants of the Lanczos Method for the Eigenproblem
    <https://doi.org/10.1093/imamat/10.3.373>`_, 1972.
  """
  _ball.check_arguments(
    loss_fn, params, 0.0, normalization, mask, perturbed_dtype
  )
  _checks.check_key(key)
  _checks.check_count('steps', steps)

  def on_batch(loss_fn, key):
    rise, center, _ = _ball.around(
      loss_fn, params, normalization, mask, perturbed_dtype
    )
    grad_fn = jax.grad(rise)
    return _max_eigenvalue(
      lambda v: jax.jvp(grad_fn, (center,), (v,))[1],
      _ball.normal(key, center),
      steps,
      unroll,
    )

  return _ball.mean_over_batches(on_batch, loss_fn, key, batches, unroll)


def _max_eigenvalue(
  product: Callable[[Arrays], Arrays],
  start: Arrays,
  steps: int,
  unroll: int | bool,
) -> jax.Array:
  """The largest eigenvalue of a symmetric operator.

  The coefficients of Paige's recurrence are the diagonals of a tridiagonal
  matrix whose largest eigenvalue approaches that of the operator from below.
  Without reorthogonalization some of its eigenvalues are repeated, but all are
  eigenvalues of the operator.

  Args:
    product: The operator.
    start: A random vector, arrays of one dtype, at least float32.
    steps: Number of products.
    unroll: As in :func:`jax.lax.scan`.
  """

  def step(carry, _):
    previous, current, beta = carry
    product_ = product(current)
    alpha = _trees.dot(product_, current)
    rest = [
      x - alpha * y - beta * z
      for x, y, z in zip(product_, current, previous, strict=True)
    ]
    next_, next_beta = _normalize(rest)
    return (current, next_, next_beta), (alpha, next_beta)

  current, _ = _normalize(start)
  zeros = [jnp.zeros_like(x) for x in start]
  carry = zeros, current, jnp.zeros([], start[0].dtype)
  carry = _trees.varying_like(carry, start)
  # It ends after as many steps as dimensions, were it not for rounding errors.
  steps = min(steps, max(1, 2 * sum(x.size for x in start)))
  unroll = _ball.unrolled(unroll, steps)
  _, coefficients = jax.lax.scan(step, carry, length=steps, unroll=unroll)
  alphas, betas = map(jnp.asarray, coefficients)
  # Once only rounding errors are left, the recurrence has ended. What follows
  # is replaced by a number in the range.
  size = jnp.maximum(jnp.abs(alphas), betas).max()
  rounding = 10 * float(jnp.finfo(betas.dtype).eps) * size
  has_ended = jnp.cumsum(betas[:-1] <= rounding) > 0
  alphas = alphas.at[1:].set(jnp.where(has_ended, alphas[0], alphas[1:]))
  betas = jnp.where(has_ended, 0, betas[:-1])
  tridiagonal = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
  return jnp.linalg.eigvalsh(tridiagonal)[-1]


def _normalize(x: Arrays) -> tuple[Arrays, jax.Array]:
  """``x`` with norm 1, or zero if it is zero, and its norm."""
  norm, usable = _geometry.guarded_norm(x)
  return [leaf / norm for leaf in x], jnp.where(usable, norm, 0)
