"""The checker of the chapter "Baselines": the fixed point of a hypergradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdlib.exercises.checking import check


def check_fixed_point(fixed_point: Callable[[Tensor, Tensor, int, float], Tensor], *, seed: int = 0) -> None:
    """`fixed_point(hessian, pull, steps, s)` iterates ``v <- v - s hessian v + pull`` from zero.

    Args:
        fixed_point: matrix ``(d, d)``, vector ``(d,)``, iterations, step -> v ``(d,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(hessian: Tensor, pull: Tensor, steps: int, s: float) -> Tensor:
        v = torch.zeros_like(pull)
        for _ in range(steps):
            v = v - s * hessian @ v + pull
        return v

    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=rng) / 2
    matrix, pull = root @ root.T + 0.3 * torch.eye(4), torch.randn(4, generator=rng)
    inputs = [
        ("no step: v is zero", (matrix, pull, 0, 0.1)),
        ("one step: v is the pull", (matrix, pull, 1, 0.1)),
        ("two steps, s = 0.1", (matrix, pull, 2, 0.1)),
        ("a flat loss (Hessian 0), five steps: five times the pull", (torch.zeros(4, 4), pull, 5, 0.1)),
        ("200 steps: the inverse, divided by s", (matrix, pull, 200, 0.3)),
    ]
    check(fixed_point, reference, inputs, tol=1e-4, name="check_fixed_point")
