"""How the processes of a job start, find each other and end.

On a cluster something else starts them, and JAX knows how they find each other.
A rehearsal starts them on this machine, on CPU devices of their own.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import inspect
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import traceback
from typing import NoReturn

import jax

import arguments


def add_arguments(parser: arguments.Parser) -> None:
  """Adds the options that are about processes; a known cluster needs none."""
  add = parser.add_argument
  add(
    '--num-processes',
    type=arguments.count(2),
    help='processes of the job; they are started on this machine, unless the'
    ' two options that follow are given',
  )
  add('--process-id', type=int, help='the number of this process, from 0 on')
  add('--coordinator-address', help='host:port, a free port of process 0')
  add(
    '--devices-per-process',
    type=arguments.count(4),
    default=4,
    help='CPU devices of a process that is started on this machine (4)',
  )
  add(
    '--initialization-timeout',
    type=arguments.count(300),
    default=300,
    help='seconds that processes wait for each other at the start (300)',
  )
  add(
    '--heartbeat-timeout',
    type=arguments.count(100),
    default=100,
    help='seconds after which a silent process is taken for dead (100)',
  )


def check_arguments(parser: arguments.Parser, args: argparse.Namespace) -> None:
  """Exits unless all options that describe a cluster are given, or none."""
  is_given = args.process_id is not None, args.coordinator_address is not None
  if any(is_given) and not (all(is_given) and args.num_processes):
    parser.error(
      'arguments --num-processes, --process-id and --coordinator-address: to'
      ' join a cluster that JAX does not know, write all three. On a TPU pod'
      ' slice, under SLURM and in Kubernetes, write none of them.'
    )


def is_rehearsal(args: argparse.Namespace) -> bool:
  """Whether the processes are to be started here."""
  return args.num_processes is not None and args.process_id is None


def join(args: argparse.Namespace) -> bool:
  """Waits for the other processes of the job; False where there are none."""
  options = {
    'coordinator_address': args.coordinator_address,
    'num_processes': args.num_processes,
    'process_id': args.process_id,
    'initialization_timeout': args.initialization_timeout,
    'heartbeat_timeout_seconds': args.heartbeat_timeout,
  }
  if args.coordinator_address:
    options['cluster_detection_method'] = 'deactivate'
  # Older versions of JAX have a fixed timeout of 100 s.
  known = inspect.signature(jax.distributed.initialize).parameters
  try:
    jax.distributed.initialize(
      **{name: options[name] for name in options if name in known}
    )
  except ValueError as error:
    if 'coordinator_address' not in str(error):
      raise
    print('JAX finds no cluster here: this is the only process.', flush=True)
    return False
  # The default of new versions; it matters where the devices are CPUs.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  return True


def describe_process() -> str:
  """Which process of the job this is, and what it has."""
  return (
    f'Process {jax.process_index()} of {jax.process_count()} on'
    f' {socket.gethostname()}, with {jax.local_device_count()} of'
    f' {jax.device_count()} devices: {jax.devices()[0].device_kind}.'
  )


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
  """Joins the job, and leaves it at once if its part here fails.

  At a usual end JAX waits for the other processes; these would wait for this
  one, in the middle of a step.
  """
  is_job = join(args)
  try:
    yield
  except BaseException as error:
    if not is_job:
      raise
    is_exit = isinstance(error, SystemExit)
    if not is_exit:
      traceback.print_exc()
      print(
        f'Process {jax.process_index()} ends here. Where it lost another one,'
        f' that one says why. To go on from the last checkpoint, start the job'
        f' again with --resume.',
        file=sys.stderr,
      )
    elif isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if is_exit and isinstance(error.code, int) else 1)


def find_free_port() -> int:
  """A port for the coordinator.

  It is below those that systems give to outgoing connections: none of these
  takes it before the coordinator does.
  """
  for port in random.sample(range(20_000, 32_000), 100):
    with socket.socket() as listener:
      try:
        listener.bind(('127.0.0.1', port))
      except OSError:
        continue
      return port
  raise OSError('no free port between 20000 and 32000')


def make_env(devices_per_process: int) -> dict[str, str]:
  """The environment of a process with so many CPU devices."""
  count = f'--xla_force_host_platform_device_count={devices_per_process}'
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {count}',
  }


def describe_end(index: int, returncode: int) -> str:
  """How a process ended, in words."""
  if returncode < 0:
    return f'process {index} was killed by {signal.Signals(-returncode).name}'
  return f'process {index} ended with exit code {returncode}'


def rehearse(
  command: Sequence[str], num_processes: int, devices_per_process: int
) -> int:
  """Runs a job, and prints what its processes do, with their number before it.

  Args:
    command: The program and its arguments, without those of the cluster.
    num_processes: How many processes to start.
    devices_per_process: How many CPU devices each has.

  Returns:
    The exit status of the first process that failed, as a shell reports it; 0
    if none did. After a failure the other processes are stopped.
  """
  address = f'127.0.0.1:{find_free_port()}'
  env = make_env(devices_per_process)
  ended: queue.Queue[tuple[int, int]] = queue.Queue()

  def start(index: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
      [
        *command,
        f'--coordinator-address={address}',
        f'--num-processes={num_processes}',
        f'--process-id={index}',
      ],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      encoding='utf-8',
      errors='replace',
      env=env,
    )

  def follow(index: int, process: subprocess.Popen[str]) -> None:
    with process:  # Waits for its end.
      for line in process.stdout or ():
        print(f'[{index}] {line.rstrip()}', flush=True)
    ended.put((index, process.returncode))

  # An exit instead of a sudden end: nothing that was started stays behind.
  signal.signal(signal.SIGTERM, exit_on_signal)
  processes, followers = [], []
  try:
    for index in range(num_processes):
      processes.append(start(index))
      follower = threading.Thread(target=follow, args=(index, processes[-1]))
      follower.start()
      followers.append(follower)
    for _ in processes:
      index, returncode = ended.get()
      if returncode:
        return report_failure(index, returncode)
    return 0
  finally:
    for process in processes:
      process.kill()  # Does nothing to what has ended.
    for follower in followers:
      follower.join()


def exit_on_signal(number: int, frame: object) -> NoReturn:
  """Ends this process, with what it has to do at its end."""
  del frame
  sys.exit(128 + number)


def report_failure(index: int, returncode: int) -> int:
  """Says which process failed, how, and how to go on; the exit status."""
  message = f'{describe_end(index, returncode)}, and the job is stopped.'
  if returncode != 2:  # That is a wrong argument, as its message says.
    message += (
      ' To go on from the last checkpoint, repeat the command with --resume.'
    )
  print(f'rehearsal: {message}', file=sys.stderr, flush=True)
  return 128 - returncode if returncode < 0 else returncode
