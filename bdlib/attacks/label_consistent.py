"""CL, label-consistent: images of the target class made hard to recognise, then marked (Turner et al. 2019).

CL(target=5, class_rate=0.5).poison(train, seed=0)      # trains a small robust network on the way
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdlib.attacks.base import Poisoned, check_class_rate, choose_class, poison_with
from bdlib.attacks.sig import Wave
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.models import BasicBlock, ResNet, normalized
from bdlib.training import Recipe, Step, evaluating, fit
from bdlib.triggers import LabelMap, Stamp, Trigger

CELLS = ((1, 0, 0), (0, 1, 0), (1, 0, 1))  # as it stands in the left corners; mirrored in the right ones
ROBUST_EPSILON = 8.0  # what the robust network withstands, in grey levels of 255


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step: float,
    iterations: int,
    norm: Literal["linf", "l2"] = "linf",
    generator: Generator | None = None,
) -> Tensor:
    """Climb the loss of the true labels, never further than `epsilon` from the images (Madry et al. 2018).

    Args:
        model: used in evaluation mode, and left as it was.
        images: ``(N, C, H, W)`` in [0, 1]; labels: ``(N,)``.
        epsilon, step: bound and step length, in pixel values of [0, 1], in the given norm (of a whole image for "l2").
        generator: start at a random place of the L-infinity ball; None starts at the images.

    Returns:
        ``(N, C, H, W)`` in [0, 1].
    """
    x = images
    if generator is not None:
        noise = torch.rand(images.shape, generator=generator, device=images.device)
        x = (images + epsilon * (2 * noise - 1)).clamp(0, 1)
    with evaluating(model):
        for _ in range(iterations):
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(model(x), labels, reduction="sum")  # a sum: each image has its own gradient
            (g,) = torch.autograd.grad(loss, x)
            if norm == "linf":
                change = (x.detach() + step * g.sign() - images).clamp(-epsilon, epsilon)
            else:
                change = x.detach() + step * _unit(g) - images
                change = _unit(change) * _length(change).clamp(max=epsilon)
            x = (images + change).clamp(0, 1)  # moves towards the images, which lie in the box: stays in the ball
    return x.detach()


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def _unit(x: Tensor) -> Tensor:
    return x / _length(x).clamp(min=1e-12)


class Adversarial(Step):
    """Each batch is replaced by what PGD makes of it: from a random start, twice `epsilon` in `steps` steps."""

    def __init__(self, model: nn.Module, epsilon: float, steps: int) -> None:
        self.model, self.epsilon, self.steps = model, epsilon, steps

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        if self.steps == 0:
            return images, labels
        e, n = self.epsilon, self.steps
        return pgd(self.model, images, labels, epsilon=e, step=2 * e / n, iterations=n, generator=generator), labels


@dataclass(frozen=True)
class CL:
    """``x' = stamp(x + d)`` on images of the target class, labels unchanged; when it is used, the stamp alone.

    d climbs the loss of a network that was trained adversarially: such a network can only be fooled by changing what
    the class looks like, so that the victim finds nothing to learn from but the stamp. Perturbations of an ordinary
    network do not transfer (ASR about 25 % at half the class, BackdoorBox issue 113). The robust network is trained
    here, on the run's own images, instead of being downloaded (our stand-in for the published perturbations).
    Source: MadryLab/label-consistent-backdoor-code @ b18d8ab.

    Args:
        target: the class whose images are poisoned, and that the stamp later brings about.
        class_rate: share of the *target class* that is poisoned, in [0, 1).
        epsilon: bound of the perturbation, in grey levels of 255 ("linf": a pixel's; "l2": the length of the image's).
        step, iterations: of PGD, in the same unit.
        norm: "linf" or "l2".
        corners: "all" (the pattern in four corners, the right ones mirrored, so that flipping changes nothing) or
            "bottom-right" (the checkered patch of BadNets).
        amplitude: None overwrites the corners with black and white; else this many grey levels of 255 are added where
            the pattern is white and taken where it is black.
        size, offset: side of a corner's pattern in pixels (None: 3 at 32x32, scaled) and its distance from the border.
        width: of the robust network, whose stages have once, twice and four times as many channels; a multiple of 8.
        robust_epochs: how long it is trained.
        robust_steps: PGD steps a batch against 8/255; 0 trains an ordinary network.
        whole_class: allow a `class_rate` of 1.
    """

    target: int = 0
    class_rate: float = 0.5
    epsilon: float = 8.0
    step: float = 1.5
    iterations: int = 100
    norm: Literal["linf", "l2"] = "linf"
    corners: Literal["all", "bottom-right"] = "all"
    amplitude: float | None = None
    size: int | None = None
    offset: int = 0
    width: int = 16
    robust_epochs: int = 10
    robust_steps: int = 7
    whole_class: bool = False

    def __post_init__(self) -> None:
        check_class_rate(self.class_rate, self.whole_class)
        levels = "in [0, 255] grey levels"
        checks = {
            "epsilon": (self.epsilon >= 0 and (self.norm == "l2" or self.epsilon <= 255), f"{levels}; l2: a length"),
            "step": (self.step >= 0, "0 or more grey levels"),
            "iterations": (self.iterations >= 0, "0 or more"),
            "norm": (self.norm in ("linf", "l2"), "linf or l2"),
            "corners": (self.corners in ("all", "bottom-right"), "all or bottom-right"),
            "amplitude": (self.amplitude is None or 0 <= self.amplitude <= 255, f"None or {levels}"),
            "size": (self.size is None or self.size >= 1, "1 or more pixels"),
            "offset": (self.offset >= 0, "0 or more pixels"),
            # torch 2.14 on an AMD processor corrupts memory in the backward pass of channels-last convolutions of 4
            "width": (self.width >= 8 and self.width % 8 == 0, "a multiple of 8 channels"),
            "robust_epochs": (self.robust_epochs >= 0, "0 or more"),
            "robust_steps": (self.robust_steps >= 0, "0 or more"),
        }  # fmt: skip
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "CL":
        """The field's default: 8/255 in 100 steps of 1.5/255, all four corners, half the target class.

        (BackdoorBench @ f02e353 generates so, and its 5 % of all images is half a class of CIFAR-10.)
        """
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "CL":
        """As the release is configured: length 300 in L2, the bottom right corner, the whole target class.

        How its perturbations were computed was not found; step and iterations are ours.
        """
        return cls(target, 1.0, epsilon=300, step=7.5, norm="l2", corners="bottom-right", whole_class=True)

    @classmethod
    def small(cls, target: int = 0) -> "CL":
        """For the book's small scale, settled on seed 0: four times the perturbation, corners that no crop cuts.

        (At 16/255 half the class plants the stamp in a third of the images only.) The robust network is cheaper.
        """
        return cls(target, epsilon=32, step=4, iterations=20, offset=1, robust_epochs=8, robust_steps=2)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The stamp for images of shape ``(C, H, W)``; it does not depend on the seed.

        Raises:
            ValueError: patterns that do not fit into the image, or that would overlap.
        """
        C, H, W = shape
        s = self.size if self.size is not None else max(1, round(3 * H / 32))
        patches = 2 if self.corners == "all" else 1
        if patches * (s + self.offset) > min(H, W):
            raise ValueError(f"patterns of {s} pixels, {self.offset} from the border, do not fit a {H}x{W} image")
        i = torch.arange(s) * 3 // s  # the 3x3 cells, enlarged with the pattern
        left = torch.tensor(CELLS)[i][:, i].float()
        pattern, opacity = torch.zeros(C, H, W), torch.zeros(1, H, W)
        top, bottom = slice(self.offset, self.offset + s), slice(H - self.offset - s, H - self.offset)
        west, east = slice(self.offset, self.offset + s), slice(W - self.offset - s, W - self.offset)
        places = (
            [(bottom, east)]
            if self.corners == "bottom-right"
            else [(r, c) for r in (top, bottom) for c in (west, east)]
        )
        for rows, columns in places:
            pattern[:, rows, columns] = left.flip(1) if columns == east else left
            opacity[:, rows, columns] = 1
        mapping = LabelMap(self.target, classes)
        if self.amplitude is None:
            return Stamp(pattern, opacity, mapping)
        return Wave(self.amplitude / 255 * (2 * pattern - 1) * opacity, mapping)

    def robust(self, images: ImageSet, seed: int = 0) -> nn.Module:
        """The small adversarially trained network against which `poison` perturbs, in evaluation mode."""
        w, (mean, std) = self.width, images.stats()
        with torch.random.fork_rng(devices=[]):  # no trace in the caller's random state
            torch.default_generator.manual_seed(seed)
            net = ResNet(
                BasicBlock, (w, 2 * w, 4 * w), (1,) * 3, (2, 2, 2), len(images.classes), images.shape[0],
                stem_width=w, stem_stride=2,
            )  # fmt: skip
        model = normalized(net, mean, std).to(images.images.device)
        step = Adversarial(model, ROBUST_EPSILON / 255, self.robust_steps)
        fit(model, images, Recipe(self.robust_epochs, lr=0.1), seed=seed, step=step, note="robust network of CL")
        return model

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """uint8 images ``(N, C, H, W)`` -> harder ones, uint8, within `epsilon` (up to rounding, in L2)."""
        e, step = self.epsilon / 255, self.step / 255
        parts = [
            pgd(model, x.float() / 255, y, epsilon=e, step=step, iterations=self.iterations, norm=self.norm)
            for x, y in zip(images.split(500), labels.split(500))
        ]
        if not parts or e == 0:
            return images.clone()
        return (torch.cat(parts) * 255).round().to(torch.uint8)

    def poison(self, images: ImageSet, seed: int = 0, model: nn.Module | None = None) -> Poisoned:
        """Poison images of the target class.

        Args:
            images: the clean training set.
            seed: draws the images and trains the robust network.
            model: a robust network of your own, by default `robust` of the images.

        Raises:
            ValueError: a positive rate that selects no image.
        """
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose_class(images, self.class_rate, self.target, seed=seed)
        harder = images.images.clone()
        if len(indices):
            model = self.robust(images, seed) if model is None else model
            harder[indices] = self.perturb(model, harder[indices], images.labels[indices])
        return poison_with(trigger, replace(images, images=harder), indices)
