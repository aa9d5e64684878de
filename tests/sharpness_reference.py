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
    rtol=1e-14,
  )
  return value(linear / (mu - eigenvalues))


def box_maximum(hessian, linear, rho):
  """The same over ||u||_inf <= rho, by a look at every face of the box.

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


def apgd(value_and_grad, size, radius, p, steps, *, published):
  """Auto-PGD from the origin; returns the best value.

  Args:
    value_and_grad: from a vector to the objective and its gradient.
    size: the number of elements of the vector.
    radius: that of the ball.
    p: 2 or inf.
    steps: number of steps.
    published: True for algorithm 1 of arXiv 2003.01690. There a return to the
      best point takes the place of the step that was just made, and the next
      step has the momentum of that jump. False for the variant of the library:
      it looks back before the step, makes it from the best point, and has no
      momentum then.
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
    if halve and not published:
      length /= 2
      value, now, gradient = best
    target = project(now + length * steepest(gradient, p), radius, p)
    if k > 0 and (published or not halve):
      target = now + 0.75 * (target - now) + 0.25 * (now - before)
    before, now, last_value = now, project(target, radius, p), value
    value, gradient = value_and_grad(now)
    if value > best[0]:
      best = value, now, gradient
    if halve and published:
      length /= 2
      value, now, gradient = best
    rises.append(value > last_value)
  return best[0]


def network_value_and_grad(params, x, y, *, normalize_logits):
  """The loss of a network with one hidden layer, and its gradient by hand.

  Args:
    params: `kernel_1` [1, d, h], `bias_1` [h], `kernel_2` [h, c], `bias_2` [c].
    x: inputs [n, d].
    y: classes, int [n].
    normalize_logits: whether logits get mean 0 and norm 1 over the classes.

  Returns:
    The mean cross-entropy and a tree like ``params``.
  """
  n = len(x)
  hidden = x @ params['kernel_1'][0] + params['bias_1']
  active = np.maximum(hidden, 0)
  z = logits = active @ params['kernel_2'] + params['bias_2']
  if normalize_logits:
    centered = logits - logits.mean(1, keepdims=True)
    norm = np.sqrt((centered**2).sum(1, keepdims=True))
    z = centered / norm
  exps = np.exp(z - z.max(1, keepdims=True))
  probabilities = exps / exps.sum(1, keepdims=True)
  loss = -np.log(probabilities[np.arange(n), y]).mean()
  dz = probabilities.copy()
  dz[np.arange(n), y] -= 1
  dz /= n
  if normalize_logits:
    dz = (dz - z * (z * dz).sum(1, keepdims=True)) / norm
    dz -= dz.mean(1, keepdims=True)
  dhidden = (dz @ params['kernel_2'].T) * (hidden > 0)
  return loss, {
    'kernel_1': (x.T @ dhidden)[None],
    'bias_1': dhidden.sum(0),
    'kernel_2': active.T @ dz,
    'bias_2': dz.sum(0),
  }


def published_measure(params, batches, rho, p, *, published, normalize_logits):
  """S_max of arXiv 2302.07011, with 20 steps of Auto-PGD.

  The mean over ``batches``, pairs of inputs and classes, of the maximal rise
  over ||eps / |w|||_p <= rho.
  """
  names = sorted(params)
  w = np.concatenate([params[name].ravel() for name in names])
  ends = np.cumsum([params[name].size for name in names])[:-1]

  def rise(x, y):
    def loss(weights):
      leaves = np.split(weights, ends)
      tree = {
        name: leaf.reshape(params[name].shape)
        for name, leaf in zip(names, leaves, strict=True)
      }
      value, grads = network_value_and_grad(
        tree, x, y, normalize_logits=normalize_logits
      )
      return value, np.concatenate([grads[name].ravel() for name in names])

    def in_coordinates(u):
      value, gradient = loss(w + np.abs(w) * u)
      return value, np.abs(w) * gradient

    best = apgd(in_coordinates, w.size, rho, p, 20, published=published)
    return best - loss(w)[0]

  return np.mean([rise(x, y) for x, y in batches])
