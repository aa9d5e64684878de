"""The train steps of PyTorch users, timed against PyTorch's own base.

  python -m benchmarks.torch_steps --device cpu --seconds 60 --models MLP

prints JSON in lines: versions, then rows. It runs in an environment without
JAX, in a process that shares no memory or threads with JAX.
"""

# The environment of the type checker has no PyTorch.
# pyright: reportMissingImports=false

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import importlib.metadata
import json
import sys
import time
import traceback

import pytorch_optimizer
import torch
from torch import nn
from torch.nn import functional

from benchmarks import timing
from benchmarks.workloads import ETA
from benchmarks.workloads import LEARNING_RATES
from benchmarks.workloads import MODELS
from benchmarks.workloads import RHO
from benchmarks.workloads import WORKLOADS


def conv(inputs: int, outputs: int, size: int = 3, step: int = 1) -> nn.Module:
  """A convolution without a bias, and zeros around the image."""
  return nn.Conv2d(inputs, outputs, size, step, size // 2, bias=False)


class ResidualBlock(nn.Module):
  """The block of the ResNet for CIFAR: its shortcut has no parameters."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    self.stride, self.more = stride, outputs - inputs
    self.conv_1 = conv(inputs, outputs, step=stride)
    self.norm_1 = nn.BatchNorm2d(outputs)
    self.conv_2 = conv(outputs, outputs)
    self.norm_2 = nn.BatchNorm2d(outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps features to features."""
    y = functional.relu(self.norm_1(self.conv_1(x)))
    y = self.norm_2(self.conv_2(y))
    x = x[:, :, :: self.stride, :: self.stride]
    return functional.relu(functional.pad(x, (0, 0, 0, 0, 0, self.more)) + y)


class WideBlock(nn.Module):
  """The block of the wide ResNet."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    self.norm_1 = nn.BatchNorm2d(inputs)
    self.conv_1 = conv(inputs, outputs, step=stride)
    self.norm_2 = nn.BatchNorm2d(outputs)
    self.conv_2 = conv(outputs, outputs)
    self.shortcut = (
      conv(inputs, outputs, 1, stride) if inputs != outputs else None
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps features to features."""
    activated = functional.relu(self.norm_1(x))
    y = self.conv_2(functional.relu(self.norm_2(self.conv_1(activated))))
    return y + (x if self.shortcut is None else self.shortcut(activated))


def stages(
  block: Callable[..., nn.Module], widths: Sequence[int], blocks: int
) -> list[nn.Module]:
  """Stages of blocks after 16 channels; all but the first halve the image."""
  layers, inputs = [], 16
  for stage, outputs in enumerate(widths):
    for i in range(blocks):
      layers.append(block(inputs, outputs, 2 if stage > 0 and i == 0 else 1))
      inputs = outputs
  return layers


def residual_network(blocks: int) -> nn.Module:
  """The ResNet of 6 * blocks + 2 layers."""
  return nn.Sequential(
    conv(3, 16),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    *stages(ResidualBlock, (16, 32, 64), blocks),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
  )


def wide_network(blocks: int, widening: int) -> nn.Module:
  """The wide ResNet of 6 * blocks + 4 layers."""
  widths = [widening * width for width in (16, 32, 64)]
  return nn.Sequential(
    conv(3, 16),
    *stages(WideBlock, widths, blocks),
    nn.BatchNorm2d(widths[-1]),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(widths[-1], 10),
  )


class Block(nn.Module):
  """Attention and a feed-forward layer, each after a LayerNorm."""

  def __init__(self, width: int, heads: int, causal: bool):
    super().__init__()
    self.heads, self.causal = heads, causal
    self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)
    self.up, self.down = (
      nn.Linear(width, 4 * width),
      nn.Linear(4 * width, width),
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [n, length, width] to the same shape."""
    qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
    x = x + self.out(y.transpose(1, 2).flatten(2))
    y = functional.gelu(self.up(self.norm_2(x)), approximate='tanh')
    return x + self.down(y)


class ViT(nn.Module):
  """ViT-S/16 for images of 64 x 64 pixels."""

  def __init__(self, layers: int = 12, width: int = 384, heads: int = 6):
    super().__init__()
    self.patches = nn.Conv2d(3, width, 16, 16)
    self.class_token = nn.Parameter(0.01 * torch.randn(1, 1, width))
    self.positions = nn.Parameter(0.01 * torch.randn(1, 17, width))
    blocks = [Block(width, heads, causal=False) for _ in range(layers)]
    self.blocks = nn.Sequential(*blocks)
    self.norm = nn.LayerNorm(width)
    self.head = nn.Linear(width, 1000)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    """Maps images to logits."""
    x = self.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
    return self.head(self.norm(self.blocks(x + self.positions))[:, 0])


class LanguageModel(nn.Module):
  """A decoder of six layers."""

  def __init__(self, length: int, layers: int = 6, width: int = 512):
    super().__init__()
    self.embed = nn.Embedding(8192, width)
    self.positions = nn.Parameter(0.01 * torch.randn(1, length, width))
    blocks = [Block(width, 8, causal=True) for _ in range(layers)]
    self.blocks = nn.Sequential(*blocks)
    self.norm = nn.LayerNorm(width)
    self.head = nn.Linear(width, 8192, bias=False)

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    """Maps tokens [n, length] to logits [n, classes, length]."""
    x = self.blocks(self.embed(tokens) + self.positions)
    return self.head(self.norm(x)).transpose(1, 2)


class Deep(nn.Module):
  """Many small layers."""

  def __init__(self, layers: int = 300, width: int = 128):
    super().__init__()
    self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    self.head = nn.Linear(width, 10)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps features to logits."""
    for layer in self.layers:
      x = x + 0.05 * functional.relu(layer(x))
    return self.head(x)


def perceptron() -> nn.Module:
  """Three hidden layers of 1024."""
  layers = []
  for inputs in (784, 1024, 1024):
    layers += [nn.Linear(inputs, 1024), nn.ReLU()]
  return nn.Sequential(*layers, nn.Linear(1024, 10))


# From the shape of the inputs, in JAX's order, to a model.
NETWORKS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
  'ResNet-20': lambda shape: residual_network(3),
  'ViT-S/16': lambda shape: ViT(),
  'LM': lambda shape: LanguageModel(shape[1]),
  'WRN-16-4': lambda shape: wide_network(2, 4),
  'MLP': lambda shape: perceptron(),
  '300 layers': lambda shape: Deep(),
}


