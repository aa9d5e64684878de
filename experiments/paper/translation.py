"""Translation, German to English: Adam, SAM and ASAM.

::

    python -m experiments.paper.translation --out out/translation

The paper's recipe for IWSLT'14: a Transformer with six layers, Adam with
learning rate 5e-4, weight decay 1e-4, dropout 0.3, label smoothing 0.1, and the
paper's radii. What the paper leaves open is customary for this corpus: 4,000
warm-up steps followed by inverse square root decay, 4,096 pieces a batch,
10,000 pieces by byte-pair encoding, a beam of five. The parameters after the
last epoch are evaluated; the test sentences are translated only then.

::

    python -m experiments.paper.translation --corpus libreoffice --download

A smaller model on the help of LibreOffice, at a scale that a CPU can train,
with the paper's radii and with others, chosen on the validation set with
another seed and fewer epochs. BLEU is also shown without the test sentences
that resemble one for training. If Adam does not beat what needs no training,
the program stops.

Repeat the command with ``--resume`` after Ctrl-C, a kill, a crash, or the end
of ``--minutes``.
"""

import argparse
from collections.abc import Sequence
import functools
import hashlib
import math
from pathlib import Path
import time
from typing import Any
from typing import NamedTuple

from experiments import cli
from experiments.data import archives
from experiments.paper import corpus
from experiments.paper import corpus_iwslt
from experiments.paper import corpus_libreoffice
from experiments.paper import program
from experiments.paper import translation_floors as floors
from experiments.paper import translation_plan as plan
from experiments.paper import translation_report as report
from experiments.paper import translation_tables
from experiments.paper import translation_training as training

# Default options of each corpus.
RECIPES: dict[str, dict[str, Any]] = {
  'iwslt': {
    **{'epochs': 50, 'lr': 5e-4, 'warmup': 4000, 'dropout': 0.3},
    **{'max-tokens': 4096, 'vocab-size': 10000},
    **{'layers': 6, 'width': 512, 'hidden-size': 1024},
    **{'search-sam': [], 'search-asam': [], 'search-epochs': 50},
  },
  'libreoffice': {
    **{'epochs': 6, 'lr': 2e-3, 'warmup': 400, 'dropout': 0.1},
    **{'max-tokens': 2000, 'vocab-size': 4000},
    **{'layers': 2, 'width': 128, 'hidden-size': 256},
    'search-sam': [0.02, 0.05, 0.1, 0.2],
    'search-asam': [0.1, 0.2, 0.5, 1.0],
    'search-epochs': 3,
  },
}


class Data(NamedTuple):
  """A corpus, its vocabulary and its floors.

  Attributes:
    corpus: The pairs.
    vocabulary: A serialized SentencePiece model.
    floors: Those of the validation and of the test set.
  """

  corpus: corpus.Corpus
  vocabulary: bytes
  floors: dict[str, floors.Floors]


