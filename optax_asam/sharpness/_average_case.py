"""The mean over random points of a distribution shaped like the ball."""

from typing import Any
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from optax_asam import _checks
from optax_asam import _trees
from optax_asam import normalization as _normalization
from optax_asam.sharpness import _ball


def average_case(
  loss_fn: _ball.LossFn,
  params: optax.Params,
  rho: chex.Numeric,
  key: jax.Array,
  *,
  normalization: _normalization.Normalization = _ball.ELEMENTWISE,
  distribution: Literal['normal', 'uniform'] = 'normal',
  ord: float = 2,
  samples: int = 100,
  mask: _trees.Mask | None = None,
  perturbed_dtype: Any = jnp.float32,
  batches: Any = None,
) -> jax.Array:
  r"""The mean rise of the loss at random points around the parameters.

  .. math::
    \mathbb{E}_\epsilon L(w + \epsilon) - L(w), \quad
    \epsilon \sim \mathcal{N}(0, \rho^2 T_w^2)
    \quad \text{or uniform in} \quad \|T_w^{-1} \epsilon\|_p \le \rho

  It may be negative. With k parameters, a normal perturbation has a norm
  :math:`\|T_w^{-1} \epsilon\|_2` of about :math:`\rho \sqrt{k}`, a uniform one
  of at most :math:`\rho`: the radii of the two are not comparable.

  Args:
    loss_fn: As in :func:`worst_case`.
    params: The parameters w, a pytree of floating-point arrays.
    rho: The standard deviation or the radius :math:`\rho \ge 0`, a number or a
      traced scalar.
    key: A random key.
    normalization: A function from ``params`` to :math:`T_w`.
    distribution: ``'normal'`` or ``'uniform'``.
    ord: The order p of the norm, 2 or inf, for a uniform distribution.
    samples: Number of points, each of which costs an evaluation of the loss.
    mask: Which leaves are perturbed, as in :func:`optax_asam.asam`.
    perturbed_dtype: As in :func:`worst_case`.
    batches: As in :func:`worst_case`; each batch has its own points.

  Returns:
    The mean over the points, a scalar in the units of the loss, at least
    float32.

  Raises:
    TypeError: An argument is of the wrong type, or the loss is not a real
      scalar.
    ValueError: An argument is out of its range.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_asam import normalization, sharpness
    >>> average = sharpness.average_case(
    ...     lambda params: jnp.sum(params**2), jnp.zeros(2), 0.5,
    ...     jax.random.key(0), normalization=normalization.identity(),
    ...     samples=10_000)
    >>> print(f'{average:.1f}')  # 2 x 0.5^2
    0.5

  References:
    Andriushchenko et al., `A Modern Look at the Relationship between Sharpness
    and Generalization <https://arxiv.org/abs/2302.07011>`_, 2023, section 3.
  """
  _ball.check_arguments(
    loss_fn, params, rho, normalization, mask, perturbed_dtype
  )
  _checks.check_key(key)
  _checks.check_ord_of_projection(ord)
  _checks.check_count('samples', samples)
  samples = int(samples)
  if distribution not in ('normal', 'uniform'):
    raise ValueError(
      f"distribution must be 'normal' or 'uniform', but got {distribution!r}."
      f" For example: distribution='normal'."
    )

  def on_batch(loss_fn, key):
    rise, center, _ = _ball.around(
      loss_fn, params, normalization, mask, perturbed_dtype
    )
    radius = jnp.asarray(rho, center[0].dtype)

    def sample(total, i):
      sample_key = jax.random.fold_in(key, i)
      if distribution == 'normal':
        point = _ball.normal(sample_key, center)
      else:
        point = _ball.in_ball(sample_key, center, ord)
      return total + rise([radius * x for x in point]), None

    zero = _trees.varying_like(jnp.zeros_like(radius), center)
    total, _ = jax.lax.scan(sample, zero, jnp.arange(samples))
    return _ball.at_radius(radius, total / samples)

  return _ball.mean_over_batches(on_batch, loss_fn, key, batches)
