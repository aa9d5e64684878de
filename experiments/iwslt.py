"""Translation, German to English: Adam, SAM and ASAM on IWSLT'14.

::

    python experiments/iwslt.py --out out/iwslt

The paper's recipe: a Transformer of six layers, Adam of learning
rate 5e-4, weight decay 1e-4, dropout 0.3, label smoothing 0.1, and the radii
that the paper has chosen. What the paper leaves open is usual for this corpus:
4,000 steps of warm-up, then the root of the steps; 4,096 pieces a batch; 10,000
pieces by byte-pair encoding; a beam of five. The parameters after the last
epoch are those that translate; test sentences are read then, and never before.

Repeat the command with ``--resume`` after Ctrl-C, a kill or a crash.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any
from typing import NamedTuple

import numpy as np
import sentencepiece

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
import archives
import arguments
import checkpoints
import corpus
import progress
import records
import reporting
import transformer
import translation

# Kwon et al., 2021: BLEU on the validation and on the test set.
PAPER = {
  'adam': (35.34, 34.86),
  'sam': (35.52, 34.78),
  'asam': (35.66, 35.02),
}


class Data(NamedTuple):
  """The corpus, and the vocabulary of SentencePiece as it is stored."""

  corpus: corpus.Corpus
  vocabulary: bytes


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Data]:
  """Reads the command line, with an exit if it cannot be done as it says."""
  parser = arguments.Parser(
    description="Trains a Transformer on IWSLT'14, German to English.",
    allow_abbrev=False,
  )
  add = parser.add_argument
  count, fraction = arguments.count, arguments.fraction
  nonnegative, positive = arguments.nonnegative, arguments.positive
  for option, make_type, default, what in (
    ('seeds', count, 3, 'how many, for each optimizer'),
    ('epochs', count, 50, 'how long each trains'),
    ('rho-sam', nonnegative, 0.1, 'the radius of SAM'),
    ('rho-asam', nonnegative, 0.2, 'the radius of ASAM'),
    ('eta', nonnegative, 0.01, 'the stabilizer of ASAM'),
    ('lr', positive, 5e-4, 'learning rate at its peak'),
    ('warmup', count, 4000, 'steps until the peak'),
    ('weight-decay', nonnegative, 1e-4, 'decoupled'),
    ('dropout', fraction, 0.3, 'rate'),
    ('label-smoothing', fraction, 0.1, 'in training'),
    ('max-tokens', count, 4096, 'pieces of a batch'),
    ('vocab-size', count, 10000, 'pieces that there are'),
    ('layers', count, 6, 'of encoder and decoder, each'),
    ('width', count, 512, 'of the residuals'),
    ('hidden-size', count, 1024, 'of feed-forward layers'),
    ('heads', count, 4, 'of attention'),
    ('beam', count, 5, 'sequences that the search keeps'),
  ):
    add(
      f'--{option}',
      type=make_type(default),
      default=default,
      help=f'{what} ({default:g})',
    )
  add(
    '--optimizer',
    nargs='+',
    choices=list(translation.OPTIMIZERS),
    default=list(translation.OPTIMIZERS),
    help='what is compared (all)',
  )
  add('--data-dir', type=Path, help='folder with the archive, or what it holds')
  add('--out', type=Path, default=Path('out/iwslt'), help='for results')
  add('--resume', action='store_true', help='go on where a run was interrupted')
  args = parser.parse_args(argv)
  if args.width % (2 * args.heads):
    parser.error(
      f'argument --width: must be a multiple of twice the heads, but got'
      f' {args.width} and {args.heads}. Write for example --width 512 --heads'
      f' 4.'
    )
  try:
    loaded = corpus.load(args.data_dir)
    vocabulary = corpus.train_vocabulary(loaded.train, args.vocab_size)
  except (archives.DataError, ValueError) as error:
    parser.error(str(error))
  arguments.check_out(parser, args)
  return args, Data(loaded, vocabulary)


class Training:
  """All runs, one after the other; each epoch leaves a checkpoint.

  Attributes:
    runs: What is known of each that has begun, the last one being at it.
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

  def _programs_of(self, optimizer: str) -> translation.Programs:
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
    return translation.make_programs(
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

  def train(self) -> None:
    """Trains what is not trained yet."""
    args = self._args
    planned = [(o, seed) for o in args.optimizer for seed in range(args.seeds)]
    state = self._restore() if args.resume else None
    done = sum(len(run['train_loss']) for run in self.runs)
    with progress.shown(done, args.epochs * len(planned)) as advance:
      for i, (optimizer, seed) in enumerate(planned):
        if i < len(self.runs) - 1:
          continue  # Finished before the one that was restored.
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
        state = self._train_run(programs, state, self.runs[i], advance)

  def _train_run(self, programs, state, run, advance) -> translation.State:
    args, size = self._args, self._args.max_tokens
    for epoch in range(len(run['train_loss']), args.epochs):
      rng = np.random.default_rng([run['seed'], epoch])
      state, loss = translation.train_epoch(
        programs, state, self._pieces['train'], size, rng
      )
      run['train_loss'].append(loss)
      run['validation_loss'].append(
        translation.validation_loss(
          programs, state.params, self._pieces['validation'], size
        )
      )
      self._save(state)
      advance(1)
    for split in ('validation', 'test'):
      run[f'{split}_bleu'] = translation.bleu(
        programs,
        state.params,
        getattr(self._corpus, split),
        self._vocabulary,
        size,
      )
    return state

  def _save(self, state: translation.State) -> None:
    step = sum(len(run['train_loss']) for run in self.runs)
    self._checkpoints.save(step, state, {'runs': self.runs})

  def _restore(self) -> translation.State | None:
    def make_state(saved: Mapping[str, Any]) -> translation.State:
      self.runs = saved['runs']
      run = self.runs[-1]
      return self._programs_of(run['optimizer']).init(run['seed'])

    restored = self._checkpoints.restore(make_state, print)
    return restored[0] if restored else None


def rho_of(optimizer: str, args: argparse.Namespace) -> float:
  """The radius of an optimizer, 0 of one that has none."""
  return {'sam': args.rho_sam, 'asam': args.rho_asam}.get(optimizer, 0.0)


def describe(
  args: argparse.Namespace, pairs: corpus.Corpus, runs: Sequence[Mapping]
) -> dict[str, Any]:
  """What results.json holds: of each optimizer, the runs that have ended."""
  ended = [run for run in runs if 'test_bleu' in run]
  optimizers = {}
  for name in args.optimizer:
    mine = [run for run in ended if run['optimizer'] == name]
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
    'complete': len(ended) == len(args.optimizer) * args.seeds,
    'config': vars(args),
    'pairs': {split: len(each) for split, each in pairs._asdict().items()},
    'bleu': translation.bleu_signature(),
    'optimizers': optimizers,
  }


def table(results: Mapping[str, Any]) -> str:
  """BLEU in Markdown, beside the paper's."""
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
        ', '.join(f'{score:.2f}' for score in PAPER[name]),
      ]
      for name, each in results['optimizers'].items()
    ],
  )


def main(argv: Sequence[str]) -> None:
  """Runs the program."""
  args, data = parse(argv)
  provenance = records.provenance(
    'experiments/iwslt.py', argv, args.out / arguments.STARTED_WITH
  )
  training = Training(args, data)
  try:
    training.train()
  finally:
    # Ctrl-C, too, leaves what there is.
    results = {**provenance, **describe(args, data.corpus, training.runs)}
    records.write_json(args.out / 'results.json', results)
    print(table(results))
  arguments.finish(args.out)


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except KeyboardInterrupt:
    sys.exit(130)  # As a shell reports it.
