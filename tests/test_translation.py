"""Promise: the program of the paper's translation does what it says."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archives
import beam_search
import corpus
import iwslt
from support import error
from support import tar_gz
import transformer
import translation

pytestmark = pytest.mark.usefixtures('quickly_compiled')

NUMBERS = {
  'eins': 'one', 'zwei': 'two', 'drei': 'three', 'vier': 'four',
  'fünf': 'five', 'sechs': 'six', 'sieben': 'seven', 'acht': 'eight',
}  # fmt: skip


def make_pairs(n, seed=0):
  """Rows of three to six numbers, in German and in English."""
  rng = np.random.default_rng(seed)
  pairs = []
  for _ in range(n):
    words = rng.choice(list(NUMBERS), rng.integers(3, 7))
    pairs.append((' '.join(words), ' '.join(NUMBERS[word] for word in words)))
  return pairs


def make_members(train, tests):
  """The files of the archive, in the format of the published one."""
  members = {}
  for side, language in enumerate(corpus.LANGUAGES):
    lines = [
      '<url>http://www.ted.com/talks/1</url>',
      '<keywords>talks, eins</keywords>',
      '<talkid>1</talkid>',
      f'<title>{train[0][side].upper()}</title>',
      f'<description>{train[1][side]}</description>',
      *(f' {pair[side]} ' for pair in train[2:]),
    ]
    members[f'{corpus.TRAIN}.{language}'] = '\n'.join(lines) + '\n'
    for name, pairs in zip(corpus.TESTS, tests, strict=True):
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
  """A compressed archive by the name of the published one; returns it."""
  folder.mkdir(exist_ok=True)
  file = folder / corpus.ARCHIVE.name
  file.write_bytes(
    tar_gz(
      {
        f'{corpus.FOLDER}/{name}': text.encode()
        for name, text in members.items()
      }
    )
  )
  return file


TRAIN = make_pairs(230)
TESTS = [make_pairs(2 + i, seed=1 + i) for i in range(len(corpus.TESTS))]
MEMBERS = make_members(TRAIN, TESTS)


@pytest.mark.parametrize('form', ['archive', 'extracted'])
def test_corpus(tmp_path, form):
  """Tags are gone, titles stay; each 23rd pair is for validation."""
  if form == 'archive':
    write_archive(tmp_path, MEMBERS)
  else:
    (tmp_path / corpus.FOLDER).mkdir()
    for name, text in MEMBERS.items():
      (tmp_path / corpus.FOLDER / name).write_text(text, encoding='utf-8')
  loaded = corpus.load(tmp_path)
  assert loaded.validation == [TRAIN[i] for i in range(22, 230, 23)]
  assert loaded.train == [TRAIN[i] for i in range(230) if i % 23 != 22]
  assert loaded.test == list(itertools.chain(*TESTS))


def test_lines_end_where_the_file_says():
  """A character that Python takes for the end of a line is none."""
  assert corpus.talk_lines('a\u2028b\nc\x85d\n') == ['a\u2028b', 'c\x85d']


def test_clean():
  """Empty sides, long ones, and those of ratios above 1.5 are left out."""
  words = lambda n: ' '.join(['wort'] * n)
  good = [
    (words(2), words(3)),
    (words(175), words(150)),
    ('ja, gut.', words(5)),  # Punctuation counts.
  ]
  bad = [('', words(1)), (words(2), words(4)), (words(176), words(150))]
  assert corpus.clean(good + bad) == good


def cut(members):
  """One language with a line less."""
  name = f'{corpus.TRAIN}.de'
  return {**members, name: members[name].rsplit('\n', 2)[0] + '\n'}


def remove(members):
  """One file less."""
  return {name: text for name, text in members.items() if 'tst2012' not in name}


@pytest.mark.parametrize(
  ('change', 'message'),
  [(cut, 'as many sentences, but have 229 and 230'), (remove, 'must be in it')],
)
def test_bad_members(tmp_path, change, message):
  """What is missing is named."""
  write_archive(tmp_path, change(MEMBERS))
  with pytest.raises(archives.DataError, match=message):
    corpus.load(tmp_path)


def test_truncated_archive(tmp_path):
  """The error says what to put in its place."""
  file = write_archive(tmp_path, MEMBERS)
  file.write_bytes(file.read_bytes()[:-1000])
  with pytest.raises(archives.DataError, match='Replace it with http'):
    corpus.load(tmp_path)


@pytest.fixture(scope='module')
def pieces():
  """Pairs of many lengths."""
  rng = np.random.default_rng(0)
  return [
    tuple(rng.integers(4, 9, n).tolist() for n in rng.integers(1, 90, 2))
    for _ in range(200)
  ]


@pytest.mark.parametrize('shuffled', [False, True])
def test_batches(pieces, shuffled):
  """Each pair is in one batch, padded; batches have few shapes."""
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
    rest = batch.source[len(batch.indices) :]
    assert (rest == corpus.PAD).all()
  assert sorted(found) == list(range(len(pieces)))
  assert len(shapes) <= 8
  again = corpus.batches(pieces, 256, np.random.default_rng(0))
  orders = [i for batch in again for i in batch.indices]
  assert (orders == found) == shuffled


def test_vocabulary_too_large():
  """The error says which option is to be changed."""
  with pytest.raises(ValueError, match='argument --vocab-size: 9999'):
    corpus.train_vocabulary(TRAIN, 9999)


SMALL = {'layers': 1, 'width': 16, 'hidden_size': 32, 'heads': 2}


@pytest.fixture(scope='module')
def model():
  """A small model with parameters that are not those of the start."""
  model = transformer.Transformer(vocab_size=12, **SMALL)
  source = jnp.array([[5, 6, 7, 2], [8, 9, 2, 0]])
  target = jnp.array([[1, 4, 5, 6, 7], [1, 9, 8, 2, 0]])
  params = model.init(jax.random.key(0), source, target)['params']
  params = jax.tree.map(
    lambda w: w + 0.1 * jax.random.normal(jax.random.key(1), w.shape), params
  )
  return model, params, source, target


def test_size():
  """It is the usual model of this corpus, but for the number of pieces.

  That one has 39,469,056 parameters, with 8,848 and 6,632 pieces.
  """
  model = transformer.Transformer(10000)
  pieces = jnp.ones([1, 4], jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pieces, pieces)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 39469056 + (2 * 10000 - 8848 - 6632) * 512


def test_model_sees_no_future(model):
  """Logits hang on earlier pieces of the target and all of the source."""
  model, params, source, target = model
  apply = lambda *args, **kw: model.apply({'params': params}, *args, **kw)
  logits = apply(source, target)
  changed = apply(source, target.at[:, 3:].set(11))
  np.testing.assert_allclose(changed[:, :3], logits[:, :3], atol=1e-5)
  assert jnp.abs(changed[:, 3] - logits[:, 3]).max() > 1e-2
  other = apply(source.at[0, 0].set(9), target)
  assert jnp.abs(other[0, 0] - logits[0, 0]).max() > 1e-3
  padded = apply(jnp.pad(source, ((0, 0), (0, 3))), target)
  np.testing.assert_allclose(padded, logits, atol=1e-5)
  encoded = apply(source, method='encode')
  at = apply(encoded, source, target, position=2, method='decode')
  np.testing.assert_allclose(at[:, 0], logits[:, 2], atol=1e-5)


BOS, EOS, PAD = 0, 1, 2
LENGTH, VOCABULARY = 5, 4


@pytest.fixture(scope='module')
def tables():
  """Logits of what follows each sequence of up to four tokens; two models."""
  rng = np.random.default_rng(0)
  return jnp.asarray(2 * rng.standard_normal((2, 4**4, VOCABULARY)))


def find(tables, beam):
  """What the search finds with each table."""

  def get_logits(tokens, i):
    past = jnp.where(jnp.arange(LENGTH) <= i, tokens, 0)
    index = past[:, :4] @ 4 ** jnp.arange(4)
    return jnp.repeat(tables, beam, axis=0)[jnp.arange(len(tokens)), index]

  return beam_search.search(
    get_logits, 2, beam=beam, length=LENGTH, bos=BOS, eos=EOS, pad=PAD
  )


def score(table, sequence):
  """The mean log-probability of what follows the first mark."""
  total = 0.0
  for i in range(1, len(sequence)):
    past = sequence[:i][:4]
    index = sum(token * 4**j for j, token in enumerate(past))
    total += jax.nn.log_softmax(table[index])[sequence[i]]
  return total / (len(sequence) - 1)


def test_wide_beam_finds_the_best(tables):
  """With room for all sequences, it is what trying all of them gives."""
  inner = [token for token in range(VOCABULARY) if token != EOS]
  sequences = [
    (BOS, *words, EOS)
    for n in range(LENGTH - 1)
    for words in itertools.product(inner, repeat=n)
  ]
  found = np.asarray(find(tables, beam=4**3)).tolist()
  for table, mine in zip(tables, found, strict=True):
    best = max(sequences, key=lambda sequence: score(table, sequence))
    assert mine[: len(best)] == list(best)
    assert mine[len(best) :] == [PAD] * (LENGTH - len(best))


def test_narrow_beam(tables):
  """A beam of one goes on with the best piece, and ends where that is best."""
  certain = tables.at[:, :, EOS].set(-50.0).at[:, BOS + 4 * 3, EOS].set(50.0)
  certain = certain.at[:, BOS, 3].set(50.0)
  found = np.asarray(find(certain, beam=1))
  np.testing.assert_array_equal(found, [[BOS, 3, EOS, PAD, PAD]] * 2)
  # Nothing ends: the best so far.
  endless = tables.at[:, :, EOS].set(-1e10)
  found = np.asarray(find(endless, beam=1))
  for table, mine in zip(endless, found.tolist(), strict=True):
    greedy = [BOS]
    while len(greedy) < LENGTH:
      index = sum(token * 4**j for j, token in enumerate(greedy[:4]))
      greedy.append(int(jnp.argmax(table[index])))
    assert mine == greedy


def make_programs(optimizer, **options):
  """The programs of a small model, with dropout."""
  return translation.make_programs(
    transformer.Transformer(vocab_size=12, **SMALL),
    optimizer,
    **{
      **{'rho': 0.1, 'eta': 0.01, 'lr': 1e-2, 'warmup': 3, 'beam': 2},
      **{'weight_decay': 1e-2, 'label_smoothing': 0.1, **options},
    },
  )


@pytest.mark.parametrize('optimizer', ['sam', 'asam'])
def test_step(model, optimizer):
  """A step by the formulas, with the same units dropped in both passes."""
  _, _, source, target = model
  model = transformer.Transformer(vocab_size=12, **SMALL)
  programs = make_programs(optimizer)
  params, _, key = state = programs.init(0)
  dropout_key = jax.random.split(key)[1]

  def loss_fn(params):
    logits = model.apply(
      {'params': params},
      source,
      target[:, :-1],
      train=True,
      rngs={'dropout': dropout_key},
    )
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, target[:, 1:, None], axis=-1)[..., 0]
    losses = -0.9 * right - 0.1 * log_p.mean(axis=-1)
    return (losses * (target[:, 1:] != 0)).sum() / 7

  loss, grads = jax.value_and_grad(loss_fn)(params)
  is_scaled = lambda path: optimizer == 'asam' and path[-1].key != 'bias'
  scale = jax.tree_util.tree_map_with_path(
    lambda path, w: jnp.abs(w) + 0.01 if is_scaled(path) else jnp.ones_like(w),
    params,
  )
  scaled = jax.tree.map(jnp.multiply, scale, grads)
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(scaled)))
  perturbed = jax.tree.map(
    lambda w, t, g: w + 0.1 * t * g / norm, params, scale, scaled
  )
  grads = jax.grad(loss_fn)(perturbed)
  # Adam's first step: m / sqrt(v) is g / |g|, and the warm-up is at a third.
  expected = jax.tree.map(
    lambda w, g: w - 1e-2 / 3 * (g / (jnp.abs(g) + 1e-8) + 1e-2 * w),
    params,
    grads,
  )
  state = jax.tree.map(jnp.copy, state)
  stepped, stepped_loss = programs.step(state, source, target)
  assert float(stepped_loss) == pytest.approx(float(loss), rel=1e-5)
  # The loss does not depend on biases of keys: their gradients are noise.
  for tree in (stepped.params, expected):
    for name, layer in tree.items():
      for part in layer if name.startswith(('encoder', 'decoder')) else ():
        if part.startswith('MultiHead'):
          del layer[part]['key']['bias']
  assert error(*jax.device_get((stepped.params, expected))) < 1e-3


def test_schedule():
  """A line to the peak, then one over the root of the steps."""
  schedule = translation.make_schedule(2.0, 4)
  np.testing.assert_allclose(
    [schedule(step) for step in (0, 1, 3, 15)], [0.5, 1.0, 2.0, 1.0], rtol=1e-6
  )


OPTIONS = [
  *('--vocab-size=80', '--layers=1', '--width=32', '--hidden-size=64'),
  *('--heads=2', '--max-tokens=256', '--lr=5e-3', '--warmup=40', '--seeds=1'),
  *('--dropout=0', '--label-smoothing=0', '--rho-asam=0.1', '--beam=2'),
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs the program on the small corpus in a folder."""
  data = tmp_path_factory.mktemp('data')
  write_archive(data, MEMBERS)

  def run_in(out, *options):
    argv = [*OPTIONS, f'--data-dir={data}', f'--out={out}', *options]
    iwslt.main(argv)
    return json.loads((out / 'results.json').read_text())

  return run_in


