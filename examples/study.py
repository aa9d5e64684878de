"""Draws the study of label noise, and prints its table, from its results.

::

    python examples/study.py

``README.md`` beside this file says how the results were made. The figure goes
where they are, in ``examples/study``.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

import reporting

FOLDER = Path(__file__).parent / 'study'

HEADER = (
  'model',
  'wrong labels',
  'optimizer',
  'rho',
  'test accuracy, %',
  'accuracy on the noisy training set, %',
  'training loss',
  'sharpness, SAM ball',
  'sharpness, ASAM ball',
)


def load() -> list[dict[str, Any]]:
  """All results, in the order of models and noise."""
  results = [json.loads(path.read_text()) for path in FOLDER.glob('*.json')]
  order = ('mlp', 'cnn')
  return sorted(
    results,
    key=lambda result: (
      order.index(result['config']['model']),
      result['config']['label_noise'],
    ),
  )


def make_rows(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """The rows of the table in Markdown, without its header."""
  rows = []
  for result in results:
    config = result['config']
    for name, optimizer in result['optimizers'].items():
      cells = (
        config['model'],
        f'{100 * config["label_noise"]:g} %',
        name,
        f'{optimizer["rho"]:g}' if optimizer['rho'] else '',
        reporting.format_accuracy(optimizer['test_accuracy']['per_seed']),
        reporting.format_accuracy(optimizer['train_accuracy']['per_seed']),
        f'{optimizer["train_loss"]["mean"]:.3f}',
        f'{optimizer["sharpness_sam_ball"]["mean"]:.4f}',
        f'{optimizer["sharpness_asam_ball"]["mean"]:.4f}',
      )
      rows.append(f'| {" | ".join(cells)} |')
  return rows


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
  """Held-out accuracy over the epochs, a panel for each model and noise."""
  figure = Figure(
    figsize=(3.4 * len(results), 3.4), dpi=150, layout='constrained'
  )
  (all_axes,) = figure.subplots(1, len(results), squeeze=False)
  for axes, result in zip(all_axes, results, strict=True):
    config = result['config']
    for name, optimizer in result['optimizers'].items():
      label = name + (
        f', rho = {optimizer["rho"]:g}' if optimizer['rho'] else ''
      )
      reporting.plot_interval(
        axes,
        optimizer['curves']['held_out_accuracy'],
        color=reporting.COLORS[name],
        label=label,
      )
    axes.set(
      title=f'{config["model"]}, {100 * config["label_noise"]:g} % wrong',
      xlabel='Epoch',
      xlim=(0, config['epochs']),
    )
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, symbol=''))
    axes.legend(loc='lower left')
    reporting.tidy(axes)
  all_axes[0].set_ylabel('Held-out accuracy (%, noisy labels)')
  return figure


def main() -> None:
  """Runs the program."""
  results = load()
  print(f'| {" | ".join(HEADER)} |\n|{"---|" * len(HEADER)}')
  print('\n'.join(make_rows(results)))
  with reporting.replacing(FOLDER / 'study.png') as partial:
    draw(results).savefig(partial)


if __name__ == '__main__':
  main()
