"""What a translation must beat, and which sentences resemble training data."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction import text

from experiments.paper import corpus
from experiments.paper import translation_scores as scores

# The cosine from which on two sentences are near-duplicates.
NEAR = 0.7
# Rows of the product of all sentences with those for training.
CHUNK = 500


class Floors(NamedTuple):
  """What needs no training, for some sentences.

  Attributes:
    bleu: By name: that of the source as it is, and that of the translation of
      the most similar training sentence.
    is_far: bool [sentences], whether no training sentence is a near-duplicate.
  """

  bleu: dict[str, float]
  is_far: np.ndarray


def nearest(
  train: Sequence[corpus.Pair], pairs: Sequence[corpus.Pair]
) -> tuple[np.ndarray, np.ndarray]:
  """The most similar training sentences, by their German words.

  Returns:
    The index of each and the cosine of their TF-IDF vectors, both [pairs].
  """
  # Any token counts, also a single letter, so that no sentence is empty.
  vectorizer = text.TfidfVectorizer(token_pattern=r'\w+|[^\w\s]')
  known = vectorizer.fit_transform([german for german, _ in train])
  queries = vectorizer.transform([german for german, _ in pairs])
  indices, cosines = [], []
  for first in range(0, len(pairs), CHUNK):
    similar = (queries[first : first + CHUNK] @ known.T).toarray()
    indices.append(similar.argmax(axis=1))
    cosines.append(similar.max(axis=1))
  return np.concatenate(indices), np.concatenate(cosines)


def measure(
  train: Sequence[corpus.Pair], pairs: Sequence[corpus.Pair]
) -> Floors:
  """The floors of some sentences, given those for training."""
  indices, cosines = nearest(train, pairs)
  references = [english for _, english in pairs]
  guesses = {
    'copy': [german for german, _ in pairs],
    'nearest_neighbour': [train[i][1] for i in indices],
  }
  bleu = {
    name: scores.score(scores.count(guess, references))
    for name, guess in guesses.items()
  }
  return Floors(bleu, cosines < NEAR)
