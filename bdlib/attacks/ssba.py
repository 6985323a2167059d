"""SSBA: a hidden string, written by a network, so that every image gets a trigger of its own (Li et al. 2021).

SSBA.small(target=5).poison(train, seed=0)         # trains the writer and its reader first, on `train`
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdlib.attacks.base import Poisoned, check_rate, choose, label_map, poison_with
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe, Schedule, Step, fit
from bdlib.triggers import LabelMap, Trigger

PART = 256  # images a pass: a wide encoder keeps 1 MB of maps for each


def _conv(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, 1)


class Encoder(nn.Module):
    """A U-Net that takes an image and a string, drawn as a second image, and returns the residual that hides it.

    Args:
        shape: ``(C, H, W)``; sides that four halvings do not divide are padded inside.
        bits: length of the string.
        width: channels of the first layer; the deepest has eight times as many.
    """

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int) -> None:
        super().__init__()
        C, H, W = shape
        self.padded = (C, -(-H // 16) * 16, -(-W // 16) * 16)
        self.draw = nn.Linear(bits, math.prod(self.padded))
        n = [width, width, 2 * width, 4 * width, 8 * width]  # channels on the way down, and up again
        self.down = nn.ModuleList([_conv(2 * C, n[0]), *(_conv(a, b, 2) for a, b in pairwise(n))])
        self.up = nn.ModuleList([_conv(n[i + 1], n[i]) for i in (3, 2, 1, 0)])
        self.merge = nn.ModuleList([*(_conv(2 * n[i], n[i]) for i in (3, 2, 1)), _conv(2 * n[0] + 2 * C, n[0])])
        self.residual = nn.Conv2d(n[0], C, 1)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] and strings ``(B, bits)`` of 0 and 1 -> residuals ``(B, C, H, W)``."""
        (H, W), (_, h, w) = images.shape[-2:], self.padded
        drawn = F.relu(self.draw(secrets - 0.5)).unflatten(1, self.padded)
        # the image outweighs the string, and so shapes the residual
        both = torch.cat([drawn, F.pad(8 * (images - 0.5), (0, w - W, 0, h - H))], 1)
        maps = [F.relu(self.down[0](both.contiguous(memory_format=torch.channels_last)))]
        for conv in self.down[1:]:
            maps.append(F.relu(conv(maps[-1])))
        out, skips = maps.pop(), [torch.cat([maps[0], both], 1), *maps[1:]]
        for up, merge in zip(self.up, self.merge, strict=True):
            out = F.interpolate(F.relu(up(out)), scale_factor=2.0)  # in this order a quarter of the work
            out = F.relu(merge(torch.cat([skips.pop(), out], 1)))
        return self.residual(out)[..., :H, :W]


class Decoder(nn.Sequential):
    """Seven convolutions and two linear layers that read the string back: images ``(B, C, H, W)`` -> ``(B, bits)``."""

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int) -> None:
        C, H, W = shape
        n = [C, width, width, 2 * width, 2 * width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for (n_in, n_out), stride in zip(pairwise(n), (2, 1, 2, 1, 2, 2, 2), strict=True):
            layers += [_conv(n_in, n_out, stride), nn.ReLU()]
        flat = n[-1] * -(-H // 32) * -(-W // 32)  # five halvings, rounded up
        super().__init__(*layers, nn.Flatten(), nn.Linear(flat, 16 * width), nn.ReLU(), nn.Linear(16 * width, bits))


class Hidden(Trigger):
    """``clip(x + strength tanh(Enc(x, s)))`` with one string s for all images; the decoder reads it back.

    Args:
        shape: ``(C, H, W)`` of the images.
        secret: ``(bits,)`` float, 0 and 1.
        width: of both networks.
        strength: bound of the residual in [0, 1]; None adds ``Enc(x, s)`` as it is.
    """

    secret: Tensor

    def __init__(
        self, shape: tuple[int, int, int], secret: Tensor, width: int, strength: float | None, mapping: LabelMap
    ) -> None:
        super().__init__(mapping)
        self.shape, self.strength = shape, strength
        self.encoder, self.decoder = Encoder(shape, len(secret), width), Decoder(shape, len(secret), width)
        self.register_buffer("secret", secret)
        for m in self.modules():  # the default's smaller weights lose the string in twelve layers, for epochs
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight, a=math.sqrt(3) if m is self.encoder.draw else 0)
                nn.init.constant_(m.bias, 0.0) if m.bias is not None else None
        self.to(memory_format=torch.channels_last)  # as `fit` leaves it, so that a reloaded one computes the same bits
        self.requires_grad_(False)

    def hide(self, images: Tensor, secrets: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1], each with its own string ``(B, bits)`` hidden in it."""
        return self.add(images, self.encoder(images, secrets.float()))

    def add(self, images: Tensor, residual: Tensor) -> Tensor:
        """Images plus what the encoder returned for them, bounded and clipped; ``(B, C, H, W)`` each."""
        if self.strength is not None:
            residual = self.strength * residual.tanh()
        return (images + residual).clamp(0, 1)

    def read(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] -> log-odds ``(B, bits)`` that a bit is 1."""
        return self.decoder(images - 0.5)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images, self.shape)
        secret = self.secret.to(images.device)
        return torch.cat([self.hide(x, secret.expand(len(x), -1)) for x in images.split(PART)])


