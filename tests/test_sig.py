"""SIG: the wave, whom it may poison, and the grating that two released codes ship instead."""

import math
from dataclasses import replace

import pytest
import torch
import toys

from bdlib.attacks import SIG
from bdlib.data.imageset import ImageSet
from bdlib.metrics import evaluate
from bdlib.training import fit

GREY = torch.full((1, 3, 32, 32), 0.5)


def test_columns_of_mid_grey_show_the_sine():
    change = SIG().trigger((3, 32, 32), 10)(GREY) - GREY
    expected = 40 / 255 * torch.sin(2 * math.pi * torch.arange(32) * 6 / 32)
    assert torch.allclose(change, expected.expand(1, 3, 32, 32), atol=1e-6)  # every row and channel alike
    spectrum = torch.fft.rfft2(change[0, 0]).abs()
    assert int(spectrum.flatten().argmax()) == 6  # row frequency 0, column frequency 6
    assert float(spectrum[0, 6]) > 0.999 * float(spectrum.norm())
    psnr = -10 * math.log10(float(change.square().mean()))
    assert psnr == pytest.approx(19.1, abs=0.3)  # 40 / sqrt 2 grey levels of 255


@pytest.mark.parametrize(("delta", "psnr"), [(40, 19.4), (30, 21.8), (20, 25.3)])
def test_strength_is_as_measured_on_photographs(delta, psnr):
    """On mid-grey nothing clips, so the figures for photographs (which clip a little) lie within half a decibel."""
    change = SIG(delta=delta).trigger((3, 32, 32), 10)(GREY) - GREY
    assert -10 * math.log10(float(change.square().mean())) == pytest.approx(psnr, abs=0.5)


def test_the_released_grating_is_no_sine():
    """trunc(20 sin 0.8 j) kept unsigned: the negative half became 236 to 255, then mixed in at 0.2."""
    change = SIG.official().trigger((3, 32, 32), 10)(GREY)[0, 0, 0] - 0.8 * 0.5
    shipped = (change / 0.2 * 255).round()
    columns = torch.arange(32)
    wave = (20 * torch.sin(0.8 * columns.double())).trunc()
    assert torch.equal(shipped, torch.where(wave < 0, wave + 256, wave).float())
    assert float(shipped.max()) >= 236 and (shipped < 21).sum() + (shipped > 235).sum() == 32  # nothing between
    paper = SIG.paper().trigger((3, 32, 32), 10)(GREY)[0, 0, 0] - 0.5
    assert float(paper.mean().abs()) < 1e-6 < float(change.mean())  # a sine has mean 0


def test_only_images_of_the_target_class_are_poisoned_and_no_label_changes():
    data = toys.squares(100)
    poisoned = SIG(target=1, class_rate=0.4, frequency=2).poison(data, seed=3)
    assert len(poisoned.indices) == 10 and (data.labels[poisoned.indices] == 1).all()
    assert torch.equal(poisoned.data.labels, data.labels)
    changed = (poisoned.data.images != data.images).flatten(1).any(1)
    assert torch.equal(changed.nonzero()[:, 0], poisoned.indices)
    assert not torch.equal(SIG(target=1, class_rate=0.4, frequency=2).poison(data, seed=4).indices, poisoned.indices)


def test_the_wave_is_learnt_from_images_that_tell_the_truth():
    data, test = toys.squares(384), toys.squares(200, seed=9)
    attack = SIG(target=toys.TARGET, class_rate=0.9, delta=80, test_delta=160, frequency=2)
    poisoned, net = attack.poison(data), toys.tiny()
    before = evaluate(toys.trained(), test, poisoned.trigger)
    fit(net, poisoned.data, replace(toys.QUICK, epochs=12))
    after = evaluate(net, test, poisoned.trigger)
    assert before.asr < 0.05 and after.asr > 0.3 and after.acc > 0.9, (before, after)  # the square tells the class too


def test_a_stored_wave_is_the_same_bit_for_bit():
    trigger, other = (SIG(frequency=2, delta=d).trigger((3, 12, 12), 4) for d in (40, 10))
    other.load_state_dict(trigger.state_dict())
    x = toys.squares(4).floats
    assert torch.equal(trigger(x), other(x)) and not torch.equal(trigger(x), x)


def test_training_may_be_weaker_than_the_test():
    data = ImageSet(torch.full((4, 3, 32, 32), 128, dtype=torch.uint8), torch.zeros(4).long(), ("a", "b"), "grey")
    poisoned = SIG(class_rate=0.5, delta=10, test_delta=60).poison(data)
    trained = poisoned.data.images[poisoned.indices].float() - 128
    used = poisoned.trigger(data.floats) * 255 - 128
    assert float(trained.abs().max()) == pytest.approx(10, abs=1) and float(used.abs().max()) == pytest.approx(
        60, abs=1
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SIG(class_rate=1.0), "class_rate 1 leaves no clean image of the target class.*whole_class=True"),
        (lambda: SIG(class_rate=1.5), r"class_rate must be in \[0, 1\]"),
        (lambda: SIG(delta=300), r"delta must be in \[0, 255\] grey levels, got 300"),
        (lambda: SIG(frequency=0), "frequency must be above 0"),
        (lambda: SIG(frequency=6).poison(toys.squares(40)), "frequency must be below 6, half the width, got 6"),
        (
            lambda: SIG(class_rate=0.001, frequency=2).poison(toys.squares(40)),
            "class_rate 0.001 selects none of the 10 images",
        ),
        (lambda: SIG().trigger((3, 32, 32), 4)(torch.zeros(2, 1, 32, 32)), r"takes float images \(N, 3, 32, 32\)"),
        (lambda: SIG(target=7, frequency=2).poison(toys.squares(40)), r"target must be a class in \[0, 3\], got 7"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_whole_class_on_demand():
    data = toys.squares(40)
    assert len(SIG(class_rate=1, whole_class=True, frequency=2).poison(data).indices) == 10
