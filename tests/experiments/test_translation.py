"""Promise: the program for translation learns, and resumes bit for bit."""

import functools
import itertools
import json
import re
import shutil
import subprocess

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sacrebleu
from sacrebleu import metrics

from experiments.data.archives import DataError
from experiments.models import transformer
from experiments.paper import beam_search
from experiments.paper import corpus
from experiments.paper import corpus_iwslt
from experiments.paper import corpus_libreoffice
from experiments.paper import corpus_packages
from experiments.paper import seq2seq
from experiments.paper import tables
from experiments.paper import translation
from experiments.paper import translation_floors
from experiments.paper import translation_plan
from experiments.paper import translation_report
from experiments.paper import translation_scores
from experiments.paper import translation_tables
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
TESTS = [make_pairs(2 + i, seed=1 + i) for i in range(len(corpus_iwslt.TESTS))]


def make_members():
  """The files of the archive, in the format of the published one."""
  members = {}
  for side, language in enumerate(corpus_iwslt.LANGUAGES):
    lines = [
      '<url>http://www.ted.com/talks/1</url>',
      '<keywords>talks, eins</keywords>',
      '<talkid>1</talkid>',
      f'<title>{TRAIN[0][side].upper()}</title>',
      f'<description>{TRAIN[1][side]}</description>',
      *(f' {pair[side]} ' for pair in TRAIN[2:]),
    ]
    members[f'{corpus_iwslt.TRAIN}.{language}'] = '\n'.join(lines) + '\n'
    for name, pairs in zip(corpus_iwslt.TESTS, TESTS, strict=True):
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
  files = {
    f'{corpus_iwslt.FOLDER}/{name}': x.encode() for name, x in members.items()
  }
  (folder / corpus_iwslt.ARCHIVE.name).write_bytes(tar_gz(files))


def test_corpus(tmp_path):
  """Tags are gone, titles stay; every 23rd pair is for validation."""
  (tmp_path / corpus_iwslt.FOLDER).mkdir()
  for name, text in make_members().items():
    (tmp_path / corpus_iwslt.FOLDER / name).write_text(text, encoding='utf-8')
  loaded = corpus_iwslt.load(tmp_path)
  assert loaded.validation == [TRAIN[i] for i in range(22, 230, 23)]
  assert loaded.train == [TRAIN[i] for i in range(230) if i % 23 != 22]
  assert loaded.test == list(itertools.chain(*TESTS))


