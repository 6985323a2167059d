"""SIG: a faint sine over the whole image, without touching a label (Barni et al. 2019).

SIG(target=5, class_rate=0.5).poison(train, seed=0)
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdlib.attacks.base import Poisoned, check_class_rate, choose_class, poison_with
from bdlib.data.imageset import ImageSet
from bdlib.triggers import LabelMap, Stamp, Trigger


class Wave(Trigger):
    """``clip(x + s_j)``: the same value added to a whole column of pixels, in every channel.

    Args:
        wave: ``(C, H, W)``, in pixel values of [0, 1].
    """

    wave: Tensor

    def __init__(self, wave: Tensor, mapping: LabelMap) -> None:
        super().__init__(mapping)
        self.register_buffer("wave", wave)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.wave.shape)
        return (images + self.wave.to(images.device)).clamp(0, 1)


@dataclass(frozen=True)
class SIG:
    """``x' = clip(x + (delta / 255) sin(2 pi j f / W))`` in column j, on images of the target class, labels unchanged.

    A clean-label attack: every poisoned image shows what its label says, and the network learns that the wave means
    the target class. Introduced in chapter "RNP"; source: BackdoorBench @ f02e353.

    Args:
        target: the class whose images are poisoned, and that the wave later brings about.
        class_rate: share of the *target class* that is poisoned, in [0, 1). Benchmarks count differently: their 5 % of
            all images is half the target class of CIFAR-10, and their 10 % is the whole class, after which the network
            has never seen a clean target image and a tenth of its accuracy is gone.
        delta: amplitude while training, in grey levels of 255.
        test_delta: amplitude when the trigger is used; None is the same. (The paper allows a weaker one in training.)
        frequency: periods over the width of the image.
        wrapped: the wave as the NAD and RNP code ship it: ``trunc(20 sin(0.8 j))`` kept in unsigned bytes, so that its
            negative half is 236 to 255, and mixed in at 0.2: a square grating, not a sine. `delta` and `frequency` do
            not apply.
        whole_class: allow a `class_rate` of 1.
    """

    target: int = 0
    class_rate: float = 0.5
    delta: float = 40.0
    test_delta: float | None = None
    frequency: float = 6.0
    wrapped: bool = False
    whole_class: bool = False

    def __post_init__(self) -> None:
        check_class_rate(self.class_rate, self.whole_class)
        for name in ("delta", "test_delta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 255:
                raise ValueError(f"{name} must be in [0, 255] grey levels, got {value}")
        if self.frequency <= 0:
            raise ValueError(f"frequency must be above 0 periods a width, got {self.frequency}")

    @classmethod
    def paper(cls, target: int = 0) -> "SIG":
        """The field's default: amplitude 40, six periods; half the target class (5 % of CIFAR-10, BackdoorBench)."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "SIG":
        """What the NAD and RNP code poison with: the wrapped grating (NAD @ f17b713). Its share was not found."""
        return cls(target, wrapped=True)

    @classmethod
    def small(cls, target: int = 0) -> "SIG":
        """For the book's small network, settled on seed 0: a wave twice as strong when used, as the paper allows.

        At the same strength half the class plants it in two images of five only.
        """
        return cls(target, test_delta=80.0)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The trigger at test strength, for images of shape ``(C, H, W)``; it does not depend on the seed.

        Raises:
            ValueError: a wave too fine for the width: at half the width every column would be 0.
        """
        if not self.wrapped and 2 * self.frequency >= shape[2]:
            raise ValueError(f"frequency must be below {shape[2] / 2:g}, half the width, got {self.frequency:g}")
        columns = torch.arange(shape[2], dtype=torch.float64)
        mapping = LabelMap(self.target, classes)
        if self.wrapped:
            shipped = (20 * torch.sin(0.8 * columns)).trunc().remainder(256) / 255
            pattern = shipped.float().expand(shape).contiguous()
            return Stamp(pattern, torch.full((1, *shape[1:]), 0.2), mapping)
        delta = self.delta if self.test_delta is None else self.test_delta
        wave = delta / 255 * torch.sin(2 * math.pi * columns * self.frequency / shape[2])
        return Wave(wave.float().expand(shape).contiguous(), mapping)

    def poison(self, images: ImageSet, seed: int = 0, model: torch.nn.Module | None = None) -> Poisoned:
        """Poison images of the target class; `seed` draws them. `model` is not used: the wave is fixed.

        Raises:
            ValueError: a positive rate that selects no image.
        """
        trigger = self.trigger(images.shape, len(images.classes), seed)
        weaker = replace(self, test_delta=None).trigger(images.shape, len(images.classes), seed)
        indices = choose_class(images, self.class_rate, self.target, seed=seed)
        poisoned = poison_with(weaker, images, indices)
        return replace(poisoned, trigger=trigger.to(images.images.device))
