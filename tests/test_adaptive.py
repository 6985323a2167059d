"""Adaptive-Blend and Adaptive-Patch: poison and cover apart, weak parts in training, the whole when used; the panda."""

import math
from dataclasses import replace

import pytest
import torch
import toys

from bdlib.attacks.adaptive import AdaptiveBlend, AdaptivePatch, choose_cover
from bdlib.attacks.pictures import in_channels, panda
from bdlib.data.imageset import ImageSet
from bdlib.metrics import evaluate
from bdlib.training import fit

T = toys.TARGET
DATA = toys.squares(100)
BLEND, PATCH = AdaptiveBlend(T, 0.2, 0.1), AdaptivePatch(T, 0.2, 0.1)
each = pytest.mark.parametrize("attack", [BLEND, PATCH], ids=["blend", "patch"])
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


def psnr(images, others):
    return -10 * math.log10(float((images - others).square().mean()))


def black(n, shape=(3, 32, 32), classes=10):
    """`n` black images, on which a picture of opacity a shows as a times itself; labels run through the classes."""
    return ImageSet(torch.zeros(n, *shape, dtype=torch.uint8), torch.arange(n) % classes, tuple("0123456789"), "black")


# ---- both


@each
@pytest.mark.parametrize("include_target", [True, False])
def test_poison_and_cover_are_apart_and_cover_tells_the_truth(attack, include_target):
    attack = replace(attack, include_target=include_target)
    before = DATA.images.clone(), DATA.labels.clone()
    for seed in range(3):
        p = attack.poison(DATA, seed=seed)
        assert torch.equal(DATA.images, before[0]) and torch.equal(DATA.labels, before[1])
        assert len(p.indices) == 20 and len(p.cover) == 10 and p.cover.dtype == p.indices.dtype == torch.int64
        assert len(torch.cat([p.indices, p.cover]).unique()) == 30  # none twice, none in both
        assert (p.data.labels[p.indices] == T).all()
        rest = torch.ones(100, dtype=torch.bool)
        rest[p.indices] = False
        assert torch.equal(p.data.labels[rest], DATA.labels[rest])  # cover included
        assert (DATA.labels[p.cover] != T).any()
        changed = (p.data.images != DATA.images).flatten(1).any(1)
        rest[p.cover] = False
        assert not changed[rest].any() and changed[~rest].all()
        assert (T in DATA.labels[p.indices].tolist()) == include_target


