"""Times the train steps of this library and of others, and their compilation.

  python -m benchmarks.step_time --out out/step_time
  python -m benchmarks.step_time --report

The first writes step_time.json (with --device gpu, step_time_<card>.json) when
all models are finished; until then they are in .partial-step_time.json. The
second makes the tables of README.md and the chart from what is in results/.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import concurrent.futures
import contextlib
import functools
import json
import math
import os
from pathlib import Path
import platform
import re
import subprocess
import sys
import time
import traceback
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import compiled
from benchmarks import models
from benchmarks import steps
from benchmarks import timing
from benchmarks import workloads
from experiments.report import records

ROOT = Path(__file__).parent
# No step of its own: its time is a mean of those of the base and of ASAM, and
# its programs are those of every_5.
LATE = 'late_20'
TORCH = ('torch_base', 'torch_asam', 'torch_asam_authors')
# As the table has them.
METHODS = (
  'base',
  'two_gradients',
  'inlined_asam',
  'contrib_sam',
  'sam',
  'asam',
  'value_and_grad',
  'nnx_value_and_grad',
  'momentum_asam',
  'every_5',
  LATE,
  'quarter_batch_ascent',
  'looksam_5',
  *TORCH,
)


class Program(NamedTuple):
  """A compiled step.

  Attributes:
    call: From a carry and a batch to a carry, which may overwrite the first.
    trace_seconds: The time to trace and lower it, in Python.
    compile_seconds: The time that XLA took.
  """

  call: jax.stages.Compiled
  trace_seconds: float
  compile_seconds: float


def build(
  step: steps.Step, carry: steps.Carry, batch: Any, rounds: int = 1
) -> Program:
  """Traces and compiles a step; of several rounds, the fastest counts."""
  made = []
  for _ in range(rounds):
    start = time.perf_counter()
    # A new function, because JAX keeps what it has traced.
    function = functools.partial(step)
    lowered = jax.jit(function, donate_argnums=0).lower(carry, batch)
    middle = time.perf_counter()
    call = lowered.compile()
    made.append(Program(call, middle - start, time.perf_counter() - middle))
  return Program(
    made[-1].call,
    min(each.trace_seconds for each in made),
    min(each.compile_seconds for each in made),
  )


def runner_of(
  method: steps.Method, programs: Mapping[steps.Step, Program], batch: Any
) -> timing.Runner:
  """Runs a method from its own copy of the parameters."""
  params = models.fill(method.model.params)
  # Every method needs memory that it alone gives away.
  carry = steps.Carry(
    params, method.init(params), models.fill(method.model.model_state)
  )
  cycle = [programs[step].call for step in method.cycle]

  def run(n):
    nonlocal carry
    for _ in range(n):
      for call in cycle:
        carry = call(carry, batch)
    jax.block_until_ready(carry)

  return timing.Runner(run, len(cycle))


def costs_of(
  method: steps.Method,
  programs: Mapping[steps.Step, Program],
  base: Program,
  *,
  is_timed: bool,
) -> dict[str, Any]:
  """What compiled programs say: sums, the peak, and the mean over a cycle."""
  own = [programs[step] for step in method.programs]
  over = lambda field: (
    sum(getattr(each, field) for each in own) / getattr(base, field)
  )
  return {
    'compile_over_base': over('compile_seconds') if is_timed else None,
    'trace_over_base': over('trace_seconds') if is_timed else None,
    'temp_bytes': max(compiled.temp_bytes(each.call) for each in own),
    'bytes_accessed': float(
      np.mean([compiled.bytes_accessed(programs[s].call) for s in method.cycle])
    ),
    'instructions': sum(compiled.instructions(each.call) for each in own),
  }


def measure(
  name: str,
  device: str,
  *,
  methods: Sequence[str],
  seconds: float,
  compile_seconds: float = math.inf,
  jobs: int = 1,
  compile_rounds: int = 1,
  **timing_options: Any,
) -> list[dict[str, Any]]:
  """The rows of a model.

  Args:
    name: One of ``workloads.WORKLOADS``.
    device: 'cpu' or 'gpu', for the size of the batch.
    methods: Names; the base is always there, as is what ``LATE`` needs.
    seconds: The time for everything; at least a few rounds are timed.
    compile_seconds: The time after which no compilation is started.
    jobs: The number of threads that compile. With several, the times of
      tracing and compiling say nothing, so they are left out.
    compile_rounds: How often each program is compiled.
    timing_options: For :func:`timing.interleave`.
  """
  start = time.monotonic()
  model, base_tx = models.make(name, device), models.optimizer(name)
  batch = models.random_batch(name, model)
  if LATE in methods:
    methods = [*methods, 'asam', 'every_5']
  made = {}
  for method in dict.fromkeys(('base', *methods)):
    if method in steps.METHODS:
      with reporting(f'{name}, {method}'):
        made[method] = steps.METHODS[method](model, base_tx)
  programs = compile_all(
    made,
    model.batch,
    name,
    jobs=jobs,
    rounds=compile_rounds,
    end=start + compile_seconds,
  )
  base_program = programs[made['base'].cycle[0]]
  runners = {}
  for method, each in made.items():
    if all(step in programs for step in each.cycle):
      with reporting(f'{name}, {method}'):
        runners[method] = runner_of(each, programs, batch)
        runners[method].run(1)
  left = seconds - (time.monotonic() - start)
  times = timing.interleave(runners, left, **timing_options)
  costs = {
    method: costs_of(
      made[method],
      programs,
      base_program,
      is_timed=jobs == 1,
    )
    for method in runners
  }
  if LATE in methods and 'asam' in times:
    times[LATE] = 0.8 * times['base'] + 0.2 * times['asam']
    costs[LATE] = costs.get('every_5', {})
  for other in ('inlined_asam', 'contrib_sam'):
    if {'asam', other} <= set(times):
      median, low, high = timing.ratio(times['asam'], times[other])
      print(f'{name} asam over {other} {median:.3f} ({low:.3f}, {high:.3f})')
  examples = len(batch['labels'])
  return [
    timing.make_row(
      name, method, examples, times[method], times['base'], costs[method]
    )
    for method in METHODS
    if method in times
  ]


def compile_all(
  made: Mapping[str, steps.Method],
  batch: Any,
  name: str,
  *,
  jobs: int,
  rounds: int,
  end: float,
) -> dict[steps.Step, Program]:
  """The programs of all methods; what fails is reported and left out."""
  todo = [
    (method, step, each.carry)
    for method, each in made.items()
    for step in each.programs
  ]
  programs = {}

  def compile_one(method, step, carry):
    with reporting(f'{name}, {method}'):
      if time.monotonic() > end:
        raise TimeoutError('no time is left to compile it')
      programs[step] = build(step, carry, batch, rounds)

  # The base comes first and alone: later programs reuse what XLA has tuned for
  # its operations. What JAX caches while tracing must not favor later ones.
  jax.jit(functools.partial(todo[0][1]), donate_argnums=0).trace(
    todo[0][2], batch
  )
  compile_one(*todo[0])
  if jobs == 1:
    for each in todo[1:]:
      compile_one(*each)
  else:
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
      for future in [pool.submit(compile_one, *each) for each in todo[1:]]:
        future.result()
    finally:
      pool.shutdown(cancel_futures=True)
  return programs


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
  """Reports an error and goes on: one failure must not cost the other rows."""
  try:
    yield
  except Exception as error:
    traceback.print_tb(error.__traceback__)
    message = f'{what}: {type(error).__name__}: {error}'
    print(message[:2000], file=sys.stderr, flush=True)


def measure_in_torch(
  python: str, device: str, names: Sequence[str], seconds: float
) -> Iterator[dict[str, Any]]:
  """What ``benchmarks.torch_steps`` prints in a process of its own.

  Its versions come first, then rows.
  """
  command = [python, '-m', 'benchmarks.torch_steps', '--device', device]
  command += ['--seconds', str(seconds), '--models', *names]
  with subprocess.Popen(
    command, cwd=ROOT.parent, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout or ():
      yield json.loads(line)
  if process.returncode:
    print(f'{command} failed: {process.returncode}', file=sys.stderr)


def machine(device: str) -> str:
  """The processor, and for a CPU the number of its cores."""
  if device == 'gpu':
    return jax.devices()[0].device_kind
  name = platform.processor()
  if (info := Path('/proc/cpuinfo')).exists():
    found = re.search(r'model name\s*: (.*)', info.read_text())
    name = found[1].strip() if found else name
  count = getattr(os, 'sched_getaffinity', None)  # Not on macOS.
  cores = len(count(0)) if count else os.cpu_count() or 1
  return f'{name}, {cores} core{"s"[: cores > 1]}'


def main(argv: Sequence[str]) -> None:
  """Times everything, or draws what was recorded."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--out', type=Path, default=Path('out/step_time'))
  parser.add_argument('--minutes', type=float, default=15.0)
  parser.add_argument(
    '--models', nargs='+', choices=workloads.WORKLOADS, default=workloads.MODELS
  )
  parser.add_argument(
    '--methods', nargs='+', choices=METHODS, default=list(METHODS)
  )
  parser.add_argument('--min-rounds', type=int, default=5)
  parser.add_argument('--max-rounds', type=int, default=100)
  parser.add_argument(
    '--jobs', type=int, help='threads that compile; by default 1, on a GPU 8'
  )
  parser.add_argument(
    '--compile-rounds', type=int, default=1, help='the fastest counts'
  )
  parser.add_argument(
    '--torch', help='a Python with torch and pytorch_optimizer for those rows'
  )
  args = parser.parse_args(argv)
  if args.report:
    from benchmarks import step_time_report

    step_time_report.main()
    return
  end = time.monotonic() + 60 * args.minutes
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  jax.config.update('jax_enable_compilation_cache', False)
  jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda'}[args.device])
  args.out.mkdir(parents=True, exist_ok=True)
  known = records.provenance('benchmarks.step_time', argv)
  results = {
    'machine': machine(args.device),
    'versions': known['versions'],
    'commit': known['commit'],
    'rows': [],
  }
  card = re.sub(r'\W+', '_', results['machine'].lower()).strip('_')
  suffix = f'_{card}' if args.device == 'gpu' else ''
  path = args.out / f'step_time{suffix}.json'
  partial = path.with_name(f'{records.PARTIAL}{path.name}')

  def add(rows):
    results['rows'] += rows
    results['rows'].sort(
      key=lambda row: (
        args.models.index(row['model']),
        METHODS.index(row['method']),
      )
    )
    records.write_json(partial, results)
    for row in rows:
      print(
        *(row['model'], row['method'], f'{row["step_over_base"]:.3f}'),
        f'({row["step_over_base_low"]:.3f}, {row["step_over_base_high"]:.3f})',
        flush=True,
      )

  try:
    if args.torch:
      # First, because it is quick, in a sixth of the time.
      for found in measure_in_torch(
        args.torch, args.device, args.models, 60 * args.minutes / 6
      ):
        if 'versions' in found:
          results['versions'] |= found['versions']
        elif found['method'] in args.methods:
          add([found])
    for i, name in enumerate(args.models):
      left = end - time.monotonic()
      if left <= 0:
        sys.exit(f'No time is left for {name}.')
      with reporting(name):
        add(
          measure(
            name,
            args.device,
            methods=args.methods,
            seconds=left / (len(args.models) - i),
            compile_seconds=0.4 * left,
            jobs=args.jobs or (8 if args.device == 'gpu' else 1),
            compile_rounds=args.compile_rounds,
            min_rounds=args.min_rounds,
            max_rounds=args.max_rounds,
          )
        )
      jax.clear_caches()
  except BaseException:
    if results['rows']:
      print(f'Finished models are in {partial}.', file=sys.stderr)
    raise
  # Not before: a part of a run must not replace a finished one.
  if results['rows']:
    partial.replace(path)
    print(f'Wrote {path}.')


if __name__ == '__main__':
  main(sys.argv[1:])
