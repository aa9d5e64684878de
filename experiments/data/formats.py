"""Readers of the two formats of data sets of small images: IDX and CIFAR's.

Both have a fixed size, so that a truncated file is noticed. Nothing is
unpickled.
"""

import math

import numpy as np

CIFAR_SHAPE = (32, 32, 3)


def read_idx(content: bytes) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, the format of MNIST.

  Args:
    content: The file, whose checksum was right: four bytes, the last of them
      the number of dimensions, each of these as a big-endian uint32, and the
      array.

  Returns:
    uint8, read-only, in the shape that the header gives.
  """
  ndim = content[3]
  shape = np.frombuffer(content, '>u4', ndim, offset=4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_cifar(
  content: bytes, num_records: int, num_label_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a file of the binary version of CIFAR-10 or CIFAR-100.

  Args:
    content: The file. A record is its labels, a byte each, and 1024 bytes of
      red, of green and of blue.
    num_records: The required number of records.
    num_label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, whose first label, the
      superclass, is dropped.

  Returns:
    Images, uint8 [n, 32, 32, 3], and labels, uint8 [n].

  Raises:
    ValueError: Its size is wrong.
  """
  record_size = num_label_bytes + math.prod(CIFAR_SHAPE)
  size = num_records * record_size
  if len(content) != size:
    raise ValueError(f'it must have {size} bytes, but has {len(content)}')
  records = np.frombuffer(content, np.uint8).reshape(num_records, record_size)
  height, width, channels = CIFAR_SHAPE
  planes = records[:, num_label_bytes:].reshape(-1, channels, height, width)
  images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return images, records[:, num_label_bytes - 1]
