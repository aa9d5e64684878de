r"""Draws the paper's trajectories of SAM and ASAM, and their balls.

::

    python -m experiments.paper.trajectories --out out/trajectories

Two weights, and the loss :math:`L(w) = |w_1 \operatorname{ReLU}(w_2) - 0.04|`,
whose minima form a valley, the hyperbola :math:`w_1 w_2 = 0.04`. With h = (w_2,
w_1), and s = 1 above the valley and -1 below it, the gradient is s h. As long
as the perturbation leaves :math:`w_2` positive, a step is exactly

.. math::
  \text{SAM:} \quad w \mapsto w - s \, \mathrm{lr} \, h
    - \mathrm{lr} \, \rho \, w / \|w\|_2, \qquad
  \text{ASAM:} \quad w \mapsto w
    - s \, \mathrm{lr} \, (1 + s \rho / \sqrt 2) \, h

Both descend into the valley and then oscillate across it. SAM is also pulled
towards the origin, and so drifts along the valley to (0.2, 0.2), its point of
smallest norm. ASAM stays close to where it reached the valley: the oscillation
alone, as in SGD, leads to (0.2, 0.2) too, but only at order
:math:`\mathrm{lr}^2`. From the first start, 100 steps take ASAM a fifth of the
way, 2000 steps all of it.

SAM's perturbation has length :math:`\rho` however small w is. Below the valley
it subtracts :math:`\rho \, w_1 / \|w\|_2` from :math:`w_2`; if nothing is
left, the ReLU is dead at the perturbed weights, the second gradient is zero,
and SAM never moves: at every w below the valley with :math:`w_2 \|w\|_2 \le
\rho \, w_1`. ASAM's perturbation there, :math:`-\rho \, w / \sqrt 2`, only
ever takes a fraction of :math:`w_2`.

The second figure shows a scaling that leaves the loss unchanged, A = diag(3,
1/3), at w = (1, 1). ASAM's ball scales with the weights and the loss rises in
it by as much as before; SAM's ball does not, and the loss rises further.

References:
  Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021. The loss and
  the settings were fitted to the figure published there.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
import numpy as np
import optax

from experiments import cli
from experiments import run_folder
from experiments.report import records
from experiments.report import reporting
from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import plotting
from optax_asam import sam
from optax_asam import sharpness

LEARNING_RATE = 0.05
RHO = 0.05
ETA = 0.0
# After 100 steps SAM is closest to where the published figure ends.
STEPS = 100
STARTS = ((0.2, 0.05), (0.3, 0.033))
# Read off the published figure: optimizer, start, step, and the weights there.
PUBLISHED = (
  ('sam', 0, 12, (0.237, 0.168)),
  ('sam', 0, STEPS, (0.206, 0.194)),
  ('sam', 1, STEPS, (0.3, 0.033)),
  ('asam', 0, STEPS, (0.25, 0.16)),
  ('asam', 1, 6, (0.32, 0.125)),
)
OPTIMIZERS = {
  'sam': sam(optax.sgd(LEARNING_RATE), rho=RHO),
  'asam': asam(optax.sgd(LEARNING_RATE), rho=RHO, eta=ETA),
}

POINT = (1.0, 1.0)
SCALING = (3.0, 1 / 3)
BALL_RHO = 0.3  # Large enough to see.
NORMALIZATIONS = {
  'sam': normalization.identity(),
  'asam': normalization.elementwise(ETA),
}

COLORS = plotting.COLORS


def loss_fn(w: jax.typing.ArrayLike) -> jax.Array:
  """The loss of weights [..., 2]."""
  w = jnp.asarray(w)
  return jnp.abs(w[..., 0] * jax.nn.relu(w[..., 1]) - 0.04)


@functools.partial(jax.jit, static_argnums=(0, 2))
def follow(
  tx: optax.GradientTransformationExtraArgs, start: jax.Array, steps: int
) -> jax.Array:
  """The weights [steps + 1, 2] that ``tx`` visits, including the start."""
  grad_fn = jax.grad(loss_fn)

  def step(carry: Any, _: None) -> tuple[Any, Any]:
    w, state = carry
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    w = optax.apply_updates(w, updates)
    return (w, state), w

  _, path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  return jnp.concatenate([start[None], path])


def stuck_below(w1: np.ndarray, rho: float) -> np.ndarray:
  """The w_2 up to which SAM never moves: w_2 ||w||_2 = rho w_1 there."""
  return w1 * np.sqrt((np.hypot(1, 2 * rho / w1) - 1) / 2)


def half_axes(name: str, w: jax.typing.ArrayLike) -> np.ndarray:
  """The half-axes of the ball of ``sam`` or ``asam`` around w."""
  t = NORMALIZATIONS[name](jnp.asarray(w))
  return BALL_RHO * np.broadcast_to(t, np.shape(w))


@functools.partial(jax.jit, static_argnums=0)
def perturb(name: str, w: jax.Array) -> jax.Array:
  """The perturbation of ``sam`` or ``asam`` in the ball around w."""
  tx = ascent.steepest_ascent(NORMALIZATIONS[name])
  eps: Any = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)[0]
  return BALL_RHO * eps


@functools.partial(jax.jit, static_argnums=0)
def measure_sharpness(name: str, w: jax.Array) -> jax.Array:
  """The maximum of L(w + eps) - L(w) over the ball of ``sam`` or ``asam``."""
  return sharpness.worst_case(
    loss_fn, w, BALL_RHO, normalization=NORMALIZATIONS[name]
  )


def compute_trajectories() -> dict[str, Any]:
  """The entry of results.json for the first figure."""
  paths = {
    name: [np.asarray(follow(tx, jnp.array(start), STEPS)) for start in STARTS]
    for name, tx in OPTIMIZERS.items()
  }
  ends = {name: np.stack(paths[name])[:, -1] for name in paths}
  return {
    'settings': {
      'learning_rate': LEARNING_RATE,
      'rho': RHO,
      'eta': ETA,
      'steps': STEPS,
      'starts': STARTS,
    },
    'end_points': {name: to_list(ends[name]) for name in ends},
    'end_losses': {name: to_list(loss_fn(ends[name])) for name in ends},
    'beside_the_published': [
      {
        'optimizer': name,
        'start': STARTS[start],
        'step': step,
        'published': published,
        'here': to_list(paths[name][start][step]),
        'distance': to_list(np.hypot(*(paths[name][start][step] - published))),
      }
      for name, start, step, published in PUBLISHED
    ],
    'paths': {name: to_list(paths[name]) for name in paths},
  }


def compute_balls() -> dict[str, Any]:
  """The entry of results.json for the second figure."""
  points = np.array([POINT, np.multiply(SCALING, POINT)])
  return {
    'settings': {'rho': BALL_RHO, 'eta': ETA, 'scaling': SCALING},
    'points': to_list(points),
    'losses': to_list(loss_fn(points)),
    'perturbations': {
      name: to_list([perturb(name, jnp.asarray(w)) for w in points])
      for name in NORMALIZATIONS
    },
    'sharpness': {
      name: to_list([measure_sharpness(name, jnp.asarray(w)) for w in points])
      for name in NORMALIZATIONS
    },
  }


def table(results: Mapping[str, Any]) -> str:
  """The published points and those of the library in Markdown."""
  rows = []
  for each in results['beside_the_published']:
    start = 'first' if each['start'] == [*STARTS[0]] else 'second'
    step = 'end' if each['step'] == STEPS else f'{each["step"]} steps'
    published = ', '.join(f'{x:g}' for x in each['published'])
    here = ', '.join(f'{x:.3f}' for x in each['here'])
    title = f'{each["optimizer"].upper()}, {start} start, {step}'
    rows.append([title, f'({published})', f'({here})'])
  return reporting.markdown(['', 'published', 'here'], rows)


def to_list(x: Any) -> Any:
  """``x`` as lists, rounded to the digits that float32 guarantees."""
  return np.round(np.asarray(x, np.float64), 6).tolist()


def draw_trajectories(results: Mapping[str, Any]) -> Figure:
  """Draws the paper's figure."""
  results = results['trajectories']
  settings = results['settings']
  figure = Figure(figsize=(6.4, 7), dpi=150, layout='constrained')
  axes = figure.subplots()
  draw_loss(axes, settings['rho'])
  for name, paths in results['paths'].items():
    for points in paths:
      axes.plot(
        *np.transpose(points),
        color=COLORS[name],
        linewidth=0.6,
        marker='.',
        markersize=3.5,
      )
  # After all paths, so that no path covers an end.
  for name, ends in results['end_points'].items():
    axes.plot(
      *np.transpose(ends),
      color=COLORS[name],
      label=f'{name.upper()} (end point)',
      linestyle='',
      marker='o',
      markeredgecolor='white',
      markersize=9,
    )
  axes.plot(*np.transpose(settings['starts']), 'kx', label='start')
  axes.set(
    title=f'{settings["steps"]} steps, lr = {settings["learning_rate"]:g},'
    rf' $\rho$ = {settings["rho"]:g}, $\eta$ = {settings["eta"]:g}'
  )
  axes.legend(framealpha=1, loc='upper right')
  finish(axes)
  return figure


