"""The checkers of the comparison chapter accept the right answer and name the input on which a wrong one fails."""

import pytest
import torch

from bdlib.exercises import CheckError
from bdlib.exercises.comparison import check_rating, check_regret, check_settled
from bdlib.metrics import Scores, der


def rating(acc0, asr0, acc1, asr1):
    return 0.5 + (max(asr0 - asr1, 0) - max(acc0 - acc1, 0)) / 2


def regret(curve, chosen, asr):
    points = [(-1.0, 0.0, asr), *curve]
    loss = next(drop + left for t, drop, left in points if t == chosen)
    return loss - min(drop + left for _, drop, left in points)


def settled(a, b):
    d = a - b
    sure = d.mean().abs() > d.std()
    return int(sure and (d > 0).all()) - int(sure and (d < 0).all())


def test_right_answers_pass(capsys):
    check_rating(rating)
    check_regret(regret)
    check_settled(settled)
    assert capsys.readouterr().out.count("passed, ") == 3


def test_the_checked_rating_is_the_library_s():
    check_rating(lambda a0, s0, a1, s1: der(Scores(a0, s0, 0, 0, 1), Scores(a1, s1, 0, 0, 1)))


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_rating, lambda a0, s0, a1, s1: (s0 - s1 - max(0, a0 - a1) + 1) / 2, "raises the ASR"),
        (check_rating, lambda a0, s0, a1, s1: (max(0, s0 - s1) - (a0 - a1) + 1) / 2, "raises the ACC"),
        (check_rating, lambda a0, s0, a1, s1: (max(0, s0 - s1) + max(0, a0 - a1) + 1) / 2, "ten points of ACC"),
        (check_rating, lambda a0, s0, a1, s1: max(0, s0 - s1) - max(0, a0 - a1), "does nothing"),
        (check_rating, lambda a0, s0, a1, s1: rating(s0, a0, s1, a1), "a full repair at no cost"),
        (check_regret, lambda c, t, s: regret([(x, 0, left) for x, _, left in c], t, s), "the best threshold"),
        (check_regret, lambda c, t, s: regret(c, t, 1e9), "no pruning"),
        (check_regret, lambda c, t, s: next(d + a for x, d, a in c if x == t) - min(d + a for _, d, a in c), "as -1"),
        (check_regret, lambda c, t, s: regret(sorted(c), t, s) if c[0] < c[-1] else 0, "falling order"),
        (check_regret, lambda c, t, s: regret([(x, max(0, d), a) for x, d, a in c], t, s), "a drop below zero"),
        (check_settled, lambda a, b: settled(b, a), "10, 11, 12 against"),
        (check_settled, lambda a, b: abs(settled(a, b)), "1, 2, 3 against"),
        (check_settled, lambda a, b: int((a > b).all()) - int((a < b).all()), "makes the whole difference"),
        (check_settled, lambda a, b: int(a.mean() > b.mean()) - int(a.mean() < b.mean()), "disagree about the sign"),
        (
            check_settled,
            lambda a, b: settled(a, b) if (a.mean() - b.mean()).abs() > a.std() else 0,
            "victims far apart",
        ),
        (
            check_settled,
            lambda a, b: (1 if (a > b).all() else 0) if (a - b).mean() > (a - b).std(correction=0) else settled(a, b),
            "n - 1",
        ),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)


def test_ties_are_not_settled():
    assert settled(torch.ones(3), torch.ones(3)) == 0
