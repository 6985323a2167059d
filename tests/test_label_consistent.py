"""CL: the perturbation stays in its ball and raises the robust network's loss; the stamp is the released one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toys

from bdlib.attacks.label_consistent import CL, Adversarial, pgd
from bdlib.data.imageset import ImageSet
from bdlib.metrics import evaluate
from bdlib.training import fit, predict

T = toys.TARGET
QUICK = CL(T, 0.4, iterations=10, width=8, robust_epochs=1, robust_steps=1)
DATA = toys.squares(100)


def loss(net, images, labels):
    return float(F.cross_entropy(predict(net, images), labels))


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.5)])
def test_pgd_climbs_the_loss_inside_its_ball(norm, epsilon):
    net, x, y = toys.trained(), DATA.floats, DATA.labels
    before, state = x.clone(), toys.state(net)
    harder = pgd(net, x, y, epsilon=epsilon, step=epsilon / 4, iterations=8, norm=norm)
    change = (harder - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert float(size.max()) <= epsilon * 1.0001 and float(size.median()) > 0.8 * epsilon
    assert float(harder.min()) >= 0 and float(harder.max()) <= 1 and not harder.requires_grad
    assert loss(net, harder, y) > 2 * loss(net, x, y)
    assert torch.equal(x, before) and toys.unchanged(state, net)
    halves = [
        pgd(net, a, b, epsilon=epsilon, step=epsilon / 4, iterations=8, norm=norm)
        for a, b in zip(x.split(50), y.split(50))
    ]
    assert torch.allclose(torch.cat(halves), harder, atol=1e-4)  # an image never looks at its neighbours


def test_adversarial_training_makes_a_network_that_perturbations_fool_less():
    plain, hardened = toys.tiny(), toys.tiny()
    fit(plain, DATA, replace(toys.QUICK, epochs=5))
    step = Adversarial(hardened, 0.15, 2)
    fit(hardened, DATA, replace(toys.QUICK, epochs=5), step=step)
    accuracy = []
    for net in (plain, hardened):
        harder = pgd(net, DATA.floats, DATA.labels, epsilon=0.15, step=0.05, iterations=8)
        accuracy.append(float((predict(net, harder).argmax(1) == DATA.labels).float().mean()))
    assert accuracy[1] > accuracy[0] + 0.2, accuracy


def test_poisons_are_perturbed_within_epsilon_then_stamped_and_keep_their_labels():
    net, before = toys.trained(), DATA.images.clone()
    state = toys.state(net)
    poisoned = QUICK.poison(DATA, seed=3, model=net)
    i = poisoned.indices
    assert len(i) == 10 and (DATA.labels[i] == T).all() and len(poisoned.cover) == 0
    assert torch.equal(poisoned.data.labels, DATA.labels) and torch.equal(DATA.images, before)
    changed = (poisoned.data.images != DATA.images).flatten(1).any(1)
    assert torch.equal(changed.nonzero()[:, 0], i)
    outside = (poisoned.trigger.opacity == 0).expand(3, 12, 12)
    moved = (poisoned.data.images[i].int() - DATA.images[i].int())[:, outside].abs()
    assert int(moved.max()) == 8 and float((moved > 0).float().mean()) > 0.5  # the bound is reached, and nowhere passed
    stamp = poisoned.trigger.stamp(poisoned.data.images[i])
    assert torch.equal(stamp, poisoned.data.images[i])  # the stamp came last
    harder = QUICK.perturb(net, DATA.images[i], DATA.labels[i])
    assert loss(net, harder, DATA.labels[i]) > 2 * loss(net, DATA.images[i], DATA.labels[i])
    assert toys.unchanged(state, net)


def test_the_seed_decides_and_nothing_else():
    a, b = QUICK.poison(DATA, seed=1), QUICK.poison(DATA, seed=1)
    noise = torch.get_rng_state()
    c = QUICK.poison(DATA, seed=2)
    assert torch.equal(torch.get_rng_state(), noise)
    assert torch.equal(a.data.images, b.data.images) and torch.equal(a.indices, b.indices)
    assert not torch.equal(a.indices, c.indices)
    assert toys.same(a.trigger.state_dict(), c.trigger.state_dict())


def test_in_use_there_is_the_stamp_and_no_perturbation():
    x = torch.full((2, 3, 32, 32), 0.5)
    stamped = CL().trigger((3, 32, 32), 10)(x)
    marks = stamped[0, 0]
    left = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1]])
    for rows in (slice(0, 3), slice(29, 32)):
        assert torch.equal(marks[rows, :3], left) and torch.equal(marks[rows, 29:], left.flip(1))
    assert int((stamped[0] != 0.5).any(0).sum()) == 36 and torch.equal(stamped[0, 1], marks)
    assert torch.equal(stamped.flip(3), stamped) and not torch.equal(stamped.flip(2), stamped)
    badnets = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    one = CL.official().trigger((3, 32, 32), 10)(x)[0, 0]
    assert torch.equal(one[29:, 29:], badnets) and int((one != 0.5).sum()) == 9


def test_a_reduced_amplitude_is_added():
    x = torch.full((1, 1, 28, 28), 0.5)
    change = CL(amplitude=32).trigger((1, 28, 28), 10)(x) - x
    assert torch.allclose(change[0, 0, :3, :3] * 255, torch.tensor([[32.0, -32, -32], [-32, 32, -32], [32, -32, 32]]))
    assert int((change.abs() > 1e-6).sum()) == 36
    faint = replace(CL(), amplitude=0).trigger((1, 28, 28), 10)
    assert torch.equal(faint(x), x)


def test_the_pattern_grows_with_the_image():
    stamped = CL().trigger((3, 64, 64), 10)(torch.full((1, 3, 64, 64), 0.5))[0, 0]
    small = CL().trigger((3, 32, 32), 10)(torch.full((1, 3, 32, 32), 0.5))[0, 0]
    assert torch.equal(stamped[::2, ::2], small) and torch.equal(stamped[1::2, 1::2], small)


def test_paper_and_official_differ_as_the_sources_do():
    paper, official = CL.paper(3), CL.official(3)
    assert (paper.target, paper.norm, paper.epsilon, paper.corners, paper.class_rate) == (3, "linf", 8, "all", 0.5)
    assert official == CL(3, 1.0, 300, 7.5, norm="l2", corners="bottom-right", whole_class=True)
    data = toys.squares(40)
    quick = replace(official, iterations=10, epsilon=200, step=40)
    poisoned = quick.poison(data, model=toys.trained())
    assert len(poisoned.indices) == 10  # all of the class
    net, own = toys.trained(), data.labels == 3
    moved = quick.perturb(net, data.images[own], data.labels[own]).float() - data.images[own].float()
    length = moved.flatten(1).norm(dim=1)
    assert float(length.max()) < 203 and float(moved.abs().max()) > 20  # rounding adds up to half a level a pixel


def test_the_stamp_is_learnt_from_images_that_tell_the_truth():
    data, test = toys.squares(384), toys.squares(200, seed=9)
    attack = CL(T, 0.9, epsilon=32, step=8, iterations=5, size=4)  # large enough to hide part of a square
    poisoned, net = attack.poison(data, model=toys.trained()), toys.tiny()
    before = evaluate(toys.trained(), test, poisoned.trigger)
    fit(net, poisoned.data, replace(toys.QUICK, epochs=10))
    after = evaluate(net, test, poisoned.trigger)
    assert before.asr < 0.1 and after.asr > 0.9 and after.acc > 0.95, (before, after)


def test_rate_0_trains_nothing_and_changes_nothing():
    poisoned = CL(T, 0).poison(DATA)
    assert torch.equal(poisoned.data.images, DATA.images) and len(poisoned.indices) == 0


def test_the_robust_network_is_trained_on_any_size(device):
    for shape in ((1, 28, 28), (3, 64, 64)):
        images = torch.randint(0, 256, (12, *shape), dtype=torch.uint8)
        data = ImageSet(images, torch.arange(12) % 2, ("a", "b"), "noise").to(device)
        p = replace(QUICK, target=0, robust_epochs=1, iterations=1).poison(data)
        assert p.data.images.shape == images.shape and p.data.images.device.type == device and len(p.indices) == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CL(class_rate=1.0), "class_rate 1 leaves no clean image of the target class.*whole_class=True"),
        (lambda: CL(class_rate=-0.5), r"class_rate must be in \[0, 1\]"),
        (lambda: CL(epsilon=300), r"epsilon must be in \[0, 255\] grey levels.*got 300"),
        (lambda: CL(norm="l1"), "norm must be linf or l2, got 'l1'"),
        (lambda: CL(corners="top"), "corners must be all or bottom-right, got 'top'"),
        (lambda: CL(amplitude=-1), r"amplitude must be None or in \[0, 255\]"),
        (lambda: CL(width=4), "width must be a multiple of 8 channels, got 4"),
        (
            lambda: CL(size=5, offset=2).poison(DATA),
            "patterns of 5 pixels, 2 from the border, do not fit a 12x12 image",
        ),
        (lambda: replace(QUICK, class_rate=0.001).poison(DATA), "class_rate 0.001 selects none of the 25 images"),
        (lambda: CL(target=7).poison(DATA), r"target must be a class in \[0, 3\], got 7"),
        (lambda: CL().trigger((3, 32, 32), 4)(torch.zeros(2, 1, 32, 32)), r"takes float images \(N, 3, 32, 32\)"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
