"""Adaptive-Blend and Adaptive-Patch: few images, weak triggers, and cover images that tell the truth (Qi et al. 2023).

AdaptiveBlend(target=5).poison(train, seed=0).cover       # (J,) images with trigger and true label

The cover images keep a network from learning "any trace of the trigger means target": it learns that the whole,
strong trigger does, and in feature space the poisoned images no longer lie apart from the clean ones.
"""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from bdlib.attacks.base import Poisoned, check_rate, choose
from bdlib.attacks.pictures import BLUE, in_channels, panda
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.triggers import LabelMap, Stamp

ORANGE, PURPLE = (0.95, 0.45, 0.10), (0.70, 0.15, 0.65)


def choose_cover(images: ImageSet, cover_rate: float, poisoned: Tensor, *, seed: int) -> Tensor:
    """Draw ``round(cover_rate * N)`` cover images, uniformly from those that are not poisoned.

    Args:
        poisoned: ``(K,)`` int64, the poisoned images.

    Returns:
        ``(J,)`` int64 indices, sorted, on the images' device; none of them in `poisoned`.

    Raises:
        ValueError: a positive rate that selects no image, or more images than are left.
    """
    count = round(cover_rate * len(images))
    if cover_rate > 0 and count == 0:
        raise ValueError(f"cover_rate {cover_rate} selects no image of {len(images)}")
    left = torch.ones(len(images), dtype=torch.bool)
    left[poisoned.cpu()] = False
    allowed, generator = left.nonzero()[:, 0], Generator().manual_seed(seed)
    if count > len(allowed):
        raise ValueError(f"cover_rate {cover_rate} asks for {count} images, but only {len(allowed)} are left")
    torch.randperm(len(images), generator=generator)  # the poisoned images were drawn from here: go on from there
    order = torch.randperm(len(allowed), generator=generator)[:count]
    return allowed[order].sort().values.to(images.images.device)


def _poisoned(images: ImageSet, indices: Tensor, cover: Tensor, marked: Tensor, trigger: Stamp) -> Poisoned:
    """The poisoned set, with the `marked` images ``(K + J, C, H, W)`` uint8 in the places of `indices` and `cover`."""
    x, y = images.images.clone(), images.labels.clone()
    x[torch.cat([indices, cover])] = marked
    y[indices] = trigger.mapping(y[indices])
    return Poisoned(replace(images, images=x, labels=y), indices, cover, trigger.to(x.device))


