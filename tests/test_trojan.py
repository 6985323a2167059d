"""Trojan: where the patch lies, how it joins the image, and whether an optimised one drives its neurons."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
import toys
from torch import nn

from bdlib.attacks.inside import frozen, read
from bdlib.attacks.trojan import SQUARE, Region, TrojanPatch, Wrapped
from bdlib.attacks.trojan_nn import TrojanNN
from bdlib.metrics import evaluate
from bdlib.models import normalized
from bdlib.training import fit

T, DATA, CPU = toys.TARGET, toys.squares(100), torch.device("cpu")
# in the middle, where the toy's neurons all see it; small enough to leave the squares in sight
MIDDLE = Region("square", 10, (15.5, 15.5))
QUICK = TrojanNN(T, 0.2, region=MIDDLE, steps=40)


def textured():
    """A network whose neurons like texture: zero-mean filters see nothing inside a white patch."""
    g = torch.Generator().manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    with torch.no_grad():
        weight = torch.randn(8, 3, 3, 3, generator=g)
        conv.weight.copy_(weight - weight.mean((1, 2, 3), keepdim=True))
        conv.bias.zero_()
        linear.weight.copy_(torch.randn(4, 8, generator=g))
        linear.bias.zero_()
    return normalized(
        nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), (0.2,) * 3, (0.2,) * 3
    )


STATIC = [TrojanPatch(T, 0.2), TrojanPatch(T, 0.2, join="wrap"), TrojanPatch(T, 0.2, region=SQUARE, pattern="uniform")]
static = pytest.mark.parametrize("attack", STATIC, ids=["disc", "wrap", "square"])


def grey(shape=(3, 32, 32), level=128):
    return torch.full((1, *shape), level / 255)


# ---- where


def test_the_disc_lies_where_the_logo_lay():
    mask = Region().mask(32, 32)[0]
    rows, cols = mask.nonzero().T
    assert abs(int(mask.sum()) - 100) <= 4
    assert float(rows.float().mean()) == 22.5 and float(cols.float().mean()) == 23
    assert rows.min() >= 16 and rows.max() <= 29 and cols.min() >= 17 and cols.max() <= 29
    mask = SQUARE.mask(32, 32)[0]
    assert mask[25:28, 25:28].all() and mask.sum() == 9


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 12, 12)])
@pytest.mark.parametrize("attack", [TrojanPatch(), TrojanPatch.official(), TrojanNN()], ids=["disc", "wrap", "nn"])
def test_any_size(attack, shape):
    x = torch.rand((5, *shape), generator=torch.Generator().manual_seed(0))
    trigger, before = attack.trigger(shape, 10), x.clone()
    out, outside = trigger(x), (trigger.opacity == 0).expand_as(x)
    assert torch.equal(x, before) and out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out[outside], x[outside]) and not torch.equal(out, x)
    assert torch.equal(torch.cat([trigger(x[:2]), trigger(x[2:])]), out)
    pixels, scale = int(trigger.opacity.sum()), shape[1] / 32
    if isinstance(trigger, Wrapped):
        assert (3 * scale - 1) ** 2 <= pixels <= (3 * scale + 1) ** 2
    else:
        assert pixels == pytest.approx(100 * scale**2, rel=0.1)  # the area grows with the image


def test_the_place_scales_with_the_image():
    small, large = (Region().mask(s, s)[0].nonzero().float().mean(0) for s in (32, 64))
    assert torch.allclose((small + 0.5) * 2, large + 0.5, atol=0.05)


# ---- how


def test_the_patch_replaces_what_is_under_it():
    trigger = TrojanPatch().trigger((3, 32, 32), 10)
    on = (trigger.opacity == 1).expand(3, 32, 32)
    black, white = trigger(grey(level=0))[0], trigger(grey(level=255))[0]
    assert torch.equal(black[on], white[on]) and torch.equal(black[on].unique(), torch.tensor([0.7, 1.0]))
    psnr = -10 * math.log10(float((trigger(grey()) - grey()).square().mean()))
    assert psnr == pytest.approx(18.5, abs=0.5)  # 100 pixels of 1024, off by 0.2 or 0.5 from mid-grey


def test_a_sum_that_wraps_is_the_sum_of_bytes_and_mostly_darkens():
    trigger = TrojanPatch(join="wrap").trigger((3, 32, 32), 10)
    on = (trigger.opacity == 1).expand(1, 3, 32, 32)
    for level in (0, 60, 128, 255):
        x = grey(level=level)
        pattern = (trigger.pattern[None] * 255).double()
        expected = (level + pattern).floor() % 256
        assert torch.equal((trigger(x) * 255).round().double()[on], expected[on])
        stamped = trigger.stamp(torch.full((1, 3, 32, 32), level, dtype=torch.uint8))
        assert torch.equal(stamped[on].double(), expected[on]) and (stamped[~on] == level).all()
    assert (trigger(grey())[on] < 128 / 255).all()  # a bright patch, and the image is darker


def test_presets_differ_where_the_released_code_does():
    paper, official = TrojanPatch.paper(3), TrojanPatch.official(3)
    assert paper.target == official.target == 3 and paper.rate == official.rate == 0.1
    a, b = paper.trigger((3, 32, 32), 10), official.trigger((3, 32, 32), 10)
    assert int(a.opacity.sum()) > 90 and int(b.opacity.sum()) == 9 and type(a) is not type(b)
    assert float(b.pattern.max()) * 255 <= 250.4 and len(b.pattern.unique()) > 20
    paper, official = TrojanNN.paper(3), TrojanNN.official(3)
    assert paper.target == official.target == TrojanNN.small(3).target == 3
    assert (paper.neurons, paper.epsilon, paper.step, paper.steps, paper.rate) == (2, 0.3, 0.1, 1000, 0.1)
    assert (paper.select, paper.join, paper.raw, paper.goal) == ("all", "overwrite", False, None)
    assert (official.select, official.join, official.raw, official.goal) == ("random", "wrap", True, 100)
    for preset in (TrojanPatch.official(), TrojanNN.official()):
        names = {"TrojanPatch": TrojanPatch, "TrojanNN": TrojanNN, "Region": Region}
        assert eval(repr(preset), names) == preset  # noqa: S307 (our own repr, the store's key)
        assert all(f"{f.name}:" in inspect.getdoc(type(preset)) for f in fields(preset))


# ---- the static patch as an attack


@static
def test_poisoning_marks_exactly_the_indices_and_the_seed_decides(attack):
    before = DATA.images.clone()
    p, q, r = attack.poison(DATA, seed=0), attack.poison(DATA, seed=0), attack.poison(DATA, seed=1)
    assert torch.equal(DATA.images, before) and len(p.indices) == 20
    chosen = torch.zeros(100, dtype=torch.bool)
    chosen[p.indices] = True
    assert torch.equal(p.data.images[~chosen], DATA.images[~chosen])
    assert torch.equal(p.data.labels[~chosen], DATA.labels[~chosen])
    assert (
        torch.equal(p.data.images[chosen], p.trigger.stamp(DATA.images[chosen])) and (p.data.labels[chosen] == T).all()
    )
    assert torch.equal(p.data.images, q.data.images) and not torch.equal(p.indices, r.indices)
    assert toys.same(p.trigger.state_dict(), r.trigger.state_dict())  # the patch belongs to the attack
    other = replace(attack, pattern_seed=1).trigger(DATA.shape, 4)
    assert not toys.same(p.trigger.state_dict(), other.state_dict())
    other.load_state_dict(p.trigger.state_dict())
    assert torch.equal(other(DATA.floats), p.trigger(DATA.floats))


def test_the_static_patch_is_learnt():
    attack, test, net = replace(STATIC[0], region=MIDDLE), toys.squares(200, seed=9), toys.tiny()
    poisoned = attack.poison(toys.squares(384))
    fit(net, poisoned.data, replace(toys.QUICK, epochs=10))
    before, after = (evaluate(n, test, poisoned.trigger) for n in (toys.trained(), net))
    assert before.asr < 0.5 and after.asr > 0.9 and after.acc > 0.95, (before, after)


# ---- the optimised patch


def test_the_neurons_with_the_largest_weights_are_picked():
    weight = torch.tensor([[1.0, -9, 0, 3, 0], [1, 0, 0, 3, 4], [1, 0, 2, -3, 0]])  # sums 3, 9, 2, 9.0, 4
    assert TrojanNN().pick(weight).sort().values.tolist() == [1, 3]
    assert TrojanNN(neurons=1, target=1, select="target").pick(weight).tolist() == [4]
    assert TrojanNN(neurons=2, target=0, select="target").pick(weight).tolist() == [3, 0]  # -9 works against the target
    deaf = torch.tensor([True, False, True, True, True])
    assert TrojanNN().pick(weight, deaf).tolist() == [3, 4]
    assert len({tuple(TrojanNN.official().pick(weight, seed=s).tolist()) for s in range(9)}) > 3  # chance
    with pytest.raises(ValueError, match="neurons must be at most 5, those that respond to the patch, got 6"):
        TrojanNN(neurons=6).pick(weight)


def test_the_patch_drives_its_neurons():
    """The smoothed activation climbs to its plateau, far above that of a white patch; the support stays."""
    net = frozen(textured(), CPU)
    chosen, goal, start = QUICK.prepare(net, DATA)
    pattern, trace = QUICK.drive(net, chosen, goal, start)
    total = trace.sum(1)
    smooth = total.unfold(0, 5, 1).mean(1)
    assert float((smooth[:-1] - smooth[1:]).max()) < 0.05 * float(smooth.max())  # never falls, but for the last wobble
    mask = MIDDLE.mask(12, 12)
    white = read(net, mask.expand(1, 3, 12, 12))[1][0, chosen].sum()
    reached = read(net, pattern[None])[1][0, chosen]
    assert reached.sum() > 1.1 * white
    within = trace[2] + torch.tensor([0.2, -0.2])  # a goal that the search steps over and cannot meet
    near, steps = replace(QUICK, steps=12).drive(net, chosen, within, start)
    loss = (steps - within).square().sum(1)
    off = (read(net, near[None])[1][0, chosen] - within).square().sum()
    assert float(off) == pytest.approx(float(loss.min()), rel=1e-3) and off < 0.8 * loss[-1]  # the best is kept
    assert torch.equal(pattern * mask, pattern) and (pattern[mask.expand(3, -1, -1) > 0] >= 0.7 - 1e-6).all()
    clean = torch.quantile(read(net, DATA.floats)[1][:, chosen], 0.999, dim=0)
    assert torch.allclose(goal, 10 * clean)


def test_a_neuron_that_the_patch_cannot_reach_is_left_alone():
    """The toy's neurons see one quadrant each: a patch in one corner leaves the others at 0, without a slope."""
    net = frozen(toys.trained(), CPU)
    corner = replace(QUICK, region=Region("square", 14, (24, 24)))
    white = read(net, corner.region.mask(12, 12).expand(1, 3, 12, 12))[1][0]
    chosen, _, start = corner.prepare(net, DATA)
    assert (chosen % 4 == 3).all() and (read(net, start[None])[1][0, chosen] > 0).all()  # the lower right of each map
    plain = replace(corner, starts=1).prepare(net, DATA)
    assert not torch.equal(plain[0], chosen) and (white[plain[0]] == 0).any()
    assert torch.equal(plain[2], corner.region.mask(12, 12).expand(3, -1, -1))


