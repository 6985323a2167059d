"""LF: the closed form against the figures of the released pattern, DeepFool against geometry, the search on a toy."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
import toys
from torch import nn

from bdlib.attacks.low_frequency import LF, deepfool, smoothing
from bdlib.attacks.sig import Wave
from bdlib.metrics import evaluate
from bdlib.training import fit

T, DATA = toys.TARGET, toys.squares(100)
CLOSED = replace(LF.closed_form(T), rate=0.2, limit=102)


def energy(pattern, radius):
    """Share of the AC energy at spatial frequencies up to `radius`, in periods over the side."""
    power = torch.fft.fft2(pattern.double()).abs().square()
    power[:, 0, 0] = 0
    fy, fx = (torch.fft.fftfreq(s, 1 / s) for s in pattern.shape[1:])
    near = (fy[:, None] ** 2 + fx**2).sqrt() <= radius
    return float(power[:, near].sum() / power.sum())


class Bright(nn.Module):
    """Class 0 where the weighted brightness is low, class 1 where it is high; the weights are a bump, roughened."""

    def __init__(self, side=12, centre=7.0, threshold=0.5):
        super().__init__()
        i = (torch.arange(side) - centre) ** 2
        bump = (-(i[:, None] + i) / 18).exp()
        bump = bump * torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
        self.register_buffer("bump", bump / bump.sum())
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        score = 20 * ((x * self.bump).sum((1, 2, 3)) - self.threshold)
        return torch.stack([-score, score], 1)


# ---- the closed form


def test_the_closed_form_has_the_figures_of_the_released_pattern():
    v = LF.closed_form().trigger((3, 32, 32), 10).wave
    levels = v * 255
    assert torch.allclose(levels.amin((1, 2)), torch.tensor([1.0, 0, 4]), atol=1e-4)
    assert torch.allclose(levels.amax((1, 2)), torch.tensor([18.0, 0, 51]), atol=1e-4)
    assert divmod(int(levels[2].argmax()), 32) == (13, 13)
    falls = float((levels[2, 13, 23] - 4) / 47), float((levels[2, 31, 31] - 4) / 47)
    assert falls[1] == pytest.approx(0, abs=1e-6) and falls[0] == pytest.approx(math.exp(-100 / 2 / 10.5**2), abs=0.05)
    assert energy(v, 1) == pytest.approx(0.90, abs=0.01) and energy(v, 2) == pytest.approx(0.975, abs=0.01)
    x = torch.full((1, 3, 32, 32), 0.5)  # nothing clips here, which costs some tenths against photographs (23.5)
    trigger = LF.closed_form().trigger((3, 32, 32), 10)
    psnr = -10 * math.log10(float((trigger(x) - x).square().mean()))
    assert psnr == pytest.approx(23.3, abs=0.3)
    assert torch.equal(trigger(x)[:, 1], x[:, 1])  # the green plane stays


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 12, 12), (4, 20, 40)])
def test_any_size(shape):
    attack = LF.closed_form()
    trigger = attack.trigger(shape, 10)
    x = torch.rand((5, *shape), generator=torch.Generator().manual_seed(0))
    before, out = x.clone(), trigger(x)
    assert torch.equal(x, before) and out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(torch.cat([trigger(x[:2]), trigger(x[2:])]), out)
    last = trigger.wave[-1] * 255
    assert float(last.min()) == pytest.approx(4, abs=1e-4) and float(last.max()) == pytest.approx(51, abs=1e-4)
    row, col = divmod(int(last.argmax()), shape[2])
    assert (row + 0.5) / shape[1] == pytest.approx(13.5 / 32, abs=0.6 / shape[1])
    assert (col + 0.5) / shape[2] == pytest.approx(13.5 / 32, abs=0.6 / shape[2])
    assert torch.equal(replace(attack, limit=0).trigger(shape, 10)(x), x)  # no strength, no change


def test_a_pattern_is_added_and_clipped():
    t = CLOSED.trigger((3, 12, 12), 4)
    x = DATA.floats[:9]
    assert torch.allclose(t(x), (x + t.wave).clamp(0, 1)) and (t(x) >= x).all()
    assert torch.equal(t(torch.ones(1, 3, 12, 12)), torch.ones(1, 3, 12, 12))


# ---- the parts of the search


@pytest.mark.parametrize(("side", "sigma"), [(32, 5.73), (64, 2 * 5.73), (28, 5.73 * 28 / 32)])
def test_the_smoothing_is_a_truncated_gaussian_with_zeros_beyond_the_border(side, sigma):
    a = smoothing(side)
    wide = torch.zeros(side)
    wide[side // 2] = 1
    response = a @ wide  # an impulse in the middle
    where = torch.arange(side, dtype=torch.float32)
    mean = (response * where).sum() / response.sum()
    assert float(response.sum()) == pytest.approx(1, abs=0.02)
    assert float(mean) == pytest.approx(side / 2 - 0.5, abs=0.5)  # even taps: half a pixel up
    spread = float((response * (where - mean) ** 2).sum() / response.sum()) ** 0.5
    assert spread == pytest.approx(sigma, rel=0.04)
    flat = a @ torch.ones(side)
    assert 0.4 < float(flat[0]) < 0.6 and float(flat[side // 2]) > 0.97  # a constant fades towards the border


def test_deepfool_on_a_linear_network_is_the_shortest_way():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    x = torch.rand(20, 3, 4, 4)
    with torch.no_grad():
        net[1].bias -= net(x).median(0).values  # both classes occur
        logits = net(x)
    change, arrived = deepfool(net, x, 1)
    w = (net[1].weight[1] - net[1].weight[0]).detach()
    distance = ((logits[:, 0] - logits[:, 1]) / w.norm()).clamp(min=0)
    assert arrived.all() and torch.allclose(change.flatten(1).norm(dim=1), 1.02 * distance, atol=1e-4)
    assert (net(x + change).argmax(1) == 1).all()
    assert (change[logits.argmax(1) == 1] == 0).all() and (logits.argmax(1) == 0).any()  # who is there stays


def test_deepfool_takes_each_image_by_itself_and_says_who_arrived():
    net, x = toys.trained(), DATA.floats[:12]
    change, arrived = deepfool(net, x, T, steps=50)
    assert arrived.all() and (net(x + change).argmax(1) == T).all()
    parts = torch.cat([deepfool(net, part, T, steps=50)[0] for part in x.split(5)])
    assert torch.allclose(parts, change, atol=1e-4)
    few, arrived = deepfool(net, x, T, steps=1)
    reached = net(x + few).argmax(1) == T
    assert torch.equal(arrived, reached) and not arrived.all() and arrived[DATA.labels[:12] == T].all()
    away = few[~arrived].flatten(1).norm(dim=1)
    assert (away > 0).all()
    nothing, none = deepfool(net, x[:0], T)
    assert nothing.shape == (0, 3, 12, 12) and len(none) == 0


def test_a_third_class_does_not_lead_deepfool_astray():
    """From class 0 the straight way to class 1 leads into class 2; a rival fixed at class 0 would end there."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    net[1].weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.5, 0.8]])
    x = torch.tensor([[0.1, 1.0]]).reshape(1, 1, 1, 2)
    change, arrived = deepfool(net, x, 1)
    assert arrived.all() and int(net(x + change).argmax()) == 1