def test_it_learns(run, tmp_path, capsys):
  """It translates numbers that it has not seen in this order, nearly all."""
  results = run(tmp_path, '--optimizer', 'asam', '--epochs=40')
  assert results['complete']
  assert '|tok:13a|' in results['bleu']
  assert results['pairs'] == {'train': 220, 'validation': 10, 'test': 20}
  asam = results['optimizers']['asam']
  assert asam['rho'] == 0.1
  [losses] = asam['curves']['validation_loss']
  assert losses[-1] < 0.5 * losses[0]
  assert asam['test_bleu']['mean'] > 50
  assert f'{asam["test_bleu"]["mean"]:.2f} | 35.66, 35.02 |' in (
    capsys.readouterr().out
  )
  assert [path.name for path in tmp_path.iterdir()] == ['results.json']


def test_interrupted(run, tmp_path, monkeypatch, capsys):
  """Ctrl-C leaves what has ended, and what is resumed ends with its bits."""
  options = ['--optimizer', 'adam', 'sam', '--epochs=2']
  untouched = run(tmp_path / 'untouched', *options)
  train_epoch = translation.train_epoch

  def interrupt(programs, state, pairs, max_tokens, rng, calls=[]):  # noqa: B006
    calls.append(None)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return train_epoch(programs, state, pairs, max_tokens, rng)

  out = tmp_path / 'resumed'
  with monkeypatch.context() as patch:
    patch.setattr(translation, 'train_epoch', interrupt)
    with pytest.raises(KeyboardInterrupt):
      run(out, *options)
  results = json.loads((out / 'results.json').read_text())
  assert not results['complete']
  assert list(results['optimizers']) == ['adam']
  with pytest.raises(SystemExit):
    run(out, *options)
  assert 'Write --resume' in capsys.readouterr().err
  resumed = run(out, *options, '--resume')
  assert resumed['complete']
  assert resumed['optimizers'] == untouched['optimizers']


@pytest.mark.parametrize(
  ('option', 'message'),
  [
    ('--width=30', 'must be a multiple of twice the heads, but got 30 and 4'),
    ('--dropout=1', 'must be a number in [0, 1), but got'),
    ('--data-dir=nowhere', 'must be a folder with de-en.tgz or de-en'),
  ],
)
def test_errors(tmp_path, capsys, option, message):
  """Bad options are said before anything is written."""
  out = tmp_path / 'out'
  with pytest.raises(SystemExit):
    iwslt.main([f'--out={out}', option])
  assert message in capsys.readouterr().err
  assert not out.exists()
