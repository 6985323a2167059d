"""i-BAU: the implicit hypergradient against a closed form, the perturbation, and the modes."""

import itertools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import toys

from bdlib.defenses import IBAU
from bdlib.defenses.ibau import _unit, hypergradient
from bdlib.models import normalized

QUICK = IBAU(lr=2e-2, batch=50, rounds=2)


def quadratic():
    """inner = 1/2 d'Ad - d'Bt, so d* = A^-1 B t; outer = 1/2 |d - c|^2 + 1/2 |t|^2: everything in closed form."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    A = q @ torch.diag(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)) @ q.T
    B = torch.randn(4, 3, generator=g, dtype=torch.float64)
    c, t = torch.randn(4, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
    t.requires_grad_()
    best = torch.linalg.solve(A, B @ t.detach())
    direct = t.detach()
    exact = direct + B.T @ torch.linalg.solve(A, best - c)
    return (lambda d: 0.5 * d @ A @ d - d @ (B @ t), lambda d: 0.5 * (d - c).square().sum() + 0.5 * t.square().sum(),
            best, t, direct, exact)  # fmt: skip


def test_the_hypergradient_converges_to_the_implicit_one():
    inner, outer, best, t, direct, exact = quadratic()
    errors = [
        float((hypergradient(inner, outer, best, [t], steps=k, lr=0.5)[0] - exact).norm()) for k in (0, 1, 5, 20, 200)
    ]
    assert errors[-1] < 1e-9 and all(a > b for a, b in itertools.pairwise(errors))


def test_no_step_leaves_the_direct_gradient():
    inner, outer, best, t, direct, exact = quadratic()
    found = hypergradient(inner, outer, best, [t], steps=0, lr=0.5)[0]
    assert torch.allclose(found, direct) and not torch.allclose(found, exact)


def test_parameters_that_do_not_matter_have_a_gradient_of_zero():
    inner, outer, best, t, *_ = quadratic()
    idle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(hypergradient(inner, outer, best, [t, idle], steps=3, lr=0.5)[1], torch.zeros(2))


def test_the_perturbation_changes_answers_and_its_step_is_sgd_in_normalised_units():
    net, data = toys.trained(poisoned=True), toys.squares(100, seed=4)
    parts = [(data.floats, data.labels)]
    unit = _unit(net, data.floats)
    assert torch.allclose(unit, torch.full((1, 3, 1, 1), 0.2))  # the std of this network's own normalisation
    found, changed = QUICK.find(net, parts, unit)
    delta = torch.zeros(1, 3, 12, 12, requires_grad=True)
    said = net(data.floats).argmax(1)
    loss = 1e-3 * delta.square().sum() - F.cross_entropy(net(data.floats + unit * delta), said)
    (slope,) = torch.autograd.grad(loss, delta)
    assert torch.allclose(found, -10 * slope, atol=1e-6)
    many, share = IBAU(inner_lr=1000.0).find(net, parts * 5, unit)
    assert float(share) > 0.3 and float(changed) <= float(share) and many.shape == (1, 3, 12, 12)


def test_a_network_without_normalisation_has_pixels_for_units():
    assert torch.equal(_unit(toys.Tiny(), toys.squares(1).floats), torch.ones(1, 3, 1, 1))
    net = normalized(toys.Tiny(), (0.1,) * 3, (0.1, 0.2, 0.3))
    assert torch.allclose(_unit(net, toys.squares(1).floats).flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_the_network_stays_in_evaluation_mode_and_its_statistics_stay():
    net = toys.trained(poisoned=True)
    modes = []
    repair = QUICK(net, toys.clean())
    repair.model.register_forward_hook(lambda m, i, o: modes.append(m.training))
    for n, b in repair.model.named_buffers():
        assert torch.equal(b, dict(net.named_buffers())[n])
    assert not torch.equal(repair.model[1].conv1.weight, net[1].conv1.weight)
    assert all(p.grad is None for p in repair.model.parameters())


def test_the_log_and_the_perturbation_are_in_pixels():
    repair = QUICK(toys.trained(poisoned=True), toys.clean())
    assert [r["round"] for r in repair.log] == [1, 2] and all(0 <= r["fooled"] <= 1 for r in repair.log)
    found = repair.details["perturbation"]
    assert found.shape == (3, 12, 12) and float(found.norm()) == pytest.approx(repair.log[-1]["norm"], rel=1e-4)
    assert IBAU(rounds=0)(toys.trained(), toys.clean()).log == []


class Recorder(toys.Tiny):
    """Remembers its inputs, in a list that its copies share."""

    seen: ClassVar[list[torch.Tensor]] = []

    def forward(self, x):
        self.seen.append(x.detach())
        return super().forward(x)


def test_the_share_says_how_many_images_wear_the_perturbation(monkeypatch):
    """1 % of 50 images is at least one image; all of them at share 1."""
    worn = []

    def spy(inner, outer, delta, params, *, steps, lr):
        Recorder.seen.clear()
        outer(torch.ones_like(delta))
        outer(torch.zeros_like(delta))
        worn.append(int(((Recorder.seen[0] - Recorder.seen[1]).flatten(1).abs().sum(1) > 0).sum()))
        return [torch.zeros_like(p) for p in params]

    monkeypatch.setattr("bdlib.defenses.ibau.hypergradient", spy)
    for share, expected in ((0.01, 1), (0.5, 25), (1.0, 50)):
        worn.clear()
        IBAU(rounds=1, batch=50, share=share)(Recorder(), toys.clean(200))
        assert worn == [expected] * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0"),
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"map_lr": 0.0}, "map_lr must be above 0, got 0"),
        ({"batch": 0}, "batch must be 1 or more, got 0"),
    ],
)
def test_a_bad_value_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        IBAU(**arguments)
