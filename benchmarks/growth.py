"""How costs grow with the number of arrays, parameters and devices.

  python -m benchmarks.growth --out benchmarks/results
  python -m benchmarks.growth --report

The first measures dense layers on CPU and writes growth.json; what it holds of
other series is kept. The second makes the table of README.md, of the exponents
k of costs that grow as x^k, and the chart from what is in results/. The series
'chips' needs the TPU compiler: pip install 'jax[tpu]'.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import json
import math
import os
from pathlib import Path
import sys
import time
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
import numpy as np
import optax

from benchmarks import compiled
from benchmarks import markdown
from benchmarks import models
from benchmarks import step_time
from benchmarks import steps
from benchmarks import timing
from benchmarks import tpu_aot
from experiments.report import records
from optax_asam import plotting

# Colors by method.
COLORS = {
  'base': plotting.COLORS['sgd'],
  'two_gradients': '#000000',
  'contrib_sam': plotting.COLORS['sam'],
  'asam': plotting.COLORS['asam'],
  'momentum_asam': plotting.COLORS['momentum_asam'],
}
METHODS = tuple(COLORS)
ROOT = Path(__file__).parent
PAGE, RESULTS = ROOT / 'README.md', ROOT / 'results' / 'growth.json'
BASE_TX = optax.sgd(0.01, momentum=0.9)
EXAMPLES = 8  # on each device
# TPU v5p slices by number of chips.
SLICES = {
  8: 'v5p:2x2x2',
  16: 'v5p:2x2x4',
  32: 'v5p:2x4x4',
  64: 'v5p:4x4x4',
  128: 'v5p:4x4x8',
  256: 'v5p:4x8x8',
  512: 'v5p:8x8x8',
}


class Series(NamedTuple):
  """Sizes, and what is reported of them.

  Attributes:
    sizes: The numbers of arrays, parameters or devices.
    costs: Keys of ``COSTS``.
    arrays: From a size to the number of arrays.
    parameters: From a size to about the number of parameters.
    devices: From a size to the devices.
  """

  sizes: Sequence[int]
  costs: Sequence[str]
  arrays: Callable[[int], int] = lambda size: 10
  parameters: Callable[[int], int] = lambda size: 10**6
  devices: Callable[[int], Sequence[Any]] = lambda size: jax.devices()[:1]


# What a width of 1,024 gives, which can be divided among all devices.
SHARDED = 5 * (1024**2 + 1024)
COMPILED = ('compile_seconds', 'instructions')
SENT = ('collectives', 'collective_bytes')
SERIES = {
  'arrays': Series(
    sizes=(10, 30, 100, 300, 1000),
    costs=('step_seconds', *COMPILED),
    arrays=lambda size: size,
  ),
  'parameters': Series(
    sizes=(10**4, 10**5, 10**6, 10**7, 10**8),
    costs=('step_seconds', 'temp_bytes', 'bytes_accessed', *COMPILED),
    parameters=lambda size: size,
  ),
  'devices': Series(
    sizes=(1, 2, 4, 8),
    costs=(*COMPILED, 'temp_bytes', *SENT),
    parameters=lambda size: SHARDED,
    devices=lambda size: jax.devices()[:size],
  ),
  'chips': Series(
    sizes=tuple(SLICES),
    costs=(*COMPILED, 'temp_bytes', *SENT),
    parameters=lambda size: SHARDED,
    devices=lambda size: tpu_aot.chips(SLICES[size]),
  ),
}
COSTS = {
  'step_seconds': 'step time',
  'compile_seconds': 'compilation (CPU time)',
  'instructions': 'instructions',
  'temp_bytes': 'temporaries',
  'bytes_accessed': 'bytes accessed',
  'collectives': 'collectives',
  'collective_bytes': 'bytes of collectives',
}


def dense_layers(arrays: int, parameters: int, examples: int) -> models.Model:
  """A model of so many arrays, and about so many parameters."""
  # A kernel and a bias have w^2 + w.
  width = round(math.sqrt(2 * parameters / arrays + 0.25) - 0.5)
  module = models.Deep(width, layers=arrays // 2 - 1, width=width)
  batch = {
    'inputs': jax.ShapeDtypeStruct((examples, width), np.float32),
    'labels': jax.ShapeDtypeStruct((examples,), np.int32),
  }
  return models.from_module(module, batch)


def sharded(tree: Any, mesh: Mesh) -> Any:
  """Shapes with all arrays sharded along their first axis."""

  def leaf(x):
    sharding = NamedSharding(mesh, P('data') if x.shape else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)


def build(
  method: steps.Method, batch: Any, devices: Sequence[Any], seconds: float
) -> tuple[Any, float]:
  """A compiled step, and the CPU time that it took.

  It is compiled again for so many seconds, and the fastest counts.
  """
  mesh = Mesh(np.array(devices), ('data',))
  carry, batch = sharded(method.carry, mesh), sharded(batch, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
  took = []
  while True:
    start = time.process_time()
    # A new function, because JAX keeps what it has traced.
    step = functools.partial(method.cycle[0])
    jitted = jax.jit(step, out_shardings=shardings, donate_argnums=0)
    program = jitted.lower(carry, batch).compile()
    took.append(time.process_time() - start)
    if sum(took) >= seconds:
      return program, min(took)


def measure(name: str, size: int, seconds: float) -> list[dict[str, Any]]:
  """The costs of each method at one size of a series.

  Args:
    name: The series.
    size: The size.
    seconds: The time after which no further round of steps is started; a
      twentieth of it is for compiling each program.
  """
  series = SERIES[name]
  devices = series.devices(size)
  model = dense_layers(
    series.arrays(size), series.parameters(size), EXAMPLES * len(devices)
  )
  cases, runners = [], {}
  batch = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, leaf.dtype), model.batch
  )
  for each in METHODS:
    method = steps.METHODS[each](model, BASE_TX)
    program, compile_seconds = build(method, model.batch, devices, seconds / 20)
    sent = compiled.total_by_kind(compiled.collectives(program.as_text()))
    cases.append(
      {
        'size': size,
        'method': each,
        'compile_seconds': round(compile_seconds, 3),
        'instructions': compiled.instructions(program),
        'temp_bytes': compiled.temp_bytes(program),
        'bytes_accessed': compiled.bytes_accessed(program),
        'collectives': sum(total.count for total in sent.values()),
        'collective_bytes': sum(total.bytes for total in sent.values()),
      }
    )
    if 'step_seconds' in series.costs:
      call = step_time.Program(program, 0.0, compile_seconds)
      runners[each] = step_time.runner_of(
        method, {method.cycle[0]: call}, batch
      )
  times = timing.interleave(runners, seconds) if runners else {}
  for case in cases:
    if (own := times.get(case['method'])) is not None:
      keys = ('step_over_base', 'step_over_base_low', 'step_over_base_high')
      ratio = timing.ratio(own, times['base'])
      case |= {'step_seconds': float(np.median(own))}
      case |= dict(zip(keys, ratio, strict=True))
  return cases


def values(
  results: Mapping[str, Any], series: str, cost: str, method: str
) -> tuple[np.ndarray, np.ndarray]:
  """The sizes of a series, and a cost of a method at each."""
  found = [
    (case['size'], case[cost])
    for case in results[series]['cases']
    if case['method'] == method
  ]
  x, y = np.array(found, float).T
  return x, y


def exponent(x: np.ndarray, y: np.ndarray) -> float | None:
  """The k of y = c x^k by least squares, in the upper half of the sizes.

  Below, what does not grow is most of the cost. None where y is zero.
  """
  upper = slice((len(x) - 1) // 2, None)
  if not (y[upper] > 0).all():
    return None
  return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])


def table(results: Mapping[str, Any]) -> str:
  """Exponents, and what ASAM adds to two gradients at both ends."""
  rows: list[list[Any]] = [
    ['over', 'cost', *(f'`{method}`' for method in METHODS), 'ASAM adds']
  ]
  for name, cost in _rows(results):
    sizes, _ = values(results, name, cost, 'base')
    exponents = [
      exponent(*values(results, name, cost, method)) for method in METHODS
    ]
    key = 'step_over_base' if cost == 'step_seconds' else cost
    (_, own), (_, two) = (
      values(results, name, key, each) for each in ('asam', 'two_gradients')
    )
    first = int(np.argmax(two > 0))  # one device has no collectives
    if cost in SENT:
      ends = [f'{own[i] - two[i]:.0f}' for i in (first, -1)]
    else:
      ends = [f'{100 * (own[i] / two[i] - 1):z.0f}%' for i in (first, -1)]
    rows.append(
      [
        f'{sizes[0]:,.0f} to {sizes[-1]:,.0f} {name}',
        COSTS[cost],
        *('' if k is None else f'{k:z.2f}' for k in exponents),
        ' to '.join(ends),
      ]
    )
  return markdown.table(rows, text_columns=2)


def load() -> dict[str, Any]:
  """The recorded results, by series."""
  return json.loads(RESULTS.read_text())


def page(text: str, results: Mapping[str, Any]) -> str:
  """A page with its table made again between the markers."""
  picture = f'results/{RESULTS.stem}.png'
  made = f'![Each cost over size, on logarithmic axes]({picture})\n\n'
  made += table(results)
  return markdown.replace_between(text, 'growth', made)


def chart(results: Mapping[str, Any]) -> Figure:
  """A panel for each row of the table, a line for each method.

  Costs are over the first that base has.
  """
  names = [name for name in SERIES if name in results]
  columns = max(len(SERIES[name].costs) for name in names)
  figure = Figure(
    figsize=(2.7 * columns + 1.5, 2.3 * len(names)),
    dpi=150,
    layout='constrained',
  )
  axes = figure.subplots(len(names), columns, squeeze=False)
  for panel in axes.flat:
    panel.set_visible(False)
  for line, name in zip(axes, names, strict=True):
    for panel, cost in zip(line, SERIES[name].costs, strict=False):
      x, base = values(results, name, cost, 'base')
      unit = next((y for y in base if y > 0), 1.0)
      for method in METHODS:
        _, y = values(results, name, cost, method)
        shown = np.where(y > 0, y, np.nan) / unit
        color = COLORS[method]
        panel.plot(x, shown, 'o-', ms=3, lw=1, color=color, label=method)
      panel.plot(x, x / x[0], '--', lw=1, color='#bbbbbb', label='linear')
      panel.set(xscale='log', yscale='log', title=COSTS[cost], visible=True)
      panel.set_xlabel(f'number of {name}')
      panel.set_xticks(x, [_label(size) for size in x], fontsize=8)
      panel.minorticks_off()
      plotting.tidy(panel)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right upper')
  return figure


def _label(size: float) -> str:
  return f'{size:g}' if size <= 1000 else f'$10^{math.log10(size):.0f}$'


def _rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Series and costs, of those that were measured."""
  return [
    (name, cost)
    for name, series in SERIES.items()
    if name in results
    for cost in series.costs
  ]


