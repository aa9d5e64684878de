"""Settings of the frameworks, which are read when they are imported."""

import os

os.environ['KERAS_BACKEND'] = 'jax'


def pytest_configure(config):
  """Warnings of the packages are not errors."""
  config.addinivalue_line('filterwarnings', 'default')