def test_poisoning_with_a_model_leaves_the_model_and_the_random_state_as_they_were():
    net, host = textured(), toys.trained()
    host.train()  # its BatchNorm would take in what it sees
    before, noise = toys.state(host), torch.get_rng_state()
    replace(QUICK, steps=2).poison(DATA, model=host)
    assert toys.unchanged(before, host)
    before, noise = toys.state(net), torch.get_rng_state()
    a, b, c = (QUICK.poison(DATA, seed=s, model=net) for s in (0, 0, 1))
    assert toys.unchanged(before, net) and torch.equal(torch.get_rng_state(), noise)
    assert toys.same(a.trigger.state_dict(), b.trigger.state_dict()) and torch.equal(a.indices, b.indices)
    assert not torch.equal(a.indices, c.indices)
    fresh = QUICK.trigger(DATA.shape, 4)
    assert not toys.same(fresh.state_dict(), a.trigger.state_dict())  # something was learnt
    fresh.load_state_dict(a.trigger.state_dict())
    assert torch.equal(fresh(DATA.floats), a.trigger(DATA.floats))
    none = replace(QUICK, rate=0, steps=1).poison(DATA, model=net)
    assert torch.equal(none.data.images, DATA.images) and torch.equal(none.data.labels, DATA.labels)