# ---- the search


@pytest.mark.parametrize("together", [1, 10, 20])
def test_the_search_finds_a_smooth_pattern_that_fools(together):
    images = DATA.floats[:20] * 0.5
    net = Bright(threshold=float(images.mean()) + 0.07)
    attack = LF(1, count=20, together=together, delta=0.1)
    v, rates = attack.search(net, images)
    assert float(v.min()) == 0 and float(v.max()) == pytest.approx(0.2) and v.shape == images.shape[1:]
    assert energy(v, 2) >= 0.95
    fooled = float((net((images + v).clamp(0, 1)).argmax(1) != net(images).argmax(1)).float().mean())
    assert fooled == pytest.approx(max(rates)) and fooled >= 0.9
    assert not toys.same({"v": v}, {"v": attack.search(net, 1 - images)[0]})  # it depends on what it sees


def test_a_search_ends_when_enough_are_fooled_or_nothing_moves():
    images = DATA.floats[:20] * 0.5
    easy, hard = Bright(threshold=float(images.mean()) + 0.02), Bright(threshold=5.0)
    attack = LF(1, count=20, together=20, passes=9)
    assert len(attack.search(easy, images)[1]) < 5
    assert attack.search(hard, images)[1] == [0] * 5  # five passes at the same share
    assert len(replace(attack, passes=2).search(hard, images)[1]) == 2


def test_the_best_pattern_is_kept_and_one_judge_sees_all_or_nothing():
    net, images = toys.trained(), DATA.floats[:20]
    attack = LF(T, limit=80, count=20, together=20, passes=5, steps=50)
    v, rates = attack.search(net, images)
    fooled = net((images + v).clamp(0, 1)).argmax(1) != net(images).argmax(1)
    assert float(fooled.float().mean()) == pytest.approx(max(rates)) and rates[-1] < max(rates) < 1
    assert set(replace(attack, judges=1).search(net, images)[1]) <= {0.0, 1.0}