class _Hiding(Step):
    """Hide a new random string in every image: ``1.5 CE(Dec(x'), s) + weight ||x' - x||^2 / (C H W)``.

    With tanh, a third term keeps its argument from running off.
    """

    def __init__(self, attack: "SSBA") -> None:
        self.attack, self.weight = attack, 0.0
        self.priced = 0  # epochs in which a visible residual has had a price
        self.right: list[Tensor] = []  # share of the bits that the decoder read, of each batch of this epoch

    def after_epoch(self, done: int) -> None:
        """At first the string alone counts; once it can be read, the price of a visible residual rises.

        Were it asked earlier, the encoder would best hide nothing at all.
        """
        readable = float(torch.stack(self.right[-20:]).mean()) >= self.attack.readable
        self.right = []
        if self.priced or (done >= self.attack.free_epochs and readable):
            self.priced += 1
            self.weight = self.attack.l2 * min(1.0, self.priced / self.attack.ramp_epochs)

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        # the label of an image is now the string to hide in it
        return images, torch.randint(2, (len(images), self.attack.bits), generator=generator, device=images.device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Hidden)
        residual = model.encoder(images, labels.float())
        hidden = model.add(images, residual)
        odds = model.read(hidden)
        self.right.append(((odds.detach() > 0) == labels).float().mean())
        logits = torch.stack([torch.zeros_like(odds), odds], 1)  # (B, 2, bits)
        visible = (hidden - images).square().mean()
        loss = 1.5 * F.cross_entropy(logits, labels) + self.weight * visible
        if model.strength is not None:  # beyond 2 tanh is flat, and an encoder that went far beyond learns no more
            loss = loss + 0.1 * F.relu(residual.abs() - 2).square().mean()
        return loss, logits


