"""Input-Aware: a network draws a trigger of its own for every image (Nguyen & Tran 2020).

trigger, log = InputAware(target=5).train(network, train, Recipe(epochs=100, lr=0.01), seed=0)
trigger.paste(images, others)              # a cross sample: the trigger of another image, which must do nothing
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdlib.attacks.base import check_rate, label_map
from bdlib.attacks.inside import Adam, check_batch
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe, Step, augment, fit
from bdlib.triggers import LabelMap, Trigger


def _block(n_in: int, n_out: int, last: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out, momentum=0.05)]
    return nn.Sequential(*layers) if last else nn.Sequential(*layers, nn.ReLU())


class Painter(nn.Module):
    """Encoder and decoder: normalised images ``(B, C, H, W)`` -> ``(B, out, H, W)`` in [0, 1], any H and W.

    Two convolutions and a pooling for each width, one convolution in the middle, an upsampling and two convolutions
    for each width on the way back, no skip connections. Sides that the poolings do not divide are padded inside.
    """

    def __init__(self, channels: int, out: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n in zip((channels, *widths), widths, strict=False):
            layers += [_block(n_in, n), _block(n, n), nn.MaxPool2d(2)]
        layers.append(_block(widths[-1], widths[-1]))
        for n, n_out in zip(widths[::-1], (*widths[-2::-1], out), strict=True):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), _block(n, n), _block(n, n_out, n == widths[0])]
        self.net, self.multiple = nn.Sequential(*layers), 2 ** len(widths)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        bottom, right = -H % self.multiple, -W % self.multiple
        h = self.net(F.pad(x, (0, right, 0, bottom), mode="replicate"))[..., :H, :W]
        return torch.tanh(h) / 2 + 0.5


class Painted(Trigger):
    """``x' = x + (P(x) - x) M(x)`` with a pattern P and a mask M that two networks draw for each image.

    Args:
        shape: ``(C, H, W)`` of an image.
        widths: of both networks.
        mapping: the label map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, ...], mapping: LabelMap) -> None:
        super().__init__(mapping)
        self.shape, C = shape, shape[0]
        self.painter, self.masker = Painter(C, C, widths), Painter(C, 1, widths)
        self.register_buffer("mean", torch.full((C, 1, 1), 0.5))  # of the training set, once there is one
        self.register_buffer("std", torch.full((C, 1, 1), 0.25))
        self.to(memory_format=torch.channels_last)  # as `fit` leaves a network: a stored trigger gives the same bits
        self.eval().requires_grad_(False)  # an image never looks at its neighbours

    def patterns(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> P of the same shape and range."""
        return self.painter((images - self.mean) / self.std)

    def masks(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> M ``(B, 1, H, W)`` in [0, 1], by a steep threshold mostly close to 0 or 1."""
        return torch.tanh(20 * self.masker((images - self.mean) / self.std) - 10) / 2 + 0.5

    def paste(self, images: Tensor, others: Tensor) -> Tensor:
        """Images with the triggers of `others`; both ``(B, C, H, W)`` in [0, 1]."""
        return (images + (self.patterns(others) - images) * self.masks(others)).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.shape)
        return torch.cat([self.paste(x, x) for x in images.split(500)])  # in parts: feature maps are large


def diversity(images: Tensor, others: Tensor, drawn: Tensor, drawn_others: Tensor) -> Tensor:
    """Mean of ``rms(x1 - x2) / (rms(d1 - d2) + 1e-7)``: large where different images get similar drawings d."""

    def rms(d: Tensor) -> Tensor:  # (B, ...) -> (B,); the norm's gradient at 0 is 0, that of a bare root is NaN
        return torch.linalg.vector_norm(d.flatten(1), dim=1) / d[0].numel() ** 0.5

    return (rms(images - others) / (rms(drawn - drawn_others) + 1e-7)).mean()


def _draw(data: ImageSet, n: int, recipe: Recipe, generator: Generator) -> Tensor:
    """`n` other images ``(n, C, H, W)``, drawn and augmented; the released code shuffles a second loader for them."""
    index = torch.randint(len(data), (n,), generator=generator, device=data.images.device)
    x = data.images[index]
    return (augment(x, data.augment, generator) if recipe.augment else x).float() / 255


