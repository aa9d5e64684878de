"""The curvature in the coordinates of a normalized ball."""

from typing import Any

import jax
import optax

from optax_asam import _checks
from optax_asam import _coordinates
from optax_asam import _trees
from optax_asam import normalization as _normalization
from optax_asam.sharpness import _lanczos
from optax_asam.sharpness import _loss
from optax_asam.sharpness import _points


def max_hessian_eigenvalue(
  loss_fn: _loss.LossFn,
  params: optax.Params,
  key: jax.Array,
  *,
  normalization: _normalization.Normalization = _loss.ELEMENTWISE,
  steps: int = 50,
  mask: _trees.Mask | None = None,
  batches: Any = None,
) -> jax.Array:
  r"""The largest eigenvalue of the normalized Hessian.

  .. math::
    \lambda_{\max}(T_w \nabla^2 L(w) \, T_w)

  by the Lanczos method from a random vector, with products of the Hessian and a
  vector. At a minimum, where the gradient vanishes, the maximum that
  :func:`worst_case` searches for p = 2, there with restarts, is :math:`\rho^2
  \lambda_{\max} / 2` for a small :math:`\rho`. Three vectors of the size of
  ``params`` are kept: without reorthogonalization the method repeats
  eigenvalues that it has found, but the largest one stays right.

  Args:
    loss_fn: As in :func:`worst_case`, twice differentiable.
    params: The parameters w, a pytree of floating arrays.
    key: A random key.
    normalization: A function from ``params`` to :math:`T_w`.
    steps: Number of steps, each of which costs about two gradients. The error
      falls with their number, fast where the largest eigenvalue stands apart.
    mask: The leaves whose block of the Hessian it is, as in
      :func:`optax_asam.asam`.
    batches: As in :func:`worst_case`: the mean of the eigenvalues of batches.

  Returns:
    The eigenvalue, a scalar, at least float32. It may be negative.

  Raises:
    TypeError: An argument is of the wrong type, or the loss no real scalar.
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
  _loss.check_arguments(loss_fn, params, 0.0, normalization, mask)
  _points.check_key(key)
  _checks.check_count('steps', steps)
  coordinates = _coordinates.at(params, normalization, mask)
  center = _loss.origin(params, coordinates)

  def on_batch(loss_fn, key):
    grad_fn = jax.grad(_loss.rise(loss_fn, params, coordinates))
    return _lanczos.max_eigenvalue(
      lambda v: jax.jvp(grad_fn, (center,), (v,))[1],
      _points.normal(key, center),
      steps,
    )

  return _loss.mean_over_batches(on_batch, loss_fn, key, batches)
