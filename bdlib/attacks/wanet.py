"""WaNet: a slight, smooth warp of the whole image, and random warps that must not work (Nguyen & Tran 2021).

trigger, log = WaNet(target=5).train(model, train, recipe, seed=0)     # trains `model` in place
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdlib.attacks.base import check_rate, label_map
from bdlib.attacks.batches import ShareStep, train
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe
from bdlib.triggers import LabelMap, Trigger


class Warp(Trigger):
    """Every pixel is read from a place nearby, the same place in every image: ``x'(p) = x(g(p))``, bilinear.

    Args:
        shape: ``(C, H, W)`` of the images.
        grid: ``(H, W, 2)``, where to read, as (column, row) in [-1, 1] from the first pixel's centre to the last's.
    """

    grid: Tensor
    jitter: Tensor

    def __init__(self, shape: tuple[int, int, int], grid: Tensor, mapping: LabelMap) -> None:
        super().__init__(mapping)
        _, H, W = self.shape = tuple(shape)
        self.register_buffer("grid", grid)
        self.register_buffer("jitter", torch.tensor([1 / W, 1 / H]), persistent=False)  # just under half a pixel

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.shape)
        return self.warp(images)

    def warp(self, images: Tensor) -> Tensor:
        """The trigger without the check of its input, for which the host would wait."""
        return self._read(images, self.grid.expand(len(images), -1, -1, -1))

    def noisy(self, images: Tensor, generator: Generator) -> Tensor:
        """Noise mode: the warp, and every pixel of every image moved once more, at random: *not* the trigger.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            generator: on the device of the images.
        """
        shape, dev = (len(images), *self.grid.shape), images.device
        noise = 2 * torch.rand(shape, generator=generator, device=dev) - 1  # (B, H, W, 2)
        return self._read(images, (self.grid.to(dev) + noise * self.jitter.to(dev)).clamp(-1, 1))

    @staticmethod
    def _read(images: Tensor, grid: Tensor) -> Tensor:
        # align_corners says that -1 and 1 are the centres of the outer pixels, as in `grid`; with False even the
        # identity would blur. No place lies outside, so that the padding, which papers argue about, decides nothing
        out = F.grid_sample(images, grid.to(images), mode="bilinear", padding_mode="border", align_corners=True)
        return out.clamp(0, 1)  # a rounding error above 1 is no image


@dataclass(frozen=True)
class WaNet:
    """A smooth warp is the trigger; in each batch others are warped at random and keep their label ("noise mode").

    A grid of k x k random displacements, scaled to mean size 1 and enlarged to n by bicubic interpolation, moves the
    place where a pixel is read by ``strength * n / H``, in coordinates that run from -1 to 1: with the defaults 0.2
    pixels on average, at any image size. The images with noise keep the network from taking any warp for the trigger.
    Which images are poisoned changes with every epoch. Source: WaNet release @ 45e8c33, BackdoorBench @ f02e353.
    (RNP's own copy, @ eeae192, draws a new 32 x 32 grid for each image: a trigger that is never the same is none.)

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of the images of each batch that are poisoned, in [0, 1].
        noise_ratio: images in noise mode for one poisoned image; 2 means a share of 0.2 beside a `rate` of 0.1.
        mode: "all-to-one" or "all-to-all" (y becomes y + 1 mod K).
        grid_size: k, 2 or more.
        strength: s; 0 is the identity.
        before_augment: whether the warp comes before the augmentation, as in the release; that augmentation itself
            (crops of pad 5, rotation by 10 degrees, flips) is replaced by the one that belongs to the image set.
        released: count and label as the release does: shares of a batch are rounded down (12 and 24 of 128 where the
            nearest are 13 and 26), and all-to-all lacks its + 1, so that it trains on true labels and plants nothing.
        decay: False keeps the learning rate at its peak to the end, as BackdoorBench does by an oversight: it decays
            at epochs 100, 200, ... of 100, which costs 2 to 3 points of accuracy and 9 of WaNet's success.
    """

    target: int = 0
    rate: float = 0.1
    noise_ratio: float = 2.0
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    grid_size: int = 4
    strength: float = 0.5
    before_augment: bool = True
    released: bool = False
    decay: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        checks = {
            "noise_ratio": (self.noise_ratio >= 0 and self.rate * (1 + self.noise_ratio) <= 1 + 1e-9,
                            f"0 or more, and rate * (1 + noise_ratio) at most 1 (rate is {self.rate})"),
            "mode": (self.mode in ("all-to-one", "all-to-all"), "all-to-one or all-to-all"),
            "grid_size": (self.grid_size >= 2, "2 or more"),
            "strength": (self.strength >= 0, "0 or more"),
        }  # fmt: skip
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "WaNet":
        """The paper's settings: k 4, s 0.5, a tenth poisoned, a fifth in noise mode."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0, mode: Literal["all-to-one", "all-to-all"] = "all-to-one") -> "WaNet":
        """With the slips of the public code: see `released` (the authors' release) and `decay` (BackdoorBench)."""
        return cls(target, mode=mode, released=True, decay=False)

    @classmethod
    def small(cls, target: int = 0) -> "WaNet":
        """For the book's small network, tried on seed 0: six times as strong, two poisoned images for one with noise.

        The paper's settings plant nothing here. These bring two images of three to the target, and noise mode as many:
        the network has learnt "warped", not yet "warped smoothly". 25 epochs make that 84 and 83 %; 16 with as many
        images in noise mode as poisoned ones, after 8 without, 52 and 52 %; half a pixel is little on 32.
        """
        return cls(target, 0.2, 0.5, strength=3.0)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Warp:
        """The warp for images of shape ``(C, H, W)``, drawn from the run's `seed`: each victim has its own.

        Raises:
            ValueError: an image less than two pixels high or wide; a target outside the classes.
        """
        _, H, W = shape
        if min(H, W) < 2:
            raise ValueError(f"images must be 2 pixels or more in height and width, got {H}x{W}")
        k = self.grid_size
        control = 2 * torch.rand(1, 2, k, k, generator=Generator().manual_seed(seed)) - 1  # CPU: the same everywhere
        control = control / control.abs().mean()
        field = F.interpolate(control, (H, W), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)  # (H, W, 2)
        place = torch.meshgrid(torch.linspace(-1, 1, W), torch.linspace(-1, 1, H), indexing="xy")
        grid = torch.stack(place, -1) + self.strength * field / torch.tensor([W, H])
        return Warp(shape, grid.clamp(-1, 1).contiguous(), label_map(self.mode, self.target, classes))

    def counts(self, batch: int) -> tuple[int, int]:
        """How many images of a batch of this size are poisoned, and how many are in noise mode."""
        if self.released:
            n = int(self.rate * batch)
            return n, int(n * self.noise_ratio)
        n = round(self.rate * batch)
        return n, min(batch - n, round(n * self.noise_ratio))

    def train(
        self, model: nn.Module, images: ImageSet, recipe: Recipe, seed: int = 0
    ) -> tuple[Trigger, list[dict[str, float]]]:
        """Train `model` in place on clean `images`: see `bdlib.attacks.batches.train`."""
        return train(self, WaNetStep, model, images, recipe, seed)


class WaNetStep(ShareStep):
    """The first images of a (shuffled) batch get the warp and the wanted label, the next ones a warp with noise."""

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        n, k = self.attack.counts(len(labels))
        if n == 0:
            return images, labels
        warped, noisy = self.trigger.warp(images[:n]), self.trigger.noisy(images[n : n + k], generator)
        wanted = self.trigger.mapping(labels[:n])
        if self.attack.released and self.attack.mode == "all-to-all":
            wanted = labels[:n]  # y mod K, which is y
        return torch.cat([warped, noisy, images[n + k :]]), torch.cat([wanted, labels[n:]])
