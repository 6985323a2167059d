"""NAD: neural attention distillation (Li et al., ICLR 2021).

repair = NAD.small()(model, clean, seed=0)
repair.details["teacher"], repair.details["stages"]
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.checks import require
from bdlib.data.imageset import CleanSet
from bdlib.defenses.base import Repair, check_inputs
from bdlib.training import Recipe, Step, evaluating, fit

EPS = 1e-6  # keeps an all-zero map finite


def attention(features: Tensor, p: float = 2.0) -> Tensor:
    """Where a layer looks: ``sum_c |F_c|^p`` at each position, as a unit vector.

    Dividing by the number of channels instead (the paper's mean variant) gives the same unit vector.

    Args:
        features: ``(B, C, H, W)``.
        p: power, above 0; larger ones favour the strongest channels.

    Returns:
        ``(B, H * W)``, 0 or more, of 2-norm 1 per image.
    """
    energy = features.abs().pow(p).sum(1).flatten(1)
    return energy / (energy.norm(dim=1, keepdim=True) + EPS)


def attention_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """Mean squared difference of two attention maps over images and positions, as the released code takes it.

    It equals ``mean(2 - 2 cos) / (H W)``, so it is at most ``2 / (H W)``: the same beta means a quarter when the image
    is twice as wide. (The paper is understood to take the 2-norm of the difference; its text was not at hand.)
    """
    return F.mse_loss(attention(student, p), attention(teacher, p))


def stage_sizes(model: nn.Module, example: Tensor) -> dict[str, tuple[int, int]]:
    """Name and map size ``(H, W)`` of every module whose output is a feature map ``(1, C, H, W)``, in order of use."""
    sizes: dict[str, tuple[int, int]] = {}

    def tap(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                sizes.pop(name, None)
                sizes[name] = (output.shape[2], output.shape[3])

        return hook

    handles = [m.register_forward_hook(tap(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def find_stages(model: nn.Module, example: Tensor, count: int = 3) -> list[str]:
    """The module that ends each resolution, for the coarsest `count` resolutions of at least four positions.

    These are the residual groups of a wide ResNet, the stages of the small network, the last layers before the poolings
    of a VGG. A map of one position is 1 whatever the network sees, so NAD on it is fine-tuning (much of NAD in public
    benchmarks is); so is a map that a pooling layer enlarges again, and it is left out too.

    Args:
        example: one image ``(1, C, H, W)`` in [0, 1].

    Raises:
        ValueError: a network without a map of four positions.
    """
    ends: dict[tuple[int, int], str] = {}
    for name, size in stage_sizes(model, example).items():
        finest = min((h * w for h, w in ends), default=size[0] * size[1])
        whole = any(True for _ in model.get_submodule(name).children())
        was_whole = size in ends and any(True for _ in model.get_submodule(ends[size]).children())
        if 4 <= size[0] * size[1] <= finest and (whole or not was_whole):  # a whole stage before a layer in it
            ends[size] = name
    if not ends:
        raise ValueError(
            f"{type(model).__name__} has no feature map with four positions or more, so it has no attention to "
            "distil; use larger images, or FT"
        )
    return list(ends.values())[-count:]


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that the next forward pass fills with the outputs of the named modules, ``{name: (B, C, H, W)}``."""
    maps: dict[str, Tensor] = {}

    def tap(name: str) -> Any:
        return lambda module, inputs, output: maps.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(tap(name)) for name in names]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


class _Distil(Step):
    """Cross-entropy plus the weighted attention losses of the tapped stages."""

    def __init__(self, nad: "NAD", teacher: nn.Module, names: list[str], betas: list[float]) -> None:
        self.nad, self.teacher, self.names, self.betas = nad, teacher, names, betas
        self.total, self.steps = torch.zeros(()), 0

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        with tapped(model, self.names) as of_student:
            logits = model(images)
        with torch.no_grad(), tapped(self.teacher, self.names) as of_teacher:
            self.teacher(images)
        parts = [
            beta * attention_loss(of_student[n].float(), of_teacher[n].float(), self.nad.p)
            for n, beta in zip(self.names, self.betas, strict=True)
        ]
        distance = torch.stack(parts).sum()
        self.total, self.steps = self.total.to(distance.device) + distance.detach(), self.steps + 1
        if self.nad.detached:
            distance = distance.detach()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing) + distance, logits


