"""Promise: the paper's tables on experiments/README.md are of recorded runs."""

import json
import pathlib
import re
import subprocess

import numpy as np
import pytest

import arguments
import comparisons
import correlation
import imagenet
import iwslt
import paper_runs
import paper_tables
import records
import reporting

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


def test_all_is_recorded():
  """Every run that the program has, and no other."""
  assert set(RUNS) == set(comparisons.RUNS)


@pytest.mark.parametrize('table', paper_tables.tables(RUNS))
def test_table(table):
  """All of it is on the page."""
  assert f'\n{table}\n' in PAGE


@pytest.mark.parametrize(
  'file', ['comparisons/noise.png', 'correlation/correlation.png']
)
def test_figure(file):
  """It is there, and on the page."""
  assert f']({file})' in PAGE
  assert (EXPERIMENTS / file).exists()


def test_correlation():
  """Its networks are as many as the page says; the table is there.

  It comes from the settings that the program has now.
  """
  assert re.fullmatch('[0-9a-f]{40}', CORRELATION['commit'])
  assert CORRELATION['config'] == correlation.make_config()
  assert f'\n{correlation.table(CORRELATION)}\n' in PAGE
  assert f'\n{correlation.difference_table(CORRELATION)}\n' in PAGE
  losses = CORRELATION['train_loss']
  assert len(losses) >= 100
  assert f'\n{len(losses)} networks' in PAGE
  assert max(losses) <= correlation.TARGET


def test_correlation_intervals():
  """Those that include zero are the ones of which the page says so."""
  around_zero = lambda found: found['low'] <= 0 <= found['high']
  for each in CORRELATION['differences']:
    assert around_zero(each['overall'])
  behind = [
    (each['case'], each['p'], f'{-each["mean_over_settings"]["tau"]:.2f}')
    for each in CORRELATION['differences']
    if not around_zero(each['mean_over_settings'])
  ]
  assert behind == [('worst', '2', '0.10'), ('worst', '2', '0.17')]
  assert 'by 0.10 at the smallest rho and 0.17 at the middle' in PAGE
  for (name, case, ord), radii in correlation.RADII.items():
    measure = correlation.measure_name(name, case, ord, radii[1])
    by_setting = CORRELATION['correlations'][measure]['by_setting']
    assert around_zero(by_setting['weight_decay'])
    assert by_setting['dropout']['low'] > 0
    that_one = (name, case, ord) == ('adaptive sharpness', 'worst', 2)
    assert (by_setting['batch_size']['low'] > 0) != that_one


@pytest.mark.parametrize(
  ('program', 'rows'),
  [(imagenet, ('top 1', 'top 5')), (iwslt, ('validation', 'test'))],
)
def test_published(program, rows):
  """What the paper reports is what the programs have."""
  for i, row in enumerate(rows):
    cells = ' | '.join(f'{scores[i]:.2f}' for scores in program.PAPER.values())
    assert f'\n| {row} | {cells} |\n' in PAGE


def mean(run, method):
  """The accuracy of a method in a run, in percent as on the page."""
  accuracy = RUNS[run]['optimizers'][method]['test_accuracy']['mean']
  return f'{100 * accuracy:.2f}'


def span(model):
  """The lowest and the highest accuracy without wrong labels."""
  means = [
    mean(f'{model}-{run}', method)
    for run, method in paper_tables.CLASSIFICATION.values()
    if f'{model}-{run}' in RUNS
  ]
  return f'{min(means)} to {max(means)} %'


def numbers(pairs):
  """Accuracies of runs and methods."""
  return [mean(run, method) for run, method in pairs]


def spread(values):
  """The smallest and the largest."""
  return [min(values), max(values)]


# What the page says, with the numbers of the results.
SENTENCES = [
  (
    'on the MLP around {} and on the CNN around {}',
    [span('mlp'), span('cnn')],
  ),
  (
    'beyond the intervals at 60 % by {} against {}, and behind at 80 %, by'
    ' {} against {}',
    numbers(
      (f'mlp-noise-{percent}', method)
      for percent in (60, 80)
      for method in ('asam', 'sam')
    ),
  ),
  (
    'it ends with {:.0f} % of the labels for training as they were given, SAM'
    ' with {:.0f} % and ASAM with {:.0f} %.',
    [
      100 * RUNS['cnn-noise-60']['optimizers'][method]['train_accuracy']['mean']
      for method in paper_tables.METHODS
    ],
  ),
  (
    'the paper has {2:.2f} against {1:.2f}, and ASAM behind',
    paper_tables.NOISE[80],
  ),
  (
    'ASAM has {} with groups of 8, {} with 32 and {} with the whole batch,'
    ' SGD {},',
    numbers(
      [
        *((f'mlp-{run}', 'asam') for run in ('m-8', 'm-32', 'all')),
        ('mlp-all', 'sgd'),
      ]
    ),
  ),
  (
    'SAM has {}, {} and {}.',
    numbers((f'mlp-{run}', 'sam') for run in ('m-8', 'm-32', 'all')),
  ),
  (
    '{} with the normalization layers alone, {} with all, {} with all others',
    numbers(
      (f'cnn-bn-{run}', 'asam')
      for run in ('perturb-normalization', 'all', 'perturb-others')
    ),
  ),
  (
    'The {} runs took {:.1f} hours of one core',
    [len(RUNS), sum(run['wall_time_s'] for run in RUNS.values()) / 3600],
  ),
  ('a cosine over {} epochs', [comparisons.EPOCHS]),
  (
    'each trained until its training loss is at most {}',
    [correlation.TARGET],
  ),
  ('it is then between {:.3f} and {:.3f}', spread(CORRELATION['train_loss'])),
  (
    'The gap differs little, from {:.1f} to {:.1f} %',
    spread(100 * correlation.gap_of(CORRELATION['measured'])),
  ),
  (
    'the training loss as well, with a tau from {:.2f} to {:.2f}',
    spread(
      [
        each['with_train_loss']['tau']
        for each in CORRELATION['correlations'].values()
      ]
    ),
  ),
]


