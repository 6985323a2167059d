"""FT-SAM: the closed form of the ascent, the gradient at the moved weights, BatchNorm, the released schedule."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from bdlib.defenses import FTSAM
from bdlib.defenses.ft_sam import _Sharp, ascent, soft_cross_entropy
from bdlib.training import fit


def test_the_ascent_is_the_best_point_of_the_ellipsoid():
    """Against brute force over the boundary ``|| e / |w| || = rho`` in two dimensions."""
    w, g, rho = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.7]), 0.3
    (e,) = ascent([w], [g], rho)
    assert float((e / w.abs()).norm()) == pytest.approx(rho, rel=1e-4)
    angles = torch.linspace(0, 2 * math.pi, 10_001)
    boundary = rho * torch.stack([w[0].abs() * angles.cos(), w[1].abs() * angles.sin()])  # (2, 10001)
    assert float(g @ e) >= float((g @ boundary).max()) - 1e-4
    plain = rho * g / g.norm()  # the ascent of SAM that is not adaptive lies elsewhere
    assert not torch.allclose(e, plain, atol=0.1)


def test_one_radius_for_all_weights_together():
    weights, gradients = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    moves = ascent(weights, gradients, 2.0)
    together = torch.cat([(e / w.abs()).flatten() for e, w in zip(moves, weights, strict=True)])
    assert float(together.norm()) == pytest.approx(2.0, rel=1e-4)
    assert [float(m.abs().sum()) for m in ascent(weights, gradients, 0.0)] == [0, 0]


def test_smoothing_spreads_over_the_other_classes():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert float(soft_cross_entropy(logits, labels, 0.0)) == pytest.approx(
        float(F.cross_entropy(logits, labels)), rel=1e-5
    )
    target = torch.full((5, 4), 0.1 / 3).scatter(1, labels[:, None], 0.9)
    expected = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    assert float(soft_cross_entropy(logits, labels, 0.1)) == pytest.approx(float(expected), rel=1e-5)
    torch_own = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert float(soft_cross_entropy(logits, labels, 0.1)) != pytest.approx(float(torch_own), rel=1e-3)


def test_the_gradient_is_that_at_the_moved_weights_and_the_weights_stay():
    net, data, rho = toys.trained().train(), toys.squares(32), 1.5
    twin = copy.deepcopy(net)
    for m in twin.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    params = list(twin.parameters())
    moves = ascent(params, torch.autograd.grad(F.cross_entropy(twin(data.floats), data.labels), params), rho)
    with torch.no_grad():
        for p, e in zip(params, moves, strict=True):
            p += e
    expected = torch.autograd.grad(F.cross_entropy(twin(data.floats), data.labels), params)
    before = {n: p.clone() for n, p in net.named_parameters()}
    loss, _ = _Sharp(rho, 0.0).loss(net, data.floats, data.labels, 0)
    found = torch.autograd.grad(loss, list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert toys.same(before, dict(net.named_parameters()))


def test_running_statistics_see_one_pass_of_two():
    net, data = toys.trained().train(), toys.squares(32)
    once = copy.deepcopy(net)
    once(data.floats)
    _Sharp(2.0, 0.0).loss(net, data.floats, data.labels, 0)
    assert torch.allclose(net[1].bn1.running_mean, once[1].bn1.running_mean)
    assert torch.allclose(net[1].bn2.running_var, once[1].bn2.running_var)
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_without_radius_and_smoothing_it_is_fine_tuning_bit_for_bit():
    net, clean = toys.trained(poisoned=True), toys.clean()
    flat = FTSAM(rho=0, smoothing=0, lr=0.05, epochs=2, batch=32)
    tuned = copy.deepcopy(net)
    fit(tuned, clean.images, flat._recipe(), seed=3)
    assert toys.same(flat(net, clean, seed=3).model.state_dict(), tuned.state_dict())
    sharp = FTSAM(rho=1, smoothing=0, lr=0.05, epochs=2, batch=32)
    assert not toys.same(sharp(net, clean, seed=3).model.state_dict(), tuned.state_dict())


def test_the_released_schedule_rises_again_and_ends_where_it_began():
    """100 epochs of 10 steps: five cycles; a cosine over the run ends at zero."""
    released, whole = FTSAM.official()._recipe(), FTSAM.paper()._recipe()
    rates = [released.lr_at(s, 10) for s in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[200] == pytest.approx(0.01) and rates[1000] == pytest.approx(0.01)
    assert whole.lr_at(999, 10) < 1e-6 and whole.lr_at(500, 10) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rho": -1.0}, "rho must be 0 or more, got -1"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1"),
        ({"schedule": "linear"}, "schedule must be cosine or restless, got 'linear'"),
        ({"epochs": -1}, "epochs must be 0 or more, got -1"),
    ],
)
def test_a_bad_value_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        FTSAM(**arguments)
