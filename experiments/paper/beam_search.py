"""Beam search for the most probable sequences of a model."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Below any score, and finite, so that differences are numbers.
NEVER = -1e9


class Beam(NamedTuple):
  """The state of n searches with k sequences each.

  Attributes:
    tokens: Unfinished sequences, int32 [n, k, length].
    scores: Their log-probabilities, [n, k].
    ended: Finished sequences, int32 [n, k, length].
    ended_scores: Their mean log-probabilities per token, [n, k].
    cache: What the model keeps of each unfinished sequence.
  """

  tokens: jax.Array
  scores: jax.Array
  ended: jax.Array
  ended_scores: jax.Array
  cache: Any


def search(
  get_logits: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
  cache: Any,
  n: int,
  *,
  beam: int,
  length: int,
  bos: int,
  eos: int,
  pad: int,
) -> jax.Array:
  """Finds the sequence with the highest mean log-probability per token.

  Args:
    get_logits: Maps the i-th tokens [n * beam], i and the cache of the tokens
      before to the logits of the next one, [n * beam, vocabulary], and the new
      cache.
    cache: That of no token: a pytree of arrays, of which those that are no
      scalars have a first axis of n * beam.
    n: The number of searches.
    beam: The number of sequences that each keeps.
    length: The largest length, with ``bos``.
    bos: The first token of a sequence.
    eos: The last token of a sequence; it counts in the mean.
    pad: The token after the last one.

  Returns:
    The sequences, int32 [n, length], with ``bos`` and ``eos``. If none has
    ended, the unfinished one with the highest log-probability.
  """
  empty = jnp.full([n, beam, length], pad)
  start = Beam(
    tokens=empty.at[:, :, 0].set(bos),
    # All sequences descend from the first.
    scores=jnp.full([n, beam], NEVER).at[:, 0].set(0.0),
    ended=empty,
    ended_scores=jnp.full([n, beam], NEVER),
    cache=cache,
  )

  def step(i, state):
    logits, cache = get_logits(
      state.tokens[:, :, i].reshape(-1), i, state.cache
    )
    added = jax.nn.log_softmax(logits).reshape(n, beam, -1)
    scores = state.scores[:, :, None] + added

    # With eos, a sequence ends.
    ended_now = state.tokens.at[:, :, i + 1].set(eos)
    ended, ended_scores = _best(
      jnp.concatenate([state.ended, ended_now], axis=1),
      jnp.concatenate(
        [state.ended_scores, scores[:, :, eos] / (i + 1)], axis=1
      ),
      beam,
    )
    # With any other token, it goes on.
    scores = scores.at[:, :, eos].set(NEVER).reshape(n, -1)
    scores, chosen = jax.lax.top_k(scores, beam)
    parents, last = jnp.divmod(chosen, added.shape[-1])
    tokens = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1)
    tokens = tokens.at[:, :, i + 1].set(last)
    rows = (beam * jnp.arange(n)[:, None] + parents).reshape(-1)
    cache = jax.tree.map(lambda x: x[rows] if x.ndim else x, cache)
    return i + 1, Beam(tokens, scores, ended, ended_scores, cache)

  def may_improve(carry):
    i, state = carry
    # Scores only decrease: this bounds the mean of all continuations.
    bound = jnp.max(state.scores, axis=1) / (length - 1)
    return (i < length - 1) & jnp.any(
      bound > jnp.max(state.ended_scores, axis=1)
    )

  _, found = jax.lax.while_loop(
    may_improve, lambda carry: step(*carry), (0, start)
  )
  has_ended = found.ended_scores[:, :1] > NEVER / 2
  return jnp.where(has_ended, found.ended[:, 0], found.tokens[:, 0])


def _best(tokens, scores, beam):
  scores, chosen = jax.lax.top_k(scores, beam)
  return jnp.take_along_axis(tokens, chosen[:, :, None], axis=1), scores
