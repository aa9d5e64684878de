"""Promise: MaxText trains with momentum ASAM as docs/trainers.md says."""

import pathlib

from flax import nnx
import jax
import optax
import pytest

from tests.helpers import pages
from tests.helpers.training import assert_momentum_asam
from tests.helpers.training import recorded

maxtext = pytest.importorskip('maxtext')  # It needs an environment of its own.

SNIPPETS = pages.read_snippets(pages.read_page('trainers'))['test_max_text']
SETTINGS = {
  'hardware': 'cpu',
  'dataset_type': 'synthetic',
  'steps': 3,
  'enable_checkpointing': False,
  'enable_goodput_recording': False,
  'enable_tensorboard': False,
  'gradient_clipping_threshold': 0,
  'base_emb_dim': 16,
  'base_mlp_dim': 32,
  'base_num_decoder_layers': 1,
  'base_num_kv_heads': 2,
  'base_num_query_heads': 2,
  'head_dim': 8,
  'max_target_length': 8,
  'per_device_batch_size': 1,
  'vocab_size': 64,
}


def test_max_text(tmp_path, monkeypatch):
  """Three steps of a small decoder, replayed from the gradients it took."""
  from maxtext.optimizers import optimizers
  from maxtext.trainers.pre_train import train

  base_tx = optax.sgd(0.1, momentum=0.9)
  monkeypatch.setattr(optimizers, 'get_optimizer', lambda *_, **__: base_tx)
  pages.run_snippet(SNIPPETS[0])
  tx, records = optimizers.get_optimizer(), []
  tx = recorded(tx, records)
  monkeypatch.setattr(optimizers, 'get_optimizer', lambda *_, **__: tx)

  defaults = pathlib.Path(maxtext.__file__).parent / 'configs' / 'base.yml'
  argv = [
    '',
    str(defaults),
    'run_name=asam',
    f'base_output_directory={tmp_path}',
  ]
  argv += [f'{name}={value}' for name, value in SETTINGS.items()]
  names = pages.run_snippet(SNIPPETS[1], nnx=nnx, train=train, argv=argv)
  jax.effects_barrier()
  assert len(records) == 3
  assert_momentum_asam(
    jax.device_get(jax.tree.leaves(names['params'])),
    jax.device_get(jax.tree.leaves(names['clean_params'])),
    lambda params, grads: grads,
    records[0][0],
    [grads for _, grads in records],
  )
