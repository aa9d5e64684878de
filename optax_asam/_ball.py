"""Linear functions on the unit ball of a p-norm."""

import math

import jax
import jax.numpy as jnp


def steepest(h: list[jax.Array], p: float) -> tuple[list[jax.Array], jax.Array]:
  r"""Maximizes <h, x> over ||x||_p <= 1.

  .. math::
    x = \operatorname{sign}(h) |h|^{q - 1} / \|h\|_q^{q - 1}

  Args:
    h: Arrays of one dtype, at least float32.
    p: The exponent, in (1, inf].

  Returns:
    The maximizer, arrays like ``h``, and a bool scalar: whether ||h|| is
    neither zero nor infinite nor NaN. Where it is False, x is not to be used.
  """
  if not h:
    return [], jnp.array(False)
  tiny = jnp.finfo(h[0].dtype).tiny
  if p == math.inf:
    usable = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in h]).all()
    # Some devices take denormal numbers for zeros; so all do here.
    return [
      jnp.where(jnp.abs(leaf) < tiny, 0, jnp.sign(leaf)) for leaf in h
    ], usable
  if p == 2:
    # A square below `tiny` is flushed to zero on most devices: beside one
    # element of 2e-19, a thousand of 1e-19 would leave the ball. So it counts
    # as `tiny`, which is more than it is.
    squares = sum(
      jnp.sum(jnp.where(leaf == 0, 0, jnp.maximum(leaf * leaf, tiny)))
      for leaf in h
    )
    usable = (squares >= tiny) & jnp.isfinite(squares)
    # The guard stands inside the root, whose derivative at 0 is infinite.
    norm = jnp.sqrt(jnp.where(usable, squares, 1))
    return [leaf / norm for leaf in h], usable
  # |h|^q overflows and underflows early, so the largest |h|, which cancels, is
  # divided out first; that it cancels is why its derivative may be left out.
  peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in h]
  peak = jax.lax.stop_gradient(jnp.stack(peaks).max())
  # XLA may divide by multiplying with 1 / peak, which must not be flushed to
  # zero. NaN fails both comparisons.
  usable = (peak >= tiny) & (peak <= 1 / tiny)
  safe_peak = jnp.where(usable, peak, 1)
  q = p / (p - 1)
  magnitudes = [jnp.abs(leaf) / safe_peak for leaf in h]
  total = sum(jnp.sum(_power(leaf, q)) for leaf in magnitudes)
  inverse = jnp.where(usable, total, 1) ** (-1 / p)  # (q - 1) / q = 1 / p
  return [
    jnp.sign(leaf) * _power(magnitude, q - 1) * inverse
    for leaf, magnitude in zip(h, magnitudes, strict=True)
  ], usable


def _power(x: jax.Array, exponent: float) -> jax.Array:
  """``x ** exponent`` for x >= 0, with a zero derivative at zero."""
  positive = x > 0
  return jnp.where(positive, jnp.where(positive, x, 1) ** exponent, 0)
