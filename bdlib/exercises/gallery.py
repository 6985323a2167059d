"""Checkers of the chapter "The attack gallery": a grating, the labels after poisoning, the coherence of differences."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from bdlib.exercises.checking import check


def check_grating(grating: Callable[[Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`grating(images, delta, periods)` adds ``delta / 255 sin(2 pi periods (i + j) / W)`` at row i, column j, clipped.

    Args:
        grating: ``(N, C, H, W)`` float in [0, 1], amplitude in grey levels, periods over the width -> the same shape.
        seed: of the random images.

    Raises:
        CheckError: see `check`.
    """

    def reference(images: Tensor, delta: float, periods: float) -> Tensor:
        H, W = images.shape[-2:]
        place = torch.arange(H)[:, None] + torch.arange(W)
        return (images + delta / 255 * torch.sin(2 * math.pi * periods * place / W)).clamp(0, 1)

    rng = Generator().manual_seed(seed)
    grey = torch.full((1, 3, 32, 32), 0.5)
    inputs = [
        ("a grey 32x32 image, delta 40, 6 periods", (grey, 40.0, 6.0)),
        ("a white 32x32 image, which the wave can only darken", (torch.ones(1, 3, 32, 32), 40.0, 6.0)),
        ("a black 32x32 image, which the wave can only brighten", (torch.zeros(1, 3, 32, 32), 40.0, 6.0)),
        ("delta 0, which changes nothing", (grey, 0.0, 6.0)),
        ("4 random images, delta 80, 3 periods", (torch.rand(4, 3, 32, 32, generator=rng), 80.0, 3.0)),
        ("2 random grey images 20 high and 28 wide", (torch.rand(2, 1, 20, 28, generator=rng), 20.0, 5.0)),
        ("an empty batch", (torch.zeros(0, 3, 32, 32), 40.0, 6.0)),
    ]
    check(grating, reference, inputs, name="check_grating")


def check_wanted(wanted: Callable[[Tensor, Tensor, str, int, int], Tensor], *, seed: int = 0) -> None:
    """`wanted(labels, poisoned, mode, target, classes)` gives the labels of the training set after poisoning.

    Args:
        wanted: labels ``(N,)`` int64, poisoned ``(N,)`` bool, "all-to-one", "all-to-all" or "clean label", the target
            and the number of classes -> ``(N,)`` int64.
        seed: of the random labels.

    Raises:
        CheckError: see `check`.
    """

    def reference(labels: Tensor, poisoned: Tensor, mode: str, target: int, classes: int) -> Tensor:
        if mode == "clean label":
            return labels.clone()
        new = (labels + 1) % classes if mode == "all-to-all" else torch.full_like(labels, target)
        return torch.where(poisoned, new, labels)

    rng = Generator().manual_seed(seed)
    labels = torch.randint(0, 12, (60,), generator=rng)
    some = torch.rand(60, generator=rng) < 0.3
    last, none = torch.full((4,), 11), torch.zeros(60, dtype=torch.bool)
    inputs = [
        ("60 labels, 12 classes, all-to-one", (labels, some, "all-to-one", 5, 12)),
        ("all-to-one with target 0", (labels, some, "all-to-one", 0, 12)),
        ("60 labels, 12 classes, all-to-all", (labels, some, "all-to-all", 5, 12)),
        ("all-to-all on the last class", (last, torch.tensor([True, False, True, True]), "all-to-all", 5, 12)),
        ("clean label", (torch.full((6,), 5), torch.arange(6) < 3, "clean label", 5, 12)),
        ("nothing poisoned, all-to-one", (labels, none, "all-to-one", 5, 12)),
    ]
    check(wanted, reference, inputs, tol=0, name="check_wanted")


def check_coherent(coherent: Callable[[Tensor], float], *, seed: int = 0) -> None:
    """`coherent(differences)` is the mean inner product of two different images' changes over the mean squared length.

    Args:
        coherent: ``(N, C, H, W)`` float -> a number, 1 for equal changes.
        seed: of the random changes.

    Raises:
        CheckError: see `check`.
    """

    def reference(differences: Tensor) -> float:
        d = differences.flatten(1).double()
        own = d.square().sum()
        return float((d.sum(0).square().sum() - own) / (len(d) - 1) / own)

    rng = Generator().manual_seed(seed)
    noise, pattern = torch.randn(6, 3, 8, 8, generator=rng), torch.randn(1, 3, 8, 8, generator=rng)
    apart = torch.zeros(3, 1, 2, 2)
    apart[0, 0, 0, 0] = apart[1, 0, 0, 1] = apart[2, 0, 1, 0] = 1
    inputs = [
        ("one pattern six times (coherence 1)", (pattern.expand(6, -1, -1, -1).contiguous(),)),
        ("three changes on pixels of their own (coherence 0)", (apart,)),
        ("a pattern and its negative (coherence -1)", (torch.cat([pattern, -pattern]),)),
        ("a pattern, and the same three times as strong", (torch.cat([pattern, 3 * pattern]),)),
        ("six patterns of noise", (noise,)),
        ("noise over a pattern", (noise + 2 * pattern,)),
    ]
    check(coherent, reference, inputs, name="check_coherent")
