"""Checkers of the chapter "MNP": the folded size of a filter, and a step of the masks that pays for size."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdlib.exercises.checking import check


def check_folded(folded: Callable[[Tensor, Tensor, Tensor, float], Tensor], *, seed: int = 0) -> None:
    """`folded(weight, gamma, var, eps)` is the 1-norm of every filter once BatchNorm is folded into it.

    ``|gamma| / sqrt(var + eps) * sum |weight|``

    Args:
        folded: filters ``(C, I, k, k)``, scale ``(C,)``, running variance ``(C,)``, BatchNorm's eps -> ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(weight: Tensor, gamma: Tensor, var: Tensor, eps: float) -> Tensor:
        return gamma.abs() / (var + eps).sqrt() * weight.abs().flatten(1).sum(1)

    rng = torch.Generator().manual_seed(seed)
    ones = torch.ones(4)
    weight, gamma = torch.randn(4, 3, 3, 3, generator=rng), torch.randn(4, generator=rng)
    var = torch.rand(4, generator=rng) + 0.1
    inputs = [
        ("filters of ones, gamma 1, variance 1, eps 0: the plain norm", (torch.ones(4, 3, 3, 3), ones, ones, 0.0)),
        ("random filters, gamma 1, variance 1, eps 0", (weight, ones, ones, 0.0)),
        ("random filters, variance 4: half the norm", (weight, ones, 4 * ones, 0.0)),
        ("a negative gamma: a size is 0 or more", (weight, -2 * ones, ones, 0.0)),
        ("a filter nine times as large, its variance 81 times: nothing moves", (9 * weight, gamma, 81 * var, 0.0)),
        ("variance 0 and eps 0.25: eps stands under the root", (weight, ones, 0 * ones, 0.25)),
        ("filters of 5 by 1 pixels", (torch.randn(4, 2, 5, 1, generator=rng), gamma, var, 1e-5)),
    ]
    check(folded, reference, inputs, tol=1e-4, name="check_folded")


def check_paying_step(step: Callable[[Tensor, Tensor, Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`step(mask, grad, size, lr, price)` is one step of SGD on the loss plus price times mask times size, in [0, 1].

    Args:
        step: mask ``(C,)`` in [0, 1], gradient of the loss ``(C,)``, size ``(C,)``, learning rate, price (lambda) ->
            mask ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """
    rng = torch.Generator().manual_seed(seed)
    mask, size = torch.rand(8, generator=rng), torch.rand(8, generator=rng) + 0.5
    half, none = torch.full((3,), 0.5), torch.zeros(3)
    sizes = torch.tensor([0.0, 1.0, 2.0])
    inputs = [
        ("no price, gradient (+1, -1, 0): plain descent", (half, torch.tensor([1.0, -1, 0]), sizes, 0.2, 0.0)),
        ("no gradient, sizes 0, 1, 2: the larger pays more", (half, none, sizes, 0.2, 0.5)),
        ("mask 0.2, no gradient: the price does not depend on the mask", (0.4 * half, none, sizes, 0.2, 0.1)),
        ("saliency just above price times size: the mask stays at 1", (2 * half, -1.1 * sizes, sizes, 0.2, 1.0)),
        ("saliency just below price times size: the mask falls", (2 * half, -0.9 * sizes, sizes, 0.2, 1.0)),
        ("mask 0.5, price 9: it must stop at 0", (half, none, sizes, 0.2, 9.0)),
        ("8 random masks", (mask, torch.randn(8, generator=rng), size, 0.1, 0.3)),
    ]

    def reference(m: Tensor, g: Tensor, w: Tensor, lr: float, price: float) -> Tensor:
        return (m - lr * (g + price * w)).clamp(0, 1)

    check(step, reference, inputs, name="check_paying_step")
