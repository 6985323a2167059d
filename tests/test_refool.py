"""Refool: light adds up in linear units, and which light an image gets is written in its own pixels."""

from dataclasses import replace

import pytest
import torch
import toys

from bdlib.attacks.refool import Reflection, Refool, scenes, uniform_of, vignette
from bdlib.metrics import evaluate
from bdlib.training import fit
from bdlib.triggers import LabelMap

T = toys.TARGET
DATA = toys.squares(100)
DIRTY = Refool(T, None, 0.2, alpha=(0.4, 0.4))
CLEAN = Refool(T, 0.4)
both = pytest.mark.parametrize("attack", [DIRTY, CLEAN], ids=["dirty", "clean"])


def floats(n=24, shape=(3, 12, 12)):
    x = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(0)).float() / 255
    x[0], x[1] = 0, 1
    return x


def flat(value, shape=(3, 12, 12), **settings):
    """A trigger that reflects one picture of a single colour."""
    C, H, W = shape
    return Reflection(torch.full((1, C, 2 * H, 2 * W), float(value)), Refool(**settings), LabelMap(0, 4))


@pytest.mark.parametrize("ghost_rate", [0.0, 1.0])
def test_no_reflection_is_the_identity(ghost_rate):
    x = floats()
    dark = flat(0, alpha=(1, 1), ghost_rate=ghost_rate)
    assert torch.equal(dark.stamp((x * 255).to(torch.uint8)), (x * 255).to(torch.uint8))
    ghost = flat(0.7, alpha=(1, 1), ghost_rate=1.0)  # its weight is 1 - alpha
    assert torch.equal(ghost.stamp((x * 255).to(torch.uint8)), (x * 255).to(torch.uint8))


def test_light_adds_up_in_linear_units():
    a, b, alpha = 0.6, 0.3, 0.7
    x = torch.full((5, 3, 12, 12), a)
    doubled = flat(b, alpha=(alpha, alpha), ghost_rate=1.0)(x)
    assert torch.allclose(doubled, torch.tensor((alpha * a**2.2 + (1 - alpha) * b**2.2) ** (1 / 2.2)), atol=1e-6)
    blurred = flat(b, alpha=(alpha, alpha), ghost_rate=0.0)(x)[0, 0]
    light = alpha * a**2.2 + vignette(12, 12) * (1 - alpha / 2) * b**2.2
    assert torch.allclose(blurred, light ** (1 / 2.2), atol=1e-6)


def test_out_of_focus_light_is_dimmed_where_it_would_blind():
    x = torch.full((1, 3, 12, 12), 0.9)
    a, b = 0.9**2.2, 0.8**2.2
    assert a + b > 1
    att = 1.08 + 0.1 * float(uniform_of(x, 9)[0, 8])
    light = 0.7 * a + vignette(12, 12) * 0.65 * (b - (a + b - 1) * att)
    trigger = flat(0.8, alpha=(0.7, 0.7), ghost_rate=0.0)
    assert torch.allclose(trigger(x)[0, 0], light ** (1 / 2.2), atol=1e-5)


def test_the_vignette_is_the_released_window():
    """scipy's normal distribution over 3 deviations and half a cell, differences, root of the outer product, max 1."""
    n = 32
    interval = 7 / n
    edges = torch.linspace(-3 - interval / 2, 3 + interval / 2, n + 1, dtype=torch.float64)
    cells = (0.5 * (1 + torch.erf(edges / 2**0.5))).diff()
    window = torch.outer(cells, cells).sqrt()
    assert torch.allclose(vignette(n, n), (window / window.max()).float(), atol=1e-6)
    assert vignette(28, 32).shape == (28, 32) and torch.allclose(vignette(28, 32), vignette(32, 32)[2:30], atol=1e-4)


