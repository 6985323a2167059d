"""The checkers of the RNP chapter accept the right answer and name the input on which a wrong one fails."""

import pytest

from bdlib.exercises import CheckError
from bdlib.exercises.rnp import check_ascent_step, check_recover_step


def test_right_answers_pass(capsys):
    check_ascent_step(lambda t, g, lr, decay: t + lr * g - lr * decay * t)
    check_recover_step(lambda m, g, lr, alpha: (m - alpha * lr * g).clamp(0, 1))
    assert capsys.readouterr().out.count("passed, 5 inputs") == 2


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_ascent_step, lambda t, g, lr, decay: t - lr * (g + decay * t), "uphill"),
        (check_ascent_step, lambda t, g, lr, decay: t + lr * (g + decay * t), "the weights shrink"),
        (check_ascent_step, lambda t, g, lr, decay: t + lr * g, "the weights shrink"),
        (check_ascent_step, lambda t, g, lr, decay: t.add_(lr * (g - decay * t)), "changed its argument 1"),
        (check_recover_step, lambda m, g, lr, alpha: (m + lr * alpha * g).clamp(0, 1), "alpha 1"),
        (check_recover_step, lambda m, g, lr, alpha: (m - lr * g).clamp(0, 1), "a fifth of the way"),
        (check_recover_step, lambda m, g, lr, alpha: m - lr * alpha * g, "must stay at 1"),
        (check_recover_step, lambda m, g, lr, alpha: (m - lr * alpha * g).clamp(max=1), "must stop at 0"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)
