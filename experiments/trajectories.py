r"""Draws the paper's trajectories of SAM and ASAM, and their balls.

::

    python experiments/trajectories.py --out out/trajectories

Two weights, and the loss :math:`L(w) = |w_1 \operatorname{ReLU}(w_2) - 0.04|`.
Its minima are a valley, the hyperbola :math:`w_1 w_2 = 0.04`. With h = (w_2,
w_1), and s = 1 above the valley, -1 below it, the gradient there is s h, and a
step is exactly

.. math::
  \text{SAM:} \quad w \mapsto w - s \, \mathrm{lr} \, h
    - \mathrm{lr} \, \rho \, w / \|w\|_2, \qquad
  \text{ASAM:} \quad w \mapsto w
    - s \, \mathrm{lr} \, (1 + s \rho / \sqrt 2) \, h

while the perturbation leaves :math:`w_2` positive. Both go along the gradient
to the valley, and then cross it to and fro. SAM is drawn towards the origin as
well, and so along the valley to (0.2, 0.2), its point of the smallest norm.
ASAM is not: it stays about where it has reached the valley. A zigzag alone, as
that of SGD, leads to (0.2, 0.2) too, but only with :math:`\mathrm{lr}^2`: 100
steps take ASAM a fifth of the way from the first start, 2000 steps all of it.

SAM's perturbation has length :math:`\rho`, however small w is. Below the valley
it takes :math:`\rho \, w_1 / \|w\|_2` from :math:`w_2`. Where that is all there
is, the ReLU is dead at the perturbed weights, the second gradient is zero, and
SAM stands still for ever: at every w below the valley with :math:`w_2 \|w\|_2
\le \rho \, w_1`. At :math:`w_1` = 0.3 and :math:`\rho` = 0.05 this goes up to
:math:`w_2` = 0.0493. ASAM's perturbation there is :math:`-\rho \, w / \sqrt 2`,
which takes no more than a part of :math:`w_2`.

The second picture is of a scaling that changes no value of the loss, A =
diag(3, 1/3), at w = (1, 1). ASAM's ball is scaled with the weights, and the
loss rises in it as far as before; SAM's ball stays, and the loss rises further.

References:
  Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021. The loss and
  the settings were fitted to the figure that is published there.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
import numpy as np
import optax

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
from optax_asam import asam
from optax_asam import ascent
from optax_asam import normalization
from optax_asam import sam
from optax_asam import sharpness
import records

LEARNING_RATE = 0.05
RHO = 0.05
ETA = 0.0
# After 100 steps SAM is nearest to where the published picture ends.
STEPS = 100
STARTS = ((0.2, 0.05), (0.3, 0.033))
# What is known of the published picture: an optimizer, the number of a start, a
# step, and the weights there as one reads them off.
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
BALL_RHO = 0.3  # Large enough to be seen.
NORMALIZATIONS = {
  'sam': normalization.identity(),
  'asam': normalization.elementwise(ETA),
}

NAMES = {'sam': 'SAM', 'asam': 'ASAM'}
# Dark enough on white, and told apart by the colour-blind (Okabe and Ito).
COLORS = {'sam': '#0072b2', 'asam': '#d55e00'}


def loss_fn(w: jax.typing.ArrayLike) -> jax.Array:
  """The loss of weights [..., 2]."""
  w = jnp.asarray(w)
  return jnp.abs(w[..., 0] * jax.nn.relu(w[..., 1]) - 0.04)


@functools.partial(jax.jit, static_argnums=(0, 2))
def follow(
  tx: optax.GradientTransformationExtraArgs, start: jax.Array, steps: int
) -> jax.Array:
  """The weights [steps + 1, 2] that ``tx`` visits, its start the first."""
  grad_fn = jax.grad(loss_fn)

  def step(carry: Any, _: None) -> tuple[Any, Any]:
    w, state = carry
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    w = optax.apply_updates(w, updates)
    return (w, state), w

  _, path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  return jnp.concatenate([start[None], path])


def stuck_below(w1: np.ndarray, rho: float) -> np.ndarray:
  """The w_2 up to which SAM stands still: w_2 ||w||_2 = rho w_1 there."""
  return w1 * np.sqrt((np.hypot(1, 2 * rho / w1) - 1) / 2)


def half_axes(name: str, w: jax.typing.ArrayLike) -> np.ndarray:
  """The half-axes of the ball of ``sam`` or ``asam`` around w."""
  t = NORMALIZATIONS[name](jnp.asarray(w))
  return BALL_RHO * np.broadcast_to(t, np.shape(w))


@functools.partial(jax.jit, static_argnums=0)
def perturb(name: str, w: jax.Array) -> optax.Updates:
  """The perturbation of ``sam`` or ``asam`` in the ball around w."""
  tx = ascent.rho_ball(BALL_RHO, ETA, NORMALIZATIONS[name])
  return tx.update(jax.grad(loss_fn)(w), tx.init(w), w)[0]


@functools.partial(jax.jit, static_argnums=0)
def measure_sharpness(name: str, w: jax.Array) -> jax.Array:
  """The maximum of L(w + eps) - L(w) over the ball of ``sam`` or ``asam``."""
  return sharpness.worst_case(
    loss_fn, w, BALL_RHO, normalization=NORMALIZATIONS[name]
  )


def compute_trajectories() -> dict[str, Any]:
  """What results.json holds of the first picture."""
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
  """What results.json holds of the second picture."""
  points = np.array([POINT, np.multiply(SCALING, POINT)])
  return {
    'settings': {'rho': BALL_RHO, 'eta': ETA, 'scaling': SCALING},
    'points': to_list(points),
    'losses': to_list(loss_fn(points)),
    'perturbations': {
      name: to_list([perturb(name, jnp.asarray(w)) for w in points])
      for name in NAMES
    },
    'sharpness': {
      name: to_list([measure_sharpness(name, jnp.asarray(w)) for w in points])
      for name in NAMES
    },
  }


def to_list(x: Any) -> Any:
  """``x`` as lists of numbers, with the digits that float32 has for sure."""
  return np.round(np.asarray(x, np.float64), 6).tolist()


def write_trajectories(path: Path, results: Mapping[str, Any]) -> None:
  """Draws the paper's figure."""
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
  # After all paths, so that none is drawn over an end.
  for name, ends in results['end_points'].items():
    axes.plot(
      *np.transpose(ends),
      color=COLORS[name],
      label=f'{NAMES[name]}, and where it ends',
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
  finish(figure, axes, path)


def draw_loss(axes: Axes, rho: float) -> None:
  """Draws the loss around the valley, and where SAM stands still."""
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
    'Here SAM stands still: its perturbation kills the ReLU',
    color=COLORS['sam'],
    bbox={'color': 'white', 'pad': 2},
  )
  axes.set(xlim=w1[[0, -1]], ylim=w2[[0, -1]])


