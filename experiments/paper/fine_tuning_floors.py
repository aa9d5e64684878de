"""What fine-tuning has to beat: bag of words, and a probe of frozen features.

Both are logistic regressions of scikit-learn. The inverse C of their
regularization is chosen as rho is.
"""

from typing import Any

import numpy as np
from scipy import sparse
from sklearn import linear_model
from sklearn import pipeline
from sklearn.feature_extraction import text

from experiments import data
from experiments.models import minilm
from experiments.paper import budget_methods
from experiments.paper import budget_tasks
from experiments.paper import budget_training


def floor(title: str, *values: float) -> budget_methods.Method:
  """A method of these values of C, without a gradient."""
  return budget_methods.Method(
    title,
    budget_methods.base,
    gradients=0,
    candidates=budget_methods.radii(*values),
    names=('C',),
    has_rho=False,
  )


BAG_OF_WORDS = floor('bag of words', 10.0, 100.0, 1e3, 1e4)
PROBE = floor('frozen, a linear probe', 10.0, 100.0, 1e3, 1e4)
FLOORS = {'bag_of_words': BAG_OF_WORDS, 'probe': PROBE}


class Trainer(budget_training.Trainer):
  """A trainer that knows the floors, too."""

  def __init__(self, dataset: data.Dataset, *args: Any, **kwargs: Any):
    super().__init__(dataset, *args, **kwargs)
    self._embeddings: dict[bytes, np.ndarray] = {}

  def train(self, task: budget_tasks.Task, name: str, lanes: Any) -> Any:
    """Trains a group of lanes of a method, or fits those of a floor."""
    if name not in FLOORS:
      return super().train(task, name, lanes)
    featurize = counts if name == 'bag_of_words' else self._embed
    return [self._fit(task, lane, featurize) for lane in lanes]

  def logits(self, task: budget_tasks.Task, params: Any, split: Any) -> Any:
    """The logits of trained lanes, or the log-probabilities of a floor."""
    if not isinstance(params, list):
      return super().logits(task, params, split)
    return np.stack([predict(split) for predict in params])

  def _fit(self, task, lane, featurize):
    """From a split to the log-probabilities of its examples."""
    train = budget_training.dataset_of_seed(
      self._dataset, task, lane.seed
    ).train
    classifier = pipeline.make_pipeline(
      *([text.TfidfTransformer()] if featurize is counts else []),
      linear_model.LogisticRegression(C=lane.values[0], max_iter=1000),
    ).fit(featurize(task, train), train.labels)

    def predict(split):
      with np.errstate(divide='ignore'):  # A probability of zero.
        scores = classifier.predict_log_proba(featurize(task, split))
      # For classes absent from the drawn examples.
      log_p = np.full((len(scores), self._dataset.num_classes), -1e3)
      log_p[:, classifier[-1].classes_] = np.maximum(scores, -1e3)
      return log_p

    return predict

  def _embed(self, task, split):
    """The embeddings of the pretrained encoder, of length 1."""
    key = np.asarray(split.images).tobytes()
    if key not in self._embeddings:
      features = task.recipe.model.embed(split.images)
      features /= np.linalg.norm(features, axis=1, keepdims=True)
      self._embeddings[key] = features
    return self._embeddings[key]


def counts(task: budget_tasks.Task, split: data.Split) -> sparse.csr_matrix:
  """How often each text has each piece, [n, pieces]."""
  del task
  pieces = np.asarray(split.images)
  row, place = np.nonzero(pieces != minilm.PAD)
  return sparse.csr_matrix(
    (np.ones(len(row)), (row, pieces[row, place])),
    # Whatever the tokenizer: pieces are small numbers.
    shape=(len(pieces), 1 << 17),
  )
