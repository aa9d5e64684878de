"""Reads what a compiled XLA program costs: collectives, memory, operations."""

from collections.abc import Iterable
import math
import re
from typing import Any
from typing import NamedTuple

import hlo

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)


class Collective(NamedTuple):
  """A collective operation of a program, as one device sees it.

  Attributes:
    kind: One of ``KINDS``.
    bytes: Size of its results on one device, each time it runs.
    groups: Number of groups of devices; of pairs, for a collective-permute.
    group_size: Number of devices in a group.
    count: How often it runs in one call of the program.
  """

  kind: str
  bytes: int
  groups: int
  group_size: int
  count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Total(NamedTuple):
  """How often collectives of one kind run, and the bytes of all their runs."""

  count: int  # pyright: ignore[reportIncompatibleMethodOverride]
  bytes: int


class Cost(NamedTuple):
  """What a program costs on one device.

  Attributes:
    argument_bytes: Size of the arguments.
    output_bytes: Size of the results.
    alias_bytes: Size of the results that take the place of donated arguments.
    temporary_bytes: Peak size of all else.
    flops: Floating-point operations; XLA counts the body of a loop once.
    bytes_accessed: Bytes read and written; XLA counts the body of a loop once.
    collectives: All of them.
  """

  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temporary_bytes: int
  flops: float
  bytes_accessed: float
  collectives: list[Collective]

  @property
  def peak_bytes(self) -> int:
    """The memory that a call needs, what is donated counted once."""
    return (
      self.argument_bytes
      + self.output_bytes
      - self.alias_bytes
      + self.temporary_bytes
    )


def read(compiled: Any) -> Cost:
  """The cost of what ``jax.jit(f).lower(...).compile()`` returns."""
  memory = compiled.memory_analysis()
  operations = compiled.cost_analysis()
  if isinstance(operations, list):  # JAX before 0.5
    operations = operations[0]
  return Cost(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    flops=operations.get('flops', 0.0),
    bytes_accessed=operations.get('bytes accessed', 0.0),
    collectives=collectives(compiled.as_text()),
  )


def collectives(text: str) -> list[Collective]:
  """The collectives of a program, in the order of its text.

  A start and its done are one collective. One in a loop counts as often as the
  loop runs; of the branches of a conditional, all count.

  Args:
    text: The compiled program, ``compiled.as_text()``.

  Raises:
    ValueError: A collective is in a loop of unknown length, or the text is not
      that of a compiled program.
  """
  program = hlo.parse(text)
  counts = hlo.executions(program)
  devices = math.prod(
    int(n) for n in re.findall(r'num_(?:partitions|replicas)=(\d+)', text)
  )
  scattered = _all_reduce_scatters(program)
  found = []
  for name, computation in program.computations.items():
    for instruction in computation.values() if counts[name] else ():
      kind, form = _kind(instruction.opcode)
      if kind is None or form in ('-start', '-update'):
        continue
      if 'chain_id=' in instruction.attributes and not _starts(computation):
        continue
      if math.isinf(counts[name]):
        raise ValueError(
          f'{instruction.name} is in a loop of unknown length, so how often it'
          f' runs is unknown, too. Write the loop as a jax.lax.scan.'
        )
      start, shape = instruction, instruction.shape
      # A done repeats the results of its start, and nothing else of it.
      while _kind(start.opcode)[1] in ('-done', '-update'):
        start = computation[start.operand_names[0]]
      if name in scattered:
        kind, shape = 'reduce-scatter', hlo.root(computation).shape
      found.append(
        Collective(
          kind,
          hlo.shape_bytes(shape),
          *_groups(start.attributes, devices),
          int(counts[name]),
        )
      )
  return found


def total_by_kind(found: Iterable[Collective]) -> dict[str, Total]:
  """Counts and bytes, for each kind that there is."""
  totals = {}
  for collective in found:
    count, size = totals.get(collective.kind, (0, 0))
    totals[collective.kind] = Total(
      count + collective.count, size + collective.count * collective.bytes
    )
  return totals


def added(
  found: Iterable[Collective], reference: Iterable[Collective]
) -> list[Collective]:
  """What a program has beyond another one, each sort in one line.

  A sort is a kind over groups of one number and size. The bytes are those of
  all runs together, since a compiler merges collectives as it likes; counts and
  bytes are negative where the other program has more.
  """
  totals: dict[tuple[str, int, int], list[int]] = {}
  for sign, program in ((1, found), (-1, reference)):
    for kind, size, groups, group_size, count in program:
      total = totals.setdefault((kind, groups, group_size), [0, 0])
      total[0] += sign * count
      total[1] += sign * count * size
  return [
    Collective(kind, size, groups, group_size, count)
    for (kind, groups, group_size), (count, size) in totals.items()
    if count or size
  ]


def _kind(opcode: str) -> tuple[str | None, str]:
  """The kind of a collective, if it is one, and what follows its name."""
  for form in ('', '-start', '-update', '-done'):
    kind = opcode.removesuffix(form)
    if kind in KINDS and opcode == kind + form:
      return kind, form
  return None, ''


def _all_reduce_scatters(program: hlo.Program) -> set[str]:
  """The computations by which TPU writes a reduce-scatter.

  They are an all-reduce of which each device keeps a slice, as one operation.
  """
  return {
    name
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode == 'fusion'
    for name in instruction.called('calls')
    if name.startswith('all-reduce-scatter')
  }


def _starts(computation: hlo.Computation) -> bool:
  """Whether a collective that runs beside others starts here.

  TPU writes it into each operation that it runs beside, too.
  """
  return any(
    '"AsyncCollectiveStart"' in instruction.attributes
    for instruction in computation.values()
  )


def _groups(attributes: str, devices: int) -> tuple[int, int]:
  """Number and size of the groups of devices of a collective."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return pairs[1].count('{'), 2
  if mesh := re.search(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # Part of an axis is written as 'axis':(what is left out)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    size = math.prod(int(part or sizes[axis]) for axis, part in axes)
    return math.prod(map(int, sizes.values())) // size, size
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
    return int(iota[1]), int(iota[2])
  if groups := re.search(r'replica_groups=\{\{(.*?)\}\}', attributes):
    groups = groups[1].split('},{')
    return len(groups), groups[0].count(',') + 1
  return 1, devices  # replica_groups={}
