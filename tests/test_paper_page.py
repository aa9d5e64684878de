"""Promise: the paper's tables on experiments/README.md are of recorded runs."""

import json
import pathlib
import re

import pytest

import arguments
import comparisons
import correlation
import imagenet
import iwslt
import paper_runs
import paper_tables
import records

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
PAGE = (EXPERIMENTS / 'README.md').read_text()
RUNS = paper_tables.load()
CORRELATION = json.loads(
  (EXPERIMENTS / 'correlation' / 'results.json').read_text()
)


@pytest.mark.parametrize('name', RUNS)
def test_run(name, tmp_path):
  """It is of a commit as it was, with the options that the run has now.

  Each rho is of six, by one seed.
  """
  results = RUNS[name]
  assert re.fullmatch('[0-9a-f]{40}', results['commit'])
  assert '=/' not in results['command']
  args = paper_runs.parse(*comparisons.RUNS[name], f'--out={tmp_path / "out"}')
  options = records.to_json(vars(args) | {'ord': f'{args.ord:g}'})
  differing = {
    option
    for option, value in options.items()
    if results['config'][option] != value
  }
  assert differing <= set(arguments.NOT_CONFIG)
  assert set(results['search']) == set(args.rho)
  for method, search in results['search'].items():
    candidates = [candidate['rho'] for candidate in search['candidates']]
    assert candidates == args.rho[method]
    assert len(candidates) == 6
    assert len(search['seeds']) == 1
  assert set(results['optimizers']) == set(args.optimizer)
  for measured in results['optimizers'].values():
    assert len(measured['test_accuracy']['per_seed']) == len(args.seeds)


def test_classification():
  """All of the table is on the page."""
  assert f'\n{paper_tables.classification(RUNS)}\n' in PAGE


def test_correlation():
  """Its networks are as many as the page says; the table and figure are there.

  It comes from the settings that the program has now.
  """
  assert re.fullmatch('[0-9a-f]{40}', CORRELATION['commit'])
  assert CORRELATION['config'] == correlation.make_config()
  assert f'\n{correlation.table(CORRELATION)}\n' in PAGE
  losses = CORRELATION['train_loss']
  assert len(losses) >= 100
  assert f'\n{len(losses)} networks' in PAGE
  assert max(losses) <= correlation.TARGET
  text = ' '.join(PAGE.split())
  assert f'between {min(losses):.3f} and {max(losses):.3f}' in text
  assert '](correlation/correlation.png)' in PAGE
  assert (EXPERIMENTS / 'correlation' / 'correlation.png').exists()


@pytest.mark.parametrize(
  ('program', 'rows'),
  [(imagenet, ('top 1', 'top 5')), (iwslt, ('validation', 'test'))],
)
def test_published(program, rows):
  """What the paper reports is what the programs have."""
  for i, row in enumerate(rows):
    cells = ' | '.join(f'{scores[i]:.2f}' for scores in program.PAPER.values())
    assert f'\n| {row} | {cells} |\n' in PAGE


# Numbers in sentences that are no results: settings.
SETTINGS = {'0.02', '0.03', '0.1', '0.2', '0.9'}


def test_prose():
  """Each number with a decimal point in a sentence is one of a table."""
  _, title, page = PAGE.partition('## Sharpness against generalization')
  assert title
  page = re.sub(
    r'```.*?```|\[arXiv[^\]]*\]\(.*?\)|\]\(.*?\)', '', page, flags=re.DOTALL
  )
  tables = ' '.join(re.findall(r'^\|.*$', page, re.MULTILINE))
  prose = re.sub(r'^\|.*$', '', page, flags=re.MULTILINE)
  find = lambda text: set(re.findall(r'\d+\.\d+', text))
  losses = {f'{loss:.3f}' for loss in CORRELATION['train_loss']}
  assert find(prose) <= find(tables) | losses | SETTINGS
