"""The costs of a compiled XLA program: instructions, memory, collectives.

``compiled`` is the result of ``jax.jit(f).lower(...).compile()``.
"""

from collections.abc import Iterable
import math
import re
from typing import Any
from typing import NamedTuple

from benchmarks import hlo

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)


def instructions(compiled: Any) -> int:
  """The number of instructions of the optimized program.

  Those of all its computations, fused ones included.
  """
  return sum(map(len, hlo.parse(compiled.as_text()).computations.values()))


def temp_bytes(compiled: Any) -> int:
  """The peak size of its temporaries on one device."""
  return compiled.memory_analysis().temp_size_in_bytes


def bytes_accessed(compiled: Any) -> float:
  """The bytes that it reads and writes; XLA counts a loop's body once."""
  return _operations(compiled).get('bytes accessed', 0.0)


def passes(compiled: Any, shapes: Iterable[tuple[int, ...]]) -> int:
  """The number of arrays of these shapes that its instructions write.

  Inside of a fusion, nothing is written but the result. Parameters, and what
  only renames an array, do not count.
  """
  program = hlo.parse(compiled.as_text())
  fused = {
    name
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode in ('fusion', 'call')
    for name in instruction.called('calls|to_apply')
  }
  sought = '|'.join(','.join(map(str, shape)) for shape in set(shapes))
  return sum(
    len(re.findall(rf'\w\[(?:{sought})\]', instruction.shape))
    for name, computation in program.computations.items()
    if name not in fused
    for instruction in computation.values()
    if instruction.opcode not in _FREE
  )


_FREE = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'conditional')


class Collective(NamedTuple):
  """A collective operation of a program on one device.

  Attributes:
    kind: One of ``KINDS``.
    bytes: Size of its results on one device, per execution.
    groups: Number of device groups, or of pairs of a collective-permute.
    group_size: Number of devices in a group.
    count: Number of executions per call of the program.
  """

  kind: str
  bytes: int
  groups: int
  group_size: int
  count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Total(NamedTuple):
  """Number of executions of one kind of collective, and bytes of them all."""

  count: int  # pyright: ignore[reportIncompatibleMethodOverride]
  bytes: int


class Cost(NamedTuple):
  """The costs of a program on one device.

  Attributes:
    argument_bytes: Size of the arguments.
    output_bytes: Size of the results.
    alias_bytes: Size of the results that reuse donated arguments.
    temporary_bytes: Peak size of the temporaries.
    flops: Floating-point operations; XLA counts a loop's body once.
    bytes_accessed: Bytes read and written; XLA counts a loop's body once.
    collectives: The collectives.
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
    """The memory that a call needs; donated memory counts once."""
    return (
      self.argument_bytes
      + self.output_bytes
      - self.alias_bytes
      + self.temporary_bytes
    )


def read(compiled: Any) -> Cost:
  """All costs."""
  memory = compiled.memory_analysis()
  return Cost(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temporary_bytes=temp_bytes(compiled),
    flops=_operations(compiled).get('flops', 0.0),
    bytes_accessed=bytes_accessed(compiled),
    collectives=collectives(compiled.as_text()),
  )


def collectives(text: str) -> list[Collective]:
  """The collectives of a program, in the order of its text.

  A start and its done are one collective. A collective in a loop counts once
  per iteration, and all branches of a conditional count.

  Args:
    text: The compiled program, ``compiled.as_text()``.

  Raises:
    ValueError: A collective is in a loop of unknown length, or the text is not
      a compiled program.
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
          f'{instruction.name} is in a loop of unknown length, so its number'
          f' of executions is unknown. For example: jax.lax.scan.'
        )
      start, shape = instruction, instruction.shape
      # A done repeats the shape of its start, but not its groups.
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
  """Counts and bytes by kind."""
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
  """The collectives that a program has in addition to a reference.

  Summed over kinds and groups: the bytes are those of all executions, since a
  compiler may merge collectives. Counts and bytes are negative where the
  reference has more.
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


def _operations(compiled: Any) -> dict[str, float]:
  operations = compiled.cost_analysis()
  # A list of one program before JAX 0.5.
  return operations[0] if isinstance(operations, list) else operations


def _kind(opcode: str) -> tuple[str | None, str]:
  """The kind of a collective, or None, and the suffix of its name."""
  for form in ('', '-start', '-update', '-done'):
    kind = opcode.removesuffix(form)
    if kind in KINDS and opcode == kind + form:
      return kind, form
  return None, ''


def _all_reduce_scatters(program: hlo.Program) -> set[str]:
  """The computations that are a reduce-scatter on TPU.

  There it is a fusion of an all-reduce and a slice.
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
  """Whether an asynchronous collective starts here.

  On TPU it appears in each fusion that it overlaps with, too.
  """
  return any(
    '"AsyncCollectiveStart"' in instruction.attributes
    for instruction in computation.values()
  )


def _groups(attributes: str, devices: int) -> tuple[int, int]:
  """Number and size of the device groups of a collective."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
    return pairs[1].count('{'), 2
  if mesh := re.search(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # Part of an axis is 'axis':(size of what is left out)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    size = math.prod(int(part or sizes[axis]) for axis, part in axes)
    return math.prod(map(int, sizes.values())) // size, size
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
    return int(iota[1]), int(iota[2])
  if groups := re.search(r'replica_groups=\{\{(.*?)\}\}', attributes):
    groups = groups[1].split('},{')
    return len(groups), groups[0].count(',') + 1
  return 1, devices  # replica_groups={}
