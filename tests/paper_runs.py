"""The options of a run of the comparisons, as the program reads them."""

import argparse
import types
from unittest import mock

import numpy as np

import arguments
import data
import m_sharpness


def parse(*options: str) -> argparse.Namespace:
  """The options, without reading the data set or asking what is installed.

  It has as many images as Fashion-MNIST, and nothing on them.
  """

  def load(parser, args):
    del parser
    split = lambda n: data.Split(
      np.zeros((n, 28, 28, 1), np.uint8), np.zeros(n, np.int32)
    )
    return types.SimpleNamespace(
      train=split(args.train_size or 60000), test=split(10000), num_classes=10
    )

  with (
    mock.patch.object(arguments, 'load_dataset', load),
    mock.patch.object(m_sharpness, 'missing', return_value=''),
  ):
    args, _ = arguments.parse(options)
  return args