def main(argv: Sequence[str]) -> None:
  """Measures and writes growth.json, or draws what was recorded."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--report', action='store_true')
  parser.add_argument('--out', type=Path, default=Path('out/growth'))
  parser.add_argument(
    '--series',
    nargs='+',
    choices=SERIES,
    default=[name for name in SERIES if name != 'chips'],
  )
  parser.add_argument(
    '--seconds', type=float, default=20.0, help='of step times, for each size'
  )
  args = parser.parse_args(argv)
  if args.report:
    PAGE.write_text(page(PAGE.read_text(), load()))
    records.write_figure(RESULTS.with_suffix('.png'), chart(load()))
    return
  # Set before JAX initializes its backend.
  flags = os.environ.get('XLA_FLAGS', '')
  count = (
    f'--xla_force_host_platform_device_count={SERIES["devices"].sizes[-1]}'
  )
  os.environ['XLA_FLAGS'] = f'{flags} {count}'
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  provenance = (
    tpu_aot.provenance if 'chips' in args.series else records.provenance
  )
  known = provenance('benchmarks.growth', argv)
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / 'growth.json'
  small = dense_layers(4, 40, 1)
  for method in METHODS:
    # What JAX caches while tracing must not favor later ones.
    made = steps.METHODS[method](small, BASE_TX)
    build(made, small.batch, jax.devices()[:1], seconds=0)
  for name in args.series:
    cases = []
    for size in SERIES[name].sizes:
      cases += measure(name, size, args.seconds)
      print(name, size, flush=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {
      'machine': step_time.machine('cpu'),
      **known,
      'cases': cases,
    }
    records.write_json(path, results)
  print(table(json.loads(path.read_text())))


if __name__ == '__main__':
  main(sys.argv[1:])
