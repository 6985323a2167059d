"""Checkers of the chapter "RNP": one step of the ascent and one of the recovery."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdlib.exercises.checking import check


def check_ascent_step(step: Callable[[Tensor, Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`step(theta, grad, lr, decay)` climbs the loss, and its decay shrinks the weights.

    ``theta + lr (grad - decay theta)``

    Args:
        step: weights ``(P,)``, the gradient of the loss ``(P,)``, learning rate, weight decay -> weights ``(P,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """
    rng = torch.Generator().manual_seed(seed)
    theta, grad = torch.randn(6, generator=rng), torch.randn(6, generator=rng)
    inputs = [
        ("weights 0, gradient (+1, -1, 0), no decay: uphill", (torch.zeros(3), torch.tensor([1.0, -1, 0]), 0.1, 0.0)),
        ("gradient 0, decay 0.5: the weights shrink", (torch.tensor([1.0, -2.0]), torch.zeros(2), 0.1, 0.5)),
        ("6 random weights, lr 0.01, decay 5e-4", (theta, grad, 0.01, 5e-4)),
        ("6 random weights, lr 1, decay 1: only the gradient is left", (theta, grad, 1.0, 1.0)),
        ("lr 0: nothing moves", (theta, grad, 0.0, 0.5)),
    ]
    check(step, lambda t, g, lr, decay: t + lr * (g - decay * t), inputs, name="check_ascent_step")


def check_recover_step(step: Callable[[Tensor, Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`step(mask, grad, lr, alpha)` is one step of SGD on alpha times the loss, kept in [0, 1].

    Args:
        step: mask ``(C,)`` in [0, 1], the gradient of the plain loss ``(C,)``, learning rate, alpha -> mask ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, generator=rng)
    inputs = [
        ("mask 0.5, gradient (+1, -1, 0), alpha 1", (torch.full((3,), 0.5), torch.tensor([1.0, -1, 0]), 0.2, 1.0)),
        ("the same at alpha 0.2: a fifth of the way", (torch.full((3,), 0.5), torch.tensor([1.0, -1, 0]), 0.2, 0.2)),
        ("mask 1, gradient -5: it must stay at 1", (torch.ones(2), torch.full((2,), -5.0), 0.2, 0.2)),
        ("mask 0.1, gradient +9: it must stop at 0", (torch.full((2,), 0.1), torch.full((2,), 9.0), 0.2, 0.2)),
        ("8 random masks", (mask, torch.randn(8, generator=rng), 0.2, 0.2)),
    ]
    check(step, lambda m, g, lr, alpha: (m - lr * alpha * g).clamp(0, 1), inputs, name="check_recover_step")
