"""The checkers of the NPD chapter accept the right answer and name the input on which a wrong one fails."""

import pytest
import torch

from bdlib.exercises import CheckError
from bdlib.exercises.npd import check_inner_step, check_pick_target


def masked(z, y, value):
    return z.scatter(1, y[:, None], value).argmax(1)


def ball(moved, bound):
    norm = moved.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
    return torch.where(norm > bound, moved * bound / norm, moved)


def test_right_answers_pass(capsys):
    check_pick_target(lambda z, y: masked(z, y, float("-inf")))
    check_inner_step(lambda d, g, size, bound: ball(d - size * g.sign(), bound))
    said = capsys.readouterr().out
    assert "passed, 5 inputs" in said and "passed, 7 inputs" in said


def in_place(z, y):
    z[torch.arange(len(y)), y] = -torch.inf
    return z.argmax(1)


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_pick_target, lambda z, y: z.argmax(1), "the true class is the likeliest"),
        (check_pick_target, lambda z, y: z.topk(2).indices[:, 1], "a misread image"),
        (check_pick_target, lambda z, y: masked(z, y, -10.0), "below -10"),
        (check_pick_target, lambda z, y: z.scatter(1, y[:, None], -torch.inf), "has shape"),
        (check_pick_target, in_place, "changed its argument 1"),
        (check_inner_step, lambda d, g, size, bound: ball(d + size * g.sign(), bound), "against the gradient"),
        (check_inner_step, lambda d, g, size, bound: ball(d - size * g, bound), "against the gradient"),
        (check_inner_step, lambda d, g, size, bound: d - size * g.sign(), "back to its surface"),
        (check_inner_step, lambda d, g, size, bound: (d - size * g.sign()).clamp(-bound, bound), "back to its surface"),
        (
            check_inner_step,
            lambda d, g, size, bound: (
                bound * torch.nn.functional.normalize((d - size * g.sign()).flatten(1)).view_as(d)
            ),
            "against the gradient",
        ),
        (
            check_inner_step,
            lambda d, g, size, bound: (
                (d - size * g.sign()) * min(1, bound / max(1e-12, float((d - size * g.sign()).norm())))
            ),
            "back to its surface",
        ),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)
