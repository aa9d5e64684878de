"""What ``experiments.paper.budget`` reports: statistics, tables, a figure."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from experiments import data
from experiments.report import reporting
from optax_asam import plotting

NUM_BINS = 15
# What is reported of the test set, and how: title, factor, decimals.
QUANTITIES = {
  'test_accuracy': ('test accuracy, %', 100, 2),
  'test_balanced_accuracy': ('balanced, %', 100, 2),
  'test_loss': ('test loss', 1, 3),
  'test_calibration_error': ('ECE, %', 100, 1),
}
# Dark enough on white, for methods at one, about 1.2, and two gradients.
COLORS = (
  *('#555555', '#000000', '#8c564b', '#0072b2', '#d55e00', '#009e73'),
  *('#cc79a7', '#7f3c8d', '#e6a000', '#1b9e77', '#56b4e9', '#3969ac'),
  *('#666600', '#aa4499'),
)
MARKERS = 'osv^DPX<>h*pd8'


def measure(logits: np.ndarray, labels: data.Array) -> dict[str, float]:
  """Accuracies, loss and calibration error of logits [n, classes]."""
  log_p, labels = logits.astype(np.float64), np.asarray(labels)
  log_p -= log_p.max(axis=1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
  is_right = log_p.argmax(axis=1) == labels
  confidence = np.exp(log_p.max(axis=1))
  return {
    'accuracy': float(is_right.mean()),
    'balanced_accuracy': float(
      np.mean([is_right[labels == label].mean() for label in np.unique(labels)])
    ),
    'loss': float(-log_p[np.arange(len(labels)), labels].mean()),
    'calibration_error': calibration_error(confidence, is_right),
  }


def calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
  """The expected calibration error, over bins (i - 1, i] / 15 of confidence.

  The mean of |accuracy - mean confidence| of the bins, weighted by their
  numbers of examples.
  """
  bins = np.clip(np.ceil(confidence * NUM_BINS) - 1, 0, NUM_BINS - 1)
  total = np.bincount(
    bins.astype(int), weights=is_right - confidence, minlength=NUM_BINS
  )
  return float(np.abs(total).sum() / len(confidence))


def mean_scores(search: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
  """The mean held-out accuracy of each candidate, balanced or not."""
  scores: dict[Any, list[float]] = {}
  for run in search:
    (score,) = (run[name] for name in run if name.startswith('held_out_'))
    scores.setdefault(tuple(run['values']), []).append(score)
  return {values: float(np.mean(each)) for values, each in scores.items()}


def choose(search: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """The candidate with the best mean, the first of several."""
  scores = mean_scores(search)
  return max(scores, key=lambda values: scores[values])


def summarize(method: Mapping[str, Any]) -> dict[str, Any]:
  """The statistics of a method whose runs are all finished."""
  runs = method['runs']
  scores = mean_scores(method['search'])
  values = list(runs[0]['values'])
  rhos = sorted({rho for rho, _ in scores})
  return {
    'values': values,
    'candidates': [
      {'values': list(each), 'held_out_accuracy': score}
      for each, score in scores.items()
    ],
    # With fewer than three of a value, every one is at an edge.
    'at_edge': len(rhos) > 2 and values[0] in (rhos[0], rhos[-1]),
    'seconds_per_step': _median([x['seconds_per_step'] for x in runs]),
    **{
      name: reporting.summarize([run[name] for run in runs])
      for name in QUANTITIES
      if name in runs[0]  # Older results have no balanced accuracy.
    },
  }


def cost(method: Mapping[str, Any]) -> float:
  """Gradients of all of training, as a multiple of the base's."""
  return method['gradients_per_step'] * method['epochs']


def parameters(method: Mapping[str, Any]) -> str:
  """The values that were chosen; a star marks the ends of the candidates."""
  summary = method['summary']
  if len(summary['candidates']) < 2:
    return ''
  star = '*' if summary['at_edge'] else ''
  return ', '.join(
    f'{name} {value:g}{star}'
    for name, value in zip(method['names'], summary['values'], strict=False)
    if name
  )


def finished(task: Mapping[str, Any]) -> dict[str, Any]:
  """The methods of a task that have results."""
  return {
    name: method
    for name, method in task['methods'].items()
    if 'summary' in method
  }


def _median(seconds: Sequence[float | None]) -> float | None:
  """The median, unless the machine was shared, so that times were left out."""
  known = [x for x in seconds if x is not None]
  return float(np.median(known)) if known else None