def write_balls(path: Path, results: Mapping[str, Any]) -> None:
  """Draws the balls around w and A w, and the contours that they reach."""
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
      rf'{NAMES[name]}, ${norm} \leq {rho:g}$: max L(w + $\epsilon$) - L(w) ='
      rf' {at_w:.3f} at w, {at_scaled_w:.3f} at A w'
    )
    # Around w = (1, 1), where |w| = 1, both balls are the same.
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
  finish(figure, axes, path)


def finish(figure: Figure, axes: Axes, path: Path) -> None:
  """Names the axes, draws both to one scale, and writes the figure."""
  axes.set(xlabel='$w_1$', ylabel='$w_2$', aspect='equal')
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path)


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(
    description="Draws the paper's trajectories of SAM and ASAM.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--out', type=Path, default='out/trajectories', help='folder for the files'
  )
  args = parser.parse_args(argv)
  results = {
    **records.provenance('experiments/trajectories.py', argv),
    'trajectories': compute_trajectories(),
    'balls': compute_balls(),
  }
  args.out.mkdir(parents=True, exist_ok=True)
  records.write_json(args.out / 'results.json', results)
  write_trajectories(args.out / 'trajectories.png', results['trajectories'])
  write_balls(args.out / 'balls.png', results['balls'])


if __name__ == '__main__':
  main(sys.argv[1:])
