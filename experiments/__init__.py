"""The comparison program, and everything measured with the library."""

import os
import signal
import sys


def _exit(signum, frame):
  """Ctrl-C during imports: nothing is to be saved, and jaxlib would abort."""
  del signum, frame
  print('Interrupted.', file=sys.stderr, flush=True)
  os._exit(130)  # As a shell reports it.


if sys.argv[:1] == ['-m']:  # python -m experiments.compare
  signal.signal(signal.SIGINT, _exit)  # Until `cli.run`.
