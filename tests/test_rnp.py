"""RNP against its specification: the ascent, the recovery, the pruning, and the other uses of the unlearned network."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bdlib import models, unlearned
from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.defenses import RNP
from bdlib.defenses.rnp import Ascent, fit_masks
from bdlib.metrics import accuracy, evaluate
from bdlib.neurons import Soft, flat, grid, ones, prune
from bdlib.training import predict

GENTLE = Ascent(lr=0.003, batch=32, milestones=(), epochs=20)
QUICK = RNP(ascent=GENTLE, epochs=4, batch=32, max_drop=0.05)


class Line(nn.Module):
    """Logits that are linear in the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def line(seed: int = 0) -> Line:
    torch.manual_seed(seed)
    return Line()


def same_masks(a, b, tol=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=tol, rtol=0) for n in a)


# ---- the ascent


def test_one_step_climbs_the_loss_and_shrinks_the_weights():
    net, data = line(), toys.squares(16)
    x, y = data.floats, data.labels
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    lr, decay = 0.1, 0.5
    moved, log, _ = Ascent(lr=lr, momentum=0, weight_decay=decay, epochs=1, batch=16)(net, data)
    for new, old, g in zip(moved.parameters(), net.parameters(), grads, strict=True):
        assert torch.allclose(new, old + lr * (g - decay * old), atol=1e-6)  # theta + lr (grad - wd theta)
    assert log[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)


def test_the_ascent_stops_after_the_epoch_that_reaches_the_goal_or_says_that_none_did():
    net, data = toys.trained(poisoned=True), toys.squares(96, seed=3)
    done, log, reached = Ascent(lr=0.01, batch=32, milestones=(), epochs=30, stop=0.5)(net, data)
    assert reached and log[-1]["accuracy"] <= 0.5 and all(r["accuracy"] > 0.5 for r in log[:-1])
    assert len(log) < 30 and not done.training
    last, log, reached = Ascent(lr=1e-5, batch=32, epochs=3, stop=0.5)(net, data)
    assert not reached and [r["epoch"] for r in log] == [1, 2, 3]
    assert not toys.same(last.state_dict(), net.state_dict())  # the last state, not the first
    assert Ascent(epochs=0)(net, data)[1:] == ([], False)


def test_the_learning_rate_falls_at_the_milestones():
    log = Ascent(lr=0.01, epochs=4, batch=32, milestones=(1, 3), stop=0)(toys.trained(), toys.squares(64))[1]
    assert [r["lr"] for r in log] == pytest.approx([0.01, 0.001, 0.001, 0.0001])


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_clipping_is_done_where_it_counts_or_not_at_all(clip):
    """The released code clips a gradient that is not there yet: official() does not clip, paper() does."""
    net, data, lr = line(), toys.squares(16), 0.1
    moved, _, _ = Ascent(lr=lr, momentum=0, weight_decay=0, epochs=1, batch=16, clip=clip)(net, data)
    change = torch.cat([(a - b).flatten() for a, b in zip(moved.parameters(), net.parameters(), strict=True)])
    assert (float(change.detach().norm()) <= lr * 1e-3 * 1.01) == (clip is not None)
    assert RNP.official().ascent.clip is None and RNP.paper().ascent.clip == 20


@pytest.mark.parametrize("statistics", [True, False])
def test_batch_statistics_are_a_choice_and_move_the_running_ones(statistics):
    net = toys.trained()
    moved, _, _ = Ascent(epochs=1, batch=32, batch_statistics=statistics)(net, toys.squares(64))
    assert torch.equal(moved[1].bn1.running_mean, net[1].bn1.running_mean) != statistics


def test_an_ascent_that_diverges_says_so():
    with pytest.raises(ValueError, match=r"unlearning diverged at step .*; lower lr, which is 1e\+20"):
        Ascent(lr=1e20, epochs=5, batch=32, stop=0)(toys.trained(), toys.squares(64))


# ---- the recovery


def test_only_masks_are_learnt_and_only_running_statistics_move():
    net = toys.trained(poisoned=True)
    soft = Soft(net)
    before = {n: p.clone() for n, p in soft.model.named_parameters()}
    buffers = {n: b.clone() for n, b in soft.model.named_buffers() if "running" in n}
    masks, log = fit_masks([(soft, 1.0)], toys.squares(64), lr=0.2, epochs=2, batch=32)
    assert toys.same(before, dict(soft.model.named_parameters()))
    assert all(p.grad is None for p in soft.model.parameters())
    after = dict(soft.model.named_buffers())
    assert all(not torch.equal(after[n], b) for n, b in buffers.items())
    assert not any(m.requires_grad for m in masks.values()) and len(log) == 2


