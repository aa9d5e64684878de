"""Trains with SGD, SAM and ASAM on noisy labels, and compares them.

::

    python examples/train.py --label-noise 0.4 --out out/train

First rho of SAM and of ASAM is chosen, from equally many candidates and on
held-out data whose labels are as noisy as those for training. Then all three
train side by side with the same seeds. The test data is read once, at the end.
The optimizers are put to use in ``training.py``.
"""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import sys
import time
from typing import Any

from flax import linen as nn
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

import arguments
import data
import evaluation
import models
import reporting
import search
import training

NUM_SEARCH_SEEDS = 2


def train_side_by_side(
  trainings: Mapping[str, training.Training],
  epochs: Iterable[int],
  *,
  model: nn.Module,
  dataset: data.Dataset,
) -> tuple[dict[str, optax.Params], dict[str, dict[str, np.ndarray]]]:
  """Advances all optimizers in turn, epoch by epoch.

  So whatever else the machine does slows all of them alike.

  Args:
    trainings: The training of each optimizer.
    epochs: What to count the epochs with.
    model: The model.
    dataset: The data set with noisy labels for each seed.

  Returns:
    The parameters, and what happened: arrays [epochs, seeds] of training losses
    and held-out accuracies, and the seconds a step took in each epoch.
  """
  params = {}
  histories = {name: collections.defaultdict(list) for name in trainings}
  for _ in epochs:
    for name, history in histories.items():
      params[name], seconds = next(trainings[name])
      history['seconds_per_step'].append(seconds)
      loss = evaluation.loss(params[name], model, dataset.train)
      accuracy = evaluation.accuracy(params[name], model, dataset.held_out)
      # As NumPy arrays, lest they be computed in the time of the next epoch.
      history['train_loss'].append(np.asarray(loss))
      history['held_out_accuracy'].append(np.asarray(accuracy))
  return params, {
    name: {quantity: np.stack(values) for quantity, values in history.items()}
    for name, history in histories.items()
  }


def summarize(
  params: optax.Params,
  history: Mapping[str, np.ndarray],
  sgd_history: Mapping[str, np.ndarray],
  *,
  model: nn.Module,
  dataset: data.Dataset,
) -> dict[str, Any]:
  """What results.json holds of an optimizer; here the test data is read."""
  seconds = history['seconds_per_step']
  ratios = seconds / sgd_history['seconds_per_step']
  measured = {
    name: measure(params, model, dataset.train)
    for name, measure in evaluation.ON_TRAINING_SET.items()
  }
  measured['held_out_accuracy'] = history['held_out_accuracy'][-1]
  measured['test_accuracy'] = evaluation.accuracy(params, model, dataset.test)
  return {
    **{name: reporting.summarize(values) for name, values in measured.items()},
    'ms_per_step': 1000 * np.median(seconds),
    'time_ratio_to_sgd': np.median(ratios),
    'curves': dict(history),
  }


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  start = time.perf_counter()
  args, dataset = arguments.parse(argv)
  console = Console(markup=False)  # A path may have brackets.
  model = models.MODELS[args.model](dataset.num_classes)
  add_label_noise = functools.partial(
    data.add_label_noise, dataset, args.label_noise
  )
  train = functools.partial(
    training.train,
    model=model,
    epochs=args.epochs,
    batch_size=args.batch_size,
    learning_rate=args.lr,
  )
  candidates = {'SAM': args.rho_sam, 'ASAM': args.rho_asam}
  first_search_seed = max(args.seeds) + 1
  searches = {}

  with Progress(console=Console(stderr=True)) as progress:
    track = functools.partial(progress.track, total=args.epochs)
    if len(args.rho_sam) > 1:
      for name, radii in candidates.items():
        searches[name] = search.search_rho(
          functools.partial(train, name),
          radii,
          range(first_search_seed, first_search_seed + NUM_SEARCH_SEEDS),
          model=model,
          add_label_noise=add_label_noise,
          track=functools.partial(track, description=f'Search, {name}'),
        )
    # SGD is SAM, and ASAM, at rho = 0.
    rhos = {'SGD': 0.0, 'SAM': args.rho_sam[0], 'ASAM': args.rho_asam[0]}
    rhos |= {name: found.rho for name, found in searches.items()}
    noisy_dataset = add_label_noise(args.seeds)
    params, histories = train_side_by_side(
      {
        name: train(
          name, [rho] * len(args.seeds), args.seeds, noisy_dataset.train
        )
        for name, rho in rhos.items()
      },
      track(range(args.epochs), description='Final training'),
      model=model,
      dataset=noisy_dataset,
    )

  results = {
    **reporting.provenance(argv),
    'config': {
      **vars(args),
      'out': str(args.out),
      'momentum': training.MOMENTUM,
      'weight_decay': training.WEIGHT_DECAY,
      'sharpness_rho': {
        'sam_ball': evaluation.SAM_BALL_RHO,
        'asam_ball': evaluation.ASAM_BALL_RHO,
      },
    },
    'search': reporting.describe_searches(searches),
    'optimizers': {
      name: {
        'rho': rho,
        **summarize(
          params[name],
          histories[name],
          histories['SGD'],
          model=model,
          dataset=noisy_dataset,
        ),
      }
      for name, rho in rhos.items()
    },
    'wall_time_s': time.perf_counter() - start,
  }
  if searches:
    reporting.print_searches(console, searches)
  reporting.print_results(console, results)
  reporting.write_json(args.out / 'results.json', results)
  reporting.write_figure(args.out / 'curves.png', results)
  console.print(
    f'Wrote results.json and curves.png to {args.out} after'
    f' {results["wall_time_s"]:.0f} s.'
  )


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except KeyboardInterrupt:
    sys.exit(130)  # As a shell reports it.
