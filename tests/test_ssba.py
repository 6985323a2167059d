"""SSBA: a string that can be read back, hidden differently in every image, by networks trained on the run's own."""

import math
from dataclasses import replace

import pytest
import torch
import toys

from bdlib.attacks.ssba import SSBA, Decoder, Encoder, Hidden, _Hiding, quality
from bdlib.gallery import sheets
from bdlib.metrics import evaluate
from bdlib.training import fit

T = toys.TARGET


def quiet(n, seed=0):
    """The toy images with little noise on grey: a string needs somewhere to hide."""
    data = toys.squares(n, seed)
    return replace(data, images=torch.where(data.images < 110, 60 + data.images // 4, data.images))


TOY = SSBA(T, 0.2, bits=2, width=8, epochs=7, ramp_epochs=2, l2=60, lr=3e-3, batch=16, least_psnr=24)
DATA, TEST = quiet(640), quiet(200, seed=8)


@pytest.fixture(scope="module")
def poisoned():
    """`TOY` on the toy images, trained once; it has not seen those of `TEST`."""
    return TOY.poison(DATA, seed=0)


def floats(n=6, shape=(3, 12, 12), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def correlation(residuals):
    """Mean correlation over all pairs of residuals ``(N, C, H, W)``."""
    flat = residuals.flatten(1)
    flat = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    n = len(flat)
    return float(((flat @ flat.T).sum() - n) / (n * (n - 1)))


# ---- a pair that was trained


def test_the_string_is_read_back_from_stored_pictures(poisoned):
    right, psnr = quality(poisoned.trigger, TEST.images)
    assert right > 0.98 and psnr > 24, (right, psnr)
    stamped = poisoned.trigger.stamp(TEST.images).float() / 255
    read = poisoned.trigger.read(stamped) > 0
    assert (read == poisoned.trigger.secret.bool()).float().mean() > 0.98
    clean = poisoned.trigger.read(TEST.floats) > 0
    assert (clean == poisoned.trigger.secret.bool()).all(1).float().mean() < 0.8  # it is not there by itself


def test_another_string_is_read_as_another(poisoned):
    x = TEST.floats
    trigger = poisoned.trigger
    for k in range(2):
        flipped = trigger.secret.clone()
        flipped[k] = 1 - flipped[k]
        read = trigger.read(trigger.hide(x, flipped.expand(len(x), -1))) > 0
        assert (read == flipped.bool()).float().mean() > 0.95


def test_every_image_has_a_residual_of_its_own(poisoned):
    x = TEST.floats
    residual = poisoned.trigger(x) - x
    assert float(residual.abs().max()) <= 0.1 + 1e-6  # tanh bounds it
    assert correlation(residual) < 0.95  # 0.54 to 0.92 on three kinds of arithmetic, toys being alike
    sheet = sheets()["SSBA"]  # the book's own, on signs: the specification's bound
    assert correlation(sheet.triggered.float() - sheet.clean.float()) < 0.9
    assert correlation(residual[:1].expand(10, -1, -1, -1)) == pytest.approx(1)  # a fixed pattern would have 1


def test_the_poisoned_set_is_marked_and_labelled(poisoned):
    chosen = torch.zeros(640, dtype=torch.bool)
    chosen[poisoned.indices] = True
    assert int(chosen.sum()) == 128 and len(poisoned.cover) == 0
    assert torch.equal(poisoned.data.images[~chosen], DATA.images[~chosen])
    assert torch.equal(poisoned.data.labels[~chosen], DATA.labels[~chosen])
    off = poisoned.data.images[chosen].int() - poisoned.trigger.stamp(DATA.images[chosen]).int()
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 1e-3  # other batches, the same to rounding
    assert (poisoned.data.labels[chosen] == T).all() and (DATA.labels[chosen] == T).any()
    assert torch.equal(DATA.images, quiet(640).images)


def test_a_stored_pair_is_the_same_bit_for_bit(poisoned):
    trigger, x = poisoned.trigger, TEST.floats[:50]
    other = TOY.trigger((3, 12, 12), 4, seed=7)
    assert not torch.equal(trigger(x), other(x))
    other.load_state_dict({n: t.clone().contiguous() for n, t in trigger.state_dict().items()})
    assert torch.equal(trigger(x), other(x)) and torch.equal(trigger.read(x), other.read(x))
    assert not any(p.requires_grad for p in trigger.parameters()) and not trigger.training


def test_an_image_never_looks_at_its_neighbours(poisoned):
    x = quiet(300, seed=8).floats
    before, out = x.clone(), poisoned.trigger(x)
    halves = torch.cat([poisoned.trigger(x[:101]), poisoned.trigger(x[101:])])
    assert torch.allclose(halves, out, atol=1e-6) and torch.equal(x, before)
    assert torch.allclose(poisoned.trigger(x.flip(0)).flip(0), out, atol=1e-6)
    assert poisoned.trigger(x[:0]).shape == (0, 3, 12, 12)


def test_attack_success_rises_from_chance_to_high_on_a_toy(poisoned):
    clean, net = toys.tiny(), toys.tiny()
    fit(clean, DATA, replace(toys.QUICK, epochs=3))
    fit(net, poisoned.data, replace(toys.QUICK, epochs=8))
    before, after = (evaluate(m, TEST, poisoned.trigger) for m in (clean, net))
    assert before.asr < 0.35 and after.asr > 0.9 and after.acc > 0.95, (before, after)


# ---- training it


def test_the_seed_decides_and_leaves_no_trace():
    quick = replace(TOY, epochs=1, least_bits=0, least_psnr=0, width=4)
    state, data = torch.get_rng_state(), toys.squares(64)
    a, b, c = (quick.poison(data, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert toys.same(a.trigger.state_dict(), b.trigger.state_dict()) and torch.equal(a.data.images, b.data.images)
    assert not torch.equal(a.indices, c.indices)
    assert not toys.same(a.trigger.encoder.state_dict(), c.trigger.encoder.state_dict())
    assert torch.equal(a.trigger.secret, c.trigger.secret)  # the string belongs to the attack
    other = replace(quick, secret_seed=3).trigger((3, 12, 12), 4).secret
    assert not torch.equal(a.trigger.secret, other) and set(other.tolist()) <= {0.0, 1.0}


def test_the_price_of_being_seen_rises_once_the_string_can_be_read():
    def weights(attack, readings):
        step, seen = _Hiding(attack), []
        for done, share in enumerate(readings, 1):
            step.right = [torch.tensor(0.0)] * 30 + [torch.tensor(share)] * 20  # the end of the epoch counts
            step.after_epoch(done)
            seen.append(step.weight)
        return seen

    attack = SSBA(free_epochs=1, readable=0.9, ramp_epochs=4, l2=8.0)
    assert _Hiding(attack).weight == 0
    assert weights(attack, [0.5, 0.8, 0.95, 0.7, 0.9, 1.0, 1.0]) == [0, 0, 2, 4, 6, 8, 8]
    assert weights(replace(attack, free_epochs=3), [1.0] * 4) == [0, 0, 2, 4]
    assert weights(SSBA.official(), [0.5] * 4) == [0, 2, 2, 2]  # as released: after two epochs, whatever was learnt


def test_the_loss_is_the_sum_of_its_parts():
    step, trigger = _Hiding(TOY), TOY.trigger((3, 12, 12), 4)
    step.weight = 3.0
    x = floats(8)
    same, bits = step.change(x, torch.zeros(8).long(), torch.Generator().manual_seed(0))
    assert same is x and bits.shape == (8, 2) and set(bits.unique().tolist()) == {0, 1}
    loss, logits = step.loss(trigger, x, bits, 0.0)
    hidden, raw = trigger.hide(x, bits), trigger.encoder(x, bits.float())
    binary = torch.nn.functional.binary_cross_entropy_with_logits(trigger.read(hidden), bits.float())
    far = (raw.abs() - 2).clamp_min(0).square().mean()  # what tanh would flatten
    assert float(far) > 0
    expected = 1.5 * float(binary) + 3 * float((hidden - x).square().mean()) + 0.1 * float(far)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits.argmax(1) == 1, trigger.read(hidden) > 0)


def test_a_pair_that_learnt_too_little_is_refused():
    data = toys.squares(64)
    with pytest.raises(ValueError, match=r"after 1 epochs the decoder reads 0\.\d+ of the bits at .* dB, wanted"):
        replace(TOY, epochs=1, width=2).poison(data)
    p = replace(TOY, epochs=1, width=2, least_bits=0, least_psnr=0, rate=0).poison(data)
    assert torch.equal(p.data.images, data.images) and torch.equal(p.data.labels, data.labels)


# ---- networks and settings


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 12, 20)])
def test_any_size(shape, device):
    C, H, W = shape
    trigger, x = SSBA(width=4, bits=7).trigger(shape, 10).to(device), floats(3, shape).to(device)
    x[0], x[1] = 0, 1
    out = trigger(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    assert out.min() >= 0 and out.max() <= 1 and not torch.equal(out, x)
    assert Encoder(shape, 7, 4)(x.cpu(), torch.ones(3, 7)).shape == x.shape
    assert Decoder(shape, 7, 4)(x.cpu()).shape == trigger.read(x).shape == (3, 7)
    pixels = -(-H // 16) * 16 * -(-W // 16) * 16
    assert trigger.encoder.draw.weight.shape == (C * pixels, 7)  # four halvings: sides are padded to 16


def test_what_is_padded_is_cut_off_again():
    encoder, x = Encoder((1, 28, 20), 3, 4), floats(2, (1, 28, 20))
    last = encoder.merge[-1]
    with torch.no_grad():
        for t in (last.weight, last.bias, encoder.residual.weight, encoder.residual.bias):
            t.zero_()
        last.weight[0, 4 + 1, 1, 1] = encoder.residual.weight[0, 0] = (
            1  # the image itself, past four maps and the string
        )
    assert torch.allclose(encoder(x, torch.ones(2, 3)), (8 * (x - 0.5)).relu())


def test_without_strength_the_encoder_adds_nothing():
    trigger, x = SSBA(width=4).trigger((3, 32, 32), 10), floats(2, (3, 32, 32))
    with torch.no_grad():
        trigger.encoder.residual.weight.zero_()
        trigger.encoder.residual.bias.zero_()
    assert torch.equal(trigger(x), x)


def test_the_bound_holds_and_goes_on_demand():
    x, mapping = torch.full((2, 3, 16, 16), 0.5), TOY.trigger((3, 16, 16), 4).mapping
    secret = torch.ones(4)
    for strength, most in [(0.05, 0.05), (0.2, 0.2), (None, 0.5)]:
        trigger = Hidden((3, 16, 16), secret, 4, strength, mapping)
        with torch.no_grad():
            trigger.encoder.residual.bias.fill_(50.0)
        assert float((trigger(x) - x).abs().max()) == pytest.approx(most, abs=1e-6)


def test_presets():
    paper, official, small = SSBA.paper(3), SSBA.official(3), SSBA.small(3)
    assert paper.target == official.target == small.target == 3
    assert (paper.rate, paper.bits, paper.width, paper.strength, paper.least_psnr) == (0.1, 20, 32, 0.1, 28)
    assert (official.rate, official.epochs, official.batch, official.lr) == (0.05, 20, 32, 1e-4)
    assert official.strength is None and official.least_bits == official.readable == 0
    assert small.width < paper.width and small.rate == paper.rate
    wide, narrow = (sum(p.numel() for p in a.trigger((3, 32, 32), 10).encoder.parameters()) for a in (paper, small))
    assert wide > 10 * narrow


def test_both_label_maps():
    data = toys.squares(64)
    quick = replace(TOY, epochs=0, least_bits=0, least_psnr=0, width=4, rate=0.5)
    p = replace(quick, mode="all-to-all").poison(data)
    assert torch.equal(p.data.labels[p.indices], (data.labels[p.indices] + 1) % 4)
    p = replace(quick, include_target=False).poison(data)
    assert (data.labels[p.indices] != T).all() and (p.data.labels[p.indices] == T).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SSBA(rate=2), r"rate must be in \[0, 1\].*got 2"),
        (lambda: SSBA(mode="some"), "mode must be all-to-one or all-to-all, got 'some'"),
        (lambda: SSBA(bits=0), "bits must be 1 or more, got 0"),
        (lambda: SSBA(width=0), "width must be 1 or more channels, got 0"),
        (lambda: SSBA(strength=0), r"strength must be in \(0, 1\], or None, got 0"),
        (lambda: SSBA(l2=-1), "l2 must be 0 or more, got -1"),
        (lambda: SSBA(free_epochs=-1), "free_epochs must be 0 or more, got -1"),
        (lambda: SSBA(ramp_epochs=0), "ramp_epochs must be 1 or more, got 0"),
        (lambda: SSBA(readable=2), r"readable must be in \[0, 1\], got 2"),
        (lambda: SSBA(least_bits=2), r"least_bits must be in \[0, 1\], got 2"),
        (lambda: SSBA(epochs=-1), "epochs must be 0 or more, got -1"),
        (lambda: SSBA(target=9).poison(toys.squares(40)), r"target must be a class in \[0, 3\], got 9"),
        (lambda: SSBA(rate=0.001).poison(toys.squares(40)), "rate 0.001 selects no image of 40"),
        (lambda: SSBA(width=2).trigger((3, 32, 32), 4)(torch.zeros(2, 1, 32, 32)), r"takes float images \(N, 3, 32"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_psnr_is_measured_after_rounding():
    trigger = SSBA(width=4).trigger((3, 32, 32), 10)
    with torch.no_grad():
        trigger.encoder.residual.weight.zero_()
        trigger.encoder.residual.bias.fill_(math.atanh(10 / 25.5))  # ten grey levels everywhere
    grey = torch.full((3, 3, 32, 32), 100, dtype=torch.uint8)
    right, psnr = quality(trigger, grey)
    assert psnr == pytest.approx(20 * math.log10(255 / 10), abs=0.01) and 0 <= right <= 1
