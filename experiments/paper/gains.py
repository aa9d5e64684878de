"""Where SAM and ASAM help: their gains over the base in all recorded settings.

Those of the comparisons, of the study of label noise, and of
``experiments.paper.budget`` and ``fine_tuning``.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
import numpy as np

from experiments.paper import tables
from experiments.report import reporting
from optax_asam import plotting

METHODS = {
  'sam': ('SAM', plotting.COLORS['sam'], -0.2),
  'asam': ('ASAM', plotting.COLORS['asam'], 0.0),
  'momentum_asam': ('momentum ASAM', plotting.COLORS['momentum_asam'], 0.2),
}
MODELS = {'mlp': 'MLP', 'cnn': 'CNN', 'cnn-bn': 'CNN with BatchNorm'}


class Setting(NamedTuple):
  """A data set and a recipe.

  Attributes:
    title: What it is.
    noise: The fraction of labels that are replaced.
    per_seed: Test accuracies by method, in percent; 'base' among them.
  """

  title: str
  noise: float
  per_seed: dict[str, np.ndarray]

  def gain(self, method: str) -> tuple[float, float]:
    """The mean gain over the base and half its interval, paired by seed."""
    gains = self.per_seed[method] - self.per_seed['base']
    mean, half_width = reporting.t_interval(gains)
    return float(mean), float(half_width)


def settings() -> list[Setting]:
  """Everything recorded, clean labels first."""
  return sorted(
    [*_compared(), *_studied(), *_raced()],
    key=lambda each: (each.noise, each.title),
  )


def _compared() -> Iterator[Setting]:
  for result in tables.load(tables.RESULTS / 'comparisons').values():
    methods = result['optimizers']
    is_plain = result['config']['perturb'] == 'all'
    if is_plain and {'sgd', 'sam', 'asam'} <= set(methods):
      yield _setting(_title(result['config']), result)


def _studied() -> Iterator[Setting]:
  for result in tables.load_study():
    config = result['config']
    title = f'{_title(config)}, {config["epochs"]} epochs, lr {config["lr"]:g}'
    yield _setting(title, result)


def _title(config):
  # Fashion-MNIST has 60,000 training images, of which 5,000 are held out.
  held_out = 0 if config['merge_held_out'] else 5_000
  size = config['train_size'] or 60_000 - held_out
  return f'{MODELS[config["model"]]}, {size:,} images'


def _setting(title, result):
  noise = result['config']['label_noise']
  return Setting(
    _titled(title, noise),
    noise,
    {
      'base' if method == 'sgd' else method: 100
      * np.asarray(found['test_accuracy']['per_seed'])
      for method, found in result['optimizers'].items()
    },
  )


def _raced() -> Iterator[Setting]:
  for program in tables.RACES:
    results = tables.read(program)
    num_seeds = len(results['config']['seeds'])
    for name, task in results['tasks'].items():
      metric = f'test_{task.get("metric", "accuracy")}'
      yield Setting(
        f'{task["title"]}, {num_seeds} seeds',
        results['config']['tasks'][name]['label_noise'],
        {
          method: 100 * np.asarray(found['summary'][metric]['per_seed'])
          for method, found in task['methods'].items()
          if 'summary' in found and method in {'base', *METHODS}
        },
      )


def _titled(title: str, noise: float) -> str:
  return f'{title}, {100 * noise:g}% label noise' if noise else title


def draw(found: Sequence[Setting]) -> Figure:
  """Gains by setting: clean labels above, label noise below."""
  groups = [
    [each for each in found if not each.noise],
    [each for each in found if each.noise],
  ]
  figure = Figure(
    figsize=(8, 0.3 * len(found) + 1.4), dpi=150, layout='constrained'
  )
  all_axes = figure.subplots(
    2, 1, height_ratios=[len(group) + 1 for group in groups]
  )
  for axes, group in zip(all_axes, groups, strict=True):
    for method, (title, color, shift) in METHODS.items():
      points = [
        (*each.gain(method), y + shift)
        for y, each in enumerate(group)
        if method in each.per_seed
      ]
      means, half_widths, ys = np.transpose(points)
      axes.errorbar(
        means,
        ys,
        xerr=half_widths,
        color=color,
        label=title,
        linestyle='none',
        marker='o',
        markersize=3,
      )
    axes.axvline(0, color='#555555', linewidth=1)
    axes.set(
      yticks=range(len(group)),
      yticklabels=[each.title for each in group],
      ylim=(len(group) - 0.5, -0.5),
    )
    axes.tick_params(axis='y', labelsize=8)
    plotting.tidy(axes)
  # Intervals with a seed that failed would hide the others.
  all_axes[1].set_xlim(-10, 60)
  all_axes[0].legend(loc='lower left', fontsize=8, frameon=False)
  all_axes[1].set_xlabel('Test accuracy minus that of the base (points)')
  return figure
