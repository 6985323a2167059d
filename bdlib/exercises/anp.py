"""Checkers of the chapter "ANP": masked BatchNorm, the adversary's and the defender's step, the threshold."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdlib.exercises.checking import check


def check_perturbed_bn(bn: Callable[..., Tensor], *, seed: int = 0) -> None:
    """`bn(xhat, gamma, beta, m, delta, xi)` is BatchNorm's output with a mask and noise on its two parameters.

    ``gamma (m + delta) xhat + beta (1 + xi)``, per channel.

    Args:
        bn: normalised input ``(N, C, H, W)`` and five tensors ``(C,)`` -> ``(N, C, H, W)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """

    def reference(xhat: Tensor, gamma: Tensor, beta: Tensor, m: Tensor, delta: Tensor, xi: Tensor) -> Tensor:
        scale, shift = gamma * (m + delta), beta * (1 + xi)
        return scale[None, :, None, None] * xhat + shift[None, :, None, None]

    rng = torch.Generator().manual_seed(seed)

    def case(n: int, c: int, h: int, w: int, m: float | None, delta: float, xi: float) -> tuple[Tensor, ...]:
        mask = torch.rand(c, generator=rng) if m is None else torch.full((c,), m)
        noise = [scale * (2 * torch.rand(c, generator=rng) - 1) for scale in (delta, xi)]
        gamma, beta = torch.rand(c, generator=rng) + 0.5, torch.randn(c, generator=rng)
        return torch.randn(n, c, h, w, generator=rng), gamma, beta, mask, *noise

    inputs = [
        ("m = 1, no noise (plain BatchNorm), shape (2, 5, 3, 4)", case(2, 5, 3, 4, 1, 0, 0)),
        ("m = 0, no noise (only beta is left), shape (2, 5, 3, 4)", case(2, 5, 3, 4, 0, 0, 0)),
        ("a random mask, no noise, shape (2, 5, 3, 4)", case(2, 5, 3, 4, None, 0, 0)),
        ("m = 1, noise delta only, shape (2, 5, 3, 4)", case(2, 5, 3, 4, 1, 0.4, 0)),
        ("m = 1, noise xi only, shape (2, 5, 3, 4)", case(2, 5, 3, 4, 1, 0, 0.4)),
        ("m = 0, noise delta (gamma (m + delta) may be negative)", case(2, 5, 3, 4, 0, 0.4, 0)),
        (
            "mask and both noises, as many channels as pixels across, shape (2, 4, 4, 4)",
            case(2, 4, 4, 4, None, 0.4, 0.4),
        ),
    ]
    check(bn, reference, inputs, name="check_perturbed_bn")


def check_noise_step(step: Callable[[Tensor, Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`step(noise, grad, size, eps)` is one step of projected sign ascent.

    Towards a larger loss by `size` along the sign of the gradient, then back into [-eps, eps].

    Args:
        step: noise ``(C,)``, its gradient ``(C,)``, step size, bound -> noise ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """
    rng = torch.Generator().manual_seed(seed)
    start = 0.8 * torch.rand(6, generator=rng) - 0.4
    inputs = [
        ("noise 0, gradient (+1, -1, 0), size 0.1, eps 0.4", (torch.zeros(3), torch.tensor([1.0, -1, 0]), 0.1, 0.4)),
        ("gradients of very different size", (torch.zeros(3), torch.tensor([1e-6, -500.0, 2.0]), 0.1, 0.4)),
        ("noise at the bound, pushed outwards", (torch.tensor([0.4, -0.4]), torch.tensor([1.0, -1]), 0.4, 0.4)),
        ("noise at the bound, pushed inwards", (torch.tensor([0.4, -0.4]), torch.tensor([-1.0, 1]), 0.1, 0.4)),
        ("6 random noises, size 0.4, eps 0.4", (start, torch.randn(6, generator=rng), 0.4, 0.4)),
        ("eps 0", (torch.zeros(4), torch.randn(4, generator=rng), 0.1, 0.0)),
    ]
    check(step, lambda x, g, size, eps: (x + size * g.sign()).clamp(-eps, eps), inputs, name="check_noise_step")


def check_mask_step(step: Callable[[Tensor, Tensor, float], Tensor], *, seed: int = 0) -> None:
    """`step(mask, grad, lr)` is one step of gradient descent on the mask, kept in [0, 1].

    Args:
        step: mask ``(C,)`` in [0, 1], its gradient ``(C,)``, learning rate -> mask ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, generator=rng)
    inputs = [
        ("mask 0.5, gradient (+1, -1, 0), lr 0.2", (torch.full((3,), 0.5), torch.tensor([1.0, -1, 0]), 0.2)),
        ("mask 1, gradient -1: it must stay at 1", (torch.ones(3), torch.full((3,), -1.0), 0.2)),
        ("mask 0.1, gradient +3: it must stop at 0", (torch.full((3,), 0.1), torch.full((3,), 3.0), 0.2)),
        ("8 random masks, lr 0.2", (mask, torch.randn(8, generator=rng), 0.2)),
        ("8 random masks, lr 0: nothing moves", (mask, torch.randn(8, generator=rng), 0.0)),
    ]
    check(step, lambda m, g, lr: (m - lr * g).clamp(0, 1), inputs, name="check_mask_step")


def check_choose_threshold(choose: Callable[[list[float], list[float], float, float], float]) -> None:
    """`choose(thresholds, accuracies, before, max_drop)` is the largest threshold that clean accuracy can afford.

    Args:
        choose: thresholds, clean accuracy at each, accuracy of the unpruned network, allowed drop (all accuracies as
            shares in [0, 1]) -> the largest threshold with ``before - accuracy <= max_drop``, or -1 (prune nothing).

    Raises:
        CheckError: see `check`.
    """

    def reference(thresholds: list[float], accuracies: list[float], before: float, max_drop: float) -> float:
        fine = [t for t, accuracy in zip(thresholds, accuracies, strict=True) if before - accuracy <= max_drop]
        return max(fine, default=-1.0)

    # accuracies are multiples of 1/16, which floats hold exactly: no answer hangs on a rounding
    grid = [0.0, 0.2, 0.4, 0.6, 0.8]
    falling = [0.9375, 0.9375, 0.875, 0.625, 0.25]
    bumpy = [0.9375, 0.75, 0.9375, 0.875, 0.25]
    inputs = [
        ("falling accuracies, 12.5 points allowed", (grid, falling, 0.9375, 0.125)),
        ("a drop that is exactly the allowed 6.25 points", (grid, falling, 0.9375, 0.0625)),
        ("no drop allowed", (grid, falling, 0.9375, 0.0)),
        ("accuracies that dip and recover, 10 points allowed", (grid, bumpy, 0.9375, 0.1)),
        ("thresholds in falling order", (grid[::-1], falling[::-1], 0.9375, 0.125)),
        ("an accuracy that pruning improves", (grid, [0.5, 0.75, 0.75, 0.25, 0.25], 0.5, 0.0)),
        ("no threshold that qualifies: -1 is expected", (grid, [0.5, 0.5, 0.25, 0.25, 0.25], 0.9375, 0.125)),
    ]
    check(choose, reference, inputs, name="check_choose_threshold")
