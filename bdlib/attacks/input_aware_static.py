"""Input-Aware, static: the networks of a finished Input-Aware attack poison a data set ("Dynamic" of the RNP code).

InputAwareStatic(target=5, rate=0.1).poison(train, seed=0, model=network)
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from bdlib.attacks.base import Poisoned, check_rate, choose, poison_with
from bdlib.attacks.input_aware import InputAware, Painted
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.training import Recipe


@dataclass(frozen=True)
class InputAwareStatic:
    """``x' = x + (P(x) - x) M(x)`` stamped once into a share of the images; the victim is trained like any other.

    A weaker attack than `InputAware`: the victim never meets a cross sample, so nothing asks it to tell an image's own
    trigger from another's. The RNP code and the backdoor-toolbox @ 9d4d909 use networks that the authors of Input-Aware
    published. Here they are trained in place, beside a copy of the clean network at hand that is thrown away
    afterwards: a reconstruction, in which only the weights of P and M differ from the source's.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of all training images that are poisoned, in [0, 1].
        include_target: whether images of the target class may be drawn too.
        widths, mask_epochs, lr, accumulate: of the two networks and their training, see `InputAware`.
        epochs: of P and the clean network's copy together; the copy learns at 0.01, as in the release.
    """

    needs_model: ClassVar[bool] = True
    target: int = 0
    rate: float = 0.1
    include_target: bool = True
    widths: tuple[int, ...] = (32, 64, 128)
    mask_epochs: int = 25
    epochs: int = 75
    lr: float = 0.01
    accumulate: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        require(self, {"epochs": (self.epochs >= 0, "0 or more")})
        self._source()  # checks the rest

    @classmethod
    def paper(cls, target: int = 0) -> "InputAwareStatic":
        """10 % of all images, as the RNP code's attacks; P and M trained as long as in BackdoorBench @ f02e353."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "InputAwareStatic":
        """The backdoor-toolbox @ 9d4d909: 0.3 % of all images; P as released, its gradients never zeroed."""
        return cls(target, 0.003, accumulate=True)

    @classmethod
    def small(cls, target: int = 0) -> "InputAwareStatic":
        """For the book's small network on a processor: narrower networks, three epochs for M and four for P."""
        return cls(target, widths=(8, 16, 32), mask_epochs=3, epochs=4, lr=0.003)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Painted:
        """Both networks for images of shape ``(C, H, W)``, untrained, initialised from `seed`."""
        return self._source().trigger(shape, classes, seed)

    def poison(self, images: ImageSet, seed: int = 0, model: nn.Module | None = None) -> Poisoned:
        """Train P and M on `images`, then poison; `seed` decides both.

        Args:
            model: a clean network for these images; it is not changed.

        Raises:
            ValueError: no model; a positive rate that selects no image.
        """
        if model is None:
            raise ValueError("InputAwareStatic trains its networks beside a clean network: poison(images, model=...)")
        mapping = self.trigger(images.shape, len(images.classes)).mapping
        indices = choose(images, self.rate, mapping, include_target=self.include_target, seed=seed)
        beside = copy.deepcopy(model).requires_grad_(True)
        recipe = Recipe(self.epochs, lr=0.01, nesterov=False, schedule="constant")
        trigger, _ = self._source().train(beside, images, recipe, seed)
        return poison_with(trigger, images, indices)

    def _source(self) -> InputAware:
        return InputAware(
            self.target, widths=self.widths, mask_epochs=self.mask_epochs, lr=self.lr, accumulate=self.accumulate
        )
