"""Times of train steps in interleaved rounds; needs neither JAX nor PyTorch."""

from collections.abc import Callable
from collections.abc import Mapping
import gc
import time
from typing import Any
from typing import NamedTuple

import numpy as np

# The columns of a row of the results, in order.
KEYS = (
  'model',
  'method',
  'batch',
  'step_over_base',
  'step_over_base_low',
  'step_over_base_high',
  'compile_over_base',
  'trace_over_base',
  'temp_bytes',
  'bytes_accessed',
  'instructions',
)


class Runner(NamedTuple):
  """Steps that can be timed.

  Attributes:
    run: Runs so many cycles of steps, and waits for the last.
    steps: The number of steps in a cycle.
  """

  run: Callable[[int], None]
  steps: int = 1


# pyperf finishes one benchmark before the next; asv recompiles every round.
def interleave(
  runners: Mapping[str, Runner],
  seconds: float,
  *,
  min_rounds: int = 5,
  max_rounds: int = 100,
  sample_seconds: float = 0.03,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
  """Seconds per step, by name, for each round.

  In a round, all are timed once in random order, so that a machine that slows
  down slows all of them down.

  Args:
    runners: What is timed.
    seconds: The time after which no further round is started.
    min_rounds: The number of rounds that are made in any case.
    max_rounds: The number of rounds after which to stop.
    sample_seconds: The least time of a measurement, which repeats cycles.
    clock: The time in seconds.
  """
  start = clock()
  repeats = {}
  for name, runner in runners.items():
    runner.run(1)  # the first call may set something up
    begin = clock()
    runner.run(1)
    took = max(clock() - begin, 1e-6)
    repeats[name] = max(1, int(np.ceil(sample_seconds / took)))
  times = {name: [] for name in runners}
  rng = np.random.default_rng(0)
  enabled = gc.isenabled()
  gc.disable()
  try:
    for i in range(max_rounds):
      if i >= min_rounds and clock() - start > seconds:
        break
      for name in rng.permutation(list(runners)):
        runner, n = runners[name], repeats[name]
        begin = clock()
        runner.run(n)
        times[name].append((clock() - begin) / (n * runner.steps))
      gc.collect()
  finally:
    if enabled:
      gc.enable()
  return {name: np.array(values) for name, values in times.items()}


def ratio(times: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
  """The median over rounds of the ratio, and its 95% bootstrap interval."""
  ratios = times / base
  rng = np.random.default_rng(0)
  resampled = rng.choice(ratios, (2000, len(ratios)))
  low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
  return float(np.median(ratios)), float(low), float(high)


def make_row(
  model: str,
  method: str,
  batch: int,
  times: np.ndarray,
  base: np.ndarray,
  costs: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
  """A row of the results; what is not known of the program is None."""
  values = dict(zip(KEYS[3:6], ratio(times, base), strict=True))
  known = {'model': model, 'method': method, 'batch': batch, **values}
  return dict.fromkeys(KEYS) | known | dict(costs or {})
