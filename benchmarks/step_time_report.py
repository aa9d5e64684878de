"""The tables and the chart of the recorded step times."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import markdown
from experiments.report import records
from optax_asam import plotting

ROOT = Path(__file__).parent
PAGE, CHART = ROOT / 'README.md', ROOT / 'results' / 'step_time.png'
FIRST_PAGE = ROOT.parent / 'README.md'
# Dark enough on white, and safe for the color-blind (Okabe and Ito).
GRAY, BLUE, ORANGE, GREEN = '#555555', '#0072b2', '#d55e00', '#009e73'
# Steps with less than two gradients.
CHEAP = (
  'momentum_asam',
  'every_5',
  'late_20',
  'quarter_batch_ascent',
  'looksam_5',
)
# What is compared with the programs of others, by the columns of the results.
COSTS = (
  'step_over_base',
  'temp_bytes',
  'bytes_accessed',
  'instructions',
)

# Of the table on the first page: titles and gradients per step.
SUMMARY = {
  'contrib_sam': ('`optax.contrib.sam`', 2),
  'asam': ('`asam`', 2),
  'value_and_grad': ('`value_and_grad`', 2),
  'quarter_batch_ascent': ('`value_and_grad`, ascent on a quarter', 1.25),
  'every_5': ('ASAM on every fifth step, in two jitted steps', 1.2),
  'momentum_asam': ('`momentum_asam`', 1),
  'torch_asam_authors': ("PyTorch, the authors' algorithm", 2),
  'torch_asam': ('PyTorch, `pytorch_optimizer.SAM`', 2),
}
SUMMARY_MODELS = 'ResNet-20', 'ViT-S/16', 'LM'


def load() -> dict[str, dict[str, Any]]:
  """The recorded results by the name of their file; the CPU's come first."""
  paths = sorted((ROOT / 'results').glob('step_time*.json'))
  return {path.stem: json.loads(path.read_text()) for path in paths}


def time_table(results: Mapping[str, Any]) -> str:
  """Step times over the base of the same framework, methods by models."""
  rows, models, methods = _by_key(results)
  cells = [
    [
      f'`{method}`',
      *(
        f'{rows[model, method]["step_over_base"]:.2f}'
        if (model, method) in rows
        else ''
        for model in models
      ),
    ]
    for method in methods
  ]
  return markdown.table([['step', *models], *cells], text_columns=1)


def cost_table(results: Mapping[str, Any]) -> str:
  """Every cost of ``asam`` over that of the step by hand, by model."""
  rows, models, _ = _by_key(results)
  header = ['model', 'time', 'temporaries', 'bytes', 'instructions']
  body = []
  for model in models:
    if not {(model, 'asam'), (model, 'inlined_asam')} <= set(rows):
      continue
    own, reference = rows[model, 'asam'], rows[model, 'inlined_asam']
    body.append(
      [
        model,
        *(
          f'{own[key] / reference[key]:.3f}' if reference[key] else ''
          for key in COSTS
        ),
      ]
    )
  return markdown.table([header, *body], text_columns=1)


def summary(results: Mapping[str, Any]) -> str:
  """Time and temporaries over the base, of the methods of the first page."""
  rows, recorded, _ = _by_key(results)
  models = [model for model in SUMMARY_MODELS if model in recorded]
  header = ['', 'gradients', *(f'time, {model}' for model in models)]
  header += [f'memory, {model}' for model in models]
  body = []
  for method, (title, gradients) in SUMMARY.items():
    found = [rows.get((model, method)) for model in models]
    if not any(found):
      continue
    times = [f'{row["step_over_base"]:.2f}' if row else '' for row in found]
    memory = [
      f'{row["temp_bytes"] / rows[model, "base"]["temp_bytes"]:.2f}'
      if row and row['temp_bytes']
      else ''
      for model, row in zip(models, found, strict=True)
    ]
    body.append([title, f'{gradients:g}', *times, *memory])
  return markdown.table([header, *body], text_columns=1)


