"""Promise: EasyDeL trains with momentum ASAM as docs/trainers.md says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_asam
from tests.helpers import pages
from tests.helpers.training import assert_momentum_asam
from tests.helpers.training import recorded

ed = pytest.importorskip('easydel')  # It needs an environment of its own.

(SNIPPET,) = pages.read_snippets(pages.read_page('trainers'))['test_easy_de_l']


def test_easy_de_l(tmp_path, monkeypatch):
  """Three steps of a small Llama, replayed from the gradients it took."""
  import datasets

  monkeypatch.setenv('WANDB_MODE', 'disabled')
  config = ed.LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
    attn_mechanism='vanilla',
  )
  arguments = ed.TrainingArguments(
    save_directory=str(tmp_path),
    num_train_epochs=1,
    total_batch_size=8,
    max_training_steps=3,
    max_length=8,
    use_wandb=False,
    do_last_save=False,
    save_optimizer_state=False,
  )
  tokens = np.random.default_rng(0).integers(32, size=(24, 8))
  base_tx = optax.sgd(0.1, momentum=0.9)
  monkeypatch.setattr(
    type(arguments),
    'get_optimizer_and_scheduler',
    lambda self, steps=None: (base_tx, optax.constant_schedule(0.1)),
  )
  names = pages.run_snippet(SNIPPET, __name__=__name__)
  records = []

  class RecordedTrainer(names['MomentumAsamTrainer']):
    """Keeps what the optimizer gets."""

    def configure_model(self):
      configured = super().configure_model()
      configured.tx = recorded(configured.tx, records)
      return configured

  trainer = RecordedTrainer(
    arguments=arguments,
    model=ed.LlamaForCausalLM(
      config=config,
      dtype=jnp.float32,
      param_dtype=jnp.float32,
      rngs=ed.Rngs(0),
    ),
    dataset_train=datasets.Dataset.from_dict(
      {
        'input_ids': tokens.tolist(),
        'attention_mask': np.ones_like(tokens).tolist(),
      }
    ),
  )
  state = trainer.train().state
  jax.effects_barrier()
  evaluated = optax_asam.eval_params(state.opt_state, state.graphstate)
  assert_momentum_asam(
    jax.device_get(jax.tree.leaves(state.graphstate)),
    jax.device_get(jax.tree.leaves(evaluated)),
    lambda params, grads: grads,
    records[0][0],
    [grads for _, grads in records],
  )
