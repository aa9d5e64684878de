"""Promise: a job of several processes computes what one process does.

Whatever befalls one of them ends the job, and it goes on from there, on as many
processes and devices as there are then.
"""

import contextlib
import inspect
import json
import os
from pathlib import Path
import random
import shutil
import signal
import socket
import subprocess
import sys

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from support import assert_same_bits
from support import error
from support import program_env

pytest.importorskip('grain', reason='Grain is not installed')

import cluster
import data
import host_io
import multihost

EXAMPLES = Path(__file__).parents[1] / 'examples'
# Five steps an epoch; the middle checkpoints lie between ends of epochs.
ARGUMENTS = [
  *('--epochs=2', '--train-size=160', '--batch-size=32'),
  '--checkpoint-every=4',
]
NUM_STEPS = 10

# JAX 0.4.38 lacks this option, and what Orbax needs to save from several
# processes.
HAS_TIMEOUT = (
  'heartbeat_timeout_seconds'
  in inspect.signature(jax.distributed.initialize).parameters
)
needs_timeout = pytest.mark.skipif(
  not HAS_TIMEOUT, reason='the timeout of this JAX is fixed'
)
needs_checkpoints = pytest.mark.skipif(
  not HAS_TIMEOUT,
  reason='Orbax cannot save from several processes of so old a JAX',
)

# Seconds after which a program hangs, on however busy a machine.
HANGS = 600

# Runs multihost.py; process 1 is killed after its fifth step.
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import multihost

def strike(step, loss, report=multihost.report):
  report(step, loss)
  if step == 5 and multihost.jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGKILL)

multihost.report = strike
multihost.main(sys.argv[1:])
"""

# Joins a job whose process 1 falls silent, and waits for it.
SILENT = f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import multihost
from jax.experimental import multihost_utils

with multihost.cluster.joined(multihost.parse(sys.argv[1:])):
  multihost_utils.sync_global_devices('all here')
  if multihost.jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
  multihost_utils.sync_global_devices('never')
"""


@pytest.fixture(scope='module')
def env(tmp_path_factory):
  """The environment of the programs."""
  return program_env(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='module')
def start():
  """Starts programs; neither they nor what they started stays behind."""
  programs = []

  def start_program(command, env):
    program = subprocess.Popen(
      [sys.executable, *command],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      encoding='utf-8',
      env=env,
      start_new_session=True,
    )
    programs.append(program)
    return program

  yield start_program
  for program in programs:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(program.pid, signal.SIGKILL)
    program.communicate()


@pytest.fixture(scope='module')
def rehearse(start, env):
  """Runs two processes of four devices each; the losses and the accuracy."""

  def rehearse_in(out, *arguments):
    program = start(
      [
        *(EXAMPLES / 'multihost.py', '--num-processes=2', *ARGUMENTS),
        *(*arguments, f'--out={out}'),
      ],
      env,
    )
    printed, _ = program.communicate(timeout=HANGS)
    assert program.returncode == 0, printed
    assert f'[0] step {NUM_STEPS}: loss' in printed
    assert '[1] step' not in printed
    results = json.loads((out / 'results.json').read_text())
    assert (results['num_processes'], results['num_devices']) == (2, 8)
    return results['losses'], results['test_accuracy']

  return rehearse_in


