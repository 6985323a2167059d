"""The embedded set: the same bits everywhere, balanced, and every class drawn as itself."""

import hashlib
import math

import numpy as np
import pytest
import torch

from bdlib.data import load
from bdlib.data.sign_faces import CLASSES, CLEAR, SINES, face
from bdlib.data.signs import FACE, STOP, TARGET, WEIGHTS, draw, prototype, signs

# SHA-256 of the first 48 training and 24 test images of seed 0
GOLDEN = "19a927b983d20d77a53d9328f02ff9fb621167e88b5a519d27fdf089086c1f52"


def sha(*tensors: torch.Tensor) -> str:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.contiguous().numpy().tobytes())
    return h.hexdigest()


def test_the_pixels_are_those_of_every_other_machine():
    data = signs(48, 24)
    assert sha(data.train.images, data.train.labels, data.test.images, data.test.labels) == GOLDEN


def test_sines_are_far_from_rounding_ties():
    exact = [16384 * math.sin(math.pi * k / 360) for k in range(720)]
    assert min(abs(abs(v - math.floor(v)) - 0.5) for v in exact) > 1e-4  # a libm errs by about 1e-12
    assert np.abs(SINES - exact).max() <= 0.5


def test_shape_names_and_augmentation():
    train, test = signs(60, 36)
    for part, n in ((train, 60), (test, 36)):
        assert part.images.shape == (n, 3, 32, 32) and part.images.dtype == torch.uint8
        assert part.classes == CLASSES and part.name == "signs"
        assert torch.bincount(part.labels).tolist() == [n // 12] * 12
        assert not part.augment.flip and part.augment.cutout == 0  # both would change a class
    assert train.labels.tolist() != sorted(train.labels.tolist())
    assert CLASSES[STOP] == "stop" and STOP == 0 and TARGET != STOP
    # what the poisoning chapters rely on: no crop loses a flush 3x3 corner patch whole
    assert train.augment.pad < 3


@pytest.mark.parametrize("count", [1, 7, 239, 241])
def test_a_smaller_set_is_the_beginning_of_a_larger_one(count):
    small, large = signs(count, 0).train, signs(250, 0).train
    assert torch.equal(small.images, large.images[:count]) and torch.equal(small.labels, large.labels[:count])
    counts = torch.bincount(small.labels, minlength=12)
    assert counts.max() - counts.min() <= 1


def test_seeds_and_parts_differ():
    a, b = signs(24, 24), signs(24, 24, seed=1)
    assert not torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, a.test.images)
    assert len(torch.unique(a.train.images.flatten(1), dim=0)) == 24


def test_the_loader_gives_the_default_set():
    train, test = load("signs")
    assert (len(train), len(test)) == (6000, 2000)
    first = signs(12, 12)
    assert torch.equal(train.images[:12], first.train.images) and torch.equal(test.images[:12], first.test.images)
    mean, std = train.stats()
    assert all(0.2 < m < 0.6 for m in mean) and all(0.1 < s < 0.4 for s in std)


@pytest.mark.parametrize("label", range(len(CLASSES)))
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_face_ends_inside_its_map(label, weight):
    indices = face(label, weight, FACE)
    # a pose clips coordinates to the map: what lies beyond it takes the edge's value
    assert all((edge == CLEAR).all() for edge in (indices[0], indices[-1], indices[:, 0], indices[:, -1]))
    assert (indices != CLEAR).mean() > 0.3


def test_the_arrows_are_mirrored():
    right, left = (face(CLASSES.index(f"turn {side}"), 100, 64) for side in ("right", "left"))
    assert np.array_equal(right, left[:, ::-1]) and not np.array_equal(right, left)


def test_draw_gives_the_classes_asked_for():
    views = draw([0, 5, 0], seed=3)
    assert views.shape == (3, 3, 32, 32) and views.dtype == torch.uint8
    assert torch.equal(views, draw(torch.tensor([0, 5, 0]), seed=3))
    assert not torch.equal(views[0], views[2])  # one class, two views
    assert draw([]).shape == (0, 3, 32, 32)
    # on average, a stop sign is redder in the middle than one that says "ahead only"
    red, blue = (
        draw([CLASSES.index(name)] * 40).float()[:, :, 10:22, 10:22].mean((0, 2, 3)) for name in ("stop", "ahead only")
    )
    assert red[0] > red[2] + 30 and blue[2] > blue[0] + 20


@pytest.mark.parametrize("size", [32, 97])
def test_prototypes_are_clean_and_distinct(size):
    images = [prototype(k, size) for k in range(len(CLASSES))]
    assert all(image.shape == (3, size, size) and image.dtype == torch.uint8 for image in images)
    assert all((image[:, 0, 0] == 255).all() for image in images)
    assert len(torch.unique(torch.stack(images).flatten(1), dim=0)) == len(CLASSES)
    assert prototype(0, size, (10, 20, 30))[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: signs(-1), "train must be 0 or more, got -1"),
        (lambda: signs(1, -2), "test must be 0 or more, got -2"),
        (lambda: signs(1, 1, seed=-3), "seed must be 0 or more, got -3"),
        (lambda: draw([0, 12]), r"class must be in \[0, 11\], got 12"),
        (lambda: draw([0], seed=-1), "seed must be 0 or more, got -1"),
        (lambda: prototype(-1), "got -1"),
        (lambda: prototype(0, size=4), r"size must be in \[8, 1024\] pixels, got 4"),
        (lambda: prototype(0, background=(0, 0, 300)), r"background must be three values in \[0, 255\]"),
    ],
)
def test_bad_input_names_the_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