def tables(name: str, results: Mapping[str, Any]) -> str:
  """All tables of one file, with a line on where the numbers are from."""
  versions = ', '.join(
    f'{package} {results["versions"][package]}'
    for package in ('jax', 'optax', 'torch', 'pytorch-optimizer')
    if package in results['versions']
  )
  return (
    f'{results["machine"]}; {versions} (`results/{name}.json`). Step time over'
    f' that of the base optimizer:\n\n{time_table(results)}\n\n'
    f'Costs of `asam` over those of `inlined_asam`:\n\n{cost_table(results)}'
  )


def first_page(text: str, recorded: Mapping[str, Mapping[str, Any]]) -> str:
  """The first page with its table of costs made again."""
  return markdown.replace_between(text, 'cost', summary(recorded['step_time']))


def page(text: str, recorded: Mapping[str, Mapping[str, Any]]) -> str:
  """A page with its tables made again between the markers."""
  picture = f'results/{CHART.name}'
  parts = [f'![Step times of each method by model]({picture})']
  parts += [tables(*item) for item in recorded.items()]
  made = '\n\n'.join(parts)
  return markdown.replace_between(text, 'step_time', made)


def chart(recorded: Mapping[str, Mapping[str, Any]]) -> Figure:
  """A row of panels for each machine, a panel for each model."""
  parts = [(results, *_by_key(results)) for results in recorded.values()]
  columns = max(len(models) for _, _, models, _ in parts)
  highs = [
    row['step_over_base_high'] for _, rows, *_ in parts for row in rows.values()
  ]
  limit = min(4.0, max(2.6, 0.1 + max(highs)))
  height = sum(0.2 * len(methods) + 0.9 for *_, methods in parts)
  figure = Figure(
    figsize=(1.9 * columns + 1.5, height), dpi=150, layout='constrained'
  )
  axes = figure.subplots(len(parts), columns, squeeze=False, sharex=True)
  for line, (results, rows, models, methods) in zip(axes, parts, strict=True):
    for i, (panel, model) in enumerate(zip(line, models, strict=False)):
      for y, method in enumerate(methods):
        row = rows.get((model, method))
        if row and row['step_over_base'] > limit:
          style = {'ha': 'right', 'va': 'center', 'fontsize': 8}
          text = f'{row["step_over_base"]:.1f} →'
          panel.text(limit, y, text, color=_color(method), **style)
        elif row:
          panel.plot(
            [row['step_over_base_low'], row['step_over_base_high']],
            [y, y],
            color=_color(method),
          )
          panel.plot(row['step_over_base'], y, 'o', ms=4, color=_color(method))
      panel.set(
        title=model,
        yticks=range(len(methods)),
        xlim=(0.9, limit),
        xticks=range(1, int(limit) + 1),
      )
      panel.set_yticklabels(methods if i == 0 else [])
      panel.invert_yaxis()
      plotting.tidy(panel)
    for panel in line[len(models) :]:
      panel.set_visible(False)
    line[0].set_ylabel(results['machine'])
  figure.supxlabel(
    "Time of a step over that of the framework's base optimizer (95% interval)"
  )
  return figure


def main() -> None:
  """Writes the tables and the chart."""
  recorded = load()
  PAGE.write_text(page(PAGE.read_text(), recorded))
  FIRST_PAGE.write_text(first_page(FIRST_PAGE.read_text(), recorded))
  records.write_figure(CHART, chart(recorded))
  print(f'Wrote {PAGE}, {FIRST_PAGE} and {CHART}.')


def _by_key(
  results: Mapping[str, Any],
) -> tuple[dict[tuple[str, str], Any], Sequence[str], Sequence[str]]:
  """Rows by model and method, and both, in the order of the results."""
  rows = {(row['model'], row['method']): row for row in results['rows']}
  models = list(dict.fromkeys(model for model, _ in rows))
  fullest = max(models, key=lambda m: sum(model == m for model, _ in rows))
  return rows, models, [method for model, method in rows if model == fullest]


def _color(method: str) -> str:
  """The color of a method: by its framework and its number of gradients."""
  if method.startswith('torch'):
    return GREEN
  if method in ('base', 'two_gradients'):
    return GRAY
  return ORANGE if method in CHEAP else BLUE
