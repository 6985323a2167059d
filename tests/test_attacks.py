"""Attacks: one table, one behaviour each; a new attack is a new line. Then what BadNets and Blend alone must do."""

import inspect
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from bdlib.attacks import BadNets, Blend, LabelMap, Stamp, Trigger
from bdlib.metrics import evaluate
from bdlib.training import fit

T = toys.TARGET
ATTACKS = [
    BadNets(T, 0.2, size=3, offset=0),
    BadNets(T, 0.2, size=3, pattern="white", offset=1, include_target=False),
    BadNets(T, 0.5, size=3, offset=0, mode="all-to-all"),
    Blend(T, 0.2, alpha=0.3),
    Blend(T, 0.2, alpha=0.3, include_target=False),
]
each = pytest.mark.parametrize("attack", ATTACKS, ids=repr)
DATA = toys.squares(100)


def floats(n=6, seed=0, shape=(3, 12, 12)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


# ---- the family


@each
def test_shape_type_and_range_are_kept_and_the_input_unchanged(attack, device):
    trigger = attack.trigger((3, 12, 12), 4).to(device)
    x = floats().to(device)
    x[0], x[1] = 0, 1
    before = x.clone()
    out = trigger(x)
    assert isinstance(trigger, Trigger) and torch.equal(x, before) and not torch.equal(out, x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    assert out.min() >= 0 and out.max() <= 1
    stamped = trigger.stamp((x * 255).round().to(torch.uint8))
    assert stamped.dtype == torch.uint8 and stamped.shape == x.shape
    assert torch.equal(torch.cat([trigger(x[:2]), trigger(x[2:])]), out)  # an image never looks at its neighbours


@each
def test_only_the_support_is_touched(attack):
    trigger, x = attack.trigger((3, 12, 12), 4), floats()
    outside = (trigger.opacity == 0).expand_as(x)
    assert torch.equal(trigger(x)[outside], x[outside])
    if isinstance(attack, BadNets):
        assert int((~outside)[0, 0].sum()) == 9


@each
def test_poisoning_marks_exactly_the_indices(attack):
    before = DATA.images.clone(), DATA.labels.clone()
    p = attack.poison(DATA, seed=1)
    assert torch.equal(DATA.images, before[0]) and torch.equal(DATA.labels, before[1])
    chosen = torch.zeros(100, dtype=torch.bool)
    chosen[p.indices] = True
    assert len(p.indices) == int(chosen.sum()) == round(attack.rate * 100) and p.indices.dtype == torch.int64
    assert torch.equal(p.data.images[~chosen], DATA.images[~chosen])
    assert torch.equal(p.data.labels[~chosen], DATA.labels[~chosen])
    assert torch.equal(p.data.images[chosen], p.trigger.stamp(DATA.images[chosen]))
    assert torch.equal(p.data.labels[chosen], p.mapping(DATA.labels[chosen]))
    assert (p.data.images[chosen] != DATA.images[chosen]).flatten(1).any(1).all()
    assert len(p.cover) == 0 and replace(p.data, images=DATA.images, labels=DATA.labels) == DATA  # all else is kept
    drawn = DATA.labels[p.indices].tolist()
    if not attack.include_target:
        assert T not in drawn
    elif attack.mode == "all-to-one":
        assert T in drawn  # the field's default draws from every class


@each
def test_the_seed_decides(attack):
    a, b, c = attack.poison(DATA, seed=0), attack.poison(DATA, seed=0), attack.poison(DATA, seed=1)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.data.images, b.data.images)
    assert not torch.equal(a.indices, c.indices)
    assert toys.same(a.trigger.state_dict(), c.trigger.state_dict())  # static: the trigger belongs to the attack
    torch.manual_seed(0)
    noise = torch.get_rng_state()
    attack.poison(DATA, seed=3)
    assert torch.equal(torch.get_rng_state(), noise)


@each
def test_rate_0_is_the_identity_and_a_rate_that_selects_nothing_is_refused(attack):
    p = replace(attack, rate=0).poison(DATA)
    assert torch.equal(p.data.images, DATA.images) and torch.equal(p.data.labels, DATA.labels) and len(p.indices) == 0
    with pytest.raises(ValueError, match=r"rate 0\.001 selects no image of 100"):
        replace(attack, rate=0.001).poison(DATA)


@each
def test_a_trigger_is_its_state(attack):
    one, other = attack.trigger((3, 12, 12), 4), attack.trigger((3, 12, 12), 4)
    for t in other.state_dict().values():
        t.zero_()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(floats()), other(floats())) and one.mapping == other.mapping


