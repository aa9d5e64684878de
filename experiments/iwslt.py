"""Translation, German to English: Adam, SAM and ASAM on IWSLT'14.

::

    python experiments/iwslt.py --out out/iwslt

The paper's recipe (section 5.3): a Transformer of six layers, Adam of learning
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
import shutil
import sys
from typing import Any

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


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the options."""
  parser = arguments.Parser(
    description="Trains a Transformer on IWSLT'14, German to English.",
    allow_abbrev=False,
  )
  add = parser.add_argument
  is_positive = lambda x: x > 0
  rate = lambda example: arguments.number(
    lambda x: 0 <= x < 1, 'a number >= 0 and < 1', example
  )
  names = ', '.join(translation.OPTIMIZERS)
  for option, type_, default, what in (
    ('seeds', arguments.count(3), 3, 'how many, for each optimizer'),
    ('epochs', arguments.count(50), 50, 'how long each trains'),
    ('rho-sam', _radius('0.1'), 0.1, 'the radius of SAM'),
    ('rho-asam', _radius('0.2'), 0.2, 'the radius of ASAM'),
    ('eta', _radius('0.01'), 0.01, 'the stabilizer of ASAM'),
    ('lr', arguments.number(is_positive, 'a number > 0', '5e-4'), 5e-4, 'peak'),
    ('warmup', arguments.count(4000), 4000, 'steps until the peak'),
    ('weight-decay', _radius('1e-4'), 1e-4, 'decoupled'),
    ('dropout', rate('0.3'), 0.3, 'rate'),
    ('label-smoothing', rate('0.1'), 0.1, 'from 0 to 1'),
    ('max-tokens', arguments.count(4096), 4096, 'pieces of a batch'),
    ('vocab-size', arguments.count(10000), 10000, 'pieces that there are'),
    ('layers', arguments.count(6), 6, 'of encoder and decoder, each'),
    ('width', arguments.count(512), 512, 'of the residuals'),
    ('hidden-size', arguments.count(1024), 1024, 'of feed-forward layers'),
    ('heads', arguments.count(4), 4, 'of attention'),
    ('beam', arguments.count(5), 5, 'sequences that the search keeps'),
  ):
    add(
      f'--{option}',
      type=type_,
      default=default,
      metavar=option[0].upper(),
      help=f'{what} ({default:g})',
    )
  add(
    '--optimizer',
    nargs='+',
    choices=list(translation.OPTIMIZERS),
    default=list(translation.OPTIMIZERS),
    help=f'some of {names} (all)',
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
    args.corpus = corpus.load(args.data_dir)
    args.vocabulary = corpus.train_vocabulary(
      args.corpus.train, args.vocab_size
    )
  except (archives.DataError, ValueError) as error:
    parser.error(str(error))
  arguments.check_out(parser, _config(args))
  return args


def _radius(example):
  return arguments.number(lambda x: x >= 0, 'a number >= 0', example)


def _config(args: argparse.Namespace) -> argparse.Namespace:
  """The options, without what was read."""
  return argparse.Namespace(
    **{
      name: value
      for name, value in vars(args).items()
      if name not in ('corpus', 'vocabulary')
    }
  )


class Training:
  """All runs, one after the other; each epoch leaves a checkpoint.

  Attributes:
    runs: What is known of each that has begun, the last one being at it.
  """

  def __init__(self, args: argparse.Namespace):
    self._args = args
    self._vocabulary = sentencepiece.SentencePieceProcessor(
      model_proto=args.vocabulary
    )
    self._pieces = {
      split: corpus.encode(self._vocabulary, getattr(args.corpus, split))
      for split in ('train', 'validation')
    }
    self._checkpoints = checkpoints.Checkpoints(args.out / 'checkpoints')
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
        getattr(args.corpus, split),
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
  argv: Sequence[str], args: argparse.Namespace, runs: Sequence[Mapping]
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
    **records.provenance('experiments/iwslt.py', argv),
    'complete': len(ended) == len(args.optimizer) * args.seeds,
    'config': vars(_config(args)),
    'pairs': {
      split: len(pairs) for split, pairs in args.corpus._asdict().items()
    },
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
  args = parse(argv)
  training = Training(args)
  try:
    training.train()
  finally:
    # Ctrl-C, too, leaves what there is.
    results = describe(argv, args, training.runs)
    records.write_json(args.out / 'results.json', results)
    print(table(results))
  (args.out / 'checkpoints.json').unlink()
  shutil.rmtree(args.out / 'checkpoints')


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except KeyboardInterrupt:
    sys.exit(130)  # As a shell reports it.
