"""What all defences share: a model and a clean set go in, a `Repair` comes out.

repair = ANP.small()(victim.model, clean, seed=0)
repair.model, repair.log, repair.details
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bdlib.data.imageset import CleanSet
from bdlib.training import predict


@dataclass(frozen=True)
class Repair:
    """What a defence returns; the network it was given is unchanged.

    Args:
        model: the repaired network, new, in evaluation mode.
        log: one record a step or epoch; keys are named in the defence's docstring.
        details: what a chapter draws (masks, threshold, snapshots ...); keys are named in the defence's docstring.
        seconds: wall time of the defence itself, without any scoring.
    """

    model: nn.Module
    log: list[dict[str, float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def check_inputs(model: nn.Module, clean: CleanSet) -> None:
    """Refuse what no defence can work with.

    Raises:
        ValueError: a network that already holds NaN or infinity; fewer than two clean images of a class; a network and
            images that do not belong together (device, image shape, number of classes).
    """
    images, classes = clean.images, clean.images.classes
    device = next((t.device for t in (*model.parameters(), *model.buffers())), images.images.device)
    if device != images.images.device:
        raise ValueError(f"model on {device}, clean images on {images.images.device}: move one with .to()")
    if broken := [n for n, t in model.state_dict().items() if not bool(t.isfinite().all())]:
        raise ValueError(f"{broken[0]} of the network holds NaN or infinity before step 1: load or train it again")
    counts = torch.bincount(images.labels, minlength=len(classes))
    if int(counts.min()) < 2:
        k = int(counts.argmin())
        raise ValueError(
            f"a defence needs 2 clean images or more of every class, got {int(counts[k])} of {classes[k]!r}"
        )
    if (outputs := predict(model, images.images[:1]).shape[1]) < len(classes):
        raise ValueError(f"the network tells {outputs} classes apart, the clean set {images.name} has {len(classes)}")


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """A generator on `device` that starts from `seed`."""
    return torch.Generator(device).manual_seed(seed)
