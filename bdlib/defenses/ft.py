"""FT: fine-tuning on clean images, the baseline that every other defence has to beat.

repair = FT(lr=0.01, epochs=20)(model, clean, seed=0)
"""

import copy
import time
from dataclasses import dataclass

from torch import nn

from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.defenses.base import Repair, check_inputs
from bdlib.training import Recipe, Step, fit


@dataclass(frozen=True)
class FT:
    """Minimise the cross-entropy of the clean images over all weights; BatchNorm in train mode.

    Its result hangs on the learning rate, so a comparison reports a sweep. Introduced in chapter "ANP"; source:
    BackdoorBench @ f02e353.

    Args:
        lr: peak learning rate, cosine to 0 over the run.
        epochs: passes over the clean images, all of which are used: fine-tuning chooses no threshold.
        batch: images a step.
    """

    lr: float = 0.01
    epochs: int = 100
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        self._recipe()  # checks the ranges

    @classmethod
    def paper(cls) -> "FT":
        """BackdoorBench's setting, the one that later papers compare with: lr 0.01, batch 256, 100 epochs, cosine."""
        return cls()

    @classmethod
    def official(cls) -> "FT":
        """The same as `paper`: the benchmark's code is the only source."""
        return cls()

    @classmethod
    def small(cls) -> "FT":
        """For the book's small network and 500 clean images."""
        return cls(lr=0.02, epochs=20, batch=64)

    def _recipe(self) -> Recipe:
        return Recipe(
            self.epochs, self.batch, self.lr, self.momentum, self.weight_decay, nesterov=False, schedule="cosine"
        )

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Fine-tune a copy of `model` on all clean images.

        Args:
            keep_every: keep a copy of the network every so many epochs in ``details["snapshots"]``; 0 keeps none.

        Returns:
            `Repair` with the log of `bdlib.training.fit` and details: snapshots ``[(epoch, model)]``.
        """
        check_inputs(model, clean)
        start, repaired = time.perf_counter(), copy.deepcopy(model)
        log, snapshots = self.tune(repaired, clean.images, seed, keep_every)
        return Repair(repaired, log, {"snapshots": snapshots}, time.perf_counter() - start)

    def tune(
        self, model: nn.Module, images: ImageSet, seed: int, keep_every: int = 0, step: Step | None = None
    ) -> tuple[list[dict[str, float]], list[tuple[int, nn.Module]]]:
        """Fine-tune `model` itself, in place; `step` as in `bdlib.training.fit`. Returns log and snapshots."""
        snapshots: list[tuple[int, nn.Module]] = []

        def keep(epoch: int) -> None:
            if keep_every and epoch % keep_every == 0:
                snapshots.append((epoch, copy.deepcopy(model).eval()))

        return fit(model, images, self._recipe(), seed=seed, step=step, note="FT", after_epoch=keep), snapshots
