"""Sharpness against generalization, over networks of equal training loss.

::

    python -m experiments.paper.correlation

Trains networks over a grid of batch size, learning rate, weight decay and
dropout on a part of Fashion-MNIST that they overfit, each until its loss on all
of it is low enough. Then computes Kendall's rank correlation of sharpness and
of adaptive sharpness with the generalization gap, as in section 3 of the ASAM
paper, which used a Wide ResNet on CIFAR-10.

Finished parts are kept in ``--out``: repeat the command to resume.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import json
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
import numpy as np
import optax

from experiments import cli
from experiments import data
from experiments import run_folder
from experiments.paper import equal_loss
from experiments.paper import rank_correlation
from experiments.paper import sharpness_measures as measures
from experiments.report import records
from experiments.report import reporting

# All combinations are trained. With larger learning rates or more dropout,
# small batches do not reach the target.
GRID = {
  'batch_size': (32, 64, 128),
  'lr': (0.003, 0.01, 0.02),
  'weight_decay': (0.0, 1e-4, 5e-4, 1e-3),
  'dropout': (0.0, 0.1, 0.2),
}
TRAIN_SIZE = 2000
TARGET = 0.02
MAX_EPOCHS = 300

# Sharpness is measured on POINTS training examples; each batch of them has its
# own perturbation.
POINTS, BATCH = 1024, 128

# One for each dropout rate (Okabe and Ito).
COLORS = ('#0072b2', '#e69f00', '#d55e00')

# Maps stacked parameters and a radius to a value for each network.
Quantity = Callable[[optax.Params, float], jax.Array]


def make_quantities(dataset: data.Dataset) -> dict[tuple[Any, ...], Quantity]:
  """Everything that is measured, compiled once for all radii and networks."""
  network = equal_loss.Network(dataset.num_classes)
  points = jax.tree.map(
    lambda x: x[:POINTS].reshape(-1, BATCH, *x.shape[1:]), dataset.train
  )
  loss_fn = lambda params, split: equal_loss.loss_fn(params, network, split)

  def measure_error(split, params, rho):
    del rho
    return equal_loss.error_rate(params, network, split)

  quantities = {
    ('test error',): functools.partial(measure_error, dataset.test),
    ('train error',): functools.partial(measure_error, dataset.train),
    **measures.make(loss_fn, points),
  }
  # One network at a time: mapped over, they take as long and more memory.
  return {
    key: jax.jit(
      lambda params, rho, each=each: jax.lax.map(
        lambda mine: each(mine, rho), params
      )
    )
    for key, each in quantities.items()
  }


def make_parts() -> list[equal_loss.Settings]:
  """The grid in parts of one batch size and learning rate, with seeds."""
  grid = np.array(list(itertools.product(*GRID.values())))
  size = len(GRID['weight_decay']) * len(GRID['dropout'])
  seeds = np.arange(len(grid)).reshape(-1, size)
  return [
    equal_loss.Settings(batch_size.astype(int), lr, decay, dropout, mine)
    for (batch_size, lr, decay, dropout), mine in zip(
      grid.reshape(-1, size, len(GRID)).transpose(0, 2, 1), seeds, strict=True
    )
  ]


def train_or_load(
  file: Path,
  settings: equal_loss.Settings,
  dataset: data.Dataset,
  report: Callable[[str], None],
) -> equal_loss.Trained:
  """Trains networks, or reads them from ``file`` if it has them."""
  if not file.exists():
    trained = equal_loss.train(
      settings,
      dataset.num_classes,
      dataset.train,
      target=TARGET,
      max_epochs=MAX_EPOCHS,
      report=report,
    )
    with records.replacing(file) as partial, partial.open('wb') as stream:
      np.savez(stream, *jax.tree.leaves(trained))
  network = equal_loss.Network(dataset.num_classes)
  params = jax.eval_shape(
    network.init, jax.random.key(0), dataset.train.images[:1]
  )['params']
  with np.load(file) as arrays:
    leaves = [arrays[name] for name in arrays.files]
  # The values of the template do not matter, only its structure.
  template = equal_loss.Trained(params, np.zeros(0), np.zeros(0))
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


def measure_or_load(
  file: Path,
  params: optax.Params,
  quantities: Mapping[tuple[Any, ...], Quantity],
  report: Callable[[str], None],
) -> dict[str, list[float]]:
  """All quantities [networks] by name, of which ``file`` keeps the finished."""
  measured = json.loads(file.read_text()) if file.exists() else {}
  for key, quantity in quantities.items():
    for rho in measures.RADII.get(key, (0.0,)):
      name = measures.name(key, rho) if key in measures.RADII else key[0]
      if name not in measured:
        start = time.perf_counter()
        values = np.asarray(quantity(params, rho), np.float64)
        measured[name] = values.tolist()
        records.write_json(file, measured)
        report(f'{name} after {time.perf_counter() - start:.0f} s')
  return measured


def gap_of(measured: Mapping[str, Any]) -> np.ndarray:
  """The generalization gap: test error less training error."""
  return np.subtract(measured['test error'], measured['train error'])


def correlate(
  settings: Mapping[str, np.ndarray],
  measured: Mapping[str, np.ndarray],
  train_loss: np.ndarray,
) -> dict[str, Any]:
  """The rank correlations of each measure with the gap.

  And with the remaining training loss, which ideally would not matter.
  """
  gap, tau = gap_of(measured), rank_correlation.tau
  overall = functools.partial(
    rank_correlation.interval, statistic=tau, paired=True
  )
  correlations = {}
  for key, radii in measures.RADII.items():
    for rho in radii:
      x = measured[measures.name(key, rho)]
      taus = rank_correlation.by_setting(x, gap, settings)
      correlations[measures.name(key, rho)] = {
        'overall': overall((x, gap)),
        'by_setting': {
          setting: rank_correlation.interval([each], np.mean)
          for setting, each in taus.items()
        },
        'mean_over_settings': rank_correlation.mean_of_means(taus),
        'with_train_loss': overall((x, train_loss)),
      }
  return correlations


def compare(
  settings: Mapping[str, np.ndarray], measured: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
  """How much better adaptive sharpness correlates with the gap than sharpness.

  For each case and norm, at the smallest, middle and largest radius of both.
  """
  gap = gap_of(measured)
  differences = []
  for (name, case, ord), plain_radii in measures.RADII.items():
    if name != 'sharpness':
      continue
    pairs = zip(
      plain_radii,
      measures.RADII['adaptive sharpness', case, ord],
      strict=True,
    )
    for rhos in pairs:
      plain, adaptive = (
        measured[measures.name((each, case, ord), rho)]
        for each, rho in zip(measures.NORMALIZATIONS, rhos, strict=True)
      )
      plain_taus, adaptive_taus = (
        rank_correlation.by_setting(x, gap, settings) for x in (plain, adaptive)
      )
      differences.append(
        {
          'case': case,
          'p': f'{ord:g}',
          'rho': dict(zip(measures.NORMALIZATIONS, rhos, strict=True)),
          'overall': rank_correlation.interval(
            (adaptive, plain, gap), rank_correlation.difference, paired=True
          ),
          'mean_over_settings': rank_correlation.mean_of_means(
            {
              setting: adaptive_taus[setting] - plain_taus[setting]
              for setting in settings
            }
          ),
        }
      )
  return differences


def tables(results: Mapping[str, Any]) -> dict[str, str]:
  """The tables of the page in Markdown, by name."""
  cell = rank_correlation.format_interval
  overall, by_setting, differences = [], [], {}
  for key in measures.RADII:
    found = results['correlations'][measures.middle(key)]
    title = measures.title(key)
    overall.append(
      [title, cell(found['overall']), cell(found['mean_over_settings'])]
    )
    by_setting.append(
      [title, *(cell(found['by_setting'][setting]) for setting in GRID)]
    )
  for each in results['differences']:
    for kind, where in (
      ('overall', 'over all'),
      ('mean_over_settings', 'mean of the four'),
    ):
      title = f'{each["case"]} case, p = {each["p"]}, {where}'
      differences.setdefault(title, []).append(cell(each[kind], '+.2f'))
  return {
    'overall': reporting.markdown(
      ['measure', 'over all networks', 'mean of the four'], overall
    ),
    'by setting': reporting.markdown(
      ['measure', *(name.replace('_', ' ') for name in GRID)], by_setting
    ),
    'differences': reporting.markdown(
      ['adaptive minus plain', 'smallest rho', 'middle rho', 'largest rho'],
      [[title, *cells] for title, cells in differences.items()],
    ),
  }


def draw(results: Mapping[str, Any]) -> Figure:
  """The gap against the worst-case measures at the middle radius."""
  shown = [
    (key, radii[1])
    for key, radii in measures.RADII.items()
    if key[1] == 'worst'
  ]
  figure = Figure(
    figsize=(3.2 * len(shown), 3.2), dpi=150, layout='constrained'
  )
  all_axes = np.ravel(figure.subplots(1, len(shown), sharey=True))
  measured, settings = results['measured'], results['settings']
  gap = 100 * gap_of(measured)
  for axes, ((name, case, ord), rho) in zip(all_axes, shown, strict=True):
    measure = measures.name((name, case, ord), rho)
    for dropout, color in zip(GRID['dropout'], COLORS, strict=False):
      mine = np.equal(settings['dropout'], dropout)
      axes.plot(
        np.asarray(measured[measure])[mine],
        gap[mine],
        'o',
        markersize=3,
        color=color,
        label=f'dropout {dropout:g}',
      )
    tau = results['correlations'][measure]['overall']['tau']
    axes.set(
      title=f'p = {ord:g}, tau = {tau:.2f}', xlabel=f'{name}, rho = {rho:g}'
    )
    axes.set_xscale('log')
    axes.xaxis.set_minor_formatter(NullFormatter())  # They overlap.
    axes.spines[['top', 'right']].set_visible(False)
  all_axes[0].set_ylabel('Generalization gap (error, %)')
  all_axes[0].legend(frameon=False)
  return figure


def make_config() -> dict[str, Any]:
  """All settings that the results depend on."""
  return {
    'grid': {name: list(values) for name, values in GRID.items()},
    'train_size': TRAIN_SIZE,
    'target': TARGET,
    'max_epochs': MAX_EPOCHS,
    'looks_per_epoch': equal_loss.LOOKS,
    'near': equal_loss.NEAR,
    'momentum': equal_loss.MOMENTUM,
    'hidden_sizes': list(equal_loss.HIDDEN_SIZES),
    'points': POINTS,
    'batch': BATCH,
    **measures.make_config(),
    'resamples': rank_correlation.NUM_RESAMPLES,
  }


def describe(
  parts: Sequence[
    tuple[equal_loss.Settings, equal_loss.Trained, Mapping[str, list[float]]]
  ],
) -> dict[str, Any]:
  """The results, without networks that did not reach the target."""
  train_loss = np.concatenate([trained.train_loss for _, trained, _ in parts])
  reached = np.isfinite(train_loss)
  join = lambda arrays: np.concatenate([np.asarray(x) for x in arrays])[reached]
  settings = {
    name: join(getattr(each, name) for each, _, _ in parts) for name in GRID
  }
  measured = {
    name: join(each[name] for _, _, each in parts) for name in parts[0][2]
  }
  return {
    'complete': True,
    'config': make_config(),
    'networks': len(train_loss),
    'networks_at_target': int(reached.sum()),
    'settings': settings,
    'seeds': join(each.seed for each, _, _ in parts),
    'train_loss': train_loss[reached],
    'epochs': join(trained.epochs for _, trained, _ in parts),
    'measured': measured,
    'correlations': correlate(settings, measured, train_loss[reached]),
    'differences': compare(settings, measured),
  }


def load_dataset(
  parser: argparse.ArgumentParser, data_dir: Path | None
) -> data.Dataset:
  """Fashion-MNIST, preprocessed."""
  try:
    dataset = data.DATASETS['fashion_mnist'](data_dir, TRAIN_SIZE)
  except data.DataError as error:
    parser.error(str(error))
  prepare = lambda split: data.Split(
    dataset.preprocess(split.images), jnp.asarray(split.labels)
  )
  return dataset._replace(
    train=prepare(dataset.train), test=prepare(dataset.test)
  )


def main(argv: Sequence[str]) -> None:
  """Trains, measures and correlates what is not in ``--out`` yet."""
  parser = cli.Parser(
    prog='correlation',
    description='Correlates sharpness with the generalization gap.',
  )
  add = parser.add_argument
  add('--data-dir', type=Path, help='folder with the files of Fashion-MNIST')
  add('--out', type=Path, default=Path('out/correlation'), help='for results')
  args = parser.parse_args(argv)
  config = make_config()
  with cli.lock_out(parser, args.out, config):
    dataset = load_dataset(parser, args.data_dir)
    started = args.out / run_folder.STARTED_WITH
    records.write_started(started, config)
    provenance = records.provenance(
      'experiments.paper.correlation', argv, started
    )
    quantities = make_quantities(dataset)
    parts = []
    for settings in make_parts():
      name = f'{settings.batch_size[0]}-{settings.lr[0]:g}'
      report = lambda line, name=name: print(f'{name}: {line}', flush=True)
      trained = train_or_load(
        args.out / f'networks-{name}.npz', settings, dataset, report
      )
      measured = measure_or_load(
        args.out / f'measured-{name}.json', trained.params, quantities, report
      )
      parts.append((settings, trained, measured))
    results = {**provenance, **describe(parts)}
    records.write_json(args.out / run_folder.RESULTS, results)
    records.write_figure(args.out / 'correlation.png', draw(results))
  print('\n\n'.join(tables(results).values()))


if __name__ == '__main__':
  cli.run(main)
