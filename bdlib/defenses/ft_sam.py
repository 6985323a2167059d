"""FT-SAM: fine-tuning under sharpness-aware minimisation (Zhu et al., ICCV 2023).

repair = FTSAM.small()(model, clean, seed=0)
"""

import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bdlib.checks import require
from bdlib.data.imageset import CleanSet
from bdlib.defenses.base import Repair, check_inputs
from bdlib.training import Recipe, Step, fit


def ascent(weights: list[Tensor], gradients: list[Tensor], rho: float) -> list[Tensor]:
    """The worst change within reach: ``argmax g . e`` over ``||e / |w| ||_2 <= rho``, in closed form.

    ``e = rho w^2 g / || |w| g ||_2`` over all weights together: a weight may move in proportion to its own size, so the
    large ones, on which a backdoor rests, move most. (This is adaptive SAM; its rho is not that of plain SAM.)

    Args:
        weights, gradients: tensors of the same shapes.
        rho: radius, 0 or more.

    Returns:
        Tensors of the same shapes.
    """
    norm = torch.stack([(w * g).norm() for w, g in zip(weights, gradients, strict=True)]).norm()
    return [rho * w * w * g / (norm + 1e-12) for w, g in zip(weights, gradients, strict=True)]


def soft_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Divergence from ``1 - smoothing`` on the label and the rest spread over the *other* classes.

    (PyTorch's own smoothing gives the label a share of the rest as well.) Without smoothing: the cross-entropy.
    """
    log_p = logits.log_softmax(1)
    right = log_p.gather(1, labels[:, None])[:, 0]
    rest, classes = (log_p.sum(1) - right) / (logits.shape[1] - 1), logits.shape[1]
    entropy = 0.0  # of the target, a constant: it makes the loss 0 where the prediction is the target
    if 0 < smoothing < 1:
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(smoothing / (classes - 1))
    return entropy - ((1 - smoothing) * right + smoothing * rest).mean()


class _Sharp(Step):
    """The gradient at the worst nearby weights; BatchNorm's running statistics see the first of the two passes only."""

    def __init__(self, rho: float, smoothing: float) -> None:
        self.rho, self.smoothing = rho, smoothing

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        logits = model(images)
        here = soft_cross_entropy(logits, labels, self.smoothing)
        if self.rho == 0:
            return here, logits
        names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        gradients = torch.autograd.grad(here, weights)
        with torch.no_grad():
            moves = ascent(list(weights), list(gradients), self.rho)
        moved = {n: w + e for n, w, e in zip(names, weights, moves, strict=True)}
        norms = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        try:
            for m, _ in norms:
                m.momentum = 0.0
            there = torch.func.functional_call(model, moved, (images,))
        finally:
            for m, momentum in norms:
                m.momentum = momentum
        return soft_cross_entropy(there, labels, self.smoothing), logits


@dataclass(frozen=True)
class _Restless(Recipe):
    """A cosine over 100 steps, not epochs, that rises and falls again: the released scheduler, stepped too often."""

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        return self.lr * (1 + math.cos(math.pi * step / 100)) / 2


@dataclass(frozen=True)
class FTSAM:
    """Fine-tune towards weights whose whole neighbourhood is good, which moves the large weights that a backdoor uses.

    ``min_w max_{|| e / |w| || <= rho} L(w + e)`` on clean images. Introduced in chapter "Baselines"; source: the paper,
    and BackdoorBench @ f02e353.

    Args:
        rho: radius of the neighbourhood relative to each weight, 0 or more; 0 is plain fine-tuning.
        smoothing: of the labels, in [0, 1).
        lr, epochs, batch, momentum, weight_decay: of SGD.
        schedule: "cosine" over the run, or "restless": the released one, a cosine of 100 steps that starts again, so
            that a run of 10 steps an epoch ends where it began.
    """

    rho: float = 2.0
    smoothing: float = 0.1
    lr: float = 0.01
    epochs: int = 100
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "restless"] = "cosine"

    def __post_init__(self) -> None:
        checks = {
            "rho": (self.rho >= 0, "0 or more"),
            "smoothing": (0 <= self.smoothing < 1, "in [0, 1)"),
            "schedule": (self.schedule in ("cosine", "restless"), "cosine or restless"),
        }
        require(self, checks)
        self._recipe()  # checks the rest

    @classmethod
    def paper(cls) -> "FTSAM":
        """CIFAR-10 in the paper: rho 2, lr 0.01, batch 256, 100 epochs (rho 8 for GTSRB and Tiny ImageNet)."""
        return cls()

    @classmethod
    def official(cls) -> "FTSAM":
        """The benchmark as shipped: the scheduler is stepped after every batch."""
        return cls(schedule="restless")

    @classmethod
    def small(cls) -> "FTSAM":
        """For the book's small network and 500 clean images, settled on seeds 0 and 1."""
        return cls(lr=0.1, epochs=20, batch=64)

    def _recipe(self) -> Recipe:
        kind = _Restless if self.schedule == "restless" else Recipe
        return kind(
            self.epochs, self.batch, self.lr, self.momentum, self.weight_decay, nesterov=False, schedule="cosine"
        )

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Fine-tune a copy of `model` on all clean images: FT-SAM chooses no threshold.

        Args:
            keep_every: keep a copy of the network every so many epochs in ``details["snapshots"]``; 0 keeps none.

        Returns:
            `Repair` with the log of `bdlib.training.fit` (its loss is that at the moved weights) and details:
            snapshots ``[(epoch, model)]``.
        """
        check_inputs(model, clean)
        start, repaired = time.perf_counter(), copy.deepcopy(model)
        snapshots: list[tuple[int, nn.Module]] = []

        def keep(epoch: int) -> None:
            if keep_every and epoch % keep_every == 0:
                snapshots.append((epoch, copy.deepcopy(repaired).eval()))

        step = _Sharp(self.rho, self.smoothing)
        log = fit(repaired, clean.images, self._recipe(), seed=seed, step=step, note="FT-SAM", after_epoch=keep)
        return Repair(repaired, log, {"snapshots": snapshots}, time.perf_counter() - start)
