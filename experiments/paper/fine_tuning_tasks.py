"""What the tasks of fine-tuning have in common: methods, AdamW, and seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import optax

from experiments import data
from experiments.paper import budget_methods
from experiments.paper import budget_tasks

METHODS = {
  name: budget_methods.METHODS[name]
  for name in (
    *('base', 'base_twice', 'sam', 'asam', 'momentum_asam', 'quarter'),
  )
}


def adamw(lr: float, mask: Any = None) -> budget_tasks.MakeTx:
  """Makes AdamW with clipping, for what the mask selects."""

  def make_tx(num_steps: chex.Numeric, weight_decay: Any) -> Any:
    tx = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(
        budget_tasks.cosine(lr, num_steps), weight_decay=weight_decay
      ),
    )
    if mask is None:
      return tx
    return optax.partition({True: tx, False: optax.set_to_zero()}, mask)

  return make_tx


def make_task(
  title: str,
  recipe: budget_tasks.Recipe,
  load: Callable[[Path | None], data.Dataset],
  train_size: int,
  num_steps: int,
  label_noise: float,
) -> budget_tasks.Task:
  """A task whose seeds draw their own examples, for about so many steps."""
  if label_noise:
    title += f', {100 * label_noise:.0f} % label noise'
  return budget_tasks.Task(
    title,
    recipe,
    load,
    train_size=train_size,
    epochs=num_steps * recipe.batch_size // train_size,
    label_noise=label_noise,
    draws=True,
    metric='balanced_accuracy',
  )
