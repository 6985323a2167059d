"""Neurons: masks change nothing at 1, pruning sets gamma to 0 and nothing else, a sweep is many single prunings."""

import copy

import pytest
import torch
import torch.nn.functional as F
import toys
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bdlib import models
from bdlib.metrics import accuracy, evaluate
from bdlib.neurons import (
    Soft,
    batchnorms,
    choose_threshold,
    clean_curve,
    curve,
    flat,
    grid,
    magnitude,
    ones,
    prune,
    saliency,
    trigger_activated_change,
)


def random_masks(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.shape, generator=g).to(m.device) for n, m in ones(model).items()}


class WithoutNorm(nn.Module):
    """A network without neurons."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 12 * 12, 4)
        self.plain = nn.BatchNorm2d(3, affine=False)  # no gamma to mask

    def forward(self, x):
        return self.linear(self.plain(x).flatten(1))


# ---- which neurons


@pytest.mark.parametrize(
    ("build", "count"),
    [(models.resnet18, 4800), (models.preact_resnet18, 3392), (models.vgg19_bn, 5504), (models.small, 1376)],
)
def test_every_batchnorm_channel_is_a_neuron(build, count):
    with torch.device("meta"):
        masks = ones(build(10, (0.5,) * 3, (0.2,) * 3))
    assert sum(len(m) for m in masks.values()) == count
    if build is models.resnet18:
        assert len(masks) == 20 and {"1.bn1", "1.layer2.0.shortcut.1"} <= set(masks)  # stem and shortcuts too


@pytest.mark.parametrize("use", [batchnorms, ones, magnitude, Soft, lambda m: prune(m, {}, 0.5)])
def test_a_network_without_batchnorm_is_refused_with_a_remedy(use):
    with pytest.raises(ValueError, match=r"WithoutNorm has no BatchNorm.*FT"):
        use(WithoutNorm())


def test_flat_keeps_the_order_of_the_layers():
    masks = random_masks(toys.tiny())
    assert torch.equal(flat(masks), torch.cat([masks["1.bn1"], masks["1.bn2"]])) and len(flat(masks)) == 24


# ---- soft masks


@pytest.mark.parametrize("training", [False, True])
def test_masks_of_one_and_no_noise_change_no_bit(device, training):
    net, x = toys.trained().to(device), toys.squares(30).floats.to(device)
    soft, one = Soft(net, batch_statistics=training), ones(net)
    net.train(training)
    assert torch.equal(soft(x, one), copy.deepcopy(net)(x))
    zero = {n: torch.zeros_like(m) for n, m in one.items()}
    noise_on = soft(x, {n: m + zero[n] for n, m in one.items()}, {n: 1 + z for n, z in zero.items()})
    assert torch.equal(noise_on, copy.deepcopy(net)(x))


def test_batch_statistics_concern_batchnorm_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten())
    soft = Soft(net)
    assert soft.norms["1"].training and not soft.model[2].training


def test_closed_form_of_one_channel():
    bn = nn.BatchNorm2d(1)
    bn.weight.data.fill_(1.7)
    bn.bias.data.fill_(-0.4)
    bn.running_mean.fill_(0.3)
    bn.running_var.fill_(2.0)
    x = torch.rand(5, 1, 4, 4)
    m, delta, xi = 0.6, -0.25, 0.35
    out = Soft(nn.Sequential(bn), batch_statistics=False)(
        x, {"0": torch.tensor([m + delta])}, {"0": torch.tensor([1 + xi])}
    )
    normal = (x - 0.3) / (2.0 + bn.eps) ** 0.5
    assert torch.allclose(out, 1.7 * (m + delta) * normal - 0.4 * (1 + xi), atol=1e-6)
    masked = Soft(nn.Sequential(bn), batch_statistics=False)(x, {"0": torch.tensor([m])})
    assert torch.allclose(masked, 1.7 * m * normal - 0.4, atol=1e-6)  # a mask never touches beta


def test_only_the_factors_get_gradients_and_the_network_is_left_alone():
    net = toys.trained().train()
    before = toys.state(net)
    soft, masks = Soft(net), {n: m.requires_grad_() for n, m in ones(net).items()}
    soft(toys.squares(16).floats, masks).logsumexp(1).sum().backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in masks.values())
    assert all(p.grad is None and not p.requires_grad for p in soft.model.parameters())
    assert toys.unchanged(before, net)


# ---- pruning


@given(st.integers(0, 99), st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]))
def test_prune_zeroes_gamma_where_the_mask_is_low_and_changes_no_other_bit(seed, threshold):
    net = toys.trained()
    masks = random_masks(net, seed)
    masks["1.bn1"][:3] = torch.tensor([0.25, 0.5, 0.0])  # values that lie on a threshold
    before = toys.state(net)
    pruned = prune(net, masks, threshold)
    old, new = net.state_dict(), pruned.state_dict()
    for name, tensor in old.items():
        layer = name.removesuffix(".weight")
        if layer in masks and name.endswith(".weight"):
            gone = masks[layer] <= threshold
            assert torch.equal(new[name], tensor * ~gone) and int((new[name] == 0).sum()) == int(gone.sum())
        else:
            assert torch.equal(new[name], tensor), name
    assert toys.unchanged(before, net)
    if threshold < 0:
        assert toys.same(old, new)
    if threshold >= 1:
        assert not any(m.weight.any() for m in batchnorms(pruned).values())


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_pruned_sets_are_nested(seed, a, b):
    net = toys.trained()
    masks, (low, high) = random_masks(net, seed), sorted((a, b))
    few, many = batchnorms(prune(net, masks, low)), batchnorms(prune(net, masks, high))
    assert all(((few[n].weight == 0) <= (many[n].weight == 0)).all() for n in few)


def test_a_pruned_channel_says_beta_and_nothing_else(device):
    net = toys.trained().to(device)
    masks = ones(net)
    masks["1.bn1"][2] = 0
    pruned, seen = prune(net, masks, 0.5), []
    pruned[1].bn1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pruned.eval()(toys.squares(8).floats.to(device))
    assert (seen[0][:, 2] == net[1].bn1.bias[2]).all() and seen[0][:, 3].std() > 0


@pytest.mark.parametrize("masks", [{"1.bn1": torch.ones(7)}, {"1.bn9": torch.ones(8)}])
def test_masks_that_do_not_fit_are_named(masks):
    (name,) = masks
    with pytest.raises(ValueError, match=f"no BatchNorm layer '{name}' with {len(masks[name])} channels"):
        prune(toys.tiny(), masks, 0.5)


# ---- sweeps


def test_a_curve_is_pruning_and_scoring_one_threshold_at_a_time(device):
    net, trigger = toys.trained(poisoned=True).to(device), toys.trigger().to(device)
    test, masks = toys.squares(80, seed=3).to(device), random_masks(net)
    masks["1.bn1"][:6], masks["1.bn2"][:12] = 0.3, 1.0  # values that lie on a threshold
    before, thresholds = toys.state(net), [-1.0, 0.0, 0.3, 0.31, 0.9, 1.0]
    records = curve(net, masks, thresholds, test, trigger)
    clean = clean_curve(net, masks, thresholds, test)
    for t, r, c in zip(thresholds, records, clean, strict=True):
        pruned = prune(net, masks, t)
        s, zeros = evaluate(pruned, test, trigger), sum(int((m.weight == 0).sum()) for m in batchnorms(pruned).values())
        assert (r["threshold"], r["pruned"]) == (c["threshold"], c["pruned"]) == (t, zeros)
        assert (r["acc"], r["asr"], r["ra"]) == pytest.approx((s.acc, s.asr, s.ra))
        assert c["accuracy"] == pytest.approx(accuracy(pruned, test))
    assert toys.unchanged(before, net)


def test_an_empty_sweep_is_refused():
    with pytest.raises(ValueError, match="thresholds is empty"):
        clean_curve(toys.tiny(), ones(toys.tiny()), [], toys.squares(8))


@given(st.integers(1, 200))
def test_a_grid_has_exactly_so_many_thresholds_below_one(steps):
    g = grid(steps)
    assert len(g) == steps and g[0] == 0 and g[-1] < 1 and g == sorted(set(g))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_the_chosen_threshold_is_the_last_that_costs_little(accuracies, before, max_drop):
    thresholds = grid(len(accuracies))
    chosen = choose_threshold(thresholds, accuracies, before, max_drop)
    fine = [t for t, a in zip(thresholds, accuracies, strict=True) if a >= before - max_drop - 1e-9]
    assert chosen == (fine[-1] if fine else -1)


def test_choosing_by_hand():
    assert choose_threshold([0, 0.1, 0.2, 0.3], [0.98, 0.97, 0.96, 0.5], 0.98, 0.02) == 0.2
    assert choose_threshold([0, 0.1], [0.5, 0.5], 0.98, 0.02) == -1
    with pytest.raises(ValueError, match=r"max_drop must be in \[0, 1\].*got 2"):
        choose_threshold([0], [1], 1, 2)


# ---- what neurons are like


def test_magnitude_is_the_size_of_gamma():
    net = toys.trained()
    net[1].bn1.weight.data[0] = -3
    assert magnitude(net)["1.bn1"][0] == 3 and torch.equal(magnitude(net)["1.bn2"], net[1].bn2.weight.abs())


def test_saliency_is_the_slope_of_the_loss_in_the_mask(device):
    net, data = toys.tiny().eval().to(device), toys.squares(60, seed=4).to(device)
    values = saliency(net, data, batch=17)

    def loss(layer, channel, mask):
        pruned = copy.deepcopy(net).double()
        with torch.no_grad():
            batchnorms(pruned)[layer].weight[channel] *= mask
            return F.cross_entropy(pruned(data.images.double() / 255), data.labels)

    for layer, channel in ((n, c) for n, v in values.items() for c in range(len(v))):
        slope = (loss(layer, channel, 1 + 1e-4) - loss(layer, channel, 1 - 1e-4)) / 2e-4
        assert values[layer][channel].item() == pytest.approx(abs(float(slope)), rel=1e-2, abs=1e-6)


def test_the_planted_neuron_changes_most_under_the_trigger(device):
    net, name = toys.planted()
    net = net.train().to(device)
    before, images = toys.state(net), toys.squares(40, seed=6).images.to(device)
    change = trigger_activated_change(net, images, toys.trigger().to(device), batch=16)
    assert flat(change).argmax() == sum(len(c) for n, c in list(change.items())[: list(change).index(name)])
    assert toys.unchanged(before, net) and not any(m._forward_hooks for m in net.modules())
    nothing = toys.BadNets(size=1).trigger((3, 12, 12), 4)
    nothing.opacity.zero_()
    assert not flat(trigger_activated_change(net, images, nothing)).any()


def test_trigger_activated_change_by_hand():
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    images, trigger = toys.squares(10).images, toys.trigger()
    x = images.float() / 255
    expected = (net(trigger(x)) - net(x)).flatten(2).norm(dim=2).mean(0)
    assert torch.allclose(trigger_activated_change(net, images, trigger, batch=3)["0"], expected, atol=1e-6)
