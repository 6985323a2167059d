"""LIRA: who moves when, what the classifier's gradient holds, and how much noise is left in an image file."""

import copy
import inspect
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Generator, nn

from bdlib.attacks.lira import LIRA, STD, Alternate, Mixed
from bdlib.lab import Controlling
from bdlib.metrics import evaluate
from bdlib.training import fit

T = toys.TARGET
TINY = LIRA(T, epsilon=0.3, share=0.5, widths=(4, 8), lr=3e-3)
RECIPE = replace(toys.QUICK, epochs=2)
DATA = toys.squares(64)


class Fixed(nn.Module):
    """In place of the noise network: the same value everywhere."""

    multiple = 1

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def floats(shape=(3, 12, 12), n=6, seed=0):
    return torch.rand(n, *shape, generator=Generator().manual_seed(seed))


# ---- the trigger


@pytest.mark.parametrize("network", ["unet", "autoencoder"])
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 30, 45)])
def test_any_size_is_taken_each_image_is_on_its_own_and_the_bound_holds(shape, network):
    attack = replace(TINY, network=network, widths=(4, 4, 8, 8), epsilon=0.1)
    trigger, x = attack.trigger(shape, 4), floats(shape)
    x[0], x[1] = 0, 1
    before = x.clone()
    out = trigger(x)
    assert torch.equal(x, before) and out.shape == x.shape and out.dtype == x.dtype and not torch.equal(out, x)
    assert out.min() >= 0 and out.max() <= 1 and not out.requires_grad
    bound = 0.1 * torch.tensor(STD if shape[0] == 3 else [sum(STD) / 3])[:, None, None]
    assert ((out - x).abs() <= bound + 1e-6).all() and (out - x).abs().max() > 0.002
    assert torch.allclose(torch.cat([trigger(x[:2]), trigger(x[2:])]), out, atol=1e-6)


@pytest.mark.parametrize(("epsilon", "psnr", "levels"), [(0.01, 48.2, 1), (0.1, 32.6, 6)])
def test_saturated_noise_is_as_strong_in_a_file_as_measured(epsilon, psnr, levels):
    trigger = replace(TINY, epsilon=epsilon).trigger((3, 32, 32), 4)
    trigger.network = Fixed(1.0)
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    change = trigger.stamp(grey).double() - 128
    assert float(change.abs().max()) == levels
    assert 10 * math.log10(255**2 / float(change.square().mean())) == pytest.approx(psnr, abs=0.3)
    assert float(trigger(grey / 255).sub(grey / 255).max()) == pytest.approx(epsilon * 0.229, rel=1e-3)


@pytest.mark.parametrize(("noise", "left"), [(0.85, 0), (0.9, 1), (-0.85, 0), (-0.9, -1)])
def test_a_file_keeps_only_noise_close_to_its_bound(noise, left):
    trigger = replace(TINY, epsilon=0.01).trigger((3, 32, 32), 4)
    trigger.network = Fixed(noise)
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    assert (trigger.stamp(grey).int() - 128 == left).all()


def test_no_bound_no_noise():
    assert torch.equal(replace(TINY, epsilon=0.0).trigger((3, 12, 12), 4)(floats()), floats())


@pytest.mark.parametrize("network", ["unet", "autoencoder"])
def test_a_trigger_is_its_state(network):
    one, other = (replace(TINY, network=network, epsilon=e).trigger((3, 12, 12), 4, seed=s) for e, s in
                  ((0.1, 0), (0.5, 1)))  # fmt: skip
    assert not torch.equal(one(floats()), other(floats()))
    other.load_state_dict(one.state_dict())  # the bound included
    assert torch.equal(one(floats()), other(floats())) and one.mapping == other.mapping


# ---- the steps


def step(attack=TINY, **changes):
    """A stage 1 step and a classifier in evaluation mode, so that its BatchNorm does not move."""
    attack = replace(attack, **changes)
    return Alternate(attack, attack.trigger(DATA.shape, 4)), toys.trained()


