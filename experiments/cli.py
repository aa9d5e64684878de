"""Command lines: the parser, types of options, --out, and Ctrl-C."""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
from pathlib import Path
import signal
import sys
from typing import Any
from typing import NoReturn

import filelock

from experiments import run_folder
from experiments.report import records


class Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, without the usage."""

  def __init__(self, **kwargs: Any):
    super().__init__(allow_abbrev=False, **kwargs)

  def error(self, message: str) -> NoReturn:
    """Prints what is wrong to stderr and exits with status 2."""
    if not message.endswith('.'):  # argparse's own words
      message = f'{message}. See --help.'
    self.exit(2, f'{self.prog}: error: {message}\n')


def checked(
  convert: Callable[[str], Any],
  is_valid: Callable[[Any], bool],
  needed: str,
  example: str,
) -> Callable[[str], Any]:
  """An argparse type whose error says what is needed, with an example."""

  def parse(text):
    with contextlib.suppress(ValueError):
      value = convert(text)
      if is_valid(value):
        return value
    raise argparse.ArgumentTypeError(
      f'must be {needed}, but got {text!r}. For example: {example}.'
    )

  return parse


def count(example: float) -> Callable[[str], int]:
  """An argparse type for an integer >= 1."""
  return checked(int, lambda n: n >= 1, 'an integer >= 1', f'{example:g}')


def natural(example: float) -> Callable[[str], int]:
  """An argparse type for an integer >= 0."""
  return checked(int, lambda n: n >= 0, 'an integer >= 0', f'{example:g}')


def _number(is_valid, needed, example):
  return checked(
    float, lambda x: math.isfinite(x) and is_valid(x), needed, f'{example:g}'
  )


def positive(example: float) -> Callable[[str], float]:
  """An argparse type for a finite number > 0."""
  return _number(lambda x: x > 0, 'a finite number > 0', example)


def nonnegative(example: float) -> Callable[[str], float]:
  """An argparse type for a finite number >= 0."""
  return _number(lambda x: x >= 0, 'a finite number >= 0', example)


def fraction(example: float) -> Callable[[str], float]:
  """An argparse type for a number in [0, 1)."""
  return _number(lambda x: 0 <= x < 1, 'a number in [0, 1)', example)


# Options that do not change what a run computes.
NOT_CONFIG = (
  *('out', 'resume', 'data_dir', 'threads'),
  *('download', 'minutes'),
)


def to_json(args: Any) -> dict[str, Any]:
  """The options of a program in JSON's types, which lack infinity."""
  options = vars(args)
  if 'ord' in options:
    options = {**options, 'ord': f'{args.ord:g}'}
  return records.to_json(options)


def check_out(parser: Parser, args: Any) -> filelock.AcquireReturnProxy:
  """Claims ``--out`` for a run; exits if that cannot be done.

  Returns:
    A context manager that releases it.
  """
  with _out_errors(parser, args.out):
    return run_folder.claim(args.out, determining(args), resume=args.resume)


def determining(args: Any) -> dict[str, Any]:
  """The options that determine what a run computes, in JSON's types."""
  options = to_json(args)
  return {name: options[name] for name in options if name not in NOT_CONFIG}


def lock_out(
  parser: Parser, out: Path, config: Mapping[str, Any]
) -> filelock.AcquireReturnProxy:
  """Locks ``--out`` of a program that always resumes; exits if it cannot.

  Args:
    parser: The parser of the program.
    out: The folder.
    config: What the results depend on, in JSON's types.
  """
  with _out_errors(parser, out):
    return run_folder.lock(out, config)


@contextlib.contextmanager
def _out_errors(parser: Parser, out: Path) -> Iterator[None]:
  try:
    yield
  except run_folder.RefusedError as error:
    parser.error(str(error))
  except OSError as error:
    parser.error(
      f'argument --out: must be a folder that can be written to, but got'
      f" '{out}' ({error.strerror}). For example: --out out/train."
    )


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a program with the options of the command line."""
  signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with interruptible():
      main(sys.argv[1:])
  except KeyboardInterrupt:
    print(
      'Interrupted. To go on, repeat the command, with --resume if it has it.',
      file=sys.stderr,
    )
    sys.exit(130)  # As a shell reports it.
  except OSError as error:  # Such as a full disk.
    sys.exit(f'error: {error}')


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """A block that Ctrl-C ends, though JAX swallows some KeyboardInterrupts.

  One that is raised inside a callback of the garbage collector is lost, so it
  is raised again every second until the block has ended.
  """

  def interrupt(signum, frame):
    del signum, frame
    signal.setitimer(signal.ITIMER_REAL, 1)
    raise KeyboardInterrupt

  before = {
    number: signal.signal(number, interrupt)
    for number in (signal.SIGINT, signal.SIGALRM)
  }
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
      signal.signal(number, handler)
