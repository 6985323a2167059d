"""Attacks that poison a share of every batch, other images each time, and leave the rest of training alone.

trigger, log = train(WaNet(target=5), WaNetStep, network, images, recipe, seed=0)
"""

from dataclasses import replace
from typing import Any

from torch import nn

from bdlib.attacks.inside import check_batch
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe, Step, fit
from bdlib.triggers import Trigger


class ShareStep(Step):
    """Knows the attack and its trigger; `change` does the rest.

    Args:
        attack: with ``counts(batch)``, of which the first entry is how many images are poisoned, and `before_augment`.
        trigger: on the device of the images.
    """

    def __init__(self, attack: Any, trigger: Any) -> None:
        self.attack, self.trigger, self.before_augment = attack, trigger, attack.before_augment


def train(
    attack: Any, step: type[ShareStep], model: nn.Module, images: ImageSet, recipe: Recipe, seed: int = 0
) -> tuple[Trigger, list[dict[str, float]]]:
    """Train `model` in place on clean `images`; `seed` draws trigger and batches, and with them who is poisoned.

    Args:
        attack: with rate, counts, trigger, before_augment, and `decay`: False keeps the learning rate at its peak.
        step: what it does to a batch.

    Returns:
        The trigger, on the device of the images, and the log of `bdlib.training.fit`.

    Raises:
        ValueError: a positive rate that selects no image of a batch.
    """
    batch = min(recipe.batch, len(images))
    check_batch("rate", attack.rate, attack.counts(batch)[0], batch)
    trigger = attack.trigger(images.shape, len(images.classes), seed).to(images.images.device)
    recipe = recipe if attack.decay else replace(recipe, schedule="constant")
    log = fit(model, images, recipe, seed=seed, step=step(attack, trigger), note=type(attack).__name__)
    return trigger, log
