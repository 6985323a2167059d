"""NAD against its specification: attention maps, the distillation loss, stages, and what the released code did."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
import toys
from torch import nn

from bdlib import models
from bdlib.defenses import FT, NAD
from bdlib.defenses.nad import _Distil, attention, attention_loss, find_stages, stage_sizes, tapped
from bdlib.models import normalized
from bdlib.training import Recipe, fit

GREY = (0.5,) * 3
SHORT = Recipe(3, 32, 0.05, 0.9, 5e-4, schedule="cosine")
QUICK = NAD(teacher=replace(SHORT, epochs=1), student=SHORT, betas=(500, 1000), cutout=0)


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- attention


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_an_attention_map_is_a_unit_vector_that_ignores_scale_sign_and_order(p):
    f = maps(3, 5, 4, 6)
    a = attention(f, p)
    assert a.shape == (3, 24) and float(a.min()) >= 0 and torch.allclose(a.norm(dim=1), torch.ones(3), atol=1e-5)
    for same in (7.5 * f, -f, f[:, torch.randperm(5)]):
        assert torch.allclose(attention(same, p), a, atol=1e-5)
    mean = f.abs().pow(p).mean(1).flatten(1)
    assert torch.allclose(mean / (mean.norm(dim=1, keepdim=True) + 1e-6), a, atol=1e-5)  # sum and mean are one map


def test_powers_differ_and_a_dead_layer_is_finite():
    f = maps(2, 5, 4, 4)
    assert not torch.allclose(attention(f, 1), attention(f, 2), atol=1e-2)
    assert torch.equal(attention(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 4))


def test_the_loss_is_two_minus_two_cosines_over_the_number_of_positions():
    s, t = maps(6, 5, 4, 4), maps(6, 5, 4, 4, seed=1)
    cos = F.cosine_similarity(attention(s), attention(t), dim=1)
    loss = attention_loss(s, t)
    assert float(loss) == pytest.approx(float((2 - 2 * cos).mean() / 16), rel=1e-4)
    assert 0 <= float(loss) <= 2 / 16 and float(attention_loss(s, s)) == 0


# ---- stages


@pytest.mark.parametrize(
    ("make", "side", "expected"),
    [
        (lambda: models.small(10, GREY, GREY), 32, ["1.layer1", "1.layer2", "1.layer3"]),
        (
            lambda: models.wide_resnet(10, GREY, GREY),
            32,
            ["1.layer1", "1.layer2", "1.layer3"],
        ),  # the groups, no BN-ReLU
        (lambda: models.resnet18(10, GREY, GREY), 32, ["1.layer2", "1.layer3", "1.layer4"]),
        (lambda: models.preact_resnet18(10, GREY, GREY), 32, ["1.layer2", "1.layer3", "1.layer4"]),
        (lambda: normalized(torchvision.models.resnet18(), GREY, GREY), 64, ["1.layer2", "1.layer3", "1.layer4"]),
    ],
    ids=["small", "wide", "resnet18", "preact", "torchvision"],
)
def test_stages_end_the_coarsest_three_resolutions(make, side, expected):
    net, example = make(), torch.rand(1, 3, side, side)
    assert find_stages(net, example) == expected
    assert all(h * w >= 4 for n, (h, w) in stage_sizes(net, example).items() if n in expected)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_map_that_pooling_enlarges_again_is_no_stage():
    """torchvision's VGG pools 2x2 to 7x7: a replicated map, on which public benchmarks ran 'NAD'."""
    net = normalized(torchvision.models.vgg11_bn(num_classes=10), GREY, GREY)
    sizes = stage_sizes(net, torch.rand(1, 3, 64, 64))
    assert sizes["1.avgpool"] == (7, 7) and "1.avgpool" not in find_stages(net, torch.rand(1, 3, 64, 64))


def test_a_network_without_a_map_to_look_at_is_refused():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match="no feature map with four positions"):
        NAD()(net, toys.clean())
    with pytest.raises(ValueError, match=r"stage '1.linear' has a map of 0x0.*1\.bn2"):
        replace(QUICK, stages=("1.bn1", "1.linear"))(toys.trained(), toys.clean())


def test_beta_is_rescaled_with_the_map_so_that_it_means_the_same():
    """Twice the side, a quarter of the loss at equal cosine, four times the beta: nothing changes."""
    small, large = maps(2, 3, 4, 4), maps(2, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    other = maps(2, 3, 4, 4, seed=1)
    at, at_large = (
        attention_loss(small, other),
        attention_loss(large, other.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    )
    assert float(at_large) == pytest.approx(float(at) / 4, rel=1e-3)
    net = models.wide_resnet(10, GREY, GREY)
    for side, factor in ((32, 1), (64, 4)):
        names, betas = NAD().weights(net, torch.rand(1, 3, side, side))
        assert betas == [b * factor for b in (500, 1000, 1000)] and len(names) == 3
        assert NAD.official().weights(net, torch.rand(1, 3, side, side))[1] == [500, 1000, 1000]


# ---- distillation


def step_of(nad, student, teacher):
    names, betas = nad.weights(student, toys.squares(1).floats)
    return _Distil(nad, teacher, names, betas)


def test_gradients_of_the_attention_loss_reach_the_first_layer():
    """The first year of the released code cut them off: this is the test that it lacked."""
    student, teacher, data = toys.trained(poisoned=True), toys.trained(), toys.squares(32)
    for nad, flows in ((QUICK, True), (replace(QUICK, detached=True), False)):
        loss, logits = step_of(nad, student, teacher).loss(student, data.floats, data.labels, 0)
        distance = loss - F.cross_entropy(logits, data.labels)
        assert float(distance.detach()) > 0  # logged, in both
        if flows:
            assert float(torch.autograd.grad(distance, student[1].conv1.weight)[0].abs().sum()) > 0
        else:
            cross = torch.autograd.grad(
                F.cross_entropy(logits, data.labels), student[1].conv1.weight, retain_graph=True
            )
            whole = torch.autograd.grad(loss, student[1].conv1.weight)
            assert torch.allclose(whole[0], cross[0], atol=1e-7)


def test_one_step_on_attention_alone_brings_the_maps_together():
    student, teacher, data = toys.trained(poisoned=True).eval(), toys.trained(), toys.squares(32)
    step = step_of(QUICK, student, teacher)

    def distance():
        loss, logits = step.loss(student, data.floats, data.labels, 0)
        return loss - F.cross_entropy(logits, data.labels)

    before = distance()
    grads = torch.autograd.grad(before, list(student.parameters()), allow_unused=True)
    with torch.no_grad():
        for p, g in zip(student.parameters(), grads, strict=True):
            if g is not None:
                p -= 1e-4 * g
    assert float(distance().detach()) < float(before.detach())


def test_equal_networks_have_no_distance():
    net, data = toys.trained().eval(), toys.squares(16)
    loss, logits = step_of(QUICK, net, copy.deepcopy(net)).loss(net, data.floats, data.labels, 0)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(logits, data.labels).detach()), abs=1e-6)


