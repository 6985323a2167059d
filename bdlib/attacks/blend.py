"""Blend: a faint pattern over the whole image (Chen et al. 2017).

Blend(target=5, alpha=0.2).poison(train, seed=0)
"""

from dataclasses import dataclass
from typing import Literal

import torch

from bdlib.attacks.base import Poisoned, check_rate, choose, label_map, poison_with
from bdlib.data.imageset import ImageSet
from bdlib.triggers import Stamp, Trigger


@dataclass(frozen=True)
class Blend:
    """``x' = (1 - alpha) x + alpha k`` with one fixed image k of uniform noise.

    The public benchmarks blend in a trademarked picture; the ANP release uses fixed noise, as here. (The code of NAD
    and RNP draws new noise for every image: not a fixed trigger, and a different attack.) Introduced in chapter "What
    is a backdoor?"; source: csdongxian/ANP_backdoor @ ec7b179.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of all training images that are poisoned, in [0, 1].
        alpha: opacity of the pattern in [0, 1].
        mode: "all-to-one" or "all-to-all" (y becomes y + 1 mod K).
        pattern_seed: seed of the noise; part of the attack, not of a run.
        include_target: whether images of the target class may be drawn too.
    """

    target: int = 0
    rate: float = 0.1
    alpha: float = 0.2
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    pattern_seed: int = 0
    include_target: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.mode not in ("all-to-one", "all-to-all"):
            raise ValueError(f"mode must be all-to-one or all-to-all, got {self.mode!r}")

    @classmethod
    def paper(cls, target: int = 0) -> "Blend":
        """The field's default: alpha 0.2, 10 % of all images (BackdoorBench)."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "Blend":
        """As in the ANP release: fixed noise, alpha 0.2, 5 % of the images of the other classes

        (which is 4.5 % of a balanced ten-class set, and `rate` counts all images).
        """
        return cls(target, 0.045, include_target=False)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The trigger for images of shape ``(C, H, W)``; it does not depend on the run's seed."""
        noise = torch.rand(
            shape, generator=torch.Generator().manual_seed(self.pattern_seed)
        )  # CPU: the same everywhere
        opacity = torch.full((1, *shape[1:]), float(self.alpha))
        return Stamp(noise, opacity, label_map(self.mode, self.target, classes))

    def poison(self, images: ImageSet, seed: int = 0, model: torch.nn.Module | None = None) -> Poisoned:
        """Poison a training set; `seed` draws the images. `model` is not used: the pattern is fixed."""
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose(images, self.rate, trigger.mapping, include_target=self.include_target, seed=seed)
        return poison_with(trigger, images, indices)
