"""FC: poisons that keep their looks and their labels, and whose features are those of triggered images."""

from dataclasses import replace

import pytest
import torch
import toys
from torch import nn

from bdlib.attacks.feature_collision import FC, collide
from bdlib.attacks.inside import read
from bdlib.metrics import evaluate

T = toys.TARGET
DATA = toys.squares(100)
FREE = FC(T, 0.4, beta=0.0, size=3, offset=0)


def sources(attack, data, poisoned, seed=0):
    """The triggered images that the poisons were to collide with, drawn as documented."""
    others = (data.labels != attack.target).nonzero()[:, 0]
    drawn = torch.randint(len(others), (len(poisoned.indices),), generator=torch.Generator().manual_seed(seed))
    return poisoned.trigger.stamp(data.images[others[drawn]]).float() / 255


def test_features_collide_and_images_hardly_move():
    net, before = toys.trained(), DATA.images.clone()
    state = toys.state(net)
    attack = replace(FREE, epsilon=96)  # a toy's squares are 150 levels bright
    poisoned = attack.poison(DATA, model=net)
    i = poisoned.indices
    marked, bases = sources(attack, DATA, poisoned), DATA.images[i].float() / 255
    with torch.no_grad():
        goal, start = read(net, marked)[1], read(net, bases)[1]
        end = read(net, poisoned.data.images[i].float() / 255)[1]
    far, near = (start - goal).square().sum(1).mean(), (end - goal).square().sum(1).mean()
    assert far > 5 * near, (far, near)
    moved = (poisoned.data.images[i].int() - DATA.images[i].int()).abs()
    assert 64 < int(moved.max()) <= 96
    assert (
        int((replace(FREE, epsilon=8).poison(DATA, model=net).data.images.int() - DATA.images.int()).abs().max()) == 8
    )
    assert toys.unchanged(state, net) and torch.equal(DATA.images, before)


def test_beta_keeps_a_poison_close_to_its_base():
    """On the identity as features the answer is known: the minimum of |x - g|^2 / n + beta / 2 |x - b|^2."""
    g = torch.Generator().manual_seed(0)
    bases, goals = (torch.rand(5, 1, 4, 4, generator=g) for _ in range(2))
    for beta in (0.0, 0.1, 1.0):
        x = collide(lambda x: x.flatten(1), bases, goals.flatten(1), epsilon=1.0, beta=beta, iterations=200)
        pull = 2 / 16
        expected = (pull * goals + beta * bases) / (pull + beta)
        assert torch.allclose(x, expected, atol=1e-3), beta
    halves = [
        collide(lambda x: x.flatten(1), b, a.flatten(1), epsilon=0.1, beta=0.1, iterations=9)
        for a, b in zip(goals.split(3), bases.split(3))
    ]
    whole = collide(lambda x: x.flatten(1), bases, goals.flatten(1), epsilon=0.1, beta=0.1, iterations=9)
    assert torch.allclose(torch.cat(halves), whole, atol=1e-6)  # each has a step length of its own
    assert float((whole - bases).abs().max()) <= 0.1001


def test_only_images_of_the_target_class_change_and_no_label_does():
    poisoned = FREE.poison(DATA, seed=3, model=toys.trained())
    assert len(poisoned.indices) == 10 and (DATA.labels[poisoned.indices] == T).all() and len(poisoned.cover) == 0
    assert torch.equal(poisoned.data.labels, DATA.labels)
    changed = (poisoned.data.images != DATA.images).flatten(1).any(1)
    assert torch.equal(changed.nonzero()[:, 0], poisoned.indices)
    again, other = (FREE.poison(DATA, seed=s, model=toys.trained()) for s in (3, 4))
    assert torch.equal(again.data.images, poisoned.data.images) and not torch.equal(other.indices, poisoned.indices)
    assert toys.same(other.trigger.state_dict(), poisoned.trigger.state_dict())


def test_a_collision_turns_a_last_layer_that_is_learnt_anew():
    """The transfer setting, where feature collision belongs: the features stay, the linear layer is trained again."""
    data, test, clean = toys.squares(384), toys.squares(200, seed=9), toys.trained()
    attack = replace(FREE, class_rate=0.8, epsilon=128)
    scores = []
    for images in (data, attack.poison(data, model=clean).data):
        with torch.no_grad():
            phi = read(clean, images.floats)[1]
        layer = nn.Linear(phi.shape[1], 4)
        nn.init.zeros_(layer.weight)
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(phi), images.labels).backward()
            optimiser.step()
        net = toys.trained()
        net[1].linear = layer
        scores.append(evaluate(net, test, attack.trigger((3, 12, 12), 4)))
    assert scores[1].asr > scores[0].asr + 0.3 and scores[1].acc > 0.8, scores


def test_a_watermark_shows_and_the_bound_counts_from_there():
    net = toys.trained()
    attack = replace(FREE, watermark=0.3, epsilon=8)
    poisoned = attack.poison(DATA, model=net)
    i = poisoned.indices
    mixed = 0.7 * DATA.images[i].float() + 0.3 * 255 * sources(attack, DATA, poisoned)
    moved = (poisoned.data.images[i].float() - mixed).abs()
    assert 7 < float(moved.max()) <= 8.51  # and the rounding
    assert float((mixed - DATA.images[i].float()).abs().max()) > 16


def test_paper_is_the_reconstruction_and_official_has_the_settings_of_poison_frogs():
    paper, official = FC.paper(2), FC.official(2)
    assert (paper.target, paper.epsilon, paper.watermark, paper.class_rate) == (2, 16, 0, 0.1)
    assert (official.target, official.epsilon, official.watermark, official.beta, official.iterations) == (
        2, 8, 0.3, 0.1, 120,
    )  # fmt: skip
    assert "reconstruction" in FC.__doc__


def test_the_trigger_is_the_patch_and_its_state(device):
    for shape in ((1, 28, 28), (3, 32, 32), (3, 64, 64)):
        one, other = (FC(2).trigger(shape, 4).to(device) for _ in range(2))
        for t in other.state_dict().values():
            t.zero_()
        other.load_state_dict(one.state_dict())
        x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        assert torch.equal(one(x), other(x)) and one.mapping == other.mapping and one.mapping.target == 2
        side = round(3 * shape[1] / 32)
        assert (one(x) != x).any(1).sum((1, 2)).tolist() == [side**2] * 4


def test_rate_0_changes_nothing():
    poisoned = FC(T, 0).poison(DATA, model=toys.trained())
    assert torch.equal(poisoned.data.images, DATA.images) and len(poisoned.indices) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FC(T).poison(DATA), "FC needs a cleanly trained network"),
        (lambda: FREE.poison(DATA, model=nn.Flatten()), "Flatten has no linear layer"),
        (lambda: FC(class_rate=1.0), "class_rate 1 leaves no clean image of the target class"),
        (lambda: FC(epsilon=300), r"epsilon must be in \[0, 255\] grey levels, got 300"),
        (lambda: FC(watermark=1.0), r"watermark must be in \[0, 1\), got 1"),
        (lambda: FC(beta=-1), "beta must be 0 or more, got -1"),
        (lambda: FC(size=13).poison(DATA, model=toys.trained()), "does not fit a 12x12 image"),
        (lambda: FC(T, 0.001).poison(DATA, model=toys.trained()), "class_rate 0.001 selects none of the 25 images"),
        (lambda: FC(7).poison(DATA, model=toys.trained()), r"target must be a class in \[0, 3\], got 7"),
        (lambda: FREE.poison(DATA[DATA.labels == T], model=toys.trained()), "every image is of the target class 1"),
    ],
)
def test_a_bad_value_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
