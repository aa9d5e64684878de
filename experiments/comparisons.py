"""The comparisons of the paper's tables, as runs of ``examples/train.py``.

::

    python experiments/comparisons.py --jobs 2

A run chooses rho among six values, on held-out data with one seed, and trains
with it: the MLP on 60,000 images of Fashion-MNIST with five seeds, the CNN on
10,000 with three. Each has a folder in ``--out``. What is finished is not run
again, and what was interrupted goes on.
"""

from collections.abc import Sequence
import concurrent.futures
import functools
import json
import os
from pathlib import Path
import shlex
import subprocess
import sys
import time

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
import arguments

ROOT = Path(__file__).parents[1]
EPOCHS = 30
COMMON = [
  *('--dataset=fashion_mnist', '--batch-size=128', '--label-noise=0'),
  f'--epochs={EPOCHS}',
]
MODELS = {
  'mlp': ['--model=mlp', '--seeds=5', '--merge-held-out'],
  # At 0.1, SAM of a large rho ends at chance.
  'cnn': ['--model=cnn', '--seeds=3', '--train-size=10000', '--lr=0.03'],
  'cnn-bn': ['--model=cnn-bn', '--seeds=3', '--train-size=10000'],
}

# Values of the paper's grid, which ends at 2.
SMALL = '0.01,0.02,0.05,0.1,0.2,0.5'
LARGE = '0.05,0.1,0.2,0.5,1,2'
SAM = ['--search-seeds=1', f'--rho=sam={SMALL}']
ASAM = ['--search-seeds=1', f'--rho=asam={LARGE}']
# The options of each run, by the rest of its name. Of those given twice, the
# last ones count.
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
    # One group after the other, the faster way on CPU.
    '--m-sharpness-by=microbatching',
  ]
  for m in (32, 8)
}
LAYERS = {
  # So few parameters take larger radii.
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


def finished_command(folder: Path) -> list[str]:
  """The command of a run that has come to its end; empty of any other."""
  file = folder / 'results.json'
  results = json.loads(file.read_text()) if file.exists() else {}
  return shlex.split(results['command']) if results.get('complete') else []


def run(name: str, out: Path, options: Sequence[str]) -> bool:
  """Runs what is not finished; its output goes to a file. Whether it ended."""
  folder = out / name
  if finished_command(folder):
    return True
  folder.mkdir(parents=True, exist_ok=True)
  # Relative to where it runs, as the results name them.
  command = [
    *(sys.executable, 'examples/train.py'),
    f'--out={os.path.relpath(folder, ROOT)}',
    *RUNS[name],
    *options,
    *(['--resume'] if (folder / arguments.STARTED_WITH).exists() else []),
  ]
  start = time.perf_counter()
  with (folder / 'output.txt').open('a') as output:
    code = subprocess.run(
      command,
      cwd=ROOT,
      stdout=output,
      stderr=subprocess.STDOUT,
      # Each run on one core.
      env={
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false',
      },
      check=False,
    ).returncode
  minutes = (time.perf_counter() - start) / 60
  how = 'finished' if code == 0 else f'ended with exit code {code}'
  print(f'{name} {how} after {minutes:.0f} min: {output.name}', flush=True)
  return code == 0


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  parser = arguments.Parser(
    description="Runs the comparisons of the paper's tables.",
    epilog=f'Runs: {", ".join(RUNS)}.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('runs', nargs='*', metavar='run', help='which ones (all)')
  add('--data-dir', type=Path, help='folder with the files of Fashion-MNIST')
  add('--out', type=Path, default=Path('out/comparisons'), help='for results')
  add(
    '--jobs', type=arguments.count(2), default=1, help='how many at a time (1)'
  )
  args = parser.parse_args(argv)
  unknown = sorted(set(args.runs) - set(RUNS))
  if unknown:
    parser.error(
      f'there is no run {unknown[0]!r}. Write some of {", ".join(RUNS)}, or'
      f' none for all.'
    )
  for name in args.runs or RUNS:
    command = finished_command(args.out / name)
    if command and command[3 : 3 + len(RUNS[name])] != RUNS[name]:
      parser.error(
        f"argument --out: '{args.out / name}' holds a run with other options"
        f' than {name} has now. Remove it, or write another --out.'
      )
  options = []
  if args.data_dir:
    options = [f'--data-dir={os.path.relpath(args.data_dir, ROOT)}']
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    ended = pool.map(
      functools.partial(run, out=args.out, options=options), args.runs or RUNS
    )
    if not all(list(ended)):
      sys.exit(1)


if __name__ == '__main__':
  main(sys.argv[1:])
