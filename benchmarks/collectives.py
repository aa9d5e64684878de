"""What a step sends and holds, by layout of its arrays and number of devices.

All of it is read from compiled programs, on devices that the CPU plays:

  python benchmarks/collectives.py

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

sys.path.append(str(Path(__file__).parents[1] / 'examples'))  # records

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import compiled
import large_models
import records
import steps

LAYERS, WIDTH, BATCH = 4, 1024, 256
LAYOUTS = ('replicated', 'fully sharded', 'tensor parallel', '2-D')
DEVICES = (1, 2, 4, 8)
BASE_TX = optax.adamw(1e-3)


def network(layout: str, devices: int) -> large_models.Network:
  """A network of dense layers, of 4 million parameters.

  Args:
    layout: One of ``LAYOUTS``.
    devices: The number of devices, a power of two.
  """
  model = {'replicated': 1, 'fully sharded': 1, 'tensor parallel': devices}.get(
    layout, min(2, devices)
  )
  # The odd layers hand on what the even ones split.
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


def compile_for(
  net: large_models.Network,
  step: steps.Step,
  init: Callable[[optax.Params], optax.OptState],
) -> jax.stages.Compiled:
  """Compiles a step for as many devices as a network asks for."""
  return steps.compile_step(
    step, init, net, net.mesh(jax.devices()), batch=P('data')
  )


def measure(layout: str, devices: int, step: str) -> compiled.Cost:
  """The cost of one of ``steps.NAMES``."""
  init, all_steps = steps.make_steps(loss_fn, BASE_TX)
  return compiled.read(
    compile_for(network(layout, devices), all_steps[step], init)
  )


def describe(cost: compiled.Cost) -> dict[str, Any]:
  """What the results hold of a program."""
  totals = compiled.total_by_kind(cost.collectives)
  return {
    'collectives': {kind: each._asdict() for kind, each in totals.items()},
    'temporary_bytes': cost.temporary_bytes,
    'peak_bytes': cost.peak_bytes,
  }


def table(results: Mapping[str, Any]) -> str:
  """The results in Markdown, a row for a layout and number of devices."""
  rows = [
    '| parameters | devices | two gradients send | ASAM adds | two gradients'
    ' hold | ASAM adds |',
    '|---|---|---|---|---|---|',
  ]
  cases = {
    (case['layout'], case['devices'], case['step']): case
    for case in results['cases']
  }
  for layout, devices, step in cases:
    if step != 'asam':
      continue
    asam = cases[layout, devices, 'asam']
    two = cases[layout, devices, 'two gradients']
    added = _collectives(asam) - _collectives(two)
    rows.append(
      f'| {layout} | {devices} |'
      f' {_sent(_collectives(two), _mib)} |'
      f' {_sent(added, "{} bytes".format)} |'
      f' {_mib(two["temporary_bytes"])} |'
      f' {_mib(asam["temporary_bytes"] - two["temporary_bytes"])} |'
    )
  return '\n'.join(rows)


def _collectives(case: Mapping[str, Any]) -> np.ndarray:
  """Number and bytes of all collectives of a case, integers [2]."""
  totals = [
    (each['count'], each['bytes']) for each in case['collectives'].values()
  ]
  return np.array([(0, 0), *totals]).sum(axis=0)


def _sent(total: np.ndarray, write: Callable[[float], str]) -> str:
  """Bytes and the number of collectives in which they are sent."""
  return f'{write(total[1])} in {total[0]}' if total.any() else 'nothing'


def _mib(size: float) -> str:
  return f'{size / 2**20:.2f} MiB'


def main(argv: Sequence[str]) -> None:
  """Compiles all cases, writes collectives.json and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--out', type=Path, default=Path('out/collectives'))
  args = parser.parse_args(argv)
  # Read when JAX's backend starts, which nothing has done yet.
  flags = os.environ.get('XLA_FLAGS', '')
  count = f'--xla_force_host_platform_device_count={max(DEVICES)}'
  os.environ['XLA_FLAGS'] = f'{flags} {count}'
  jax.config.update('jax_platforms', 'cpu')
  cases = [
    {
      'layout': layout,
      'devices': devices,
      'step': step,
      **describe(measure(layout, devices, step)),
    }
    for layout, devices, step in itertools.product(
      LAYOUTS, DEVICES, steps.NAMES
    )
  ]
  results = {
    **records.provenance('benchmarks/collectives.py', argv),
    'cases': cases,
  }
  args.out.mkdir(parents=True, exist_ok=True)
  records.write_json(args.out / 'collectives.json', results)
  print(table(results))


if __name__ == '__main__':
  main(sys.argv[1:])
