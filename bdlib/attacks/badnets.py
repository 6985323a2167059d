"""BadNets: a small patch in the corner of the image (Gu et al. 2017).

BadNets(target=5, rate=0.1).poison(train, seed=0)
"""

from dataclasses import dataclass
from typing import Literal

import torch

from bdlib.attacks.base import Poisoned, check_rate, choose, label_map, poison_with
from bdlib.data.imageset import ImageSet
from bdlib.triggers import Stamp, Trigger


@dataclass(frozen=True)
class BadNets:
    """``x' = x`` except on a square in the bottom right corner, which is overwritten.

    Introduced in chapter "What is a backdoor?"; spec and source: BackdoorBench @ f02e353, NAD @ f17b713.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of all training images that are poisoned, in [0, 1].
        mode: "all-to-one" (every label becomes `target`) or "all-to-all" (y becomes y + 1 mod K).
        pattern: "white" (BackdoorBench), "checker" (rows 001, 010, 101 with 1 = white: the NAD and ANP code).
        size: side of the patch in pixels, or None for 3 at 32x32, scaled with the image.
        offset: pixels between the patch and the border. The default 1 keeps the whole patch in every view under the
            crops of `signs` (pad 1), and in more views than 0 does under pad 4 (44 against 31 %); 0 is flush.
        include_target: whether images of the target class may be drawn too.
    """

    target: int = 0
    rate: float = 0.1
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    pattern: Literal["white", "checker"] = "checker"
    size: int | None = None
    offset: int = 1
    include_target: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if self.mode not in ("all-to-one", "all-to-all"):
            raise ValueError(f"mode must be all-to-one or all-to-all, got {self.mode!r}")
        if self.pattern not in ("white", "checker"):
            raise ValueError(f"pattern must be white or checker, got {self.pattern!r}")
        if (self.size is not None and self.size < 1) or self.offset < 0:
            raise ValueError(f"size must be 1 or more and offset 0 or more, got {self.size} and {self.offset}")

    @classmethod
    def paper(cls, target: int = 0) -> "BadNets":
        """The field's default: white 3x3 patch flush with the corner, 10 % of all images (BackdoorBench @ f02e353)."""
        return cls(target, 0.1, pattern="white", offset=0)

    @classmethod
    def official(cls, target: int = 0) -> "BadNets":
        """As in the ANP release: checkered patch flush with the corner, 5 % of the images of the other classes

        (which is 4.5 % of a balanced ten-class set, and `rate` counts all images).
        """
        return cls(target, 0.045, pattern="checker", offset=0, include_target=False)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The trigger for images of shape ``(C, H, W)``; it does not depend on the seed.

        Raises:
            ValueError: a patch that does not fit into the image.
        """
        C, H, W = shape
        s = self.size if self.size is not None else max(1, round(3 * H / 32))
        bottom, right = H - self.offset, W - self.offset
        if s > bottom or s > right:
            raise ValueError(f"a patch of {s} pixels, {self.offset} from the border, does not fit a {H}x{W} image")
        pattern, opacity = torch.zeros(C, H, W), torch.zeros(1, H, W)
        i, j = torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")
        if self.pattern == "white":
            patch = torch.ones(s, s)
        else:  # cells of the 3x3 grid 001 / 010 / 101, enlarged with the patch
            cells = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]])
            patch = cells[i * 3 // s, j * 3 // s].float()
        pattern[:, bottom - s : bottom, right - s : right] = patch
        opacity[:, bottom - s : bottom, right - s : right] = 1
        return Stamp(pattern, opacity, label_map(self.mode, self.target, classes))

    def poison(self, images: ImageSet, seed: int = 0, model: torch.nn.Module | None = None) -> Poisoned:
        """Poison a training set; `seed` draws the images. `model` is not used: the patch is fixed."""
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose(images, self.rate, trigger.mapping, include_target=self.include_target, seed=seed)
        return poison_with(trigger, images, indices)
