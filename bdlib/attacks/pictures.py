"""Pictures that attacks blend in, drawn from formulas: nothing to download, nobody's trademark.

panda(32, 32)                      # (3, 32, 32) float in [0, 1]
in_channels(panda(28, 28), 1)      # the same in grey
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INK, WHITE, PINK, RED, BLUE = (0.10, 0.10, 0.12), (1.0,) * 3, (0.93, 0.55, 0.66), (0.88, 0.22, 0.30), (0.35, 0.62, 0.86)
LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look (BT.601)


def panda(height: int, width: int) -> Tensor:
    """A panda on dotted paper: bright, flat and edgy, as the cartoon that the benchmarks blend in.

    At 32x32 its mean is (0.79, 0.76, 0.78) and 53 % of its values lie above 0.94; the benchmark's cartoon has
    (0.81, 0.74, 0.77) and 50 % (measured on the file of BackdoorBench @ f02e353).

    Args:
        height, width: in pixels, 1 or more.

    Returns:
        ``(3, height, width)`` float in [0, 1].

    Raises:
        ValueError: a side below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be 1 or more, got {height} and {width}")
    fine = 8  # drawn this much larger, then averaged: smooth edges at any size
    y, x = torch.meshgrid(
        (torch.arange(height * fine) + 0.5) / (height * fine),
        (torch.arange(width * fine) + 0.5) / (width * fine),
        indexing="ij",
    )
    picture = torch.ones(3, height * fine, width * fine)

    def paint(where: Tensor, colour: tuple[float, ...]) -> None:
        picture[:, where] = torch.tensor(colour)[:, None]

    def oval(x0: float, y0: float, rx: float, ry: float) -> Tensor:
        return ((x - x0) / rx) ** 2 + ((y - y0) / ry) ** 2 <= 1

    pitch = 1 / 6  # of the dots; every other row is shifted by half
    row = (y / pitch).floor()
    across, down = (x / pitch + row % 2 / 2) % 1 - 0.5, y / pitch - row - 0.5
    paint(across**2 + down**2 <= 0.27**2, PINK)
    for side in (-1, 1):
        paint(oval(0.5 + 0.3 * side, 0.20, 0.13, 0.13), INK)  # ears
    paint((y > 0.86) & ((x - 0.5).abs() < 0.36), INK)  # shirt, behind the chin
    inside, blue = (y > 0.88) & ((x - 0.5).abs() < 0.34), (x * 12).floor() % 2 == 0
    paint(inside & blue, BLUE)
    paint(inside & ~blue, WHITE)
    paint(oval(0.5, 0.52, 0.43, 0.37), INK)  # the outline of the face
    paint(oval(0.5, 0.52, 0.41, 0.35), WHITE)
    for side in (-1, 1):
        paint(oval(0.5 + 0.17 * side, 0.48, 0.085, 0.115), INK)
        paint(oval(0.5 + 0.165 * side, 0.465, 0.03, 0.035), WHITE)
        paint(oval(0.5 + 0.28 * side, 0.63, 0.06, 0.04), PINK)  # cheeks
    paint(oval(0.5, 0.60, 0.055, 0.035), INK)  # nose
    paint(oval(0.5, 0.68, 0.10, 0.06) & (y > 0.68), RED)  # mouth
    return F.avg_pool2d(picture[None], fine)[0]


def in_channels(picture: Tensor, channels: int) -> Tensor:
    """A colour picture ``(3, H, W)`` for images of 3 channels, or its brightness ``(1, H, W)`` for grey ones.

    Raises:
        ValueError: another number of channels.
    """
    if channels == 3:
        return picture
    if channels != 1:
        raise ValueError(f"a picture has 3 channels, or 1 in grey, got {channels}")
    return (picture * picture.new_tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