@each
def test_attack_success_rises_from_chance_to_high_on_a_toy(attack):
    test, net = toys.squares(200, seed=8), toys.tiny()
    trigger = attack.trigger(test.shape, 4)
    before = evaluate(toys.trained(), test, trigger)
    poisoned = attack.poison(toys.squares(640))
    fit(net, poisoned.data, replace(toys.QUICK, epochs=12 if attack.mode == "all-to-all" else 8))
    after = evaluate(net, test, trigger)
    assert before.asr < 0.35 and after.asr > 0.9 and after.acc > 0.95, (before, after)


@each
def test_cpu_and_gpu_agree(attack, device):
    p, q = attack.poison(DATA), attack.poison(DATA.to(device))
    assert torch.equal(p.indices, q.indices.cpu()) and q.data.images.device.type == q.indices.device.type == device
    assert (p.data.images.int() - q.data.images.cpu().int()).abs().max() <= 1
    assert next(q.trigger.buffers()).device.type == device


@pytest.mark.parametrize("kind", [BadNets, Blend])
def test_an_attack_is_plain_data_with_presets(kind):
    for preset in (kind.paper(), kind.official(), kind.paper(target=3)):
        assert isinstance(preset, kind) and preset == replace(preset)
        assert eval(repr(preset), {kind.__name__: kind}) == preset  # noqa: S307 (our own repr, the store's key)
    assert kind.paper(target=3).target == 3 and not kind.official().include_target
    with pytest.raises(FrozenInstanceError):
        kind().rate = 1
    documented = inspect.getdoc(kind)
    assert all(f"{f.name}:" in documented for f in fields(kind))


@pytest.mark.parametrize("kind", [BadNets, Blend])
@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_outside_0_1_is_named(kind, rate):
    with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\].*got {rate}"):
        kind(rate=rate)


@each
@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_outside_the_classes_is_named(attack, target):
    wrong = replace(attack, target=target)
    if attack.mode == "all-to-all":
        wrong.poison(DATA)  # there is no target
        return
    with pytest.raises(ValueError, match=rf"target must be a class in \[0, 3\], got {target}"):
        wrong.poison(DATA)


def test_more_images_than_may_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"rate 1\.0 asks for 100 images, but only 75 may be poisoned"):
        BadNets(T, 1.0, size=3, include_target=False).poison(DATA)
    assert len(BadNets(T, 1.0, size=3).poison(DATA).indices) == 100


@each
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 12, 12), r"\(2, 1, 12, 12\)"),
        (torch.zeros(3, 12, 12), r"\(3, 12, 12\)"),
    ],
    ids=["uint8", "size", "channels", "no batch"],
)
def test_wrong_images_are_named(attack, x, said):
    with pytest.raises(ValueError, match=rf"float images \(N, 3, 12, 12\) in \[0, 1\].*{said}"):
        attack.trigger((3, 12, 12), 4)(x)


# ---- label maps


@given(st.integers(2, 50), st.data())
def test_label_maps(classes, data):
    labels = torch.arange(classes)
    target = data.draw(st.integers(0, classes - 1))
    one = LabelMap(target, classes)
    assert one(labels).tolist() == [target] * classes and (~one.eligible(labels)).nonzero().tolist() == [[target]]
    shift = data.draw(st.integers(1, classes - 1))
    every = LabelMap(None, classes, shift)
    assert sorted(every(labels).tolist()) == labels.tolist() and every.eligible(labels).all()  # no fixed point
    assert every(labels)[0] == shift


@pytest.mark.parametrize("shift", [0, 4, -1])
def test_a_shift_that_maps_a_label_to_itself_is_named(shift):
    with pytest.raises(ValueError, match=rf"shift must be in \[1, 3\], got {shift}"):
        LabelMap(None, 4, shift)


# ---- BadNets


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (32, 3), (64, 6), (224, 21)])
def test_a_patch_grows_with_the_image_and_stays_in_its_corner(side, patch):
    t = BadNets(offset=0).trigger((3, side, side), 10)
    assert int(t.opacity.sum()) == patch**2 and t.opacity[:, -patch:, -patch:].all()


