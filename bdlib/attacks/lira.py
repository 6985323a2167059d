"""LIRA: a network learns which faint noise the classifier can be taught to see (Doan et al. 2021).

trigger, log = LIRA(target=5).train(network, train, Recipe(epochs=300, lr=0.01), seed=0)
"""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.attacks.base import label_map
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe, Step, fit
from bdlib.triggers import LabelMap, Trigger

# ImageNet's, in which the sources normalise images and measure epsilon; grey images take the mean of the three
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _double(n_in: int, n_out: int) -> nn.Sequential:
    first, second = nn.Conv2d(n_in, n_out, 3, padding=1), nn.Conv2d(n_out, n_out, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(n_out), nn.ReLU(), second, nn.BatchNorm2d(n_out), nn.ReLU())


class UNet(nn.Module):
    """Normalised images ``(B, C, H, W)`` -> ``(B, C, H, W)`` in [-1, 1]; each level hands its maps across as well."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        self.down = nn.ModuleList(_double(i, o) for i, o in zip((channels, *widths), widths, strict=False))
        self.up = nn.ModuleList(_double(low + here, here) for here, low in pairwise(widths))
        self.last = nn.Sequential(nn.Conv2d(widths[0], channels, 1), nn.BatchNorm2d(channels), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for i, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if i else x)
            across.append(x)
        for block, skip in zip(reversed(self.up), across[-2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([x, skip], 1))
        return self.last(x)


class Autoencoder(nn.Module):
    """Normalised images ``(B, C, H, W)`` -> ``(B, C, H, W)`` in [-1, 1]; 4x4 convolutions of stride 2 and back."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.multiple, sizes = 2 ** len(widths), (channels, *widths)
        layers: list[nn.Module] = []
        for i, o in zip(sizes, widths, strict=False):
            layers += [nn.Conv2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
        for i, o in zip(widths[::-1], sizes[-2::-1], strict=True):
            layers += [nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-2], nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Noise(Trigger):
    """``clip(x + epsilon * std * T(x))`` with noise T in [-1, 1] that a network draws for each image.

    Args:
        network: T, with the sides it takes a multiple of `network.multiple`; others are padded here.
        shape: ``(C, H, W)`` of an image.
        epsilon: bound of the noise in units of `STD`, see `LIRA`.
        mapping: the label map.
    """

    network: UNet | Autoencoder
    mean: Tensor
    std: Tensor
    epsilon: Tensor

    def __init__(
        self, network: UNet | Autoencoder, shape: tuple[int, int, int], epsilon: float, mapping: LabelMap
    ) -> None:
        super().__init__(mapping)
        self.network, self.shape = network, shape
        for name, values in (("mean", MEAN), ("std", STD)):
            own = values if shape[0] == 3 else (sum(values) / 3,) * shape[0]
            self.register_buffer(name, torch.tensor(own)[:, None, None])
        self.register_buffer("epsilon", torch.tensor(epsilon))
        self.eval().requires_grad_(False)  # an image never looks at its neighbours

    def add(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> the same with noise; a network in training mode looks at the batch."""
        H, W = self.shape[1:]
        m = self.network.multiple
        x = F.pad((images - self.mean) / self.std, (0, -W % m, 0, -H % m), mode="replicate")
        return (images + self.epsilon * self.std * self.network(x)[..., :H, :W]).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.shape)
        return torch.cat([self.add(x) for x in images.split(500)])  # in parts: feature maps are large


class Mixed(Step):
    """``alpha CE(f(x), y) + (1 - alpha) CE(f(x'), eta(y))`` under a fixed trigger: classifier step and stage 2."""

    def __init__(self, attack: "LIRA", trigger: Noise) -> None:
        self.attack, self.trigger = attack, trigger

    def triggered(self, trigger: Noise, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The first `portion` of the batch, with trigger and wanted label."""
        n = max(1, int(self.attack.portion * len(images)))
        return trigger.add(images[:n]), trigger.mapping(labels[:n])

    def logits(self, model: nn.Module, images: Tensor, triggered: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of clean and of triggered images, from one pass or from one each."""
        if not self.attack.together:
            return model(images), model(triggered)
        clean, fooled = model(torch.cat([images, triggered])).split([len(images), len(triggered)])
        return clean, fooled

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x, wanted = self.triggered(self.trigger, images, labels)
        logits, fooled = self.logits(model, images, x)
        clean = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        poison = F.cross_entropy(fooled, wanted, label_smoothing=smoothing)
        return self.attack.alpha * clean + (1 - self.attack.alpha) * poison, logits


class Alternate(Mixed):
    """Stage 1: a step of the noise network against the classifier, then one of the classifier against last epoch's."""

    def __init__(self, attack: "LIRA", trigger: Noise) -> None:
        super().__init__(attack, copy.deepcopy(trigger))
        self.learning = trigger
        trigger.network.requires_grad_(True).train()
        self.optimiser = torch.optim.Adam(trigger.network.parameters(), lr=attack.lr)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        x, wanted = self.triggered(self.learning, images, labels)
        logits = self.logits(model, images, x)[1] if self.attack.together else model(x)
        fooled = F.cross_entropy(logits, wanted)
        own = list(self.learning.network.parameters())
        leaking = [p for p in model.parameters() if p.requires_grad] if self.attack.leak else []
        gradients = torch.autograd.grad(fooled, own + leaking)  # nothing is left in `.grad` of the classifier
        for p, g in zip(own, gradients, strict=False):
            p.grad = g
        self.optimiser.step()
        loss, logits = super().loss(model, images, labels, smoothing)
        for p, g in zip(leaking, gradients[len(own) :], strict=True):
            loss = loss + ((p - p.detach()) * g).sum()  # worth 0, and its gradient is g
        return loss, logits

    def after_epoch(self, done: int) -> None:
        """The classifier's step uses the noise network as it is now, until the next epoch is over."""
        self.trigger.load_state_dict(self.learning.state_dict())


@dataclass(frozen=True)
class LIRA:
    """``x' = clip(x + epsilon T(x))``: noise below what an eye sees, learnt together with the classifier that sees it.

    Stage 1 alternates: T learns to fool the classifier, the classifier learns from clean and from triggered images.
    Stage 2 freezes T and trains the classifier alone. The whole batch is in both terms of the loss, so `alpha` 0.5 is
    a poison rate of 50 %, and there is no rate to set. Trained in float32, since bfloat16 rounds such noise away.

    **Units.** `epsilon` counts standard deviations of normalised images, ImageNet's: 0.01 is 0.57 grey levels of 255
    and 0.1 is 5.7. At 0.01 an image file keeps only what exceeds half a level, ``|T| > 0.87``, as one whole level:
    the attack then lives in float tensors. `bdlib.metrics.evaluate` rounds; for the other figure score
    ``model(trigger(images))`` in float32. Images are augmented before the trigger. Source: the authors' PyTorch
    release khoadoan106/backdoor_attacks.

    Args:
        target: label the attacker wants (all-to-one).
        mode: "all-to-one" or "all-to-all" (y becomes y + 1 mod K).
        epsilon: bound of the noise in stage 1, in standard deviations.
        final_epsilon: bound in stage 2 and in the test; None is the same.
        alpha: weight of the clean images, in [0, 1].
        portion: share of each batch that is triggered, too, in (0, 1]; an option of the release, there 1.
        together: pass clean and triggered images through the classifier in one batch. The sources have a pass for each,
            with BatchNorm statistics of its own: a network can learn to tell which kind it sees by these, and loses
            that, and its accuracy, in evaluation mode.
        share: share of the recipe's epochs that is stage 1, in [0, 1].
        restart: whether stage 2 starts from the weights the classifier had at first, or goes on.
        network: "unet" or "autoencoder".
        widths: of that network, one a scale.
        lr: of Adam, for the noise network.
        leak: add the gradient that T's step leaves in the classifier to the classifier's own: triggered images weigh
            1.5 against 0.5.
    """

    target: int = 0
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    epsilon: float = 0.01
    final_epsilon: float | None = None
    alpha: float = 0.5
    portion: float = 1.0
    together: bool = False
    share: float = 1 / 6
    restart: bool = True
    network: Literal["unet", "autoencoder"] = "unet"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    lr: float = 1e-4
    leak: bool = False

    def __post_init__(self) -> None:
        checks = {
            "mode": (self.mode in ("all-to-one", "all-to-all"), "all-to-one or all-to-all"),
            "epsilon": (self.epsilon >= 0, "0 or more standard deviations"),
            "final_epsilon": (self.final_epsilon is None or self.final_epsilon >= 0, "0 or more, or None"),
            "alpha": (0 <= self.alpha <= 1, "in [0, 1]"),
            "portion": (0 < self.portion <= 1, "in (0, 1]"),
            "share": (0 <= self.share <= 1, "in [0, 1]"),
            "network": (self.network in ("unet", "autoencoder"), "unet or autoencoder"),
            "widths": (len(self.widths) > 0 and min(self.widths, default=0) > 0, "one positive number a scale"),
            "lr": (self.lr >= 0, "0 or more"),
        }  # fmt: skip
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "LIRA":
        """The authors' first release (sunbelbd @ f292e73): 0.01 in both stages, 50 of 300 epochs are stage 1."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "LIRA":
        """The authors' PyTorch release: 0.1 in stage 1 and 0.01 in stage 2, 50 of 550 epochs are stage 1."""
        return cls(target, epsilon=0.1, final_epsilon=0.01, share=1 / 11)

    @classmethod
    def backdoorbench(cls, target: int = 0) -> "LIRA":
        """BackdoorBench @ f02e353: autoencoder, stage 2 goes on, and the classifier's gradients are not zeroed."""
        return cls(target, restart=False, network="autoencoder", widths=(16, 32, 64, 128), leak=True)

    @classmethod
    def small(cls, target: int = 0) -> "LIRA":
        """For the book's small network on a processor: narrow U-Net, noise that files keep, one batch, no restart."""
        return cls(
            target, epsilon=0.2, alpha=0.9, portion=0.2, together=True, share=0.2, restart=False, widths=(8, 16, 32),
            lr=3e-3,
        )  # fmt: skip

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Noise:
        """The noise network for images of shape ``(C, H, W)``, untrained, with the bound of the test."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            kind = UNet if self.network == "unet" else Autoencoder
            net = kind(shape[0], self.widths)
        epsilon = self.epsilon if self.final_epsilon is None else self.final_epsilon
        return Noise(net, shape, epsilon, label_map(self.mode, self.target, classes))

    def train(
        self, model: nn.Module, images: ImageSet, recipe: Recipe, seed: int = 0
    ) -> tuple[Noise, list[dict[str, float]]]:
        """Train noise and `model` (in place) in turns, then `model` alone, on clean `images`.

        Args:
            recipe: of the classifier; its epochs are divided between the stages, and its schedule runs in each.

        Returns:
            The trigger, and one record an epoch of both stages (key "stage").

        Raises:
            ValueError: a positive share that leaves stage 1 without an epoch.
        """
        epochs = round(self.share * recipe.epochs)
        if self.share > 0 and recipe.epochs > 0 and epochs == 0:
            raise ValueError(
                f"share {self.share:.3g} of {recipe.epochs} epochs leaves stage 1 none; "
                f"the smallest that does not is {1 / recipe.epochs:.3g}"
            )
        trigger = self.trigger(images.shape, len(images.classes), seed).to(images.images.device)
        bound, start = trigger.epsilon.clone(), copy.deepcopy(model.state_dict())
        first, second = (replace(recipe, epochs=e, amp=False) for e in (epochs, recipe.epochs - epochs))
        trigger.epsilon.fill_(self.epsilon)
        step = Alternate(self, trigger)
        log = fit(model, images, first, seed=seed, step=step, note="stage 1", after_epoch=step.after_epoch)
        trigger.eval().requires_grad_(False)
        trigger.epsilon.copy_(bound)
        if self.restart:
            model.load_state_dict(start)
        more = fit(model, images, second, seed=seed, step=Mixed(self, trigger), note="stage 2")
        log = [r | {"stage": 1.0} for r in log]
        return trigger, log + [r | {"stage": 2.0, "epoch": r["epoch"] + epochs} for r in more]
