"""What attacks share that look into a network, or train one batch by batch.

net = frozen(clean_network, device)
logits, features = read(net, images)           # (B, K), and (B, F): what the last linear layer reads
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdlib.models import Normalize
from bdlib.training import Recipe


def frozen(model: nn.Module, device: torch.device, *, raw: bool = False) -> nn.Module:
    """A copy in evaluation mode that learns nothing; `raw` makes its `Normalize` layers hand images on as they are."""
    net = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    for m in net.modules():
        if raw and isinstance(m, Normalize):
            m.mean.zero_()
            m.std.fill_(1)
    return net


def head(model: nn.Module) -> nn.Linear:
    """The last linear layer.

    Raises:
        ValueError: a network without one.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        name = type(model).__name__
        raise ValueError(f"{name} has no linear layer, and this attack looks at what the last one reads")
    return layers[-1]


def read(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(B, K)`` and the features ``(B, F)`` that the last linear layer reads, both with gradients.

    In a ResNet-18 the features are the 512 channels of its last stage, averaged over the map.
    """
    seen: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        handle.remove()
    return logits, seen[-1]


@dataclass(frozen=True)
class Adam(Recipe):
    """`Recipe` with Adam and decay rates `momentum` and 0.9, as generators are trained in several releases."""

    def optimiser(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser; the loop sets its learning rate at every step."""
        return torch.optim.Adam(params, lr=self.lr, betas=(self.momentum, 0.9), weight_decay=self.weight_decay)


def check_batch(name: str, rate: float, count: int, batch: int) -> None:
    """Raises ValueError if a positive share of a batch comes to no image."""
    if rate > 0 and count == 0:
        raise ValueError(f"{name} {rate} selects no image of a batch of {batch}; the smallest is {1 / batch:.2g}")