def test_poisoning_with_a_search():
    net, attack = toys.trained(), LF(T, 0.2, count=10, together=10, passes=2, steps=20)
    net.train()
    before, noise, pixels = toys.state(net), torch.get_rng_state(), DATA.images.clone()
    a, b, c = (attack.poison(DATA, seed=s, model=net) for s in (0, 0, 1))
    assert toys.unchanged(before, net) and torch.equal(torch.get_rng_state(), noise)
    assert torch.equal(DATA.images, pixels)
    assert toys.same(a.trigger.state_dict(), b.trigger.state_dict()) and torch.equal(a.data.images, b.data.images)
    assert not torch.equal(a.indices, c.indices) and not toys.same(a.trigger.state_dict(), c.trigger.state_dict())
    fresh = attack.trigger(DATA.shape, 4)
    assert torch.equal(fresh(DATA.floats), DATA.floats)  # nothing is learnt yet
    fresh.load_state_dict(a.trigger.state_dict())
    assert torch.equal(fresh(DATA.floats), a.trigger(DATA.floats)) and fresh.mapping == a.trigger.mapping
    assert int((a.trigger(torch.zeros(1, *DATA.shape)) * 255).round().max()) == 51


def test_poisoning_marks_exactly_the_indices():
    p = CLOSED.poison(DATA, seed=1)
    chosen = torch.zeros(100, dtype=torch.bool)
    chosen[p.indices] = True
    assert len(p.indices) == 20 and torch.equal(p.data.images[~chosen], DATA.images[~chosen])
    assert torch.equal(p.data.labels[~chosen], DATA.labels[~chosen]) and (p.data.labels[chosen] == T).all()
    assert torch.equal(p.data.images[chosen], p.trigger.stamp(DATA.images[chosen]))
    assert not torch.equal(p.indices, CLOSED.poison(DATA, seed=2).indices)
    none = replace(CLOSED, rate=0).poison(DATA)
    assert torch.equal(none.data.images, DATA.images) and torch.equal(none.data.labels, DATA.labels)


def test_the_pattern_is_learnt():
    test, net = toys.squares(200, seed=9), toys.tiny()
    poisoned = CLOSED.poison(toys.squares(384))
    fit(net, poisoned.data, replace(toys.QUICK, epochs=10))
    before, after = (evaluate(n, test, poisoned.trigger) for n in (toys.trained(), net))
    assert before.asr < 0.3 and after.asr > 0.9 and after.acc > 0.9, (before, after)


def test_presets_differ_where_the_released_code_does():
    paper, official, closed = LF.paper(3), LF.official(3), LF.closed_form(3)
    assert paper.target == official.target == closed.target == 3
    assert (paper.delta, paper.judges, paper.raw, paper.together) == (0.2, None, False, 1)
    assert (official.delta, official.judges, official.raw, official.together) == (0.8, 1, True, 1)
    assert paper.needs_model and official.needs_model and LF().needs_model and not closed.needs_model
    assert LF.small(3) == LF(3, limit=64) and LF.small().needs_model
    for preset in (paper, official, closed):
        assert eval(repr(preset), {"LF": LF}) == preset  # noqa: S307 (our own repr, the store's key)
    assert all(f"{f.name}:" in inspect.getdoc(LF) for f in fields(LF))
    assert isinstance(LF().trigger((1, 28, 28), 10), Wave)


def test_cpu_and_gpu_agree(device):
    net = toys.trained().to(device)
    p, q = CLOSED.poison(DATA), CLOSED.poison(DATA.to(device))
    assert torch.equal(p.indices, q.indices.cpu()) and q.trigger.wave.device.type == device
    assert (p.data.images.int() - q.data.images.cpu().int()).abs().max() <= 1
    q = LF(T, count=5, together=5, passes=1, steps=5).poison(DATA.to(device), model=net)
    assert q.data.images.device.type == q.trigger.wave.device.type == device


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LF().poison(DATA), "searches its pattern on a clean network: give model, or use LF.closed_form"),
        (lambda: LF(rate=-1), r"rate must be in \[0, 1\]"),
        (lambda: LF(pattern="open"), "pattern must be searched or closed, got 'open'"),
        (lambda: LF(limit=300), r"limit must be in \[0, 255\] grey levels, got 300"),
        (lambda: LF(count=0), "count must be 1 or more, got 0"),
        (lambda: LF(delta=2), r"delta must be in \[0, 1\], got 2"),
        (lambda: LF(passes=0), "passes must be 1 or more, got 0"),
        (lambda: LF(together=200), r"together must be in \[1, 100\], at most count, got 200"),
        (lambda: LF(steps=0), "steps must be 1 or more, got 0"),
        (lambda: LF(judges=0), r"judges must be None or in \[1, 100\], got 0"),
        (lambda: LF.closed_form(7).poison(DATA), r"target must be a class in \[0, 3\], got 7"),
        (lambda: LF(7).poison(DATA, model=toys.trained()), r"target must be a class in \[0, 3\], got 7"),
        (lambda: replace(CLOSED, rate=0.001).poison(DATA), r"rate 0\.001 selects no image of 100"),
        (lambda: CLOSED.trigger((3, 12, 12), 4)(torch.zeros(2, 1, 12, 12)), "takes float images"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
