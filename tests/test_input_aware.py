"""Input-Aware: a trigger for each image, that works on no other; then the same networks used to poison a fixed set."""

import copy
import inspect
from dataclasses import FrozenInstanceError, fields, replace
from functools import lru_cache

import pytest
import torch
import toys
from torch import Generator, nn

from bdlib.attacks.input_aware import InputAware, JointStep, MaskStep, Painted, diversity
from bdlib.attacks.input_aware_static import InputAwareStatic
from bdlib.lab import Controlling
from bdlib.metrics import accuracy, evaluate
from bdlib.training import fit, predict

T = toys.TARGET
TINY = InputAware(T, rate=0.25, cross_rate=0.25, widths=(4, 8), mask_epochs=1)
RECIPE = replace(toys.QUICK, epochs=1)
DATA = toys.squares(64)


class Fixed(nn.Module):
    """In place of a network: the same value everywhere."""

    def __init__(self, value: float, channels: int) -> None:
        super().__init__()
        self.value, self.channels = value, channels

    def forward(self, x):
        return torch.full((len(x), self.channels, *x.shape[2:]), self.value)


@lru_cache
def fitted():
    """Toy network, trigger and log of an attack whose answers the tests below ask for."""
    attack = InputAware(T, rate=0.3, cross_rate=0.2, widths=(8, 16), mask_epochs=3, density=0.2, lambda_div=0.1)
    net = toys.tiny()
    trigger, log = attack.train(net, toys.squares(384), replace(toys.QUICK, epochs=12))
    return net, trigger, log


def floats(shape=(3, 12, 12), n=6, seed=0):
    return torch.rand(n, *shape, generator=Generator().manual_seed(seed))


# ---- the trigger


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 30, 45)])
def test_any_size_is_taken_and_each_image_is_on_its_own(shape):
    trigger, x = replace(TINY, widths=(4, 4, 8)).trigger(shape, 4), floats(shape)
    x[0], x[1] = 0, 1
    before = x.clone()
    out = trigger(x)
    assert torch.equal(x, before) and out.shape == x.shape and out.dtype == x.dtype and not torch.equal(out, x)
    assert out.min() >= 0 and out.max() <= 1 and not out.requires_grad
    assert torch.allclose(torch.cat([trigger(x[:2]), trigger(x[2:])]), out, atol=1e-6)
    assert trigger.stamp((x * 255).round().to(torch.uint8)).shape == x.shape


def test_a_trigger_is_its_state():
    one, other = TINY.trigger((3, 12, 12), 4, seed=0), TINY.trigger((3, 12, 12), 4, seed=1)
    trained = fitted()[1]
    assert not torch.equal(one(floats()), other(floats()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(floats()), other(floats())) and one.mapping == other.mapping
    fresh = replace(TINY, widths=(8, 16)).trigger((3, 12, 12), 4, seed=9)
    fresh.load_state_dict(trained.state_dict())  # statistics of the training set and of BatchNorm included
    assert torch.equal(fresh(floats()), trained(floats()))
    assert tuple(round(float(m), 4) for m in trained.mean) == toys.squares(384).stats()[0]


def test_no_mask_changes_nothing_and_a_full_mask_shows_the_pattern():
    trigger, x = TINY.trigger((3, 12, 12), 4), floats()
    trigger.masker = Fixed(0.0, 1)
    assert torch.allclose(trigger(x), x, atol=1e-6)
    trigger.masker = Fixed(1.0, 1)
    assert torch.allclose(trigger(x), trigger.patterns(x), atol=1e-6)


@pytest.mark.parametrize(("raw", "mask"), [(0.0, 0.0), (0.4, 0.018), (0.5, 0.5), (0.6, 0.982), (1.0, 1.0)])
def test_the_threshold_is_steep(raw, mask):
    trigger = TINY.trigger((3, 12, 12), 4)
    trigger.masker = Fixed(raw, 1)
    assert torch.allclose(trigger.masks(floats()), torch.tensor(mask), atol=1e-3)  # tanh(20 u - 10) / 2 + 1/2


def test_a_cross_sample_wears_pattern_and_mask_of_the_other_image():
    trigger, x, other = fitted()[1], floats(seed=1), floats(seed=2)
    p, m = trigger.patterns(other), trigger.masks(other)
    assert m.shape == (6, 1, 12, 12) and torch.allclose(trigger.paste(x, other), (1 - m) * x + m * p, atol=1e-6)
    assert not torch.allclose(trigger.paste(x, other), trigger(x), atol=1e-2)


def test_networks_see_normalised_images():
    trigger, x = TINY.trigger((3, 12, 12), 4), floats()
    seen = []
    trigger.painter.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trigger.mean.fill_(0.2), trigger.std.fill_(0.5)
    trigger.patterns(x)
    assert torch.allclose(seen[0], (x - 0.2) / 0.5)


# ---- the losses


def test_diversity_is_a_ratio_of_distances():
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    half = torch.full((2, 1, 4, 4), 0.5)
    assert float(diversity(a, b, half, half / 2)) == pytest.approx(4, rel=1e-4)  # rms 1 over rms 0.25
    half[1] = 0.375
    quarter = torch.full_like(half, 0.25)
    assert float(diversity(a, b, half, quarter)) == pytest.approx((4 + 8) / 2, rel=1e-4)  # mean of ratios


def test_equal_drawings_cost_much_and_leave_no_nan():
    drawn = torch.full((2, 1, 4, 4), 0.5, requires_grad=True)
    cost = diversity(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), drawn, drawn.detach().clone())
    cost.backward()
    assert float(cost.detach()) > 1e6 and drawn.grad.isfinite().all()