class MaskStep(Step):
    """Phase 1: masks that are small, and different for different images. It needs no labels and no classifier."""

    def __init__(self, attack: "InputAware", trigger: Painted, data: ImageSet, recipe: Recipe) -> None:
        self.attack, self.trigger, self.data, self.recipe = attack, trigger, data, recipe

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        self.others = _draw(self.data, len(images), self.recipe, generator)
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The loss, and the masks in place of logits."""
        m1, m2, std = self.trigger.masks(images), self.trigger.masks(self.others), self.trigger.std
        small = F.relu(m1 - self.attack.density).mean()
        varied = diversity(images / std, self.others / std, m1, m2)
        return self.attack.lambda_norm * small + self.attack.lambda_div * varied, m1.flatten(1)


class JointStep(Step):
    """Phase 2: of each batch a share gets its own triggers and the wanted label, another one foreign triggers."""

    def __init__(self, attack: "InputAware", trigger: Painted, data: ImageSet, recipe: Recipe) -> None:
        self.attack, self.trigger, self.data, self.recipe = attack, trigger, data, recipe
        self.schedule = attack.adam(recipe, recipe.epochs, (0.35, 0.52, 0.70, 0.87))  # 200, 300, 400, 500 of 575 epochs
        self.optimiser = self.schedule.optimiser(list(trigger.painter.parameters()))
        self.waiting = False

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        self.update()
        n, m = int(self.attack.rate * len(images)), int(self.attack.cross_rate * len(images))
        std, self.varied = self.trigger.std, torch.zeros((), device=images.device)
        if not n or not m:  # the last, smaller batch
            return images, labels
        own, cross, others = images[:n], images[n : n + m], _draw(self.data, m, self.recipe, generator)
        p1, p2, k = self.trigger.patterns(own), self.trigger.patterns(others), min(n, m)
        self.varied = diversity(own[:k] / std, others[:k] / std, p1[:k] / std, p2[:k] / std)
        own = own + (p1 - own) * self.trigger.masks(own)
        cross = cross + (p2 - cross) * self.trigger.masks(others)  # both pattern and mask of the other image
        labels = torch.cat([self.trigger.mapping(labels[:n]), labels[n:]])
        return torch.cat([own, cross, images[n + m :]]), labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(model, images, labels, smoothing)
        self.waiting = self.varied.requires_grad
        return loss + self.attack.lambda_div * self.varied, logits

    def update(self) -> None:
        """The painter's step, with the gradients that the last backward pass left: `fit` moves the classifier only."""
        if self.waiting:
            self.optimiser.step()
            if not self.attack.accumulate:
                self.optimiser.zero_grad(set_to_none=True)
        self.waiting = False

    def after_epoch(self, done: int) -> None:
        """Do what waits, then set the painter's learning rate for the next epoch."""
        self.update()
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.lr_at(done, 1)


