"""Communication and memory of a train step, by sharding and number of devices.

Read from programs compiled for simulated CPU devices:

  python -m benchmarks.collectives

writes collectives.json to --out and prints the table of docs/devices.md.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import os
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks import compiled
from benchmarks import large_models
from benchmarks import markdown
from benchmarks import steps
from experiments.report import records

LAYERS, WIDTH, BATCH = 4, 1024, 256
LAYOUTS = ('replicated', 'fully sharded', 'tensor parallel', '2-D')
DEVICES = (1, 2, 4, 8)
BASE_TX = optax.adamw(1e-3)


def network(layout: str, devices: int) -> large_models.Network:
  """Four dense layers with 4 million parameters.

  Args:
    layout: One of ``LAYOUTS``.
    devices: The number of devices, a power of two.
  """
  model = {'replicated': 1, 'fully sharded': 1, 'tensor parallel': devices}.get(
    layout, min(2, devices)
  )
  splits = {
    'replicated': [(P(), P())] * 2,
    'fully sharded': [(P('data', None), P('data'))] * 2,
    'tensor parallel': [
      (P(None, 'model'), P('model')),
      (P('model', None), P(None)),
    ],
    '2-D': [
      (P('data', 'model'), P('model')),
      (P('model', 'data'), P('data')),
    ],
  }[layout]
  specs = [
    dict(zip(('kernel', 'bias'), splits[i % 2], strict=True))
    for i in range(LAYERS)
  ]
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return large_models.Network(
    mesh_axes={'data': devices // model, 'model': model},
    params=[
      {'kernel': array(WIDTH, WIDTH), 'bias': array(WIDTH)}
      for _ in range(LAYERS)
    ],
    specs=specs,
    batch=array(BATCH, WIDTH),
    loss_fn=lambda mesh: loss_fn,
  )


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
  """The mean square of the outputs."""
  x = batch
  for layer in params:
    x = jnp.tanh(x @ layer['kernel'] + layer['bias'])
  return jnp.mean(x**2)


def measure(layout: str, devices: int, step: str) -> compiled.Cost:
  """The cost of one of ``steps.PARTITIONED``."""
  program = steps.compile_step(
    steps.METHODS[step], BASE_TX, network(layout, devices), jax.devices()
  )
  return compiled.read(program)


def table(results: Mapping[str, Any], numbers: Sequence[int] = DEVICES) -> str:
  """The results in Markdown, for these numbers of devices."""
  rows: list[list[Any]] = [
    [
      *('parameters', 'devices', 'communication of two gradients', 'ASAM adds'),
      *('temporaries of two gradients', 'ASAM adds'),
    ]
  ]
  cases = {
    (case['layout'], case['devices'], case['step']): case
    for case in results['cases']
  }
  for layout, n in itertools.product(LAYOUTS, numbers):
    asam, two = cases[layout, n, 'asam'], cases[layout, n, 'two_gradients']
    sent, memory = _collectives(two), two['temporary_bytes']
    rows.append(
      [
        *(layout, n, _sent(sent, _mib)),
        _sent(_collectives(asam) - sent, '{} bytes'.format),
        *(_mib(memory), _mib(asam['temporary_bytes'] - memory)),
      ]
    )
  return markdown.table(rows, text_columns=1)


def _collectives(case: Mapping[str, Any]) -> np.ndarray:
  """Number and bytes of all collectives of a case, integers [2]."""
  totals = [
    (each['count'], each['bytes']) for each in case['collectives'].values()
  ]
  return np.array([(0, 0), *totals]).sum(axis=0)


def _sent(total: np.ndarray, write: Callable[[float], str]) -> str:
  """The bytes of collectives, and their number."""
  return f'{write(total[1])} in {total[0]}' if total.any() else 'none'


def _mib(size: float) -> str:
  return f'{size / 2**20:.2f} MiB'


def main(argv: Sequence[str]) -> None:
  """Compiles all cases, writes collectives.json and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--out', type=Path, default=Path('out/collectives'))
  args = parser.parse_args(argv)
  # Set before JAX initializes its backend.
  flags = os.environ.get('XLA_FLAGS', '')
  count = f'--xla_force_host_platform_device_count={max(DEVICES)}'
  os.environ['XLA_FLAGS'] = f'{flags} {count}'
  jax.config.update('jax_platforms', 'cpu')
  known = records.provenance('benchmarks.collectives', argv)
  cases = []
  for case in itertools.product(LAYOUTS, DEVICES, steps.PARTITIONED):
    cost = measure(*case)
    totals = compiled.total_by_kind(cost.collectives)
    cases.append(
      {
        **dict(zip(('layout', 'devices', 'step'), case, strict=True)),
        'collectives': {kind: each._asdict() for kind, each in totals.items()},
        'temporary_bytes': cost.temporary_bytes,
        'peak_bytes': cost.peak_bytes,
      }
    )
  results = {**known, 'cases': cases}
  args.out.mkdir(parents=True, exist_ok=True)
  records.write_json(args.out / 'collectives.json', results)
  print(table(results))


if __name__ == '__main__':
  main(sys.argv[1:])
