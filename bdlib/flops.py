"""What a step costs on paper: floating-point operations, counted while a defence's own loop runs.

flops(lambda: predict(model, images))                          # operations of anything
stage_flops(ANP.paper(), "masks", model, clean)                # of one iteration or epoch of a stage
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.defenses.nad import NAD


class Flops(TorchDispatchMode):
    """Counts floating-point operations of matrix products and convolutions by the formulas of `FlopCounterMode`.

    That mode itself hooks into modules and refuses the gradient of a network's own input, which NPD takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of `work`, the two of a multiply-add counted apart."""
    with Flops() as counter:
        work()
    return counter.total


def _learn(defence: Any, clean: CleanSet) -> ImageSet:
    return clean.learn if defence.threshold is None else clean.images


# stage: its own loop run for n iterations or epochs, and how many of them the defence makes, from its `Repair.details`
Stage = tuple[Callable[[Any, nn.Module, CleanSet, int], Any], Callable[[Any, dict[str, Any]], int]]
STAGES: dict[str, dict[str, Stage]] = {
    "ANP": {
        "masks": (lambda d, m, c, n: replace(d, iterations=n).learn(m, _learn(d, c)), lambda d, r: d.iterations),
    },
    "RNP": {
        "unlearn": (lambda d, m, c, n: replace(d.ascent, epochs=n)(m, _learn(d, c)), lambda d, r: len(r["unlearning"])),
        "recover": (lambda d, m, c, n: replace(d, epochs=n).recover(m, _learn(d, c)), lambda d, r: d.epochs),
    },
    "NPD": {
        "warm-up": (lambda d, m, c, n: replace(d, warm_up=n, epochs=0)(m, c), lambda d, r: d.warm_up),
        "polarize": (lambda d, m, c, n: replace(d, warm_up=0, epochs=n)(m, c), lambda d, r: d.epochs),
    },
    "NAD": {
        "teacher": (lambda d, m, c, n: _nad(d, n, 0)(m, c), lambda d, r: d.teacher.epochs),
        "student": (lambda d, m, c, n: _nad(d, 0, n)(m, c), lambda d, r: d.student.epochs),
    },
    "MNP": {
        "suppress": (
            lambda d, m, c, n: replace(d.ascent, epochs=n)(m, _learn(d, c)),
            lambda d, r: len(r["suppression"]),
        ),
        "masks": (
            lambda d, m, c, n: replace(d, epochs=n, penalty=0.0).learn(m, m, _learn(d, c)),
            lambda d, r: d.epochs,
        ),
    },
}


def _nad(nad: NAD, teacher: int, student: int) -> NAD:
    return replace(nad, teacher=replace(nad.teacher, epochs=teacher), student=replace(nad.student, epochs=student))


def stage_flops(defence: Any, stage: str, model: nn.Module, clean: CleanSet) -> int:
    """Operations of one iteration (ANP) or epoch of a stage: its loop run once, less what it costs to run it never."""
    run = STAGES[type(defence).__name__][stage][0]
    return flops(lambda: run(defence, model, clean, 1)) - flops(lambda: run(defence, model, clean, 0))