def make_parser(name: str = 'iwslt') -> cli.Parser:
  """The options and their help, with the defaults of a corpus."""
  recipe = RECIPES[name]
  parser = cli.Parser(
    prog='translation',
    description='Trains a Transformer to translate from German to English.',
  )
  add = parser.add_argument
  add(
    '--corpus',
    choices=list(RECIPES),
    default='iwslt',
    help='changes the defaults of other options (iwslt)',
  )
  program.add_numbers(
    parser,
    ('seeds', cli.count, 3, 'number of seeds for each optimizer'),
    ('rho-sam', cli.nonnegative, 0.1, 'radius of SAM'),
    ('rho-asam', cli.nonnegative, 0.2, 'radius of ASAM'),
    ('eta', cli.nonnegative, 0.01, 'eta of ASAM'),
    ('weight-decay', cli.nonnegative, 1e-4, 'decoupled'),
    ('label-smoothing', cli.fraction, 0.1, 'in training'),
    ('heads', cli.count, 4, 'attention heads'),
    ('beam', cli.count, 5, 'beam width'),
    *(
      (option, kind, recipe[option], meaning)
      for option, kind, meaning in (
        ('epochs', cli.count, 'number of epochs'),
        ('search-epochs', cli.count, 'number of epochs of the search'),
        ('lr', cli.positive, 'peak learning rate'),
        ('warmup', cli.count, 'steps up to the peak'),
        ('dropout', cli.fraction, 'rate'),
        ('max-tokens', cli.count, 'pieces a batch'),
        ('vocab-size', cli.count, 'pieces in the vocabulary'),
        ('layers', cli.count, 'of the encoder and of the decoder'),
        ('width', cli.count, 'of the residual stream'),
        ('hidden-size', cli.count, 'of the feed-forward layers'),
      )
    ),
  )
  for optimizer in ('sam', 'asam'):
    default = recipe[f'search-{optimizer}']
    shown = ','.join(f'{rho:g}' for rho in default) or 'none'
    add(
      f'--search-{optimizer}',
      type=cli.checked(
        lambda text: [float(x) for x in text.split(',') if x],
        lambda rhos: (
          all(x > 0 and math.isfinite(x) for x in rhos)
          and len(set(rhos)) == len(rhos)
        ),
        'different numbers > 0, separated by commas',
        '0.1,0.2',
      ),
      default=default,
      help=f'radii of {optimizer.upper()} to choose from ({shown})',
    )
  add(
    '--optimizer',
    nargs='+',
    choices=plan.METHODS,
    default=list(plan.METHODS),
    help='what is compared (all)',
  )
  add('--data-dir', type=Path, help='folder with the archives or their files')
  add(
    '--download',
    action='store_true',
    help='fetch the packages of --corpus libreoffice with apt-get',
  )
  add('--out', type=Path, default=Path('out/translation'), help='for results')
  add('--minutes', type=cli.positive(60), help='when to stop (never)')
  add('--resume', action='store_true', help='resume the run in --out')
  return parser


def parse(argv: Sequence[str]) -> tuple[cli.Parser, argparse.Namespace]:
  """Reads the command line; exits if it is wrong."""
  first = cli.Parser(prog='translation', add_help=False)
  first.add_argument('--corpus', choices=list(RECIPES), default='iwslt')
  parser = make_parser(first.parse_known_args(argv)[0].corpus)
  args = parser.parse_args(argv)
  if args.download and args.corpus != 'libreoffice':
    parser.error(
      'argument --download: is ignored without --corpus libreoffice. Leave it'
      ' out, or give both.'
    )
  if args.width % (2 * args.heads):
    parser.error(
      f'argument --width: must be a multiple of twice the heads, but got'
      f' {args.width} and {args.heads}. For example: --width 512 --heads 4.'
    )
  return parser, args


def load(parser: cli.Parser, args: argparse.Namespace) -> Data:
  """Reads the corpus; exits if that cannot be done."""
  read = {
    'iwslt': corpus_iwslt.load,
    'libreoffice': functools.partial(
      corpus_libreoffice.load, download=args.download
    ),
  }[args.corpus]
  try:
    pairs = read(args.data_dir)
    vocabulary = corpus.train_vocabulary(pairs.train, args.vocab_size)
  except (archives.DataError, ValueError) as error:
    parser.error(str(error))
  measured = {
    split: floors.measure(pairs.train, getattr(pairs, split))
    for split in plan.SPLITS
  }
  return Data(pairs, vocabulary, measured)


def main(argv: Sequence[str]) -> None:
  """Trains, translates and records."""
  start = time.monotonic()
  parser, args = parse(argv)
  data = load(parser, args)
  # With other data, a run must not be resumed.
  args.vocabulary = hashlib.sha256(data.vocabulary).hexdigest()
  deadline = start + 60 * (args.minutes or math.inf)
  trained = training.Training(
    args, *data, is_late=lambda: time.monotonic() > deadline
  )
  stopped = ''

  def results():
    return report.describe(
      args, data.corpus, data.floors, trained.runs, stopped
    )

  try:
    with program.recorded(parser, argv, args, results):
      try:
        trained.run()
      except plan.BelowFloorError as error:
        stopped = str(error)
        raise
  except training.OutOfTime:
    print('Out of time. To go on, repeat the command with --resume.')
  except plan.BelowFloorError:
    parser.exit(1, f'{parser.prog}: {stopped}\n')
  finally:
    if any(plan.is_finished(run) for run in trained.runs):
      print('\n\n'.join(translation_tables.make(results()).values()))


if __name__ == '__main__':
  cli.run(main)