def _interval(per_seed: Any, factor: float, decimals: int, sign: str = ''):
  mean, half_width = reporting.t_interval(factor * np.asarray(per_seed))
  text = f'{mean:{sign}.{decimals}f}'
  return text if np.isnan(half_width) else f'{text} ± {half_width:.{decimals}f}'


def line(
  task_name: str, method: Mapping[str, Any], metric: str = 'accuracy'
) -> str:
  """A method that has just finished."""
  summary = method['summary']
  seconds = summary['seconds_per_step']
  accuracy = reporting.format_accuracy(summary[f'test_{metric}']['per_seed'])
  parts = accuracy, parameters(method), f'{1000 * seconds:.3f} ms a step'
  return f'{task_name}, {method["title"]}: {"; ".join(filter(None, parts))}'


def table(task: Mapping[str, Any]) -> str:
  """The table of a task in Markdown."""
  methods = finished(task)
  base = methods.get('base')
  metric = task.get('metric', 'accuracy')
  shown = {
    name: how
    for name, how in QUANTITIES.items()
    if name != 'test_balanced_accuracy' or metric == 'balanced_accuracy'
  }
  rows = []
  for method in methods.values():
    summary = method['summary']
    difference = time = ''
    if base and method is not base:
      accuracies = (
        np.asarray(x['summary'][f'test_{metric}']['per_seed'])
        for x in (method, base)
      )
      own, others = accuracies
      difference = _interval(own - others, 100, 2, '+')
    seconds = summary['seconds_per_step']
    if base and seconds and base['summary']['seconds_per_step']:
      ratio = seconds / base['summary']['seconds_per_step']
      time = f'{ratio * method["epochs"]:.2f}'
    rows.append(
      [
        method['title'],
        parameters(method),
        f'{cost(method):g}',
        time,
        *(
          _interval(summary[name]['per_seed'], factor, decimals)
          for name, (_, factor, decimals) in shown.items()
        ),
        difference,
      ]
    )
  return reporting.markdown(
    [
      *(task['title'], 'chosen', 'gradients', 'time'),
      *(title for title, *_ in shown.values()),
      f'{metric.replace("_", " ")} minus base',
    ],
    rows,
  )


def tables(results: Mapping[str, Any]) -> dict[str, str]:
  """The tables of the page in Markdown, by name."""
  return {
    f'budget, {name}': table(task)
    for name, task in results['tasks'].items()
    if finished(task)
  }


def draw(results: Mapping[str, Any]) -> Figure:
  """Test accuracy against cost, a panel for each task."""
  tasks = [task for task in results['tasks'].values() if finished(task)]
  columns = min(2, len(tasks))
  rows = -(-len(tasks) // columns)
  figure = Figure(
    figsize=(4 * columns + 2.6, 3.2 * rows), dpi=150, layout='constrained'
  )
  all_axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
  styles: dict[str, Any] = {}
  for axes, task in zip(all_axes, tasks, strict=False):
    metric = task.get('metric', 'accuracy')
    drawn: dict[float, int] = {}
    for name, method in finished(task).items():
      i = list(styles).index(name) if name in styles else len(styles)
      styles.setdefault(name, method['title'])
      x = cost(method)
      # Methods of the same cost next to each other.
      shift = 0.035 * drawn.get(x, 0)
      drawn[x] = drawn.get(x, 0) + 1
      mean, half_width = reporting.t_interval(
        100 * np.asarray(method['summary'][f'test_{metric}']['per_seed'])
      )
      axes.errorbar(
        x + shift,
        mean,
        half_width,
        color=COLORS[i % len(COLORS)],
        marker=MARKERS[i % len(MARKERS)],
        markersize=5,
        linestyle='none',
        label=method['title'],
      )
    axes.set(title=task['title'], xlabel='Gradients (multiple of the base)')
    plotting.tidy(axes)
  for axes in all_axes[len(tasks) :]:
    axes.set_axis_off()
  metric = tasks[0].get('metric', 'accuracy').replace('_', ' ')
  all_axes[0].set_ylabel(f'Test {metric} (%)')
  handles: dict[str, Any] = {}
  for axes in all_axes:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    list(handles.values()),
    list(handles),
    loc='outside right center',
    fontsize=7,
    frameon=False,
  )
  return figure