def test_a_ghost_is_the_picture_twice():
    picture = torch.zeros(1, 1, 64, 64)
    picture[0, 0, 30, 30] = 1
    trigger = Reflection(picture, Refool(alpha=(0.5, 0.5), ghost_rate=1.0, offsets=(1, 2)), LabelMap(0, 4))
    x = torch.zeros(200, 1, 32, 32)
    x[torch.arange(200), 0, 0, 0] = torch.arange(200) / 255  # every image has numbers of its own
    light = trigger(x)[:, 0, 1:] ** 2.2
    seen = light.flatten(1) > 1e-9
    assert (seen.sum(1) == 2).all()  # a shift is never 0 in both directions
    assert torch.allclose(light.sum((1, 2)), torch.tensor(0.5), atol=1e-4)  # beta and 1 - beta
    near = light[:, 13, 14]  # the unshifted one: row 30 - 16, less the one cut off
    assert float(near.min()) >= 0.5 * 0.149 and float(near.max()) <= 0.5 * 0.851
    assert 0.3 < float((near > 0.25).float().mean()) < 0.7  # either may be the stronger one
    shifts = {(int(i) // 32 - 13, int(i) % 32 - 14) for s in seen for i in s.nonzero()[:, 0]} - {(0, 0)}
    assert shifts == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_out_of_focus_is_a_gaussian_of_the_drawn_width():
    picture = torch.zeros(1, 1, 64, 64)
    picture[0, 0, 32, 32] = 1
    x = torch.zeros(1, 1, 32, 32)
    trigger = Reflection(picture, Refool(alpha=(0, 0), ghost_rate=0.0, blur=(1.1, 1.1)), LabelMap(0, 4))
    light = trigger(x)[0, 0] ** 2.2 / vignette(32, 32)
    far = (torch.arange(32) - 16).abs()
    bell = torch.exp(-far.square() / (2 * 1.1**2)) * (far <= 3)  # cut off at ceil(2 sigma)
    bell = bell / bell.sum()
    assert torch.allclose(light, torch.outer(bell, bell), atol=1e-5)


@both
def test_an_image_decides_for_itself(attack, device):
    trigger, x = attack.trigger((3, 12, 12), 4).to(device), floats().to(device)
    before, out = x.clone(), trigger(x)
    assert torch.equal(x, before) and out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    assert float(out.min()) >= 0 and float(out.max()) <= 1 and (out != x).flatten(1).any(1).all()
    alone = torch.cat([trigger(x[:7]), trigger(x[7:])])
    others = alone, trigger(x.flip(0)).flip(0), trigger(x.contiguous(memory_format=torch.channels_last))
    assert all(torch.allclose(y, out, atol=1e-6) for y in others)  # wide registers round the rest of a row differently
    assert torch.equal(attack.trigger((3, 12, 12), 4, seed=9).to(device)(x), out)  # nothing hangs on a run's seed
    stamped = trigger.stamp((x * 255).round().to(torch.uint8))
    assert (stamped.int() - (out * 255).round().int()).abs().max() <= 1
    there = attack.trigger((3, 12, 12), 4)(floats())
    assert ((out.cpu() - there).abs() * 255).max() <= 1


def test_the_numbers_of_an_image_are_uniform_and_change_with_one_grey_level():
    x = torch.zeros(4000, 1, 5, 5)  # 25 pixels: not a multiple of eight
    x[:, 0, 0, :2] = torch.stack([torch.arange(4000) % 250, torch.arange(4000) // 250], 1) / 255
    u = uniform_of(x, 4)
    assert u.shape == (4000, 4) and float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.stack([torch.histc(column, 10, 0, 1) for column in u.T])
    assert float((counts - 400).abs().max()) < 100  # five deviations
    assert float((torch.corrcoef(u.T) - torch.eye(4)).abs().max()) < 0.08
    assert len(u[:, 0].unique()) > 3990 and torch.equal(u[5:6], uniform_of(x[5:6], 4))
    assert torch.equal(uniform_of(x + 0.4 / 255, 4), u)  # a checksum of grey levels
    rows = torch.arange(16).view(1, 1, 2, 8) / 255
    assert not torch.equal(uniform_of(rows.flip(2), 4), uniform_of(rows, 4))  # the same levels in other places


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 64), (1, 28, 28)])
def test_scenes_are_as_dark_and_soft_as_the_photographs(shape):
    """Section 6.4 of the specification: mean 0.23 to 0.25, 0.14 to 0.15 across, 0.09 within, 68 to 82 % at r <= 4."""
    C, H, W = shape
    pictures = scenes(64, shape)
    assert pictures.shape == (64, C, 2 * H, 2 * W) and float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    middle = pictures[..., H // 2 : H // 2 + H, W // 2 : W // 2 + W]
    assert float(middle.mean()) == pytest.approx(0.24, abs=0.03)
    assert float(middle.mean((1, 2, 3)).std()) == pytest.approx(0.145, abs=0.025)
    assert float(middle.std((1, 2, 3)).mean()) == pytest.approx(0.09, abs=0.01)
    power = torch.fft.fft2(middle - middle.mean((2, 3), True)).abs().square()
    radius = (torch.fft.fftfreq(H)[:, None].square() + torch.fft.fftfreq(W).square()).sqrt() * H
    assert 0.68 <= float(power[..., radius <= 4].sum() / power.sum()) <= 0.85
    assert torch.equal(scenes(64, shape), pictures) and not torch.equal(scenes(64, shape, 1), pictures)


@both
def test_poisoning_marks_exactly_the_indices(attack):
    before = DATA.images.clone()
    p = attack.poison(DATA, seed=1)
    chosen = torch.zeros(100, dtype=torch.bool)
    chosen[p.indices] = True
    assert torch.equal(DATA.images, before) and len(p.cover) == 0
    assert torch.equal(p.data.images[~chosen], DATA.images[~chosen])
    assert torch.equal(p.data.images[chosen], p.trigger.stamp(DATA.images[chosen]))
    if attack is CLEAN:
        assert len(p.indices) == 10 and (DATA.labels[chosen] == T).all() and torch.equal(p.data.labels, DATA.labels)
    else:
        assert len(p.indices) == 20 and (p.data.labels[chosen] == T).all() and T in DATA.labels[chosen]
        assert torch.equal(p.data.labels[~chosen], DATA.labels[~chosen])
    again, other = attack.poison(DATA, seed=1), attack.poison(DATA, seed=2)
    assert torch.equal(again.data.images, p.data.images) and not torch.equal(other.indices, p.indices)
    assert toys.same(other.trigger.state_dict(), p.trigger.state_dict())
    nothing = replace(attack, **{"class_rate" if attack is CLEAN else "rate": 0.0}).poison(DATA)
    assert torch.equal(nothing.data.images, DATA.images) and len(nothing.indices) == 0


def test_paper_is_clean_label_and_official_is_as_benchmarked():
    paper, official = Refool.paper(3), Refool.official(3)
    assert (paper.target, paper.class_rate, paper.rate, paper.alpha) == (3, 0.2, None, (0.55, 0.95))
    assert (official.target, official.class_rate, official.rate, official.alpha) == (3, None, 0.1, (0.4, 0.4))
    assert torch.equal(paper.poison(DATA).data.labels, DATA.labels)
    assert not torch.equal(official.poison(DATA).data.labels, DATA.labels)
    x = floats()[2:]
    darker = [a.trigger((3, 12, 12), 4)(x).mean() - x.mean() for a in (paper, official)]
    assert darker[1] < darker[0] < 0  # more of the image's light is lost


def test_strength_on_flat_grey():
    """No published figure exists; alpha 0.4 alone would leave 0.5 * 0.4^(1/2.2) = 0.33 of 0.5, which is 15.4 dB."""
    x = torch.full((256, 3, 32, 32), 0.5)
    x[torch.arange(256), 0, 0, 0] = torch.arange(256) / 255
    error = (Refool.official().trigger((3, 32, 32), 10)(x) - x).square().flatten(1).mean(1)
    psnr = -10 * error.mean().log10()
    assert 16 < float(psnr) < 21


def test_a_reflection_is_learnt_on_a_toy():
    test, net = toys.squares(200, seed=8), toys.tiny()
    bright = replace(DIRTY, pictures=4, picture_seed=1, alpha=(0.3, 0.3))
    trigger = bright.trigger(test.shape, 4)
    before = evaluate(toys.trained(), test, trigger)
    fit(net, bright.poison(toys.squares(640)).data, replace(toys.QUICK, epochs=8))
    after = evaluate(net, test, trigger)
    assert before.asr < 0.5 and after.asr > 0.8 and after.acc > 0.9, (before, after)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Refool(class_rate=0.2, rate=0.1), "give class_rate .* or rate .*, got 0.2 and 0.1"),
        (lambda: Refool(class_rate=None), "give class_rate .* or rate .*, got None and None"),
        (lambda: Refool(class_rate=1.0), "class_rate 1 leaves no clean image of the target class.*whole_class=True"),
        (lambda: Refool(class_rate=None, rate=2.0), r"rate must be in \[0, 1\]"),
        (lambda: Refool(alpha=(0.9, 0.1)), r"alpha must be two shares in \[0, 1\], least first, got \(0.9, 0.1\)"),
        (lambda: Refool(ghost_rate=1.5), r"ghost_rate must be in \[0, 1\], got 1.5"),
        (lambda: Refool(offsets=(0, 2)), "offsets must be two shifts of 1 pixel or more"),
        (lambda: Refool(blur=(0.0, 1.0)), "blur must be two deviations above 0"),
        (lambda: Refool(pictures=0), "pictures must be 1 or more, got 0"),
        (lambda: Refool(offsets=(1, 40)).poison(DATA), "offsets and blur must stay within half of a 12x12 image"),
        (lambda: Refool(class_rate=0.001).poison(DATA), "class_rate 0.001 selects none of the 25 images"),
        (lambda: Refool(class_rate=None, rate=0.001).poison(DATA), "rate 0.001 selects no image of 100"),
        (lambda: Refool(target=7).poison(DATA), r"target must be a class in \[0, 3\], got 7"),
        (lambda: CLEAN.trigger((3, 12, 12), 4)(torch.zeros(2, 1, 12, 12)), r"takes float images \(N, 3, 12, 12\)"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
