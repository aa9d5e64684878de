"""Promise: the program for translation learns, and resumes bit for bit."""

import itertools
import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import transformer
from experiments.paper import beam_search
from experiments.paper import corpus
from experiments.paper import seq2seq
from experiments.paper import translation
from tests.helpers import reference
from tests.helpers.support import error
from tests.helpers.support import tar_gz

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NUMBERS = {
  'eins': 'one', 'zwei': 'two', 'drei': 'three', 'vier': 'four',
  'fünf': 'five', 'sechs': 'six', 'sieben': 'seven', 'acht': 'eight',
}  # fmt: skip


def make_pairs(n, seed=0):
  """Rows of four numbers, in German and in English."""
  rng = np.random.default_rng(seed)
  rows = [rng.choice(list(NUMBERS), 4) for _ in range(n)]
  return [(' '.join(row), ' '.join(NUMBERS[x] for x in row)) for row in rows]


TRAIN = make_pairs(230)
TESTS = [make_pairs(2 + i, seed=1 + i) for i in range(len(corpus.TESTS))]


def make_members():
  """The files of the archive, in the format of the published one."""
  members = {}
  for side, language in enumerate(corpus.LANGUAGES):
    lines = [
      '<url>http://www.ted.com/talks/1</url>',
      '<keywords>talks, eins</keywords>',
      '<talkid>1</talkid>',
      f'<title>{TRAIN[0][side].upper()}</title>',
      f'<description>{TRAIN[1][side]}</description>',
      *(f' {pair[side]} ' for pair in TRAIN[2:]),
    ]
    members[f'{corpus.TRAIN}.{language}'] = '\n'.join(lines) + '\n'
    for name, pairs in zip(corpus.TESTS, TESTS, strict=True):
      segments = '\n'.join(
        f'<seg id="{i}"> {pair[side]} </seg>'
        for i, pair in enumerate(pairs, start=1)
      )
      members[f'{name}.{language}.xml'] = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<mteval>\n<doc docid="1">\n'
        f'<title>Eins</title>\n<p>\n{segments}\n</p>\n</doc>\n</mteval>\n'
      )
  return members


def write_archive(folder, members):
  """A compressed archive with the name of the published one."""
  files = {f'{corpus.FOLDER}/{name}': x.encode() for name, x in members.items()}
  (folder / corpus.ARCHIVE.name).write_bytes(tar_gz(files))


def test_corpus(tmp_path):
  """Tags are gone, titles stay; every 23rd pair is for validation."""
  (tmp_path / corpus.FOLDER).mkdir()
  for name, text in make_members().items():
    (tmp_path / corpus.FOLDER / name).write_text(text, encoding='utf-8')
  loaded = corpus.load(tmp_path)
  assert loaded.validation == [TRAIN[i] for i in range(22, 230, 23)]
  assert loaded.train == [TRAIN[i] for i in range(230) if i % 23 != 22]
  assert loaded.test == list(itertools.chain(*TESTS))


def test_clean():
  """Lines end at newlines only; empty, long and unequal pairs are dropped."""
  assert corpus.talk_lines('a\u2028b\nc\x85d\n') == ['a\u2028b', 'c\x85d']
  words = lambda n: ' '.join(['wort'] * n)
  good = [
    (words(2), words(3)),
    (words(175), words(150)),
    ('ja, gut.', words(5)),  # Punctuation counts.
  ]
  bad = [('', words(1)), (words(2), words(4)), (words(176), words(150))]
  assert corpus.clean(good + bad) == good


@pytest.mark.parametrize('shuffled', [False, True])
def test_batches(shuffled):
  """Each pair is in one batch, padded; batches have few shapes."""
  rng = np.random.default_rng(0)
  pieces = [
    tuple(rng.integers(4, 9, n).tolist() for n in rng.integers(1, 90, 2))
    for _ in range(200)
  ]
  rng = np.random.default_rng(0) if shuffled else None
  found, shapes = [], set()
  for batch in corpus.batches(pieces, 256, rng):
    found += batch.indices.tolist()
    shapes.add(batch.source.shape)
    assert batch.source.shape == batch.target.shape
    assert batch.source.size <= 256
    for row, i in enumerate(batch.indices):
      for side, sentence in zip(batch[1:], pieces[i], strict=True):
        assert side[row, : len(sentence)].tolist() == sentence
        assert (side[row, len(sentence) :] == corpus.PAD).all()
    assert (batch.source[len(batch.indices) :] == corpus.PAD).all()
  assert sorted(found) == list(range(len(pieces)))
  assert len(shapes) <= 8
  again = corpus.batches(pieces, 256, np.random.default_rng(0))
  assert ([i for x in again for i in x.indices] == found) == shuffled


def test_size():
  """It is the usual model of this corpus, but for the number of pieces.

  That model has 39,469,056 parameters, with 8,848 and 6,632 pieces.
  """
  model = transformer.Transformer(10000)
  pieces = jnp.ones([1, 4], jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pieces, pieces)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 39469056 + (2 * 10000 - 8848 - 6632) * 512


