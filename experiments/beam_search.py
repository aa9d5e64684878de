"""Beam search: the sequences that a model thinks most probable."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Less than any score, and finite, so that differences of such are numbers.
NEVER = -1e9


class Beam(NamedTuple):
  """What is known after some steps, for n searches with k sequences each.

  Attributes:
    tokens: Those that go on, int32 [n, k, length].
    scores: Their log-probabilities, [n, k].
    ended: Those that have ended, int32 [n, k, length].
    ended_scores: The means of their log-probabilities, [n, k].
  """

  tokens: jax.Array
  scores: jax.Array
  ended: jax.Array
  ended_scores: jax.Array


def search(
  get_logits: Callable[[jax.Array, jax.Array], jax.Array],
  n: int,
  *,
  beam: int,
  length: int,
  bos: int,
  eos: int,
  pad: int,
) -> jax.Array:
  """Finds the sequence whose mean log-probability is highest.

  Args:
    get_logits: From sequences [n * beam, length], padded, and an index i to the
      logits of what follows the i-th token, [n * beam, vocabulary].
    n: The number of searches.
    beam: How many sequences each keeps.
    length: The longest sequence with its first mark.
    bos: The mark that a sequence begins with.
    eos: The mark that it ends with; it counts in the mean.
    pad: What comes after that.

  Returns:
    The sequences, int32 [n, length], with both marks. Where none has ended, the
    one that goes on with the highest log-probability.
  """
  empty = jnp.full([n, beam, length], pad)
  start = Beam(
    tokens=empty.at[:, :, 0].set(bos),
    # One sequence that all others come from.
    scores=jnp.full([n, beam], NEVER).at[:, 0].set(0.0),
    ended=empty,
    ended_scores=jnp.full([n, beam], NEVER),
  )

  def step(i, state):
    logits = get_logits(state.tokens.reshape(n * beam, length), i)
    added = jax.nn.log_softmax(logits).reshape(n, beam, -1)
    scores = state.scores[:, :, None] + added

    # With eos, each sequence ends.
    ended_now = state.tokens.at[:, :, i + 1].set(eos)
    ended, ended_scores = _best(
      jnp.concatenate([state.ended, ended_now], axis=1),
      jnp.concatenate(
        [state.ended_scores, scores[:, :, eos] / (i + 1)], axis=1
      ),
      beam,
    )
    # With anything else, it goes on.
    scores = scores.at[:, :, eos].set(NEVER).reshape(n, -1)
    scores, chosen = jax.lax.top_k(scores, beam)
    parents, last = jnp.divmod(chosen, added.shape[-1])
    tokens = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1)
    tokens = tokens.at[:, :, i + 1].set(last)
    return i + 1, Beam(tokens, scores, ended, ended_scores)

  def may_improve(carry):
    i, state = carry
    # Scores only fall, so that the mean is at best this over all that is left.
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
