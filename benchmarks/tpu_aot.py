"""Compiles train steps ahead of time for TPU slices, without a TPU.

The compiler reports the memory, collectives and bytes accessed of each chip. It
is part of libtpu: pip install 'jax[tpu]'.

  python -m benchmarks.tpu_aot --models vit-l16 --topologies v5e:2x4

Finished cases are kept in --out and not compiled again.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import gzip
import importlib.metadata
import itertools
import json
import math
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

import jax
import optax

from benchmarks import compiled
from benchmarks import large_models
from benchmarks import markdown
from benchmarks import steps
from experiments.report import records

# From a number of chips to the network.
MODELS: dict[str, Callable[[int], large_models.Network]] = {
  'vit-l16': large_models.vit,
  'decoder-8b': large_models.decoder,
}
TOPOLOGIES = ('v5e:2x4', 'v5e:16x16')
KEYS = ('model', 'slice', 'step')  # of the rows of the tables
GIB = 2**30
# The files of a case: the costs, and the program.
CASE, TEXT = 'case.json', 'program.txt.gz'


def chips(topology: str) -> Sequence[Any]:
  """The chips of a slice such as 'v5e:2x4', which need not exist.

  Call it before JAX initializes its backend.

  Raises:
    RuntimeError: libtpu is missing.
  """
  # With these, libtpu does not query the metadata server; any slice will do.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_ACCELERATOR_TYPE'] = 'v5litepod-8'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  # Only a process that uses the chips must be alone.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  jax.config.update('jax_platforms', 'cpu')
  from jax.experimental import topologies

  compiler_version()
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices


def compiler_version() -> str:
  """The version of libtpu.

  Raises:
    RuntimeError: It is missing.
  """
  try:
    return importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError as error:
    raise RuntimeError(
      "the TPU compiler is not installed. For example: pip install 'jax[tpu]'"
    ) from error


def provenance(program: str, argv: Sequence[str]) -> dict[str, Any]:
  """``records.provenance``, with the version of the TPU compiler."""
  version = compiler_version()
  known = records.provenance(program, argv)
  known['versions']['libtpu'] = version
  return known


def run_case(
  model: str,
  topology: str,
  step: str,
  folder: Path,
  known: Mapping[str, Any],
) -> None:
  """Compiles one case, and writes its costs and program to ``folder``.

  The costs come with ``known``, the provenance of the case.
  """
  devices = chips(topology)
  network = MODELS[model](len(devices))
  case = {
    'model': model,
    'topology': topology,
    'step': step,
    'parameters': large_models.count(network.params),
    'mesh': dict(network.mesh_axes),
    'batch': jax.tree.map(lambda leaf: list(leaf.shape), network.batch),
    **known,
  }
  start = time.perf_counter()
  try:
    program = steps.compile_step(
      steps.METHODS[step], optax.adamw(1e-3), network, devices
    )
  except jax.errors.JaxRuntimeError as error:
    if 'memory' not in str(error):
      raise
    case |= {'error': str(error)}
  else:
    case |= compiled.read(program)._asdict()
    text = program.as_text() or ''
    (folder / TEXT).write_bytes(gzip.compress(text.encode()))
  case['compile_s'] = round(time.perf_counter() - start, 1)
  records.write_json(folder / CASE, case)


def collect(out: Path) -> list[dict[str, Any]]:
  """All finished cases, with what is read from their programs."""
  cases = []
  for model, topology in itertools.product(MODELS, TOPOLOGIES):
    reference = None
    for step in steps.PARTITIONED:
      folder = _folder(out, model, topology, step)
      if not (folder / CASE).exists():
        continue
      case = json.loads((folder / CASE).read_text())
      network = MODELS[model](math.prod(case['mesh'].values()))
      case['parameter_bytes'] = steps.bytes_per_device(network)
      cases.append(case)
      if 'error' in case:
        continue
      cost = compiled.Cost(*(case[field] for field in compiled.Cost._fields))
      found = [compiled.Collective(*each) for each in cost.collectives]
      case['peak_bytes'] = cost.peak_bytes
      case['collectives'] = {
        kind: total._asdict()
        for kind, total in compiled.total_by_kind(found).items()
      }
      if step == 'two_gradients':
        reference = case['temporary_bytes'], found
      elif step != 'base' and reference:
        temporary_bytes = case['temporary_bytes'] - reference[0]
        added = compiled.added(found, reference[1])
        case['added'] = {
          'collectives': [collective._asdict() for collective in added],
          'temporary_bytes': temporary_bytes,
          'objections': steps.objections(added, temporary_bytes, network),
        }
  return cases


def memory_table(cases: Sequence[Mapping[str, Any]]) -> str:
  """Sizes in GiB on one chip, and the compile time."""
  rows = [
    [*KEYS, 'arguments', 'temporaries', 'peak', 'accessed', 'compile time']
  ]
  for case in cases:
    if 'error' in case:
      # The compiler reports (19.92G), followed by the limit.
      needed = re.search(r'\(([\d.]+)G\) exceeds', case['error'])
      sizes = ['', needed[1] if needed else '', 'does not fit', '']
    else:
      fields = ('argument_bytes', 'temporary_bytes', 'peak_bytes')
      sizes = [
        f'{case[field] / GIB:.2f}' for field in (*fields, 'bytes_accessed')
      ]
    rows.append([*_key(case), *sizes, f'{case["compile_s"]:.0f} s'])
  return markdown.table(rows, text_columns=3)


def collectives_table(cases: Sequence[Mapping[str, Any]]) -> str:
  """Collectives: executions, and the GiB of their results on one chip."""
  cases = [case for case in cases if 'error' not in case]
  kinds = [
    kind
    for kind in compiled.KINDS
    if any(kind in case['collectives'] for case in cases)
  ]
  rows = [[*KEYS, *kinds]]
  for case in cases:
    cells = []
    for kind in kinds:
      total = case['collectives'].get(kind)
      size = total and f'{total["bytes"] / GIB:.3f}'
      cells.append(f'{total["count"]}, {size}' if total else '')
    rows.append([*_key(case), *cells])
  return markdown.table(rows, text_columns=3)


def added_table(cases: Sequence[Mapping[str, Any]]) -> str:
  """What SAM and ASAM add to two plain gradients."""
  rows = [
    [*KEYS, 'collectives', 'executions', 'bytes', 'temporaries', 'accessed']
  ]
  accessed = {}
  for case in cases:
    key = case['model'], case['topology']
    if case['step'] == 'two_gradients':
      accessed[key] = case.get('bytes_accessed')
    if 'added' not in case:
      continue
    collectives = [
      '; '.join(str(each[field]) for each in case['added']['collectives'])
      for field in ('kind', 'count', 'bytes')
    ]
    temporaries = case['added']['temporary_bytes'] / case['parameter_bytes']
    ratio = case['bytes_accessed'] / accessed[key] - 1
    rows.append(
      [
        *key,
        case['step'],
        *collectives,
        f'{temporaries:+.2f}',
        f'{100 * ratio:+.1f}%',
      ]
    )
  return markdown.table(rows, text_columns=3)


def _key(case: Mapping[str, Any]) -> tuple[str, str, str]:
  return case['model'], case['topology'], case['step']


def _folder(out: Path, model: str, topology: str, step: str) -> Path:
  return out / f'{model} {topology} {step}'.replace(' ', '-').replace(':', '-')


def main(argv: Sequence[str]) -> None:
  """Compiles what is missing, writes tpu_aot.json and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  for name, choices in (
    ('models', MODELS),
    ('topologies', TOPOLOGIES),
    ('steps', steps.PARTITIONED),
  ):
    parser.add_argument(
      f'--{name}', nargs='+', choices=choices, default=list(choices)
    )
  parser.add_argument('--out', type=Path, default=Path('out/tpu_aot'))
  args = parser.parse_args(argv)
  jax.config.update('jax_platforms', 'cpu')
  known = provenance('benchmarks.tpu_aot', argv)
  for case in itertools.product(args.models, args.topologies, args.steps):
    folder = _folder(args.out, *case)
    if not (folder / CASE).exists():
      folder.mkdir(parents=True, exist_ok=True)
      run_case(*case, folder, known)
    result = json.loads((folder / CASE).read_text())
    line = f'{", ".join(case)} {result["compile_s"]:.0f} s'
    if result['commit'] != known['commit']:
      line += f', kept from commit {result["commit"]}'
    print(line, flush=True)
  cases = collect(args.out)
  records.write_json(args.out / 'tpu_aot.json', {**known, 'cases': cases})
  for table in (memory_table, collectives_table, added_table):
    print(f'\n{table(cases)}')
  found = [
    f'{case["model"]}, {case["topology"]}, {case["step"]}: {objection}'
    for case in cases
    for objection in case.get('added', {}).get('objections', [])
  ]
  if found:
    sys.exit('\n'.join(found))


if __name__ == '__main__':
  main(sys.argv[1:])
