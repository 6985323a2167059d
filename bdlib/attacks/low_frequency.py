"""LF: a faint pattern without high frequencies, added to the whole image (Zeng et al. 2021).

LF.closed_form(target=5).poison(train, seed=0)            # needs no model
LF(target=5).poison(train, seed=0, model=clean_network)   # searches the pattern
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from bdlib.attacks.base import Poisoned, check_rate, choose, poison_with
from bdlib.attacks.inside import frozen
from bdlib.attacks.sig import Wave
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import predict
from bdlib.triggers import LabelMap, Trigger

SIGMA, LENGTH = 6.0, 30  # of the smoothing, in pixels of a 32x32 image
OVERSHOOT = 0.02
STABLE = 5  # passes with the same fooling rate after which a search ends
DRAW = 1_000_003  # keeps the images of the search apart from the poisoned ones, which the same seed draws


def smoothing(side: int) -> Tensor:
    """``(side, side)`` matrix A: ``A @ x`` convolves each column of x with a Gaussian, zeros beyond the border.

    An even number of taps as in the released code, which moves the result by half a pixel up or left.
    """
    length = max(1, round(LENGTH * side / 32))
    taps = torch.arange(length) - (length - 1) / 2
    weights = (-0.5 * (taps / (SIGMA * side / 32)) ** 2).exp()
    tap = torch.arange(side) - torch.arange(side)[:, None] + (length - 1) // 2  # which tap row i has for column j
    inside = (tap >= 0) & (tap < length)
    return torch.where(inside, (weights / weights.sum())[tap.clamp(0, length - 1)], 0.0)


def deepfool(
    model: nn.Module, images: Tensor, target: int, *, steps: int = 200, overshoot: float = OVERSHOOT
) -> tuple[Tensor, Tensor]:
    """Targeted DeepFool for a whole batch: a small change of each image that makes the network say `target`.

    Every step makes the network linear and goes to its border between `target` and the strongest other class, one
    backward pass for all images; those that have arrived stay where they are. (The released code holds on to the
    first class as the rival, and may then wander past a third one.)

    Args:
        images: ``(N, C, H, W)``; the sums may leave [0, 1].
        steps: at most, per image.

    Returns:
        The changes ``(N, C, H, W)``, and ``(N,)`` bool: which arrived.
    """
    total = torch.zeros_like(images)
    away = torch.arange(len(images), device=images.device)  # those that have not arrived
    for done in range(steps + 1):
        x = (images[away] + (1 + overshoot) * total[away]).requires_grad_()
        logits = model(x)
        rival = logits.index_fill(1, torch.tensor(target, device=x.device), -torch.inf).amax(1)
        gap = rival - logits[:, target]  # 0 or more until the target wins
        (slope,) = torch.autograd.grad(gap.sum(), x)
        still = gap.detach() >= 0
        away, gap, slope = away[still], gap.detach()[still], slope[still]
        if done == steps or not len(away):
            break
        size = (gap + 1e-6) / slope.square().sum((1, 2, 3)).clamp(min=1e-12)  # 1e-6: across a border, not onto it
        total[away] -= size[:, None, None, None] * slope
    arrived = torch.ones(len(images), dtype=torch.bool, device=images.device)
    arrived[away] = False
    return (1 + overshoot) * total, arrived & total.isfinite().flatten(1).all(1)


@dataclass(frozen=True)
class LF:
    """``x' = clip(x + v)`` with one smooth pattern v, the same for every image.

    The search takes `count` training images. For those whose class under v is still the old one, DeepFool finds a
    change r that brings about the target class; then ``v <- norm(G(v + G(r)))``, with the Gaussian smoothing G and norm
    a stretching of all values to [0, limit]. It ends when a share 1 - delta of the images is fooled, after `passes`, or
    after five passes at the same share; the best v is kept. Here the changes of `together` images are summed before v
    is smoothed (our reconstruction; 1 is the loop of the paper), and x + v is clipped, as in the attack itself.
    Source: frequency-backdoor @ 99a16a7, BackdoorBench @ f02e353.

    Args:
        target: label the attacker wants (all-to-one), and that the search drives images to.
        rate: share of all training images that are poisoned, in [0, 1].
        pattern: "searched" (needs a clean model) or "closed": a formula fitted to the pattern that BackdoorBench ships.
        limit: largest value of the pattern, in grey levels of 255.
        count: images of the search.
        delta: the search ends when at least a share 1 - delta of the images is fooled, in [0, 1].
        passes: over the images, at most.
        together: images whose changes are summed, in [1, count].
        steps: of DeepFool, at most; an image that needs more is left out of the sum.
        judges: how many of the images the share is measured on; None is all.
        raw: let the network see the images as they are, without the normalisation that it was trained with.
    """

    target: int = 0
    rate: float = 0.1
    pattern: Literal["searched", "closed"] = "searched"
    limit: float = 51.0
    count: int = 100
    delta: float = 0.2
    passes: int = 50
    together: int = 100
    steps: int = 200
    judges: int | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        checks = {
            "pattern": (self.pattern in ("searched", "closed"), "searched or closed"),
            "limit": (0 <= self.limit <= 255, "in [0, 255] grey levels"),
            "count": (self.count >= 1, "1 or more"),
            "delta": (0 <= self.delta <= 1, "in [0, 1]"),
            "passes": (self.passes >= 1, "1 or more"),
            "together": (1 <= self.together <= self.count, f"in [1, {self.count}], at most count"),
            "steps": (self.steps >= 1, "1 or more"),
            "judges": (self.judges is None or 1 <= self.judges <= self.count, f"None or in [1, {self.count}]"),
        }
        require(self, checks)

    @property
    def needs_model(self) -> bool:
        """Whether `poison` must be given a cleanly trained network."""
        return self.pattern == "searched"

    @classmethod
    def paper(cls, target: int = 0) -> "LF":
        """The loop as published: v changes after every single image (slow: thousands of small batches)."""
        return cls(target, together=1)

    @classmethod
    def official(cls, target: int = 0) -> "LF":
        """As in BackdoorBench @ f02e353: raw images, an end at 20 % fooled, and that judged on a single image.

        (Its list of images to judge on comes from a generator object: one image on old NumPy, an error on new.)
        """
        return cls(target, together=1, delta=0.8, judges=1, raw=True)

    @classmethod
    def small(cls, target: int = 0) -> "LF":
        """For the book's small network, settled on seed 0: a searched pattern of 64 grey levels.

        At the published 51 ten epochs plant it in nine images of ten only.
        """
        return cls(target, limit=64.0)

    @classmethod
    def closed_form(cls, target: int = 0) -> "LF":
        """A quick start without a model: red and blue Gaussian gradients, green untouched (our fit)."""
        return cls(target, pattern="closed")

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The trigger for images of shape ``(C, H, W)``: of the closed form, or before the search (all zeros)."""
        pattern = self._closed(shape) if self.pattern == "closed" else torch.zeros(shape)
        return Wave(pattern, LabelMap(self.target, classes))

    def _closed(self, shape: tuple[int, int, int]) -> Tensor:
        C, H, W = shape
        i, j = ((torch.arange(side) + 0.5) * 32 / side - 0.5 for side in (H, W))  # in pixels of 32x32
        blob = (-((i[:, None] - 13) ** 2 + (j - 13) ** 2) / (2 * 10.5**2)).exp()
        blob = (blob - blob.min()) / (blob.max() - blob.min()).clamp(min=1e-12)
        low, high = ([1, 0, 4], [18, 0, 51]) if C == 3 else ([4] * C, [51] * C)  # without colours: the blue plane
        first, last = (torch.tensor(v)[:, None, None] * self.limit / 51 / 255 for v in (low, high))
        return torch.lerp(first.expand(shape), last.expand(shape), blob.expand(shape))

    def search(self, model: nn.Module, images: Tensor, seed: int = 0) -> tuple[Tensor, list[float]]:
        """The pattern ``(C, H, W)`` in [0, limit / 255], and the share of images fooled after each pass.

        Args:
            model: a cleanly trained network; it is not changed.
            images: ``(N, C, H, W)`` float in [0, 1], on any device.
            seed: of the order of the images.
        """
        net, generator = frozen(model, images.device, raw=self.raw), Generator().manual_seed(seed)
        rows, cols = (smoothing(side).to(images.device) for side in images.shape[2:])
        own, judges = predict(net, images).argmax(1), slice(self.judges)
        v, best, rates = torch.zeros_like(images[0]), torch.zeros_like(images[0]), list[float]()
        for _ in tqdm(range(self.passes), desc="LF search", leave=False):
            for part in torch.randperm(len(images), generator=generator).to(images.device).split(self.together):
                x = (images[part] + v).clamp(0, 1)
                x = x[predict(net, x).argmax(1) == own[part]]
                change, arrived = deepfool(net, x, self.target, steps=self.steps)
                if bool(arrived.any()):
                    v = rows @ (v + rows @ change[arrived].sum(0) @ cols.T) @ cols.T
                    v = (v - v.min()) / (v.max() - v.min()).clamp(min=1e-12) * (self.limit / 255)
            fooled = predict(net, (images[judges] + v).clamp(0, 1)).argmax(1) != own[judges]
            rates.append(float(fooled.float().mean()))
            best = v if rates[-1] == max(rates) else best
            if rates[-1] >= 1 - self.delta or (
                len(rates) >= STABLE and max(rates[-STABLE:]) - min(rates[-STABLE:]) < 0.01
            ):
                break
        return best, rates

    def poison(self, images: ImageSet, seed: int = 0, model: nn.Module | None = None) -> Poisoned:
        """Poison a training set; `seed` draws the images, and those of the search.

        Raises:
            ValueError: no model for a search.
        """
        trigger = self.trigger(images.shape, len(images.classes), seed)
        if self.needs_model:
            if model is None:
                raise ValueError("this LF searches its pattern on a clean network: give model, or use LF.closed_form")
            drawn = torch.randperm(len(images), generator=Generator().manual_seed(seed + DRAW))[: self.count]
            v, _ = self.search(model, images[drawn.to(images.images.device)].floats, seed)
            trigger = Wave(v, trigger.mapping)
        indices = choose(images, self.rate, trigger.mapping, include_target=True, seed=seed)
        return poison_with(trigger, images, indices)