def draw_loss(axes: Axes, rho: float) -> None:
  """Draws the loss around the valley, and where SAM never moves."""
  w1, w2 = np.linspace(0.16, 0.36, 401), np.linspace(0, 0.24, 481)
  contours = axes.contour(
    w1,
    w2,
    loss_fn(np.stack(np.meshgrid(w1, w2), axis=-1)),
    np.linspace(0.005, 0.035, 7),
    colors='0.8',
    linewidths=0.8,
  )
  axes.clabel(contours, fontsize=7, colors='0.5')
  gray = '0.4'
  axes.plot(w1, 0.04 / w1, color=gray, linestyle='--', linewidth=1)
  axes.text(0.176, 0.231, 'valley: L = 0', color=gray)
  axes.plot(w1, w1, color=gray, linestyle=':', linewidth=1)
  axes.text(0.226, 0.22, '$w_1 = w_2$', color=gray)
  axes.fill_between(
    w1,
    stuck_below(w1, rho),
    edgecolor=to_rgba(COLORS['sam'], alpha=0.25),
    facecolor='none',
    hatch='///',
    linewidth=0,
  )
  axes.text(
    0.165,
    0.008,
    'SAM never moves here: its perturbation kills the ReLU',
    color=COLORS['sam'],
    bbox={'color': 'white', 'pad': 2},
  )
  axes.set(xlim=w1[[0, -1]], ylim=w2[[0, -1]])