@pytest.mark.parametrize("change", [{"betas": (0, 0)}, {"detached": True}], ids=["beta 0", "detached"])
def test_without_its_attention_loss_it_is_fine_tuning_bit_for_bit(change):
    net, clean = toys.trained(poisoned=True), toys.clean()
    repair = replace(QUICK, **change)(net, clean, seed=2)
    plain = FT(lr=0.05, epochs=3, batch=32)
    tuned = copy.deepcopy(net)
    fit(tuned, clean.images, QUICK.student, seed=2)
    assert toys.same(repair.model.state_dict(), tuned.state_dict())  # buffers too
    assert not toys.same(QUICK(net, clean, seed=2).model.state_dict(), tuned.state_dict())
    assert plain.lr == QUICK.student.lr


def test_the_teacher_is_frozen_in_evaluation_mode_and_the_student_starts_from_the_victim(monkeypatch):
    net, clean, seen = toys.trained(poisoned=True), toys.clean(), {}
    original = _Distil.loss

    def watch(self, model, *rest):
        if "teacher" not in seen:
            seen["teacher"] = {n: t.clone() for n, t in self.teacher.state_dict().items()}
            seen["student"] = {n: t.clone() for n, t in model.named_parameters()}
        assert not any(m.training for m in self.teacher.modules()) and model.training
        assert not any(p.requires_grad for p in self.teacher.parameters())
        return original(self, model, *rest)

    monkeypatch.setattr(_Distil, "loss", watch)
    repair = QUICK(net, clean, seed=1)
    assert toys.same(seen["student"], dict(net.named_parameters()))  # not from the teacher
    assert toys.same(seen["teacher"], repair.details["teacher"].state_dict())  # untouched by the distillation
    tuned = copy.deepcopy(net)
    fit(tuned, clean.images, QUICK.teacher, seed=1)
    assert toys.same(tuned.state_dict(), repair.details["teacher"].state_dict())


def test_batchnorm_of_the_student_sees_each_batch_once():
    net, clean = toys.trained(), toys.clean(96)
    start = int(net[1].bn1.num_batches_tracked)
    repair = QUICK(net, clean)
    assert int(repair.model[1].bn1.num_batches_tracked) == start + 3 * 3  # three epochs of three batches


def test_the_log_holds_the_attention_loss_and_it_falls():
    repair = replace(QUICK, student=replace(SHORT, epochs=6))(toys.trained(poisoned=True), toys.clean())
    values = [r["attention"] for r in repair.log]
    assert len(values) == 6 and min(values) > 0 and values[-1] < values[0]
    assert repair.details["stages"] == ["1.bn1", "1.bn2"] and len(repair.details["betas"]) == 2


def test_presets_have_the_schedules_that_they_claim():
    rates = [NAD.official().student.lr_at(e * 8, 8) for e in range(20)]
    assert rates == pytest.approx([0.1, 0.1] + [0.01] * 18)
    rates = [NAD.paper().student.lr_at(e * 8, 8) for e in range(10)]
    assert rates == pytest.approx([0.1 * 0.1 ** (e // 2) for e in range(10)])
    assert NAD.first_release().detached and not NAD.official().detached
    assert NAD.official().cutout == 2 and not NAD.official().rescale


def test_cutout_of_length_three_erases_two_by_two(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "bdlib.defenses.nad.fit", lambda model, data, recipe, **k: seen.append(data.augment.cutout) or []
    )
    NAD(teacher=Recipe(0), student=Recipe(0), betas=(1, 1))(toys.trained(), toys.clean())
    assert seen == [2, 2]


def test_taps_are_taken_off_again_even_after_an_error():
    net = toys.trained()
    with pytest.raises(ZeroDivisionError), tapped(net, ["1.bn1"]) as found:
        net(toys.squares(2).floats)
        assert found["1.bn1"].shape == (2, 8, 12, 12)
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"betas": ()}, r"betas must be one or more numbers of 0 or more, got \(\)"),
        ({"betas": (-1.0,)}, "betas must be one or more numbers of 0 or more"),
        ({"p": 0.0}, "p must be above 0, got 0"),
        ({"cutout": -1}, "cutout must be 0 or more, got -1"),
        ({"stages": ("a",)}, "stages must be 3 names"),
    ],
)
def test_a_bad_value_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        NAD(**arguments)