@pytest.fixture(scope='module', autouse=True)
def fast_compiler():
  """Leaves out in this process what it leaves out in the programs."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def train(out, *arguments):
  """One process, this one, on its eight devices."""
  return multihost.train(
    multihost.parse([*ARGUMENTS, *arguments, f'--out={out}'])
  )


def loss_error(losses, expected):
  """The error of the losses of all steps."""
  return error(np.asarray(losses), np.asarray(expected))


@pytest.fixture(scope='module')
def single(tmp_path_factory):
  """What one process computes, and the folder with its checkpoints."""
  out = tmp_path_factory.mktemp('single')
  return train(out), out


@pytest.fixture(scope='module')
def uninterrupted(rehearse, tmp_path_factory):
  """What two processes compute, and the folder with their checkpoints."""
  out = tmp_path_factory.mktemp('uninterrupted')
  return rehearse(out), out


def find_slurm_job():
  """The number of a SLURM job whose port, which JAX takes from it, is free."""
  while True:
    job = random.randrange(2**12)
    with socket.socket() as listener, contextlib.suppress(OSError):
      listener.bind(('', 65536 - 2**12 + job))
      return job


@pytest.fixture(scope='module')
def killed(start, env, tmp_path_factory):
  """A job under SLURM, of whose processes one is killed: folder and ends."""
  out = tmp_path_factory.mktemp('killed')
  slurm_env = {
    **env,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'SLURM_JOB_ID': str(find_slurm_job()),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'SLURM_LOCALID': '0',
  }
  command = ['-c', KILLED, *ARGUMENTS, f'--out={out}']
  programs = [
    start(command, {**slurm_env, 'SLURM_PROCID': str(i)}) for i in range(2)
  ]
  printed = [program.communicate(timeout=HANGS)[0] for program in programs]
  return out, [program.returncode for program in programs], printed


def read(split, process_count, **kwargs):
  """The global batches as the processes read them, one after the other."""
  parts = [
    host_io.local_batches(
      split,
      batch_size=8,
      epochs=3,
      process_index=index,
      process_count=process_count,
      **kwargs,
    )
    for index in range(process_count)
  ]
  return [
    np.concatenate([part.labels for part in batch])
    for batch in zip(*parts, strict=True)
  ]


@pytest.fixture
def split():
  """Fifty examples, each with its number in place of image and label."""
  return data.Split(np.arange(50), np.arange(50))


@pytest.mark.parametrize('process_count', [2, 4])
def test_global_batches(split, process_count):
  """The same examples in the same order, however many processes read them."""
  expected = read(split, 1, seed=0)
  np.testing.assert_array_equal(read(split, process_count, seed=0), expected)
  np.testing.assert_array_equal(
    read(split, process_count, seed=0, first_step=7), expected[7:]
  )


def test_epochs(split):
  """An epoch has each example at most once, in an order of its own."""
  batches = read(split, 1, seed=0)
  epochs = [np.concatenate(batches[6 * i : 6 * i + 6]) for i in range(3)]
  assert len(batches) == 18
  for epoch in epochs:
    assert len(np.unique(epoch)) == len(epoch) == 48
  orders = [*epochs, np.concatenate(read(split, 1, seed=1))[:48], np.arange(48)]
  assert len({tuple(order) for order in orders}) == len(orders)


def test_to_global(split):
  """Each device has its part of what the process has read."""
  mesh = multihost.make_mesh()
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('devices')
  )
  batch = host_io.to_global(
    data.Split(split.images[:16], split.labels[:16]), sharding
  )
  np.testing.assert_array_equal(batch.labels, split.labels[:16])
  for shard in batch.labels.addressable_shards:
    first = 2 * shard.device.id
    np.testing.assert_array_equal(shard.data, [first, first + 1])


def test_mesh_order(monkeypatch):
  """Devices of one process are side by side, wherever a slice has them."""
  devices = sorted(jax.devices(), key=lambda device: device.id % 2)
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  ids = [device.id for device in multihost.make_mesh().devices]
  assert ids == list(range(8))


@needs_checkpoints
def test_two_processes(single, uninterrupted):
  """The losses and the accuracy of one process.

  The same examples lie on the same devices. What may differ is the order in
  which a transport adds what is on them, and so the last digit of float32.
  """
  (losses, accuracy), _ = uninterrupted
  assert len(losses) == NUM_STEPS
  assert loss_error(losses, single[0].losses) < 1e-6
  assert accuracy == single[0].test_accuracy


def test_shard_params(single, tmp_path):
  """With an eighth of the parameters on each device: the same losses."""
  trained = train(tmp_path, '--shard-params')
  assert loss_error(trained.losses, single[0].losses) < 1e-6
  kernels = [x for x in jax.tree.leaves(trained.state) if x.ndim == 2]
  assert len(kernels) == 6  # of three layers, and their momentum
  for kernel in kernels:
    assert kernel.addressable_data(0).size * 8 == kernel.size


@needs_checkpoints
def test_killed(killed):
  """A process that is killed ends the others, with an error that says so."""
  out, returncodes, printed = killed
  assert returncodes[1] == -signal.SIGKILL
  # It learns so from what it was to be sent, or JAX does, and ends it at once.
  told = {
    1: 'Process 0 ends here. Where it lost another one',
    -signal.SIGABRT: 'another task died',
  }
  assert told[returncodes[0]] in printed[0]
  assert 'Process 1 of 2' in printed[1]  # They found each other by SLURM.
  assert not (out / 'results.json').exists()
  assert [path.name for path in (out / 'checkpoints').glob('[0-9]*')] == ['4']


@needs_checkpoints
def test_resumed(killed, uninterrupted, rehearse, tmp_path):
  """The job that was killed goes on, and ends with the same bits."""
  out = shutil.copytree(killed[0], tmp_path / 'resumed')
  assert rehearse(out, '--resume') == uninterrupted[0]
  # Nothing is left to do but to read the last checkpoints.
  assert_same_bits(
    train(out, '--resume').state, train(uninterrupted[1], '--resume').state
  )


@needs_checkpoints
def test_resumed_on_other_devices(killed, uninterrupted, tmp_path, monkeypatch):
  """It goes on in one process and on two devices: the same losses."""
  out = shutil.copytree(killed[0], tmp_path / 'resumed')
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('devices',))
  monkeypatch.setattr(multihost, 'make_mesh', lambda: mesh)
  trained = train(out, '--resume', '--shard-params')
  expected = uninterrupted[0][0]
  assert trained.losses[:4] == expected[:4]
  assert trained.losses[4:] != expected[4:]  # They were computed.
  assert loss_error(trained.losses, expected) < 1e-6


def test_preempted(single, tmp_path, monkeypatch):
  """After SIGTERM a checkpoint is written, and the run goes on from it."""
  with monkeypatch.context() as preempted:
    preempted.setattr(
      host_io.Checkpoints, 'is_preempted', lambda self, step: step == 6
    )
    with pytest.raises(SystemExit, match='after step 6: go on with --resume'):
      train(tmp_path)
  steps = []
  monkeypatch.setattr(
    multihost, 'report', lambda step, loss: steps.append(step)
  )
  trained = train(tmp_path, '--resume')
  assert steps == list(range(7, NUM_STEPS + 1))
  assert trained.losses == single[0].losses
  assert_same_bits(trained.state, single[0].state)


@needs_timeout
def test_silent(start, env):
  """A process that hangs ends the job once the timeout is over."""
  address = f'127.0.0.1:{cluster.find_free_port()}'
  programs = [
    start(
      [
        *('-c', SILENT, '--num-processes=2', f'--process-id={i}'),
        *(f'--coordinator-address={address}', '--heartbeat-timeout=10'),
      ],
      {**env, 'JAX_PLATFORMS': 'cpu'},
    )
    for i in range(2)
  ]
  printed, _ = programs[0].communicate(timeout=HANGS)
  assert programs[0].returncode != 0
  assert 'heartbeat' in printed


@pytest.fixture
def rehearsal(monkeypatch):
  """Rehearses with a program in place of multihost.py."""
  handler = signal.getsignal(signal.SIGTERM)

  def run(program):
    return cluster.rehearse([sys.executable, '-c', program], 2, 4)

  yield run
  signal.signal(signal.SIGTERM, handler)


# Process 0 waits for what never comes; process 1 does something once it waits.
WAITS = """
import os, pathlib, signal, sys, time
ready = pathlib.Path({ready!r})
print('pid', os.getpid(), flush=True)
if '--process-id=0' in sys.argv:
  ready.touch()
