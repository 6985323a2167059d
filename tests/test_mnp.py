"""MNP: what is stated of it, the reconstruction's own algebra, and that without its terms it is RNP."""

import copy

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from bdlib import models
from bdlib.defenses import MNP, RNP
from bdlib.defenses.mnp import correlation, feeders, magnitude, scaled, slope, suspicion
from bdlib.defenses.rnp import Ascent, fit_masks
from bdlib.metrics import accuracy, evaluate
from bdlib.models import normalized
from bdlib.neurons import Soft, batchnorms, flat, grid, ones, prune, saliency

GENTLE = Ascent(lr=0.003, batch=32, milestones=(), epochs=20)
QUICK = MNP(ascent=GENTLE, epochs=4, batch=32, max_drop=0.05)
EXAMPLE = toys.squares(1).floats


def same_masks(a, b, tol=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=tol, rtol=0) for n in a)


def test_without_penalty_and_preserving_it_is_rnp():
    net, clean = toys.trained(poisoned=True), toys.clean()
    mnp = MNP(ascent=GENTLE, penalty=0, kappa=0, alpha=0.2, lr=0.2, epochs=4, batch=32)(net, clean, seed=1)
    rnp = RNP(ascent=GENTLE, alpha=0.2, lr=0.2, epochs=4, batch=32)(net, clean, seed=1)
    assert toys.same(mnp.details["suppressed"].state_dict(), rnp.details["unlearned"].state_dict())  # mu = wd / 2
    assert same_masks(mnp.details["masks"], rnp.details["masks"]) and mnp.log == rnp.log
    with_terms = MNP(ascent=GENTLE, penalty=0.1, kappa=0, alpha=0.2, lr=0.2, epochs=4, batch=32)(net, clean, seed=1)
    assert not same_masks(with_terms.details["masks"], rnp.details["masks"])


@pytest.mark.parametrize(("kappa", "price"), [(0.0, 0.3), (1.0, 0.3), (1.0, 0.0)])
def test_the_objective_is_the_sum_of_its_terms(kappa, price):
    """One step of SGD from masks of 1: m = 1 - lr (dL/dm + lambda w + kappa dL0/dm), clipped."""
    victim, data, lr = toys.trained(poisoned=True), toys.squares(32), 0.01
    hidden = Ascent(lr=0.01, batch=32, epochs=8, milestones=())(victim, data)[0]
    sizes = magnitude(hidden, EXAMPLE, relative=True)
    masks = {n: m.requires_grad_() for n, m in ones(victim).items()}
    x, y = data.floats, data.labels
    loss = F.cross_entropy(Soft(hidden)(x, masks), y)
    loss = loss + kappa * F.cross_entropy(Soft(victim, batch_statistics=False)(x, masks), y)
    loss = loss + price * sum((sizes[n] * m).sum() for n, m in masks.items())
    grads = torch.autograd.grad(loss, list(masks.values()))
    expected = {n: (1 - lr * g).clamp(0, 1) for n, g in zip(masks, grads, strict=True)}
    found, _, used = MNP(penalty=price, kappa=kappa, lr=lr, epochs=1, batch=32).learn(victim, hidden, data)
    assert same_masks(found, expected, tol=1e-5) and used["penalty"] == price
    assert same_masks(used["magnitude"], sizes)


def test_a_mask_settles_where_fit_and_price_balance():
    """Toy fit 1/2 sum a (m - 1)^2: the answer is clip(1 - lambda w / a, 0, 1), closed form."""
    a, w, price = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.5, 1.0, 2.0, 0.1]), 0.5
    m = torch.ones(4, requires_grad=True)
    opt = torch.optim.SGD([m], lr=0.05, momentum=0.9)
    for _ in range(400):
        opt.zero_grad()
        (0.5 * (a * (m - 1) ** 2).sum() + price * (w * m).sum()).backward()
        opt.step()
        m.data.clamp_(0, 1)
    assert torch.allclose(m.detach(), (1 - price * w / a).clamp(0, 1), atol=1e-4)


