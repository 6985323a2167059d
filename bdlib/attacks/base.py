"""What all attacks share: which images to poison, and the poisoned set.

attack = BadNets(target=5, rate=0.1)
poisoned = attack.poison(train, seed=0)      # Poisoned(data, indices, cover, trigger)
poisoned.trigger(images)                     # (N, C, H, W) in [0, 1] -> the same images, triggered
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from bdlib.data.imageset import ImageSet
from bdlib.triggers import LabelMap, Trigger


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set and all that is known about it.

    Args:
        data: the set to train on, images uint8 with triggers in place, labels as the attacker wants them.
        indices: ``(K,)`` int64, the poisoned images.
        cover: ``(J,)`` int64, images with trigger and true label (adaptive attacks), usually empty.
        trigger: the fitted trigger, to be scored on test images.
    """

    data: ImageSet
    indices: Tensor
    cover: Tensor
    trigger: Trigger

    @property
    def mapping(self) -> LabelMap:
        """The attack's label map."""
        return self.trigger.mapping


def check_rate(rate: float) -> None:
    """Raises ValueError unless `rate` is a share in [0, 1]."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1] (share of all images), got {rate}")


def check_class_rate(class_rate: float, whole_class: bool) -> None:
    """Raises ValueError unless `class_rate` is in [0, 1], and below 1 or meant to be 1."""
    if not 0 <= class_rate <= 1:
        raise ValueError(f"class_rate must be in [0, 1] (share of the target class), got {class_rate}")
    if class_rate == 1 and not whole_class:
        raise ValueError(
            "class_rate 1 leaves no clean image of the target class to learn from; "
            "choose less, or say whole_class=True to go on"
        )


def label_map(mode: Literal["all-to-one", "all-to-all"], target: int, classes: int) -> LabelMap:
    """The label map of an attack with these fields on a set with this many classes."""
    return LabelMap(target if mode == "all-to-one" else None, classes)


def choose(images: ImageSet, rate: float, mapping: LabelMap, *, include_target: bool, seed: int) -> Tensor:
    """Draw the images to poison: ``round(rate * N)`` of all images, uniformly.

    Args:
        include_target: whether images that bear the target label already may be drawn (BackdoorBench: yes; the
            ANP code: no). Such an image gets the trigger and keeps its label.

    Returns:
        ``(K,)`` int64 indices, sorted, on the images' device.

    Raises:
        ValueError: a positive rate that selects no image, or more images than may be drawn.
    """
    n = round(rate * len(images))
    if rate > 0 and n == 0:
        raise ValueError(
            f"rate {rate} selects no image of {len(images)}; the smallest that does is {1 / len(images):.2g}"
        )
    labels = images.labels.cpu()
    allowed = torch.arange(len(images)) if include_target else mapping.eligible(labels).nonzero()[:, 0]
    if n > len(allowed):
        raise ValueError(f"rate {rate} asks for {n} images, but only {len(allowed)} may be poisoned")
    order = torch.randperm(len(allowed), generator=Generator().manual_seed(seed))[:n]
    return allowed[order].sort().values.to(images.images.device)


def choose_class(images: ImageSet, class_rate: float, target: int, *, seed: int) -> Tensor:
    """Draw what a clean-label attack poisons: ``round(class_rate * n)`` of the n images of the target class.

    Returns:
        ``(K,)`` int64 indices, sorted, on the images' device.

    Raises:
        ValueError: a positive rate that selects no image.
    """
    own = (images.labels.cpu() == target).nonzero()[:, 0]
    count = round(class_rate * len(own))
    if class_rate > 0 and count == 0:
        raise ValueError(f"class_rate {class_rate} selects none of the {len(own)} images of the target class")
    order = torch.randperm(len(own), generator=Generator().manual_seed(seed))[:count]
    return own[order].sort().values.to(images.images.device)


def poison_with(trigger: Trigger, images: ImageSet, indices: Tensor) -> Poisoned:
    """Write the trigger into the images at `indices` and the wanted labels beside them, on a copy."""
    x, y = images.images.clone(), images.labels.clone()
    for part in indices.split(8192):
        x[part] = trigger.stamp(x[part])
        y[part] = trigger.mapping(y[part])
    return Poisoned(replace(images, images=x, labels=y), indices, indices[:0], trigger.to(x.device))