def test_the_mask_loss_is_that_of_the_paper():
    trigger = TINY.trigger(DATA.shape, 4)
    last = trigger.masker.net[-1][1]
    last.weight.data.fill_(2000), last.bias.data.fill_(0)  # some masks close to 0, some close to 1
    step, g = MaskStep(TINY, trigger, DATA, RECIPE), Generator().manual_seed(0)
    x, y = step.change(DATA.floats[:16], DATA.labels[:16], g)
    assert torch.equal(x, DATA.floats[:16]) and len(step.others) == 16
    loss, _ = step.loss(trigger.masker, x, y, 0.0)
    m1, m2 = trigger.masks(x), trigger.masks(step.others)
    assert m1.min() < 0.01 and m1.max() > 0.5
    ratio = ((x - step.others) / trigger.std).square().mean((1, 2, 3)).sqrt()
    ratio = ratio / ((m1 - m2).square().mean((1, 2, 3)).sqrt() + 1e-7)
    expected = 100 * (m1 - 0.032).clamp(min=0).mean() + ratio.mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def joint(attack=TINY, n=16, data=DATA):
    """A phase 2 step in evaluation mode, a batch, and what `change` made of it."""
    trigger = attack.trigger(data.shape, 4)
    step = JointStep(attack, trigger, data, RECIPE)
    x, y = data.floats[:n], data.labels[:n]
    return step, trigger, x, y, *step.change(x, y, Generator().manual_seed(3))


def test_a_batch_is_split_in_three():
    attack = replace(TINY, rate=0.3, cross_rate=0.2)
    step, trigger, x, y, out, labels = joint(attack)  # of 16: 4 with their own trigger, 3 with another's, 9 as they are
    assert not step.before_augment
    assert torch.allclose(out[:4], trigger(x[:4]), atol=1e-6) and (labels[:4] == T).all()
    index = torch.randint(len(DATA), (3,), generator=Generator().manual_seed(3))
    assert torch.allclose(out[4:7], trigger.paste(x[4:7], DATA.floats[index]), atol=1e-6)
    assert torch.equal(labels[4:], y[4:]) and torch.equal(out[7:], x[7:])
    _, _, _, y, _, labels = joint(replace(attack, mode="all-to-all"))
    assert torch.equal(labels, torch.cat([(y[:4] + 1) % 4, y[4:]]))


def test_of_128_images_12_and_12():
    _, _, x, _, out, labels = joint(InputAware(T, widths=(4,)), n=128, data=toys.squares(128))
    changed = (out != x).flatten(1).any(1)
    assert changed[:24].all() and not changed[24:].any() and (labels[:12] == T).all()


