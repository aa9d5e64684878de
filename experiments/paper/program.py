"""What the programs of this folder share: options, gradients and records."""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
from typing import Any

import jax

from experiments import cli
from experiments import run_folder
from experiments.report import records
import optax_asam


def add_numbers(
  parser: argparse.ArgumentParser,
  *rows: tuple[str, Callable[[float], Callable[[str], Any]], float, str],
) -> None:
  """Adds options with numbers: name, kind, default and meaning of each.

  A kind makes an argparse type from an example, as ``cli.count`` does.
  """
  for name, kind, default, meaning in rows:
    parser.add_argument(
      f'--{name}',
      type=kind(default),
      default=default,
      help=f'{meaning} ({default:g})',
    )


def value_and_grad(
  method: str,
  loss_fn: Callable[..., Any],
  *,
  rho: float,
  eta: float,
  has_aux: bool = False,
) -> Callable[..., Any]:
  """The gradient that the base optimizer descends, ASAM's, SAM's or its own.

  Args:
    method: 'asam', 'sam', or the name of an optimizer that perturbs nothing.
    loss_fn: The loss, a function of the parameters and other arguments.
    rho: The radius of SAM and ASAM.
    eta: The eta of ASAM.
    has_aux: Whether ``loss_fn`` also returns auxiliary data.
  """
  if method not in ('sam', 'asam'):
    return jax.value_and_grad(loss_fn, has_aux=has_aux)
  return optax_asam.value_and_grad(
    loss_fn, has_aux=has_aux, rho=rho, eta=eta, adaptive=method == 'asam'
  )


@contextlib.contextmanager
def recorded(
  parser: cli.Parser,
  argv: Sequence[str],
  args: argparse.Namespace,
  describe: Callable[[], Mapping[str, Any]],
) -> Iterator[None]:
  """Records what the block trains in ``results.json``, also after Ctrl-C.

  Args:
    parser: The parser of a program of this folder, with its name.
    argv: The options as they were given.
    args: The options. An unfinished block leaves in ``args.out`` what
      ``--resume`` needs.
    describe: Returns the results so far, and whether they are 'complete'.
  """
  with cli.check_out(parser, args):
    started = args.out / run_folder.STARTED_WITH
    provenance = records.provenance(
      f'experiments.paper.{parser.prog}', argv, started
    )
    try:
      with cli.interruptible():
        yield
    finally:
      results = {**provenance, **describe()}
      # An interrupted run does not replace a finished one.
      if results['complete'] or not run_folder.is_finished(args.out):
        records.write_json(args.out / run_folder.RESULTS, results)
    run_folder.clear(args.out)