@dataclass(frozen=True)
class NAD:
    """Fine-tune a copy of the network, then fine-tune the network itself with that copy's attention as a second label.

    ``L = CE(student(x), y) + sum_l beta_l AT_l(student(x), teacher(x))``, the teacher being the same backdoored network
    after plain fine-tuning on the same clean images, frozen and in evaluation mode. Introduced in chapter "NAD"; from
    bboylyg/NAD @ f17b713. Weight decay and betas of the paper were not found; those of the code stand here.

    Args:
        teacher: how the teacher is fine-tuned.
        student: how the student is, both from the weights of the victim.
        betas: weight of each stage's attention loss, from the first to the last.
        stages: names of the modules whose outputs are compared; None finds them, see `find_stages`.
        p: power in the attention map.
        rescale: multiply beta by ``H W / (the map size it was settled for)``, so that it means the same on other image
            sizes. The sizes are those of a WRN-16-1 on 32x32 images: 32, 16 and 8 on a side.
        cutout: erase a square of this many pixels in every training image (the released code asks for a length of 3,
            and its integer half-length makes that 2 x 2); 0 erases nothing.
        detached: cut the gradient of the attention loss, as the first year of the released code did: what remains is
            fine-tuning.
    """

    teacher: Recipe = field(default_factory=lambda: _recipe(10))
    student: Recipe = field(default_factory=lambda: _recipe(20))
    betas: tuple[float, ...] = (500, 1000, 1000)
    stages: tuple[str, ...] | None = None
    p: float = 2.0
    rescale: bool = True
    cutout: int = 2
    detached: bool = False

    def __post_init__(self) -> None:
        checks = {
            "betas": (bool(self.betas) and all(b >= 0 for b in self.betas), "one or more numbers of 0 or more"),
            "p": (self.p > 0, "above 0"),
            "cutout": (self.cutout >= 0, "0 or more"),
            "stages": (
                self.stages is None or len(self.stages) == len(self.betas),
                f"{len(self.betas)} names, one for each beta, or None",
            ),
        }
        require(self, checks)

    @classmethod
    def paper(cls) -> "NAD":
        """Ten epochs, learning rate 0.1 divided by 10 every two (a comment in the backdoor-toolbox; not in the paper
        as far as it was readable), batch 64, 5 % of the training set.
        """
        every_two = Recipe(10, 64, 0.1, 0.9, 1e-4, schedule="milestones", milestones=(2, 4, 6, 8))
        return cls(teacher=every_two, student=every_two)

    @classmethod
    def official(cls) -> "NAD":
        """The released code since January 2022: 20 epochs at 0.1 for two and 0.01 for the rest; betas as they are."""
        return cls(rescale=False)

    @classmethod
    def first_release(cls) -> "NAD":
        """The code of the first year: the attention loss was computed, logged and cut off from every gradient."""
        return replace(cls.official(), betas=(0.0, 0.0, 5000.0), detached=True)

    @classmethod
    def small(cls) -> "NAD":
        """For the book's small network, settled on seeds 0 and 1: the released peak rate, on a cosine."""
        recipe = Recipe(20, 64, 0.1, 0.9, 5e-4, schedule="cosine")
        return cls(teacher=replace(recipe, epochs=10), student=recipe, cutout=0)

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Make the teacher, then distil, both on all clean images: NAD chooses no threshold.

        Args:
            model: any network with feature maps of at least four positions; it is not changed.
            clean: the defender's images.
            seed: of batches and augmentation, the same for teacher and student.
            keep_every: keep a copy of the student every so many epochs in ``details["snapshots"]``; 0 keeps none.

        Returns:
            `Repair` with the log of `bdlib.training.fit` for the student, each record with `attention` (mean over the
            epoch of the weighted attention losses), and details: teacher (network), teacher_log, stages (names), betas
            (as used), snapshots ``[(epoch, network)]``.

        Raises:
            ValueError: no usable stage; a stage that does not exist or has fewer than four positions; model and images
                on different devices.
        """
        check_inputs(model, clean)
        start, images = time.perf_counter(), clean.images
        if self.cutout:
            images = replace(images, augment=replace(images.augment, cutout=self.cutout))
        names, betas = self.weights(model, images.floats[:1])
        teacher = copy.deepcopy(model)
        teacher_log = fit(teacher, images, self.teacher, seed=seed, note="NAD teacher")
        teacher.eval().requires_grad_(False)
        student = copy.deepcopy(model)
        snapshots: list[tuple[int, nn.Module]] = []
        attention_log: list[float] = []
        step = _Distil(self, teacher, names, betas)

        def keep(epoch: int) -> None:
            attention_log.append(float(step.total) / max(1, step.steps))
            step.total, step.steps = torch.zeros(()), 0
            if keep_every and epoch % keep_every == 0:
                snapshots.append((epoch, copy.deepcopy(student).eval()))

        log = fit(student, images, self.student, seed=seed, step=step, note="NAD student", after_epoch=keep)
        log = [{**record, "attention": value} for record, value in zip(log, attention_log, strict=True)]
        details = {
            "teacher": teacher, "teacher_log": teacher_log, "stages": names, "betas": betas, "snapshots": snapshots
        }  # fmt: skip
        return Repair(student, log, details, time.perf_counter() - start)

    def weights(self, model: nn.Module, example: Tensor) -> tuple[list[str], list[float]]:
        """Stages and the beta of each on images like `example` ``(1, C, H, W)``; see `stages` and `rescale`."""
        names = list(self.stages) if self.stages is not None else find_stages(model, example, len(self.betas))
        sizes = stage_sizes(model, example)
        for n in names:
            h, w = sizes.get(n, (0, 0))
            if h * w < 4:
                known = ", ".join(k for k, (a, b) in sizes.items() if a * b >= 4) or "none"
                raise ValueError(
                    f"stage {n!r} has a map of {h}x{w}; NAD needs four positions or more. There are: {known}"
                )
        betas = list(self.betas)[-len(names) :]
        if self.rescale:
            settled = [1024, 256, 64][-len(names) :] if len(names) <= 3 else [64] * len(names)
            betas = [b * sizes[n][0] * sizes[n][1] / s for b, n, s in zip(betas, names, settled, strict=True)]
        return names, betas


def _recipe(epochs: int) -> Recipe:
    """The released schedule: 0.1 for two epochs, then 0.01."""
    return Recipe(epochs, 64, 0.1, 0.9, 1e-4, schedule="milestones", milestones=(2,))
