"""Sharpness against generalization, over networks of one training loss.

::

    python experiments/correlation.py

Trains networks over batch size, learning rate, weight decay and dropout on a
part of Fashion-MNIST that they overfit, each until its loss on all of it is low
enough. Then sharpness and adaptive sharpness are measured, and Kendall's rank
correlation of each with the generalization gap, as the ASAM paper does (section
3, with a Wide ResNet on CIFAR-10).

What is finished lies in ``--out``: repeat the command to go on.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import itertools
import json
from pathlib import Path
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
import numpy as np
import optax

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
import arguments
import data
import equal_loss
from optax_asam import normalization
from optax_asam import sharpness
import rank_correlation
import records
import reporting

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

# Points that sharpness is measured on; each batch has its own perturbation.
POINTS, BATCH = 1024, 128
STEPS, RESTARTS, SAMPLES = 20, 1, 20
# Without eta, and of all parameters, the measure is invariant under rescaling.
INVARIANT = {'eta': 0.0, 'mask': None}
NORMALIZATIONS = {
  'sharpness': normalization.identity(),
  'adaptive sharpness': normalization.elementwise(**INVARIANT),
}
# The middle one is reported first; the others show what hangs on it.
RADII = {
  ('sharpness', 'worst', 2): (0.02, 0.05, 0.1),
  ('sharpness', 'worst', np.inf): (2e-4, 5e-4, 1e-3),
  ('sharpness', 'average', 2): (0.002, 0.005, 0.01),
  ('sharpness', 'average', np.inf): (0.005, 0.01, 0.02),
  ('adaptive sharpness', 'worst', 2): (0.2, 0.5, 1.0),
  ('adaptive sharpness', 'worst', np.inf): (0.005, 0.01, 0.02),
  ('adaptive sharpness', 'average', 2): (0.05, 0.1, 0.2),
  ('adaptive sharpness', 'average', np.inf): (0.1, 0.2, 0.4),
}
# In --out, what its networks come from.
CONFIG = 'config.json'
# Of the rates of dropout (Okabe and Ito).
COLORS = ('#0072b2', '#e69f00', '#d55e00')
# Kwon et al., 2021, for (name, p): overall, and the mean of the four settings,
# as recalled: nobody has read them again in the paper.
PAPER = {
  ('sharpness', 2): (0.174, 0.259),
  ('adaptive sharpness', 2): (0.636, 0.429),
  ('sharpness', np.inf): (0.257, 0.316),
  ('adaptive sharpness', np.inf): (0.616, 0.626),
}


def measure_name(name: str, case: str, ord: float, rho: float) -> str:
  """What results.json calls a measure."""
  return f'{name}, {case} case, p = {ord:g}, rho = {rho:g}'


# From stacked parameters and a radius to a measure of each network.
Quantity = Callable[[optax.Params, float], jax.Array]


def make_quantities(dataset: data.Dataset) -> dict[tuple[Any, ...], Quantity]:
  """Makes all that is measured, compiled once for all radii and batch sizes."""
  network = equal_loss.Network(dataset.num_classes)
  points = jax.tree.map(
    lambda x: x[:POINTS].reshape(-1, BATCH, *x.shape[1:]), dataset.train
  )
  loss_fn = lambda params, split: equal_loss.loss_fn(params, network, split)
  error_rate = lambda params, split: equal_loss.error_rate(
    params, network, split
  )

  def make_sharpness(name, case, ord):
    options = {
      'normalization': NORMALIZATIONS[name],
      'ord': ord,
      'batches': points,
    }
    if case == 'worst':
      return lambda params, rho: sharpness.worst_case(
        loss_fn, params, rho, steps=STEPS, restarts=RESTARTS, **options
      )
    return lambda params, rho: sharpness.average_case(
      loss_fn,
      params,
      rho,
      jax.random.key(0),
      distribution='normal' if ord == 2 else 'uniform',
      samples=SAMPLES,
      **options,
    )

  quantities = {
    ('test error',): lambda params, _: error_rate(params, dataset.test),
    ('train error',): lambda params, _: error_rate(params, dataset.train),
    **{measure: make_sharpness(*measure) for measure in RADII},
  }
  # One network after the other: at once, they take more memory and as long.
  return {
    measure: jax.jit(
      lambda params, rho, each=each: jax.lax.map(
        lambda mine: each(mine, rho), params
      )
    )
    for measure, each in quantities.items()
  }


def train_all(
  dataset: data.Dataset, out: Path, report: Callable[[str], None]
) -> list[tuple[equal_loss.Settings, equal_loss.Trained]]:
  """Trains what is not trained yet, what takes about as long together."""
  trained = []
  parts = itertools.product(GRID['batch_size'], GRID['lr'])
  for i, (batch_size, lr) in enumerate(parts):
    grid = rank_correlation.make_grid(
      GRID | {'batch_size': (batch_size,), 'lr': (lr,)}
    )
    seeds = i * len(grid['lr']) + np.arange(len(grid['lr']))
    settings = equal_loss.Settings(**grid, seed=seeds)
    name = name_of(settings)
    file = out / f'networks-{name}.npz'
    if file.exists():
      trained.append((settings, load(file)))
      continue
    start = time.perf_counter()
    networks = equal_loss.train(
      settings,
      dataset.num_classes,
      dataset.train,
      target=TARGET,
      max_epochs=MAX_EPOCHS,
      report=lambda line, name=name: report(f'{name}: {line}'),
    )
    save(file, networks)
    report(f'{file} after {time.perf_counter() - start:.0f} s')
    trained.append((settings, networks))
  return trained


def name_of(settings: equal_loss.Settings) -> str:
  """What networks of one batch size and learning rate are called."""
  return f'{settings.batch_size[0]}-{settings.lr[0]:g}'


def save(file: Path, networks: equal_loss.Trained) -> None:
  """Writes networks, all of them or nothing."""
  leaves = jax.tree.leaves(networks)
  with records.replacing(file) as partial, partial.open('wb') as stream:
    np.savez(stream, *leaves)


def load(file: Path) -> equal_loss.Trained:
  """Reads what :func:`save` has written."""
  with np.load(file) as arrays:
    *leaves, train_loss, epochs = (arrays[name] for name in arrays.files)
  names = [f'Dense_{i}' for i in range(len(equal_loss.HIDDEN_SIZES) + 1)]
  biases_and_kernels = iter(leaves)
  params = {
    name: {leaf: next(biases_and_kernels) for leaf in ('bias', 'kernel')}
    for name in names
  }
  return equal_loss.Trained(params, train_loss, epochs)


def measure_all(
  params: optax.Params,
  quantities: Mapping[tuple[Any, ...], Quantity],
  file: Path,
  report: Callable[[str], None],
) -> dict[str, list[float]]:
  """All quantities [networks] by name; a file keeps what was measured."""
  measured = json.loads(file.read_text()) if file.exists() else {}
  for measure, quantity in quantities.items():
    for rho in RADII.get(measure, (0.0,)):
      name = measure_name(*measure, rho=rho) if measure in RADII else measure[0]
      if name not in measured:
        start = time.perf_counter()
        values = np.asarray(quantity(params, rho), np.float64)
        measured[name] = values.tolist()
        records.write_json(file, measured)
        report(f'{name} after {time.perf_counter() - start:.0f} s')
  return measured


def gap_of(measured: Mapping[str, Any]) -> np.ndarray:
  """What is to be predicted: by how much more is wrong on test data."""
  return np.subtract(measured['test error'], measured['train error'])


def correlate(
  settings: Mapping[str, np.ndarray],
  measured: Mapping[str, np.ndarray],
  train_loss: np.ndarray,
) -> dict[str, Any]:
  """The rank correlations of each measure with the gap in the error.

  And with what is left of the training loss, which should not matter.
  """
  gap = gap_of(measured)
  correlations = {}
  for (name, case, ord), radii in RADII.items():
    for rho in radii:
      measure = measure_name(name, case, ord, rho)
      x = measured[measure]
      taus = rank_correlation.by_setting(x, gap, settings)
      correlations[measure] = {
        'overall': rank_correlation.overall(x, gap)._asdict(),
        'by_setting': {
          setting: rank_correlation.mean_over_groups(each)._asdict()
          for setting, each in taus.items()
        },
        'mean_over_settings': rank_correlation.mean_over_settings(
          taus
        )._asdict(),
        'with_train_loss': rank_correlation.overall(x, train_loss)._asdict(),
      }
  return correlations


def compare(
  settings: Mapping[str, np.ndarray], measured: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
  """By how much more adaptive sharpness correlates with the gap than sharpness.

  Of each case and norm, between the radii that are smallest, middle and largest
  for the two.
  """
  gap = gap_of(measured)
  compared = []
  for (name, case, ord), radii in RADII.items():
    if name != 'adaptive sharpness':
      continue
    for rhos in zip(RADII['sharpness', case, ord], radii, strict=True):
      plain, adaptive = (
        measured[measure_name(each, case, ord, rho)]
        for each, rho in zip(NORMALIZATIONS, rhos, strict=True)
      )
      plain_taus, adaptive_taus = (
        rank_correlation.by_setting(x, gap, settings) for x in (plain, adaptive)
      )
      by_setting = {
        setting: adaptive_taus[setting] - plain_taus[setting]
        for setting in settings
      }
      compared.append(
        {
          'case': case,
          'p': f'{ord:g}',
          'rho': dict(zip(NORMALIZATIONS, rhos, strict=True)),
          'overall': rank_correlation.difference(
            adaptive, plain, gap
          )._asdict(),
          'mean_over_settings': rank_correlation.mean_over_settings(
            by_setting
          )._asdict(),
        }
      )
  return compared


def table(results: Mapping[str, Any]) -> str:
  """The correlations in Markdown, those of the middle radius."""
  rows = []
  for (name, case, ord), radii in RADII.items():
    found = results['correlations'][measure_name(name, case, ord, radii[1])]
    paper = PAPER[name, ord] if case == 'worst' else None
    rows.append(
      [
        f'{name}, {case} case, p = {ord:g}',
        _cell(found['overall']),
        *(_cell(found['by_setting'][setting]) for setting in GRID),
        _cell(found['mean_over_settings']),
        f'{paper[0]:.3f}, {paper[1]:.3f}' if paper else '',
      ]
    )
  settings = [name.replace('_', ' ') for name in GRID]
  return reporting.markdown(
    [
      *('measure', 'overall', *settings, 'mean of the four'),
      'paper, as recalled: overall, mean',
    ],
    rows,
  )


def difference_table(results: Mapping[str, Any]) -> str:
  """The differences in Markdown, for each of the three radii."""
  rows = {}
  for each in results['differences']:
    rows.setdefault((each['case'], each['p']), []).append(each)
  return reporting.markdown(
    [
      'adaptive less plain sharpness',
      *(
        f'{kind}, {radius} rho'
        for kind in ('overall', 'mean')
        for radius in ('smallest', 'middle', 'largest')
      ),
    ],
    [
      [
        f'{case} case, p = {p}',
        *(
          _cell(each[kind], '+.2f')
          for kind in ('overall', 'mean_over_settings')
          for each in row
        ),
      ]
      for (case, p), row in rows.items()
    ],
  )


def _cell(found: Mapping[str, float], spec: str = '.2f') -> str:
  tau, low, high = (
    format(found[name], spec) for name in ('tau', 'low', 'high')
  )
  return f'{tau} [{low}, {high}]'


def draw(results: Mapping[str, Any]) -> Figure:
  """The gap over the worst-case measures of the middle radius."""
  shown = [(key, radii[1]) for key, radii in RADII.items() if key[1] == 'worst']
  figure = Figure(
    figsize=(3.2 * len(shown), 3.2), dpi=150, layout='constrained'
  )
  all_axes = figure.subplots(1, len(shown), sharey=True)
  measured, settings = results['measured'], results['settings']
  gap = 100 * gap_of(measured)
  for axes, ((name, case, ord), rho) in zip(all_axes, shown, strict=True):
    measure = measure_name(name, case, ord, rho)
    for dropout, color in zip(GRID['dropout'], COLORS, strict=True):
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


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = arguments.Parser(
    description='Correlates sharpness with the generalization gap.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--data-dir', type=Path, help='folder with the files of Fashion-MNIST')
  add('--out', type=Path, default=Path('out/correlation'), help='for results')
  args = parser.parse_args(argv)
  check_out(parser, args.out)
  provenance = records.provenance(
    'experiments/correlation.py', argv, args.out / CONFIG
  )
  report = functools.partial(print, flush=True)

  try:
    dataset = data.DATASETS['fashion_mnist'](args.data_dir, TRAIN_SIZE)
  except data.DataError as error:
    parser.error(str(error))
  prepare = lambda split: data.Split(
    dataset.preprocess(split.images), jnp.asarray(split.labels)
  )
  dataset = dataset._replace(
    train=prepare(dataset.train), test=prepare(dataset.test)
  )
  quantities = make_quantities(dataset)
  parts = [
    (
      settings,
      networks,
      measure_all(
        networks.params,
        quantities,
        args.out / f'measured-{name_of(settings)}.json',
        report,
      ),
    )
    for settings, networks in train_all(dataset, args.out, report)
  ]
  results = describe(provenance, parts)
  records.write_json(args.out / 'results.json', results)
  with records.replacing(args.out / 'correlation.png') as partial:
    draw(results).savefig(partial, format='png')
  print(table(results), difference_table(results), sep='\n\n')


def make_config() -> dict[str, Any]:
  """All that the results hang on."""
  return {
    'grid': {name: list(values) for name, values in GRID.items()},
    'train_size': TRAIN_SIZE,
    'target': TARGET,
    'max_epochs': MAX_EPOCHS,
    'looks_per_epoch': equal_loss.LOOKS,
    'near': equal_loss.NEAR,
    'momentum': equal_loss.MOMENTUM,
    'hidden_sizes': list(equal_loss.HIDDEN_SIZES),
    'adaptive_sharpness': INVARIANT,
    'points': POINTS,
    'batch': BATCH,
    'steps': STEPS,
    'restarts': RESTARTS,
    'samples': SAMPLES,
    'radii': [
      {'measure': name, 'case': case, 'p': f'{ord:g}', 'rho': list(radii)}
      for (name, case, ord), radii in RADII.items()
    ],
    'resamples': rank_correlation.NUM_RESAMPLES,
  }


def check_out(parser: argparse.ArgumentParser, out: Path) -> None:
  """Exits if what lies in ``out`` comes from other settings."""
  file = out / CONFIG
  config = make_config()
  if file.exists() and records.read_started(file) != config:
    parser.error(
      f"argument --out: '{out}' holds results of other settings than this"
      f' program has now. Write another --out, or remove it.'
    )
  out.mkdir(parents=True, exist_ok=True)
  records.write_started(file, config)


def describe(
  provenance: Mapping[str, Any],
  parts: Sequence[
    tuple[equal_loss.Settings, equal_loss.Trained, Mapping[str, list[float]]]
  ],
) -> dict[str, Any]:
  """What results.json holds; networks that did not get there are left out."""
  train_loss = np.concatenate([networks.train_loss for _, networks, _ in parts])
  there = np.isfinite(train_loss)
  join = lambda arrays: np.concatenate([np.asarray(x) for x in arrays])[there]
  settings = {
    name: join(getattr(each, name) for each, _, _ in parts) for name in GRID
  }
  measured = {
    name: join(each[name] for _, _, each in parts) for name in parts[0][2]
  }
  return {
    **provenance,
    'config': make_config(),
    'networks': len(train_loss),
    'networks_at_target': int(there.sum()),
    'settings': settings,
    'seeds': join(each.seed for each, _, _ in parts),
    'train_loss': train_loss[there],
    'epochs': join(networks.epochs for _, networks, _ in parts),
    'measured': measured,
    'correlations': correlate(settings, measured, train_loss[there]),
    'differences': compare(settings, measured),
  }


if __name__ == '__main__':
  main(sys.argv[1:])