def draw_balls(results: Mapping[str, Any]) -> Figure:
  """Draws the balls around w and A w, and the contours they reach."""
  results = results['balls']
  points, value = np.array(results['points']), results['losses'][0]
  rho, sharpnesses = results['settings']['rho'], results['sharpness']
  figure = Figure(figsize=(8, 4.3), dpi=150, layout='constrained')
  axes = figure.subplots()
  w1, w2 = np.meshgrid(np.linspace(0.5, 4.1, 721), np.linspace(0, 1.5, 301))
  draw_contour = functools.partial(
    axes.contour, w1, w2, loss_fn(np.stack([w1, w2], axis=-1))
  )
  draw_contour(np.arange(0.36, 4, 0.4), colors='0.85', linewidths=0.8)
  contour = draw_contour([value], colors='black')
  axes.clabel(contour, fmt=f'L(w) = {value:.2f}', manual=[(1.8, 0.55)])
  for name, norm, linestyle, label_at in (
    ('sam', r'\|\epsilon\|_2', '-', (1.9, 1.0)),
    ('asam', r'\|\epsilon\,/\,|w|\,\|_2', (0, (4, 3)), (1.9, 0.78)),
  ):
    color = COLORS[name]
    at_w, at_scaled_w = sharpnesses[name]
    contour = draw_contour(
      [value + at_scaled_w], colors=color, linestyles='--', linewidths=1
    )
    axes.clabel(contour, fmt=f'L(w) + {at_scaled_w:.3f}', manual=[label_at])
    label = (
      rf'{name.upper()}, ${norm} \leq {rho:g}$: max L(w + $\epsilon$) - L(w) ='
      rf' {at_w:.3f} at w, {at_scaled_w:.3f} at A w'
    )
    # At w = (1, 1), where |w| = 1, the two balls coincide.
    for w, eps in zip(points, results['perturbations'][name], strict=True):
      ball = Ellipse(
        w,
        *(2 * half_axes(name, w)),
        edgecolor=color,
        fill=False,
        label=label,
        linestyle=linestyle,
        linewidth=2,
      )
      axes.add_patch(ball)
      arrow = {'arrowstyle': '->', 'color': color, 'shrinkA': 0, 'shrinkB': 0}
      axes.annotate('', w + eps, w, arrowprops={**arrow, 'linewidth': 1.5})
      label = None
  axes.plot(*points.T, 'ko', markersize=5)
  axes.text(1, 0.6, 'w = (1, 1)', ha='center')
  axes.text(3.3, 0.1, 'A w = (3, 1/3)')
  figure.legend(frameon=False, loc='outside lower center')
  finish(axes)
  return figure


def finish(axes: Axes) -> None:
  """Labels the axes, and gives them one scale."""
  axes.set(xlabel='$w_1$', ylabel='$w_2$', aspect='equal')
  axes.spines[['top', 'right']].set_visible(False)


def main(argv: Sequence[str]) -> None:
  """Computes both figures and writes them with their numbers."""
  parser = cli.Parser(
    prog='trajectories',
    description="Draws the paper's trajectories of SAM and ASAM.",
  )
  add = parser.add_argument
  add('--out', type=Path, default=Path('out/trajectories'), help='for results')
  args = parser.parse_args(argv)
  results = {
    **records.provenance('experiments.paper.trajectories', argv),
    'trajectories': compute_trajectories(),
    'balls': compute_balls(),
  }
  args.out.mkdir(parents=True, exist_ok=True)
  records.write_json(args.out / run_folder.RESULTS, results)
  for name, draw in (
    ('trajectories', draw_trajectories),
    ('balls', draw_balls),
  ):
    records.write_figure(args.out / f'{name}.png', draw(results))


if __name__ == '__main__':
  cli.run(main)
