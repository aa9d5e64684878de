"""The tables and figures of the comparisons and of the study of label noise.

They are made of what ``experiments.paper.comparisons`` has written, and of the
recorded study.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from experiments import run_folder
from experiments.report import reporting
from optax_asam import plotting

RESULTS = Path(__file__).parents[1] / 'results'
METHODS = ('sgd', 'sam', 'asam')
# The results that ``budget_report`` reports.
RACES = ('budget', 'fine_tuning_spam')

# Kwon et al., 2021: accuracies of a WRN-28-10 on CIFAR-10 and CIFAR-100, SGD
# with twice the epochs.
PUBLISHED_CIFAR = {
  'SGD, twice the epochs': (96.34, 81.56),
  'SAM': (96.98, 83.42),
  'ASAM': (97.28, 83.68),
}
# Those of a ResNet-32 on CIFAR-10 by label noise in %: SGD, SAM, ASAM.
PUBLISHED_NOISE = {
  0: (94.50, 94.80, 94.88),
  20: (91.32, 92.94, 93.21),
  40: (87.68, 90.62, 90.89),
  60: (82.50, 86.58, 87.41),
  80: (68.35, 69.92, 67.69),
}
# Andriushchenko and Flammarion, 2022 (arXiv 2206.06232): errors of a ResNet-18
# on CIFAR-10, by the number of examples that share a perturbation.
PUBLISHED_M_SHARPNESS = {
  'no perturbation': '5.15',
  'all': 'about 5.1',
  '128': 'about 4.3',
}
# Mueller et al., 2023 (arXiv 2306.04226): accuracies of a WRN-28-10 on
# CIFAR-100, by the layers perturbed: SGD, SAM, ASAM.
PUBLISHED_LAYERS = {
  'all': ('80.7', '83.6', '83.8'),
  'BatchNorm only': ('', '84.2', '84.7'),
  'all but BatchNorm': ('', '', '81.4'),
}

# Rows of tables: title, and what the names of runs end with.
NOISE = {
  f'{percent}%': f'noise-{percent}' if percent else 'all'
  for percent in PUBLISHED_NOISE
}
M_SHARPNESS = {'128, the batch': 'all', '32': 'm-32', '8': 'm-8'}
LAYERS = {
  'all': 'all',
  'BatchNorm only': 'perturb-normalization',
  'all but BatchNorm': 'perturb-others',
}
# In the table of image classification a row is one method of a run.
CLASSIFICATION = {
  'SGD': ('all', 'sgd'),
  'SGD, twice the epochs': ('sgd-twice', 'sgd'),
  'SAM': ('all', 'sam'),
  'ASAM': ('all', 'asam'),
  'ASAM, p = inf': ('asam-inf', 'asam'),
  'ASAM, filter-wise': ('asam-filterwise', 'asam'),
  'ASAM, biases normalized': ('asam-biases', 'asam'),
}

Results = Mapping[str, Mapping[str, Any]]


def load(folder: Path) -> Results:
  """The results of all finished comparisons, by name."""
  results = {
    path.parent.name: json.loads(path.read_text())
    for path in sorted(folder.glob('*/results.json'))
  }
  return {name: each for name, each in results.items() if each.get('complete')}


def read(name: str) -> Any:
  """The recorded results of a program."""
  return json.loads((RESULTS / name / run_folder.RESULTS).read_text())


def load_study() -> list[dict[str, Any]]:
  """The study, the MLP first, ascending in label noise."""
  results = [
    json.loads(path.read_text()) for path in (RESULTS / 'study').glob('*.json')
  ]
  return sorted(results, key=_settings, reverse=True)


def _settings(result: Mapping[str, Any]) -> tuple[str, float, float]:
  options = result['config']
  return options['model'], options['lr'], -options['label_noise']


def cell(
  result: Mapping[str, Any] | None,
  method: str,
  quantity: str = 'test_accuracy',
) -> str:
  """The accuracy of a method, with its rho in brackets; empty if not run."""
  if result is None or method not in result['optimizers']:
    return ''
  per_seed = result['optimizers'][method][quantity]['per_seed']
  accuracy = reporting.format_mean(per_seed)
  rho = reporting.format_rho(result, method)
  return f'{accuracy} ({rho})' if rho else accuracy


def classification(results: Results) -> str:
  """Image classification, compared with the paper's."""
  return reporting.markdown(
    ['', 'MLP', 'CNN', 'paper: CIFAR-10, CIFAR-100'],
    [
      [
        title,
        *(cell(results.get(f'{x}-{run}'), method) for x in ('mlp', 'cnn')),
        ', '.join(f'{x:.2f}' for x in PUBLISHED_CIFAR.get(title, ())),
      ]
      for title, (run, method) in CLASSIFICATION.items()
    ],
  )


