"""Checkers of the chapter "NPD": the target of a made-up trigger, and one step of its inner problem."""

from collections.abc import Callable

import torch
from torch import Tensor

from bdlib.exercises.checking import check


def check_pick_target(pick: Callable[[Tensor, Tensor], Tensor], *, seed: int = 0) -> None:
    """`pick(logits, labels)` is for each image the likeliest class other than the true one.

    Args:
        pick: logits ``(B, K)``, true labels ``(B,)`` -> classes ``(B,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """
    rng = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(8, 5, generator=rng), torch.randint(5, (8,), generator=rng)
    far = torch.tensor([[5.0, -20.0, -30.0], [-40.0, -30.0, 6.0]])
    inputs = [
        ("the true class is the likeliest", (torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([0]))),
        ("a misread image: the likeliest class is wrong already", (torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([2]))),
        ("all other logits are below -10: still not the true class", (far, torch.tensor([0, 2]))),
        ("8 random images of 5 classes", (logits, labels)),
        ("8 random images, logits all negative", (logits - 50, labels)),
    ]
    check(pick, lambda z, y: z.scatter(1, y[:, None], -torch.inf).argmax(1), inputs, name="check_pick_target")


def check_inner_step(step: Callable[[Tensor, Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`step(delta, grad, size, bound)` goes down along the sign of the gradient and returns to the ball of each image.

    Args:
        step: change ``(B, C, H, W)``, the gradient of the loss ``(B, C, H, W)``, step size, largest 2-norm -> change
            ``(B, C, H, W)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(delta: Tensor, grad: Tensor, size: float, bound: float) -> Tensor:
        moved = delta - size * grad.sign()
        norm = moved.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        return moved * (bound / norm).clamp(max=1)

    rng = torch.Generator().manual_seed(seed)
    zero, grad = torch.zeros(2, 1, 2, 2), torch.randn(2, 1, 2, 2, generator=rng)
    delta = 0.3 * torch.randn(3, 3, 4, 4, generator=rng)
    delta[1] *= 0.01  # one image inside the ball, two outside
    inputs = [
        ("change 0, a wide ball: down, against the gradient", (zero, grad, 0.1, 9.0)),
        ("the same gradient a thousand times as large: only its sign counts", (zero, 1000 * grad, 0.1, 9.0)),
        ("a step that leaves the ball: back to its surface", (zero, grad, 1.0, 0.5)),
        ("gradient 0, a change inside the ball: it stays as it is", (0.1 * grad.sign(), zero, 0.1, 9.0)),
        ("3 images, one inside the ball: each has a ball of its own", (delta, torch.zeros_like(delta), 0.0, 1.0)),
        ("gradient 0, change 0: no division by zero", (zero, zero, 0.1, 1.0)),
        ("3 random images", (delta, torch.randn(3, 3, 4, 4, generator=rng), 0.1, 1.0)),
    ]
    check(step, reference, inputs, name="check_inner_step")