def test_a_large_idle_neuron_goes_and_a_small_needed_one_stays():
    """The method in one picture: the price is paid by size, and only use on clean images buys it back."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.linear = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 2)
            with torch.no_grad():
                self.conv.weight.copy_(torch.tensor([0.1, 10.0])[:, None, None, None])  # needed, decoy
                self.linear.weight.copy_(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
                self.linear.bias.zero_()

        def forward(self, x):
            return self.linear(self.bn(self.conv(x)).mean((2, 3)))

    from bdlib.data.imageset import ImageSet

    grey = torch.tensor([40, 210]).repeat(32).to(torch.uint8)[:, None, None, None].expand(64, 1, 2, 2).contiguous()
    data = ImageSet(grey, (grey[:, 0, 0, 0] < 100).long(), ("light", "dark"), "grey")
    net = Two()
    net(data.floats)  # sets the running statistics a little; batch statistics are used anyway
    masks, _, _ = MNP(penalty=0.05, kappa=0, epochs=40, batch=32, lr=0.1, relative=True).learn(net, net, data)
    assert masks["bn"][1] < 0.1 and masks["bn"][0] > 0.9


@pytest.mark.parametrize("kind", ["filter", "folded", "gamma"])
def test_magnitude_is_what_it_says(kind):
    net = toys.trained()[1]
    found = magnitude(net, EXAMPLE, kind)
    norms = {"bn1": net.conv1.weight.abs().sum((1, 2, 3)), "bn2": net.conv2.weight.abs().sum((1, 2, 3))}
    for n, bn in (("bn1", net.bn1), ("bn2", net.bn2)):
        gamma, sigma = bn.weight.abs(), (bn.running_var + bn.eps).sqrt()
        expected = {"filter": norms[n], "folded": gamma * norms[n] / sigma, "gamma": gamma}[kind]
        assert torch.allclose(found[n], expected, rtol=1e-5)
        relative = magnitude(net, EXAMPLE, kind, relative=True)[n]
        assert float(relative.mean()) == pytest.approx(1, abs=1e-5)
        with torch.no_grad():
            net.conv1.weight.mul_(7)  # a whole layer larger: relative sizes stay
        if kind == "filter":
            assert torch.allclose(magnitude(net, EXAMPLE, kind, relative=True)[n], relative, rtol=1e-4)


def test_folding_undoes_what_batchnorm_undoes():
    net = toys.trained()[1].eval()
    before = magnitude(net, EXAMPLE, "folded")["bn1"]
    with torch.no_grad():  # the same function with a filter nine times as large
        net.conv1.weight[0] *= 9
        net.bn1.running_mean[0] *= 9
        net.bn1.running_var[0] *= 81
    assert torch.allclose(magnitude(net, EXAMPLE, "folded")["bn1"], before, rtol=1e-3)
    assert not torch.allclose(magnitude(net, EXAMPLE, "filter")["bn1"][0], before[0], rtol=1e-1)


def test_the_convolution_that_feeds_a_batchnorm_is_found():
    net = models.small(10, (0.5,) * 3, (0.5,) * 3)
    found = feeders(net, torch.rand(1, 3, 32, 32))
    assert set(found) == set(batchnorms(net))
    assert found["1.layer1.0.bn2"] is net[1].layer1[0].conv2
    pre = models.preact_resnet18(10, (0.5,) * 3, (0.5,) * 3)
    sizes = magnitude(pre, torch.rand(1, 3, 32, 32))
    first = pre[1].layer1[1].bn1  # normalises a sum: no convolution feeds it
    assert torch.equal(sizes["1.layer1.1.bn1"], first.weight.detach().abs())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *pre.modules()))


def test_the_slope_is_the_quantile_of_the_useful_ratios():
    net, data = toys.trained(), toys.squares(64)
    sizes = magnitude(net, EXAMPLE, relative=True)
    masks = {n: m.requires_grad_() for n, m in ones(net).items()}
    grads = torch.autograd.grad(F.cross_entropy(Soft(net)(data.floats, masks), data.labels), list(masks.values()))
    ratio = torch.cat([-g / sizes[n] for n, g in zip(masks, grads, strict=True)])
    useful = ratio[ratio > 0].sort().values
    assert slope(net, data, sizes, 0) == pytest.approx(float(useful[0]), rel=1e-3)
    assert slope(net, data, sizes, 1) == pytest.approx(float(useful[-1]), rel=1e-3)


def test_saliency_to_first_order_ranks_like_removal():
    net, data = toys.trained(), toys.squares(100)
    first = flat(saliency(net, data))
    base, exact = F.cross_entropy(net(data.floats), data.labels), []
    for n, bn in batchnorms(net).items():
        for c in range(bn.num_features):
            masks = ones(net)
            masks[n][c] = 0
            cut = Soft(net, batch_statistics=False)(data.floats, masks)
            exact.append(float((F.cross_entropy(cut, data.labels) - base).detach().abs()))
    from scipy.stats import spearmanr

    assert spearmanr(first, torch.tensor(exact)).statistic > 0.6


def test_the_decoy_lowers_the_correlation_and_raises_suspicion():
    """A backdoored network's large idle neurons: size and use on clean images part company."""
    net, data = toys.trained(), toys.squares(100)
    plain = correlation(net, data, "folded")
    assert set(plain) == set(batchnorms(net)) and all(-1 <= r <= 1 for r in plain.values())
    decoyed = copy.deepcopy(net)
    order = saliency(net, data)["1.bn2"].argsort()
    with torch.no_grad():  # the least used half becomes the largest, without a change of the function
        for c in order[:8]:
            decoyed[1].conv2.weight[c] *= 50
            decoyed[1].bn2.running_mean[c] *= 50
            decoyed[1].bn2.running_var[c] *= 2500
    assert torch.allclose(decoyed.eval()(data.floats), net.eval()(data.floats), atol=1e-2)
    assert correlation(decoyed, data)["1.bn2"] < correlation(net, data)["1.bn2"] - 0.2
    assert suspicion(decoyed, data) > suspicion(net, data)