def comparison(
  results: Results, what: str, model: str, runs: Mapping[str, str]
) -> str:
  """SGD, SAM and ASAM in some runs of a model."""
  return reporting.markdown(
    [what, 'SGD', 'SAM', 'ASAM'],
    [
      [title, *(cell(results.get(f'{model}-{run}'), x) for x in METHODS)]
      for title, run in runs.items()
    ],
  )


def study(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """The study's tables, a row for each result."""

  def make_table(title, make_cell):
    rows = []
    for result in results:
      model, lr, noise = _settings(result)
      name = f'{model.upper()}, lr {lr:g}, {-100 * noise:g}%'
      rows.append([name, *(make_cell(result, method) for method in METHODS)])
    return reporting.markdown([title, 'SGD', 'SAM', 'ASAM'], rows)

  def sharpness(result, method):
    measured = result['optimizers'][method]
    balls = ('sharpness_sam_ball', 'sharpness_asam_ball')
    return ', '.join(f'{measured[ball]["mean"]:.4f}' for ball in balls)

  return {
    'study, test': make_table('test accuracy, %', cell),
    'study, training': make_table(
      'accuracy on the noisy training set, %',
      lambda result, method: cell(result, method, 'train_accuracy'),
    ),
    'study, sharpness': make_table('sharpness: SAM ball, ASAM ball', sharpness),
  }


def tables(results: Results) -> dict[str, str]:
  """All tables of the page in Markdown, by name."""
  return {
    'classification': classification(results),
    'noise, MLP': comparison(results, 'MLP, label noise', 'mlp', NOISE),
    'noise, CNN': comparison(results, 'CNN, label noise', 'cnn', NOISE),
    'noise, paper': reporting.markdown(
      ['paper: ResNet-32, label noise', 'SGD', 'SAM', 'ASAM'],
      [
        [f'{percent}%', *(f'{x:.2f}' for x in accuracies)]
        for percent, accuracies in PUBLISHED_NOISE.items()
      ],
    ),
    'm-sharpness': comparison(
      results, 'MLP, examples per perturbation', 'mlp', M_SHARPNESS
    ),
    'm-sharpness, published': reporting.markdown(
      ['published: examples per perturbation', 'error of SAM, %'],
      [list(row) for row in PUBLISHED_M_SHARPNESS.items()],
    ),
    'layers': comparison(
      results, 'CNN with BatchNorm, layers perturbed', 'cnn-bn', LAYERS
    ),
    'layers, published': reporting.markdown(
      ['published: layers perturbed', 'SGD', 'SAM', 'ASAM'],
      [[title, *cells] for title, cells in PUBLISHED_LAYERS.items()],
    ),
  }


def draw_clean(results: Results) -> Figure:
  """Test accuracies on clean labels, a panel for each model."""
  rows = {**CLASSIFICATION}
  for m, run in M_SHARPNESS.items():
    rows |= {f'ASAM, groups of {m}': (run, 'asam')} if m.isdigit() else {}
  figure = Figure(figsize=(7, 3.2), dpi=150, layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  for axes, model in zip(panels, ('mlp', 'cnn'), strict=True):
    for y, (run, method) in enumerate(rows.values()):
      result = results.get(f'{model}-{run}')
      if not result:
        continue
      accuracies = result['optimizers'][method]['test_accuracy']['per_seed']
      mean, half_width = reporting.t_interval(100 * np.asarray(accuracies))
      axes.errorbar(
        *(mean, y),
        xerr=half_width,
        color=plotting.COLORS[method],
        marker='o',
        markersize=4,
      )
      if (run, method) == rows['SGD']:
        axes.axvline(mean, color='#555555', linestyle=':', linewidth=1)
    axes.set(
      title=f'{model.upper()}, clean labels',
      xlabel='Test accuracy (%)',
      ylim=(len(rows) - 0.5, -0.5),
      yticks=range(len(rows)),
      yticklabels=rows,
    )
    axes.title.set_fontsize(10)
    plotting.tidy(axes)
  return figure


def draw_noise(results: Results) -> Figure:
  """Test accuracy by label noise: the MLP, the CNN, and the paper's."""
  figure = Figure(figsize=(10, 3.2), dpi=150, layout='constrained')
  all_axes = figure.subplots(1, 3)
  for method, published in zip(
    METHODS, np.transpose(list(PUBLISHED_NOISE.values())), strict=True
  ):
    style: Any = {'color': plotting.COLORS[method], 'label': method.upper()}
    for model, axes in zip(('mlp', 'cnn'), all_axes, strict=False):
      points = []
      for percent, run in zip(PUBLISHED_NOISE, NOISE.values(), strict=True):
        if result := results.get(f'{model}-{run}'):
          accuracy = result['optimizers'][method]['test_accuracy']['per_seed']
          points.append((percent, *reporting.t_interval(accuracy)))
      percents, means, half_widths = np.reshape(points, (-1, 3)).T
      axes.errorbar(percents, 100 * means, 100 * half_widths, **style)
    all_axes[2].plot(list(PUBLISHED_NOISE), published, **style)
  for axes, title in zip(
    all_axes,
    (
      *('MLP, Fashion-MNIST', 'CNN, Fashion-MNIST'),
      'Kwon et al., ResNet-32, CIFAR-10',
    ),
    strict=True,
  ):
    axes.set(title=title, xlabel='Label noise (%)')
    plotting.tidy(axes)
  all_axes[0].set_ylabel('Test accuracy (%)')
  all_axes[0].legend(loc='lower left')
  return figure


def draw_study(results: Sequence[Mapping[str, Any]]) -> Figure:
  """Held-out accuracy over epochs: a column for each model and learning rate.

  A panel for each result, one below the other if only the label noise differs.
  """
  columns = len({_settings(result)[:2] for result in results})
  rows = len(results) // columns
  figure = Figure(
    figsize=(3.4 * columns, 3.1 * rows), dpi=150, layout='constrained'
  )
  all_axes = figure.subplots(rows, columns, squeeze=False)
  for axes, result in zip(all_axes.T.flat, results, strict=True):
    model, lr, noise = _settings(result)
    for name, optimizer in result['optimizers'].items():
      reporting.plot_interval(
        axes,
        optimizer['curves']['held_out_accuracy'],
        color=plotting.COLORS[name],
        label=reporting.label(name, optimizer['rho']),
      )
    low, high = axes.get_ylim()
    axes.set(
      title=f'{model}, lr {lr:g}, label noise {-100 * noise:g}%',
      xlim=(0, result['config']['epochs']),
      ylim=(max(0, low), min(1, high)),
    )
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, symbol=''))
    axes.legend(loc='lower right')
    plotting.tidy(axes)
  for axes in all_axes[-1]:
    axes.set_xlabel('Epoch')
  figure.supylabel('Held-out accuracy (%, noisy labels)')
  return figure