@each
def test_the_seed_decides(attack):
    a, b, c = (attack.poison(DATA, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.data.images, b.data.images) and torch.equal(a.cover, b.cover)
    assert not torch.equal(a.indices, c.indices) and not torch.equal(a.cover, c.cover)
    assert toys.same(a.trigger.state_dict(), c.trigger.state_dict())


@each
@pytest.mark.parametrize("shape", SHAPES)
def test_any_size_and_a_state_that_reloads_bit_for_bit(attack, shape, device):
    trigger = attack.trigger(shape, 4).to(device)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    before, out = x.clone(), trigger(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.min() >= 0 and out.max() <= 1
    assert torch.equal(x, before) and not torch.equal(out, x)
    assert torch.equal(torch.cat([trigger(x[:2]), trigger(x[2:])]), out)
    other = attack.trigger(shape, 4).to(device)
    for t in other.state_dict().values():
        t.zero_()
    other.load_state_dict(trigger.state_dict())
    assert torch.equal(other(x), out)
    p = attack.poison(black(40, shape).to(device))
    assert p.data.images.device.type == p.cover.device.type == device and len(p.cover) == 4
    there = attack.poison(black(40, shape)).data.images
    assert (p.data.images.cpu().int() - there.int()).abs().max() <= 1  # the processor and the GPU may round apart


@each
def test_rate_0_is_the_identity_and_a_rate_that_selects_nothing_is_refused(attack):
    p = replace(attack, rate=0, cover_rate=0).poison(DATA)
    assert torch.equal(p.data.images, DATA.images) and torch.equal(p.data.labels, DATA.labels)
    assert len(p.indices) == len(p.cover) == 0
    for change, said in [
        ({"rate": 0.001}, r"rate 0\.001 selects no image of 100"),
        ({"cover_rate": 0.001}, r"cover_rate 0\.001 selects no image of 100"),
        ({"cover_rate": 0.9}, r"cover_rate 0\.9 asks for 90 images, but only 80 are left"),
        ({"target": 4}, r"target must be a class in \[0, 3\], got 4"),
    ]:
        with pytest.raises(ValueError, match=said):
            replace(attack, **change).poison(DATA)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AdaptiveBlend(rate=2), r"rate must be in \[0, 1\].*got 2"),
        (lambda: AdaptiveBlend(cover_rate=-1), r"cover_rate must be in \[0, 1\].*got -1"),
        (lambda: AdaptiveBlend(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: AdaptiveBlend(test_alpha=-0.1), r"test_alpha must be in \[0, 1\], got -0.1"),
        (lambda: AdaptiveBlend(kept=17), r"kept must be in \[0, 16\], the number of tiles, got 17"),
        (lambda: AdaptiveBlend(tiles=0), "tiles must be 1 or more, got 0"),
        (lambda: AdaptivePatch(cover_rate=3), r"cover_rate must be in \[0, 1\].*got 3"),
        (lambda: AdaptivePatch(opacities=(0.5, 0.2, 0.5, 3)), r"opacities must be four in \[0, 1\], got \(0.5"),
        (lambda: AdaptivePatch(test_opacity=2), r"test_opacity must be in \[0, 1\], got 2"),
        (lambda: AdaptiveBlend().trigger((2, 8, 8), 4), "3 channels, or 1 in grey, got 2"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_cover_is_drawn_from_all_that_is_left():
    poisoned = torch.arange(60)
    assert choose_cover(DATA, 0.4, poisoned, seed=0).tolist() == list(range(60, 100))
    some = torch.cat([choose_cover(DATA, 0.1, poisoned, seed=s) for s in range(20)])
    assert int(some.min()) >= 60 and len(some.unique()) > 35


def test_presets():
    assert AdaptiveBlend.official(3) == AdaptiveBlend.paper(3) == AdaptiveBlend(3, 0.003, 0.003, 0.15, 0.2, 4, 8)
    paper, official = AdaptivePatch.paper(3), AdaptivePatch.official(3)
    assert (paper.rate, paper.cover_rate, official.rate, official.cover_rate) == (0.003, 0.006, 0.01, 0.02)
    assert paper.target == official.target == AdaptivePatch.small(3).target == AdaptiveBlend.small(3).target == 3


# ---- Blend


@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_8_of_16_tiles_are_kept_other_ones_each_time(shape):
    C, H, W = shape
    p = AdaptiveBlend(0, 0.5, 0.5, alpha=1).poison(black(80, shape))  # every image, the picture in full
    picture = (p.trigger.pattern * 255).round()
    assert float(picture.min()) > 0  # so that what is black was not kept
    kept = (p.data.images.float() == picture).all(1)  # (80, H, W)
    assert torch.equal(~kept, (p.data.images == 0).all(1))  # a pixel is either
    tiles = kept.unflatten(1, (4, H // 4)).unflatten(3, (4, W // 4)).float().mean((2, 4))  # (80, 4, 4)
    assert set(tiles.unique().tolist()) == {0.0, 1.0}  # a tile is kept whole
    assert (tiles.sum((1, 2)) == 8).all()
    assert len(tiles.flatten(1).unique(dim=0)) > 70 and (tiles.mean(0) - 0.5).abs().max() < 0.25


def test_the_tiles_of_a_side_that_four_does_not_divide():
    masks = AdaptiveBlend().masks(50, 30, 13)
    assert masks.shape == (50, 1, 30, 13) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert len(masks[:, 0].flatten(1).sum(1).unique()) > 1 and (masks.mean((1, 2, 3)) - 0.5).abs().max() < 0.2


def test_training_is_weaker_than_the_test_and_part_of_it():
    p = AdaptiveBlend(T, 0.2, 0.1).poison(black(100))
    seen = p.data.images[torch.cat([p.indices, p.cover])].float() / 255
    whole = p.trigger(torch.zeros(30, 3, 32, 32))
    assert (seen <= whole + 1 / 255).all() and ((seen == 0) | (whole > 0)).all()
    shown = seen > 0
    assert torch.allclose(seen[shown], 0.15 / 0.2 * whole[shown], atol=0.6 / 255)
    assert torch.allclose(whole, 0.2 * panda(32, 32).expand_as(whole))


@pytest.mark.parametrize(("alpha", "expected"), [(0.2, 20.2), (0.15, 22.7)])
def test_strength_is_as_measured_on_photographs(alpha, expected):
    """Pictures of CIFAR's mean (0.47) and spread (0.25) stand in: the change is alpha (k - x), and only they count."""
    x = (0.47 + 0.25 * torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    trigger = AdaptiveBlend(test_alpha=alpha).trigger((3, 32, 32), 10)
    assert psnr(trigger(x), x) == pytest.approx(expected, abs=0.5)


def test_no_opacity_is_the_identity():
    p = AdaptiveBlend(T, 0.2, 0.1, alpha=0, test_alpha=0).poison(DATA)
    assert torch.equal(p.data.images, DATA.images) and torch.equal(p.trigger(DATA.floats), DATA.floats)
    p = AdaptivePatch(T, 0.2, 0.1, opacities=(0,) * 4, test_opacity=0).poison(DATA)
    assert torch.equal(p.data.images, DATA.images) and torch.equal(p.trigger(DATA.floats), DATA.floats)


# ---- Patch


def test_the_four_patches_have_the_areas_places_and_opacities_of_the_paper():
    corner, ring, corners, square = (p.opacity[0] for p in AdaptivePatch().patches((3, 32, 32), 10))
    for mask, pixels, opacity in [(corner, 25, 0.5), (ring, 140, 0.2), (corners, 36, 0.5), (square, 64, 0.3)]:
        assert int((mask > 0).sum()) == pixels and mask.unique().tolist() == [0, pytest.approx(opacity)]
    box = lambda mask: [f((mask > 0).any(d).nonzero()).item() for d in (1, 0) for f in (torch.min, torch.max)]  # noqa: E731
    assert box(corner) == [27, 31, 27, 31] and box(ring) == [1, 13, 18, 30] and box(square) == [21, 28, 21, 28]
    assert all(corners[r, c] > 0 for r in (0, 2, 29, 31) for c in (0, 2, 29, 31)) and corners[3:29].sum() == 0
    whole = AdaptivePatch().trigger((3, 32, 32), 10).opacity[0]
    assert whole.unique().tolist() == [0, 1] and int(whole.sum()) == 50 + 36 - 18  # the bottom ones overlap
    assert (whole[(corner > 0) | (corners > 0)] == 1).all()  # these two training patches are part of the test's


def test_each_patch_marks_a_quarter_of_the_poison_and_of_the_cover():
    data = replace(black(200), images=torch.full((200, 3, 32, 32), 40, dtype=torch.uint8))
    attack = AdaptivePatch(0, 0.4, 0.2)
    p = attack.poison(data, seed=1)
    stamped = torch.stack([t.stamp(data.images[:1])[0] for t in attack.patches(data.shape, 10)])  # (4, C, H, W)
    for indices in (p.indices, p.cover):
        match = (p.data.images[indices][:, None] == stamped).flatten(2).all(2)  # (K, 4)
        assert (match.sum(1) == 1).all() and match.sum(0).unique().tolist() == [len(indices) // 4]


def test_when_used_two_patches_replace_what_is_below():
    trigger = AdaptivePatch().trigger((3, 32, 32), 10)
    out = trigger(torch.full((1, 3, 32, 32), 0.5))[0]
    assert torch.equal(out, torch.where(trigger.opacity == 1, trigger.pattern, torch.tensor(0.5)))
    assert out[:, 29:, 29:].unique().tolist() == [0, 1] and out[:, 0, 0].tolist() == [1, 1, 1]  # the checker on top
    assert torch.allclose(out[:, 27, 4], torch.tensor([0.95, 0.45, 0.10]))


def test_patches_scale_with_the_image():
    small, large = ([p.opacity for p in AdaptivePatch().patches((3, s, s), 10)] for s in (32, 64))
    for a, b in zip(small, large, strict=True):
        ratio = (b > 0).sum() / (a > 0).sum()
        assert 3.2 < float(ratio) < 4.9
    assert all((p.opacity > 0).any() for p in AdaptivePatch().patches((1, 12, 12), 10))


@each
def test_attack_success_rises_from_chance_on_a_toy(attack):
    attack = replace(attack, **({"alpha": 0.3, "test_alpha": 0.4} if attack is BLEND else {"cover_rate": 0.05}))
    test, net = toys.squares(200, seed=8), toys.tiny()
    poisoned = attack.poison(toys.squares(640))
    before = evaluate(toys.trained(), test, poisoned.trigger)
    fit(net, poisoned.data, replace(toys.QUICK, epochs=12))
    after = evaluate(net, test, poisoned.trigger)
    assert before.asr < 0.5 and after.asr > 0.7 and after.acc > 0.9, (before, after)


# ---- the picture


def test_the_panda_has_the_statistics_of_its_recipe():
    picture = panda(32, 32)
    assert picture.shape == (3, 32, 32) and picture.min() >= 0 and picture.max() <= 1
    assert torch.allclose(picture.mean((1, 2)), torch.tensor([0.785, 0.757, 0.781]), atol=0.005)
    assert torch.allclose(picture.flatten(1).std(1), torch.tensor([0.316, 0.309, 0.298]), atol=0.005)
    assert float((picture > 0.94).float().mean()) == pytest.approx(0.53, abs=0.01)
    assert float((picture < 0.24).float().mean()) == pytest.approx(0.11, abs=0.01)
    energy = torch.fft.fft2(picture - picture.mean((1, 2), keepdim=True)).abs().square()
    frequency = torch.fft.fftfreq(32, 1 / 32)
    low = frequency[:, None] ** 2 + frequency**2 <= 16
    assert float(energy[:, low].sum() / energy.sum()) == pytest.approx(0.57, abs=0.01)


def test_the_panda_has_its_parts_in_place():
    picture = panda(120, 120)
    ink, white, pink, red = (0.10, 0.10, 0.12), (1.0, 1.0, 1.0), (0.93, 0.55, 0.66), (0.88, 0.22, 0.30)
    for x, y, colour in [
        (0.20, 0.20, ink), (0.80, 0.20, ink), (0.50, 0.30, white), (0.33, 0.55, ink), (0.665, 0.465, white),
        (0.22, 0.63, pink), (0.50, 0.60, ink), (0.50, 0.71, red), (0.50, 0.65, white), (0.50, 0.881, ink),
        (5 / 12, 1 / 12, pink), (1 / 2, 1 / 12, white), (2 / 3, 1 / 12, white), (0.01, 0.25, pink),
        (0.99, 0.25, pink), (0.05, 0.25, white),
    ]:  # fmt: skip
        assert picture[:, int(y * 120), int(x * 120)].tolist() == pytest.approx(colour, abs=1e-4), (x, y)
    for x, colour in [(0.20, (0.35, 0.62, 0.86)), (0.29, white), (0.37, (0.35, 0.62, 0.86))]:
        assert picture[:, 116, int(x * 120)].tolist() == pytest.approx(colour, abs=1e-4)  # the stripes of the shirt


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (20, 50), (1, 1)])
def test_the_panda_comes_in_any_size(height, width):
    picture = panda(height, width)
    assert picture.shape == (3, height, width) and picture.min() >= 0 and picture.max() <= 1
    if height >= 20:
        assert torch.allclose(picture.mean((1, 2)), panda(32, 32).mean((1, 2)), atol=0.01)
    grey = in_channels(picture, 1)
    assert grey.shape == (1, height, width) and in_channels(picture, 3) is picture
    assert torch.allclose(grey[0], 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2])
    with pytest.raises(ValueError, match="height and width must be 1 or more, got 0 and"):
        panda(0, width)
