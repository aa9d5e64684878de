"""A train step in Flax NNX; the docs print the marked parts."""

# [model]
from flax import nnx
import jax
import optax

from optax_asam import asam


class Network(nnx.Module):
  """Convolution, BatchNorm, dropout and a dense layer, for 8x8 images."""

  def __init__(self, dropout_rate=0.5, *, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
    self.dense = nnx.Linear(8 * 8 * 4, 10, rngs=rngs)

  def __call__(self, images):
    """Logits [n, 10] of images [n, 8, 8, 1]."""
    x = self.dropout(self.norm(nnx.relu(self.conv(images))))
    return self.dense(x.reshape(len(x), -1))


# [/model]


# [train_step]
tx = asam(optax.sgd(0.1, momentum=0.9), rho=0.5)


def create_optimizer(network, tx=tx):
  """The optimizer before the first step."""
  return nnx.Optimizer(network, tx, wrt=nnx.Param)


@nnx.jit
def train_step(network, optimizer, images, labels):
  """Changes ``network`` and ``optimizer`` in place and returns the loss."""
  graphdef, params, rest = nnx.split(network, nnx.Param, ...)
  rest = nnx.as_pure(rest)  # Arrays, which a forward pass cannot change.

  def loss_fn(params):
    network = nnx.merge(graphdef, params, rest)
    logits = network(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), nnx.state(network, nnx.Not(nnx.Param))

  def grad_fn(params):
    return jax.grad(loss_fn, has_aux=True)(params)[0]

  (loss, new_rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  optimizer.update(network, grads, grad_fn=grad_fn)
  nnx.update(network, new_rest)  # Statistics and dropout counts.
  return loss


# [/train_step]
