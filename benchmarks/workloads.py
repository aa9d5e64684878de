"""What is timed, the same in JAX and PyTorch, so neither is imported here."""

from typing import NamedTuple

RHO, SAM_RHO, ETA = 0.5, 0.05, 0.01
LEARNING_RATES = {'sgd': 0.01, 'adamw': 1e-4}


class Workload(NamedTuple):
  """What a model is trained on, and how.

  Attributes:
    base: The base optimizer: 'sgd', with momentum 0.9, or 'adamw'.
    num_classes: The range of the labels.
    inputs: The shape of a batch of inputs on a CPU and on a GPU.
    is_text: Whether inputs are tokens, each with a label.
  """

  base: str
  num_classes: int
  inputs: dict[str, tuple[int, ...]]
  is_text: bool = False

  def labels(self, device: str) -> tuple[int, ...]:
    """The shape of a batch of labels."""
    inputs = self.inputs[device]
    return inputs if self.is_text else inputs[:1]


def _images(size, **batch):
  return {device: (n, size, size, 3) for device, n in batch.items()}


# The most important ones come first, since the time of a run is limited.
WORKLOADS = {
  'ResNet-20': Workload('sgd', 10, _images(32, cpu=32, gpu=512)),
  'ViT-S/16': Workload('adamw', 1000, _images(64, cpu=16, gpu=256)),
  'LM': Workload('adamw', 8192, {'cpu': (4, 64), 'gpu': (16, 512)}, True),
  'WRN-16-4': Workload('sgd', 10, _images(32, cpu=8, gpu=256)),
  'MLP': Workload('sgd', 10, {'cpu': (512, 784), 'gpu': (8192, 784)}),
  '300 layers': Workload('sgd', 10, {'cpu': (256, 128), 'gpu': (4096, 128)}),
  # For tests.
  'tiny': Workload('sgd', 10, _images(8, cpu=4, gpu=4)),
}
MODELS = tuple(name for name in WORKLOADS if name != 'tiny')
