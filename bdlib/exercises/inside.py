"""Checkers of the chapter "Inside a backdoored network": a Grad-CAM map, a centroid rule, a rescaling that hides."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlib.exercises.checking import check


def check_gradcam(gradcam: Callable[[Tensor, Tensor], Tensor], *, seed: int = 0) -> None:
    """`gradcam(maps, grads)` weighs each channel by its mean gradient, sums over channels and keeps what is positive.

    Args:
        gradcam: activation maps ``(N, C, h, w)`` and the gradient of one logit in them, same shape -> ``(N, h, w)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(maps: Tensor, grads: Tensor) -> Tensor:
        return (grads.mean((2, 3), keepdim=True) * maps).sum(1).clamp(min=0)

    rng = torch.Generator().manual_seed(seed)
    ones, ramp = torch.ones(1, 1, 2, 2), torch.arange(4.0).reshape(1, 1, 2, 2)
    pair = torch.cat([ramp, ramp.flip(2)], 1)  # (1, 2, 2, 2)
    maps, grads = torch.randn(3, 5, 4, 4, generator=rng), torch.randn(3, 5, 4, 4, generator=rng)
    inputs = [
        ("one channel, gradient 1 everywhere: the map itself", (ramp, ones)),
        ("one channel, gradients 0 to 3: every place gets the same weight", (ramp, ramp)),
        ("two channels with gradients 1 and 2: a sum, not a mean", (pair, torch.cat([ones, 2 * ones], 1))),
        ("gradient -1 everywhere: nothing is left", (ramp + 1, -ones)),
        ("two channels that cancel in part: the sum comes before the ReLU", (pair, torch.cat([ones, -ones], 1))),
        ("3 random images of 5 channels", (maps, grads)),
        ("maps of 2 by 3 cells", (maps[:, :, :2, :3].clone(), grads[:, :, :2, :3].clone())),
    ]
    check(gradcam, reference, inputs, name="check_gradcam")


def check_centroids(told: Callable[[Tensor, Tensor], float], *, seed: int = 0) -> None:
    """`told(clean, triggered)` is how well the nearer of two centroids tells triggered from clean on images not used.

    Centroids from rows 0, 2, 4 ... of each; rows 1, 3, 5 ... are judged. Mean of the two shares; a tie counts as wrong.

    Args:
        told: features ``(N, d)`` without and with the trigger -> share in [0, 1].
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(clean: Tensor, triggered: Tensor) -> float:
        a, b = clean[::2].mean(0), triggered[::2].mean(0)
        right = [
            ((x - own).norm(dim=1) < (x - other).norm(dim=1)).double().mean()
            for x, own, other in ((clean[1::2], a, b), (triggered[1::2], b, a))
        ]
        return float(sum(right)) / 2

    rng = torch.Generator().manual_seed(seed)
    cloud, noise = torch.randn(40, 6, generator=rng), torch.randn(40, 6, generator=rng)
    column = torch.tensor([[0.0], [0.0], [0.0], [0.0]])
    mixed = torch.tensor([[0.0], [9.0], [0.0], [1.0]])
    outlier = torch.tensor([[10.0], [10.0], [10.0], [3.0]])
    inputs = [
        ("two clouds far apart", (cloud, cloud + 20)),
        ("centroids from even rows, odd rows judged", (mixed, column + 4)),
        ("one triggered row on the wrong side: 0.75", (column, outlier)),
        ("features that are equal: every row is a tie", (column + 3, column + 3)),
        ("two overlapping clouds of 40 rows", (cloud, noise + 0.6)),
        ("20 clean rows and 4 triggered ones: both count one half", (torch.zeros(20, 1), outlier)),
    ]
    check(told, reference, inputs, name="check_centroids")


def check_hide(
    hide: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], *, seed: int = 0
) -> None:
    """`hide(gamma, beta, weight, factor)` makes each channel `factor` times as large and changes no prediction.

    For a block ``conv(relu(gamma * h + beta), weight)``.

    Args:
        hide: gamma and beta ``(C,)``, the next convolution's weight ``(O, C, k, k)``, factor ``(C,)`` above 0 -> the
            three of them, changed.
        seed: of the random tensors.

    Raises:
        CheckError: see `bdlib.exercises.check`.
    """

    def reference(gamma: Tensor, beta: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gamma * factor, beta * factor, weight / factor[None, :, None, None]

    def outcome(
        fn: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        def run(gamma: Tensor, beta: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
            g, b, w = fn(gamma, beta, weight, factor)
            inside = F.relu(g[:, None, None] * h + b[:, None, None])  # (2, C, 5, 5)
            return inside.norm(dim=(2, 3)), F.conv2d(inside, w)

        return run

    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(2, 4, 5, 5, generator=rng)
    gamma, beta = torch.randn(4, generator=rng), torch.randn(4, generator=rng)
    weight = torch.randn(3, 4, 3, 3, generator=rng)
    square = torch.randn(4, 4, 3, 3, generator=rng)
    one, some = torch.ones(4), torch.tensor([0.5, 1.0, 2.0, 8.0])
    inputs = [
        ("factor 1: nothing moves", (gamma, beta, weight, one)),
        ("beta 0, every channel halved", (gamma, 0 * beta, weight, 0.5 * one)),
        ("a beta that is not 0", (gamma, beta, weight, 0.5 * one)),
        ("four different factors, three outputs", (gamma, beta, weight, some)),
        ("four different factors, four outputs: which axis of the weight?", (gamma, beta, square, some)),
        ("a 1 by 1 convolution", (gamma, beta, weight[..., :1, :1].clone(), some)),
    ]
    check(outcome(hide), outcome(reference), inputs, tol=1e-4, name="check_hide")
