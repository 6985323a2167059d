"""The checkers of the NAD chapter accept the right answer and name the input on which a wrong one fails."""

import pytest
import torch.nn.functional as F

from bdlib.exercises import CheckError
from bdlib.exercises.nad import check_pooled_loss, check_rescale


def size_of(s, t):
    return [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]


def unit(energy):
    flat = energy.flatten(1)
    return flat / (flat.norm(dim=1, keepdim=True) + 1e-6)


def energy(f):
    return f.square().sum(1)


def right(s, t):
    return F.mse_loss(*(unit(F.adaptive_avg_pool2d(energy(f), size_of(s, t))) for f in (s, t)))


def without_pooling(s, t):
    return (unit(energy(s)) - unit(energy(t))).square().mean()


def pooled_to_the_teacher(s, t):
    return F.mse_loss(*(unit(F.adaptive_avg_pool2d(energy(f), t.shape[2:])) for f in (s, t)))


def features_pooled(s, t):
    return F.mse_loss(*(unit(energy(F.adaptive_avg_pool2d(f, size_of(s, t)))) for f in (s, t)))


def pooled_after_the_norm(s, t):
    def pooled(f):
        whole = unit(energy(f)).view(len(f), *f.shape[2:])
        return F.adaptive_avg_pool2d(whole, size_of(s, t)).flatten(1)

    return F.mse_loss(pooled(s), pooled(t))


def without_norm(s, t):
    return F.mse_loss(*(F.adaptive_avg_pool2d(energy(f), size_of(s, t)) for f in (s, t)))


def signed(s, t):
    return F.mse_loss(*(unit(F.adaptive_avg_pool2d(f.sum(1), size_of(s, t))) for f in (s, t)))


def summed(s, t):
    a, b = (unit(F.adaptive_avg_pool2d(energy(f), size_of(s, t))) for f in (s, t))
    return (a - b).square().sum(1).mean()


def test_right_answers_pass(capsys):
    check_rescale(lambda beta, settled, size: beta * size[0] / settled[0] * size[1] / settled[1])
    check_pooled_loss(right)
    said = capsys.readouterr().out
    assert "check_rescale: passed, 5 inputs" in said and "check_pooled_loss: passed, 8 inputs" in said


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_rescale, lambda beta, settled, size: beta, "now 64x64"),
        (check_rescale, lambda beta, settled, size: beta * size[0] / settled[0], "now 64x64"),
        (check_rescale, lambda beta, settled, size: beta * settled[0] * settled[1] / size[0] / size[1], "now 64x64"),
        (check_rescale, lambda beta, settled, size: beta * size[0] ** 2 / settled[0] ** 2, "4x12"),
        (check_pooled_loss, without_pooling, "a teacher twice as high and wide"),
        (check_pooled_loss, pooled_to_the_teacher, "a teacher twice as high and wide"),
        (check_pooled_loss, features_pooled, "a teacher twice as high and wide"),
        (check_pooled_loss, pooled_after_the_norm, "a teacher twice as high and wide"),
        (check_pooled_loss, without_norm, "disjoint|times -7"),
        (check_pooled_loss, signed, "times -7"),
        (check_pooled_loss, summed, "disjoint 2x2 maps"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)
