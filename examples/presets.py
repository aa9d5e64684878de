"""What is used where the command line says nothing: defaults and recipes."""

from pathlib import Path

# What is used where neither the command line nor a preset says anything.
DEFAULTS = {
  'dataset': 'digits',
  'model': 'mlp',
  'label_noise': 0.4,
  'epochs': 100,
  'batch_size': 100,
  'lr': 0.1,
  'weight_decay': 5e-4,
  'label_smoothing': 0.0,
  'augment': False,
  'seeds': list(range(5)),
  'search_seeds': 2,
  'seed_axis': 'auto',
  'data_dir': None,
  'train_size': None,
  'merge_held_out': False,
  'eta': 0.01,
  'normalization': 'elementwise',
  'normalize_biases': False,
  'perturb': 'all',
  'ord': 2.0,
  'every_k': 1,
  'm_sharpness': None,
  'm_sharpness_by': 'vmap',
  'out': Path('out/train'),
  'resume': False,
  'tensorboard': False,
  'preset': None,
  'rho': {
    'sam': [0.05, 0.1, 0.2, 0.5, 1.0],
    'asam': [0.5, 1.0, 2.0, 5.0, 10.0],
  },
}

# Kwon et al., ASAM, 2021, section 5: what was run on CIFAR, with the radii that
# were found there. SGD had twice the epochs: --optimizer sgd --epochs 400.
PAPER = {
  'model': 'resnet20',
  'label_noise': 0.0,
  'epochs': 200,
  'batch_size': 128,
  'lr': 0.1,
  'weight_decay': 5e-4,
  'label_smoothing': 0.1,
  'augment': True,
  'merge_held_out': True,
}
PRESETS = {
  'paper-cifar10': {
    **PAPER,
    'dataset': 'cifar10',
    'rho': {'sam': [0.05], 'asam': [0.5]},
  },
  'paper-cifar100': {
    **PAPER,
    'dataset': 'cifar100',
    'rho': {'sam': [0.1], 'asam': [1.0]},
  },
}
