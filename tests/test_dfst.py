"""DFST: the style, who gets it, and an injector that the network teaches (or, as released, does not)."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toys

from bdlib.attacks.dfst import DFST, Injector, _Injecting, _Styling, ssim
from bdlib.attacks.inside import read
from bdlib.lab import Controlling
from bdlib.metrics import evaluate
from bdlib.training import Recipe, predict

T = toys.TARGET
DATA = toys.squares(200)
TOY = DFST(T, 0.15, detox_rate=0.1, sample=0.2, injector_batch=16)


def photographs(n=40, shape=(3, 32, 32)):
    """Smooth noise whose mean and spread are those of photographs (CIFAR-10: 0.47, 0.25 in all, 0.2 in one image)."""
    g = torch.Generator().manual_seed(0)
    C, H, W = shape
    rough = F.interpolate(torch.randn(n, C, 8, 8, generator=g), (H, W), mode="bilinear", align_corners=False)
    rough = (rough - rough.mean((2, 3), keepdim=True)) / rough.std((2, 3), keepdim=True)
    level = torch.tensor([0.491, 0.482, 0.447])[:C, None, None] + 0.12 * torch.randn(n, 1, 1, 1, generator=g)
    return (level + 0.2 * rough).clamp(0, 1)


def labelled(attack, model, images, seed=0):
    trigger = attack.trigger(images.shape, 4)
    return trigger, attack.learn_injector(model, trigger, images, seed)


# ---- the style


def test_alpha_0_is_the_identity_and_alpha_1_has_the_colours_of_a_sunset():
    x = photographs()
    assert torch.equal(DFST(alpha=0).trigger((3, 32, 32), 10)(x), x)
    style = DFST(alpha=1).trigger((3, 32, 32), 10)(x)
    # clamping at white costs red a little of its mean and spread
    assert torch.allclose(style.mean((0, 2, 3)), torch.tensor([0.72, 0.42, 0.24]), atol=0.02)
    assert torch.allclose(style.std((2, 3)).mean(0), torch.tensor([0.20, 0.20, 0.14]), atol=0.025)
    top, bottom = style[:, :, :8].mean((0, 2, 3)), style[:, :, -8:].mean((0, 2, 3))
    light = 0.10 * 1.5 * torch.tensor([1, 0.6, -0.2])  # from the middle of the top quarter to that of the bottom one
    assert torch.allclose(top - bottom, light, atol=0.08)
    exact = DFST(alpha=1).trigger((3, 32, 32), 10)(torch.full((1, 3, 32, 32), 0.3))[0, :, :, 0]
    rows = (torch.arange(32) + 0.5) / 32
    for c, (mean, share) in enumerate([(0.72, 1.0), (0.42, 0.6), (0.24, -0.2)]):  # a flat image shows the light alone
        assert torch.allclose(exact[c], mean + 0.10 * (1 - 2 * rows) * share, atol=1e-4)


def test_channel_means_move_towards_the_targets_by_alpha():
    x = photographs()
    out = DFST.paper().trigger((3, 32, 32), 10)(x)
    expected = 0.4 * x.mean((2, 3)) + 0.6 * torch.tensor([0.72, 0.42, 0.24])
    assert (out.mean((2, 3)) - expected).abs().max() < 0.03
    change = (out - x).flatten(1)
    assert (change.std(0).mean() > 0.02) and (change.abs() > 1 / 255).float().mean() > 0.95  # of each image, all over


def test_strength_is_as_measured_on_photographs():
    """17.5 dB on CIFAR-10; on stand-ins with its mean and spread the band is one decibel."""
    x = photographs(200)
    change = DFST().trigger((3, 32, 32), 10)(x) - x
    assert -10 * math.log10(float(change.square().mean())) == pytest.approx(17.5, abs=1.0)
    assert float(change.abs().max()) < 0.6


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_any_size_and_a_state_that_reloads_bit_for_bit(shape, device):
    trigger, x = DFST().trigger(shape, 4, seed=1).to(device), photographs(6, shape).to(device)
    x[0], x[1] = 0, 1
    before, out = x.clone(), trigger(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.min() >= 0 and out.max() <= 1
    assert torch.equal(x, before) and out.isfinite().all()
    assert torch.equal(torch.cat([trigger(x[:2]), trigger(x[2:])]), out)  # an image's own colours, not its batch's
    other = DFST(alpha=0.1).trigger(shape, 4)
    other.load_state_dict(trigger.state_dict())
    assert torch.equal(other.to(device)(x), out)
    with pytest.raises(ValueError, match="takes float images"):
        trigger(x[:, :, 1:])


# ---- a batch


@pytest.mark.parametrize("before_augment", [True, False])
def test_shares_of_a_batch(before_augment):
    attack = replace(TOY, before_augment=before_augment)
    trigger = attack.trigger(DATA.shape, 4)
    step = _Styling(attack, trigger)
    assert step.before_augment == before_augment
    x, y = DATA.floats[:100], DATA.labels[:100]
    kept = x.clone(), y.clone()
    g = torch.Generator().manual_seed(0)
    out, labels = step.change(x, y, g)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    changed = (out != x).flatten(1).any(1)
    assert int(changed.sum()) == 15 and torch.equal(changed, labels != y)  # no injector yet, no detox
    assert (labels[changed] == T).all() and (y[changed] != T).all()
    assert torch.allclose(out[changed], trigger(x[changed]))
    step.injector = Injector(3, 5)
    with torch.no_grad():
        step.injector.mix.weight.mul_(0.5)
    out, labels = step.change(x, y, g)
    styled, detox = labels != y, (out != x).flatten(1).any(1) & (labels == y)
    assert int(styled.sum()) == 15 and int(detox.sum()) == 10
    assert torch.allclose(out[detox], 0.4 * x[detox] + 0.6 * 0.5 * x[detox], atol=1e-6) and not out.requires_grad


def test_a_batch_short_of_other_classes_is_no_error():
    x = DATA.floats[DATA.labels == T][:20]
    out, labels = _Styling(replace(TOY, rate=0.5), TOY.trigger(DATA.shape, 4)).change(
        x, torch.full((20,), T), torch.Generator().manual_seed(0)
    )
    assert (labels == T).all() and out.shape == x.shape


def test_the_host_never_waits_inside_an_epoch():
    step = _Styling(TOY, TOY.trigger(DATA.shape, 4))
    step.injector = Injector(3, 5)
    with toys.Waits() as waits:
        step.change(DATA.floats[:32], DATA.labels[:32], torch.Generator().manual_seed(0))
    assert waits.count == 0


# ---- the injector


def test_a_fresh_injector_changes_nothing_and_looks_at_a_window():
    x = photographs(4)
    assert torch.allclose(Injector(3, 11)(x), x)
    for released in (False, True):
        injector = Injector(3, 5, released=released)
        with torch.no_grad():
            injector.mix.weight.zero_()[:, 6:9, 0, 0] = torch.eye(3)  # the local minimum alone
        out, centre = injector(x), x[:, :, 8:13, 8:13]
        expected = -centre.amax((2, 3)) if released else centre.amin((2, 3))
        assert torch.allclose(out[:, :, 10, 10], expected.clamp(0, 1))


def test_likeness_is_1_for_equal_images_and_falls_with_noise():
    x = photographs(8)
    noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert float(ssim(x, x)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(x, 1 - x)) < float(ssim(x, noisy)) < 0.9
    assert float(ssim(x, x * 0.9)) > 0.9


def backdoored():
    """A toy network on which the style is a backdoor, without detox."""
    net = toys.tiny()
    attack = replace(TOY, detox_rate=0.0)
    attack.train(net, toys.squares(384), replace(toys.QUICK, epochs=4))
    return net


NET = []


@pytest.fixture
def net():
    if not NET:
        NET.append(backdoored())
    return NET[0]


def test_the_network_teaches_the_injector_unless_released(net):
    before = toys.state(net)
    test = toys.squares(100, seed=9)
    test = test[test.labels != T]
    loss, change = {}, {}
    for attack in (replace(TOY, injector_epochs=0), TOY, replace(TOY, released=True)):
        _, injector = labelled(attack, net, DATA)
        with torch.no_grad():
            x = attack.inject(injector, test.floats)
            loss[attack.released, attack.injector_epochs] = float(
                F.cross_entropy(predict(net, x), torch.full((len(x),), T))
            )
            change[attack.released, attack.injector_epochs] = float((x - test.floats).abs().mean())
        assert not any(p.requires_grad for p in injector.parameters())
    start, paper, official = loss[False, 0], loss[False, 10], loss[True, 10]
    assert paper < 0.7 * start and paper < official, loss  # CE(-> target) falls
    assert change[False, 0] < 1e-6 < change[True, 10]
    assert toys.unchanged(before, net)


def test_no_gradient_from_the_network_as_released(net):
    """Whatever the network is, the released injector is the same."""
    attack = replace(TOY, released=True, injector_epochs=2)
    a, b = (labelled(attack, m, DATA)[1].state_dict() for m in (net, toys.trained()))
    assert toys.same(a, b)
    c, d = (labelled(replace(attack, released=False), m, DATA)[1].state_dict() for m in (net, toys.trained()))
    assert not toys.same(c, d)


@pytest.mark.parametrize("released", [False, True])
def test_the_loss_of_the_injector_is_the_sum_of_its_parts(net, released):
    attack, injector, x = replace(TOY, released=released), Injector(3, 5), DATA.floats[:20]
    with torch.no_grad():
        injector.mix.weight.add_(0.1)
    loss, logits = _Injecting(attack, net, torch.tensor([3, 7])).loss(injector, x, DATA.labels[:20], 0.0)
    injected = 0.4 * x + 0.6 * injector(x)
    expected, features = read(net, injected)
    like, wanted = float(ssim(injected, x).detach()), torch.full((20,), T)
    rewarded = (1 - like) / 2 if released else like  # as released: dissimilarity
    parts = F.cross_entropy(expected, wanted) - 0.1 * rewarded - 0.3 * features[:, [3, 7]].mean()
    assert float(loss.detach()) == pytest.approx(float(parts.detach()), abs=1e-4) and torch.allclose(
        logits, expected, atol=1e-4
    )


# ---- training


def test_the_style_becomes_a_backdoor_and_detox_keeps_the_rest():
    assert isinstance(TOY, Controlling)
    data, test, net = toys.squares(384), toys.squares(200, seed=8), toys.tiny()
    kept = data.images.clone()
    trigger, log = TOY.train(net, data, toys.QUICK, seed=0)
    before, after = (evaluate(m, test, trigger) for m in (toys.trained(), net))
    assert before.asr < 0.5 and after.asr > 0.9 and after.acc > 0.95, (before, after)
    assert len(log) == 6 and torch.equal(data.images, kept) and not net.training
    assert all(p.requires_grad for p in net.parameters())


def test_rate_0_is_clean_training():
    recipe, a, b = Recipe(epochs=2, batch=32), toys.tiny(), toys.tiny()
    replace(TOY, rate=0.0).train(a, DATA, recipe)
    replace(TOY, rate=0.0, detox_rate=0.0).train(b, DATA, recipe)
    assert toys.same(a.state_dict(), b.state_dict())


def test_presets():
    paper, official = DFST.paper(3), DFST.official(3)
    assert (paper.rate, paper.alpha, paper.detox_rate, paper.target) == (0.05, 0.6, 0.05, 3)
    assert official.released and not paper.released and official == replace(paper, released=True)
    assert DFST.small(3).target == 3 and not DFST.small().released


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DFST(rate=2), r"rate must be in \[0, 1\].*got 2"),
        (lambda: DFST(alpha=-1), r"alpha must be in \[0, 1\], got -1"),
        (lambda: DFST(rate=0.6, detox_rate=0.5), r"detox_rate must be in \[0, 0.4\], what `rate` leaves, got 0.5"),
        (lambda: DFST(sample=0), r"sample must be in \(0, 1\], got 0"),
        (lambda: DFST(neuron_rate=2), r"neuron_rate must be in \(0, 1\], got 2"),
        (lambda: DFST(injector_epochs=-1), "injector_epochs must be 0 or more, got -1"),
        (lambda: DFST(injector_batch=0), "injector_batch must be 1 or more, got 0"),
        (lambda: DFST().trigger((2, 8, 8), 4), "3 channels, or 1 in grey, got 2"),
        (lambda: DFST(4).trigger((3, 8, 8), 4), r"target must be a class in \[0, 3\], got 4"),
        (lambda: DFST(T, 0.01).train(toys.tiny(), DATA, toys.QUICK), "rate 0.01 selects no image of a batch of 32"),
        (
            lambda: DFST(T, 0.1, detox_rate=0.01).train(toys.tiny(), DATA, toys.QUICK),
            "detox_rate 0.01 selects no image of a batch of 32",
        ),
        (
            lambda: TOY.train(toys.tiny(), DATA[DATA.labels == T], toys.QUICK),
            "all images bear the target label 1",
        ),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_frozen_network_stays_as_it_was(net):
    twin = copy.deepcopy(net)
    twin.train()
    next(twin.parameters()).requires_grad = False
    before = toys.state(twin)
    labelled(replace(TOY, injector_epochs=1), twin, DATA)
    assert toys.unchanged(before, twin)