def test_the_checkered_patch_is_that_of_the_released_code():
    x = torch.full((1, 3, 32, 32), 0.5)
    out = BadNets.official().trigger((3, 32, 32), 10)(x)
    assert out[0, :, -3:, -3:].tolist() == [[[0, 0, 1], [0, 1, 0], [1, 0, 1]]] * 3  # black is black, too
    assert torch.equal(out[..., :-3, :], x[..., :-3, :]) and torch.equal(out[..., :-3], x[..., :-3])


def test_a_patch_of_its_own_size_and_place():
    out = BadNets(pattern="white", size=2, offset=1).trigger((1, 6, 6), 4)(torch.zeros(1, 1, 6, 6))[0, 0]
    assert out[3:5, 3:5].all() and out.sum() == 4


@given(st.integers(1, 6), st.integers(0, 3), st.sampled_from(["white", "checker"]))
def test_twice_is_once(size, offset, pattern):
    trigger, x = BadNets(size=size, offset=offset, pattern=pattern).trigger((3, 12, 12), 4), floats()
    assert torch.equal(trigger(trigger(x)), trigger(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "some-to-one"}, "mode must be all-to-one or all-to-all, got 'some-to-one'"),
        ({"pattern": "pink"}, "pattern must be white or checker, got 'pink'"),
        ({"size": 0, "offset": 0}, "size must be 1 or more and offset 0 or more, got 0 and 0"),
        ({"offset": -1}, "got None and -1"),
        ({"size": 13, "offset": 0}, "a patch of 13 pixels, 0 from the border, does not fit a 12x12 image"),
        ({"size": 3, "offset": 10}, "a patch of 3 pixels, 10 from the border, does not fit a 12x12 image"),
    ],
)
def test_badnets_names_the_bad_value(arguments, said):
    with pytest.raises(ValueError, match=said):
        BadNets(**arguments).trigger((3, 12, 12), 4)


# ---- Blend


@given(st.floats(0, 1), st.integers(0, 9))
def test_blend_is_linear(alpha, seed):
    trigger = Blend(alpha=alpha, pattern_seed=seed).trigger((3, 12, 12), 4)
    k, x = trigger.pattern[None], floats(4, seed)
    assert torch.allclose(trigger(torch.zeros_like(k)), alpha * k, atol=1e-6)
    assert torch.allclose(trigger(k), k, atol=1e-6)
    assert torch.allclose(trigger(x), (1 - alpha) * x + alpha * k, atol=1e-6)


def test_blend_at_the_ends():
    x = floats()
    assert torch.equal(Blend(alpha=0).trigger((3, 12, 12), 4)(x), x)
    whole = Blend(alpha=1).trigger((3, 12, 12), 4)
    assert torch.equal(whole(x), whole.pattern.expand_as(x))


def test_the_noise_is_one_uniform_picture_per_pattern_seed():
    a, b = Blend().trigger((3, 32, 32), 10, seed=0), Blend().trigger((3, 32, 32), 10, seed=1)
    assert torch.equal(a.pattern, b.pattern)  # a run's seed does not change the attack
    assert not torch.equal(a.pattern, Blend(pattern_seed=1).trigger((3, 32, 32), 10).pattern)
    assert abs(a.pattern.mean() - 0.5) < 0.02 and abs(a.pattern.std() - 12**-0.5) < 0.02
    assert not torch.equal(a.pattern[0], a.pattern[1])  # three planes, not one


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_blend_names_the_bad_value(alpha):
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\], got {alpha}"):
        Blend(alpha=alpha)
    with pytest.raises(ValueError, match="got 'some-to-one'"):
        Blend(mode="some-to-one")


def test_stamping_rounds_to_the_nearest_grey_level():
    trigger = Stamp(torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5), LabelMap(0, 2))
    x = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    exact = 0.5 * x.double() + 127.5
    assert ((trigger.stamp(x).double() - exact).abs() <= 0.5 + 1e-6).all()  # truncation is off by up to one level
    assert trigger.stamp(x).max() == 255


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.full((2, 3, 12, 12), 1.5), r"must lie in \[0, 1\], got 1.5 to 1.5"),
        (torch.full((2, 3, 12, 12), -0.1), r"must lie in \[0, 1\], got -0.1"),
        (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "takes float images .*got torch.uint8"),
        (torch.zeros(2, 1, 12, 12), r"takes float images \(N, 3, 12, 12\)"),
    ],
    ids=["too bright", "normalised", "uint8", "grey"],
)
def test_a_trigger_names_images_that_it_does_not_take(images, said):
    with pytest.raises(ValueError, match=said):
        toys.trigger()(images)
