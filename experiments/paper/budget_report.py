"""What ``experiments.paper.budget`` reports: statistics, tables, a figure."""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

from matplotlib.figure import Figure
import numpy as np
import scipy.special

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
# By cost: as the base, less than twice that, more. Dark enough on white, and
# safe for the color-blind.
COLORS = '#0072b2', '#b35900', '#00785a'


def measure(logits: np.ndarray, labels: data.Array) -> dict[str, float]:
  """Accuracies, loss and calibration error of logits [n, classes].

  Of a network that diverged, loss and calibration error are NaN.
  """
  log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
  labels = np.asarray(labels)
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
  if np.isnan(confidence).any():
    return math.nan
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


def summarize(method: Mapping[str, Any], metric: str) -> dict[str, Any]:
  """The statistics of a method whose runs are all finished."""
  runs = method['runs']
  scores = mean_scores(method['search'])
  return {
    'values': list(runs[0]['values']),
    'candidates': [
      {'values': list(each), f'held_out_{metric}': score}
      for each, score in scores.items()
    ],
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
  tried = zip(*(each['values'] for each in summary['candidates']), strict=True)
  parts = []
  for name, value, values in zip(
    method['names'], summary['values'], tried, strict=False
  ):
    others = sorted(set(values))
    # With fewer than three of a value, every one is at an end.
    star = '*' if len(others) > 2 and value in (others[0], others[-1]) else ''
    if name and len(others) > 1:
      parts.append(f'{name} {value:g}{star}')
  return ', '.join(parts)


def finished(task: Mapping[str, Any]) -> dict[str, Any]:
  """The methods of a task that have results."""
  return {
    name: method
    for name, method in task['methods'].items()
    if 'summary' in method
  }


def line(task_name: str, method: Mapping[str, Any], metric: str) -> str:
  """A method that has just finished."""
  summary = method['summary']
  accuracy = reporting.format_mean(summary[f'test_{metric}']['per_seed'])
  parts = accuracy, parameters(method)
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
    difference = ''
    if base and method is not base:
      accuracies = (
        np.asarray(x['summary'][f'test_{metric}']['per_seed'])
        for x in (method, base)
      )
      own, others = accuracies
      difference = reporting.format_mean(own - others, sign='+')
    rows.append(
      [
        method['title'],
        parameters(method),
        f'{cost(method):g}',
        *(
          reporting.format_mean(summary[name]['per_seed'], factor, decimals)
          for name, (_, factor, decimals) in shown.items()
        ),
        difference,
      ]
    )
  return reporting.markdown(
    [
      *(task['title'], 'chosen', 'gradients'),
      *(title for title, *_ in shown.values()),
      f'{metric.replace("_", " ")} minus base',
    ],
    rows,
  )


def tables(results: Mapping[str, Any]) -> dict[str, str]:
  """The tables in Markdown, by task."""
  return {
    name: table(task)
    for name, task in results['tasks'].items()
    if finished(task)
  }


def draw(results: Mapping[str, Any]) -> Figure:
  """Test accuracies in the order of their cost, a panel for each task."""
  tasks = [task for task in results['tasks'].values() if finished(task)]
  by_title = {
    method['title']: cost(method)
    for task in tasks
    for method in finished(task).values()
  }
  titles = sorted(by_title, key=lambda title: by_title[title])
  columns = min(2, len(tasks))
  rows = -(-len(tasks) // columns)
  figure = Figure(
    figsize=(3.2 * columns + 3.4, rows * (0.24 * len(titles) + 0.9)),
    dpi=150,
    layout='constrained',
  )
  all_axes = np.ravel(
    figure.subplots(rows, columns, sharey=True, squeeze=False)
  )
  for axes, task in zip(all_axes, tasks, strict=False):
    metric = task.get('metric', 'accuracy')
    for method in finished(task).values():
      mean, half_width = reporting.t_interval(
        100 * np.asarray(method['summary'][f'test_{metric}']['per_seed'])
      )
      axes.errorbar(
        *(mean, titles.index(method['title'])),
        xerr=half_width,
        color=COLORS[(cost(method) > 1) + (cost(method) >= 2)],
        marker='o',
        markersize=4,
      )
      if method['title'] == 'base':
        axes.axvline(mean, color='#555555', linestyle=':', linewidth=1)
    axes.set(title=task['title'], xlabel=f'Test {metric.replace("_", " ")} (%)')
    axes.title.set_fontsize(10)
    plotting.tidy(axes)
  for axes in all_axes[len(tasks) :]:
    axes.set_axis_off()
  all_axes[0].set(
    ylim=(len(titles) - 0.5, -0.5),
    yticks=range(len(titles)),
    yticklabels=[
      f'{title} ({by_title[title]:g} gradient{"s"[: by_title[title] != 1]})'
      for title in titles
    ],
  )
  return figure
