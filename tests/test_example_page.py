"""Promise: the numbers of examples/README.md are those of recorded runs."""

import json
import pathlib
import re

import pytest

import study

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'
PAGE = (EXAMPLES / 'README.md').read_text()


def read_ratios(program, model):
  """The times of a recorded run beside the first one's, by name."""
  file = EXAMPLES / 'costs' / f'{program}-{model}.json'
  timed = json.loads(file.read_text())['timed']
  return {name: each['time_ratio_to_first'] for name, each in timed.items()}


def test_cost_of_input():
  """A row for each way to a batch."""
  models = ('mlp', 'cnn')
  ratios = [read_ratios('input', model) for model in models]
  for batch in ('ready', 'gathered', 'augmented'):
    cells = ' | '.join(f'{each[batch]:.2f}' for each in ratios)
    assert f'\n| {batch} | {cells} |\n' in PAGE


def test_cost_of_seed_axis():
  """The time of vmap beside that of the loop, for each model."""
  models = ('mlp', 'cnn', 'resnet20')
  ratios = [read_ratios('seed-axis', model)['vmap'] for model in models]
  cells = ' | '.join(f'{ratio:.2f}' for ratio in ratios)
  assert f'\n| {" | ".join(models)} |\n|---|---|---|\n| {cells} |\n' in PAGE


def test_study():
  """All of the table, of runs that ended and of a commit as it was."""
  results = study.load()
  assert study.make_table(results) in PAGE
  for result in results:
    assert result['complete']
    assert not result['commit'].endswith('-dirty')
  _, _, section = PAGE.partition('## A study of wrong labels')
  section, _, _ = section.partition('\n## ')
  means = {
    f'{100 * optimizer["test_accuracy"]["mean"]:.1f}'
    for result in results
    for optimizer in result['optimizers'].values()
  }
  named = re.findall(r'(\d+\.\d) %', section)
  assert named
  assert set(named) <= means


@pytest.mark.parametrize(
  ('result', 'optimizer', 'low', 'others_above', 'sentence'),
  [
    ('mlp-0.4', 'sam', 0.50, 0.83, 'at 50 % while four end above 83 %'),
    ('cnn-0.4-lr0.03', 'asam', 0.10, 0.73, 'above 73 % and one at chance'),
  ],
)
def test_study_seeds(result, optimizer, low, others_above, sentence):
  """One seed of them fails, as the page says."""
  recorded = json.loads((EXAMPLES / 'study' / f'{result}.json').read_text())
  per_seed = recorded['optimizers'][optimizer]['test_accuracy']['per_seed']
  lowest, *others = sorted(per_seed)
  assert lowest == pytest.approx(low, abs=0.005)
  assert min(others) > others_above
  assert sentence in ' '.join(PAGE.split())


def test_study_figure():
  """A panel for each result with the accuracies of its optimizers."""
  results = study.load()
  panels = study.draw(results).axes
  assert len(panels) == len(results)
  drawn = [line.get_ydata()[-1] for axes in panels for line in axes.lines]
  recorded = [
    optimizer['held_out_accuracy']['mean']
    for result in results
    for optimizer in result['optimizers'].values()
  ]
  assert sorted(drawn) == pytest.approx(sorted(recorded))
