"""The measures of sharpness in NumPy float64, written to be read.

Trees are dicts from a name to an array here, as in `reference.py`.
"""

from fractions import Fraction
import itertools
import math

import numpy as np
from scipy import optimize


def ball_maximum(hessian, linear, rho):
  """The maximum of <linear, u> + <u, hessian u> / 2 over ||u||_2 <= rho.

  A trust-region problem: u = (mu - hessian)^-1 linear with mu >= 0 not below
  any eigenvalue, and on the sphere unless mu = 0.
  """
  eigenvalues, basis = np.linalg.eigh(hessian)
  linear = basis.T @ linear
  top = max(eigenvalues[-1], 0.0)

  def value(u):
    return linear @ u + (eigenvalues * u * u).sum() / 2

  if eigenvalues[-1] < 0:
    inside = -linear / eigenvalues
    if np.linalg.norm(inside) <= rho:
      return value(inside)
  if not linear.any():
    return top * rho**2 / 2
  norm = np.linalg.norm(linear)
  mu = optimize.brentq(
    lambda mu: np.linalg.norm(linear / (mu - eigenvalues)) - rho,
    top + 1e-9 * norm / rho,
    top + 2 * norm / rho,
    xtol=1e-14,
    rtol=np.float64(1e-14),
  )
  return value(linear / (mu - eigenvalues))


def box_maximum(hessian, linear, rho):
  """The same over ||u||_inf <= rho, by enumeration of the faces.

  On a face some elements of u are at an end, and the gradient of the others is
  zero.
  """
  best = 0.0
  for ends in itertools.product((-rho, 0.0, rho), repeat=len(linear)):
    u = np.array(ends)
    free = u == 0
    block = hessian[np.ix_(free, free)]
    u[free] = np.linalg.solve(block, -(linear + hessian @ u)[free])
    if np.abs(u).max() <= rho:
      best = max(best, linear @ u + u @ hessian @ u / 2)
  return best


def project(u, radius, p):
  """The nearest point of the ball."""
  if p == np.inf:
    return np.clip(u, -radius, radius)
  return u * min(1.0, radius / max(np.linalg.norm(u), 1e-300))


def steepest(gradient, p):
  """The unit vector along which a function with this gradient rises most."""
  if p == np.inf:
    return np.sign(gradient)
  return gradient / np.linalg.norm(gradient)


def checkpoints(steps):
  """Those of Auto-PGD, in exact arithmetic."""
  fractions = [Fraction(0), Fraction(22, 100)]
  while fractions[-1] <= 1:
    width = fractions[-1] - fractions[-2] - Fraction(3, 100)
    fractions.append(fractions[-1] + max(width, Fraction(6, 100)))
  return sorted({math.ceil(p * steps) for p in fractions if p <= 1})


def apgd(value_and_grad, size, radius, p, steps):
  """Auto-PGD from the origin; returns the best value.

  Algorithm 1 of arXiv 2003.01690, but for the return to the best point, which
  comes before the step that is made at a checkpoint, without momentum.

  Args:
    value_and_grad: from a vector to the objective and its gradient.
    size: the number of elements of the vector.
    radius: that of the ball.
    p: 2 or inf.
    steps: number of steps.
  """
  begins = {end: begin for begin, end in itertools.pairwise(checkpoints(steps))}
  length = 2 * radius
  before = now = np.zeros(size)
  value, gradient = value_and_grad(now)
  best = best_before = value, now, gradient
  rises, has_halved = [], False
  for k in range(steps):
    halve = False
    if k in begins:
      stalls = sum(rises[begins[k] :]) < 0.75 * (k - begins[k])
      halve = stalls or (not has_halved and best[0] == best_before[0])
      best_before, has_halved = best, halve
    if halve:
      length /= 2
      value, now, gradient = best
    target = project(now + length * steepest(gradient, p), radius, p)
    if k > 0 and not halve:
      target = now + 0.75 * (target - now) + 0.25 * (now - before)
    before, now, last_value = now, project(target, radius, p), value
    value, gradient = value_and_grad(now)
    if value > best[0]:
      best = value, now, gradient
    rises.append(value > last_value)
  return best[0]
