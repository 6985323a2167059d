"""FP: fine-pruning, prune what clean images do not use, then fine-tune (Liu et al. 2018).

repair = FP.small()(model, clean, seed=0)
"""

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.defenses.base import Repair, check_inputs
from bdlib.defenses.ft import FT
from bdlib.metrics import accuracy
from bdlib.training import Step, evaluating


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer.

    Raises:
        ValueError: a network without one.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer, and fine-pruning prunes the input of the last one"
        )
    return found[-1]


@torch.no_grad()
def mean_activation(model: nn.Module, layer: nn.Linear, images: ImageSet, *, batch: int = 500) -> Tensor:
    """Mean over the images of the input of `layer`, ``(features,)``: how much clean data uses each feature."""
    taken: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].detach().sum(0)))
    try:
        with evaluating(model):
            for x in images.images.split(batch):
                model(x.float() / 255)
    finally:
        handle.remove()
    return torch.stack(taken).sum(0) / len(images)


@dataclass(frozen=True)
class FP:
    """Zero the features that clean images activate least, as many as clean accuracy allows, then fine-tune.

    As benchmarked since BackdoorBench v2 (@ f02e353), which prunes the pooled features before the classifier; the
    original paper prunes channels of the last convolution, and older tables may stand for that. Two faults of the
    benchmark are mended: accuracy is measured on held-out clean images instead of the test set, and the network that is
    fine-tuned is the last one *within* the bound.

    Args:
        max_drop: allowed relative drop of clean accuracy, in [0, 1].
        step: share of the features pruned between two measurements.
        tune: the fine-tuning that follows; pruned features stay pruned.
    """

    max_drop: float = 0.1
    step: float = 0.01
    tune: FT = field(default_factory=FT)

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 1:
            raise ValueError(f"max_drop must be in [0, 1], got {self.max_drop}")
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be in (0, 1], got {self.step}")

    @classmethod
    def paper(cls) -> "FP":
        """BackdoorBench v2's setting: 10 % relative drop, steps of 1 %, then 100 epochs of fine-tuning at lr 0.01."""
        return cls()

    @classmethod
    def official(cls) -> "FP":
        """The same as `paper`; the original release is of another framework and was not at hand."""
        return cls()

    @classmethod
    def small(cls) -> "FP":
        """For the book's small network and 500 clean images."""
        return cls(tune=FT.small())

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Prune by mean clean activation on `clean.learn`, bounded by accuracy on `clean.select`, then fine-tune.

        Returns:
            `Repair` with the log of the fine-tuning and details: activation ``(features,)``, order (features, least
            active first), pruned (count), choice ``[{pruned, accuracy}]``, snapshots of the fine-tuning.
        """
        check_inputs(model, clean)
        start, work = time.perf_counter(), copy.deepcopy(model)
        name, layer = last_linear(work)
        learn, select = clean.folds()[0]
        activation = mean_activation(work, layer, learn)  # (features,)
        order, before = activation.argsort(), accuracy(work, select)
        weight, chunk = layer.weight.detach().clone(), max(1, -(-layer.in_features * round(self.step * 1000) // 1000))
        choice, pruned = [{"pruned": 0, "accuracy": before}], 0
        for n in range(chunk, layer.in_features, chunk):
            with torch.no_grad():
                layer.weight[:, order[:n]] = 0
            choice.append({"pruned": n, "accuracy": accuracy(work, select)})
            if before - choice[-1]["accuracy"] > self.max_drop * before:
                break
            pruned = n
        kept = torch.ones_like(activation)
        kept[order[:pruned]] = 0
        with torch.no_grad():
            layer.weight.copy_(weight * kept)
        log, snapshots = self.tune.tune(work, clean.images, seed, keep_every, _Masked(name, kept))
        details: dict[str, Any] = {
            "activation": activation, "order": order, "pruned": pruned, "choice": choice, "snapshots": snapshots
        }  # fmt: skip
        return Repair(work, log, details, time.perf_counter() - start)


class _Masked(Step):
    """Cross-entropy with some columns of a weight held at zero: no gradient reaches them, and decay keeps 0 at 0."""

    def __init__(self, name: str, kept: Tensor) -> None:
        self.name, self.kept = f"{name}.weight", kept

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        weight = model.get_parameter(self.name) * self.kept
        logits = torch.func.functional_call(model, {self.name: weight}, (images,))
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits
