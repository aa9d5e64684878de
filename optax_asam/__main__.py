"""``python -m optax_asam`` prints versions and devices, and checks a few steps.

Its output belongs in a bug report. The exit status is 1 if the check fails.
"""

import collections
from importlib import metadata
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_asam

_LEARNING_RATE, _RHO, _ETA, _STEPS = 0.1, 0.5, 0.01, 5
_PARAMS = np.array([2.0, -1.0, 0.5, 0.0])
_CURVATURE = np.array([1.0, 3.0, 0.5, 2.0])  # of the loss sum(c w^2) / 2


def main() -> int:
  """Prints what a bug report needs, and returns the exit status."""
  print(f'optax_asam {optax_asam.__version__}')
  print(f'Python {platform.python_version()}, {platform.platform()}')
  for name in ('jax', 'jaxlib', 'optax', 'flax', 'equinox'):
    try:
      print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
      print(name, 'is not installed')
  devices = collections.Counter(device.device_kind for device in jax.devices())
  print('devices:', *(f'{n} x {kind}' for kind, n in devices.items()))

  error = np.abs(_steps() - _steps_by_formula()).max()
  summary = f'the error after {_STEPS} steps of asam(optax.sgd) is {error:.0e}'
  if error < 1e-5:  # False for NaN.
    print(f'self-check passed: {summary}')
    return 0
  sys.stdout.flush()
  print(
    f'self-check failed: {summary}. Please report it, with this output.',
    file=sys.stderr,
  )
  return 1


def _steps() -> np.ndarray:
  """The parameters after a few jitted steps."""
  tx = optax_asam.asam(optax.sgd(_LEARNING_RATE), _RHO, _ETA)
  params, curvature = (jnp.float32(x) for x in (_PARAMS, _CURVATURE))

  @jax.jit
  def train_step(params, opt_state):
    grad_fn = jax.grad(lambda w: jnp.sum(curvature * w**2) / 2)
    updates, opt_state = tx.update(
      grad_fn(params), opt_state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), opt_state

  opt_state = tx.init(params)
  for _ in range(_STEPS):
    params, opt_state = train_step(params, opt_state)
  return np.asarray(params, np.float64)


def _steps_by_formula() -> np.ndarray:
  """The same in NumPy and float64."""
  w = _PARAMS
  for _ in range(_STEPS):
    t = np.abs(w) + _ETA
    g = _CURVATURE * w
    eps = _RHO * t**2 * g / np.linalg.norm(t * g)
    w = w - _LEARNING_RATE * _CURVATURE * (w + eps)
  return w


if __name__ == '__main__':
  sys.exit(main())
