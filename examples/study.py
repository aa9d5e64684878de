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

import records
import reporting

FOLDER = Path(__file__).parent / 'study'

HEADER = (
  'model',
  'learning rate',
  'wrong labels',
  'optimizer',
  'rho',
  'test accuracy, %',
  'accuracy on the noisy training set, %',
  'sharpness, SAM ball',
  'sharpness, ASAM ball',
)


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
  """The results of the study, by model, learning rate and wrong labels."""
  results = [json.loads(path.read_text()) for path in folder.glob('*.json')]
  return sorted(results, key=_settings, reverse=True)


def _settings(result: Mapping[str, Any]) -> tuple[str, float, float]:
  config = result['config']
  return config['model'], config['lr'], -config['label_noise']


def make_rows(result: Mapping[str, Any]) -> list[Sequence[str]]:
  """The rows of the table that a result gives, one for each optimizer."""
  model, lr, _ = _settings(result)
  return [
    (
      model,
      f'{lr:g}',
      _percent_wrong(result),
      name,
      reporting.format_rho(result, name),
      reporting.format_accuracy(optimizer['test_accuracy']['per_seed']),
      reporting.format_accuracy(optimizer['train_accuracy']['per_seed']),
      f'{optimizer["sharpness_sam_ball"]["mean"]:.4f}',
      f'{optimizer["sharpness_asam_ball"]["mean"]:.4f}',
    )
    for name, optimizer in result['optimizers'].items()
  ]


def _percent_wrong(result: Mapping[str, Any]) -> str:
  return f'{100 * result["config"]["label_noise"]:g} %'


def make_table(results: Sequence[Mapping[str, Any]]) -> str:
  """The table in Markdown."""
  rows = [row for result in results for row in make_rows(result)]
  return reporting.markdown(HEADER, rows)


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
  """Held-out accuracy over the epochs, a panel for each result.

  Results that differ in their wrong labels alone stand in one column.
  """
  columns = len({_settings(result)[:2] for result in results})
  rows = len(results) // columns
  figure = Figure(
    figsize=(3.4 * columns, 3.1 * rows), dpi=150, layout='constrained'
  )
  all_axes = figure.subplots(rows, columns, squeeze=False)
  for axes, result in zip(all_axes.T.flat, results, strict=True):
    model, lr, _ = _settings(result)
    for name, optimizer in result['optimizers'].items():
      reporting.plot_interval(
        axes,
        optimizer['curves']['held_out_accuracy'],
        color=reporting.COLORS[name],
        label=reporting.label(name, optimizer['rho']),
      )
    low, high = axes.get_ylim()
    axes.set(
      title=f'{model}, lr {lr:g}, {_percent_wrong(result)} wrong',
      xlim=(0, result['config']['epochs']),
      ylim=(max(0, low), min(1, high)),
    )
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, symbol=''))
    axes.legend(loc='lower right')
    reporting.tidy(axes)
  for axes in all_axes[-1]:
    axes.set_xlabel('Epoch')
  figure.supylabel('Held-out accuracy (%, noisy labels)')
  return figure


def main() -> None:
  """Runs the program."""
  results = load()
  print(make_table(results))
  with records.replacing(FOLDER / 'study.png') as partial:
    draw(results).savefig(partial, format='png')


if __name__ == '__main__':
  main()
