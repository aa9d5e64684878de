"""The tables and the figure of ``experiments/README.md``, from the comparisons.

::

    python experiments/paper_tables.py out/comparisons

``comparisons.py`` has written that folder; those of the page are in
``experiments/comparisons``, from which only its pictures and logs are missing.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
from pathlib import Path
import sys
from typing import Any

from matplotlib.figure import Figure
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
import arguments
import records
import reporting

FOLDER = Path(__file__).parent / 'comparisons'
METHODS = ('sgd', 'sam', 'asam')

# Kwon et al., 2021: accuracies on CIFAR-10 and CIFAR-100: SGD with twice the
# epochs, SAM, ASAM. Recalled ones nobody has read again in the paper.
PUBLISHED_CIFAR = {
  'ResNet-20, as recalled': ((93.18, 93.56, 93.82), (69.76, 71.06, 71.40)),
  'WRN-28-10': ((96.34, 96.98, 97.28), (81.56, 83.42, 83.68)),
}
# Those of a ResNet-32 on CIFAR-10 by wrong labels, %: SGD, SAM, ASAM.
NOISE = {
  0: (94.50, 94.80, 94.88),
  20: (91.32, 92.94, 93.21),
  40: (87.68, 90.62, 90.89),
  60: (82.50, 86.58, 87.41),
  80: (68.35, 69.92, 67.69),
}
# Andriushchenko and Flammarion, 2022 (arXiv 2206.06232): errors of a ResNet-18
# on CIFAR-10, by the examples that share a perturbation.
PUBLISHED_M_SHARPNESS = {
  'none is perturbed': '5.15',
  'all': 'about 5.1',
  '128': 'about 4.3',
}
# Mueller et al., 2023 (arXiv 2306.04226): accuracies of a WRN-28-10 on
# CIFAR-100, by the layers perturbed: SGD, SAM, ASAM.
PUBLISHED_LAYERS = {
  'all': ('80.7', '83.6', '83.8'),
  'BatchNorm alone': ('', '84.2', '84.7'),
  'all but BatchNorm': ('', '', '81.4'),
}
# Rows of tables: title, and what the names of runs end with.
NOISE_RUNS = {
  f'{percent} %': f'noise-{percent}' if percent else 'all' for percent in NOISE
}
M_SHARPNESS = {'128, the batch': 'all', '32': 'm-32', '8': 'm-8'}
LAYERS = {
  'all': 'all',
  'BatchNorm alone': 'perturb-normalization',
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


def load(folder: Path = FOLDER) -> Results:
  """The results of all runs that have ended, by name."""
  results = {
    path.parent.name: json.loads(path.read_text())
    for path in sorted(folder.glob('*/results.json'))
  }
  return {name: each for name, each in results.items() if each['complete']}


def cell(results: Results, run: str, method: str) -> str:
  """The accuracy of a method in a run, and its rho in brackets.

  Empty where it was not run.
  """
  if run not in results or method not in results[run]['optimizers']:
    return ''
  accuracy = reporting.format_accuracy(_per_seed(results[run], method))
  rho = reporting.format_rho(results[run], method)
  return f'{accuracy} ({rho})' if rho else accuracy


def _per_seed(result: Mapping[str, Any], method: str) -> Sequence[float]:
  return result['optimizers'][method]['test_accuracy']['per_seed']


def classification(results: Results) -> str:
  """Image classification, beside the paper's tables."""
  paper = {
    title: ', '.join(f'{accuracy:.2f}' for accuracy in accuracies)
    for title, *accuracies in zip(
      ('SGD, twice the epochs', 'SAM', 'ASAM'),
      *PUBLISHED_CIFAR['WRN-28-10'],
      strict=True,
    )
  }
  return reporting.markdown(
    ['', 'MLP', 'CNN', 'paper: CIFAR-10, CIFAR-100'],
    [
      [
        title,
        cell(results, f'mlp-{run}', method),
        cell(results, f'cnn-{run}', method),
        paper.get(title, ''),
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
      [title, *(cell(results, f'{model}-{run}', name) for name in METHODS)]
      for title, run in runs.items()
    ],
  )


def published() -> list[str]:
  """The tables of the papers that are beside those measured here."""
  return [
    reporting.markdown(
      ['paper: accuracy in %']
      + [
        f'{dataset}, {method.upper()}'
        for dataset in ('CIFAR-10', 'CIFAR-100')
        for method in METHODS
      ],
      [
        [
          model,
          *(f'{accuracy:.2f}' for each in accuracies for accuracy in each),
        ]
        for model, accuracies in PUBLISHED_CIFAR.items()
      ],
    ),
    reporting.markdown(
      ['paper: ResNet-32, wrong labels', 'SGD', 'SAM', 'ASAM'],
      [
        [f'{percent} %', *(f'{accuracy:.2f}' for accuracy in accuracies)]
        for percent, accuracies in NOISE.items()
      ],
    ),
    reporting.markdown(
      ['later work: examples that share a perturbation', 'error of SAM, %'],
      [list(row) for row in PUBLISHED_M_SHARPNESS.items()],
    ),
    reporting.markdown(
      ['later work: layers perturbed', 'SGD', 'SAM', 'ASAM'],
      [[title, *cells] for title, cells in PUBLISHED_LAYERS.items()],
    ),
  ]


def draw_noise(results: Results) -> Figure:
  """Test accuracy by wrong labels: the MLP, the CNN, and the paper's.

  Of the runs that have ended.
  """
  figure = Figure(figsize=(10, 3.2), dpi=150, layout='constrained')
  mlp_axes, cnn_axes, paper_axes = figure.subplots(1, 3)
  for method, published in zip(
    METHODS, np.transpose(list(NOISE.values())), strict=True
  ):
    style = {'color': reporting.COLORS[method], 'label': method.upper()}
    for model, axes in (('mlp', mlp_axes), ('cnn', cnn_axes)):
      names = {
        percent: f'{model}-{run}'
        for percent, run in zip(NOISE, NOISE_RUNS.values(), strict=True)
      }
      points = [
        (percent, *reporting.t_interval(_per_seed(results[name], method)))
        for percent, name in names.items()
        if name in results
      ]
      percents, means, half_widths = np.array(points).reshape(-1, 3).T
      axes.errorbar(percents, 100 * means, 100 * half_widths, **style)
    paper_axes.plot(list(NOISE), published, **style)
  for axes, title in (
    (mlp_axes, 'MLP, Fashion-MNIST'),
    (cnn_axes, 'CNN, Fashion-MNIST'),
    (paper_axes, 'Kwon et al., ResNet-32, CIFAR-10'),
  ):
    axes.set(title=title, xlabel='Wrong labels (%)')
    reporting.tidy(axes)
  mlp_axes.set_ylabel('Test accuracy (%)')
  mlp_axes.legend(loc='lower left')
  return figure


def tables(results: Results) -> list[str]:
  """All tables of the page."""
  return [
    classification(results),
    comparison(results, 'MLP, wrong labels', 'mlp', NOISE_RUNS),
    comparison(results, 'CNN, wrong labels', 'cnn', NOISE_RUNS),
    comparison(
      results, 'MLP, examples that share a perturbation', 'mlp', M_SHARPNESS
    ),
    comparison(
      results, 'CNN with BatchNorm, layers perturbed', 'cnn-bn', LAYERS
    ),
    *published(),
  ]


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = arguments.Parser(
    description='Makes the tables and the figure of the comparisons.',
    allow_abbrev=False,
  )
  parser.add_argument(
    'folder', type=Path, nargs='?', default=FOLDER, help='of comparisons.py'
  )
  folder = parser.parse_args(argv).folder
  results = load(folder)
  if not results:
    parser.error(
      f"argument folder: there is no run in '{folder}' that has ended. Write"
      f' the --out of comparisons.py.'
    )
  print('\n\n'.join(tables(results)))
  with records.replacing(folder / 'noise.png') as partial:
    draw_noise(results).savefig(partial, format='png')


if __name__ == '__main__':
  main(sys.argv[1:])
