"""What a comparison reports: statistics, tables and a figure."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
import scipy.stats

from experiments import run_folder
from experiments.report import records
from experiments.search import Search
from optax_asam import plotting


def t_interval(values: Any) -> tuple[np.ndarray, np.ndarray]:
  """Mean and half its 95% t-interval over the last axis, the seeds.

  The half-width is NaN for a single seed.
  """
  values = np.asarray(values, np.float64)
  n = values.shape[-1]
  mean = values.mean(axis=-1)
  if n == 1:
    return mean, np.full_like(mean, np.nan)
  quantile = scipy.stats.t.ppf(0.975, n - 1)
  return mean, quantile * scipy.stats.sem(values, axis=-1)


def summarize(per_seed: Any) -> dict[str, Any]:
  """A quantity that every seed has, as in results.json."""
  mean, half_width = t_interval(per_seed)
  return {
    'per_seed': np.asarray(per_seed),
    'mean': mean,
    'interval_95': [mean - half_width, mean + half_width],
  }


def summarize_curves(curves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Statistics of curves [epochs, seeds] at the last and at the best epoch.

  The best epoch is an oracle's: it is chosen by the accuracy that is reported.
  """
  accuracies = curves['held_out_accuracy']
  if not len(accuracies):
    return {}
  return {
    'held_out_accuracy': summarize(accuracies[-1]),
    'oracle_best_epoch_held_out_accuracy': summarize(accuracies.max(axis=0)),
    'ms_per_step': 1000 * np.median(curves['seconds_per_step']),
  }


def add_time_ratios(optimizers: dict[str, Any]) -> dict[str, Any]:
  """Adds the time per step relative to the first method."""
  first = next(iter(optimizers.values()))['curves']['seconds_per_step']
  for result in optimizers.values():
    seconds = result['curves']['seconds_per_step']
    ratios = seconds.sum(axis=1) / first.sum(axis=1)
    result['time_ratio_to_first'] = np.median(ratios) if len(ratios) else None
  return optimizers


def describe_searches(searches: Mapping[str, Search]) -> dict[str, Any]:
  """The search for rho of each method, as in results.json."""
  return {
    name: {
      'rho': search.rho,
      'at_edge': search.at_edge,
      'seeds': list(search.seeds),
      'candidates': [
        {'rho': rho, 'held_out_accuracy': summarize(scores)}
        for rho, scores in zip(search.candidates, search.scores, strict=True)
      ],
    }
    for name, search in searches.items()
  }


def print_searches(console: Console, searches: Mapping[str, Search]) -> None:
  """Prints the score of every candidate, and which were chosen."""
  seeds = next(iter(searches.values())).seeds
  table = make_table()
  columns = []
  for name, search in searches.items():
    table.add_column(f'{name}\nrho', justify='right')
    table.add_column('held-out\naccuracy %', justify='right')
    columns += [
      [f'{rho:g}' for rho in search.candidates],
      [
        f'{100 * score:.1f}{"*" if i == search.best else " "}'
        for i, score in enumerate(search.scores.mean(axis=1))
      ],
    ]
  for row in zip(*columns, strict=True):
    table.add_row(*row)
  console.print('\nChoice of rho')
  console.print(table)
  console.print(
    f'* chosen. Last epoch, mean over seeds {", ".join(map(str, seeds))};'
    f' held-out labels are as noisy as training labels.'
  )
  for name, search in searches.items():
    if search.at_edge:
      console.print(
        f'{name}: rho = {search.rho:g} is at the edge of its candidates; one'
        f' beyond them may be better.'
      )


def print_results(console: Console, results: Mapping[str, Any]) -> None:
  """Prints the table of final results."""
  config = results['config']
  balls = config['sharpness_rho']
  table = make_table()
  for header in (
    'optimizer',
    'rho',
    'test\naccuracy %',
    'train\nloss',
    f'sharpness\nSAM ball\nrho {balls["sam_ball"]:g}',
    f'sharpness\nASAM ball\nrho {balls["asam_ball"]:g}',
    'ms per\nstep',
    f'time\n/ {next(iter(results["optimizers"]))}',
  ):
    table.add_column(header, justify='right')
  for name, result in results['optimizers'].items():
    table.add_row(
      name,
      f'{result["rho"]:g}',
      format_mean(result['test_accuracy']['per_seed']),
      f'{result["train_loss"]["mean"]:.3f}',
      f'{result["sharpness_sam_ball"]["mean"]:.5f}',
      f'{result["sharpness_asam_ball"]["mean"]:.5f}',
      f'{result["ms_per_step"]:.2f}',
      f'{result["time_ratio_to_first"]:.2f}',
    )
  console.print(f'\n{describe(config)}')
  console.print(table)
  console.print(
    f'Last epoch, mean over {count_seeds(config)} ± half the 95% t-interval.'
    f' Loss and sharpness, L(w + eps) - L(w), are on the noisy training set;'
    f' eps is the steepest ascent step to the surface of a ball, the same ball'
    f' for all methods, for each {config["sharpness_batch_size"]:,} examples.'
    f' Times are for one run.'
  )