@pytest.mark.parametrize("coupling", ["joint", "alternate", "original", "resuppress"])
def test_every_coupling_runs_and_they_differ(coupling):
    net, hidden = toys.trained(poisoned=True), toys.trained(poisoned=True, seed=1)
    before, data = (toys.state(net), toys.state(hidden)), toys.squares(64)
    make = MNP(ascent=Ascent(lr=0.01, batch=32, epochs=2), penalty=0.05, epochs=4, batch=16, coupling=coupling)
    masks, log, _ = make.learn(net, hidden, data)
    assert [r["epoch"] for r in log] == [1, 2, 3, 4]
    assert toys.unchanged(before[0], net) and toys.unchanged(before[1], hidden)
    joint = MNP(penalty=0.05, epochs=4, batch=16).learn(net, hidden, data)[0]
    assert same_masks(masks, joint) == (coupling == "joint")


def test_preserving_protects_what_clean_images_need():
    net, data, test = toys.trained(poisoned=True), toys.clean().images, toys.squares(200, seed=9)
    hidden = GENTLE(net, data)[0]
    strong = MNP(penalty=0, kappa=100, epochs=4, batch=32).learn(net, hidden, data)[0]
    for t in grid()[:10]:
        assert accuracy(prune(net, strong, t).eval(), test) > accuracy(net, test) - 0.02


def test_scaling_multiplies_gamma_alone():
    net = toys.trained()
    half = scaled(net, {n: 0.5 * m for n, m in ones(net).items()})
    changed = {n for n, t in half.state_dict().items() if not torch.equal(t, net.state_dict()[n])}
    assert changed == {"1.bn1.weight", "1.bn2.weight"}
    assert torch.allclose(half[1].bn1.weight, net[1].bn1.weight / 2)


def test_the_backdoor_goes():
    net, test, trigger = toys.trained(poisoned=True), toys.squares(200, seed=9), toys.trigger()
    after = evaluate(QUICK(net, toys.clean()).model, test, trigger)
    assert after.asr < 0.1 and after.acc > 0.95


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MNP(kappa=-1), "kappa must be 0 or more, got -1"),
        (lambda: MNP(quantile=2), r"quantile must be in \[0, 1\], got 2"),
        (lambda: MNP(coupling="both"), "coupling must be joint, .*got 'both'"),
        (lambda: magnitude(toys.tiny(), EXAMPLE, "length"), "kind must be filter, folded or gamma, got 'length'"),
        (lambda: magnitude(normalized(nn.Flatten(), (0.5,) * 3, (0.5,) * 3), EXAMPLE), "no BatchNorm layer"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_alternating_updates_once_a_term():
    """With one batch an epoch, the first epoch sees the first term alone."""
    net, hidden, data = toys.trained(poisoned=True), toys.trained(seed=1), toys.squares(32)
    both = [(Soft(hidden), 1.0), (Soft(net, batch_statistics=False), 1.0)]
    one = fit_masks([(Soft(hidden), 1.0)], data, lr=0.1, epochs=1, batch=32)[0]
    assert same_masks(fit_masks(both, data, lr=0.1, epochs=1, batch=32, alternate=True)[0], one)
