"""ACC, ASR, RA and DER with the field's exclusions, on classifiers whose scores are known."""

import math

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from bdlib.attacks import LabelMap, Stamp
from bdlib.metrics import Scores, accuracy, der, evaluate, triggered_images
from bdlib.training import predict


def stamp(target, classes, side=4, channels=1):
    """A white pixel in the lower right corner."""
    pattern, opacity = torch.zeros(channels, side, side), torch.zeros(1, side, side)
    pattern[:, -1, -1] = opacity[:, -1, -1] = 1
    return Stamp(pattern, opacity, LabelMap(target, classes))


@pytest.mark.parametrize(
    ("images", "classes", "of_target", "counted"),
    [(10000, 10, 1000, 9000), (12630, 43, 60, 12570), (10000, 200, 50, 9950)],
    ids=["CIFAR-10", "GTSRB", "Tiny ImageNet"],
)
def test_images_of_the_target_class_do_not_count_for_asr(images, classes, of_target, counted):
    labels = torch.arange(images) % (classes - 1) + 1
    labels[:of_target] = 0
    test = toys.coded(labels, classes, side=2)
    scores = evaluate(toys.Oracle(classes), test, stamp(0, classes, 2), batch=5000)
    assert scores.triggered == counted and scores.acc == 1
    everyone = evaluate(toys.Oracle(classes), test, stamp(None, classes, 2), batch=5000)
    assert everyone.triggered == images  # all-to-all leaves nobody out


def test_a_network_that_always_says_target(device):
    test = toys.coded(torch.arange(40) % 4).to(device)
    s = evaluate(toys.Constant(1).to(device), test, stamp(1, 4))
    assert s == Scores(acc=0.25, asr=1, ra=0, target_acc=1, triggered=30)


def test_a_network_that_is_always_right(device):
    test = toys.coded(torch.arange(40) % 4).to(device)
    assert evaluate(toys.Oracle(), test, stamp(1, 4)) == Scores(acc=1, asr=0, ra=1, target_acc=1, triggered=30)
    assert evaluate(toys.Oracle(), test, stamp(None, 4)) == Scores(acc=1, asr=0, ra=1, target_acc=1, triggered=40)


def test_a_network_that_never_says_target_is_found_out():
    test = toys.coded(torch.arange(40) % 4)
    s = evaluate(toys.Constant(2), test, stamp(1, 4))
    assert s.asr == 0 and s.target_acc == 0 and s.ra == pytest.approx(1 / 3) and s.acc == 0.25


def test_all_to_all_wants_the_next_label():
    class Next(toys.Oracle):
        def forward(self, x):
            said = super().forward(x)
            return torch.where((x[:, 0, -1, -1] == 1)[:, None], said.roll(1, 1), said)

    s = evaluate(Next(), toys.coded(torch.arange(40) % 4), stamp(None, 4))
    assert s == Scores(acc=1, asr=1, ra=0, target_acc=1, triggered=40)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 3), st.integers(0, 99))
def test_scores_are_the_counts_of_the_definition(labels, target, seed):
    if all(y == target for y in labels):
        labels = [*labels, (target + 1) % 4]
    y = torch.tensor(labels)
    g = torch.Generator().manual_seed(seed)

    class Guess(torch.nn.Module):  # a fixed, random answer for each clean label and each triggered one
        clean, fooled = torch.rand(4, 4, generator=g), torch.rand(4, 4, generator=g)

        def forward(self, x):
            label = (x[:, 0, 0, 0] * 255).round().long()
            return torch.where((x[:, 0, -1, -1] == 1)[:, None], self.fooled[label], self.clean[label])

    model = Guess()
    s = evaluate(model, toys.coded(y), stamp(target, 4), batch=7)
    said, bad = model.clean.argmax(1).tolist(), model.fooled.argmax(1).tolist()
    others = [v for v in labels if v != target]
    assert s.acc == pytest.approx(sum(said[v] == v for v in labels) / len(labels))
    assert s.asr == pytest.approx(sum(bad[v] == target for v in others) / len(others))
    assert s.ra == pytest.approx(sum(bad[v] == v for v in others) / len(others))
    assert s.triggered == len(others) and s.asr + s.ra <= 1 + 1e-6
    if target in labels:
        assert s.target_acc == (said[target] == target)
    else:
        assert math.isnan(s.target_acc)
    assert s.asdict()["acc"] == s.acc


def test_triggered_images_are_rounded_as_stored_pictures_are():
    test = toys.squares(20)
    trigger = Stamp(torch.rand(3, 12, 12), torch.full((1, 12, 12), 0.2), LabelMap(0, 4))
    images, labels = triggered_images(test, trigger)
    keep = test.labels != 0
    assert images.dtype == torch.uint8 and torch.equal(labels, test.labels[keep])
    assert torch.equal(images, (trigger(test.images[keep].float() / 255) * 255).round().to(torch.uint8))


def test_scoring_leaves_network_and_images_as_they_were(device):
    net, test = toys.trained().train().to(device), toys.squares(20).to(device)
    before, images = toys.state(net), test.images.clone()
    evaluate(net, test, toys.trigger().to(device))
    assert toys.unchanged(before, net) and torch.equal(test.images, images)


def test_accuracy_is_the_share_of_right_answers_in_evaluation_mode():
    net, test = toys.tiny().train(), toys.squares(50)
    assert accuracy(net, test) == pytest.approx((predict(net, test.images).argmax(1) == test.labels).float().mean())
    assert accuracy(net, test) == accuracy(net.eval(), test)


def test_sets_without_an_answer_are_refused():
    with pytest.raises(ValueError, match="empty image set"):
        accuracy(toys.tiny(), toys.squares(8)[:0])
    with pytest.raises(ValueError, match=r"no test image counts for ASR.*target=1"):
        evaluate(toys.Oracle(), toys.coded(torch.ones(5, dtype=torch.int64)), stamp(1, 4))


# ---- DER


def scores(acc, asr):
    return Scores(acc, asr, 0, acc, 100)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # nothing happened
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # a full repair at no cost
        ((0.9, 1.0), (0.8, 1.0), 0.45),  # accuracy lost for nothing
        ((0.9, 1.0), (0.99, 1.0), 0.5),  # a gain in accuracy is no merit
        ((0.9, 0.2), (0.9, 0.8), 0.5),  # nor is a worse backdoor counted
        ((1.0, 0.0), (0.0, 1.0), 0.0),  # the worst
        ((0.9132, 0.9503), (0.8417, 0.0073), 0.93575),  # BadNets and ANP of the public leaderboard
    ],
)
def test_der(before, after, expected):
    assert der(scores(*before), scores(*after)) == pytest.approx(expected)


share = st.floats(0, 1)


@given(share, share, share, share, share)
def test_der_lies_in_0_1_and_falls_with_accuracy(acc0, asr0, acc1, asr1, lower):
    value = der(scores(acc0, asr0), scores(acc1, asr1))
    assert -1e-9 <= value <= 1 + 1e-9
    assert der(scores(acc0, asr0), scores(acc1 * lower, asr1)) <= value + 1e-9
