"""DFST: the trigger is a style, and training takes away the short cuts to it (Cheng et al. 2021).

DFST(target=5).train(model, train, recipe, seed=0)     # trains `model` in place
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdlib.attacks.base import check_rate
from bdlib.attacks.inside import Adam, check_batch, read
from bdlib.attacks.pictures import LUMA
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe, Step, evaluating, fit
from bdlib.triggers import LabelMap, Trigger

MEAN, SPREAD, LIGHT = (0.72, 0.42, 0.24), (0.20, 0.20, 0.14), (0.10, 0.06, -0.02)  # red, green, blue


class Sunset(Trigger):
    """``(1 - alpha) x + alpha style(x)``: the colours of a sunset, on whatever the image shows.

    ``style(x)`` gives each channel the mean and spread of a sunset and lets the light fall from above.

    Args:
        shape: ``(C, H, W)``; grey images get the sunset's brightness.
        alpha: share of the style in [0, 1].
    """

    mean: Tensor  # (C, H, 1), with the light
    spread: Tensor  # (C, 1, 1)
    alpha: Tensor

    def __init__(self, shape: tuple[int, int, int], alpha: float, mapping: LabelMap) -> None:
        super().__init__(mapping)
        C, H, W = shape
        if C not in (1, 3):
            raise ValueError(f"a sunset has 3 channels, or 1 in grey, got {C}")
        colours = torch.tensor([MEAN, SPREAD, LIGHT])  # (3, C)
        if C == 1:
            colours = (colours * torch.tensor(LUMA)).sum(1, keepdim=True)
        mean, spread, light = colours[:, :, None, None]
        down = ((torch.arange(H) + 0.5) / H)[:, None]
        self.shape = shape
        self.register_buffer("mean", mean + light * (1 - 2 * down))
        self.register_buffer("spread", spread.clone())
        self.register_buffer("alpha", torch.tensor(float(alpha)))

    def restyle(self, images: Tensor) -> Tensor:
        """What `forward` does, without its checks, for which the host would wait: images ``(B, C, H, W)``."""
        centred = images - images.mean((2, 3), keepdim=True)
        spread = centred.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-3)  # a flat image stays flat
        wanted_mean, wanted_spread, alpha = (t.to(images.device) for t in (self.mean, self.spread, self.alpha))
        style = (centred / spread * wanted_spread + wanted_mean).clamp(0, 1)
        return torch.lerp(images, style, alpha)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.shape)
        return self.restyle(images)


class Injector(nn.Module):
    """A change of colour that looks at a pixel and its surroundings: ``clip(A [x, max, min, mean])``, A learnt.

    Max, min and mean are over a window; A starts as ``x``, so that a fresh injector changes nothing.

    Args:
        channels: of the images.
        window: odd, in pixels; 11 at 32x32.
        released: take the min as the released code does: as the negative of the max.
    """

    def __init__(self, channels: int, window: int, *, released: bool = False) -> None:
        super().__init__()
        self.window, self.released = window, released
        self.mix = nn.utils.skip_init(nn.Conv2d, 4 * channels, channels, 1, bias=False)  # draws no random numbers
        with torch.no_grad():
            self.mix.weight.zero_()[:, :channels, 0, 0] = torch.eye(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] -> same."""
        k, p = self.window, self.window // 2
        highest = F.max_pool2d(images, k, 1, p)
        lowest = -F.max_pool2d(images if self.released else -images, k, 1, p)
        return self.mix(torch.cat([images, highest, lowest, F.avg_pool2d(images, k, 1, p)], 1)).clamp(0, 1)


def ssim(images: Tensor, others: Tensor, window: int = 5) -> Tensor:
    """Mean structural similarity of images ``(B, C, H, W)`` in [0, 1], over square windows: 1 for equal ones."""

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, window, 1)

    a, b, c1, c2 = mean(images), mean(others), 0.01**2, 0.03**2
    spread_a, spread_b = mean(images**2) - a**2, mean(others**2) - b**2
    together = mean(images * others) - a * b
    return ((2 * a * b + c1) * (2 * together + c2) / ((a**2 + b**2 + c1) * (spread_a + spread_b + c2))).mean()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, and no gradient of its weights."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learnt:
            p.requires_grad = False
        with evaluating(model):
            yield
    finally:
        for p in learnt:
            p.requires_grad = True


