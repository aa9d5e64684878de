"""Parses the text of a compiled XLA program: computations and loops."""

import math
import re
from typing import NamedTuple


class Instruction(NamedTuple):
  """An instruction: ``name = shape opcode(operands), attributes``."""

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str

  @property
  def operand_names(self) -> list[str]:
    """The names of the operands."""
    return re.findall(r'%([\w.\-]+)', self.operands)

  def called(self, attribute: str = r'\w+') -> list[str]:
    """The computations that an attribute refers to, by default any."""
    found = re.findall(
      rf'\b({attribute})=(\{{[^{{}}]*\}}|%[\w.\-]+)',
      _STRING.sub('', self.attributes),
    )
    return [
      name
      for key, names in found
      if key in _CALLS
      for name in re.findall(r'%([\w.\-]+)', names)
    ]


Computation = dict[str, Instruction]

_CALLS = {
  'body',
  'branch_computations',
  'called_computations',
  'calls',
  'condition',
  'false_computation',
  'to_apply',
  'true_computation',
}
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(
  r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)'
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_ARRAY = re.compile(r'\b([a-z]+(\d*)\w*)\[([\d,<=]*)\]')


class Program(NamedTuple):
  """A program.

  Attributes:
    entry: The name of the entry computation.
    computations: All computations, each after those that it calls, with the
      root as its last instruction.
  """

  entry: str
  computations: dict[str, Computation]


def parse(text: str) -> Program:
  """Parses ``jax.jit(f).lower(...).compile().as_text()``."""
  entry, computation, computations = None, None, {}
  root = None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      computation = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      if computation and root:  # not always the last line
        computation[root] = computation.pop(root)
      computation = root = None
    elif computation is not None and (found := _INSTRUCTION.match(line)):
      name, shape, opcode, rest = found.groups()
      end = _closing(rest)
      computation[name] = Instruction(
        name, shape, opcode, rest[:end], rest[end:]
      )
      root = name if line.lstrip().startswith('ROOT ') else root
  if entry is None:
    raise ValueError(
      'expected the text of a compiled program, with an ENTRY computation, but'
      f' got {text[:60]!r}. For example:'
      ' jax.jit(f).lower(x).compile().as_text().'
    )
  return Program(entry, computations)


def executions(program: Program) -> dict[str, float]:
  """Executions of each computation; infinite in a loop of unknown length.

  All branches of a conditional count.
  """
  counts = dict.fromkeys(program.computations, 0.0)
  counts[program.entry] = 1.0
  for name in reversed(program.computations):
    computation = program.computations[name]
    for instruction in computation.values() if counts[name] else ():
      if instruction.opcode.endswith(('-done', '-update')):
        continue  # they refer to the computation of their start
      times = counts[name]
      if instruction.opcode == 'while':
        times *= _trip_count(instruction, computation, program)
      for callee in instruction.called() if times else ():
        counts[callee] += times
  return counts


def shape_bytes(shape: str) -> int:
  """Size of an array or tuple such as ``(f32[8,4]{1,0}, bf16[])``."""
  total = 0
  for dtype, bits, dimensions in _ARRAY.findall(shape):
    if dtype not in ('token', 'opaque'):
      lengths = re.findall(r'\d+', dimensions)
      bits = 8 if dtype == 'pred' else int(bits)
      total += -(-math.prod(map(int, lengths)) * bits // 8)
  return total


def _trip_count(
  loop: Instruction, outside: Computation, program: Program
) -> float:
  """The number of iterations of a ``while``, infinite if it is unknown.

  XLA for CPU annotates it. XLA for TPU does not: its loops are matched with
  ``for (i = start; i < end; i += step)``, the form of a ``scan``.
  """
  if known := _TRIP_COUNT.search(loop.attributes):
    return int(known[1])
  [condition], [body] = loop.called('condition'), loop.called('body')
  condition, body = program.computations[condition], program.computations[body]
  arguments = outside[loop.operand_names[0]].operand_names
  results = root(body).operand_names

  def constant(name, scope):
    """The value of a loop-invariant integer, or None."""
    instruction = _source(name, scope)
    if instruction.opcode == 'constant':
      return int(instruction.operands)
    if scope is outside or (i := _element(name, scope)) is None:
      return None
    unchanged = _element(results[i], body) == i
    return constant(arguments[i], outside) if unchanged else None

  test = root(condition)
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return math.inf
  counter, end = test.operand_names
  i, end = _element(counter, condition), constant(end, condition)
  if i is None or end is None:
    return math.inf
  start = constant(arguments[i], outside)
  increment = _source(results[i], body)
  steps = [
    constant(name, body)
    for name in increment.operand_names
    if _element(name, body) != i
  ]
  if start is None or increment.opcode != 'add' or len(steps) != 1:
    return math.inf
  [step] = steps
  return max(0, -(-(end - start) // step)) if step else math.inf


def root(computation: Computation) -> Instruction:
  """The root of a computation."""
  return computation[next(reversed(computation))]


def _source(name: str, scope: Computation) -> Instruction:
  """The instruction that produced a value, before any copies."""
  instruction = scope[name]
  while instruction.opcode in ('bitcast', 'copy'):
    instruction = scope[instruction.operand_names[0]]
  return instruction


def _element(name: str, scope: Computation) -> int | None:
  """The index of a value in the argument tuple of its computation, or None."""
  instruction = _source(name, scope)
  if instruction.opcode != 'get-tuple-element':
    return None
  if scope[instruction.operand_names[0]].opcode != 'parameter':
    return None
  return int(re.findall(r'index=(\d+)', instruction.attributes)[0])


def _closing(text: str) -> int:
  """The position of the parenthesis that closes the one before ``text``."""
  depth = 1
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return i
  return len(text)