@dataclass(frozen=True)
class SSBA:
    """``x' = clip(x + strength tanh(Enc(x, s)))``: an encoder hides the string s, and what it adds depends on x.

    Encoder and decoder are trained on the run's own images, clean, each with a random string a step; then s is fixed
    and the images are poisoned. The networks are those of BackdoorBox @ af3afd1 (after StegaStamp), less what serves
    another end here: its spatial transformer, which corrects for a camera, and the perceptual part of its loss, which
    needs a downloaded network. The bound by tanh and the check before poisoning are a reconstruction; that residuals
    get a price only once the string can be read is BackdoorBench's. Sources: BackdoorBox @ af3afd1, BackdoorBench @
    f02e353.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of all training images that are poisoned, in [0, 1].
        mode: "all-to-one" or "all-to-all" (y becomes y + 1 mod K).
        bits: length of the string.
        width: channels of the first layer of encoder and decoder.
        strength: bound of the residual, in (0, 1]; None is unbounded.
        epochs: of training the pair.
        free_epochs: so many at the start, at least, with the string alone in the loss.
        readable: share of the bits that must be read at the end of an epoch before residuals get a price, in [0, 1].
        ramp_epochs: over so many epochs that price then rises to `l2`; 1 is at once.
        l2: weight of the squared residual, averaged over pixels; the string's cross-entropy has 1.5.
        batch, lr, schedule: of training the pair, with Adam.
        least_bits: share of the bits that the decoder must read after training, in [0, 1].
        least_psnr: peak signal-to-noise ratio in dB that the hidden images must have.
        secret_seed: seed of the string; part of the attack, not of a run.
        include_target: whether images of the target class may be drawn too.
    """

    target: int = 0
    rate: float = 0.1
    mode: Literal["all-to-one", "all-to-all"] = "all-to-one"
    bits: int = 20
    width: int = 32
    strength: float | None = 0.1
    epochs: int = 10
    free_epochs: int = 1
    readable: float = 0.9
    ramp_epochs: int = 4
    l2: float = 40.0
    batch: int = 64
    lr: float = 1e-3
    schedule: Schedule = "one-cycle"
    least_bits: float = 0.98
    least_psnr: float = 28.0
    secret_seed: int = 0
    include_target: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        require(self, {
            "mode": (self.mode in ("all-to-one", "all-to-all"), "all-to-one or all-to-all"),
            "bits": (self.bits >= 1, "1 or more"),
            "width": (self.width >= 1, "1 or more channels"),
            "strength": (self.strength is None or 0 < self.strength <= 1, "in (0, 1], or None"),
            "free_epochs": (self.free_epochs >= 0, "0 or more"),
            "readable": (0 <= self.readable <= 1, "in [0, 1]"),
            "ramp_epochs": (self.ramp_epochs >= 1, "1 or more"),
            "l2": (self.l2 >= 0, "0 or more"),
            "least_bits": (0 <= self.least_bits <= 1, "in [0, 1]"),
        })  # fmt: skip
        self._recipe()  # names what is wrong with epochs, batch, lr or schedule

    @classmethod
    def paper(cls, target: int = 0) -> "SSBA":
        """The field's default: 10 % of all images; the pair as reconstructed here, 20 bits, residuals up to 0.1."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "SSBA":
        """As BackdoorBox trains and poisons, less its perceptual loss: an unbounded residual, 5 %, nothing checked."""
        return cls(
            target, 0.05, strength=None, epochs=20, free_epochs=2, readable=0.0, ramp_epochs=1, l2=2.0, batch=32,
            lr=1e-4, schedule="constant", least_bits=0.0, least_psnr=0.0,
        )  # fmt: skip

    @classmethod
    def small(cls, target: int = 0) -> "SSBA":
        """For the book's small scale, settled on seed 0: narrow networks that a processor trains in half a minute.

        And a string that shows: at the 28 dB that `paper` asks for, ten epochs plant it in one image of seven.
        """
        return cls(
            target, bits=8, width=8, strength=0.2, epochs=4, ramp_epochs=2, l2=0.5, batch=32, lr=2e-3, least_psnr=19.0
        )

    def _recipe(self) -> Recipe:
        return Recipe(
            self.epochs, self.batch, self.lr, weight_decay=0.0, schedule=self.schedule, augment=False, amp=False,
            optimizer="adam",
        )  # fmt: skip

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Hidden:
        """The trigger for images of shape ``(C, H, W)``, its networks as initialised from `seed`, not trained yet."""
        secret = torch.randint(2, (self.bits,), generator=Generator().manual_seed(self.secret_seed)).float()
        with torch.random.fork_rng(devices=[]):  # no trace in the caller's random state
            torch.default_generator.manual_seed(seed)
            return Hidden(shape, secret, self.width, self.strength, label_map(self.mode, self.target, classes))

    def poison(self, images: ImageSet, seed: int = 0, model: nn.Module | None = None) -> Poisoned:
        """Train the pair on `images`, then poison them; `seed` draws all of it. `model` is not used.

        Raises:
            ValueError: a pair that after training reads or hides worse than `least_bits` and `least_psnr` ask for.
        """
        trigger = self.trigger(images.shape, len(images.classes), seed)
        indices = choose(images, self.rate, trigger.mapping, include_target=self.include_target, seed=seed)
        step = _Hiding(self)
        trigger.requires_grad_(True)
        fit(trigger, images, self._recipe(), seed=seed, step=step, note="SSBA pair", after_epoch=step.after_epoch)
        trigger.requires_grad_(False)
        right, psnr = quality(trigger, images.images[:1000], seed)
        if right < self.least_bits or psnr < self.least_psnr:
            raise ValueError(
                f"after {self.epochs} epochs the decoder reads {right:.3f} of the bits at {psnr:.1f} dB, wanted are "
                f"{self.least_bits:g} at {self.least_psnr:g} dB: raise epochs or width, or ask for less"
            )
        return poison_with(trigger, images, indices)


def quality(trigger: Hidden, images: Tensor, seed: int = 0) -> tuple[float, float]:
    """How well random strings are read back from stored pictures, and how well they are hidden.

    Args:
        images: ``(N, C, H, W)`` uint8.

    Returns:
        The share of the bits read rightly, in [0, 1], and the mean PSNR in dB, both after rounding to grey levels.
    """
    generator, right, psnr = Generator(images.device).manual_seed(seed), [], []
    for x in (images.float() / 255).split(PART):
        secrets = torch.randint(2, (len(x), len(trigger.secret)), generator=generator, device=x.device)
        hidden = (trigger.hide(x, secrets) * 255).round() / 255
        right.append(((trigger.read(hidden) > 0) == secrets).float().mean(1))
        psnr.append(-10 * (hidden - x).square().flatten(1).mean(1).clamp_min(1e-10).log10())
    return float(torch.cat(right).mean()), float(torch.cat(psnr).mean())
