"""The checker of the baselines chapter accepts the right answer and names the input on which a wrong one fails."""

import pytest
import torch

from bdlib.exercises import CheckError
from bdlib.exercises.baselines import check_fixed_point


def fixed_point(hessian, pull, steps, s):
    v = 0 * pull
    for _ in range(steps):
        v = v + pull - s * (hessian @ v)
    return v


def test_the_right_answer_passes(capsys):
    check_fixed_point(fixed_point)
    assert capsys.readouterr().out.count("passed, ") == 1


def test_the_checker_agrees_with_the_library():
    from bdlib.defenses.ibau import hypergradient

    def by_library(hessian, pull, steps, s):
        # inner = d H d / 2 - d p makes the mixed derivative -1, so the gradient for p is s v
        p = torch.zeros_like(pull, requires_grad=True)
        (g,) = hypergradient(
            lambda d: d @ hessian @ d / 2 - d @ p, lambda d: d @ pull, 0 * pull, [p], steps=steps, lr=s
        )
        return g / s

    check_fixed_point(by_library)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda a, p, k, s: fixed_point(a, p, k + 1, s), "no step: v is zero"),
        (lambda a, p, k, s: s * fixed_point(a, p, k, s), "one step: v is the pull"),
        (lambda a, p, k, s: fixed_point(-a, p, k, s), "two steps"),
        (lambda a, p, k, s: torch.linalg.solve(a, p) / s if k else 0 * p, "one step"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(wrong, said):
    with pytest.raises(CheckError, match=said):
        check_fixed_point(wrong)
