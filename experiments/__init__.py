"""The comparison program, and all that was measured with the library."""

import sys


def _report_interrupt(kind, error, traceback):
  """Ctrl-C is one line, also while a program imports what it needs."""
  if issubclass(kind, KeyboardInterrupt):
    print('Interrupted.', file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ['-m']:  # python -m experiments.compare
  sys.excepthook = _report_interrupt