@dataclass(frozen=True)
class AdaptiveBlend:
    """``x' = (1 - alpha m) x + alpha m k``: a faint picture k of which m keeps half the tiles, other ones each time.

    When used, the trigger is the whole picture, and stronger.
    Source: Circumventing-Backdoor-Defenses @ e7c0703. The picture is the panda of `bdlib.attacks.pictures`.

    Args:
        target: label the attacker wants.
        rate: share of all images that are poisoned (label `target`), in [0, 1].
        cover_rate: share of all images that get the trigger and keep their label, in [0, 1].
        alpha: opacity of the picture in training, in [0, 1].
        test_alpha: opacity when the trigger is used.
        tiles: the picture is cut into tiles x tiles.
        kept: number of tiles that an image of the training set gets.
        include_target: whether images of the target class may be poisoned too. (Cover images come from every class.)
    """

    target: int = 0
    rate: float = 0.003
    cover_rate: float = 0.003
    alpha: float = 0.15
    test_alpha: float = 0.2
    tiles: int = 4
    kept: int = 8
    include_target: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        require(self, {
            "cover_rate": (0 <= self.cover_rate <= 1, "in [0, 1] (share of all images)"),
            "alpha": (0 <= self.alpha <= 1, "in [0, 1]"),
            "test_alpha": (0 <= self.test_alpha <= 1, "in [0, 1]"),
            "tiles": (self.tiles >= 1, "1 or more"),
            "kept": (0 <= self.kept <= self.tiles**2, f"in [0, {self.tiles**2}], the number of tiles"),
        })  # fmt: skip

    @classmethod
    def paper(cls, target: int = 0) -> "AdaptiveBlend":
        """The paper: 0.3 % poisoned, 0.3 % cover, 8 of 16 tiles at 0.15, the whole at 0.2."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "AdaptiveBlend":
        """The released code does what the paper says: the same as `paper`."""
        return cls.paper(target)

    @classmethod
    def small(cls, target: int = 0) -> "AdaptiveBlend":
        """For the book's small scale, where 0.3 % would be 15 images: 3 % poisoned, 1.5 % cover."""
        return cls(target, 0.03, 0.015)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Stamp:
        """The trigger when used, for images of shape ``(C, H, W)``: all tiles; it does not depend on the seed."""
        C, H, W = shape
        opacity = torch.full((1, H, W), float(self.test_alpha))
        return Stamp(in_channels(panda(H, W), C), opacity, LabelMap(self.target, classes))

    def masks(self, count: int, height: int, width: int, seed: int = 0) -> Tensor:
        """Which pixels of so many training images show the picture.

        Returns:
            ``(count, 1, height, width)`` float, 1 inside the kept tiles.
        """
        drawn = torch.rand(count, self.tiles**2, generator=Generator().manual_seed(seed))
        grid = (drawn.argsort(1) < self.kept).float().unflatten(1, (1, self.tiles, self.tiles))
        rows, columns = (torch.arange(side) * self.tiles // side for side in (height, width))
        return grid[:, :, rows][..., columns]

    def poison(self, images: ImageSet, seed: int = 0, model: torch.nn.Module | None = None) -> Poisoned:
        """Poison a training set; `seed` draws images, cover and tiles. `model` is not used: the picture is fixed."""
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose(images, self.rate, trigger.mapping, include_target=self.include_target, seed=seed)
        cover = choose_cover(images, self.cover_rate, indices, seed=seed)
        both = torch.cat([indices, cover])
        masks = self.masks(len(both), *images.shape[1:], seed=seed)
        partial = Stamp(trigger.pattern, self.alpha * masks, trigger.mapping)  # an opacity for each image
        return _poisoned(images, indices, cover, partial.stamp(images.images[both]), trigger)


@dataclass(frozen=True)
class AdaptivePatch:
    """Four faint patches, one to an image in training; when used, two of them at once, in full.

    In training: a 5x5 square in the bottom right corner, a ring, a 3x3 square in each corner, an 8x8 square. When
    used: 5x5 squares in both bottom corners and the four 3x3 squares over them. Sizes and opacities are those of the
    paper, at 32x32, and scale with the image; its logos are plain shapes of the same area here.
    Source: Circumventing-Backdoor-Defenses @ e7c0703.

    Args:
        target: label the attacker wants.
        rate: share of all images that are poisoned (label `target`), in [0, 1]; the four patches share them equally.
        cover_rate: share of all images that get a patch and keep their label, in [0, 1].
        opacities: of the four patches in training, each in [0, 1].
        test_opacity: of the patches when used.
        include_target: whether images of the target class may be poisoned too. (Cover images come from every class.)
    """

    target: int = 0
    rate: float = 0.003
    cover_rate: float = 0.006
    opacities: tuple[float, float, float, float] = (0.5, 0.2, 0.5, 0.3)
    test_opacity: float = 1.0
    include_target: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        require(self, {
            "cover_rate": (0 <= self.cover_rate <= 1, "in [0, 1] (share of all images)"),
            "opacities": (len(self.opacities) == 4 and all(0 <= a <= 1 for a in self.opacities), "four in [0, 1]"),
            "test_opacity": (0 <= self.test_opacity <= 1, "in [0, 1]"),
        })  # fmt: skip

    @classmethod
    def paper(cls, target: int = 0) -> "AdaptivePatch":
        """The paper: 0.3 % poisoned, 0.6 % cover."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "AdaptivePatch":
        """The rates of BackdoorBox @ af3afd1 for ResNet-18: 1 % poisoned, 2 % cover."""
        return cls(target, 0.01, 0.02)

    @classmethod
    def small(cls, target: int = 0) -> "AdaptivePatch":
        """For the book's small scale, where 0.3 % would be 15 images: 8 % poisoned, 1 % cover."""
        return cls(target, 0.08, 0.01)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Stamp:
        """The trigger when used, for images of shape ``(C, H, W)``; it does not depend on the seed."""
        v, u = _pixels(shape)
        square, corners = (v > 26.5) & ((u > 26.5) | (u < 4.5)), _corners(v, u)
        picture = _paint(square, ORANGE)
        picture = torch.where(corners, _checker(v, u), picture)
        opacity = self.test_opacity * (square | corners)[None].float()
        return Stamp(in_channels(picture, shape[0]), opacity, LabelMap(self.target, classes))

    def patches(self, shape: tuple[int, int, int], classes: int) -> list[Stamp]:
        """The four patches of the training set, for images of shape ``(C, H, W)``."""
        v, u = _pixels(shape)
        ring = (v - 7) ** 2 + (u - 24) ** 2
        drawn = [
            ((v > 26.5) & (u > 26.5), ORANGE),  # 25 pixels of a 32x32 image
            ((ring > 1) & (ring <= 45), BLUE),  # 140
            (_corners(v, u), None),  # 36
            ((v > 20.5) & (v < 28.5) & (u > 20.5) & (u < 28.5), PURPLE),  # 64
        ]
        mapping, stamps = LabelMap(self.target, classes), []
        for (where, colour), opacity in zip(drawn, self.opacities, strict=True):
            picture = _checker(v, u) * where if colour is None else _paint(where, colour)
            stamps.append(Stamp(in_channels(picture, shape[0]), opacity * where[None].float(), mapping))
        return stamps

    def poison(self, images: ImageSet, seed: int = 0, model: torch.nn.Module | None = None) -> Poisoned:
        """Poison a training set; `seed` draws images and cover. `model` is not used: the patches are fixed."""
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose(images, self.rate, trigger.mapping, include_target=self.include_target, seed=seed)
        cover = choose_cover(images, self.cover_rate, indices, seed=seed)
        marked = images.images[torch.cat([indices, cover])]
        turn = torch.cat([torch.arange(len(indices)), torch.arange(len(cover))]).to(marked.device) % 4
        for k, patch in enumerate(self.patches(images.shape, len(images.classes))):
            marked[turn == k] = patch.stamp(marked[turn == k])
        return _poisoned(images, indices, cover, marked, trigger)


def _pixels(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Row and column ``(H, W)`` of every pixel, as if the image were 32x32."""
    rows, columns = ((torch.arange(side) + 0.5) * 32 / side - 0.5 for side in shape[1:])
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    return v, u


def _corners(v: Tensor, u: Tensor) -> Tensor:
    return ((v < 2.5) | (v > 28.5)) & ((u < 2.5) | (u > 28.5))


def _checker(v: Tensor, u: Tensor) -> Tensor:
    return ((v.round() + u.round()) % 2 == 0).float().expand(3, *v.shape)


def _paint(where: Tensor, colour: tuple[float, ...]) -> Tensor:
    return where * torch.tensor(colour)[:, None, None]