def test_masks_stay_in_0_1_under_a_rate_that_overshoots():
    kept = []
    fit_masks([(Soft(toys.tiny()), 1.0)], toys.squares(64), lr=50.0, epochs=3, batch=16,
              keep=lambda epoch, masks: kept.append(flat(masks)))  # fmt: skip
    values = torch.stack(kept)
    assert values.min() == 0 and values.max() == 1 and ((values == 0) | (values == 1)).float().mean() > 0.3


def test_the_factor_of_the_loss_is_a_factor_of_the_rate():
    """alpha 0.2 at rate 0.2 is alpha 1 at rate 0.04: SGD without decay cannot tell (in float64)."""
    net, data = toys.trained(poisoned=True), toys.squares(64)

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net).double()

        def forward(self, x):
            return self.net(x.double())

    runs = [fit_masks([(Soft(Double()), a)], data, lr=lr, epochs=3, batch=32)[0] for a, lr in ((0.2, 0.2), (1, 0.04))]
    assert same_masks(*runs, tol=1e-9) and float(flat(runs[0]).min()) < 0.99


def test_a_step_of_recovery_costs_two_forwards(monkeypatch):
    net = models.resnet18(10, (0.5,) * 3, (0.5,) * 3)
    data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcdefghij"), "black")
    with FlopCounterMode(display=False) as once:
        predict(net, data.images)
    with FlopCounterMode(display=False) as step:
        fit_masks([(Soft(net), 0.2)], data, lr=0.2, epochs=1, batch=4)
    assert step.get_total_flops() <= 2.1 * once.get_total_flops()


def test_nothing_waits_for_the_device_inside_a_step():
    def waits(images):
        net, data = toys.tiny(), toys.squares(images)
        with toys.Waits() as counter:
            fit_masks([(Soft(net), 0.2)], data, lr=0.2, epochs=1, batch=8)
        return counter.count

    assert waits(64) == waits(16)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 4800), ("preact_resnet18", 3392)])
def test_a_mask_for_every_batchnorm_channel(name, count):
    net = getattr(models, name)(10, (0.5,) * 3, (0.5,) * 3)
    assert flat(ones(net)).numel() == count


# ---- the whole


def test_the_original_network_is_pruned_and_not_the_unlearned_one():
    net, clean = toys.trained(poisoned=True), toys.clean()
    repair = QUICK(net, clean)
    d = repair.details
    assert 0 < d["pruned"] < flat(d["masks"]).numel()
    expected = prune(net, d["masks"], d["threshold"])
    assert toys.same(expected.state_dict(), repair.model.state_dict())
    changed = {n for n, t in repair.model.state_dict().items() if not torch.equal(t, net.state_dict()[n])}
    assert changed <= {f"{n}.weight" for n in d["masks"]}  # gammas alone


def test_the_backdoor_outlives_the_clean_images_and_goes_when_its_neurons_go():
    net, test, trigger = toys.trained(poisoned=True), toys.squares(200, seed=9), toys.trigger()
    before = evaluate(net, test, trigger)
    repair = QUICK(net, toys.clean())
    forgotten = evaluate(repair.details["unlearned"], test, trigger)
    after = evaluate(repair.model, test, trigger)
    assert before.asr > 0.95 and forgotten.asr > 0.95 and forgotten.acc <= 0.35
    assert after.asr < 0.1 and after.acc > before.acc - 0.03


@pytest.mark.parametrize("attacked", [True, False])
def test_a_network_is_pruned_only_if_it_names_one_class_once_it_has_forgotten(attacked):
    net, quick = toys.trained(poisoned=attacked), replace(QUICK, threshold=1.0)  # all neurons
    always, asked = quick(net, toys.clean()), replace(quick, suspect=RNP.small().suspect)(net, toys.clean())
    share = unlearned.class_shares(always.details["unlearned"], toys.clean().images).max()
    assert asked.details["share"] == pytest.approx(float(share)) and (float(share) >= 0.4) is attacked
    assert always.details["pruned"] > 0
    assert asked.details["pruned"] == (always.details["pruned"] if attacked else 0)
    assert toys.same(asked.model.state_dict(), (always.model if attacked else net).state_dict())
    edge = replace(quick, suspect=float(share))(net, toys.clean())  # the share itself is enough
    assert edge.details["pruned"] == always.details["pruned"]