def test_wide_beam_finds_the_best():
  """With room for all sequences, it finds what trying all of them does."""
  bos, eos, pad, length, beam = 0, 1, 2, 5, 4**3
  rng = np.random.default_rng(0)
  # For 8 models, the logits after each sequence of up to four tokens.
  tables = 2 * rng.standard_normal((8, 4**4, 4))
  log_p = np.asarray(jax.nn.log_softmax(tables))

  def get_logits(tokens, i):
    past = jnp.where(jnp.arange(length) <= i, tokens, 0)
    index = past[:, :4] @ 4 ** jnp.arange(4)
    return jnp.repeat(tables, beam, axis=0)[jnp.arange(len(tokens)), index]

  found = beam_search.search(
    get_logits, 8, beam=beam, length=length, bos=bos, eos=eos, pad=pad
  )
  sequences = [
    (bos, *words, eos)
    for n in range(length - 1)
    for words in itertools.product((0, 2, 3), repeat=n)
  ]
  for model, mine in enumerate(found.tolist()):

    def score(sequence, model=model):
      indices = np.cumsum(sequence[:-1] * 4 ** np.arange(len(sequence) - 1))
      return log_p[model, indices, sequence[1:]].mean()

    best = max(sequences, key=score)
    assert mine == [*best, *[pad] * (length - len(best))]


class Unigrams(nn.Module):
  """Predicts a piece from the one before; stands for the Transformer."""

  @nn.compact
  def __call__(self, source, target, *, train=False):
    """Maps pieces to logits; the source does not matter."""
    del source
    x = nn.Embed(12, 16)(target)
    x = nn.Dropout(0.3, deterministic=not train)(x)
    return nn.Dense(12, bias_init=nn.initializers.normal())(x)


def test_step():
  """A step of ASAM by its formula, with the same dropout in both passes."""
  target = jnp.array([[1, 4, 5, 6, 7], [1, 9, 8, 2, 0]])
  model = Unigrams()
  programs = seq2seq.make_programs(
    model,
    'asam',
    **{'rho': 0.1, 'eta': 0.01, 'lr': 1e-2, 'warmup': 3, 'beam': 2},
    **{'weight_decay': 1e-2, 'label_smoothing': 0.1},
  )
  params, _, key = state = programs.init(0)
  rngs = {'dropout': jax.random.split(key)[1]}

  @jax.value_and_grad
  def value_and_grad(params):
    logits = model.apply(
      {'params': params}, None, target[:, :-1], train=True, rngs=rngs
    )
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, target[:, 1:, None], axis=-1)[..., 0]
    losses = -0.9 * right - 0.1 * log_p.mean(axis=-1)
    return (losses * (target[:, 1:] != 0)).sum() / 7

  loss, grads = value_and_grad(params)
  _, grads = value_and_grad(reference.perturb(params, grads, rho=0.1))
  # Adam's first step: m / sqrt(v) = g / |g|, at a third of the warm-up.
  expected = jax.tree.map(
    lambda w, g: w - 1e-2 / 3 * (g / (jnp.abs(g) + 1e-8) + 1e-2 * w),
    params,
    grads,
  )
  stepped, stepped_loss = programs.step(state, target, target)
  assert float(stepped_loss) == pytest.approx(float(loss), rel=1e-5)
  assert error(*jax.device_get((stepped.params, expected))) < 1e-3


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs the program on the small corpus in a folder."""
  data = tmp_path_factory.mktemp('data')
  write_archive(data, make_members())

  def run_in(out, *options):
    translation.main(
      [
        *('--vocab-size=80', '--layers=1', '--width=32', '--hidden-size=64'),
        *('--heads=2', '--max-tokens=256', '--lr=5e-3', '--warmup=40'),
        *('--dropout=0', '--label-smoothing=0', '--rho-asam=0.1', '--beam=2'),
        *('--seeds=1', f'--data-dir={data}', f'--out={out}', *options),
      ]
    )
    return json.loads((out / 'results.json').read_text())

  return run_in


def test_program(run, tmp_path, monkeypatch, capsys):
  """ASAM translates rows of numbers that it has not seen.

  An interrupted run keeps what has finished, and ends with the same bits.
  """
  options = ['--optimizer', 'asam', '--epochs=16', '--seeds=2']
  untouched = run(tmp_path / 'untouched', *options)
  assert untouched['complete']
  assert '|tok:13a|' in untouched['bleu']
  assert untouched['pairs'] == {'train': 220, 'validation': 10, 'test': 20}
  asam = untouched['optimizers']['asam']
  assert asam['rho'] == 0.1
  assert asam['test_bleu']['mean'] > 50
  assert '| 35.66, 35.02 |' in capsys.readouterr().out
  left = [path.name for path in (tmp_path / 'untouched').iterdir()]
  assert [name for name in left if name[0] != '.'] == ['results.json']

  train_epoch, calls = seq2seq.train_epoch, []

  def interrupt(*args):
    calls.append(args)
    if len(calls) == 18:
      raise KeyboardInterrupt
    return train_epoch(*args)

  out = tmp_path / 'resumed'
  with monkeypatch.context() as patch:
    patch.setattr(seq2seq, 'train_epoch', interrupt)
    with pytest.raises(KeyboardInterrupt):
      run(out, *options)
  results = json.loads((out / 'results.json').read_text())
  assert not results['complete']
  assert results['optimizers']['asam']['seeds'] == [0]
  resumed = run(out, *options, '--resume')
  assert resumed['complete']
  assert resumed['optimizers'] == untouched['optimizers']


@pytest.mark.parametrize(
  ('option', 'message'),
  [
    ('--width=30', 'must be a multiple of twice the heads, but got 30 and 4'),
    ('--vocab-size=9999', 'argument --vocab-size: 9999'),
    ('--data-dir=nowhere', 'must be a folder with de-en.tgz or de-en'),
  ],
)
def test_errors(tmp_path, capsys, option, message):
  """Wrong options are reported before anything is written."""
  write_archive(tmp_path, make_members())
  out = tmp_path / 'out'
  with pytest.raises(SystemExit):
    translation.main([f'--data-dir={tmp_path}', f'--out={out}', option])
  assert message in capsys.readouterr().err
  assert not out.exists()
