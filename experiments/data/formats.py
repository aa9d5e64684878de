"""Readers of the two formats of data sets of small images: IDX and CIFAR's.

Both have a fixed size, so that a truncated file is noticed. Nothing is
unpickled.
"""

import math

import numpy as np

CIFAR_SHAPE = (32, 32, 3)


def read_idx(content: bytes, ndim: int) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, the format of MNIST.

  Args:
    content: The file: two zeros, 8 for unsigned bytes, the number of
      dimensions, each of them as a big-endian uint32, and the array.
    ndim: The required number of dimensions.

  Returns:
    uint8, read-only, in the shape that the header gives.

  Raises:
    ValueError: It is another format, or its size is not what the header says.
  """
  magic, header_size = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
  if content[:4] != magic or len(content) < header_size:
    raise ValueError(
      f'it must start with {magic.hex()} and {ndim} dimensions, but starts with'
      f' {content[:4].hex() or "nothing"} and has {len(content)} bytes'
    )
  shape = np.frombuffer(content, '>u4', ndim, offset=4).tolist()
  check_size(content, header_size + math.prod(shape))
  return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


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
  check_size(content, num_records * record_size)
  records = np.frombuffer(content, np.uint8).reshape(num_records, record_size)
  height, width, channels = CIFAR_SHAPE
  planes = records[:, num_label_bytes:].reshape(-1, channels, height, width)
  images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return images, records[:, num_label_bytes - 1]


def check_size(content: bytes, size: int) -> None:
  """Raises a ValueError unless ``content`` has ``size`` bytes."""
  if len(content) != size:
    raise ValueError(f'it must have {size} bytes, but has {len(content)}')