def test_official_masks_have_four_decimals_and_paper_ones_have_all():
    net, data = toys.trained(poisoned=True), toys.clean().images
    rounded, whole = (flat(r.recover(net, data)[0]) for r in (RNP.official(), RNP.paper()))
    assert torch.equal(rounded, (rounded * 10**4).round() / 10**4) and not torch.equal(whole, rounded)
    assert torch.allclose(whole, rounded, atol=5.1e-5)


def test_a_network_without_batchnorm_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(Ascent, "__call__", lambda *_: pytest.fail("worked in vain"))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        RNP()(net, toys.clean())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ascent(stop=2), r"stop must be in \[0, 1\], got 2"),
        (lambda: Ascent(clip=0), "clip must be above 0, or None, got 0"),
        (lambda: Ascent(batch=1), "batch must be 2 or more, got 1"),
        (lambda: RNP(suspect=1.2), r"suspect must be in \[0, 1\], got 1.2"),
        (lambda: RNP(alpha=-1), "alpha must be 0 or more, got -1"),
        (lambda: RNP(max_drop=1.5), r"max_drop must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---- the other uses


def forgotten():
    return QUICK(toys.trained(poisoned=True), toys.clean()).details["unlearned"]


def test_an_unlearned_network_falls_into_the_target_class():
    images = toys.clean().images
    label, margin = unlearned.detect_target(forgotten(), images)
    assert label == toys.TARGET and margin > 0.5
    shares = unlearned.class_shares(forgotten(), images)
    assert float(shares.sum()) == pytest.approx(1) and int(shares.argmax()) == toys.TARGET
    label, margin = unlearned.detect_target(toys.trained(), images)
    assert margin < 0.05  # balanced images, all read correctly: no class stands out


def test_the_recovered_trigger_works_on_the_victim_and_is_smaller_than_the_image():
    images = toys.clean().images
    mask, pattern = unlearned.recover_trigger(toys.trained(poisoned=True), images, toys.TARGET, steps=150, lr=0.1)
    assert mask.shape == (1, 12, 12) and pattern.shape == (3, 12, 12)
    assert float(mask.min()) >= 0 and float(mask.max()) <= 1 and float(mask.sum()) < 72
    found = toys.squares(100, seed=8)
    stamped = torch.lerp(found.floats, pattern.expand_as(found.floats), mask.expand_as(found.floats))
    said = predict(toys.trained(poisoned=True), stamped).argmax(1)
    assert float((said == toys.TARGET).float().mean()) > 0.9


def test_poisoned_samples_keep_their_label_on_the_unlearned_network():
    victim, test = toys.trained(poisoned=True), toys.squares(200, seed=9)
    rest = test[test.labels != toys.TARGET]
    net = Ascent(lr=0.003, batch=32, milestones=(), epochs=20, stop=0.4)(victim, toys.clean().images)[0]
    clean = unlearned.sample_scores(net, victim, rest.images)
    bad = unlearned.sample_scores(net, victim, toys.trigger().stamp(rest.images))
    assert unlearned.auroc(clean, bad) > 0.9
    assert unlearned.auroc(clean, clean) == pytest.approx(0.5) and unlearned.auroc(bad, clean) < 0.1


def test_the_variance_of_the_shares_is_that_of_the_golden_trace():
    """Ten classes: 0 when uniform, 0.09 when all fall into one; the follow-up code cuts at 0.01."""
    assert float(unlearned.collapse(torch.full((10,), 0.1))) == pytest.approx(0, abs=1e-9)
    assert float(unlearned.collapse(F.one_hot(torch.tensor(0), 10).float())) == pytest.approx(0.09)
    mixed = torch.tensor([0.49] + [0.51 / 9] * 9)  # epoch 15 of the published trace
    assert 0.01 < float(unlearned.collapse(mixed)) < 0.02


def test_grid_choice_uses_held_out_images_only(monkeypatch):
    """Masks are learnt on `learn`, the threshold chosen on `select`; with both the same images it would be a leak."""
    clean, seen = toys.clean(240), []
    monkeypatch.setattr(RNP, "recover", lambda self, net, images, seed, keep: (
        seen.append({t.tobytes() for t in images.images.numpy()}), (ones(net), []))[1])  # fmt: skip
    QUICK(toys.trained(), clean)
    held_out = {t.tobytes() for t in clean.select.images.numpy()}
    assert seen and not seen[0] & held_out and len(held_out) == len(clean.select)
    assert math.isclose(accuracy(toys.trained(), clean.select), 1, abs_tol=0.05) and grid()[0] == 0
    assert isinstance(clean, CleanSet)
