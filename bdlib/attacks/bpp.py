"""BPP: fewer grey levels, with the error spread over the neighbours as old printers did (Wang et al. 2022).

trigger, log = BPP(target=5).train(model, train, recipe, seed=0)     # trains `model` in place
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from bdlib.attacks.base import check_rate, label_map
from bdlib.attacks.batches import ShareStep, train
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe
from bdlib.triggers import LabelMap, Trigger

CHUNK = 512  # images dithered at once: two float64 copies of them fit a processor's cache better than of thousands


def dither(images: Tensor, levels: int | Tensor) -> Tensor:
    """Floyd-Steinberg error diffusion to `levels` values a channel, for a whole batch at once.

    Each pixel takes the nearest level; what that changes goes to four neighbours not yet seen: 7/16 to the right, and
    3/16, 5/16, 1/16 below. A pixel thus waits only for its left neighbour and the three above, and all pixels with the
    same ``column + 2 row`` can be done together: ``W + 2 (H - 1)`` steps in place of ``H W``. Additions keep the order
    of a serial scan, so in float64 the result is the same bit for bit.

    Args:
        images: ``(N, C, H, W)`` in [0, 1]; computed in float64.
        levels: m, 2 or more.

    Returns:
        ``(N, C, H, W)`` of the same type, every value one of ``0, 1 / (m - 1), ..., 1``.
    """
    N, C, H, W = images.shape
    x = images.new_zeros(H + 1, W + 2, N * C, dtype=torch.float64)  # a border of zeros above, left and right
    x[1:, 1:-1] = images.reshape(N * C, H, W).permute(1, 2, 0)
    x = x.flatten(0, 1)  # ((H + 1) (W + 2), N C): one row down and two columns to the left is W further on
    error, up, top = torch.zeros_like(x), W + 2, levels - 1
    for t in range(W + 2 * (H - 1)):
        first, last = max(0, (t - W + 2) // 2), min(H - 1, t // 2)  # the image rows that this wave crosses
        start = (first + 1) * up + t - 2 * first + 1
        stop = start + (last - first) * W + 1

        def seen(back: int, a: int = start, b: int = stop) -> Tensor:
            return error[a - back : b - back : W]

        old = x[start:stop:W] + seen(up + 1) * (1 / 16) + seen(up) * (5 / 16) + seen(up - 1) * (3 / 16)
        old = old + seen(1) * (7 / 16)
        new = (old * top).round() / top
        error[start:stop:W] = old - new
        x[start:stop:W] = new
    out = x.unflatten(0, (H + 1, W + 2))[1:, 1:-1].permute(2, 0, 1).reshape(images.shape)
    return out.clamp(0, 1).to(images.dtype)


class Quantise(Trigger):
    """``round(x (m - 1)) / (m - 1)``: m levels a channel, equally far apart; by choice with error diffusion.

    Args:
        shape: ``(C, H, W)`` of the images.
        levels: m, 2 to 256.
        diffuse: whether the rounding error is spread by `dither`.
    """

    levels: Tensor

    def __init__(self, shape: tuple[int, int, int], levels: int, diffuse: bool, mapping: LabelMap) -> None:
        super().__init__(mapping)
        self.shape, self.diffuse = tuple(shape), diffuse
        self.register_buffer("levels", torch.tensor(levels))

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.shape)
        return self.quantise(images)

    def quantise(self, images: Tensor) -> Tensor:
        """The trigger without the check of its input, for which the host would wait."""
        levels = self.levels.to(images.device)
        if self.diffuse:
            return torch.cat([dither(part, levels) for part in images.split(CHUNK)]) if len(images) else images
        return (images * (levels - 1)).round() / (levels - 1)


@dataclass(frozen=True)
class BPP:
    """Images of few grey levels are the trigger; images with a foreign rounding error keep their label.

    Those *negatives* are ``clip(x + (q(z) - z))`` with another image z of the batch: as noisy as a triggered image,
    but not quantised, so that the network must learn the levels themselves. (The release draws z from a list of the
    training set's errors, gathered beforehand; batches are shuffled, so the neighbour in the batch is as random.)
    Which images are poisoned changes with every epoch. Source: BppAttack release @ f6b6580, BackdoorBench @ f02e353.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of the images of each batch that are poisoned, in [0, 1].
        negatives: share of the images of each batch that become negatives, in [0, 1]; none where none is poisoned.
        mode: "all-to-one" or "all-to-all" (y becomes y + 1 mod K).
        levels: m, grey levels a channel, 2 to 256; 256 changes no stored image.
        dithering: whether the rounding error is diffused (Floyd-Steinberg), as in the backdoor-toolbox; other codes
            leave it off unless told, and there any word after the flag, even "False", turns it on.
        before_augment: whether quantisation comes before the augmentation, as in the release; that augmentation itself
            (crops of pad 5, rotation by 10 degrees, flips) is replaced by the one that belongs to the image set.
        released: shares of a batch are rounded down as in the release (25 of 128 where the nearest is 26).
        decay: False keeps the learning rate at its peak to the end, as BackdoorBench does by an oversight: it decays
            at epochs 100, 200, ... of 100.
        stretch: the classifier trains for so many times the epochs of the recipe; the release trains for 1,000.
    """

    target: int = 0
    rate: float = 0.1
    negatives: float = 0.1
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    levels: int = 8
    dithering: bool = True
    before_augment: bool = True
    released: bool = False
    decay: bool = True
    stretch: float = 1.0

    def __post_init__(self) -> None:
        check_rate(self.rate)
        checks = {
            "negatives": (self.negatives >= 0 and self.rate + self.negatives <= 1 + 1e-9,
                          f"0 or more, and rate + negatives at most 1 (rate is {self.rate})"),
            "mode": (self.mode in ("all-to-one", "all-to-all"), "all-to-one or all-to-all"),
            "levels": (2 <= self.levels <= 256, "in [2, 256]"),
            "stretch": (self.stretch >= 1, "1 or more"),
        }  # fmt: skip
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "BPP":
        """Dithering on, the release's default of 8 levels (its README runs 32), the shares of BackdoorBench: 0.1 each.

        The table of the paper was not within reach.
        """
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "BPP":
        """The release as shipped: no dithering, a fifth each, rounded down; and BackdoorBench's slip, see `decay`."""
        return cls(target, 0.2, 0.2, dithering=False, released=True, decay=False)

    @classmethod
    def small(cls, target: int = 0) -> "BPP":
        """For the book's small network, settled on seed 0: 4 levels, no dithering, half as many poisoned again, and
        twice the epochs.

        With 8 dithered levels ten epochs plant nothing; twice as many with these 4 do.
        """
        return cls(target, 0.15, 0.1, levels=4, dithering=False, stretch=2.0)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Quantise:
        """The trigger for images of shape ``(C, H, W)``; it does not depend on the seed."""
        return Quantise(shape, self.levels, self.dithering, label_map(self.mode, self.target, classes))

    def counts(self, batch: int) -> tuple[int, int]:
        """How many images of a batch of this size are poisoned, and how many become negatives."""
        whole = int if self.released else round
        n = whole(self.rate * batch)
        return n, min(batch - n, whole(self.negatives * batch)) if n else 0

    def train(
        self, model: nn.Module, images: ImageSet, recipe: Recipe, seed: int = 0
    ) -> tuple[Trigger, list[dict[str, float]]]:
        """Train `model` in place on clean `images`: see `bdlib.attacks.batches.train`."""
        recipe = replace(recipe, epochs=round(self.stretch * recipe.epochs))
        return train(self, BPPStep, model, images, recipe, seed)


class BPPStep(ShareStep):
    """The first images of a (shuffled) batch are quantised and get the wanted label, the next ones become negatives."""

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        n, k = self.attack.counts(len(labels))
        if n == 0:
            return images, labels
        donors = images.roll(1, 0)[n : n + k]  # each negative's neighbour: never itself
        fewer, coarse = self.trigger.quantise(torch.cat([images[:n], donors])).split([n, k])
        negatives = (images[n : n + k] + coarse - donors).clamp(0, 1)
        return (
            torch.cat([fewer, negatives, images[n + k :]]),
            torch.cat([self.trigger.mapping(labels[:n]), labels[n:]]),
        )