@pytest.mark.parametrize("leak", [False, True])
def test_the_noise_network_s_step_leaves_the_classifier_alone(leak):
    alternate, net = step(leak=leak)
    before, checked = toys.state(net), []
    noise = copy.deepcopy(alternate.learning.network.state_dict())

    def look(*_):
        assert toys.unchanged(copy.copy(before), net)  # weights, and no gradient in any of them
        assert all(p.grad is not None for p in alternate.learning.network.parameters())
        checked.append(True)

    alternate.optimiser.register_step_pre_hook(look)
    alternate.loss(net, DATA.floats, DATA.labels, 0.0)
    assert checked and toys.unchanged(before, net)
    assert not toys.same(alternate.learning.network.state_dict(), noise)


def test_the_noise_learns_to_bring_about_the_target_label():
    alternate, net = step(lr=0.01)
    x, y = DATA.floats, DATA.labels

    def cost():
        with torch.no_grad():
            return float(F.cross_entropy(net(alternate.learning.add(x)), torch.full_like(y, T)))

    before = cost()
    for _ in range(15):
        alternate.loss(net, x, y, 0.0)
    assert cost() < before - 0.05


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


def test_leaking_adds_the_gradient_of_the_noise_network_s_step_once():
    """Triggered images weigh 0.5 + 1 against 0.5, which is what BackdoorBench's missing zero_grad amounts to."""
    plain, net = step(lr=0.0)
    leaky, _ = step(lr=0.0, leak=True)
    x, y = DATA.floats, DATA.labels
    a, b = plain.loss(net, x, y, 0.0)[0], leaky.loss(net, x, y, 0.0)[0]
    assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-6)
    leaky.learning.requires_grad_(False)
    extra = F.cross_entropy(net(leaky.learning.add(x)), torch.full_like(y, T))
    for p, q, g in zip(gradients(a, net), gradients(b, net), gradients(extra, net), strict=True):
        assert torch.allclose(q, p + g, rtol=1e-3, atol=1e-5)
    assert max(float(g.abs().max()) for g in gradients(F.cross_entropy(net(leaky.learning.add(x)), y * 0 + T), net)) > 0


def test_the_classifier_s_loss_is_the_mixture():
    attack = replace(TINY, alpha=0.3, portion=0.25, mode="all-to-all")
    trigger, net = attack.trigger(DATA.shape, 4), toys.trained()
    x, y = DATA.floats, DATA.labels
    loss, logits = Mixed(attack, trigger).loss(net, x, y, 0.0)
    triggered = F.cross_entropy(net(trigger(x[:16])), (y[:16] + 1) % 4)
    assert float(loss.detach()) == pytest.approx(
        float((0.3 * F.cross_entropy(net(x), y) + 0.7 * triggered).detach()), rel=1e-5
    )
    assert torch.equal(logits, net(x)) and not Mixed(attack, trigger).before_augment


@pytest.mark.parametrize("together", [False, True])
def test_batchnorm_sees_clean_and_triggered_images_apart_or_together(together):
    alternate, net = step(together=together)
    sizes, images = [], DATA.floats[:20]
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    apart, _ = alternate.loss(net, images, DATA.labels[:20], 0.0)
    assert sizes == ([40, 40] if together else [20, 20, 20])
    other, _ = step(together=not together)
    assert float(apart.detach()) == pytest.approx(float(other.loss(net, images, DATA.labels[:20], 0.0)[0].detach()))


def test_the_classifier_meets_last_epoch_s_noise():
    alternate, net = step()
    old = copy.deepcopy(alternate.trigger.state_dict())
    alternate.loss(net, DATA.floats, DATA.labels, 0.0)
    assert toys.same(alternate.trigger.state_dict(), old)
    assert not toys.same(alternate.learning.state_dict(), old)
    alternate.after_epoch(1)
    assert toys.same(alternate.trigger.state_dict(), alternate.learning.state_dict())


# ---- training


def test_stage_2_leaves_the_noise_network_alone():
    half, _ = TINY.train(toys.tiny(), DATA, RECIPE)
    only, _ = replace(TINY, share=1.0).train(toys.tiny(), DATA, replace(RECIPE, epochs=1))
    assert toys.same(half.state_dict(), only.state_dict())  # BatchNorm's statistics included
    assert not half.training and not any(p.requires_grad for p in half.parameters())