def test_the_optimised_patch_is_learnt():
    data, test, net = toys.squares(384), toys.squares(200, seed=9), toys.tiny()
    poisoned = QUICK.poison(data, model=toys.trained())
    fit(net, poisoned.data, replace(toys.QUICK, epochs=10))
    after = evaluate(net, test, poisoned.trigger)
    assert after.asr > 0.9 and after.acc > 0.95, after


def test_the_released_procedure_runs():
    poisoned = replace(TrojanNN.official(T), region=MIDDLE, steps=5).poison(DATA, model=toys.trained())
    assert isinstance(poisoned.trigger, Wrapped) and len(poisoned.indices) == 10


def test_grey_images_of_28_pixels():
    images = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = replace(DATA[:40], images=images)
    torch.manual_seed(0)
    net = normalized(
        nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 13 * 13, 4)), (0.5,), (0.3,)
    )
    assert replace(QUICK, steps=3).poison(data, model=net).trigger.pattern.shape == (1, 28, 28)


def test_cpu_and_gpu_agree(device):
    net = toys.trained().to(device)
    p, q = (replace(QUICK, steps=3).poison(d, model=net) for d in (DATA, DATA.to(device)))
    assert (
        torch.equal(p.indices, q.indices.cpu()) and q.trigger.pattern.device.type == q.data.images.device.type == device
    )
    for attack in STATIC:
        p, q = attack.poison(DATA), attack.poison(DATA.to(device))
        assert (p.data.images.int() - q.data.images.cpu().int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Region(size=33, centre=(15.5, 15.5)), "size must be above 0 and at most 32 for a patch around"),
        (lambda: Region(size=20), "at most 17 for .* got 20"),
        (lambda: Region("star"), "kind must be disc or square, got 'star'"),
        (lambda: Region("disc", 0.5, (16, 16)).mask(4, 4), "a disc of size 0.5 covers no pixel of a 4x4 image"),
        (lambda: TrojanPatch(rate=2), r"rate must be in \[0, 1\]"),
        (lambda: TrojanPatch(pattern="pink"), "pattern must be saturated or uniform, got 'pink'"),
        (lambda: TrojanPatch(join="mix"), "join must be overwrite or wrap, got 'mix'"),
        (lambda: TrojanPatch(target=4).poison(DATA), r"target must be a class in \[0, 3\], got 4"),
        (lambda: TrojanPatch(rate=0.001).poison(DATA), r"rate 0\.001 selects no image of 100"),
        (lambda: TrojanPatch().trigger((3, 12, 12), 4)(torch.zeros(2, 1, 12, 12)), r"takes float images"),
        (lambda: TrojanNN().poison(DATA), "TrojanNN drives neurons of a cleanly trained network: give model"),
        (lambda: TrojanNN(target=-1).poison(DATA, model=toys.trained()), r"target must be a class in \[0, 3\], got -1"),
        (lambda: TrojanNN(neurons=0), "neurons must be 1 or more, got 0"),
        (lambda: TrojanNN(select="some"), "select must be all, target or random, got 'some'"),
        (lambda: TrojanNN(epsilon=1), r"epsilon must be in \[0, 1\), got 1"),
        (lambda: TrojanNN(step=0), "step must be above 0, got 0"),
        (lambda: TrojanNN(steps=0), "steps must be 1 or more, got 0"),
        (lambda: TrojanNN(starts=0), "starts must be 1 or more, got 0"),
        (lambda: replace(QUICK, neurons=65).poison(DATA, model=toys.trained()), "neurons must be at most .* got 65"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_who_needs_a_model():
    assert TrojanNN.needs_model and TrojanNN().needs_model and not getattr(TrojanPatch(), "needs_model", False)