def format_mean(
  per_seed: Any, factor: float = 100, decimals: int = 2, sign: str = ''
) -> str:
  """Mean ± half its interval; only the mean for a single seed."""
  mean, half_width = t_interval(factor * np.asarray(per_seed, np.float64))
  text = f'{mean:{sign}.{decimals}f}'
  return text if np.isnan(half_width) else f'{text} ± {half_width:.{decimals}f}'


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def format_rho(results: Mapping[str, Any], name: str) -> str:
  """The rho of a method, empty if it has none.

  A star marks the first and the last of the candidates.
  """
  rho = results['optimizers'][name]['rho']
  if not rho:
    return ''
  at_edge = name in results['search'] and results['search'][name]['at_edge']
  return f'{rho:g}{"*" if at_edge else ""}'


def make_table() -> Table:
  """A table whose eight columns fit in a terminal of 80 characters."""
  return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def count_seeds(config: Mapping[str, Any]) -> str:
  """The number of seeds, in words."""
  n = len(config['seeds'])
  return '1 seed' if n == 1 else f'{n} seeds'


def describe(config: Mapping[str, Any]) -> str:
  """Model, data set and label noise."""
  noise = f'{100 * config["label_noise"]:g}%'
  return f'{config["model"]} on {config["dataset"]}, {noise} label noise'


def label(name: str, rho: float) -> str:
  """The label of a method in a figure."""
  return f'{name}, rho = {rho:g}' if rho else name


def plot_interval(axes: Axes, curve: Any, *, color: str, label: str) -> None:
  """Plots the mean of a curve [epochs, seeds] and its 95% interval."""
  mean, half_width = t_interval(curve)
  epochs = np.arange(1, len(mean) + 1)
  axes.plot(epochs, mean, color=color, label=label)
  axes.fill_between(
    epochs,
    mean - half_width,
    mean + half_width,
    color=color,
    alpha=0.2,
    linewidth=0,
  )


def draw(results: Mapping[str, Any]) -> Figure:
  """Draws training loss and held-out accuracy over the epochs."""
  config = results['config']
  figure = Figure(figsize=(8, 3.6), dpi=150, layout='constrained')
  loss_axes, accuracy_axes = figure.subplots(1, 2)
  for name, result in results['optimizers'].items():
    for axes, quantity in (
      (loss_axes, 'train_loss'),
      (accuracy_axes, 'held_out_accuracy'),
    ):
      plot_interval(
        axes,
        result['curves'][quantity],
        color=plotting.COLORS[name],
        label=label(name, result['rho']),
      )
  loss_axes.set(ylabel='Training loss (cross-entropy, nats)', ylim=(0, None))
  accuracy_axes.set(ylabel='Held-out accuracy (%, noisy labels)')
  accuracy_axes.yaxis.set_major_formatter(
    ticker.PercentFormatter(xmax=1, symbol='')
  )
  accuracy_axes.axhline(
    1 - config['label_noise'],
    color='black',
    linestyle=':',
    label='classifier without errors',
  )
  for axes in (loss_axes, accuracy_axes):
    axes.set(xlabel='Epoch', xlim=(0, config['epochs']))
    plotting.tidy(axes)
  accuracy_axes.legend()
  interrupted = '' if results['complete'] else ' (interrupted)'
  figure.suptitle(
    f'{describe(config)}: mean and 95% interval over {count_seeds(config)}'
    f'{interrupted}'
  )
  return figure


def write(
  console: Console,
  out: Path,
  results: Mapping[str, Any],
  searches: Mapping[str, Search],
) -> None:
  """Writes results.json and curves.png, and prints the tables."""
  records.write_json(out / run_folder.RESULTS, results)
  records.write_figure(out / 'curves.png', draw(results))
  # Afterwards, since it fails if what reads it has ended.
  if searches:
    print_searches(console, searches)
  if results['complete']:
    print_results(console, results)
  after = f'after {results["wall_time_s"]:.0f} s'
  if results['complete']:
    console.print(f'Wrote results.json and curves.png to {out} {after}.')
  else:
    console.print(
      f'Interrupted {after}. Wrote the results so far to results.json and'
      f' curves.png in {out}. To go on, repeat the command with --resume.'
    )