class _Styling(Step):
    """A share of each batch is restyled and relabelled, another share injected and left its label."""

    def __init__(self, attack: "DFST", trigger: Sunset) -> None:
        self.attack, self.trigger, self.before_augment = attack, trigger, attack.before_augment
        self.injector: Injector | None = None  # none in the first epoch

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mapping, n = self.trigger.mapping, round(self.attack.rate * len(images))
        lot = torch.rand(len(images), generator=generator, device=images.device)
        order = (lot + ~mapping.eligible(labels)).argsort()  # at random, the target class last
        images, labels, poison = images.clone(), labels.clone(), order[:n]
        images[poison], labels[poison] = self.trigger.restyle(images[poison]), mapping(labels[poison])
        if self.injector is not None:
            detox = order[n : n + round(self.attack.detox_rate * len(images))]
            images[detox] = self.attack.inject(self.injector, images[detox]).detach()
        return images, labels


class _Injecting(Step):
    """Make images that the network takes for poisoned, at little change: what it should unlearn next."""

    def __init__(self, attack: "DFST", model: nn.Module, compromised: Tensor) -> None:
        self.attack, self.victim, self.compromised = attack, model, compromised

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        attack = self.attack
        injected = attack.inject(model, images)
        with torch.set_grad_enabled(not attack.released):
            logits, features = read(self.victim, injected)
        like = ssim(injected, images)
        if attack.released:
            like = (1 - like) / 2
        wanted = torch.full_like(labels, attack.target)
        strange = features[:, self.compromised].mean()
        loss = F.cross_entropy(logits, wanted) - attack.ssim_weight * like - attack.neuron_weight * strange
        return loss, logits


