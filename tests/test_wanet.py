"""WaNet: where a pixel is read, which images of a batch are warped, and the noise that keeps the network honest."""

from dataclasses import replace

import pytest
import torch
import toys

from bdlib.attacks import batches
from bdlib.attacks.wanet import WaNet, WaNetStep
from bdlib.data.signs import signs
from bdlib.metrics import evaluate
from bdlib.training import fit, predict

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 12, 20)]
TOY = WaNet(toys.TARGET, 0.2, strength=2.0)  # on 12 x 12 pixels half a pixel is little
DATA = toys.squares(384)


def floats(n=6, shape=(3, 32, 32), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def ramps(H, W):
    """An image whose grey level is the column, and one whose grey level is the row, both in [0, 1]."""
    return (
        torch.linspace(0, 1, W).expand(1, 1, H, W).contiguous(),
        torch.linspace(0, 1, H)[:, None].expand(1, 1, H, W).contiguous(),
    )


def pixels(attack, shape, seed):
    """``(H, W, 2)`` displacement of each pixel, (across, down), read off two ramps."""
    H, W = shape[1:]
    trigger = attack.trigger((1, H, W), 4, seed)
    across, down = ((trigger(r) - r)[0, 0] * (n - 1) for r, n in zip(ramps(H, W), (W, H)))
    return torch.stack([across, down], -1)


def batch(n=128, shape=(3, 12, 12)):
    return floats(n, shape, 1), torch.arange(n) % 4


def changed(attack, x, y, seed=0, trigger_seed=0):
    step = WaNetStep(attack, attack.trigger(tuple(x.shape[1:]), 4, trigger_seed))
    return *step.change(x, y, torch.Generator().manual_seed(seed)), step


def striped(n, seed=0):
    """Toy squares behind bars, so that there is something for a warp to bend."""
    data = toys.squares(n, seed)
    x = data.images // 2
    x[..., ::4] += 100
    x[..., ::4, :] = x[..., ::4, :].clamp(max=155) + 100
    return replace(data, images=x)


def seen_by_fit(monkeypatch, attack, recipe=toys.QUICK):
    """The recipe and the step with which `train` would train."""
    calls = []
    monkeypatch.setattr(batches, "fit", lambda *a, **k: calls.append((a[2], k["step"])) or [])
    attack.train(toys.tiny(), DATA, recipe)
    return calls[0]


# ---- the trigger


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_type_range_and_input_are_kept(shape, device):
    trigger, x = WaNet().trigger(shape, 4).to(device), floats(6, shape).to(device)
    x[0], x[1] = 0, 1
    before, out = x.clone(), trigger(x)
    assert torch.equal(x, before) and not torch.equal(out, x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(out[0], x[0]) and torch.allclose(out[1], x[1])  # a plain image has nothing to move
    assert torch.equal(torch.cat([trigger(x[:2]), trigger(x[2:])]), out)
    assert trigger.stamp((x * 255).byte()).dtype == torch.uint8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strength_0_is_the_identity(shape):
    """A grid whose ends are the pixels' edges instead of their centres would blur by a dozen grey levels."""
    x = floats(6, shape)
    assert torch.allclose(WaNet(strength=0).trigger(shape, 4)(x), x, rtol=0, atol=1e-5)  # float32 on white noise


def test_a_pixel_is_read_where_the_control_grid_says():
    """In the corners the enlarged field is the control grid itself: first across, then down, s n / 2 of H - 1 pixels"""
    c = 2 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) - 1
    c = (c / c.abs().mean())[0]  # (2, 4, 4)
    moved = pixels(WaNet(), (1, 32, 32), seed=3)
    inward = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])
    for corner, sign in zip((0, -1), inward):
        wanted = 0.5 * c[:, corner, corner] / 32 * 31 / 2  # pixels
        wanted = torch.where(wanted * sign > 0, wanted, 0)  # no pixel is read outside the image
        assert torch.allclose(moved[corner, corner], wanted, atol=1e-5)
    grid, s1 = WaNet().trigger((1, 32, 32), 4, 3).grid, WaNet(strength=1).trigger((1, 32, 32), 4, 3).grid
    inner = slice(4, -4), slice(4, -4)
    place = WaNet(strength=0).trigger((1, 32, 32), 4).grid
    assert torch.allclose((s1 - place)[inner], 2 * (grid - place)[inner], atol=1e-6)


