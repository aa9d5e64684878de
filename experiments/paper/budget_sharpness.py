"""Sharpness against generalization, over the networks of ``budget``.

::

    python -m experiments.paper.budget_sharpness

Trains the ViT and the CNN of ``experiments.paper.budget`` with several methods,
each with all its rho, on all images of the task, on half and on a quarter of
them, with as many epochs. Unlike the networks of
``experiments.paper.correlation``, these do not stop at the same training loss.
Then computes Kendall's rank correlation of each measure of sharpness with the
gap between test and training error.

Finished networks are kept in ``--out``: repeat the command to resume.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
import numpy as np
import optax

from experiments import cli
from experiments import data
from experiments import models
from experiments import run_folder
from experiments.paper import budget
from experiments.paper import budget_lanes
from experiments.paper import budget_methods
from experiments.paper import budget_report
from experiments.paper import budget_tasks
from experiments.paper import budget_training
from experiments.paper import rank_correlation
from experiments.paper import sharpness_measures as measures
from experiments.report import records
from experiments.report import reporting
from optax_asam import plotting

TASKS = {
  name: budget_tasks.TASKS[name] for name in ('vit-2000', 'cnn-noise-40')
}
METHODS = 'base', 'sam', 'asam', 'momentum_asam'
# The fraction of the images of a task, as 1 / n.
PARTS = 4, 2, 1
SEED = 0
# Sharpness is measured on the first training examples, which all networks of a
# task have, with the labels that each was trained on: label noise is drawn anew
# for each number of images. Each batch has its own perturbation.
POINTS, BATCH = 384, 128
COLORS = {**plotting.COLORS, 'base': plotting.COLORS['sgd']}
# One for each number of images.
MARKERS = 'v', 's', 'o'

Quantity = Callable[[optax.Params, float], jax.Array]
Networks = Sequence[Mapping[str, Any]]


def make_quantities(
  dataset: data.Dataset, task: budget_tasks.Task
) -> dict[str, tuple[Quantity, float]]:
  """All measures on the examples of a task, jitted, each with its radius."""
  train = budget_training.dataset_of_seed(dataset, task, SEED).train
  points = data.Split(
    *(
      jnp.reshape(x[:POINTS], (-1, BATCH, *x.shape[1:]))
      for x in (dataset.preprocess(train.images), train.labels)
    )
  )
  loss_fn = lambda params, batch: models.eval_loss_fn(
    params, {}, task.recipe.model, batch
  )
  return {
    measures.middle(key): (jax.jit(measure), measures.RADII[key][1])
    for key, measure in measures.make(loss_fn, points).items()
  }


def run(
  trainer: budget_training.Trainer,
  dataset: data.Dataset,
  task: budget_tasks.Task,
  method: str,
  values: tuple[float, float],
  quantities: Mapping[str, tuple[Quantity, float]],
) -> dict[str, Any]:
  """Trains a network and measures it."""
  params = trainer.train(task, method, [budget_lanes.Lane(SEED, values)])
  found = {'method': method, 'rho': values[0], 'train_size': task.train_size}
  train = budget_training.dataset_of_seed(dataset, task, SEED).train
  for name, split in (('train', train), ('test', dataset.test)):
    (logits,) = trainer.logits(task, params, split)
    measured = budget_report.measure(logits, split.labels)
    found[f'{name}_loss'] = measured['loss']
    found[f'{name}_error'] = 1 - measured['accuracy']
  params = jax.tree.map(lambda x: x[0], params)
  found['measured'] = {
    name: float(measure(params, rho))
    for name, (measure, rho) in quantities.items()
  }
  return found


def combinations(
  task: budget_tasks.Task,
) -> list[tuple[str, tuple[float, float]]]:
  """Every method with each of its rho and alpha."""
  return [
    (method, values)
    for method in METHODS
    for values in budget_methods.candidates(
      budget_methods.METHODS[method], task.recipe
    )
  ]


def train_missing(
  dataset: data.Dataset,
  task: budget_tasks.Task,
  networks: list[dict[str, Any]],
  write: Callable[[], None],
) -> None:
  """Adds the networks of a task that are missing, and writes after each."""
  names = 'method', 'rho', 'train_size'
  done = {tuple(each[name] for name in names) for each in networks}
  trainer = budget_training.Trainer(dataset, max_lanes=1)
  for part in PARTS:
    smaller = task._replace(train_size=task.train_size // part)
    quantities = make_quantities(dataset, smaller)
    for method, values in combinations(task):
      if (method, values[0], smaller.train_size) in done:
        continue
      start = time.perf_counter()
      found = run(trainer, dataset, smaller, method, values, quantities)
      networks.append(found)
      write()
      print(
        f'{task.title}: {smaller.train_size} images, {method}, rho'
        f' {values[0]:g}: gap {100 * gap_of([found])[0]:.2f}% after'
        f' {time.perf_counter() - start:.0f} s',
        flush=True,
      )


def predictors(networks: Networks) -> dict[str, np.ndarray]:
  """What may predict the gap: the training loss, and all measures."""
  return {
    'training loss': np.array([each['train_loss'] for each in networks]),
    **{
      name: np.array([each['measured'][name] for each in networks])
      for name in networks[0]['measured']
    },
  }


def gap_of(networks: Networks) -> np.ndarray:
  """The generalization gap: test error less training error."""
  return np.array(
    [each['test_error'] - each['train_error'] for each in networks]
  )


def correlate(networks: Networks) -> dict[str, Any]:
  """The rank correlations of each predictor with the gap and the test error.

  With the gap over all networks, over those trained on as many images, and over
  those that differ in the number of images alone.
  """
  gap = gap_of(networks)
  error = np.array([each['test_error'] for each in networks])
  sizes = np.array([each['train_size'] for each in networks])
  settings = {
    'train_size': sizes,
    'method': np.array(
      [f'{each["method"]}, {each["rho"]}' for each in networks]
    ),
  }

  def over(x, y):
    return rank_correlation.interval((x, y), rank_correlation.tau, paired=True)

  return {
    name: {
      'gap': over(x, gap),
      'gap_by_train_size': {
        str(size): over(x[sizes == size], gap[sizes == size])
        for size in np.unique(sizes)
      },
      'gap_across_train_sizes': rank_correlation.interval(
        [rank_correlation.by_setting(x, gap, settings)['train_size']], np.mean
      ),
      'test_error': over(x, error),
    }
    for name, x in predictors(networks).items()
  }


def compare(networks: Networks) -> dict[str, Any]:
  """How much better adaptive sharpness correlates with the gap than sharpness.

  Over all networks, for each case and norm.
  """
  measured, gap = predictors(networks), gap_of(networks)
  return {
    f'{case} case, p = {ord:g}': rank_correlation.interval(
      (
        *(
          measured[measures.middle((each, case, ord))]
          for each in ('adaptive sharpness', 'sharpness')
        ),
        gap,
      ),
      rank_correlation.difference,
      paired=True,
    )
    for name, case, ord in measures.RADII
    if name == 'sharpness'
  }


def model(task: Mapping[str, Any]) -> str:
  """The model of a task; its title also says on how many images."""
  return task['title'].partition(',')[0]


def tables(results: Mapping[str, Any]) -> dict[str, str]:
  """The table of each task, and that of the differences, in Markdown."""
  cell = rank_correlation.format_interval
  made, differences = {}, {}
  for name, task in results['tasks'].items():
    rows, sizes = [], []
    for predictor, found in task['correlations'].items():
      by_size = found['gap_by_train_size']
      sizes = [f'{int(size):,}' for size in by_size]
      rows.append(
        [
          predictor.partition(', rho')[0],
          cell(found['gap']),
          *map(cell, by_size.values()),
          cell(found['gap_across_train_sizes']),
          cell(found['test_error']),
        ]
      )
    made[name] = reporting.markdown(
      [
        f'{model(task)}: gap',
        'all networks',
        *(f'{size} images' for size in sizes),
        'across numbers of images',
        'test error, all networks',
      ],
      rows,
    )
    for measure, found in task['differences'].items():
      differences.setdefault(measure, []).append(cell(found, '+.2f'))
  made['differences'] = reporting.markdown(
    ['adaptive minus plain', *map(model, results['tasks'].values())],
    [[measure, *cells] for measure, cells in differences.items()],
  )
  return made


def draw(results: Mapping[str, Any]) -> Figure:
  """The gap against the worst-case measures with p = 2, a row for each task."""
  shown = [key for key in measures.RADII if key[1:] == ('worst', 2)]
  tasks = results['tasks']
  figure = Figure(
    figsize=(3.6 * len(shown) + 1.6, 3.2 * len(tasks)),
    dpi=150,
    layout='constrained',
  )
  all_axes = figure.subplots(
    len(tasks), len(shown), sharey='row', squeeze=False
  )
  for row, task in zip(all_axes, tasks.values(), strict=True):
    networks = task['networks']
    sizes = sorted({each['train_size'] for each in networks})
    markers = dict(zip(sizes, MARKERS, strict=False))
    for axes, key in zip(row, shown, strict=True):
      measure = measures.middle(key)
      for each, gap in zip(networks, 100 * gap_of(networks), strict=True):
        axes.plot(
          *(each['measured'][measure], gap, markers[each['train_size']]),
          markersize=4,
          color=COLORS[each['method']],
        )
      tau = task['correlations'][measure]['gap']['tau']
      axes.set(title=f'{model(task)}, tau = {tau:.2f}', xlabel=measure)
      axes.title.set_fontsize(10)
      axes.set_xscale('log')
      axes.xaxis.set_minor_formatter(NullFormatter())  # They overlap.
      plotting.tidy(axes)
    row[0].set_ylabel('Generalization gap (error, %)')
    titles = {
      budget_methods.METHODS[name].title: ('o', COLORS[name])
      for name in METHODS
    } | {f'{size:,} images': (markers[size], '#999999') for size in sizes}
    row[-1].legend(
      handles=[
        Line2D([], [], linestyle='', marker=marker, color=color, label=title)
        for title, (marker, color) in titles.items()
      ],
      frameon=False,
      fontsize=8,
      loc='center left',
      bbox_to_anchor=(1, 0.5),
    )
  return figure


def make_config() -> dict[str, Any]:
  """What the results depend on."""
  return records.to_json(
    {
      'tasks': {
        name: {
          'train_sizes': [task.train_size // part for part in PARTS],
          'epochs': task.epochs,
          'batch_size': task.recipe.batch_size,
          'label_noise': task.label_noise,
          'lr': task.recipe.lr,
          'weight_decay': task.recipe.weight_decay,
          'candidates': {
            method: [
              rho for each, (rho, _) in combinations(task) if each == method
            ]
            for method in METHODS
          },
        }
        for name, task in TASKS.items()
      },
      'seed': SEED,
      'points': POINTS,
      'batch': BATCH,
      **measures.make_config(),
      'resamples': rank_correlation.NUM_RESAMPLES,
    }
  )


def main(argv: Sequence[str]) -> None:
  """Trains and measures what is not in ``--out`` yet, and correlates."""
  parser = cli.Parser(
    prog='budget_sharpness',
    description='Correlates sharpness with the gap of the ViT and the CNN.',
  )
  add = parser.add_argument
  add('--data-dir', type=Path, help='folder with the files of Fashion-MNIST')
  add(
    '--out', type=Path, default=Path('out/budget_sharpness'), help='for results'
  )
  args = parser.parse_args(argv)
  config = make_config()
  with cli.lock_out(parser, args.out, config):
    try:
      datasets = {
        name: task.load(args.data_dir) for name, task in TASKS.items()
      }
    except data.DataError as error:
      parser.error(str(error))
    results = budget.begin(
      'experiments.paper.budget_sharpness',
      *(argv, args.out, config, run_folder.read(args.out)),
    )
    for name, task in TASKS.items():
      networks = results['tasks'].setdefault(
        name, {'title': task.title, 'networks': []}
      )['networks']
      train_missing(
        datasets[name],
        task,
        networks,
        lambda: records.write_json(args.out / run_folder.RESULTS, results),
      )
      results['tasks'][name]['correlations'] = correlate(networks)
      results['tasks'][name]['differences'] = compare(networks)
    results['complete'] = True
    records.write_json(args.out / run_folder.RESULTS, results)
    records.write_figure(args.out / 'budget_sharpness.png', draw(results))
  print('\n\n'.join(tables(results).values()))


if __name__ == '__main__':
  cli.run(main)
