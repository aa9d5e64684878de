"""Makes the tables and figures of the pages again from the recorded results.

::

    python -m experiments.paper.pages

Trains nothing. A table of a page is what follows ``<!-- table: NAME -->``. With
a folder, such as ``out``, prints the tables of what the programs have written
there, and draws its figures.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from pathlib import Path
import re
from typing import Any

from matplotlib.figure import Figure

from experiments import cli
from experiments import run_folder
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

# What makes tables of the results of a program, by their names.
TABLES: dict[str, Callable[[Any], dict[str, str]]] = {
  'trajectories': lambda results: {
    'trajectories': trajectories.table(results['trajectories'])
  },
  'translation': translation_tables.make,
  'correlation': correlation.tables,
  **{
    name: lambda results, name=name, make=make: {
      f'{name}, {part}': table for part, table in make(results).items()
    }
    for name, make in {
      'budget_sharpness': budget_sharpness.tables,
      **dict.fromkeys(tables.RACES, budget_report.tables),
    }.items()
  },
}
# What draws them, by the names of their files.
FIGURES: dict[str, dict[str, Callable[[Any], Figure]]] = {
  'trajectories': {
    'trajectories': trajectories.draw_trajectories,
    'balls': trajectories.draw_balls,
  },
  'correlation': {'correlation': correlation.draw},
  'budget_sharpness': {'budget_sharpness': budget_sharpness.draw},
  **{name: {name: budget_report.draw} for name in tables.RACES},
}


def make_tables(folder: Path = RESULTS) -> dict[str, str]:
  """All tables in Markdown, by name."""
  made = {}
  for name, make in TABLES.items():
    if results := run_folder.read(folder / name):
      made |= make(results)
  if compared := tables.load(folder / 'comparisons'):
    made |= tables.tables(compared)
  if folder == RESULTS:
    made |= tables.study(tables.load_study())
  return made


def make_figures(folder: Path = RESULTS) -> dict[str, Callable[[], Figure]]:
  """What draws each figure, by its path in the folder."""
  made = {}
  for name, figures in FIGURES.items():
    if results := run_folder.read(folder / name):
      for figure, draw in figures.items():
        made[f'{name}/{figure}.png'] = functools.partial(draw, results)
  if compared := tables.load(folder / 'comparisons'):
    made |= {
      'comparisons/clean.png': lambda: tables.draw_clean(compared),
      'comparisons/noise.png': lambda: tables.draw_noise(compared),
    }
  if folder == RESULTS:
    made |= {
      'study/study.png': lambda: tables.draw_study(tables.load_study()),
      'gains.png': lambda: gains.draw(gains.settings()),
    }
  return made


def remake(page: str, made: dict[str, str]) -> str:
  """A page with its tables made again."""
  return TABLE.sub(
    lambda match: f'<!-- table: {match[1]} -->\n{made[match[1]]}\n', page
  )


def main(argv: Sequence[str]) -> None:
  """Writes the pages, or prints the tables, and draws the figures."""
  parser = cli.Parser(
    prog='pages', description='Makes tables and figures from results.'
  )
  parser.add_argument(
    'folder',
    type=Path,
    nargs='?',
    default=RESULTS,
    help='with the --out of each program (the recorded ones)',
  )
  folder = parser.parse_args(argv).folder
  made = make_tables(folder)
  if not made:
    parser.error(
      f"argument folder: there are no results in '{folder}'. Write the parent"
      f' of the --out of programs, such as out.'
    )
  if folder == RESULTS:
    for path in PAGES:
      path.write_text(remake(path.read_text(), made))
  else:
    print('\n\n'.join(made.values()))
  for name, draw in make_figures(folder).items():
    records.write_figure(folder / name, draw())


if __name__ == '__main__':
  cli.run(main)
