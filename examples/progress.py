"""How far the training is, and how long it will take."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import datetime

from rich.console import Console
from rich.progress import Progress

# Seconds of the past that the estimate is based on; rich's own 30 are less than
# an epoch may take.
ESTIMATE_PERIOD = 3600.0


@contextlib.contextmanager
def shown(done: int, total: int) -> Iterator[Callable[[int], None]]:
  """Shows progress on stderr, with the remaining time, while it is entered.

  In a terminal as a bar; elsewhere, as in the log of a job, as a line for each
  percent.

  Args:
    done: What is done already.
    total: All there is to do.

  Yields:
    A function to be told how much more was done.
  """
  console = Console(stderr=True, highlight=False)
  with Progress(
    console=console,
    disable=not console.is_terminal,
    speed_estimate_period=ESTIMATE_PERIOD,
  ) as progress:
    task_id = progress.add_task('Training', completed=done, total=total)
    (task,) = progress.tasks
    reported = int(task.percentage)

    def advance(amount):
      nonlocal reported
      progress.advance(task_id, amount)
      if console.is_terminal or int(task.percentage) == reported:
        return
      reported = int(task.percentage)
      left = task.time_remaining
      estimate = '' if left is None else f', {datetime.timedelta(seconds=left)}'
      console.print(f'Training: {reported} %{estimate} left')

    yield advance
