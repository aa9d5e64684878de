"""Promise: several processes compute what one does, and resume from a kill."""

import contextlib
import functools
import io
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from examples import multihost
from tests.helpers import reference
from tests.helpers.support import assert_same_bits
from tests.helpers.support import error
from tests.helpers.support import program_env

pytestmark = pytest.mark.usefixtures('quickly_compiled')

STEPS = 12
OPTIONS = [f'--steps={STEPS}', '--checkpoint-every=5', '--batch-size=32']


def train(folder, *options):
  """The state after training in this process, on its eight devices."""
  args = multihost.parse([f'--checkpoint-dir={folder}', *OPTIONS, *options])
  return multihost.train(args)


@functools.cache
def whole_run():
  """The state after training without an interruption, and what is printed."""
  printed = io.StringIO()
  with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.redirect_stdout(printed),
  ):
    return train(folder), printed.getvalue()


def uninterrupted():
  """The state after training without an interruption."""
  return whole_run()[0]


def test_step_is_asam(tmp_path, monkeypatch):
  """The first one, on the first batch: two passes and NumPy between them."""
  batches = []

  def read_batches(*args):
    for batch in read(*args):
      batches.append(batch)
      yield batch

  read = multihost.read_batches
  monkeypatch.setattr(multihost, 'read_batches', read_batches)
  got = train(tmp_path, '--steps=1').params
  (batch,) = batches
  assert batch[0].shape == (32, 64)
  params = multihost.init_params(jax.random.key(0))
  grad_fn = jax.jit(jax.grad(multihost.loss_fn))
  grads = grad_fn(params, batch)
  grads = grad_fn(reference.perturb(params, grads), batch)
  moved = jax.tree.map(lambda a, b: (b - np.asarray(a)) / 0.05, got, params)
  assert error(moved, jax.tree.map(np.asarray, grads)) < 1e-4


def test_learns_on_shards():
  """The loss falls; parameters and momentum are split where they can be."""
  losses = re.findall(r'loss (\S+)', whole_run()[1])
  assert len(losses) == STEPS
  assert float(losses[-1]) < 0.7 * float(losses[0])
  assert int(uninterrupted().step) == STEPS
  kernels = [x for x in jax.tree.leaves(uninterrupted()) if x.ndim == 2]
  assert len(kernels) == 6  # of three layers, and their momentum
  for kernel in kernels:
    assert kernel.addressable_data(0).size * 8 == kernel.size


def test_preempted(tmp_path, monkeypatch, capsys):
  """SIGTERM saves a checkpoint, from which the run ends with the same bits."""
  expected = uninterrupted()
  manager = multihost.ocp.CheckpointManager
  with monkeypatch.context() as preempted:
    preempted.setattr(manager, 'reached_preemption', lambda _, step: step == 7)
    with pytest.raises(SystemExit, match='after step 7'):
      train(tmp_path)
  capsys.readouterr()
  assert_same_bits(train(tmp_path), expected)
  steps = re.findall(r'^step (\d+)', capsys.readouterr().out, re.MULTILINE)
  assert steps == [str(i) for i in range(8, STEPS + 1)]


def test_batches(monkeypatch):
  """The same global batches, however many processes read them."""
  labels = np.arange(50)

  def read(count, first_step):
    parts = []
    for index in range(count):
      monkeypatch.setattr(jax, 'process_count', lambda: count)
      monkeypatch.setattr(jax, 'process_index', lambda i=index: i)
      batches = multihost.read_batches(labels, labels, 8, first_step)
      parts.append([next(batches)[1] for _ in range(18 - first_step)])
    return np.concatenate(parts, axis=1)

  one = read(1, 0)
  for count, first_step in ((2, 0), (4, 0), (2, 7)):
    np.testing.assert_array_equal(read(count, first_step), one[first_step:])
  epochs = one.reshape(3, -1)
  for epoch in epochs:
    assert len(np.unique(epoch)) == 48
  assert not np.array_equal(epochs[0], epochs[1])


# Process 1 kills itself instead of taking step 8.
KILLED = """
import os, signal
from examples import multihost

read_batches = multihost.read_batches

def read(*args):
  for step, batch in enumerate(read_batches(*args), 1):
    if step == 8 and multihost.jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    yield batch

multihost.read_batches = read
multihost.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(
  jax.__version_info__ < (0, 5),
  reason='Orbax cannot save from several processes with so old a JAX',
)
def test_killed(tmp_path):
  """Two processes, one of which is killed, resume to the state of one."""
  folder = tmp_path / 'checkpoints'
  env = {
    **program_env(tmp_path / 'cache'),
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }

  def run(*program):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    processes = [
      subprocess.Popen(
        [
          *(sys.executable, *program, *OPTIONS),
          *(f'--checkpoint-dir={folder}', '--num-processes=2'),
          *(f'--coordinator-address=localhost:{port}', f'--process-id={i}'),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
      )
      for i in range(2)
    ]
    try:
      printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
      for process in processes:
        process.kill()
    return [process.returncode for process in processes], printed

  codes, printed = run('-c', KILLED)
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, None), printed[0]
  assert max(int(path.name) for path in folder.glob('[0-9]*')) == 5

  codes, printed = run(multihost.__file__)
  assert codes == [0, 0], printed
  assert re.findall(r'^step (\d+)', printed[0], re.MULTILINE)[0] == '6'
  assert not re.findall(r'^step', printed[1], re.MULTILINE)
  # Nothing is left to do here but to read the last checkpoint.
  state = train(folder)
  assert error(state.params, uninterrupted().params) < 1e-6
  assert error(state.opt_state[1], uninterrupted().opt_state[1]) < 1e-6
