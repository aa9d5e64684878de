"""Makes the tables and figures of the pages again from the recorded results.

::

    python -m experiments.paper.pages

Trains nothing. A table of a page is what follows ``<!-- table: NAME -->``.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from pathlib import Path
import re
from typing import Any

from experiments import cli
from experiments.paper import budget_report
from experiments.paper import budget_sharpness
from experiments.paper import correlation
from experiments.paper import gains
from experiments.paper import tables
from experiments.paper import trajectories
from experiments.paper import translation_tables
from experiments.report import records

RESULTS = tables.RESULTS
PAGES = sorted(RESULTS.parent.glob('*.md'))
TABLE = re.compile(r'^<!-- table: (.*) -->\n((?:\|.*\n)+)', re.MULTILINE)


def make_tables() -> dict[str, str]:
  """All tables in Markdown, by name."""
  made = {
    'trajectories': trajectories.table(
      tables.read('trajectories')['trajectories']
    ),
    **translation_tables.make(tables.read('translation')),
    **correlation.tables(tables.read('correlation')),
    **tables.tables(tables.load(RESULTS / 'comparisons')),
  }
  for name in tables.RACES:
    for task, table in budget_report.tables(tables.read(name)).items():
      made[f'{name}, {task}'] = table
  networks = tables.read('budget_sharpness')
  for name, table in budget_sharpness.tables(networks).items():
    made[f'budget_sharpness, {name}'] = table
  return made


def make_figures() -> dict[str, Callable[[Path], Any]]:
  """What writes each figure to a file, by its path in the results."""

  def write(draw, *args):
    return lambda path: draw(*args).savefig(path, format='png')

  recorded = tables.read('trajectories')
  compared = tables.load(RESULTS / 'comparisons')
  return {
    'trajectories/trajectories.png': functools.partial(
      trajectories.write_trajectories, results=recorded['trajectories']
    ),
    'trajectories/balls.png': functools.partial(
      trajectories.write_balls, results=recorded['balls']
    ),
    'correlation/correlation.png': write(
      correlation.draw, tables.read('correlation')
    ),
    'budget_sharpness/budget_sharpness.png': write(
      budget_sharpness.draw, tables.read('budget_sharpness')
    ),
    'comparisons/clean.png': write(tables.draw_clean, compared),
    'comparisons/noise.png': write(tables.draw_noise, compared),
    'study/study.png': write(tables.draw_study, tables.load_study()),
    **{
      f'{name}/{name}.png': write(budget_report.draw, tables.read(name))
      for name in tables.RACES
    },
    'gains.png': write(gains.draw, gains.settings()),
  }


def remake(page: str, made: dict[str, str]) -> str:
  """A page with its tables made again."""
  return TABLE.sub(
    lambda match: f'<!-- table: {match[1]} -->\n{made[match[1]]}\n', page
  )


def main(argv: Sequence[str]) -> None:
  """Writes the pages and the figures."""
  cli.Parser(
    prog='pages', description='Makes the tables and figures of the pages again.'
  ).parse_args(argv)
  made = make_tables()
  for path in PAGES:
    path.write_text(remake(path.read_text(), made))
  for name, write in make_figures().items():
    with records.replacing(RESULTS / name) as partial:
      write(partial)


if __name__ == '__main__':
  cli.run(main)