def test_the_joint_loss_adds_diversity_of_normalised_patterns():
    step, trigger, x, y, out, labels = joint(replace(TINY, lambda_div=2.0))
    net = toys.tiny().eval()
    loss, logits = step.loss(net, out, labels, 0.0)
    others = DATA.floats[torch.randint(len(DATA), (4,), generator=Generator().manual_seed(3))]
    d = [((a - b) / trigger.std).square().mean((1, 2, 3)).sqrt() for a, b in (
        (x[:4], others), (trigger.patterns(x[:4]), trigger.patterns(others)))]  # fmt: skip
    expected = nn.functional.cross_entropy(logits, labels) + 2 * (d[0] / (d[1] + 1e-7)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize("accumulate", [False, True])
def test_official_gradients_pile_up_and_the_paper_s_do_not(accumulate):
    attack = replace(InputAware.official(T) if accumulate else InputAware.paper(T), widths=(4, 8), lr=0.0)
    trigger, net = attack.trigger(DATA.shape, 4), toys.tiny().eval().requires_grad_(False)
    trigger.painter.requires_grad_(True).train()
    step, seen = JointStep(attack, trigger, DATA, RECIPE), []
    weight = trigger.painter.net[0][0].weight
    step.optimiser.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    for _ in range(3):  # the same batch, and no step moves anything: the same gradient each time
        x, y = step.change(DATA.floats, DATA.labels, Generator().manual_seed(0))
        step.loss(net, x, y, 0.0)[0].backward()
    step.after_epoch(1)
    step.after_epoch(1)  # nothing waits: no second step with the same gradient
    assert len(seen) == 3
    for k, gradient in enumerate(seen):
        times = k + 1 if accumulate else 1
        assert torch.allclose(gradient, times * seen[0], rtol=1e-3, atol=1e-6) and gradient.norm() > 0


# ---- training


def test_phase_1_trains_masks_only_and_phase_2_patterns_only():
    start = TINY.trigger(DATA.shape, 4, seed=0)
    one, _ = replace(TINY, mask_epochs=0).train(toys.tiny(), DATA, replace(RECIPE, batch=64))
    assert toys.same(one.masker.state_dict(), start.masker.state_dict())  # BatchNorm's statistics included
    assert not toys.same(dict(one.painter.named_parameters()), dict(start.painter.named_parameters()))  # the last step
    two, log = TINY.train(toys.tiny(), DATA, replace(RECIPE, epochs=0))
    assert toys.same(two.painter.state_dict(), start.painter.state_dict()) and len(log) == 1
    assert not toys.same(dict(two.masker.named_parameters()), dict(start.masker.named_parameters()))
    assert not two.training and not any(p.requires_grad for p in two.parameters())


def test_the_trigger_works_on_its_own_image_and_on_no_other():
    net, trigger, log = fitted()
    test = toys.squares(200, seed=9)
    before, after = evaluate(toys.trained(), test, trigger), evaluate(net, test, trigger)
    assert before.asr < 0.35 and after.asr > 0.85 and after.acc > 0.95, (before, after)
    images, keep = test.floats, test.labels != T
    crossed = predict(net, trigger.paste(images, images.roll(7, 0))).argmax(1)
    assert (crossed == test.labels).float().mean() > 0.85 and (crossed[keep] == T).float().mean() < 0.2
    masks = trigger.masks(images)
    assert masks.mean() < 0.25 and ((masks < 0.1) | (masks > 0.9)).float().mean() > 0.5
    assert [r["phase"] for r in log] == [1.0] * 3 + [2.0] * 12 and [r["epoch"] for r in log] == list(range(1, 16))
    assert "accuracy" not in log[0] and log[-1]["accuracy"] > 0.8 and all(r["seconds"] > 0 for r in log)


def test_without_a_rate_it_is_plain_training():
    a, b = toys.tiny(), toys.tiny()
    replace(TINY, rate=0, cross_rate=0, mask_epochs=0).train(a, DATA, RECIPE, seed=2)
    fit(b, DATA, RECIPE, seed=2)
    assert toys.same(a.state_dict(), b.state_dict())


def test_no_step_waits_for_the_device():
    trigger, net = TINY.trigger(DATA.shape, 4), toys.tiny()
    trigger.painter.requires_grad_(True)
    x, y, g = DATA.floats, DATA.labels, Generator().manual_seed(0)
    with toys.Waits() as waits:
        for step in (MaskStep(TINY, trigger, DATA, RECIPE), JointStep(TINY, trigger, DATA, RECIPE)):
            step.loss(net, *step.change(x, y, g), 0.0)
    assert waits.count == 0


def test_presets_are_plain_data():
    paper, official, small = InputAware.paper(3), InputAware.official(3), InputAware.small(3)
    assert official == replace(paper, accumulate=True) and not paper.accumulate and paper.target == 3
    assert small != paper and small.accumulate == paper.accumulate and max(small.widths) < max(paper.widths)
    assert (paper.rate, paper.cross_rate, paper.density, paper.lambda_norm) == (0.1, 0.1, 0.032, 100)
    static = InputAwareStatic.paper(3)
    assert static != InputAwareStatic.official(3) and InputAwareStatic.official().rate == 0.003
    for preset in (paper, official, small, static, InputAwareStatic.official(), InputAwareStatic.small()):
        kind = type(preset)
        assert eval(repr(preset), {kind.__name__: kind}) == preset  # noqa: S307 (our own repr, the store's key)
        assert all(f.name in inspect.getdoc(kind) for f in fields(kind))
    assert isinstance(paper, Controlling) and not hasattr(paper, "poison")
    assert not isinstance(static, Controlling) and static.needs_model
    with pytest.raises(FrozenInstanceError):
        paper.rate = 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InputAware(rate=1.5), r"rate must be in \[0, 1\].*got 1.5"),
        (lambda: InputAware(rate=0.6, cross_rate=0.5), r"cross_rate must be .* at most 1 - rate = 0.4.*got 0.5"),
        (lambda: InputAware(cross_rate=0), r"cross_rate must be above 0 .*got 0"),
        (lambda: InputAware(mode="some"), "mode must be all-to-one or all-to-all, got 'some'"),
        (lambda: InputAware(widths=()), r"widths must be one positive number a pooling, got \(\)"),
        (lambda: InputAware(mask_epochs=-1), "mask_epochs must be 0 or more, got -1"),
        (lambda: InputAware(density=2), r"density must be in \[0, 1\], got 2"),
        (lambda: InputAware(target=4).trigger((3, 12, 12), 4), r"target must be a class in \[0, 3\], got 4"),
        (lambda: TINY.trigger((3, 12, 12), 4)(floats((1, 12, 12))), r"takes float images \(N, 3, 12, 12\)"),
        (lambda: InputAware().train(toys.tiny(), DATA, replace(RECIPE, batch=8)), "rate 0.1 selects no image of .* 8"),
        (lambda: InputAwareStatic(rate=-1), r"rate must be in \[0, 1\]"),
        (lambda: InputAwareStatic(epochs=-1), "epochs must be 0 or more, got -1"),
        (lambda: InputAwareStatic(widths=(0,)), "widths must be one positive number"),
        (lambda: InputAwareStatic().poison(DATA), "trains its networks beside a clean network"),
        (lambda: InputAwareStatic(rate=0.001).poison(DATA, model=toys.tiny()), "rate 0.001 selects no image of 64"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---- static

STATIC = InputAwareStatic(T, 0.25, widths=(4, 8), mask_epochs=3, epochs=2)


def test_static_poisoning_marks_exactly_the_indices_and_leaves_the_model_alone():
    net, data = toys.trained(), toys.squares(256)
    before = toys.state(net)
    p, q = STATIC.poison(data, seed=1, model=net), STATIC.poison(data, seed=1, model=net)
    assert toys.unchanged(before, net)
    assert toys.same(p.trigger.state_dict(), q.trigger.state_dict()) and torch.equal(p.data.images, q.data.images)
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[p.indices] = True
    assert len(p.indices) == 64 and torch.equal(p.data.images[~chosen], data.images[~chosen])
    assert torch.equal(p.data.images[chosen], p.trigger.stamp(data.images[chosen]))
    assert (p.data.labels[chosen] == T).all() and torch.equal(p.data.labels[~chosen], data.labels[~chosen])
    assert isinstance(p.trigger, Painted) and T in data.labels[p.indices]
    assert T not in data.labels[replace(STATIC, mask_epochs=0, epochs=0, include_target=False).poison(
        data, model=net).indices]  # fmt: skip


def test_a_victim_learns_the_static_trigger():
    data, test, net = toys.squares(384), toys.squares(200, seed=9), toys.tiny()
    poisoned = STATIC.poison(data, model=toys.trained())
    fit(net, poisoned.data, replace(toys.QUICK, epochs=8))
    scores = evaluate(net, test, poisoned.trigger)
    assert scores.asr > 0.8 and scores.acc > 0.9, scores
    assert accuracy(toys.trained(), test) > 0.95


def test_no_static_rate_poisons_nothing():
    quick = replace(STATIC, rate=0, mask_epochs=0, epochs=0)
    p = quick.poison(DATA, model=copy.deepcopy(toys.tiny()))
    assert torch.equal(p.data.images, DATA.images) and torch.equal(p.data.labels, DATA.labels) and not len(p.indices)
