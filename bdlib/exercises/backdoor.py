"""Checkers of the chapter "What is a backdoor?": the stamp, the count of poisoned images, the attack success rate."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdlib.exercises.checking import check

CHECKER = ((0, 0, 1), (0, 1, 0), (1, 0, 1))  # 1 is white: the patch of the NAD and ANP code


def check_stamp(
    stamp: Callable[[Tensor], Tensor], *, pattern: Sequence[Sequence[float]] = CHECKER, seed: int = 0
) -> None:
    """`stamp(images)` returns a copy with the 3x3 checkered patch in the bottom right corner.

    Args:
        stamp: ``(N, C, H, W)`` float in [0, 1] -> the same shape.
        pattern: the patch, rows from the top; 1 is white and 0 black.
        seed: of the random images.

    Raises:
        CheckError: see `check`.
    """
    patch = torch.tensor(pattern, dtype=torch.float32)
    high, wide = patch.shape

    def reference(images: Tensor) -> Tensor:
        out = images.clone()
        out[..., -high:, -wide:] = patch
        return out

    rng = torch.Generator().manual_seed(seed)
    inputs = [
        ("a black 32x32 image", (torch.zeros(1, 3, 32, 32),)),
        ("a white 32x32 image", (torch.ones(1, 3, 32, 32),)),
        ("4 random 32x32 images", (torch.rand(4, 3, 32, 32, generator=rng),)),
        ("3 random grey 28x28 images of one channel", (torch.rand(3, 1, 28, 28, generator=rng),)),
        ("2 random images 20 high and 24 wide", (torch.rand(2, 3, 20, 24, generator=rng),)),
        ("an empty batch", (torch.zeros(0, 3, 32, 32),)),
    ]
    check(stamp, reference, inputs, name="check_stamp")


def check_poison_count(count: Callable[[int, float], int]) -> None:
    """`count(n, rate)` is how many of n images are poisoned: n times rate, rounded to the nearest whole number.

    Raises:
        CheckError: see `check`.
    """
    cases = [(5000, 0.1), (5000, 0.0), (5000, 1.0), (100, 0.29), (7, 0.2), (39209, 0.1), (0, 0.1)]
    inputs = [(f"n = {n}, rate = {rate}", (n, rate)) for n, rate in cases]
    check(count, lambda n, rate: round(rate * n), inputs, tol=0, name="check_poison_count")


def check_asr(asr: Callable[[Tensor, Tensor, int], float], *, seed: int = 0) -> None:
    """`asr(predictions, labels, target)` is the attack success rate: hits among images of the other classes.

    Args:
        asr: predictions on triggered images ``(N,)``, their true labels ``(N,)`` and the target -> share in [0, 1].
        seed: of the random predictions.

    Raises:
        CheckError: see `check`.
    """

    def reference(predictions: Tensor, labels: Tensor, target: int) -> float:
        eligible = labels != target
        return float((predictions[eligible] == target).double().mean())

    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (60,), generator=rng)
    inputs = [
        ("a perfect attack (all 60 predicted as the target)", (torch.full((60,), 2), labels, 2)),
        ("a failed attack (all 60 predicted correctly)", (labels.clone(), labels, 2)),
        ("60 random predictions, target 0", (torch.randint(0, 4, (60,), generator=rng), labels, 0)),
        ("60 random predictions, target 3", (torch.randint(0, 4, (60,), generator=rng), labels, 3)),
        ("labels (1, 1, 1, 0), predictions (1, 1, 1, 1), target 1", (torch.ones(4).long(), _ints(1, 1, 1, 0), 1)),
        ("labels (1, 1, 0, 2), predictions (1, 1, 1, 2), target 1", (_ints(1, 1, 1, 2), _ints(1, 1, 0, 2), 1)),
    ]
    check(asr, reference, inputs, name="check_asr")


def _ints(*values: int) -> Tensor:
    return torch.tensor(values)
