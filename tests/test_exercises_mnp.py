"""The checkers of the MNP chapter accept the right answer and name the input on which a wrong one fails."""

import pytest
import torch
import torch.nn.functional as F
import toys

from bdlib.defenses.mnp import magnitude
from bdlib.exercises import CheckError
from bdlib.exercises.mnp import check_folded, check_paying_step


def folded(weight, gamma, var, eps):
    return (gamma / (var + eps).sqrt()).abs() * weight.abs().sum((1, 2, 3))


def norm(weight):
    return weight.abs().sum((1, 2, 3))


def test_right_answers_pass(capsys):
    check_folded(folded)
    check_paying_step(lambda m, g, w, lr, price: (m - lr * g - lr * price * w).clamp(0, 1))
    assert capsys.readouterr().out.count("passed, 7 inputs") == 2


def test_the_checked_size_is_the_library_s():
    net = toys.trained()[1]
    found = magnitude(net, toys.squares(1).floats, "folded")["bn1"]
    bn = net.bn1
    assert torch.allclose(folded(net.conv1.weight, bn.weight, bn.running_var, bn.eps), found, rtol=1e-5)


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_folded, lambda w, g, v, eps: w.abs().mean((1, 2, 3)) * g.abs() / (v + eps).sqrt(), "the plain norm"),
        (check_folded, lambda w, g, v, eps: g.abs() / (v + eps).sqrt() * w.sum((1, 2, 3)), "random filters, gamma 1"),
        (check_folded, lambda w, g, v, eps: g.abs() / (v + eps).sqrt() * w.flatten(1).norm(dim=1), "the plain norm"),
        (check_folded, lambda w, g, v, eps: norm(w) * g.abs(), "half the norm"),
        (check_folded, lambda w, g, v, eps: norm(w) * g.abs() / (v + eps), "half the norm"),
        (check_folded, lambda w, g, v, eps: norm(w) * g / (v + eps).sqrt(), "a negative gamma"),
        (check_folded, lambda w, g, v, eps: norm(w) * g.abs() / (v.sqrt() + eps), "under the root"),
        (check_folded, lambda w, g, v, eps: w.abs_().sum((1, 2, 3)) * g.abs() / (v + eps).sqrt(), "its argument 1"),
        (check_paying_step, lambda m, g, w, lr, p: (m + lr * (g + p * w)).clamp(0, 1), "plain descent"),
        (check_paying_step, lambda m, g, w, lr, p: (m - lr * g).clamp(0, 1), "the larger pays more"),
        (check_paying_step, lambda m, g, w, lr, p: (m - lr * (g + p)).clamp(0, 1), "the larger pays more"),
        (check_paying_step, lambda m, g, w, lr, p: (m - lr * g - p * w).clamp(0, 1), "the larger pays more"),
        (check_paying_step, lambda m, g, w, lr, p: (m - lr * (g + p * w * 2 * m)).clamp(0, 1), "depend on the mask"),
        (check_paying_step, lambda m, g, w, lr, p: F.relu(m - lr * (g + p * w)), "stays at 1"),
        (check_paying_step, lambda m, g, w, lr, p: (m - lr * (g + p * w)).clamp(max=1), "must stop at 0"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)
