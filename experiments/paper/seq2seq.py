"""The compiled steps of translation: training, validation and beam search."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from experiments import models
from experiments.models.transformer import Transformer
from experiments.paper import beam_search
from experiments.paper import corpus
from experiments.paper import program


class State(NamedTuple):
  """All that a step changes."""

  params: optax.Params
  opt_state: optax.OptState
  key: jax.Array


class Programs(NamedTuple):
  """Jitted functions, compiled once for each shape of a batch.

  Attributes:
    init: Maps a seed to a state.
    step: Maps a state, a batch's source and target, and rho to the next state
      and the loss.
    validate: Maps parameters, source and target to the summed negative
      log-likelihood of all pieces and their number.
    translate: Maps parameters and source to pieces, int32 [n, length].
  """

  init: Callable[[int], State]
  step: Callable[..., tuple[State, jax.Array]]
  validate: Callable[[optax.Params, np.ndarray, np.ndarray], Any]
  translate: Callable[[optax.Params, np.ndarray], jax.Array]


def make_schedule(lr: float, warmup: int) -> optax.Schedule:
  """Linear warm-up to ``lr``, then inverse square root decay."""
  return lambda step: (
    lr * jnp.minimum((step + 1) / warmup, jnp.sqrt(warmup / (step + 1)))
  )


@functools.cache
def make_programs(
  model: Transformer,
  optimizer: str,
  *,
  eta: float,
  lr: float,
  warmup: int,
  weight_decay: float,
  label_smoothing: float,
  beam: int,
) -> Programs:
  """Makes the programs of 'adam', 'sam' or 'asam'; compiles nothing twice.

  Any rho runs the same program.
  """
  tx = optax.adamw(
    make_schedule(lr, warmup), b1=0.9, b2=0.98, weight_decay=weight_decay
  )

  def loss_fn(params, source, target, key):
    logits = model.apply(
      {'params': params},
      source,
      target[:, :-1],
      train=True,
      rngs={'dropout': key},
    )
    total, count = _sum_losses(logits, target, label_smoothing)
    return total / count

  @jax.jit
  def init(seed):
    init_key, key = jax.random.split(jax.random.key(seed))
    pieces = jnp.full([1, 8], corpus.EOS)
    params = model.init(init_key, pieces, pieces)['params']
    return State(params, tx.init(params), key)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, source, target, rho):
    key, dropout_key = jax.random.split(state.key)
    value_and_grad = program.value_and_grad(
      optimizer, loss_fn, rho=rho, eta=eta
    )
    # One key, so that both passes drop the same units.
    loss, grads = value_and_grad(state.params, source, target, dropout_key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(
      optax.apply_updates(state.params, updates), opt_state, key
    ), loss

  hashable: Any = model  # Which its type does not say.
  return Programs(init, step, *_make_evaluators(hashable, beam))


@functools.cache
def _make_evaluators(model: Any, beam: int):
  """``validate`` and ``translate``, which do not depend on the optimizer."""

  @jax.jit
  def validate(params, source, target):
    logits = model.apply({'params': params}, source, target[:, :-1])
    return _sum_losses(logits, target, 0.0)

  @jax.jit
  def translate(params, source):
    n, source_length = source.shape
    variables = {'params': params}
    encoded: Any = model.apply(variables, source, method='encode')
    encoded, sources = (jnp.repeat(x, beam, axis=0) for x in (encoded, source))

    # Longer translations are rare.
    length = int(1.2 * source_length) + 10

    def decode_next(variables, pieces, i):
      return model.apply(
        *(variables, encoded, sources, pieces, i),
        method='decode_next',
        mutable=['cache'],
      )

    def get_logits(pieces, i, cache):
      logits, changed = decode_next({**variables, **cache}, pieces[:, None], i)
      return logits[:, 0], changed

    pieces = jax.ShapeDtypeStruct((n * beam, length), source.dtype)
    _, shapes = jax.eval_shape(decode_next, variables, pieces, 0)
    return beam_search.search(
      get_logits,
      jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
      n,
      beam=beam,
      length=length,
      bos=corpus.BOS,
      eos=corpus.EOS,
      pad=corpus.PAD,
    )

  return validate, translate


def _sum_losses(logits, target, label_smoothing):
  """The summed loss of all pieces after the first, and their number."""
  labels = target[:, 1:]
  is_piece = labels != corpus.PAD
  losses = models.cross_entropies(logits, labels, label_smoothing)
  return jnp.sum(losses, where=is_piece), jnp.sum(is_piece)


class Epoch(NamedTuple):
  """An epoch of training, or the first part of one.

  Attributes:
    state: The state after it.
    losses: The loss of each batch.
    is_complete: Whether these are all batches.
  """

  state: State
  losses: list[float]
  is_complete: bool


def train_epoch(
  programs: Programs,
  state: State,
  batches: Iterable[corpus.Batch],
  rho: float,
  *,
  losses: Sequence[float] = (),
  is_late: Callable[[], bool] = lambda: False,
) -> Epoch:
  """Trains on each batch once, or until it is late.

  Args:
    programs: What :func:`make_programs` returns.
    state: The state of the epoch so far.
    batches: All of the epoch.
    rho: The radius of SAM and ASAM.
    losses: Those of the first batches, which are not trained on again.
    is_late: Whether to stop before the next batch.
  """
  new: list[jax.Array] = []
  is_complete = True
  for batch in itertools.islice(batches, len(losses), None):
    jax.block_until_ready(new[-1:])  # So that the time is that of this step.
    if is_late():
      is_complete = False
      break
    state, loss = programs.step(state, batch.source, batch.target, rho)
    new.append(loss)
  return Epoch(state, [*losses, *map(float, jax.device_get(new))], is_complete)


def validation_loss(
  programs: Programs,
  params: optax.Params,
  pairs: Sequence[corpus.Pieces],
  max_tokens: int,
) -> float:
  """The mean negative log-likelihood per piece."""
  sums = [
    programs.validate(params, batch.source, batch.target)
    for batch in corpus.batches(pairs, max_tokens, None)
  ]
  total, count = np.sum(jax.device_get(sums), axis=0)
  return float(total / count)


def translate(
  programs: Programs,
  params: optax.Params,
  german: Sequence[str],
  vocabulary: sentencepiece.SentencePieceProcessor,
  max_tokens: int,
) -> list[str]:
  """The English translation of each sentence."""
  # The target must not influence how long a translation may be.
  pairs = [(sentence, '') for sentence in german]
  sources = [(source, []) for source, _ in corpus.encode(vocabulary, pairs)]
  translations = [''] * len(german)
  for batch in corpus.batches(sources, max_tokens, None):
    found = np.asarray(programs.translate(params, batch.source))
    for i, pieces in zip(batch.indices, found.tolist(), strict=False):
      _, *words = pieces
      if corpus.EOS in words:
        words = words[: words.index(corpus.EOS)]
      translations[i] = vocabulary.decode(words)
  return translations