def test_the_bound_of_stage_2_is_that_of_the_trigger():
    wide, _ = TINY.train(toys.tiny(), DATA, RECIPE)
    close, _ = replace(TINY, final_epsilon=0.02).train(toys.tiny(), DATA, RECIPE)
    assert float(close.epsilon) == pytest.approx(0.02) and float(wide.epsilon) == pytest.approx(0.3)
    assert toys.same(close.network.state_dict(), wide.network.state_dict())  # stage 1 had 0.3 both times


@pytest.mark.parametrize("restart", [True, False])
def test_stage_2_starts_again_or_goes_on(restart):
    a, b = toys.tiny(), toys.tiny()
    replace(TINY, alpha=1.0, restart=restart).train(a, DATA, RECIPE)  # alpha 1: the noise is in no gradient
    fit(b, DATA, replace(RECIPE, epochs=1))
    near = all(torch.allclose(p, q, atol=1e-6) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert near == restart


def test_the_noise_is_learnt_and_success_rises_on_a_toy():
    data, test, net = toys.squares(256), toys.squares(200, seed=9), toys.tiny()
    attack = replace(TINY, epsilon=0.5, widths=(8, 16), together=True, restart=False)
    trigger, log = attack.train(net, data, replace(toys.QUICK, epochs=6))
    before, after = evaluate(toys.trained(), test, trigger), evaluate(net, test, trigger)
    assert before.asr < 0.5 and after.asr > 0.9 and after.acc > 0.9, (before, after)
    assert [r["stage"] for r in log] == [1.0] * 3 + [2.0] * 3 and [r["epoch"] for r in log] == list(range(1, 7))


def test_no_step_waits_for_the_device():
    alternate, net = step(leak=True)
    alternate.optimiser.step = lambda: None  # Adam counts its steps on the processor
    with toys.Waits() as waits:
        alternate.loss(net, DATA.floats, DATA.labels, 0.0)
    assert waits.count == 0


def test_presets_say_who_did_what():
    paper, official, bench, small = LIRA.paper(3), LIRA.official(3), LIRA.backdoorbench(3), LIRA.small(3)
    assert (paper.epsilon, paper.final_epsilon, paper.alpha, paper.leak) == (0.01, None, 0.5, False)
    assert (official.epsilon, official.final_epsilon, official.leak) == (0.1, 0.01, False)
    assert bench.leak and bench.network == "autoencoder" and bench.epsilon == 0.01
    assert len({paper, official, bench, small}) == 4
    for preset in (paper, official, bench, small):
        assert preset.target == 3 and eval(repr(preset), {"LIRA": LIRA}) == preset  # noqa: S307 (the store's key)
    assert all(f"{f.name}:" in inspect.getdoc(LIRA) for f in fields(LIRA))
    assert isinstance(paper, Controlling) and not hasattr(paper, "poison")
    with pytest.raises(FrozenInstanceError):
        paper.alpha = 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LIRA(mode="some"), "mode must be all-to-one or all-to-all, got 'some'"),
        (lambda: LIRA(epsilon=-1), "epsilon must be 0 or more standard deviations, got -1"),
        (lambda: LIRA(final_epsilon=-1), "final_epsilon must be 0 or more, or None, got -1"),
        (lambda: LIRA(alpha=2), r"alpha must be in \[0, 1\], got 2"),
        (lambda: LIRA(portion=0), r"portion must be in \(0, 1\], got 0"),
        (lambda: LIRA(share=2), r"share must be in \[0, 1\], got 2"),
        (lambda: LIRA(network="mlp"), "network must be unet or autoencoder, got 'mlp'"),
        (lambda: LIRA(widths=()), r"widths must be one positive number a scale, got \(\)"),
        (lambda: LIRA(target=4).trigger((3, 12, 12), 4), r"target must be a class in \[0, 3\], got 4"),
        (lambda: TINY.trigger((3, 12, 12), 4)(floats((1, 12, 12))), r"takes float images \(N, 3, 12, 12\)"),
        (lambda: replace(TINY, share=0.1).train(toys.tiny(), DATA, RECIPE), "share 0.1 of 2 epochs leaves stage 1"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