else:
  while not ready.exists():
    time.sleep(0.01)
  {action}
time.sleep(1e4)
"""


def assert_gone(printed):
  """Fails if a process that told its number runs still."""
  pids = [int(line.split()[-1]) for line in printed.splitlines()]
  assert len(pids) == 2
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize(
  ('end', 'status', 'says'),
  [
    (
      'os.kill(os.getpid(), signal.SIGKILL)',
      128 + signal.SIGKILL,
      'process 1 was killed by SIGKILL, and the job is stopped. To go on from'
      ' the last checkpoint, repeat the command with --resume.',
    ),
    ('sys.exit(3)', 3, 'process 1 ended with exit code 3, and the job is'),
  ],
)
def test_rehearsal_fails(rehearsal, tmp_path, capfd, end, status, says):
  """What failed is named, the others are stopped, and the status tells it."""
  program = WAITS.format(ready=str(tmp_path / 'ready'), action=end)
  assert rehearsal(program) == status
  printed, errors = capfd.readouterr()
  assert says in errors
  assert_gone(printed)


def test_rehearsal_of_a_wrong_command(rehearsal, capfd):
  """A wrong argument is no reason to go on from a checkpoint."""
  assert rehearsal('exit(2)') == 2
  assert '--resume' not in capfd.readouterr().err


def test_rehearsal_ends_well(rehearsal, capfd):
  """The status is 0; lines begin with the number; devices are as wanted."""
  program = (
    "import os, sys; print(*sys.argv[2:], os.environ['XLA_FLAGS'].split()[-1])"
  )
  assert rehearsal(program) == 0
  printed, errors = capfd.readouterr()
  flag = '--xla_force_host_platform_device_count=4'
  assert sorted(printed.splitlines()) == [
    f'[{i}] --num-processes=2 --process-id={i} {flag}' for i in range(2)
  ]
  assert not errors


def test_rehearsal_is_stopped(rehearsal, tmp_path, capfd):
  """SIGTERM stops the processes, too."""
  action = 'os.kill(os.getppid(), signal.SIGTERM)'
  program = WAITS.format(ready=str(tmp_path / 'ready'), action=action)
  with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
    rehearsal(program)
  assert_gone(capfd.readouterr().out)


@pytest.mark.parametrize(
  'missing', ['num-processes=2', 'process-id=0', 'coordinator-address=h:1']
)
def test_incomplete_cluster(capsys, missing):
  """A cluster is described as a whole."""
  options = {'num-processes=2', 'process-id=0', 'coordinator-address=h:1'}
  with pytest.raises(SystemExit):
    multihost.parse([f'--{option}' for option in options - {missing}])
  assert 'write all three. On a TPU pod' in capsys.readouterr().err


@pytest.mark.parametrize('is_old', [True, False])
def test_join(monkeypatch, is_old):
  """A known cluster is joined without arguments, in old versions, too."""
  given = []

  def initialize(
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    initialization_timeout=300,
    heartbeat_timeout_seconds=100,
  ):
    given.append((coordinator_address, num_processes, process_id))
    given.append((initialization_timeout, heartbeat_timeout_seconds))

  def old_initialize(
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    initialization_timeout=300,
  ):
    given.append((coordinator_address, num_processes, process_id))
    given.append((initialization_timeout, 100))

  monkeypatch.setattr(
    jax.distributed, 'initialize', old_initialize if is_old else initialize
  )
  set_up = []
  monkeypatch.setattr(jax.config, 'update', lambda *pair: set_up.append(pair))
  args = ['--initialization-timeout=20', '--heartbeat-timeout=30']
  assert cluster.join(multihost.parse(args))
  assert given == [(None, None, None), (20, 100 if is_old else 30)]
  assert set_up == [('jax_cpu_collectives_implementation', 'gloo')]


def test_no_cluster(monkeypatch):
  """Without a cluster this is the only process; other errors are errors."""

  def initialize(coordinator_address):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  assert not cluster.join(multihost.parse([]))

  def fail(coordinator_address):
    raise ValueError('Number of processes must be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  with pytest.raises(ValueError, match='Number of processes'):
    cluster.join(multihost.parse([]))


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--batch-size=12'], 'must be a multiple of 8, the number of devices,'),
    (['--batch-size=168'], 'at most 160, the size of the training set, but'),
    ([], 'holds the checkpoints of a run. Write --resume'),
    (['--resume', '--lr=1'], 'was started with lr = 0.1, but got 1.0'),
    (['--data-dir=x', '--dataset=fashion_mnist'], 'argument --data-dir: must'),
  ],
)
def test_wrong_arguments(single, monkeypatch, capsys, arguments, says):
  """What does not fit devices, data or checkpoints ends with a line."""
  monkeypatch.setattr(cluster, 'join', lambda args: False)
  with pytest.raises(SystemExit) as ended:
    multihost.main([*ARGUMENTS, *arguments, f'--out={single[1]}'])
  assert ended.value.code == 2
  assert says in capsys.readouterr().err


def test_folder_that_is_not_shared(tmp_path, monkeypatch):
  """Hosts with folders of their own are named before they train."""
  monkeypatch.setattr(
    multihost_utils,
    'process_allgather',
    lambda x, **kwargs: np.array([True, False]) if x.dtype == bool else x,
  )
  with pytest.raises(host_io.CheckpointError, match='of process 1 is not that'):
    host_io.Checkpoints(str(tmp_path), {})
