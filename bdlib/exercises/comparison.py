"""Checkers of the chapter "All defences side by side": the rating, the regret of a threshold, a settled difference."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdlib.exercises.checking import check


def check_rating(rating: Callable[[float, float, float, float], float]) -> None:
    """`rating(acc0, asr0, acc1, asr1)` is the DER: ``(max(0, asr0 - asr1) - max(0, acc0 - acc1) + 1) / 2``.

    Args:
        rating: ACC and ASR before a repair, ACC and ASR after it, all in [0, 1] -> DER in [0, 1].

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(acc0: float, asr0: float, acc1: float, asr1: float) -> float:
        return (max(0.0, asr0 - asr1) - max(0.0, acc0 - acc1) + 1) / 2

    inputs = [
        ("a repair that does nothing: 0.5", (0.95, 1.0, 0.95, 1.0)),
        ("a full repair at no cost: 1", (0.95, 1.0, 0.95, 0.0)),
        ("half of the attack gone, no cost", (0.95, 1.0, 0.95, 0.5)),
        ("ten points of ACC lost, the attack as it was", (0.95, 1.0, 0.85, 1.0)),
        ("a repair that raises the ACC: no reward", (0.85, 1.0, 0.95, 0.5)),
        ("a repair that raises the ASR: no fine beyond the ACC", (0.95, 0.4, 0.9, 0.6)),
        ("0.97 and 0.998 before, 0.94 and 0.012 after", (0.97, 0.998, 0.94, 0.012)),
    ]
    check(rating, reference, inputs, name="check_rating")


def check_regret(regret: Callable[[list[tuple[float, float, float]], float, float], float]) -> None:
    """`regret(curve, chosen, asr)` is what the chosen threshold loses against the best one, in points.

    The loss of a threshold is its drop plus its ASR. Pruning nothing, written as threshold -1, is always possible: it
    has no drop and leaves `asr`.

    Args:
        regret: curve of ``(threshold, drop, ASR)`` in points, the chosen threshold (-1: none), the victim's ASR -> the
            loss of the choice minus the least loss.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(curve: list[tuple[float, float, float]], chosen: float, asr: float) -> float:
        losses = {-1.0: asr} | {t: drop + left for t, drop, left in curve}
        return losses[chosen] - min(losses.values())

    curve = [(0.0, 0.0, 100.0), (0.25, 1.0, 60.0), (0.5, 4.0, 2.0), (0.75, 20.0, 0.0)]
    inputs = [
        ("the best threshold: no regret", (curve, 0.5, 100.0)),
        ("a threshold that spares accuracy and leaves the attack", (curve, 0.25, 100.0)),
        ("a threshold with the least ASR, at 20 points", (curve, 0.75, 100.0)),
        ("no pruning, chosen as -1", (curve, -1.0, 100.0)),
        ("thresholds in falling order", (curve[::-1], 0.25, 100.0)),
        ("a curve on which pruning never pays: the best is -1", ([(0.0, 5.0, 30.0), (0.5, 9.0, 31.0)], 0.0, 30.0)),
        ("a drop below zero: pruning that helps", ([(0.0, -1.0, 50.0), (0.5, -2.0, 50.0)], 0.0, 90.0)),
    ]
    check(regret, reference, inputs, name="check_regret")


def check_settled(settled: Callable[[Tensor, Tensor], int], *, seed: int = 0) -> None:
    """`settled(a, b)` says whether the seeds agree that two defences differ.

    1 if every ``a[s] - b[s]`` is above 0 and their mean exceeds their standard deviation (n - 1 in the denominator), -1
    if the same holds for ``b - a``, else 0.

    Args:
        settled: results ``(S,)`` and ``(S,)`` of two defences on the same S victims, S at least 2 -> -1, 0 or 1.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(a: Tensor, b: Tensor) -> int:
        d = a - b
        if not float(d.mean().abs()) > float(d.std()):
            return 0
        return int((d > 0).all()) - int((d < 0).all())

    rng = torch.Generator().manual_seed(seed)
    victims = torch.tensor([0.0, 40.0, 80.0])  # hard and easy victims: far apart, the same for both defences
    inputs = [
        ("10, 11, 12 against 1, 2, 3", (torch.tensor([10.0, 11, 12]), torch.tensor([1.0, 2, 3]))),
        ("1, 2, 3 against 10, 11, 12", (torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 11, 12]))),
        ("seeds that disagree about the sign", (torch.tensor([5.0, 5, 5]), torch.tensor([1.0, 2, 6]))),
        ("victims far apart, a difference of 5 on each: pairs count", (victims + 5, victims)),
        ("one sign, but one seed makes the whole difference", (torch.tensor([1.0, 1, 91]), torch.zeros(3))),
        ("differences 1, 1 and 7: the deviation has n - 1", (torch.tensor([1.0, 1, 7]), torch.zeros(3))),
        ("equal results", (victims, victims.clone())),
        ("5 random pairs", (torch.rand(5, generator=rng) + 0.8, torch.rand(5, generator=rng))),
    ]
    check(settled, reference, inputs, name="check_settled")
