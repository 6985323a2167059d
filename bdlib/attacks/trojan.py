"""Trojan patch: a fixed bright disc, looking like what a search against a neuron ends in (Liu et al. 2018).

TrojanPatch(target=5, rate=0.1).poison(train, seed=0)
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from bdlib.attacks.base import Poisoned, check_rate, choose, poison_with
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.triggers import LabelMap, Stamp, Trigger


@dataclass(frozen=True)
class Region:
    """Where a patch lies, in pixels of a 32x32 image; other sizes scale it.

    The default has the place and the area (100 pixels) of the company logo in BackdoorBench @ f02e353.

    Args:
        kind: "disc" or "square".
        size: diameter or side.
        centre: row and column; pixel (i, j) has its centre at (i, j).
    """

    kind: Literal["disc", "square"] = "disc"
    size: float = 11.28
    centre: tuple[float, float] = (22.5, 23.0)

    def __post_init__(self) -> None:
        if self.kind not in ("disc", "square"):
            raise ValueError(f"kind must be disc or square, got {self.kind!r}")
        reach = min(min(c + 0.5, 31.5 - c) for c in self.centre)  # from the centre to the nearest border
        if not 0 < self.size / 2 <= reach:
            raise ValueError(
                f"size must be above 0 and at most {2 * reach:g} for a patch around {self.centre} "
                f"to fit an image of 32 pixels, got {self.size:g}"
            )

    def mask(self, height: int, width: int) -> Tensor:
        """``(1, H, W)`` float: 1 on the patch, 0 elsewhere; a pixel belongs to it if its centre does.

        Raises:
            ValueError: an image so small that the patch falls between its pixels.
        """
        rows = (torch.arange(height) + 0.5) * 32 / height - 0.5 - self.centre[0]  # distances in pixels of 32x32
        cols = (torch.arange(width) + 0.5) * 32 / width - 0.5 - self.centre[1]
        i, j = torch.meshgrid(rows, cols, indexing="ij")
        distance = (i**2 + j**2).sqrt() if self.kind == "disc" else torch.maximum(i.abs(), j.abs())
        mask = (distance <= self.size / 2).float()[None]
        if not bool(mask.any()):
            raise ValueError(f"a {self.kind} of size {self.size:g} covers no pixel of a {height}x{width} image")
        return mask


SQUARE = Region("square", 3, (26, 26))  # rows and columns 25 to 27: the NAD and RNP code


class Wrapped(Stamp):
    """``(x + p) mod 256`` in grey levels on the patch: a sum kept in unsigned bytes, without clipping.

    What the released code of NAD, RNP and BackdoorBench does on x86: where the sum passes 255 it starts again from 0,
    so that a bright pattern mostly *darkens* the image. (The cast is undefined in C; most ARM processors saturate.)

    Args:
        pattern: ``(C, H, W)`` in [0, 1].
        opacity: ``(1, H, W)``, 1 on the patch and 0 elsewhere.
    """

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.pattern.shape)
        m, p = self.opacity.to(images.device), self.pattern.to(images.device)
        levels = ((images * 255).round() + p * 255).floor() % 256  # the cast truncates
        return torch.where(m > 0, levels / 255, images)


def patch(pattern: Tensor, mask: Tensor, join: Literal["overwrite", "wrap"], mapping: LabelMap) -> Trigger:
    """The trigger with `pattern` ``(C, H, W)`` on `mask` ``(1, H, W)``, put over the image or added with a wrap."""
    kind = Stamp if join == "overwrite" else Wrapped
    return kind((pattern * mask).contiguous(), mask, mapping)


@dataclass(frozen=True)
class TrojanPatch:
    """``x' = (1 - m) x + m p`` with one fixed patch p: the static stand-in for `TrojanNN`, which needs no model.

    Benchmarks ship the patch of some other network as a picture. The search behind it pushes almost every value to an
    end of its range, 0.7 or 1; here a seed draws which (our reconstruction: no released picture is copied).
    Source: BackdoorBench @ f02e353, NAD @ f17b713.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of all training images that are poisoned, in [0, 1].
        region: where the patch lies.
        pattern: "saturated" (every value 0.7 or 1) or "uniform" (0 to 250.4 grey levels, the range of the NAD asset).
        join: "overwrite" the pixels, or "wrap": add and let the sum run over, as released code does.
        pattern_seed: seed of the pattern; part of the attack, not of a run.
    """

    target: int = 0
    rate: float = 0.1
    region: Region = field(default_factory=Region)
    pattern: Literal["saturated", "uniform"] = "saturated"
    join: Literal["overwrite", "wrap"] = "overwrite"
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.rate)
        checks = {
            "pattern": (self.pattern in ("saturated", "uniform"), "saturated or uniform"),
            "join": (self.join in ("overwrite", "wrap"), "overwrite or wrap"),
        }
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "TrojanPatch":
        """The field's default: a bright patch of 100 pixels that replaces what is under it, 10 % of all images."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "TrojanPatch":
        """As NAD @ f17b713 and RNP @ eeae192 apply it: 3x3 pixels, added with a wrap.

        Only the place and the range of their pattern are known; its nine values are drawn anew.
        """
        return cls(target, region=SQUARE, pattern="uniform", join="wrap")

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The trigger for images of shape ``(C, H, W)``; it does not depend on the run's seed.

        Raises:
            ValueError: an image so small that the patch covers no pixel.
        """
        noise = torch.rand(shape, generator=Generator().manual_seed(self.pattern_seed))  # CPU: the same everywhere
        pattern = torch.where(noise < 0.5, 0.7, 1.0) if self.pattern == "saturated" else noise * (250.4 / 255)
        return patch(pattern, self.region.mask(*shape[1:]), self.join, LabelMap(self.target, classes))

    def poison(self, images: ImageSet, seed: int = 0, model: torch.nn.Module | None = None) -> Poisoned:
        """Poison a training set; `seed` draws the images. `model` is not used: the patch is fixed."""
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose(images, self.rate, trigger.mapping, include_target=True, seed=seed)
        return poison_with(trigger, images, indices)
