"""The faces of the signs in `signs`, drawn as maps of palette indices by integer geometry.

    face(CLASSES.index("stop"), weight=100, texels=128)      # (128, 128) uint8, indices into PALETTE

A shape is a boolean mask over a grid of coordinates: `x` and `y` broadcast against each other, the face spans
[-1024, 1024] in both, y points down.
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
Mask = NDArray[np.bool_]
Points = list[tuple[int, int]]

CLASSES = (
    "stop",
    "give way",
    "no entry",
    "speed limit 30",
    "speed limit 50",
    "speed limit 80",
    "priority road",
    "turn right",
    "turn left",
    "ahead only",
    "double bend",
    "danger",
)

CLEAR, RED, WHITE, BLACK, BLUE, YELLOW = range(6)
PALETTE: Array = np.array(
    [[0, 0, 0], [190, 24, 38], [236, 236, 232], [28, 28, 32], [20, 84, 168], [250, 190, 20]], np.int64
)

UNIT = 1024

# sines of half degrees in 1/16384. No entry lies near a rounding tie (a test checks it), so every libm gives the same
SINES: Array = np.array([round(16384 * math.sin(math.pi * k / 360)) for k in range(720)], np.int64)


def sin(half_degrees: Array) -> Array:
    """Sine in 1/16384 of an angle in half degrees."""
    return SINES[half_degrees % 720]


def cos(half_degrees: Array) -> Array:
    """Cosine in 1/16384 of an angle in half degrees."""
    return SINES[(half_degrees + 180) % 720]


def _disc(x: Array, y: Array, cx: int, cy: int, r: int) -> Mask:
    return (x - cx) ** 2 + (y - cy) ** 2 <= r * r


def _stroke(x: Array, y: Array, points: Points, width: int) -> Mask:
    """A line of `width` with round joints through the points."""
    mask = np.zeros(np.broadcast(x, y).shape, bool)
    for (ax, ay), (bx, by) in pairwise(points):
        dx, dy = bx - ax, by - ay
        t = np.clip(((x - ax) * dx + (y - ay) * dy) * 4096 // max(dx * dx + dy * dy, 1), 0, 4096)
        mask |= (4 * (x - ax - (dx * t >> 12)) ** 2 + 4 * (y - ay - (dy * t >> 12)) ** 2) <= width * width
    return mask


def _polygon(x: Array, y: Array, points: Points, rounding: int = 0) -> Mask:
    """A convex polygon, clockwise on the screen, with its edges pushed out by `rounding` and its corners round."""
    closed = [*points, points[0]]
    inside = np.ones(np.broadcast(x, y).shape, bool)
    for (ax, ay), (bx, by) in pairwise(closed):
        inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    return inside | _stroke(x, y, closed, 2 * rounding) if rounding else inside


def _arc(cx: int, cy: int, rx: int, ry: int, start: int, stop: int) -> Points:
    """Points on an ellipse from `start` to `stop` degrees; 0 is right, 90 is down."""
    step = 15 if stop > start else -15
    a = 2 * np.array([*range(start, stop, step), stop], np.int64)
    return [(int(x), int(y)) for x, y in zip(cx + (rx * cos(a) >> 14), cy + (ry * sin(a) >> 14), strict=True)]


# strokes in a box of 480 by 920, centred; y downwards
GLYPHS: dict[str, list[Points]] = {
    "0": [[*_arc(0, -220, 235, 240, 180, 360), *_arc(0, 220, 235, 240, 0, 180), (-235, -220)]],
    "3": [[*_arc(-20, -235, 230, 225, 200, 450), (-90, -10), *_arc(-20, 215, 255, 245, 275, 520)]],
    "5": [[(215, -460), (-185, -460), (-215, -60), *_arc(0, 165, 240, 295, 225, 505)]],
    "8": [_arc(0, -240, 205, 220, 0, 360), _arc(0, 220, 240, 240, 0, 360)],
    "S": [[*_arc(0, -225, 215, 235, 330, 90), *_arc(0, 235, 225, 225, 270, 510)]],
    "T": [[(-240, -460), (240, -460)], [(0, -460), (0, 460)]],
    "O": [[*_arc(0, -200, 235, 260, 180, 360), *_arc(0, 200, 235, 260, 0, 180), (-235, -200)]],
    "P": [[(-200, 460), (-200, -460), *_arc(10, -210, 220, 250, 270, 450), (-200, 40)]],
}


def _write(x: Array, y: Array, text: str, height: int, pitch: int, width: int) -> Mask:
    """Text centred on the origin: letters of `height`, `pitch` apart, strokes of `width`."""
    mask = np.zeros(np.broadcast(x, y).shape, bool)
    for k, letter in enumerate(text):
        shift = (2 * k - len(text) + 1) * pitch // 2
        for line in GLYPHS[letter]:
            # the outline of the letter, not the middle of its stroke, has the height
            scale = height - width
            mask |= _stroke(x, y, [(shift + px * scale // 920, py * scale // 920) for px, py in line], width)
    return mask


def _triangle(x: Array, y: Array, size: int, rounding: int) -> Mask:
    """An upright triangle of half width `size`, round corners included, about the point (0, 110)."""
    half = size - rounding
    return _polygon(x, y - 130, [(0, -half), (half, half * 3 // 4), (-half, half * 3 // 4)], rounding)


def _octagon(x: Array, y: Array, apothem: int) -> Mask:
    return (abs(x) <= apothem) & (abs(y) <= apothem) & ((abs(x) + abs(y)) * 1000 <= 1414 * apothem)


def _diamond(x: Array, y: Array, radius: int) -> Mask:
    return _polygon(x, y, [(0, -radius), (radius, 0), (0, radius), (-radius, 0)], 130)


@lru_cache(maxsize=128)
def face(label: int, weight: int, texels: int) -> NDArray[np.uint8]:
    """One class's face as palette indices.

    Args:
        label: index into `CLASSES`.
        weight: width of strokes and borders in per cent, 85 to 115.
        texels: height and width of the map.

    Returns:
        (texels, texels); the outermost row and column on every side are `CLEAR`. Shared: copy before writing.
    """
    grid = (2 * np.arange(texels, dtype=np.int64) + 1 - texels) * UNIT // texels
    x, y = grid[None, :], grid[:, None]
    indices = np.full((texels, texels), CLEAR, np.uint8)

    def bold(width: int) -> int:
        return width * weight // 100

    def paint(mask: Mask, colour: int) -> None:
        indices[mask] = colour

    name = CLASSES[label]
    if name == "stop":
        paint(_octagon(x, y, 980), RED)
        paint(_octagon(x, y, 925), WHITE)
        paint(_octagon(x, y, 925 - bold(55)), RED)
        paint(_write(x, y, "STOP", 640, 400, bold(115)), WHITE)
    elif name == "give way":
        paint(_triangle(x, -y, 980, 150), RED)
        paint(_triangle(x, -y, 980 - bold(390), 60), WHITE)
    elif name in ("double bend", "danger"):
        paint(_triangle(x, y, 980, 150), RED)
        paint(_triangle(x, y, 980 - bold(290), 60), WHITE)
        if name == "danger":
            paint(_polygon(x, y, [(-50, -260), (50, -260), (25, 210), (-25, 210)], bold(55)), BLACK)
            paint(_disc(x, y, 0, 420, bold(105)), BLACK)
        else:
            path = [(-170, 480), *_arc(-20, 300, 150, 160, 180, 270), *_arc(0, -10, 150, 150, 90, 0), (150, -130)]
            paint(_stroke(x, y, path, bold(175)), BLACK)
    elif name == "priority road":
        paint(_diamond(x, y, 860), BLACK)
        paint(_diamond(x, y, 830), WHITE)
        paint(_diamond(x, y, 830 - bold(270)), BLACK)
        paint(_diamond(x, y, 800 - bold(270)), YELLOW)
    elif name == "no entry":
        paint(_disc(x, y, 0, 0, 985), WHITE)
        paint(_disc(x, y, 0, 0, 930), RED)
        paint((abs(x) <= 660) & (abs(y) <= bold(175)), WHITE)
    elif name.startswith("speed limit"):
        paint(_disc(x, y, 0, 0, 985), RED)
        paint(_disc(x, y, 0, 0, 985 - bold(240)), WHITE)
        paint(_write(x, y, name.split()[-1], 860, 560, bold(165)), BLACK)
    else:
        paint(_disc(x, y, 0, 0, 985), WHITE)
        paint(_disc(x, y, 0, 0, 920), BLUE)
        if name == "ahead only":
            path, head = [(0, 560), (0, -200)], [(0, -680), (390, -160), (-390, -160)]
        else:
            path = [(-330, 560), (-330, -40), *_arc(-130, -40, 200, 200, 180, 270), (150, -240)]
            head = [(620, -240), (120, 130), (120, -610)]
        across = -x if name == "turn left" else x
        paint(_stroke(across, y, path, bold(210)), WHITE)
        paint(_polygon(across, y, head, 20), WHITE)
    return indices