@pytest.mark.parametrize(('sentence', 'parts'), SENTENCES)
def test_sentence(sentence, parts):
  """It has the numbers of the results."""
  assert sentence.format(*parts) in ' '.join(PAGE.split())


def interval(run, method):
  """The lower and the upper end of an accuracy's interval."""
  per_seed = RUNS[run]['optimizers'][method]['test_accuracy']['per_seed']
  center, half = reporting.t_interval(per_seed)
  return center - half, center + half


@pytest.mark.parametrize(
  'shown',
  [
    *(
      [
        (f'{model}-{run}', method)
        for run, method in paper_tables.CLASSIFICATION.values()
        if f'{model}-{run}' in RUNS
      ]
      for model in ('mlp', 'cnn')
    ),
    *(
      [(f'{model}-noise-{percent}', method) for method in ('sam', 'asam')]
      for model, percents in (('mlp', (20, 40)), ('cnn', (20, 40, 60, 80)))
      for percent in percents
    ),
    [
      ('mlp-all', 'sgd'),
      *(
        (f'mlp-{run}', method)
        for run in paper_tables.M_SHARPNESS.values()
        for method in ('sam', 'asam')
      ),
    ],
  ],
)
def test_within_intervals(shown):
  """Where the page says that intervals overlap, they do."""
  lows, highs = zip(*(interval(*each) for each in shown), strict=True)
  assert max(lows) <= min(highs)


@pytest.mark.parametrize(
  ('better', 'worse'),
  [
    (('mlp-noise-60', 'asam'), ('mlp-noise-60', 'sam')),
    (('mlp-noise-80', 'sam'), ('mlp-noise-80', 'asam')),
    (('mlp-noise-80', 'asam'), ('mlp-noise-80', 'sgd')),
    (('cnn-bn-perturb-normalization', 'asam'), ('cnn-bn-all', 'asam')),
  ],
)
def test_beyond_intervals(better, worse):
  """Where the page says that one is ahead, or behind, beyond the intervals."""
  assert interval(*better)[0] > interval(*worse)[1]


@pytest.mark.parametrize('model', ['mlp', 'cnn'])
@pytest.mark.parametrize('method', ['sam', 'asam'])
def test_gain_grows_with_wrong_labels(model, method):
  """The mean exceeds SGD's the more, the more labels are wrong."""
  means = [
    [
      RUNS[f'{model}-{run}']['optimizers'][name]['test_accuracy']['mean']
      for run in paper_tables.NOISE_RUNS.values()
    ]
    for name in ('sgd', method)
  ]
  gains = np.subtract(means[1], means[0])
  assert (np.diff(gains) > 0).all()


def test_commands(tmp_path):
  """The shell runs all of them; those of train.py have options that it has."""
  blocks = re.findall(r'```sh\n(.*?)```', PAGE, re.DOTALL)
  stubs = 'pip() { :; }; python() { printf "%s\\n" "$*"; }\n'
  script = stubs + '\n'.join(blocks)
  output = subprocess.run(
    ['bash', '-euc', script], capture_output=True, text=True, check=True
  ).stdout
  programs = set()
  for i, line in enumerate(output.splitlines()):
    program, *options = line.split()
    programs.add(program)
    assert (EXPERIMENTS.parent / program).exists()
    if program == 'examples/train.py':
      args = paper_runs.parse(*options, f'--out={tmp_path / str(i)}')
      assert args.optimizer
  assert 'examples/train.py' in programs


# Numbers in sentences that are no results: settings.
SETTINGS = {'0.02', '0.03', '0.1', '0.2', '0.9'}


def test_prose():
  """Each number with a decimal point is of a table or a checked sentence."""
  _, title, page = PAGE.partition('## Sharpness against generalization')
  assert title
  page = re.sub(
    r'```.*?```|\[arXiv[^\]]*\]\(.*?\)|\]\(.*?\)', '', page, flags=re.DOTALL
  )
  tables = ' '.join(re.findall(r'^\|.*$', page, re.MULTILINE))
  prose = re.sub(r'^\|.*$', '', page, flags=re.MULTILINE)
  find = lambda text: set(re.findall(r'\d+\.\d+', text))
  checked = ' '.join(sentence.format(*parts) for sentence, parts in SENTENCES)
  assert find(prose) <= find(tables) | find(checked) | SETTINGS