def base_step(network, base, loss_fn):
  """One gradient."""

  def step():
    base.zero_grad()
    loss_fn().backward()
    base.step()

  return step


def package_step(network, base, loss_fn):
  """The SAM of ``pytorch_optimizer`` with ``adaptive=True``."""
  sam = pytorch_optimizer.SAM(
    network.parameters(), type(base), rho=RHO, adaptive=True, **settings(base)
  )

  def step():
    loss_fn().backward()
    sam.first_step(zero_grad=True)
    loss_fn().backward()
    sam.second_step(zero_grad=True)

  return step


def authors_step(network, base, loss_fn):
  """The authors' algorithm, in a loop over parameters.

  With T = abs(w) + eta at what is called a weight and T = 1 elsewhere, the
  perturbation rho T^2 g / norm(T g) is added, kept, and subtracted again.
  """
  named = list(network.named_parameters())

  @torch.no_grad()
  def ascend():
    norms, operators = [], []
    for name, w in named:
      t = w.abs().add_(ETA) if 'weight' in name else None
      scaled = w.grad if t is None else w.grad.mul_(t)
      norms.append(torch.norm(scaled, p=2))
      operators.append(t)
    factor = RHO / (torch.norm(torch.stack(norms), p=2) + 1e-16)
    kept = []
    for (_, w), t in zip(named, operators, strict=True):
      eps = w.grad if t is None else t.mul_(w.grad)
      eps = eps * factor if t is None else eps.mul_(factor)
      w.add_(eps)
      kept.append(eps)
    base.zero_grad()
    return kept

  @torch.no_grad()
  def descend(kept):
    for (_, w), eps in zip(named, kept, strict=True):
      w.sub_(eps)
    base.step()
    base.zero_grad()

  def step():
    loss_fn().backward()
    kept = ascend()
    loss_fn().backward()
    descend(kept)

  return step


STEPS = {
  'torch_base': base_step,
  'torch_asam': package_step,
  'torch_asam_authors': authors_step,
}


def settings(base: torch.optim.Optimizer) -> dict[str, float]:
  """The arguments with which a base optimizer was made."""
  names = ('lr', 'momentum', 'weight_decay')
  return {name: base.defaults[name] for name in names if name in base.defaults}


def optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
  """SGD with momentum 0.9, or AdamW as in Optax."""
  rate = LEARNING_RATES[name]
  if name == 'sgd':
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
  return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)


def runner_of(name: str, method: str, device: str) -> timing.Runner:
  """A method on its own copy of a model."""
  torch.manual_seed(0)
  workload = WORKLOADS[name]
  shape = workload.inputs[device]
  place = torch.device('cuda' if device == 'gpu' else 'cpu')
  num_classes = workload.num_classes
  draw = lambda shape: torch.randint(num_classes, shape, device=place)
  labels = draw(workload.labels(device))
  normal = lambda shape: torch.randn(shape, device=place)
  inputs = (draw if workload.is_text else normal)(shape)
  if len(shape) == 4:  # channels come last, in memory alone
    inputs = inputs.permute(0, 3, 1, 2)
  network = NETWORKS[name](shape).to(place)
  if len(shape) == 4:
    network = network.to(memory_format=torch.channels_last)
  base = optimizer(workload.base, network)
  loss_fn = lambda: functional.cross_entropy(network(inputs), labels)
  step = STEPS[method](network, base, loss_fn)

  def run(n):
    for _ in range(n):
      step()
    if device == 'gpu':
      torch.cuda.synchronize()

  return timing.Runner(run)


def main(argv: Sequence[str]) -> None:
  """Prints versions and rows."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--models', nargs='+', choices=NETWORKS, default=MODELS)
  args = parser.parse_args(argv)
  end = time.monotonic() + args.seconds
  # What JAX does by default on a GPU.
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.allow_tf32 = True
  torch.backends.cudnn.benchmark = True
  names = ('torch', 'pytorch-optimizer')
  versions = {name: importlib.metadata.version(name) for name in names}
  print(json.dumps({'versions': versions}), flush=True)
  for i, name in enumerate(args.models):
    try:
      runners = {each: runner_of(name, each, args.device) for each in STEPS}
      seconds = (end - time.monotonic()) / (len(args.models) - i)
      times = timing.interleave(runners, seconds)
    except Exception:
      traceback.print_exc()
      continue
    batch = WORKLOADS[name].inputs[args.device][0]
    for method, each in times.items():
      row = timing.make_row(name, method, batch, each, times['torch_base'])
      print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
