"""The comparisons of the paper's tables, as runs of ``experiments.compare``.

::

    python -m experiments.paper.comparisons --jobs 2

Each run chooses rho among six values, on held-out data with one seed, and then
trains with it: the MLP on 60,000 images of Fashion-MNIST with five seeds, the
CNN on 10,000 with three. Each has a folder in ``--out``. Finished runs are
skipped and interrupted ones resumed. ``experiments.paper.pages`` makes the
tables.
"""

from collections.abc import Sequence
import concurrent.futures
import os
from pathlib import Path
import subprocess
import sys
import time

from experiments import cli
from experiments import config
from experiments import run_folder

ROOT = Path(__file__).parents[2]
EPOCHS = 30
COMMON = [
  *('--dataset=fashion_mnist', '--batch-size=128', '--label-noise=0'),
  f'--epochs={EPOCHS}',
]
MODELS = {
  'mlp': ['--model=mlp', '--seeds=5', '--merge-held-out'],
  # At 0.1, SAM with a large rho ends at chance.
  'cnn': ['--model=cnn', '--seeds=3', '--train-size=10000', '--lr=0.03'],
  'cnn-bn': ['--model=cnn-bn', '--seeds=3', '--train-size=10000'],
}

# Values of the paper's grid, whose largest is 2.
SMALL = '0.01,0.02,0.05,0.1,0.2,0.5'
LARGE = '0.05,0.1,0.2,0.5,1,2'
SAM = ['--search-seeds=1', f'--rho=sam={SMALL}']
ASAM = ['--search-seeds=1', f'--rho=asam={LARGE}']
# The options of each run, by what follows the model in its name. If an option
# is given twice, the last one counts.
ALL = {'all': [*SAM, *ASAM]}
CLASSIFICATION = {
  'sgd-twice': ['--optimizer=sgd', f'--epochs={2 * EPOCHS}'],
  'asam-inf': [
    *('--optimizer=asam', '--ord=inf', '--search-seeds=1'),
    '--rho=asam=0.0005,0.001,0.002,0.005,0.01,0.02',
  ],
  'asam-biases': ['--optimizer=asam', *ASAM, '--normalize-biases'],
}
FILTERWISE = {
  'asam-filterwise': ['--optimizer=asam', *ASAM, '--normalization=filterwise']
}
NOISE = {
  f'noise-{percent}': [*SAM, *ASAM, f'--label-noise={percent / 100:g}']
  for percent in (20, 40, 60, 80)
}
M_SHARPNESS = {
  f'm-{m}': [
    *('--optimizer=sam,asam', *SAM, *ASAM, f'--m-sharpness={m}'),
    # One group after the other: faster on CPU.
    '--m-sharpness-by=microbatching',
  ]
  for m in (32, 8)
}
LAYERS = {
  # So few parameters need larger radii.
  'perturb-normalization': [
    *('--optimizer=sam,asam', '--perturb=normalization', '--search-seeds=1'),
    '--rho=0.2,0.5,1,2,5,10',
  ],
  'perturb-others': ['--optimizer=sam,asam', '--perturb=others', *SAM, *ASAM],
}
VARIANTS = {
  'mlp': ALL | CLASSIFICATION | NOISE | M_SHARPNESS,
  'cnn': ALL | CLASSIFICATION | FILTERWISE | NOISE,
  'cnn-bn': ALL | LAYERS,
}
RUNS = {
  f'{model}-{variant}': [*COMMON, *MODELS[model], *options]
  for model, variants in VARIANTS.items()
  for variant, options in variants.items()
}


def is_finished(name: str, out: Path) -> bool:
  """Whether a run has finished; a ValueError if it had other options."""
  if not run_folder.is_finished(out / name):
    return False
  before = run_folder.read(out / name)['config']
  now = cli.determining(config.parse(RUNS[name]))
  if change := run_folder.find_change(before, now):
    raise ValueError(
      f"argument --out: '{out / name}' holds a run with {change}. Remove it, or"
      f' write another --out.'
    )
  return True


def run(name: str, out: Path, data_dir: Path | None) -> bool:
  """Runs or resumes a comparison in a process. Whether it finished."""
  folder = out / name
  folder.mkdir(parents=True, exist_ok=True)
  relative = lambda path: os.path.relpath(path, ROOT)
  command = [
    *(sys.executable, '-m', 'experiments.compare'),
    f'--out={relative(folder)}',
    *RUNS[name],
    *([f'--data-dir={relative(data_dir)}'] if data_dir else []),
    *(['--resume'] if run_folder.is_resumable(folder) else []),
  ]
  start = time.perf_counter()
  with (folder / 'output.txt').open('a') as output:
    code = subprocess.run(
      command,
      cwd=ROOT,
      stdout=output,
      stderr=subprocess.STDOUT,
      # Each run on one core.
      env=os.environ | {'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false'},
      check=False,
    ).returncode
  minutes = (time.perf_counter() - start) / 60
  how = 'finished' if code == 0 else f'ended with exit code {code}'
  print(f'{name} {how} after {minutes:.0f} min: {output.name}', flush=True)
  return code == 0


def main(argv: Sequence[str]) -> None:
  """Runs what is not finished."""
  parser = cli.Parser(
    prog='comparisons',
    description="Runs the comparisons of the paper's tables.",
    epilog=f'Runs: {", ".join(RUNS)}.',
  )
  add = parser.add_argument
  add('runs', nargs='*', metavar='run', help='which ones (all)')
  add('--data-dir', type=Path, help='folder with the files of Fashion-MNIST')
  add('--out', type=Path, default=Path('out/comparisons'), help='for results')
  add('--jobs', type=cli.count(2), default=1, help='how many at a time (1)')
  args = parser.parse_args(argv)
  unknown = sorted(set(args.runs) - set(RUNS))
  if unknown:
    parser.error(
      f'argument run: there is no run {unknown[0]!r}. Write some of'
      f' {", ".join(RUNS)}, or none for all.'
    )
  try:
    left = [
      name for name in args.runs or RUNS if not is_finished(name, args.out)
    ]
  except ValueError as error:
    parser.error(str(error))
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    jobs = [pool.submit(run, name, args.out, args.data_dir) for name in left]
    try:
      are_finished = [job.result() for job in jobs]
    except BaseException:
      # Ctrl-C has ended the runs in progress; the others must not start.
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  if not all(are_finished):
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main)
