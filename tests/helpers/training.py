"""The loops of ASAM and momentum ASAM, written out, for tests of trainers."""

import jax
import jax.numpy as jnp
import optax

import optax_asam
from optax_asam import normalization
from tests.helpers.support import error


def asam_loop(loss_fn, params, batches, base_tx, extra=None, **kwargs):
  """Trains with ``asam``; ``loss_fn(params, extra, batch)`` has ``extra`` aux.

  Both passes of a step see the same ``extra``, and that of the clean pass is
  kept.
  """
  tx = optax_asam.asam(base_tx, **kwargs)

  @jax.jit
  def step(params, state, extra, batch):
    grad_fn = jax.grad(loss_fn, has_aux=True)
    grads, new_extra = grad_fn(params, extra, batch)
    updates, state = tx.update(
      grads, state, params, grad_fn=lambda p: grad_fn(p, extra, batch)[0]
    )
    return optax.apply_updates(params, updates), state, new_extra

  state = tx.init(params)
  for batch in batches:
    params, state, extra = step(params, state, extra, batch)
  return params, extra


def assert_asam(trained, *args, **kwargs):
  """Fails unless a trainer's parameters are those of ``asam_loop``."""
  expected, extra = asam_loop(*args, **kwargs)
  plain, _ = asam_loop(*args, **{**kwargs, 'rho': 0.0})
  assert error(trained, expected) < 1e-5
  assert error(trained, plain) > 1e-3
  return extra


def recorded(tx, records):
  """``tx``, which appends the leaves of parameters and gradients to a list."""

  def update_fn(updates, state, params=None, **extra_args):
    leaves = jax.tree.leaves(params), jax.tree.leaves(updates)
    jax.debug.callback(
      lambda *record: records.append(jax.device_get(record)), *leaves
    )
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def assert_momentum_asam(trained, evaluated, grad_fn, params, batches):
  """Fails unless ``trained`` is w + eps and ``evaluated`` is w; returns w.

  For ``momentum_asam(optax.sgd(0.1, momentum=0.9), rho=1.0)``, from the
  equations: eps = -rho T^2 m / ||T m||, with T at the new w.
  """

  @jax.jit
  def step(w, m, eps, batch):
    grads = grad_fn(optax.tree.add(w, eps), batch)
    m = jax.tree.map(lambda m, g: 0.9 * m + g, m, grads)
    w = jax.tree.map(lambda w, m: w - 0.1 * m, w, m)
    t = normalization.elementwise(0.01)(w)
    norm = optax.tree.norm(jax.tree.map(jnp.multiply, t, m))
    eps = jax.tree.map(lambda t, m: -t * t * m / norm, t, m)
    return w, m, eps

  zeros = jax.tree.map(jnp.zeros_like, params)
  w, m, eps = params, zeros, zeros
  for batch in batches:
    w, m, eps = step(w, m, eps, batch)
  assert error(evaluated, w) < 1e-5
  assert error(trained, optax.tree.add(w, eps)) < 1e-5
  assert error(trained, w) > 1e-3
  return w
