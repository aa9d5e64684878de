"""A pretrained encoder and a new head, with the interface of Flax linen."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import numpy as np

# Encodes at most this many at once, to limit memory.
EMBED_BATCH = 128


class Classifier(nnx.Module):
  """Logits from the embeddings of an encoder, which knows their ``width``."""

  def __init__(self, encoder: Any, num_classes: int, rngs: nnx.Rngs):
    self.encoder = encoder
    self.head = nnx.Linear(encoder.width, num_classes, rngs=rngs)

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps inputs [n, ...] to logits [n, num_classes]."""
    return self.head(self.encoder(inputs))


class FineTuned:
  """A classifier with the interface of a Flax linen module, and its weights.

  Parameters are plain dicts. The pretrained weights are read when they are
  first needed.

  Args:
    make_encoder: Makes the encoder.
    read: Reads its pretrained variables, as nested dicts; those that are no
      parameters are constants.
    num_classes: The number of logits.
  """

  def __init__(
    self,
    make_encoder: Callable[[nnx.Rngs], Any],
    read: Callable[[], dict[str, Any]],
    num_classes: int,
  ):
    self._make_encoder, self._read = make_encoder, read
    self._num_classes = num_classes

  def _make(self, rngs):
    return Classifier(self._make_encoder(rngs), self._num_classes, rngs)

  @functools.cached_property
  def _split(self):
    """The structure, and the state without values."""
    return nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))

  def _merge(self, params):
    """The classifier with these parameters."""
    graphdef, abstract = self._split
    state = jax.tree.map(lambda x: x, abstract)
    for variables in {'encoder': self._read()}, params:
      nnx.replace_by_pure_dict(state, variables)
    return nnx.merge(graphdef, state)

  def init(self, key: jax.Array, inputs: Any) -> dict[str, Any]:
    """The pretrained weights, and random values of all others."""
    del inputs
    graphdef, state = nnx.split(self._make(nnx.Rngs(key)))
    nnx.replace_by_pure_dict(state, {'encoder': self._read()})
    params = nnx.state(nnx.merge(graphdef, state), nnx.Param)
    return {'params': nnx.to_pure_dict(params)}

  def apply(
    self,
    variables: dict[str, Any],
    inputs: Any,
    *,
    train: bool = False,
    mutable: Any = False,
  ) -> Any:
    """The logits, with an empty state if there is anything ``mutable``."""
    del train
    logits = self._merge(variables['params'])(inputs)
    return logits if mutable is False else (logits, {})

  @functools.cached_property
  def _embed(self):
    """The encoder as training starts with it, compiled."""
    init = jax.jit(lambda key: self.init(key, None)['params'])
    embed = jax.jit(lambda params, x: self._merge(params).encoder(x))
    return functools.partial(embed, init(jax.random.key(0)))

  def embed(self, inputs: Any) -> np.ndarray:
    """The embeddings [n, width] of the pretrained encoder."""
    parts = []
    for i in range(0, len(inputs), EMBED_BATCH):
      part = np.asarray(inputs[i : i + EMBED_BATCH])
      # Filled, so that one program does for all.
      rest = [(0, EMBED_BATCH - len(part))] + [(0, 0)] * (part.ndim - 1)
      filled = np.pad(part, rest, mode='edge')
      parts.append(np.asarray(self._embed(filled))[: len(part)])
    return np.concatenate(parts)
