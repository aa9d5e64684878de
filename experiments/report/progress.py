"""Progress of the training, and the remaining time."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import datetime

from rich.console import Console
from rich.progress import Progress

# The seconds that the estimate is based on; an epoch may take longer than
# rich's default of 30.
ESTIMATE_PERIOD = 3600.0


@contextlib.contextmanager
def shown(done: int, total: int) -> Iterator[Callable[[int], None]]:
  """Shows progress on stderr, with the remaining time.

  In a terminal it is a bar; elsewhere, as in a log, a line for each percent.

  Args:
    done: The work that is already done.
    total: The total work.

  Yields:
    A function to call with each amount of work that is done.
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