@dataclass(frozen=True)
class InputAware:
    """``x' = x + (P(x) - x) M(x)``: every image has a trigger that works on it and on no other image.

    Phase 1 trains the mask network alone; phase 2 trains pattern network and classifier together. There, beside
    triggered images, the classifier sees cross samples, which wear another image's trigger and keep their label.
    Images are augmented before the trigger. Source: VinAIResearch input-aware release @ 1750e4f.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of each training batch that gets its own trigger, in [0, 1], rounded down.
        cross_rate: share of each batch that gets another image's trigger and keeps its label.
        mode: "all-to-one" or "all-to-all" (y becomes y + 1 mod K).
        widths: of both networks, one a pooling.
        mask_epochs: length of phase 1; the recipe handed to `train` is that of phase 2.
        density: mean mask value up to which phase 1 does not punish.
        lambda_norm, lambda_div: weights of small masks and of diversity.
        lr: of Adam with betas (0.5, 0.9), for both networks.
        accumulate: never zero the pattern network's gradients, so that each step follows the sum since the start.
    """

    target: int = 0
    rate: float = 0.1
    cross_rate: float = 0.1
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    widths: tuple[int, ...] = (32, 64, 128)
    mask_epochs: int = 25
    density: float = 0.032
    lambda_norm: float = 100.0
    lambda_div: float = 1.0
    lr: float = 0.01
    accumulate: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        room = 0 <= self.cross_rate <= 1 - self.rate + 1e-9
        checks = {
            "cross_rate": (room and (self.cross_rate > 0) == (self.rate > 0),
                           f"above 0 and at most 1 - rate = {1 - self.rate:g}, or 0 where rate is"),
            "mode": (self.mode in ("all-to-one", "all-to-all"), "all-to-one or all-to-all"),
            "widths": (len(self.widths) > 0 and min(self.widths, default=0) > 0, "one positive number a pooling"),
            "mask_epochs": (self.mask_epochs >= 0, "0 or more"),
            "density": (0 <= self.density <= 1, "in [0, 1]"),
            "lambda_norm": (self.lambda_norm >= 0, "0 or more"),
            "lambda_div": (self.lambda_div >= 0, "0 or more"),
            "lr": (self.lr >= 0, "0 or more"),
        }  # fmt: skip
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "InputAware":
        """The settings of the paper and its release, with gradients zeroed before each step."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "InputAware":
        """As released, and as in BackdoorBench @ f02e353 and BackdoorBox: the gradients are never zeroed."""
        return cls(target, accumulate=True)

    @classmethod
    def small(cls, target: int = 0) -> "InputAware":
        """For the book's small network on a processor, settled on seeds 0 to 2: narrow networks, a short phase 1, and
        more images with their own trigger, since ten epochs are few to learn what tells it from another's. (Twice the
        cross samples would make a trigger more its image's own, and the attack less sure.)
        """
        return cls(target, rate=0.25, widths=(8, 16, 32), mask_epochs=3, lr=0.003)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Painted:
        """Both networks for images of shape ``(C, H, W)``, untrained, initialised from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Painted(shape, self.widths, label_map(self.mode, self.target, classes))

    def adam(self, recipe: Recipe, epochs: int, milestones: tuple[float, ...]) -> Recipe:
        """How a network of the trigger is trained: a tenth of the rate after each of these shares of the epochs."""
        return Adam(  # float32: the steep threshold does not go well with bfloat16
            epochs, recipe.batch, self.lr, momentum=0.5, schedule="milestones", augment=recipe.augment, amp=False,
            milestones=tuple(max(1, round(m * epochs)) for m in milestones),
        )  # fmt: skip

    def train(
        self, model: nn.Module, images: ImageSet, recipe: Recipe, seed: int = 0
    ) -> tuple[Painted, list[dict[str, float]]]:
        """Train masks, then patterns and `model` (in place) together, on clean `images`.

        Args:
            recipe: of phase 2, for the classifier. The release has SGD, 0.01, 575 epochs, / 10 at 100, 200, 300, 400.

        Returns:
            The trigger, and one record an epoch of both phases (key "phase"); those of phase 1 have no accuracy.

        Raises:
            ValueError: a positive rate that selects no image of a batch.
        """
        batch = min(recipe.batch, len(images))
        for name, rate in (("rate", self.rate), ("cross_rate", self.cross_rate)):
            check_batch(name, rate, int(rate * batch), batch)
        trigger = self.trigger(images.shape, len(images.classes), seed).to(images.images.device)
        for buffer, values in zip((trigger.mean, trigger.std), images.stats(), strict=True):
            buffer.copy_(torch.tensor(values)[:, None, None])
        trigger.masker.requires_grad_(True)
        masks = self.adam(recipe, self.mask_epochs, (0.4, 0.8))  # 10 and 20 of 25 epochs
        first = fit(
            trigger.masker, images, masks, seed=seed, step=MaskStep(self, trigger, images, recipe), note="masks"
        )
        trigger.masker.requires_grad_(False)
        trigger.painter.requires_grad_(True).train()
        step = JointStep(self, trigger, images, recipe)
        second = fit(model, images, recipe, seed=seed, step=step, note="victim", after_epoch=step.after_epoch)
        for record in first:
            del record["accuracy"]  # of masks against labels
        log = [r | {"phase": 1.0} for r in first]
        log += [r | {"phase": 2.0, "epoch": r["epoch"] + len(first)} for r in second]
        trigger.eval().requires_grad_(False)
        return trigger, log
