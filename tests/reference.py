"""The mathematics in NumPy float64, written to be read, not to be fast.

Trees are dicts from a name to an array here.
"""

import numpy as np


def ones(w):
  """No normalization."""
  return np.ones_like(w)


def elementwise(eta):
  """|w_j| + eta."""
  return lambda w: np.abs(w) + eta


def filterwise(eta, axis=-1):
  """||f_i||_2 + eta on the filters of a kernel, |w_j| + eta elsewhere."""

  def operator(w):
    if w.ndim < 3:
      return np.abs(w) + eta
    t = np.empty_like(w)
    for i in range(w.shape[axis]):
      filter_ = [slice(None)] * w.ndim
      filter_[axis] = i
      t[tuple(filter_)] = np.sqrt((w[tuple(filter_)] ** 2).sum()) + eta
    return t

  return operator


def layerwise(eta):
  """||w_l||_2 + eta."""
  return lambda w: np.full_like(w, np.sqrt((w**2).sum()) + eta)


def perturbation(params, grads, operator, rho, p, normalized, perturbed):
  """The steepest perturbation of norm rho, by the closed form.

  Args:
    params: the parameters, a dict of arrays.
    grads: the gradient, likewise.
    operator: the function from a parameter to its T.
    rho: the radius.
    p: the exponent, 2, 3, inf or any other in (1, inf].
    normalized: the names of the leaves with T = operator(w); others have 1.
    perturbed: the names of the leaves that are perturbed.
  """
  t = {
    name: operator(w) if name in normalized else np.ones_like(w)
    for name, w in params.items()
  }
  eps = {name: np.zeros_like(w) for name, w in params.items()}
  if p == np.inf:
    for name in perturbed:
      eps[name] = rho * t[name] * np.sign(grads[name])
    return eps
  q = p / (p - 1)
  total = sum((np.abs(t[name] * grads[name]) ** q).sum() for name in perturbed)
  norm = total ** (1 / q)
  for name in perturbed:
    power = np.abs(t[name] * grads[name]) ** (q - 1)
    eps[name] = rho * t[name] * np.sign(grads[name]) * power / norm ** (q - 1)
  return eps
