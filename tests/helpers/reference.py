"""The mathematics in NumPy float64, written to be read.

Trees are dicts from a name to an array, except in ``perturb``.
"""

import re

import jax
import jax.numpy as jnp
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


def perturb(params, grads, rho=0.5, eta=0.01):
  """``w + rho T^2 g / ||T g||`` with T = 1 at biases, |w| + eta elsewhere.

  For the parameter tree of any framework.
  """

  def operator(path, w):
    is_bias = re.search(r'\b(bias|b|offset)\b', jax.tree_util.keystr(path))
    return 1.0 if is_bias else np.abs(np.asarray(w, np.float64)) + eta

  t = jax.tree_util.tree_map_with_path(operator, params)
  scaled = jax.tree.map(lambda t, g: t * np.asarray(g, np.float64), t, grads)
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(scaled)))
  return jax.tree.map(
    lambda w, t, x: jnp.asarray(w + rho * t * x / norm, w.dtype),
    params,
    t,
    scaled,
  )


def squared_error(params, batch):
  """The loss of a dense layer, on NumPy or JAX arrays."""
  x, y = batch
  return ((x @ params['kernel'] + params['bias'] - y) ** 2).mean()


def squared_error_grad(params, batch):
  """The gradient of ``squared_error``."""
  x, y = batch
  residual = x @ params['kernel'] + params['bias'] - y
  return {
    'kernel': 2 * x.T @ residual / residual.size,
    'bias': 2 * residual.sum(0) / residual.size,
  }


def sgd(g, state, step):
  """An update of SGD(0.01, momentum=0.9), and its state, with the momentum.

  Args:
    g: the gradient, an array.
    state: None before the first step.
    step: the number of steps before.
  """
  del step
  (m,) = (0.0,) if state is None else state
  m = g + 0.9 * m
  return -0.01 * m, (m,)


def adam(g, state, step):
  """An update of Adam(0.01), and its moments."""
  m, v = (0.0, 0.0) if state is None else state
  m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
  m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
  return -0.01 * m_hat / (np.sqrt(v_hat) + 1e-8), (m, v)


CURVATURE = {'kernel': 0.7, 'bias': 1.3}


def polynomial(params):
  """A loss whose leaves are coupled by their sum, on NumPy or JAX arrays."""
  separate = sum(
    CURVATURE[k] * (w**2).sum() / 2 + (w**4).sum() / 4
    for k, w in params.items()
  )
  return separate + sum(w.sum() for w in params.values()) ** 2 / 10


def polynomial_grad(params):
  """The gradient of ``polynomial``."""
  total = sum(w.sum() for w in params.values())
  return {k: CURVATURE[k] * w + w**3 + total / 5 for k, w in params.items()}


def asam_run(
  params,
  steps,
  rho,
  *,
  p=2,
  ascent_steps=1,
  every_k=1,
  descent=None,
):
  """Steps of ASAM around SGD (lr 0.1, momentum 0.9) on ``polynomial``.

  Args:
    params: the initial parameters.
    steps: the number of steps.
    rho: a function from the step to the radius.
    p: the exponent.
    ascent_steps: the number of ascent steps.
    every_k: the second gradient is taken on steps 0, k, 2k, ...
    descent: as in the library.

  Returns:
    The parameters, and the parameters w + eps of the last second gradient.
  """
  add = lambda a, b, scale=1.0: {k: a[k] + scale * b[k] for k in a}
  momentum, perturbed = {k: 0 * w for k, w in params.items()}, params
  for step in range(steps):
    grads = polynomial_grad(params)
    if step % every_k == 0:
      perturbed, ascent_grads = params, grads
      for _ in range(ascent_steps):
        eps = perturbation(
          params,
          ascent_grads,
          elementwise(0.01),
          rho(step) / ascent_steps,
          p,
          {'kernel'},
          set(params),
        )
        perturbed = add(perturbed, eps)
        ascent_grads = polynomial_grad(perturbed)
      grads = descent(grads, ascent_grads) if descent else ascent_grads
    momentum = add(grads, momentum, 0.9)
    params = add(params, momentum, -0.1)
  return params, perturbed
