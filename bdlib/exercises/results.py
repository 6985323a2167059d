"""Checkers of the chapter "The full matrix": a Pareto front, an exact chance, means that belong together, a leak."""

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from bdlib.exercises.checking import CheckError, check


def check_front(front: Callable[[Tensor], list[int]], *, seed: int = 0) -> None:
    """`front(costs)` is the Pareto front: the rows that no other row dominates, in rising order.

    A row dominates another if it is nowhere worse and somewhere better; less is better in every column. Equal rows do
    not dominate each other.

    Args:
        front: costs ``(N, K)`` -> indices of the rows on the front, sorted.
        seed: of the random costs.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(costs: Tensor) -> list[int]:
        rows = costs.tolist()

        def dominates(a: list[float], b: list[float]) -> bool:
            return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

        return [i for i, row in enumerate(rows) if not any(dominates(other, row) for other in rows)]

    rng = torch.Generator().manual_seed(seed)
    inputs = [
        ("two rows, one better in both columns", (torch.tensor([[2.0, 2], [1, 1]]),)),
        ("a cheap row and a good one", (torch.tensor([[1.0, 9], [9, 1], [10, 10]]),)),
        ("a row that is equal in one column and worse in the other", (torch.tensor([[1.0, 5], [1, 6], [0, 7]]),)),
        ("two equal rows on the front", (torch.tensor([[1.0, 1], [1, 1], [2, 2]]),)),
        ("a row between two others that neither dominates", (torch.tensor([[0.0, 10], [6, 6], [10, 0]]),)),
        ("one row", (torch.tensor([[3.0, 4, 5]]),)),
        ("three columns: good in the third alone", (torch.tensor([[1.0, 1, 9], [2, 2, 0], [3, 3, 9]]),)),
        ("30 random rows of 3 columns", (torch.rand(30, 3, generator=rng),)),
    ]
    check(front, reference, inputs, name="check_front")


def check_exact(exact: Callable[[list[float], list[float]], float]) -> None:
    """`exact(a, b)` is the share of all orders of b whose rank correlation with a is at least as far from zero.

    Args:
        exact: two lists of n numbers without ties, n at most 6 -> share in (0, 1].

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(a: list[float], b: list[float]) -> float:
        def distance(order: tuple[float, ...]) -> float:  # of the sum of squared differences from its mean
            ranks = [[sorted(v).index(x) for x in v] for v in (a, order)]
            n = len(a)
            return abs(sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) - n * (n * n - 1) / 6)

        drawn = [distance(order) for order in permutations(b)]
        return sum(d >= distance(tuple(b)) - 1e-9 for d in drawn) / len(drawn)

    inputs = [
        ("the same order of 4", ([1.0, 2, 3, 4], [10.0, 20, 30, 40])),
        ("the reverse order of 5: as far from zero as the same", ([1.0, 2, 3, 4, 5], [5.0, 4, 3, 2, 1])),
        ("6 values of unequal size: ranks count", ([1.0, 2, 3, 4, 5, 600], [0.0, 1, 2, 3, 500, 4])),
        ("a in no order", ([3.0, 1, 2, 5, 4], [30.0, 20, 10, 50, 40])),
        ("5 values, unrelated: nearly every order is as far", ([1.0, 2, 3, 4, 5], [2.0, 5, 3, 1, 4])),
        ("two values", ([0.0, 1], [7.0, 3])),
    ]
    check(exact, reference, inputs, name="check_exact")


def check_together(together: Callable[[dict[int, float], dict[int, float]], tuple[float, float]]) -> None:
    """`together(acc, asr)` gives both means over the same seeds and refuses, with a ValueError, any other input.

    Args:
        together: two dicts seed -> value -> (mean ACC, mean ASR).

    Raises:
        CheckError: see `bdlib.exercises.check`; also where a ValueError was due and none came.
    """
    good = [
        ("three seeds", ({3: 95.0, 4: 94.0, 5: 93.0}, {3: 1.0, 4: 2.0, 5: 6.0})),
        ("the same seeds in another order", ({3: 95.0, 4: 91.0}, {4: 8.0, 3: 2.0})),
        ("one seed", ({0: 90.0}, {0: 0.0})),
    ]
    bad = [
        ("an ASR without one of the seeds", ({3: 95.0, 4: 94.0}, {3: 1.0})),
        ("an ACC without one of the seeds", ({3: 95.0}, {3: 1.0, 4: 80.0})),
        ("as many seeds, but others", ({3: 95.0, 4: 94.0}, {3: 1.0, 5: 0.0})),
        ("no seed at all", ({}, {})),
    ]
    for where, args in bad:
        try:
            got = together(*map(dict, args))
        except ValueError:
            continue
        except NotImplementedError:
            raise
        except Exception as error:
            raised = f"your function raised {type(error).__name__}: {error}"
            raise CheckError(f"check_together: on {where}, {raised}, expected a ValueError") from error
        raise CheckError(f"check_together: on {where}, your function returned {got!r}, expected a ValueError")

    def reference(acc: dict[int, float], asr: dict[int, float]) -> tuple[float, float]:
        return sum(acc.values()) / len(acc), sum(asr.values()) / len(asr)

    check(together, reference, good, name="check_together")


def check_leak(leak: Callable[[Tensor], float], *, seed: int = 0) -> None:
    """`leak(asr)` is what a choice by test ASR hides: the honest chooser's mean ASR minus the mean of the row minima.

    For each row the honest chooser takes the column whose mean over the *other* rows is least, the first of equals.

    Args:
        leak: ASR ``(S, D)``, a row a seed, a column a defence, S at least 2 -> the difference, 0 or more.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(asr: Tensor) -> float:
        rows = asr.double().tolist()
        hidden = []
        for s, row in enumerate(rows):
            others = [sum(other[d] for i, other in enumerate(rows) if i != s) for d in range(len(row))]
            hidden.append(row[others.index(min(others))] - min(row))
        return sum(hidden) / len(hidden)

    rng = torch.Generator().manual_seed(seed)
    one_good = torch.tensor([[5.0, 90, 80], [4, 95, 85], [6, 92, 70]])
    lottery = torch.tensor([[0.0, 50, 90], [90, 50, 0], [90, 50, 0]])
    inputs = [
        ("one column that is best on every seed: no leak", (one_good,)),
        ("columns that are best on one seed each", (lottery,)),
        ("two seeds that disagree: the honest chooser gets the worst", (torch.tensor([[0.0, 100], [100, 0]]),)),
        ("one column", (torch.tensor([[30.0], [60.0]]),)),
        ("a column that is good on the mean of all, but only through this seed",
         (torch.tensor([[0.0, 40], [50, 45], [50, 45]]),)),
        ("the mean of the others, not their least", (torch.tensor([[10.0, 20], [0, 30], [90, 30]]),)),
        ("4 seeds of 6 random columns", (100 * torch.rand(4, 6, generator=rng),)),
    ]  # fmt: skip
    check(leak, reference, inputs, name="check_leak", tol=1e-3)
