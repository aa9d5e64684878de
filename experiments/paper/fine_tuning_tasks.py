"""What the tasks of fine-tuning have in common: methods and seeds."""

from collections.abc import Callable
from pathlib import Path

from experiments import data
from experiments.paper import budget_methods
from experiments.paper import budget_tasks

METHODS = {
  name: budget_methods.METHODS[name]
  for name in (
    *('base', 'base_twice', 'sam', 'asam', 'momentum_asam', 'quarter'),
  )
}


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
    title += f', {100 * label_noise:.0f}% label noise'
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
