"""Translation, German to English: Adam, SAM and ASAM on IWSLT'14.

::

    python -m experiments.paper.translation --out out/translation

The paper's recipe: a Transformer with six layers, Adam with learning rate 5e-4,
weight decay 1e-4, dropout 0.3, label smoothing 0.1, and the paper's radii. What
the paper leaves open is customary for this corpus: 4,000 warm-up steps followed
by inverse square root decay, 4,096 pieces a batch, 10,000 pieces by byte-pair
encoding, a beam of five. The parameters after the last epoch are evaluated; the
test sentences are read only then.

Repeat the command with ``--resume`` after Ctrl-C, a kill or a crash.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np
import sentencepiece

from experiments import checkpoints
from experiments import cli
from experiments.data import archives
from experiments.models import transformer
from experiments.paper import corpus
from experiments.paper import program
from experiments.paper import seq2seq
from experiments.report import progress
from experiments.report import reporting

METHODS = ('adam', 'sam', 'asam')
# Kwon et al., 2021: BLEU on the validation and on the test set.
PUBLISHED = {
  'adam': (35.34, 34.86),
  'sam': (35.52, 34.78),
  'asam': (35.66, 35.02),
}


class Data(NamedTuple):
  """A corpus and its vocabulary, a serialized SentencePiece model."""

  corpus: corpus.Corpus
  vocabulary: bytes


def make_parser() -> cli.Parser:
  """The options and their help."""
  parser = cli.Parser(
    prog='translation',
    description='Trains a Transformer to translate from German to English.',
  )
  program.add_numbers(
    parser,
    ('seeds', cli.count, 3, 'number of seeds for each optimizer'),
    ('epochs', cli.count, 50, 'number of epochs'),
    ('rho-sam', cli.nonnegative, 0.1, 'radius of SAM'),
    ('rho-asam', cli.nonnegative, 0.2, 'radius of ASAM'),
    ('eta', cli.nonnegative, 0.01, 'eta of ASAM'),
    ('lr', cli.positive, 5e-4, 'peak learning rate'),
    ('warmup', cli.count, 4000, 'steps up to the peak'),
    ('weight-decay', cli.nonnegative, 1e-4, 'decoupled'),
    ('dropout', cli.fraction, 0.3, 'rate'),
    ('label-smoothing', cli.fraction, 0.1, 'in training'),
    ('max-tokens', cli.count, 4096, 'pieces a batch'),
    ('vocab-size', cli.count, 10000, 'pieces in the vocabulary'),
    ('layers', cli.count, 6, 'of the encoder and of the decoder'),
    ('width', cli.count, 512, 'of the residual stream'),
    ('hidden-size', cli.count, 1024, 'of the feed-forward layers'),
    ('heads', cli.count, 4, 'attention heads'),
    ('beam', cli.count, 5, 'beam width'),
  )
  add = parser.add_argument
  add(
    '--optimizer',
    nargs='+',
    choices=METHODS,
    default=list(METHODS),
    help='what is compared (all)',
  )
  add('--corpus', choices=list(corpus.CORPORA), default='iwslt')
  add('--data-dir', type=Path, help='folder with the archive or its files')
  add('--out', type=Path, default=Path('out/translation'), help='for results')
  add('--resume', action='store_true', help='resume the run in --out')
  return parser


def parse(
  parser: cli.Parser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Data]:
  """Reads the command line; exits if it is wrong."""
  args = parser.parse_args(argv)
  if args.width % (2 * args.heads):
    parser.error(
      f'argument --width: must be a multiple of twice the heads, but got'
      f' {args.width} and {args.heads}. For example: --width 512 --heads 4.'
    )
  try:
    loaded = corpus.CORPORA[args.corpus](args.data_dir)
    vocabulary = corpus.train_vocabulary(loaded.train, args.vocab_size)
  except (archives.DataError, ValueError) as error:
    parser.error(str(error))
  return args, Data(loaded, vocabulary)


class Training:
  """All runs, one after the other, with a checkpoint after each epoch.

  Attributes:
    runs: The results of each run that has begun; the last one is under way.
  """

  def __init__(self, args: argparse.Namespace, data: Data):
    self._args = args
    self._corpus = data.corpus
    self._vocabulary = sentencepiece.SentencePieceProcessor(
      model_proto=data.vocabulary
    )
    self._pieces = {
      split: corpus.encode(self._vocabulary, getattr(data.corpus, split))
      for split in ('train', 'validation')
    }
    self._checkpoints = checkpoints.Checkpoints(args.out / checkpoints.FOLDER)
    self.runs: list[dict[str, Any]] = []

  def _programs_of(self, optimizer: str) -> seq2seq.Programs:
    args = self._args
    # Hashable, which its type does not say.
    model: Any = transformer.Transformer(
      self._vocabulary.vocab_size(),
      args.layers,
      args.width,
      args.hidden_size,
      args.heads,
      args.dropout,
    )
    return seq2seq.make_programs(
      model,
      optimizer,
      rho=rho_of(optimizer, args),
      eta=args.eta,
      lr=args.lr,
      warmup=args.warmup,
      weight_decay=args.weight_decay,
      label_smoothing=args.label_smoothing,
      beam=args.beam,
    )

  def run(self) -> None:
    """Trains and translates what is left."""
    args = self._args
    planned = [(o, seed) for o in args.optimizer for seed in range(args.seeds)]
    state = self._restore() if args.resume else None
    done = sum(len(run['train_loss']) for run in self.runs)
    with progress.shown(done, args.epochs * len(planned)) as advance:
      for i, (optimizer, seed) in enumerate(planned):
        if i < len(self.runs) - 1:
          continue  # Finished before the run that was restored.
        programs = self._programs_of(optimizer)
        if i == len(self.runs):
          self.runs.append(
            {
              'optimizer': optimizer,
              'seed': seed,
              'train_loss': [],
              'validation_loss': [],
            }
          )
          state = programs.init(seed)
        state = self._train(programs, state, self.runs[i], advance)

  def _train(self, programs, state, run, advance) -> seq2seq.State:
    args, size = self._args, self._args.max_tokens
    for epoch in range(len(run['train_loss']), args.epochs):
      rng = np.random.default_rng([run['seed'], epoch])
      state, loss = seq2seq.train_epoch(
        programs, state, self._pieces['train'], size, rng
      )
      run['train_loss'].append(loss)
      run['validation_loss'].append(
        seq2seq.validation_loss(
          programs, state.params, self._pieces['validation'], size
        )
      )
      step = sum(len(run['train_loss']) for run in self.runs)
      self._checkpoints.save(step, state, {'runs': self.runs})
      advance(1)
    for split in ('validation', 'test'):
      run[f'{split}_bleu'] = seq2seq.bleu(
        programs,
        state.params,
        getattr(self._corpus, split),
        self._vocabulary,
        size,
      )
    return state

  def _restore(self) -> seq2seq.State | None:
    def make_state(saved: Mapping[str, Any]) -> seq2seq.State:
      self.runs += saved['runs']
      run = self.runs[-1]
      return self._programs_of(run['optimizer']).init(run['seed'])

    restored = self._checkpoints.restore(make_state, print)
    return restored[0] if restored else None


def rho_of(optimizer: str, args: argparse.Namespace) -> float:
  """The radius of an optimizer; 0 for Adam."""
  return {'sam': args.rho_sam, 'asam': args.rho_asam}.get(optimizer, 0.0)


def describe(
  args: argparse.Namespace, pairs: corpus.Corpus, runs: Sequence[Mapping]
) -> dict[str, Any]:
  """The results of all finished runs, by optimizer."""
  finished = [run for run in runs if 'test_bleu' in run]
  optimizers = {}
  for name in args.optimizer:
    mine = [run for run in finished if run['optimizer'] == name]
    if mine:
      optimizers[name] = {
        'rho': rho_of(name, args),
        'seeds': [run['seed'] for run in mine],
        **{
          key: reporting.summarize([run[key] for run in mine])
          for key in ('validation_bleu', 'test_bleu')
        },
        'curves': {
          key: np.array([run[key] for run in mine])
          for key in ('train_loss', 'validation_loss')
        },
      }
  return {
    'complete': len(finished) == len(args.optimizer) * args.seeds,
    'config': vars(args),
    'pairs': {split: len(each) for split, each in pairs._asdict().items()},
    'bleu': seq2seq.bleu_signature(),
    'optimizers': optimizers,
  }


def published_table() -> str:
  """The paper's BLEU in Markdown."""
  return reporting.markdown(
    ['BLEU', 'Adam', 'SAM', 'ASAM'],
    [
      [split, *(f'{PUBLISHED[name][i]:.2f}' for name in METHODS)]
      for i, split in enumerate(('validation', 'test'))
    ],
  )


def table(results: Mapping[str, Any]) -> str:
  """BLEU in Markdown, compared with the paper's."""
  return reporting.markdown(
    ['', 'rho', 'validation', 'test', 'paper: validation, test'],
    [
      [
        name,
        f'{each["rho"]:g}' if each['rho'] else '',
        *(
          reporting.format_accuracy(
            np.divide(each[f'{split}_bleu']['per_seed'], 100)
          )
          for split in ('validation', 'test')
        ),
        ', '.join(f'{score:.2f}' for score in PUBLISHED[name]),
      ]
      for name, each in results['optimizers'].items()
    ],
  )


def main(argv: Sequence[str]) -> None:
  """Trains, translates and records."""
  parser = make_parser()
  args, data = parse(parser, argv)
  training = Training(args, data)
  results = lambda: describe(args, data.corpus, training.runs)
  with program.recorded(parser, argv, args, results):
    training.run()
  print(table(results()))


if __name__ == '__main__':
  cli.run(main)