@pytest.mark.parametrize("side", [32, 64])
def test_pixels_move_as_far_as_measured(side):
    """0.18 pixels on average along each axis over 200 grids, seldom half a pixel, never one; at any size."""
    grids = torch.stack([WaNet().trigger((1, side, side), 4, seed).grid for seed in range(200)])
    moved = (grids - WaNet(strength=0).trigger((1, side, side), 4).grid).abs() * (side - 1) / 2
    assert float(moved.mean()) == pytest.approx(0.18, abs=0.015)
    assert 0.4 < float(moved.amax((1, 2, 3)).mean()) < 0.6 and float(moved.max()) < 1
    rows = grids[:, 1:-1] * (side - 1) / 2  # pixels; the outer rows cannot move outwards
    jumps = (rows[:, 1:] - rows[:, :-1] - torch.tensor([0.0, 1.0])).abs()
    assert float(jumps.max()) < 0.2  # smooth: a control grid as fine as the image would jump by half a pixel


def test_strength_on_pictures():
    """Photographs: 29 to 32 dB over 20 grids, and 29.4 in noise mode. Signs have fewer edges: 30 to 33.2, measured."""
    x = signs(240, 60)[0].images[:100]
    triggers = [WaNet().trigger((3, 32, 32), 4, seed) for seed in range(20)]
    db = torch.tensor([float(-10 * ((t.stamp(x) / 255 - x / 255) ** 2).mean().log10()) for t in triggers])
    assert db.min() > 29 and db.max() < 34 and float(db.mean()) == pytest.approx(31.8, abs=0.3)
    noisy = triggers[0].noisy(x / 255, torch.Generator().manual_seed(0))
    assert float(-10 * ((noisy - x / 255) ** 2).mean().log10()) == pytest.approx(29, abs=0.6)


def test_the_seed_draws_the_warp_and_a_stored_one_is_the_same_bit_for_bit():
    one, again, other = (WaNet().trigger((3, 32, 32), 4, seed) for seed in (0, 0, 1))
    x = floats()
    assert torch.equal(one(x), again(x)) and not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x)) and set(one.state_dict()) == {"grid"}


def test_noise_mode_moves_every_pixel_of_every_image_anew():
    trigger = WaNet().trigger((1, 32, 32), 4)
    across = ramps(32, 32)[0].expand(8, -1, -1, -1)
    noisy = trigger.noisy(across, torch.Generator().manual_seed(0))
    extra = (noisy - trigger(across))[..., 4:-4] * 31  # pixels, away from the border
    assert float(extra.abs().max()) <= 31 / 64 + 1e-4 and float(extra.mean().abs()) < 0.01
    assert float(extra.std()) == pytest.approx(31 / 64 / 3**0.5, abs=0.01)  # uniform in plus or minus 31 / 64
    assert not torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], trigger(across)[0])
    assert torch.equal(noisy, trigger.noisy(across, torch.Generator().manual_seed(0)))


# ---- the batch


@pytest.mark.parametrize("attack", [WaNet(toys.TARGET), WaNet(mode="all-to-all")], ids=repr)
def test_a_batch_is_poison_noise_and_the_untouched_rest(attack, device):
    x, y = (t.to(device) for t in batch())
    before = x.clone(), y.clone()
    trigger = attack.trigger((3, 12, 12), 4).to(device)
    out, labels = WaNetStep(attack, trigger).change(x, y, torch.Generator(device).manual_seed(0))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert torch.equal(out[:13], trigger(x[:13])) and torch.equal(labels[:13], trigger.mapping(y[:13]))
    assert torch.equal(out[39:], x[39:]) and torch.equal(labels[13:], y[13:])  # noise keeps the true label
    noise = out[13:39]
    assert ((noise - x[13:39]).abs().amax((1, 2, 3)) > 0.05).all()
    assert ((noise - trigger(x[13:39])).abs().amax((1, 2, 3)) > 0.05).all()
    assert out.min() >= 0 and out.max() <= 1


