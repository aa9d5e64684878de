"""Promise: what CONTRIBUTING.md shows how to add works as it is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import sharpness_aware
from tests.helpers import cases
from tests.helpers import pages
from tests.helpers import reference
from tests.helpers.support import error

PAGE = (pages.ROOT / 'CONTRIBUTING.md').read_text()
SECTIONS = pages.read_snippets(PAGE)


def defined(title, index=0, module=None):
  """What a block of a section defines, next to what its module has."""
  code = SECTIONS[f'test_{pages.slug(title)}'][index]
  assert len(code.splitlines()) < 30
  names = vars(module) if module else {}
  return pages.run_snippet(code, **{'np': np, **names})


def entry(title, **modules):
  """The entry of a section for the table of test cases."""
  code = SECTIONS[f'test_{pages.slug(title)}'][-1]
  return eval(f'{{{code}}}', {**pages.NAMESPACE, **modules})


def added(module, *names):
  """A stand-in for a module to which names were added."""
  return type('Module', (), {**vars(module), **dict(*names)})


def updates(tx, params, grads):
  """Updates of ``tx`` where the loss is half of the sum of squares."""
  update = jax.jit(lambda g, s, w: tx.update(g, s, w, grad_fn=lambda w: w)[0])
  return update(grads, tx.init(params), params)


def numpy(tree):
  """A tree of NumPy arrays."""
  return jax.tree.map(np.asarray, tree)


def test_adding_a_normalization(params):
  """A step with it, compared with the reference by NumPy."""
  title = 'Adding a normalization'
  ours = defined(title, 0, normalization)['columnwise']
  by_hand = defined(title, 1)['columnwise']
  (case,) = entry(
    title,
    normalization=added(normalization, {'columnwise': ours}),
    reference=added(reference, {'columnwise': by_hand}),
  ).values()
  assert case == (ours, by_hand)
  assert {len(case) for case in cases.NORMALIZATIONS.values()} == {2}
  eps = reference.perturbation(
    numpy(params), numpy(params), by_hand(0.1), 0.5, 2, {'kernel'}, [*params]
  )
  tx = asam(optax.sgd(1.0), rho=0.5, adaptive=case[0](0.1))
  expected = jax.tree.map(lambda w, e: -(w + e), numpy(params), eps)
  assert error(updates(tx, params, params), expected) < 1e-6


def test_adding_an_ascent(params):
  """Each leaf is on the surface of its own ball; a zero gradient is at 0."""
  title = 'Adding an ascent'
  ours = defined(title, 0, ascent)['leafwise_ascent']
  (tx,) = entry(
    title,
    ascent=added(ascent, {'leafwise_ascent': ours}),
    normalization=normalization,
  ).values()
  assert {type(case) for case in cases.ASCENTS.values()} >= {type(tx)}
  grads = {**params, 'bias': jnp.zeros(2)}
  t = normalization.elementwise(0.05)(params)['kernel']
  tx = optax.chain(sharpness_aware(tx), optax.scale(-1.0))
  eps = jax.tree.map(lambda w, u: -u - w, params, updates(tx, params, grads))
  assert abs(np.linalg.norm(eps['kernel'] / t) - 1) < 1e-5
  assert error(t * t * params['kernel'] > 0, eps['kernel'] > 0) == 0
  assert abs(eps['bias']).max() == 0


def test_adding_a_descent(params):
  """A step with it descends the weighted mean."""
  title = 'Adding a descent'
  (descent,) = entry(title, **defined(title)).values()
  grads = jax.tree.map(jnp.ones_like, params)
  perturbed = updates(asam(optax.sgd(1.0)), params, grads)
  expected = jax.tree.map(lambda g, u: -0.75 * g + 0.25 * u, grads, perturbed)
  tx = asam(optax.sgd(1.0), descent=descent)
  assert error(updates(tx, params, grads), expected) < 1e-6


def test_every_snippet_is_tested():
  """Every section with code has its test."""
  pages.assert_all_tested(PAGE, SECTIONS, globals())


def test_layout():
  """The folders and files of the tree exist."""
  (tree,) = pages.blocks(PAGE, 'text')
  parent = pages.ROOT
  for line in tree.splitlines():
    inside = line.startswith('  ')
    names = [word for word in line.split() if word.endswith('/')]
    for name in names:
      folder = (parent if inside else pages.ROOT) / name
      assert folder.is_dir(), folder
    if not inside:
      parent = pages.ROOT / names[0]
