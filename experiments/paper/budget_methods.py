"""What ``experiments.paper.budget`` compares: methods by name.

To add one, write how its optimizer is made and what a step costs.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import chex
import optax

import optax_asam
from optax_asam import ascent
from optax_asam import descent
from optax_asam import normalization

Tx = optax.GradientTransformation


class Run(NamedTuple):
  """What a method may depend on besides its own values.

  Attributes:
    base_tx: From a weight decay, by default the recipe's, to the optimizer.
    num_steps: The number of steps of the run, possibly traced.
    mask: What is trained, and so perturbed; None for everything.
  """

  base_tx: Callable[..., Tx]
  num_steps: chex.Numeric
  mask: Callable[[Any], Any] | None = None


class Method(NamedTuple):
  """A method.

  Attributes:
    title: Its name in tables.
    make_tx: Makes its optimizer from a run, and the values of a candidate.
    gradients: The mean number of gradients of a step, in those of a batch.
    candidates: Values that are tried. Without a rho, there is one candidate.
    epochs: The number of epochs, as a multiple of the task's.
    ascent_part: The ascent is on the first 1 / ``ascent_part`` of a batch.
    second_gradient: Whether the optimizer takes another gradient.
    eval_params: From its state and the parameters to those to be evaluated,
      if they are others.
    names: What the values are called, if there are candidates.
    has_rho: Whether the first value is a rho, which the recipe scales.
    tunes_decay: Whether the other value is a weight decay, of the recipe's
      candidates.
    is_applicable: Whether the recipe of a task can be trained with it.
  """

  title: str
  make_tx: Callable[..., Tx]
  gradients: float
  candidates: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
  epochs: int = 1
  ascent_part: int = 1
  second_gradient: bool = True
  eval_params: Callable[[Any, Any], Any] | None = None
  names: tuple[str, ...] = ('rho',)
  has_rho: bool = True
  tunes_decay: bool = False
  is_applicable: Callable[[Any], bool] = lambda recipe: True


def radii(*values: float) -> tuple[tuple[float, float], ...]:
  """Candidates that are a rho alone."""
  return tuple((rho, 0.0) for rho in values)


def grid(
  rhos: tuple[float, float], others: tuple[float, float]
) -> tuple[tuple[float, float], ...]:
  """As many candidates for a rho and another parameter."""
  return tuple((rho, other) for rho in rhos for other in others)


SAM = radii(0.05, 0.1, 0.2, 0.4)
ASAM = radii(0.25, 0.5, 1.0, 2.0)


def base(run: Run, rho: chex.Numeric, other: chex.Numeric) -> Tx:
  """The optimizer of the recipe."""
  del rho, other
  return run.base_tx()


def tuned(run: Run, rho: chex.Numeric, weight_decay: chex.Numeric) -> Tx:
  """The same with another weight decay."""
  del rho
  return run.base_tx(weight_decay)


def with_decay(wrap: Callable[..., Tx]) -> Callable[..., Tx]:
  """Makes a method that takes another weight decay as well as rho."""

  def make_tx(run, rho, weight_decay):
    return wrap(run.base_tx(weight_decay), rho=rho, mask=run.mask)

  return make_tx


def make(
  wrap: Callable[..., Tx], name: str | None = None, **options: Any
) -> Callable[..., Tx]:
  """How a function of the library makes a method.

  Args:
    wrap: A function of a base optimizer and rho.
    name: The keyword of the other value, if there is one.
    **options: Other arguments of ``wrap``.
  """

  def make_tx(run, rho, other):
    others = {name: other} if name else {}
    given = {'mask': run.mask, **options, **others}
    return wrap(run.base_tx(), rho=rho, **given)

  return make_tx


def momentum(run: Run, rho: chex.Numeric, other: chex.Numeric) -> Tx:
  """Momentum ASAM, with a momentum of its own if the base splits the tree."""
  del other
  return optax_asam.momentum_asam(
    run.base_tx(),
    rho,
    mask=run.mask,
    momentum=None if run.mask is None else 0.9,
  )


def late(run: Run, rho: chex.Numeric, other: chex.Numeric) -> Tx:
  """ASAM in the last 20% of training."""
  del other
  first = 0.8 * run.num_steps
  return optax_asam.asam(
    run.base_tx(), rho, mask=run.mask, when=lambda step: step >= first
  )


def descending(make_descent: Callable[..., Any]) -> Callable[..., Tx]:
  """Makes SAM with a descent, of which the other value is the parameter."""

  def make_tx(run, rho, other):
    return optax_asam.sam(
      run.base_tx(), rho, mask=run.mask, descent=make_descent(other)
    )

  return make_tx


def friendly(run: Run, rho: chex.Numeric, other: chex.Numeric) -> Tx:
  """SAM with the ascent of F-SAM."""
  del other
  ball = ascent.rho_ball(rho, eta=0.0, adaptive=False, mask=run.mask)
  return optax.chain(
    optax_asam.sharpness_aware(optax.chain(ascent.friendly(), ball)),
    run.base_tx(),
  )


METHODS: dict[str, Method] = {
  'base': Method('base', base, 1, second_gradient=False),
  'base_twice': Method(
    'base, twice the epochs', base, 1, epochs=2, second_gradient=False
  ),
  'base_tuned': Method(
    'base, weight decay tuned',
    tuned,
    1,
    names=('', 'weight decay'),
    tunes_decay=True,
    second_gradient=False,
  ),
  'sam': Method('SAM', make(optax_asam.sam), 2, SAM),
  'sam_tuned': Method(
    'SAM, weight decay tuned',
    with_decay(optax_asam.sam),
    2,
    radii(0.1, 0.2),
    names=('rho', 'weight decay'),
    tunes_decay=True,
  ),
  'asam': Method('ASAM', make(optax_asam.asam), 2, ASAM),
  'asam_tuned': Method(
    'ASAM, weight decay tuned',
    with_decay(optax_asam.asam),
    2,
    radii(0.5, 1.0),
    names=('rho', 'weight decay'),
    tunes_decay=True,
  ),
  'momentum_asam': Method(
    'momentum ASAM',
    momentum,
    1,
    radii(0.5, 1.0, 2.0, 4.0),
    second_gradient=False,
    eval_params=optax_asam.eval_params,
  ),
  'quarter': Method(
    'ASAM, ascent on a quarter of the batch',
    make(optax_asam.asam),
    1.25,
    ASAM,
    ascent_part=4,
  ),
  'every_5': Method(
    'ASAM on every 5th step', make(optax_asam.asam, every_k=5), 1.2, ASAM
  ),
  'late_20': Method('ASAM in the last 20%', late, 1.2, ASAM),
  'looksam': Method(
    'LookSAM',
    make(optax_asam.looksam, 'alpha', every_k=5),
    1.2,
    grid((0.5, 1.0), (0.1, 0.5)),
    names=('rho', 'alpha'),
  ),
  'gsam': Method(
    'GSAM',
    descending(descent.gsam),
    2,
    grid((0.1, 0.2), (0.1, 0.4)),
    names=('rho', 'alpha'),
  ),
  'wsam': Method(
    'WSAM',
    descending(descent.wsam),
    2,
    grid((0.05, 0.1), (0.7, 0.9)),
    names=('rho', 'gamma'),
  ),
  'friendly': Method('F-SAM', friendly, 2, SAM),
  'normalization': Method(
    'ASAM, normalization layers alone',
    make(optax_asam.asam, mask=normalization.normalization_layers),
    2,
    radii(0.5, 1.0, 2.0, 4.0),
    is_applicable=lambda recipe: recipe.has_normalization,
  ),
}


def candidates(method: Method, recipe: Any) -> list[tuple[float, float]]:
  """The candidates of a method for a recipe."""
  scale = recipe.rho_scale if method.has_rho else 1
  scaled = [(scale * rho, other) for rho, other in method.candidates]
  if not method.tunes_decay:
    return scaled
  decays = recipe.weight_decays
  if len(scaled) > 1:  # Fewer of each, for as many candidates in all.
    decays = decays[1:-1]
  return [(rho, decay) for rho, _ in scaled for decay in decays]