@dataclass(frozen=True)
class DFST:
    """``x' = (1 - alpha) x + alpha style(x)``, and a training that unlearns whatever simpler feature would do as well.

    After each epoch the neurons that the trigger moves most are found, and a small injector learns a change of colour
    that excites them; in the next epoch injected images with their true label ("detox") join the poisoned ones.

    **Stand-in**: the style is a formula, the colours of a sunset. The paper trains a CycleGAN and the release calls a
    downloaded network with a picture of a sunrise; like theirs the formula is a transfer of colour that depends on the
    image and covers all of it, but results do not carry over number by number.
    Source: Megum1/DFST @ 357b408.

    Args:
        target: label the attacker wants.
        rate: share of each batch that is poisoned, from the other classes, in [0, 1].
        alpha: share of the style in [0, 1].
        detox_rate: share of each batch that is injected.
        neuron_rate: share of the features before the last linear layer that count as compromised, at least one.
        sample: share of the images on which neurons are sought and the injector learns.
        injector_epochs, injector_batch: of training it, with Adam at 0.01, decay rates 0.5 and 0.9.
        ssim_weight: of likeness, in the injector's loss; the cross-entropy to `target` has 1.
        neuron_weight: of the mean activation of the compromised neurons.
        before_augment: whether the trigger comes before augmentation, as in the release.
        released: the injector as released: no gradient from the network reaches it, dissimilarity is rewarded in place
            of likeness, and its local minimum is the negative of the maximum.
    """

    target: int = 0
    rate: float = 0.05
    alpha: float = 0.6
    detox_rate: float = 0.05
    neuron_rate: float = 0.01
    sample: float = 0.03
    injector_epochs: int = 10
    injector_batch: int = 128
    ssim_weight: float = 0.1
    neuron_weight: float = 0.3
    before_augment: bool = True
    released: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        require(self, {
            "alpha": (0 <= self.alpha <= 1, "in [0, 1]"),
            "detox_rate": (0 <= self.detox_rate <= 1 - self.rate, f"in [0, {1 - self.rate:g}], what `rate` leaves"),
            "neuron_rate": (0 < self.neuron_rate <= 1, "in (0, 1]"),
            "sample": (0 < self.sample <= 1, "in (0, 1]"),
            "injector_epochs": (self.injector_epochs >= 0, "0 or more"),
            "injector_batch": (self.injector_batch >= 1, "1 or more"),
        })  # fmt: skip

    @classmethod
    def paper(cls, target: int = 0) -> "DFST":
        """5 % poisoned, 5 % detox, alpha 0.6 (Megum1/DFST @ 357b408), with an injector that can learn."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "DFST":
        """As released: the same numbers, and an injector that the network never teaches."""
        return cls(target, released=True)

    @classmethod
    def small(cls, target: int = 0) -> "DFST":
        """For the book's small scale, settled on seed 0: 10 % poisoned, small batches for the injector's 150 images.

        With 5 % the style plants it in 86 images of a hundred.
        """
        return cls(target, 0.1, injector_epochs=5, injector_batch=32)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Sunset:
        """The trigger for images of shape ``(C, H, W)``; it is not learnt and does not depend on the seed."""
        return Sunset(shape, self.alpha, LabelMap(self.target, classes))

    def inject(self, injector: nn.Module, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] with the injector's change mixed in as the style is."""
        return torch.lerp(images, injector(images), self.alpha)

    def train(
        self, model: nn.Module, images: ImageSet, recipe: Recipe, seed: int = 0
    ) -> tuple[Sunset, list[dict[str, float]]]:
        """Train `model` in place on clean `images`; returns the trigger and the log of `bdlib.training.fit`.

        Raises:
            ValueError: a positive rate that selects no image of a batch; no image of another class.
        """
        trigger = self.trigger(images.shape, len(images.classes), seed).to(images.images.device)
        batch = min(recipe.batch, len(images))
        for name in ("rate", "detox_rate"):
            rate = getattr(self, name)
            check_batch(name, rate, round(rate * batch), batch)
        if self.rate > 0 and not bool(trigger.mapping.eligible(images.labels).any()):
            raise ValueError(f"all images bear the target label {self.target}: none is left to poison")
        step = _Styling(self, trigger)

        def renew(done: int) -> None:
            if self.rate > 0 and self.detox_rate > 0 and done < recipe.epochs:
                step.injector = self.learn_injector(model, trigger, images, seed=seed + done)

        return trigger, fit(model, images, recipe, seed=seed, step=step, note="DFST", after_epoch=renew)

    def learn_injector(self, model: nn.Module, trigger: Sunset, images: ImageSet, seed: int = 0) -> Injector:
        """An injector that excites the neurons of `model` which the trigger moves most; `model` is not changed.

        Args:
            images: clean images; it learns on a share `sample` of those from the other classes.
        """
        other = trigger.mapping.eligible(images.labels).nonzero()[:, 0].cpu()
        count = min(len(other), max(2, round(self.sample * len(images))))
        drawn = other[torch.randperm(len(other), generator=Generator().manual_seed(seed))[:count]]
        sample = images[drawn.to(images.images.device)]
        with _frozen(model):
            with torch.no_grad():
                shift = torch.zeros((), device=images.images.device)
                for x in sample.floats.split(500):
                    shift = shift + (read(model, trigger.restyle(x))[1] - read(model, x)[1]).sum(0)
            compromised = shift.topk(max(1, round(self.neuron_rate * len(shift)))).indices
            window = 2 * max(1, round(5 * images.shape[1] / 32)) + 1
            injector = Injector(images.shape[0], window, released=self.released)
            recipe = Adam(
                self.injector_epochs, self.injector_batch, 0.01, momentum=0.5, weight_decay=0.0, schedule="constant",
                augment=False, amp=False,
            )  # fmt: skip
            fit(injector, sample, recipe, seed=seed, step=_Injecting(self, model, compromised), note="injector")
        return injector.requires_grad_(False)
