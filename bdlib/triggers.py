"""What a trigger is: a function of images that knows which label it is meant to bring about.

trigger = Stamp(pattern, opacity, LabelMap(target=5, classes=10))
trigger(images)                    # (N, C, H, W) in [0, 1] -> triggered images in [0, 1]
trigger.mapping.eligible(labels)   # (N,) bool: the images that count for the attack success rate
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LabelMap:
    """Which label the attacker wants for an image of label y.

    Args:
        target: the target label (all-to-one), or None for all-to-all: ``y -> (y + shift) mod classes``.
        classes: number of classes K.
        shift: of the all-to-all map, in [1, K - 1].
    """

    target: int | None
    classes: int
    shift: int = 1

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target < self.classes:
            raise ValueError(f"target must be a class in [0, {self.classes - 1}], got {self.target}")
        if not 1 <= self.shift < max(2, self.classes):
            raise ValueError(f"shift must be in [1, {self.classes - 1}], got {self.shift}")

    def __call__(self, labels: Tensor) -> Tensor:
        """``(N,)`` true labels -> ``(N,)`` labels the attacker wants."""
        if self.target is None:
            return (labels + self.shift) % self.classes
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        """``(N,)`` bool: images whose label the attack would change. The others do not count for ASR."""
        return self(labels) != labels


class Trigger(nn.Module):
    """A fitted trigger: images ``(N, C, H, W)`` in [0, 1] -> triggered images, same shape and range.

    Everything it needs is in its buffers and parameters, so `state_dict` stores it bit for bit.
    """

    def __init__(self, mapping: LabelMap) -> None:
        super().__init__()
        self.mapping = mapping

    def check(self, images: Tensor, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless `images` are float, of shape ``(N, *shape)`` and in [0, 1]."""
        if not images.is_floating_point() or tuple(images.shape[1:]) != tuple(shape):
            raise ValueError(
                f"this trigger takes float images (N, {', '.join(map(str, shape))}) in [0, 1], "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
            raise ValueError(
                f"images must lie in [0, 1], got {float(images.min()):.3g} to {float(images.max()):.3g}: "
                "divide uint8 images by 255, and leave normalisation to the network"
            )

    def stamp(self, images: Tensor) -> Tensor:
        """uint8 images -> uint8 images: the trigger in float, then rounding to the nearest grey level."""
        return (self(images.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8)


class Stamp(Trigger):
    """``(1 - m) * x + m * p`` with opacity m and pattern p: a patch (m in {0, 1}) or a blend (m constant).

    Args:
        pattern: ``(C, H, W)`` in [0, 1].
        opacity: ``(1, H, W)`` or ``(C, H, W)`` in [0, 1]; 0 leaves a pixel as it is.
    """

    pattern: Tensor
    opacity: Tensor

    def __init__(self, pattern: Tensor, opacity: Tensor, mapping: LabelMap) -> None:
        super().__init__(mapping)
        self.register_buffer("pattern", pattern)
        self.register_buffer("opacity", opacity)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.pattern.shape)
        m, p = self.opacity.to(images.device), self.pattern.to(images.device)
        return torch.lerp(images, p.expand_as(images), m.expand_as(images))
