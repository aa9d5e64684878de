"""Promise: the numbers on the pages of experiments are the recorded ones."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from experiments import config
from experiments.paper import budget
from experiments.paper import correlation
from experiments.paper import fine_tuning
from experiments.paper import gains
from experiments.paper import imagenet
from experiments.paper import pages
from experiments.paper import tables
from experiments.paper import translation
from experiments.paper import translation_floors
from experiments.report import records
from experiments.report import reporting
from tests.helpers import pages as documents

PAGE = '\n'.join(
  path.read_text()
  for path in pages.PAGES
  if path.stem != 'compare'  # Of the program, not of what it measured.
)
# The tables of the pages, by the name in the comment before each.
SHOWN = dict(pages.TABLE.findall(PAGE))
RUNS = tables.load(tables.RESULTS / 'comparisons')
CORRELATION = tables.read('correlation')
TRAJECTORIES = tables.read('trajectories')['trajectories']
TRANSLATION = tables.read('translation')


def test_tables():
  """Each is what the program makes of the results, as are the figures."""
  made = pages.make_tables()
  assert {name: table.rstrip('\n') for name, table in SHOWN.items()} == made
  # Two others: the list of pages, and that of old and new commands.
  assert PAGE.count('\n| --- |') == len(made) + 2
  shown = set(re.findall(r'!\[.*?\]\(results/(.*?)\)', PAGE))
  assert shown == set(pages.make_figures())
  page = '<!-- table: layers -->\n| old |\n\nText'
  made = pages.remake(page, {'layers': '| new |'})
  assert made == page.replace('old', 'new')


@pytest.mark.slow
def test_figures(tmp_path):
  """All of them are drawn."""
  for draw in pages.make_figures().values():
    records.write_figure(tmp_path / 'figure.png', draw())


def test_other_results(tmp_path, capsys):
  """Of a folder, tables are printed, and figures are drawn there."""
  with pytest.raises(SystemExit):
    pages.main([str(tmp_path)])
  assert f"there are no results in '{tmp_path}'" in capsys.readouterr().err
  (tmp_path / 'comparisons').mkdir()
  for run in 'cnn-all', 'cnn-noise-80':
    shutil.copytree(
      tables.RESULTS / 'comparisons' / run, tmp_path / 'comparisons' / run
    )
  pages.main([str(tmp_path)])
  assert SHOWN['noise, CNN'].splitlines()[-1] in capsys.readouterr().out
  assert (tmp_path / 'comparisons' / 'noise.png').exists()


def test_gains():
  """Gains are differences of the accuracies in the other tables."""
  accuracies = {
    row[0]: row[1:] for row in documents.read_rows(SHOWN['noise, CNN'])
  }
  sgd, sam, asam = (float(cell.split(' ')[0]) for cell in accuracies['40%'])
  (setting,) = (
    each
    for each in gains.settings()
    if each.title == 'CNN, 10,000 images, 40% label noise'
  )
  found = [setting.gain(method)[0] for method in ('sam', 'asam')]
  np.testing.assert_allclose(found, [sam - sgd, asam - sgd], atol=0.011)


def facts():
  """Numbers in sentences that are computed from the results, as text."""
  asam, sam = (np.array(TRAJECTORIES['paths'][x][0]) for x in ('asam', 'sam'))
  # ASAM's 11th step crosses the valley, w1 w2 = 0.04.
  before, after = np.prod(asam[10:12], axis=1)
  assert before < 0.04 < after
  yield from (f'{x:.3f}' for x in asam[10:12].mean(axis=0))
  for path in (asam, sam):
    yield f'{np.linalg.norm(path[-1] - path[12]):.3f}'
  hours = sum(run['wall_time_s'] for run in RUNS.values()) / 3600
  yield f'{hours:.1f}'
  losses = CORRELATION['train_loss']
  yield from (f'{x(losses):.3f}' for x in (min, max))
  gap = 100 * correlation.gap_of(CORRELATION['measured'])
  yield from (f'{x(gap):.1f}' for x in (min, max))
  taus = [
    each['with_train_loss']['tau']
    for each in CORRELATION['correlations'].values()
  ]
  yield from (f'{x(taus):.2f}' for x in (min, max))
  yield f'{translation_floors.NEAR:g}'
  methods = tables.read('budget')['tasks']['vit-2000']['methods']
  per_seed = {
    name: 100 * np.array(method['summary']['test_accuracy']['per_seed'])
    for name, method in methods.items()
  }
  for name, other in (
    *(('asam_tuned', 'base_tuned'), ('sam_tuned', 'base_tuned')),
    *(('normalization', 'asam'), ('friendly', 'sam')),
  ):
    more = reporting.t_interval(per_seed[name] - per_seed[other])
    yield from (f'{x:.2f}' for x in more)
    yield f'{more[0]:.1f}'
  for each in CORRELATION['differences']:
    yield f'{abs(each["mean_over_settings"]["tau"]):.2f}'


def numbers(value):
  """All numbers in JSON, as they are written in a sentence."""
  if isinstance(value, dict | list):
    for each in value.values() if isinstance(value, dict) else value:
      yield from numbers(each)
  elif isinstance(value, float):
    yield f'{value:g}'


@pytest.mark.parametrize('path', pages.PAGES, ids=lambda path: path.stem)
def test_sentences(path):
  """Decimals are in a table of the page, a setting, or computed."""
  page = path.read_text()
  prose = re.sub(
    r'```.*?```|^\|.*?$|\[\d{4}\.\d{5}\]\(.*?\)|\]\(.*?\)',
    '',
    page,
    flags=re.DOTALL | re.MULTILINE,
  )
  find = lambda text: set(re.findall(r'\d+\.\d+', text))
  settings = [
    TRAJECTORIES['settings'],
    CORRELATION['config'],
    *(
      run['config']
      for run in [*RUNS.values(), *tables.load_study(), TRANSLATION]
    ),
  ]
  shown = dict(pages.TABLE.findall(page)).values()
  known = find(' '.join([*shown, *facts(), *numbers(settings)]))
  assert find(prose) <= known | {'0.04'}  # Of the loss of the trajectories.


def test_commands():
  """The shell runs all of them, and the programs have their options."""
  script = '\n'.join(re.findall(r'```sh\n(.*?)```', PAGE, re.DOTALL))
  stubs = 'pip() { :; }; python() { printf "%s\\n" "$*"; }\n'
  lines = subprocess.run(
    ['bash', '-euc', stubs + script], capture_output=True, text=True, check=True
  ).stdout.splitlines()
  parsers = {
    'experiments.paper.budget': budget.make_parser(budget.make_program()),
    'experiments.paper.fine_tuning': fine_tuning.make_parser(),
    'experiments.paper.imagenet': imagenet.make_parser(),
    'experiments.paper.translation': translation.make_parser(),
  }
  programs = set()
  for line in lines:
    module, *options = line.removeprefix('-m ').split()
    programs.add(module)
    if module == 'experiments.compare':
      assert config.parse(options).optimizer
    elif module in parsers:
      parsers[module].parse_args(options)
  assert programs == {
    *parsers,
    'experiments.compare',
    *(
      f'experiments.paper.{name}'
      for name in (
        *('budget_sharpness', 'comparisons', 'correlation'),
        *('pages', 'trajectories'),
      )
    ),
  }
