"""The tables of ``experiments.paper.translation``."""

from collections.abc import Mapping
from typing import Any

from experiments.paper import translation_plan as plan
from experiments.paper import translation_report
from experiments.report import reporting

# Kwon et al., 2021: BLEU on the validation and on the test set.
PUBLISHED = {
  'adam': (35.34, 34.86),
  'sam': (35.52, 34.78),
  'asam': (35.66, 35.02),
}
TITLES = {
  'copy': 'German, copied',
  'nearest_neighbour': 'nearest neighbour',
  'adam': 'Adam',
  'sam': 'SAM',
  'asam': 'ASAM',
}


def table(results: Mapping[str, Any]) -> str:
  """BLEU in Markdown, compared with the floors and the paper's.

  Of each: mean ± half its interval over seeds, and the bootstrap interval.
  """
  rows = [
    [TITLES[name], '', *(f'{floors[name]:.2f}' for floors in both), '', '', '']
    for both in [[results['floors'][split] for split in plan.SPLITS]]
    for name in both[0]
  ]
  for name, each in results['optimizers'].items():
    optimizer = name.removesuffix(translation_report.SEARCHED)
    difference = each.get('test_bleu_minus_adam')
    edge = name != optimizer and results['search'][optimizer]['at_edge']
    rows.append(
      [
        TITLES[optimizer] + name.removeprefix(optimizer),
        f'{each["rho"]:g}{"*" if edge else ""}' if each['rho'] else '',
        _cell(each['validation_bleu']),
        _cell(each['test_bleu']),
        _cell(each['test_far_bleu']),
        _cell(difference, '+') if difference else '',
        ', '.join(f'{score:.2f}' for score in PUBLISHED[optimizer])
        if name == optimizer
        else '',
      ]
    )
  return reporting.markdown(
    [
      *('BLEU', 'rho', 'validation', 'test', 'test without near-duplicates'),
      *('test, minus Adam', 'paper: validation, test'),
    ],
    rows,
  )


def _cell(summary: Mapping[str, Any], sign: str = '') -> str:
  mean = reporting.format_mean(summary['per_seed'], factor=1, sign=sign)
  if 'bootstrap_95' not in summary:  # Of runs of their own.
    return mean
  low, high = summary['bootstrap_95']
  return f'{mean} [{low:{sign}.2f}, {high:{sign}.2f}]'


def search_table(results: Mapping[str, Any]) -> str:
  """The BLEU on the validation set of each candidate; a star for the choice."""
  return reporting.markdown(
    ['search', 'rho: validation BLEU'],
    [
      [
        TITLES[name],
        ', '.join(
          f'{x["rho"]:g}: {x["validation_bleu"]:.2f}'
          f'{"*" if x["rho"] == found["rho"] else ""}'
          for x in found['candidates']
        ),
      ]
      for name, found in results['search'].items()
    ],
  )


def make(results: Mapping[str, Any]) -> dict[str, str]:
  """All tables in Markdown, by the names that the page has."""
  return {
    'translation': table(results),
    **(
      {'translation, search': search_table(results)}
      if results['search']
      else {}
    ),
  }
