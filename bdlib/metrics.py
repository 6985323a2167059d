"""The field's metrics, with the field's exact exclusions.

scores = evaluate(model, test, trigger)     # Scores(acc=0.97, asr=1.0, ra=0.0, ...)
der(before, after)                          # one number for a repair
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bdlib.data.imageset import ImageSet
from bdlib.training import predict
from bdlib.triggers import Trigger


@dataclass(frozen=True)
class Scores:
    """What an attack achieves on a network; all shares are in [0, 1].

    Args:
        acc: clean accuracy (ACC): share of *all* clean test images classified correctly, target class included.
        asr: attack success rate (ASR): share of the triggered images predicted as the attack's label; images that
            bear that label already are left out.
        ra: robust accuracy (RA): share of the same triggered images predicted as what they show.
        target_acc: clean accuracy on the target class alone (a network can reach ASR 0 by never saying "target");
            for all-to-all attacks it equals `acc`.
        triggered: number of triggered images behind `asr` and `ra`.
    """

    acc: float
    asr: float
    ra: float
    target_acc: float
    triggered: int

    def asdict(self) -> dict[str, float]:
        """The fields as plain numbers, for a record."""
        return asdict(self)


def accuracy(model: nn.Module, data: ImageSet, *, batch: int | None = None) -> float:
    """Share of the images classified correctly, in [0, 1].

    Args:
        batch: images a pass, see `bdlib.training.predict`.

    Raises:
        ValueError: an empty set.
    """
    if len(data) == 0:
        raise ValueError("accuracy of an empty image set is undefined")
    return float((predict(model, data.images, batch=batch).argmax(1) == data.labels).float().mean())


def triggered_images(test: ImageSet, trigger: Trigger) -> tuple[Tensor, Tensor]:
    """The test images that count for ASR, with the trigger, and their true labels.

    Returns:
        images ``(M, C, H, W)`` uint8, rounded as a stored picture is, and labels ``(M,)``.

    Raises:
        ValueError: no image is left, e.g. a test set that holds only the target class.
    """
    keep = trigger.mapping.eligible(test.labels)
    if not bool(keep.any()):
        raise ValueError(f"no test image counts for ASR under {trigger.mapping}: all bear the attack's label already")
    return trigger.stamp(test.images[keep]), test.labels[keep]


def evaluate(model: nn.Module, test: ImageSet, trigger: Trigger, *, batch: int | None = None) -> Scores:
    """ACC, ASR and RA of a network under an attack. Introduced in chapter "What is a backdoor?".

    Args:
        model: classifier of ``(N, C, H, W)`` in [0, 1].
        test: clean test images; a defence never sees them.
        trigger: a fitted trigger, with its label map.
        batch: images a pass, see `bdlib.training.predict`.

    Returns:
        `Scores`. For all-to-one attacks ASR and RA leave out the images of the target class (BackdoorBench @ f02e353;
        CIFAR-10: 9,000 of 10,000); for all-to-all attacks they use every image.
    """
    images, labels = triggered_images(test, trigger)
    clean = predict(model, test.images, batch=batch).argmax(1)
    fooled = predict(model, images, batch=batch).argmax(1)
    right, target = clean == test.labels, trigger.mapping.target
    in_target = test.labels == target if target is not None else torch.ones_like(right)
    return Scores(
        acc=float(right.float().mean()),
        asr=float((fooled == trigger.mapping(labels)).float().mean()),
        ra=float((fooled == labels).float().mean()),
        target_acc=float(right[in_target].float().mean()) if bool(in_target.any()) else float("nan"),
        triggered=len(labels),
    )


def der(before: Scores, after: Scores) -> float:
    """Defence effectiveness rating in [0, 1]: 0.5 is "nothing gained", 1 a full repair at no cost.

    ``(max(0, ASR_before - ASR_after) - max(0, ACC_before - ACC_after) + 1) / 2`` (FT-SAM, ICCV'23, eq. 7). The array
    version of BackdoorBench adds the accuracy drop by mistake; the paper subtracts it, as here.
    """
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2