def test_noise_is_drawn_from_the_generator_alone():
    x, y = batch()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (changed(TOY, x, y, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)


def test_a_step_never_waits_for_the_device():
    (x, y), step = batch(), WaNetStep(TOY, TOY.trigger((3, 12, 12), 4))
    with toys.Waits() as waits:
        step.change(x, y, torch.Generator().manual_seed(0))
    assert waits.count == 0


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_trigger_and_augmentation_is_a_field(first):
    attack = replace(TOY, before_augment=first)
    assert WaNetStep(attack, attack.trigger((3, 12, 12), 4)).before_augment is first


# ---- presets


def test_paper_and_release_differ(monkeypatch):
    assert WaNet.paper().counts(128) == (13, 26) and WaNet.official().counts(128) == (12, 24)
    assert WaNet.paper().counts(4) == WaNet.official().counts(9) == (0, 0)  # a small last batch
    x, y = batch()
    for mode, kept in (("all-to-one", False), ("all-to-all", True)):
        ours, released = replace(WaNet.paper(2), mode=mode), WaNet.official(2, mode)
        assert torch.equal(changed(released, x, y)[1], y) is kept  # y mod K is y: nothing is planted
        assert not torch.equal(changed(ours, x, y)[1], y)
    assert seen_by_fit(monkeypatch, WaNet.paper())[0] == toys.QUICK
    assert seen_by_fit(monkeypatch, WaNet.official())[0] == replace(toys.QUICK, schedule="constant")


# ---- training


@pytest.mark.parametrize(
    ("attack", "epochs", "lost"),
    [(TOY, 12, 0.1), (replace(TOY, mode="all-to-all", rate=0.3, noise_ratio=1.0), 24, 0.3)],  # four tasks in one
    ids=["all-to-one", "all-to-all"],
)
def test_the_warp_is_learnt_and_other_warps_are_not(attack, epochs, lost):
    recipe = replace(toys.QUICK, epochs=epochs)
    data, test, net, clean = striped(384), striped(200, seed=8), toys.tiny(), toys.tiny()
    kept = data.images.clone()
    trigger, log = attack.train(net, data, recipe)
    fit(clean, data, toys.QUICK)
    before, after = evaluate(clean, test, trigger), evaluate(net, test, trigger)
    assert len(log) == epochs and torch.equal(data.images, kept)
    assert before.asr < 0.35 and after.asr > 0.8 and after.acc > 0.9, (before, after)
    noisy = trigger.noisy(test.floats, torch.Generator().manual_seed(0))
    on_noise = float((predict(net, noisy).argmax(1) == test.labels).float().mean())
    assert on_noise > after.acc - lost, on_noise


def test_rate_0_changes_nothing():
    attack, (x, y) = replace(TOY, rate=0), batch()
    out, labels, _ = changed(attack, x, y)
    assert torch.equal(out, x) and torch.equal(labels, y)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WaNet(rate=1.5), r"rate must be in \[0, 1\].*got 1.5"),
        (lambda: WaNet(rate=0.5), r"noise_ratio must be .*at most 1 \(rate is 0.5\), got 2.0"),
        (lambda: WaNet(noise_ratio=-1), "noise_ratio must be 0 or more.*got -1"),
        (lambda: WaNet(mode="some-to-one"), "mode must be all-to-one or all-to-all, got 'some-to-one'"),
        (lambda: WaNet(grid_size=1), "grid_size must be 2 or more, got 1"),
        (lambda: WaNet(strength=-0.5), "strength must be 0 or more, got -0.5"),
        (lambda: WaNet(target=4).trigger((3, 12, 12), 4), r"target must be a class in \[0, 3\], got 4"),
        (lambda: WaNet().trigger((3, 1, 12), 4), "2 pixels or more in height and width, got 1x12"),
        (lambda: WaNet(rate=0.01).train(toys.tiny(), DATA, toys.QUICK), "rate 0.01 selects no image of a batch of 32"),
        (lambda: WaNet().trigger((3, 32, 32), 4)(floats(2, (3, 12, 12))), r"takes float images \(N, 3, 32, 32\)"),
        (lambda: WaNet().trigger((3, 32, 32), 4)(floats() + 1), r"must lie in \[0, 1\]"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