def test_clean():
  """Lines end at newlines only; empty, long and unequal pairs are dropped."""
  assert corpus_iwslt.talk_lines('a\u2028b\nc\x85d\n') == ['a\u2028b', 'c\x85d']
  words = lambda n: ' '.join(['wort'] * n)
  good = [
    (words(2), words(3)),
    (words(175), words(150)),
    ('ja, gut.', words(5)),  # Punctuation counts.
  ]
  bad = [('', words(1)), (words(2), words(4)), (words(176), words(150))]
  assert corpus_iwslt.clean(good + bad) == good


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

  def get_logits(tokens, i, index):
    index = index + tokens * 4**i
    rows = jnp.arange(len(tokens))
    return jnp.repeat(tables, beam, axis=0)[rows, index], index

  found = beam_search.search(
    *(get_logits, jnp.zeros(8 * beam, jnp.int32), 8),
    **{'beam': beam, 'length': length, 'bos': bos, 'eos': eos, 'pad': pad},
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
    **{'eta': 0.01, 'lr': 1e-2, 'warmup': 3, 'beam': 2},
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
  stepped, stepped_loss = programs.step(state, target, target, 0.1)
  assert float(stepped_loss) == pytest.approx(float(loss), rel=1e-5)
  assert error(*jax.device_get((stepped.params, expected))) < 1e-3
  # Adam's first step does not depend on the size of g, but its average does.
  mu = jax.tree.map(lambda g: 0.1 * g, grads)
  found = optax.tree_utils.tree_get(stepped.opt_state, 'mu')
  assert error(*jax.device_get((found, mu))) < 1e-6


def run_on(data, out, *options):
  """Runs the program with a small model; returns the results."""
  translation.main(
    [
      *('--vocab-size=80', '--layers=1', '--width=32', '--hidden-size=64'),
      *('--heads=2', '--max-tokens=256', '--lr=5e-3', '--warmup=40'),
      *('--dropout=0', '--label-smoothing=0', '--rho-asam=0.1', '--beam=2'),
      *('--seeds=1', f'--data-dir={data}', f'--out={out}', *options),
    ]
  )
  return json.loads((out / 'results.json').read_text())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs the program on the small corpus in a folder."""
  data = tmp_path_factory.mktemp('data')
  write_archive(data, make_members())
  return functools.partial(run_on, data)


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

  def interrupt(*args, **kwargs):
    calls.append(args)
    if len(calls) == 18:
      raise KeyboardInterrupt
    return train_epoch(*args, **kwargs)

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
    ('--search-sam=0.1,0.1', 'must be different numbers > 0'),
    ('--data-dir=nowhere', 'must be a folder with de-en.tgz or de-en'),
    ('--download', 'is ignored without --corpus libreoffice'),
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


PAGE = """<!DOCTYPE html>
<html><head><title>Titel</title></head><body>
<p dir="auto">LibreOffice {release} Help</p><p id="bm_1">keine Absätze</p>
{content}</body></html>
"""


def make_page(texts, release='7.4'):
  """A page in the format of the help, with a paragraph for each text."""
  content = ''.join(
    f'<p id="par_id{i}" class="paragraph" dir="auto">{text}</p>\n'
    for i, text in enumerate(texts)
  )
  return PAGE.format(release=release, content=content).encode()


def make_help(release='7.4', num_pages=70):
  """The pages of a small help by language: rows of numbers, four a page."""
  pairs = list(dict.fromkeys(make_pairs(5 * num_pages, seed=9)))
  return {
    language: {
      f'text/swriter/{i}.html': make_page(
        [pair[side] for pair in pairs[4 * i : 4 * i + 4]], release
      )
      for i in range(num_pages)
    }
    for side, language in enumerate(corpus_packages.PACKAGES)
  }


def write_tree(folder, pages):
  """The tree that ``dpkg-deb -x`` makes of both packages."""
  for language, each in pages.items():
    for name, content in each.items():
      path = folder / corpus_packages.PLACE / language / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
  return folder


def test_paragraphs():
  """Markup and what is for other systems are left out; ids may repeat."""
  page = """
    <h1 id="hd_id1" dir="auto"><a name="x"></a>Fu&szlig;noten
      einf\u00fcgen</h1><p id="bm_1">no</p>
    <p id="par_id2">Wählen <a href="y"><span class="emph">OK</span></a>, oder
    <span id="swln" class="switchinline"><span hidden="true" id="MACa"
    ><span class="keycode">Befehl</span></span><span hidden="true"
    id="defaulta"><span class="keycode">Strg</span></span></span>+F.<br>Ende</p>
    <p id="par_id2">noch &lt;einmal&gt;</p><p>no</p>
  """
  assert corpus_libreoffice.paragraphs(page.encode()) == {
    'hd_id1': ['Fußnoten einfügen'],
    'par_id2': ['Wählen OK, oder Strg+F. Ende', 'noch <einmal>'],
  }


def test_clean_pairs():
  """What is not translated, short, long, or known by its letters is dropped."""
  words = lambda n: ' '.join(['wort'] * n)
  good = [('Das Bild', 'The image'), (words(60), 'a b'), ('zwei a', words(60))]
  bad = [
    ('Ein Beispiel', 'ein beispiel!'),  # Not translated.
    ('12 34', 'one two'),
    ('wort', 'a word'),
    ('ein Wort', 'word'),
    (words(61), 'too long'),
    ('zu lang', words(61)),
    ('das BILD (2)', 'another image'),
    ('ein anderes Bild', 'The image.'),
  ]
  named = [(str(i), pair) for i, pair in enumerate([*good, *bad])]
  assert corpus_libreoffice.clean(named) == named[: len(good)]


def test_splits(tmp_path):
  """A page is in one split, a sentence in one pair, in an order of names."""
  pages = make_help()
  # The same sentence again, on pages of every split.
  for language, text in (('de', 'Noch einmal.'), ('en-US', 'Once more.')):
    for name in pages[language]:
      page = pages[language][name].decode()
      pages[language][name] = page.replace(
        '</body>', f'<h2 id="hd_1">{text}</h2></body>'
      ).encode()
  found = corpus_libreoffice.load(write_tree(tmp_path, pages))
  page_of = {
    pair: name for name, pair in corpus_libreoffice.read_pairs(pages)[::-1]
  }
  used = [{page_of[pair] for pair in split} for split in found]
  assert all(used)
  assert sum(map(len, used)) == len(set().union(*used)) == 70
  for side in (0, 1):
    keys = [
      corpus_libreoffice.letters(pair[side]) for pair in itertools.chain(*found)
    ]
    assert len(keys) == len(set(keys)) == 4 * 70 + 1
  shuffled = {
    language: dict(sorted(each.items(), key=lambda item: item[1]))
    for language, each in pages.items()
  }
  again = corpus_libreoffice.clean(corpus_libreoffice.read_pairs(shuffled))
  assert corpus_libreoffice.split(again) == found


def make_package(folder, tree, language, version='4:7.4.7-1'):
  """A Debian package with the pages of a language."""
  name = corpus_packages.PACKAGES[language]
  content = folder / name
  place = f'{corpus_packages.PLACE}/{language}'
  shutil.copytree(tree / place, content / place)
  (content / 'DEBIAN').mkdir()
  (content / 'DEBIAN' / 'control').write_text(
    f'Package: {name}\nVersion: {version}\nArchitecture: all\n'
    f'Maintainer: nobody <nobody@example.org>\nDescription: help\n'
  )
  package = folder / f'{name}_{version.replace(":", "%3a")}_all.deb'
  subprocess.run(
    ['dpkg-deb', '-b', content, package], check=True, capture_output=True
  )
  shutil.rmtree(content)
  return package


@pytest.mark.skipif(not shutil.which('dpkg-deb'), reason='needs dpkg-deb')
def test_packages(tmp_path):
  """Packages hold what their tree does; damage and versions are reported."""
  tree = write_tree(tmp_path / 'tree', make_help())
  folder = tmp_path / 'packages'
  folder.mkdir()
  make_package(folder, tree, 'de', '4:24.2.1-1')
  with pytest.raises(DataError, match=r'4:7\.4\.7, but has 4:24\.2\.1-1\.'):
    corpus_libreoffice.load(folder)
  make_package(folder, tree, 'de')
  with pytest.raises(DataError, match=r'help-en-us of version .* has none\.'):
    corpus_libreoffice.load(folder)
  english = make_package(folder, tree, 'en-US')
  found = corpus_libreoffice.load(folder)
  assert found == corpus_libreoffice.load(tree)
  content = english.read_bytes()
  for size in (len(content) // 2, 100):
    english.write_bytes(content[:size])
    with pytest.raises(DataError, match=r'failed in .* damaged, remove it'):
      corpus_libreoffice.load(folder)


@pytest.mark.parametrize('command', ['apt-get', 'dpkg-deb'])
def test_only_on_demand(tmp_path, monkeypatch, command):
  """Without --download, nothing is; without Debian's programs, it says so."""
  for place in ('CACHE', 'SYSTEM'):
    monkeypatch.setattr(corpus_packages, place, tmp_path / place)
  monkeypatch.setenv('PATH', '')
  with pytest.raises(DataError, match=r'none\. Add --download.*--data-dir'):
    corpus_libreoffice.load(None)
  assert not list(tmp_path.iterdir())
  (tmp_path / 'libreoffice-help-de_1.deb').touch()
  with pytest.raises(
    DataError, match=f'program {command} of Debian is missing'
  ):
    corpus_libreoffice.load(tmp_path, download=command == 'apt-get')


def test_damaged_trees(tmp_path):
  """Another release, a page or a language that is missing."""
  new = write_tree(tmp_path / 'new', make_help('24.2'))
  with pytest.raises(DataError, match=r'but text/.* is of LibreOffice 24\.2'):
    corpus_libreoffice.load(new)
  pages = make_help()
  del pages['en-US']['text/swriter/7.html']
  tree = write_tree(tmp_path / 'tree', pages)
  with pytest.raises(DataError, match=r'but text/swriter/7\.html and 0 others'):
    corpus_libreoffice.load(tree)
  shutil.rmtree(tree / corpus_packages.PLACE / 'en-US')
  with pytest.raises(DataError, match=r'help-en-us of version .* has none'):
    corpus_libreoffice.load(tree)
  few = write_tree(tmp_path / 'few', make_help(num_pages=2))
  with pytest.raises(DataError, match='too few pages'):
    corpus_libreoffice.load(few)


def test_scores():
  """From counts of sentences, BLEU is SacreBLEU's; pairs share resamples."""
  pairs = make_pairs(40)
  references = [english for _, english in pairs]
  guesses = [english for _, english in make_pairs(40, seed=1)]
  guesses[:20] = references[:20]
  counts = translation_scores.count(guesses, references)
  expected = sacrebleu.corpus_bleu(guesses, [references]).score
  assert translation_scores.score(counts) == pytest.approx(expected)
  resampled = translation_scores.resample([counts, counts])
  low, high = translation_scores.interval(resampled)
  assert low < expected < high
  np.testing.assert_array_equal(
    resampled, translation_scores.resample([counts])
  )
  expected = metrics.BLEU().corpus_score(
    guesses, [references], n_bootstrap=1000
  )
  _, half_width = re.search(r'μ = (.*?) ± (.*?)\)', str(expected)).groups()
  assert (high - low) / 2 == pytest.approx(float(half_width), rel=0.15)


def test_floors():
  """The nearest training sentence is found, and duplicates are marked."""
  train = [
    ('das rote Haus am See', 'the red house at the lake'),
    ('ein kleiner Hund', 'a small dog'),
    ('der Wert der Zelle', 'the value of the cell'),
  ]
  pairs = [
    ('Ein kleiner HUND.', 'a small dog.'),
    (
      'das rote Auto fährt heute sehr schnell',
      'the red car is very fast today',
    ),
    ('Paris ? !', 'Paris ? !'),
  ]
  indices, cosines = translation_floors.nearest(train, pairs)
  assert indices[:2].tolist() == [1, 0]
  assert cosines[0] == pytest.approx(1)
  assert 0 < cosines[1] < 0.7
  assert cosines[2] == 0
  found = translation_floors.measure(train, pairs)
  assert found.is_far.tolist() == [False, True, True]
  references = [english for _, english in pairs]
  for name, guesses in {
    'copy': [german for german, _ in pairs],
    'nearest_neighbour': [train[i][1] for i in indices],
  }.items():
    expected = sacrebleu.corpus_bleu(guesses, [references]).score
    assert found.bleu[name] == pytest.approx(expected)


# Counts of BLEU: a perfect sentence of five words, and a useless one.
RIGHT = [*(5, 4, 3, 2), *(5, 4, 3, 2), 5, 5]
WRONG = [*(0, 0, 0, 0), *(5, 4, 3, 2), 5, 5]


def make_finished(optimizer, rho, seed, *, right, is_search=False):
  """A finished run that translated the first of four sentences right."""
  run = translation_plan.make_run(optimizer, rho, seed, is_search=is_search)
  counts = [RIGHT] * right + [WRONG] * (4 - right)
  splits = translation_plan.splits_of(run)
  return {**run, 'counts': dict.fromkeys(splits, counts)}


def make_measured(floor):
  """Floors of four sentences, the first of which is a near-duplicate."""
  each = translation_floors.Floors(
    {'copy': 1.0, 'nearest_neighbour': floor}, np.arange(4) > 0
  )
  return {'validation': each, 'test': each}


def test_plan_and_tables():
  """The search comes after the paper's rho, and adds runs if it differs."""
  args = translation.parse(['--corpus=libreoffice', '--seeds=2'])[1]
  args.search_sam, args.search_asam = [0.1, 0.05], [0.2, 0.5]
  # What each method and radius translates right, of four.
  quality = {0.0: 2, 0.1: 4, 0.05: 1, 0.2: 1, 0.5: 3}
  runs = []
  while run := translation_plan.find_next(args, runs):
    *key, is_search = translation_plan.identity(run)
    runs.append(
      make_finished(*key, right=quality[run['rho']], is_search=is_search)
    )
  identities = [translation_plan.identity(run) for run in runs]
  assert identities == [
    *(('adam', 0.0, seed, False) for seed in (0, 1)),
    *(('sam', 0.1, seed, False) for seed in (0, 1)),
    *(('asam', 0.2, seed, False) for seed in (0, 1)),
    *(('sam', rho, 2, True) for rho in (0.05, 0.1)),
    *(('asam', rho, 2, True) for rho in (0.2, 0.5)),
    # SAM's choice is the paper's.
    *(('asam', 0.5, seed, False) for seed in (0, 1)),
  ]
  pairs = corpus.Corpus(*[make_pairs(4)] * 3)
  results = translation_report.describe(args, pairs, make_measured(9.0), runs)
  assert results['complete']
  searched = results['optimizers']['asam, rho searched']
  assert searched['rho'] == 0.5
  bleu = lambda rows: translation_scores.score(np.array(rows))
  expected = bleu([RIGHT] * 3 + [WRONG])
  assert searched['test_bleu']['per_seed'].tolist() == [expected] * 2
  expected = bleu([RIGHT] * 2 + [WRONG])
  assert searched['test_far_bleu']['mean'] == expected
  adam = bleu([RIGHT] + [WRONG] * 2)
  difference = searched['test_far_bleu_minus_adam']
  assert difference['mean'] == pytest.approx(expected - adam)
  assert difference['bootstrap_95'][0] >= 0
  shown = translation_tables.make(results)
  assert '| nearest neighbour |  | 9.00 | 9.00 |' in shown['translation']
  assert '| ASAM, rho searched | 0.5* |' in shown['translation']
  assert '0.05: 25.00, 0.1: 100.00*' in shown['translation, search']


def test_floors_stop_it():
  """Adam must beat them; others may not."""
  adam = make_finished('adam', 0.0, 0, right=2)
  asam = make_finished('asam', 0.2, 0, right=0)
  check = translation_plan.check_floors
  check([adam, asam], make_measured(20.0))
  with pytest.raises(
    translation_plan.BelowFloorError, match=r'not more than the 60\.0 of near'
  ):
    check([adam], make_measured(60.0))


def test_recorded():
  """The page says that nothing overfits, and by how much Adam is ahead."""
  recorded = tables.read('translation')
  assert not recorded['commit'].endswith('-dirty')
  optimizers = recorded['optimizers']
  last = {}
  for name, each in optimizers.items():
    assert each['seeds'] == [0, 1, 2]
    assert (np.diff(each['curves']['validation_loss']) < 0).all()
    last[name] = [curve[-1] for curve in each['curves']['train_loss']]
  for name in ('sam', 'asam'):
    searched = f'{name}{translation_report.SEARCHED}'
    for each, points in {name: -2, searched: -1}.items():
      difference = optimizers[each]['test_bleu_minus_adam']
      assert difference['mean'] == pytest.approx(points, abs=0.2)
      _, high = difference['interval_95']
      assert (high < 0) == (each != f'asam{translation_report.SEARCHED}')
      assert min(last[each]) > max(last['adam'])
    assert recorded['search'][name]['rho'] == optimizers[searched]['rho']
  for name, search in recorded['search'].items():
    assert search['rho'] < optimizers[name]['rho']
  found = [
    x['validation_bleu'] for x in recorded['search']['asam']['candidates']
  ]
  assert found == sorted(found, reverse=True)


@pytest.mark.slow
def test_libreoffice(tmp_path, monkeypatch, capsys):
  """It stops in the middle of an epoch, goes on, searches, or gives up."""
  tree = write_tree(tmp_path / 'tree', make_help())
  options = [
    '--corpus=libreoffice',
    '--optimizer=asam',
    '--search-asam=0.1,0.3',
  ]
  options += ['--search-sam=', '--epochs=2', '--search-epochs=1']
  untouched = run_on(tree, tmp_path / 'untouched', *options)
  assert untouched['complete']
  (asam,) = (x for x in untouched['search'].values())
  assert [x['rho'] for x in asam['candidates']] == [0.1, 0.3]
  assert asam['seeds'] == [1]
  expected = {'asam'} | (
    {'asam, rho searched'} if asam['rho'] != 0.1 else set()
  )
  assert {*untouched['optimizers']} == expected
  assert '| nearest neighbour |' in capsys.readouterr().out

  train_epoch, steps = seq2seq.train_epoch, itertools.count()

  def in_time(*args, is_late, **kwargs):
    del is_late
    late = lambda: next(steps) in (3, 12)
    return train_epoch(*args, is_late=late, **kwargs)

  out = tmp_path / 'resumed'
  with monkeypatch.context() as patch:
    patch.setattr(seq2seq, 'train_epoch', in_time)
    assert not run_on(tree, out, *options)['complete']
    assert 'repeat the command with --resume' in capsys.readouterr().out
    assert not run_on(tree, out, *options, '--resume')['complete']
  resumed = run_on(tree, out, *options, '--resume', '--minutes=60')
  for key in ('complete', 'optimizers', 'search', 'sha256'):
    assert resumed[key] == untouched[key]

  out = tmp_path / 'stopped'
  with pytest.raises(SystemExit, match='1'):
    run_on(tree, out, *options, '--optimizer=adam', '--lr=1e-9')
  assert 'needs no training' in capsys.readouterr().err
  stopped = json.loads((out / 'results.json').read_text())
  assert not stopped['complete']
  assert 'needs no training' in stopped['stopped']
