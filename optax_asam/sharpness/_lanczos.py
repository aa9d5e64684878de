"""The Lanczos method on lists of arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_asam.sharpness._projected_ascent import l2_norm

Arrays = list[jax.Array]


def max_eigenvalue(
  product: Callable[[Arrays], Arrays], start: Arrays, steps: int
) -> jax.Array:
  """The largest eigenvalue of a symmetric operator.

  The coefficients of Paige's recurrence are the diagonals of a tridiagonal
  matrix, whose largest eigenvalue approaches that of the operator from below.
  Without reorthogonalization that matrix has some eigenvalues several times,
  and none that the operator has not.

  Args:
    product: The operator.
    start: A random vector, arrays of one dtype, at least float32.
    steps: Number of products.
  """

  def step(carry, _):
    previous, current, beta = carry
    product_ = product(current)
    alpha = sum(jnp.sum(x * y) for x, y in zip(product_, current, strict=True))
    rest = [
      x - alpha * y - beta * z
      for x, y, z in zip(product_, current, previous, strict=True)
    ]
    next_, next_beta = _normalize(rest)
    return (current, next_, next_beta), (alpha, next_beta)

  current, _ = _normalize(start)
  zeros = [jnp.zeros_like(x) for x in start]
  carry = zeros, current, jnp.zeros([], start[0].dtype)
  _, coefficients = jax.lax.scan(step, carry, length=steps)
  alphas, betas = map(jnp.asarray, coefficients)
  # With as many steps as dimensions the vectors come to an end. The zeros that
  # follow are no eigenvalues; any number in their range does no harm instead.
  has_ended = jnp.cumsum(betas[:-1] == 0) > 0
  alphas = alphas.at[1:].set(jnp.where(has_ended, alphas[0], alphas[1:]))
  tridiagonal = (
    jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
  )
  return jnp.linalg.eigvalsh(tridiagonal)[-1]


def _normalize(x: Arrays) -> tuple[Arrays, jax.Array]:
  """``x`` with norm 1, or zero if it is zero, and its norm."""
  norm = l2_norm(x)
  safe_norm = jnp.where(norm == 0, 1, norm)
  return [leaf / safe_norm for leaf in x], norm
