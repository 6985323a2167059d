"""`signs`: the embedded data set, 32x32 RGB traffic signs that the library draws itself.

    train, test = signs()                  # 6,000 + 2,000 images, the same bits on every machine
    prototype(STOP, size=96)               # one clean, upright sign for a figure
    draw([STOP, TARGET], seed=7)           # random views of chosen classes

A sign's face is drawn once, as a map of palette indices. A view then looks that map up under a random pose, nine
samples a pixel, in front of a random piece of street, and passes through light, shadow, blur and noise. Everything is
integer arithmetic on the raw words of PCG64, whose stream NumPy guarantees, so that no processor or library version
can move a pixel. Images come in blocks that depend on the seed alone: `signs(600, 200)` is the beginning of
`signs(6000, 2000)`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .imageset import Augment, Data, ImageSet
from .sign_faces import CLASSES, CLEAR, PALETTE, RED, YELLOW, Array, Mask, cos, face, sin

Pose = dict[str, Array]

STOP = CLASSES.index("stop")  # the sign that wears the sticker in the book's story
TARGET = CLASSES.index("speed limit 80")  # what the attacker wants it read as: "keep going, fast"

# a one-pixel shift never cuts a 3x3 patch that stands one pixel off the border (flush with the corner it would lose up
# to five of its nine pixels; with pad=4 it is gone whole from 40 % of the views). No flip and no cutout: a mirrored
# arrow is another class, and an erased digit is none.
AUGMENT = Augment(pad=1)

SIZE = 32  # pixels, height and width of an image
SAMPLES = 3  # samples a pixel, along each axis
FACE = 128  # texels, height and width of a face map
WEIGHTS = (90, 100, 110)  # per cent: faces come with thin, normal and bold strokes and borders
BLOCK = 240  # images drawn from one stream; a multiple of the number of classes

# how hard the set is: the small network reaches 97 to 98 % in ten epochs. Settled on seeds 0 to 2, and frozen
RADIUS = (70, 94)  # sixths of a pixel: half the size of a sign
TILT = 14  # degrees to either side
BLUR = 3  # most passes of a 1-2-1 filter: standard deviation 0.7 pixel after one, 1.2 after three
NOISE = 8  # grey levels: largest standard deviation of the sensor's noise
OCCLUDED = 16  # per cent of the signs that something stands in front of
SHADOWED = 25  # per cent of the signs that a cast shadow crosses
LIGHT = (120, 300)  # 256ths: brightness, dusk to glare


class _Stream:
    """Integers from the raw words of PCG64, whose order is guaranteed; NumPy's distributions may change, words not."""

    def __init__(self, *key: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(key))

    def words(self, n: int) -> NDArray[np.uint64]:
        return self.bits.random_raw(n)

    def integers(self, low: int, high: int, *shape: int) -> Array:
        """Uniform in [low, high], both included."""
        words = (self.words(math.prod(shape)) >> np.uint64(32)) * np.uint64(high - low + 1) >> np.uint64(32)
        return words.astype(np.int64).reshape(shape) + low

    def chance(self, per_cent: int, *shape: int) -> Mask:
        return self.integers(0, 99, *shape) < per_cent

    def bell(self, *shape: int) -> NDArray[np.int32]:
        """Sums of four bytes less their mean: nearly normal with standard deviation 148."""
        octets = self.words((math.prod(shape) + 1) // 2).astype("<u8").view(np.uint8).reshape(-1, 4).astype(np.int32)
        sums = octets[:, 0] + octets[:, 1] + octets[:, 2] + octets[:, 3] - 510
        return sums[: math.prod(shape)].reshape(shape)


# the street behind the signs: wide scenes from which every view cuts its background

SCENES, SCENE = 48, 96  # how many, and their side in pixels


def _clouds(stream: _Stream, n: int, cell: int) -> Array:
    """Smooth noise in 0..255 with features of `cell` pixels, (n, SCENE, SCENE)."""
    k = SCENE // cell + 2
    knots = stream.integers(0, 255, n, k, k)
    at, t = np.divmod(np.arange(SCENE), cell)
    rows = (knots[:, at] * (cell - t)[:, None] + knots[:, at + 1] * t[:, None]) // cell
    return (rows[:, :, at] * (cell - t) + rows[:, :, at + 1] * t) // cell


def _scenes(stream: _Stream) -> NDArray[np.int32]:
    """Streets (SCENES, 3, SCENE, SCENE) in 0..255: sky, houses, trees, ground, and some clutter."""
    n = SCENES
    y, x = np.arange(SCENE)[None, :, None], np.arange(SCENE)[None, None, :]
    big, mid, fine = (_clouds(stream, n, cell) for cell in (24, 8, 3))

    def number(low: int, high: int) -> Array:
        return stream.integers(low, high, n, 1, 1)

    def colour(low: int, high: int, spread: int) -> Array:
        return number(low, high)[..., None] + stream.integers(-spread, spread, n, 1, 1, 3)

    def paint(mask: Mask, paints: Array) -> None:
        np.copyto(scene, paints, where=mask[..., None])

    blue, grey = np.array([120, 165, 220]), np.array([205, 208, 212])
    overcast = number(0, 4)[..., None]
    sky = (blue * (4 - overcast) + grey * overcast) // 4
    scene = sky + ((y * 40 // SCENE) + (big - 128) // 4)[..., None]
    horizon = number(SCENE // 2, SCENE - 12)
    for _ in range(6):  # houses, from left to right or over one another
        left, width, top = number(-10, SCENE - 8), number(12, 34), number(8, SCENE * 3 // 5)
        wall = colour(60, 190, 28)
        front = (x >= left) & (x < left + width) & (y >= top) & (stream.chance(75, n, 1, 1))
        paint(front, wall + (fine // 12)[..., None])
        pitch, storey = number(5, 9), number(6, 11)
        pane = ((x - left) % pitch >= 2) & ((y - top) % storey >= 3) & ((x - left) % pitch < pitch - 1)
        paint(front & pane, wall - number(25, 60)[..., None] + np.array([0, 4, 12]))
    leaves = number(95, 190) + (y - horizon) * number(-2, 1)
    green = np.array([52, 92, 38]) + colour(-20, 25, 14)
    paint((big + mid) // 2 > leaves, green + ((fine - 128) * 5 // 12 + (mid - 128) // 4)[..., None])
    ground = np.where(stream.chance(60, n, 1, 1)[..., None], colour(90, 130, 6), green + 14)
    paint(y > horizon + (x - SCENE // 2) * number(-3, 3) // 10, ground + ((fine - 128) // 8)[..., None])
    slope, gap = number(-2, 2), number(5, 12)
    fence = ((x * 2 + y * slope) // 2 % gap < 2) & (y > number(10, SCENE)) & stream.chance(40, n, 1, 1)
    paint(fence, colour(40, 210, 12))
    for _ in range(5):  # clutter in the signs' own colours: posters, cars, lamps, other signs
        cx, cy, r = number(0, SCENE), number(0, SCENE), number(3, 9)
        shape = np.where(
            stream.chance(50, n, 1, 1),
            (x - cx) ** 2 + (y - cy) ** 2 <= r * r,
            (abs(x - cx) <= r) & (abs(y - cy) * 2 <= r),
        )
        paints = PALETTE[stream.integers(RED, YELLOW, n)][:, None, None] * 3 // 4 + colour(10, 60, 20)
        paint(shape & stream.chance(70, n, 1, 1), paints)
    return _soften(np.clip(scene, 0, 255).astype(np.int32).transpose(0, 3, 1, 2), np.ones(n, np.int64))


def _soften(images: NDArray[np.int32], passes: Array) -> NDArray[np.int32]:
    """`passes[i]` times a 1-2-1 filter in both directions over image i; images (n, 3, h, w)."""
    for k in range(int(passes.max(initial=0))):
        some = passes > k
        p = np.pad(images[some], ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        p = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
        images[some] = (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:] + 8) >> 4
    return images


def _inverse(pose: Pose, texels: int) -> tuple[Array, Array, Array, Array]:
    """The matrix ux, uy, vx, vy, each (n,), from sixths of a pixel to texels in 1/16384: unturn, stretch, unshear."""
    scale = texels * 128 // pose["radius"]
    sine, cosine = sin(pose["tilt"]), cos(pose["tilt"])
    ux, uy, vx, vy = cosine * scale >> 8, sine * scale >> 8, -sine * scale >> 8, cosine * scale >> 8
    ux, uy = ux * 256 // pose["squeeze"], uy * 256 // pose["squeeze"]
    return ux + (vx * pose["shear"] >> 8), uy + (vy * pose["shear"] >> 8), vx, vy


def _look(faces: NDArray[np.uint8], palettes: Array, pose: Pose) -> tuple[Array, Array]:
    """Colours (n, 3, SIZE, SIZE) summed over the samples that a sign covers, and how many those are (n, SIZE, SIZE).

    Args:
        faces: (n, FACE, FACE) palette indices.
        palettes: (n, 6, 3) colours in 0..255.
        pose: as `_pose` makes it.
    """
    n = len(faces)
    ux, uy, vx, vy = (a[:, None] for a in _inverse(pose, FACE))
    grid = 2 * np.arange(SAMPLES * SIZE, dtype=np.int64) + 1 - SAMPLES * SIZE  # sixths of a pixel from the centre
    x, y = grid - pose["dx"][:, None], grid - pose["dy"][:, None]
    lean = 256 + pose["lean"][:, None] * y // pose["radius"][:, None]
    ux, u0, v0 = ux * lean >> 8, uy * y + (FACE << 13), vy * y + (FACE << 13)
    # from here on the narrow type: every product stays below 2^31
    u = (ux.astype(np.int32)[:, :, None] * x.astype(np.int32)[:, None] + u0.astype(np.int32)[:, :, None]) >> 14
    v = ((vx * x).astype(np.int32)[:, None] + v0.astype(np.int32)[:, :, None]) >> 14
    texel = np.clip(v, 0, FACE - 1) * FACE + np.clip(u, 0, FACE - 1)
    texel += (np.arange(n, dtype=np.int32) * FACE**2)[:, None, None]
    # three colours and a count share a word, so that one gather and one sum serve all four
    packed = palettes[..., 0] | palettes[..., 1] << 16 | palettes[..., 2] << 32 | 1 << 48
    packed[:, CLEAR] = 0
    paint = faces.reshape(-1).take(texel) + (np.arange(n, dtype=np.int32) * packed.shape[1])[:, None, None]
    words = packed.reshape(-1).take(paint)  # (n, samples, samples)
    words = words.reshape(n, SIZE, SAMPLES, SAMPLES * SIZE).sum(2)
    words = words[..., ::SAMPLES] + words[..., 1::SAMPLES] + words[..., 2::SAMPLES]
    return np.stack([words >> shift & 0xFFFF for shift in (0, 16, 32)], 1), words >> 48


def _pose(stream: _Stream, n: int) -> Pose:
    """Where the signs are, (n,) each: `radius`, `dx`, `dy` in sixths of a pixel; `tilt` in half degrees; `squeeze`
    (foreshortening), `shear` and `lean` (how much narrower a sign is at its foot) in 256ths."""
    radius = stream.integers(*RADIUS, n)
    slack = np.maximum(6 * SIZE // 2 - radius, 0) * 3 // 4 + 3  # a sign may lose half a pixel at the edge
    return {
        "radius": radius,
        "dx": stream.integers(-256, 256, n) * slack >> 8,
        "dy": stream.integers(-256, 256, n) * slack >> 8,
        "tilt": stream.integers(-2 * TILT, 2 * TILT, n),
        "squeeze": stream.integers(190, 256, n),
        "shear": stream.integers(-36, 36, n),
        "lean": stream.integers(-40, 40, n),
    }


def _streets(stream: _Stream, n: int, scenes: NDArray[np.int32]) -> Array:
    """A window (n, 3, SIZE, SIZE) somewhere in a scene, half of them mirrored."""
    at, top, left = (stream.integers(0, high, n) for high in (len(scenes) - 1, SCENE - SIZE, SCENE - SIZE))
    span, flip = np.arange(SIZE), stream.chance(50, n)
    rows, columns = top[:, None] + span, left[:, None] + np.where(flip[:, None], span[::-1], span)
    windows = scenes[at[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, SIZE, SIZE, 3)
    return windows.transpose(0, 3, 1, 2).astype(np.int64)


def _paints(stream: _Stream, n: int) -> Array:
    """A palette (n, 6, 3) for every sign: no two coats are alike, and half of them are bleached or dirty."""
    palettes = PALETTE + stream.integers(-16, 16, n, *PALETTE.shape)
    fade = stream.integers(0, 80, n, 1, 1) * stream.chance(50, n, 1, 1)
    return np.clip(palettes + (np.array([150, 145, 140]) - palettes) * fade // 256, 0, 255)


def _light(stream: _Stream, images: Array, along: Callable[[], Array]) -> Array:
    """Brightness, a gradient, a colour cast, a cast shadow and haze; `along()` is a ramp in a random direction."""
    n = len(images)

    def number(low: int, high: int) -> Array:
        return stream.integers(low, high, n, 1, 1)

    shade = 256 + (number(0, 110) * along() >> 7)
    shadowed = (along() > number(-50, 50)) & stream.chance(SHADOWED, n, 1, 1)
    shade = np.where(shadowed, shade * number(110, 190) >> 8, shade)
    gain = number(*LIGHT) * stream.integers(228, 284, n, 3, 1) >> 8
    haze = number(0, 90) * stream.chance(30, n, 1, 1)
    images = (images * shade[:, None] >> 8) * gain[..., None] >> 8
    return np.clip(images + (190 - images) * haze[:, None] // 256, 0, 255)


def _views(labels: Array, stream: _Stream, scenes: NDArray[np.int32]) -> NDArray[np.uint8]:
    """One random view per label, (n, 3, SIZE, SIZE)."""
    n, whole = len(labels), SAMPLES**2

    def number(low: int, high: int) -> Array:
        return stream.integers(low, high, n, 1, 1)

    images, pose = _streets(stream, n, scenes), _pose(stream, n)
    middle = 6 * np.arange(SIZE) - 3 * (SIZE - 1)  # pixel centres, in sixths from the middle
    x, y = middle - pose["dx"][:, None, None], middle[:, None] - pose["dy"][:, None, None]

    def along() -> Array:
        turn = number(0, 719)
        return x * cos(turn) + y * sin(turn) >> 14  # sixths of a pixel from the sign's centre

    def bar(images: Array, width: Array, colour: Array) -> Array:
        return (images * (6 - width[:, None]) + colour * width[:, None]) // 6

    pole = np.clip(number(4, 9) - abs(x), 0, 6) * (y > 0) * stream.chance(65, n, 1, 1)
    images = bar(images, pole, number(60, 170)[:, None])
    faces = _faces()[labels, stream.integers(0, len(WEIGHTS) - 1, n)]
    colours, cover = _look(faces, _paints(stream, n), pose)
    front = images[:, :, :1, :1] // 2 + 20  # what stands in front of a sign has a darker colour of its street
    images = (colours + images * (whole - cover)[:, None]) // whole
    branch = np.clip(number(6, 16) - abs(along() - number(-60, 60)), 0, 6) * stream.chance(OCCLUDED, n, 1, 1)
    images = _light(stream, bar(images, branch, front), along)
    shot = _soften(images.astype(np.int32), stream.integers(0, BLUR, n))  # the lens, then the sensor
    shot += stream.bell(n, 3, SIZE, SIZE) * number(2, 2 * NOISE)[:, None].astype(np.int32) // 296
    return np.clip(shot, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _faces() -> NDArray[np.uint8]:
    """All faces in all weights, (classes, weights, FACE, FACE)."""
    return np.stack([np.stack([face(k, weight, FACE) for weight in WEIGHTS]) for k in range(len(CLASSES))])


def _balanced(n: int, stream: _Stream) -> Array:
    """Labels in shuffled rounds of all classes, so that every beginning is balanced within one."""
    rounds = -(-n // len(CLASSES))
    words = stream.words(rounds * len(CLASSES)).reshape(rounds, -1)
    return np.argsort(words, axis=1, kind="stable").reshape(-1)[:n]


def _part(count: int, seed: int, part: int) -> ImageSet:
    images, labels = np.empty((count, 3, SIZE, SIZE), np.uint8), np.empty(count, np.int64)
    scenes = _scenes(_Stream(seed, part)) if count else np.empty(0, np.int32)
    for start in range(0, count, BLOCK):
        stream = _Stream(seed, part, 1 + start // BLOCK)
        block = _balanced(BLOCK, stream)
        views = _views(block, stream, scenes)
        images[start : start + BLOCK], labels[start : start + BLOCK] = views[: count - start], block[: count - start]
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), CLASSES, "signs", AUGMENT)


def signs(train: int = 6000, test: int = 2000, seed: int = 0) -> Data:
    """Draw the training and the test set, (N, 3, 32, 32) uint8 each, classes balanced within one and shuffled.

    A smaller set is the beginning of a larger one of the same seed. Training and test images share neither streams nor
    streets. Introduced in chapter 1.

    Args:
        train, test: how many images of each.
        seed: 0 or more.

    Raises:
        ValueError: a negative count or seed.
    """
    _check_counts(train=train, test=test, seed=seed)
    return Data(_part(train, seed, 0), _part(test, seed, 1))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


def _checked(labels: Sequence[int] | Tensor) -> Array:
    array = np.asarray(torch.as_tensor(labels).cpu(), np.int64).reshape(-1)
    wrong = array[(array < 0) | (array >= len(CLASSES))]
    if len(wrong):
        raise ValueError(f"a class must be in [0, {len(CLASSES) - 1}], got {int(wrong[0])}")
    return array


def draw(labels: Sequence[int] | Tensor, seed: int = 0) -> Tensor:
    """Random views of the given classes, as in the set but from streets of their own.

    Args:
        labels: (N,) class indices.
        seed: 0 or more.

    Returns:
        (N, 3, 32, 32) uint8.

    Raises:
        ValueError: a class outside the set, a negative seed.
    """
    _check_counts(seed=seed)
    array = _checked(labels)
    return torch.from_numpy(_views(array, _Stream(seed, 2, 1), _scenes(_Stream(seed, 2))))


def prototype(label: int, size: int = 96, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """The clean, upright sign of one class, for figures.

    Args:
        label: class index.
        size: height and width in pixels, 8 to 1024.
        background: colour around the sign, each in 0..255.

    Returns:
        (3, size, size) uint8.

    Raises:
        ValueError: a class outside the set, a size or a background outside its range.
    """
    if len(background) != 3 or not all(0 <= v <= 255 for v in background):
        raise ValueError(f"background must be three values in [0, 255], got {background}")
    if not 8 <= size <= 1024:
        raise ValueError(f"size must be in [8, 1024] pixels, got {size}")
    (label,) = _checked([label])
    palette = PALETTE.copy()
    palette[CLEAR] = background
    fine = palette[face(int(label), 100, 4 * size)].reshape(size, 4, size, 4, 3).sum((1, 3)) // 16
    return torch.from_numpy(fine.transpose(2, 0, 1).astype(np.uint8))
