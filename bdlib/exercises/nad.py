"""Checkers of the chapter "NAD": the weight on another map size, and the loss between maps of different size."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.exercises.checking import check


def check_rescale(rescale: Callable[[float, tuple[int, int], tuple[int, int]], float]) -> None:
    """`rescale(beta, settled, size)` weighs the attention loss on maps of `size` as `beta` does on maps of `settled`.

    ``beta (H W of size) / (H W of settled)``, because the loss at equal cosine is proportional to ``1 / (H W)``.

    Args:
        rescale: weight, map size (H, W) that it was settled for, map size (H, W) at hand -> weight.

    Raises:
        CheckError: see `check`.
    """

    def reference(beta: float, settled: tuple[int, int], size: tuple[int, int]) -> float:
        return beta * (size[0] * size[1]) / (settled[0] * settled[1])

    inputs = [
        ("beta 500 on 32x32 maps, again 32x32", (500.0, (32, 32), (32, 32))),
        ("beta 500 on 32x32 maps, now 64x64: the loss is a quarter", (500.0, (32, 32), (64, 64))),
        ("beta 1000 on 8x8 maps, now 2x2: smaller maps, smaller weight", (1000.0, (8, 8), (2, 2))),
        ("beta 1000 on 16x16 maps, now 4x12: maps that are not square", (1000.0, (16, 16), (4, 12))),
        ("beta 0", (0.0, (8, 8), (4, 4))),
    ]
    check(rescale, reference, inputs, name="check_rescale")


def check_pooled_loss(loss: Callable[[Tensor, Tensor], Tensor], *, seed: int = 0) -> None:
    """`loss(student, teacher)` is the attention loss (p = 2) of two feature maps of any size and number of channels.

    Energies ``sum_c F_c^2`` are pooled to the smaller height and width, then normalised, then compared by the mean
    squared difference.

    Args:
        loss: feature maps ``(B, C, H, W)`` and ``(B, C', H', W')`` -> ``()``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """

    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        energies = [F.adaptive_avg_pool2d(f.square().sum(1), size).flatten(1) for f in (student, teacher)]
        ours, theirs = (e / (e.norm(dim=1, keepdim=True) + 1e-6) for e in energies)
        return (ours - theirs).square().mean()

    rng = torch.Generator().manual_seed(seed)

    def maps(*shape: int) -> Tensor:
        # brighter on one side, so that the maps of a batch are far from uniform
        return torch.randn(*shape, generator=rng) * torch.linspace(0.2, 2, shape[3])

    left, right = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    left[..., 0], right[..., 1] = 1.0, 1.0
    same, wide = maps(3, 5, 4, 4), maps(3, 2, 8, 4)
    inputs = [
        ("the same features twice: 0", (same, same)),
        ("disjoint 2x2 maps: the bound 2 / 4", (left, right)),
        ("the same features, one of them times -7: 0", (same, -7 * same)),
        ("one size, 5 and 3 channels", (same, maps(3, 3, 4, 4).flip(3))),
        ("a teacher twice as high and wide", (same, maps(3, 6, 8, 8).flip(3))),
        ("a student twice as high and wide", (maps(3, 6, 8, 8).flip(3), same)),
        ("a student that is higher, a teacher that is wider", (wide, maps(3, 4, 4, 8).flip(3))),
        ("a teacher of one position: every map is 1, the loss 0", (same, maps(3, 6, 1, 1))),
    ]
    check(loss, reference, inputs, name="check_pooled_loss")
