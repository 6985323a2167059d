"""The checkers of the results chapter accept the right answer and name the input on which a wrong one fails."""

from itertools import permutations

import numpy as np
import pytest
import torch

from bdlib.exercises import CheckError
from bdlib.exercises.results import check_exact, check_front, check_leak, check_together


def front(costs, worse=torch.Tensor.__le__, better=torch.Tensor.__lt__):
    beaten = worse(costs[:, None], costs[None]).all(2) & better(costs[:, None], costs[None]).any(2)
    return (~beaten.any(0)).nonzero()[:, 0].tolist()


def sweep(costs):  # right for two columns without ties alone
    order, best, out = costs[:, 0].argsort(stable=True).tolist(), float("inf"), []
    for i in order:
        if costs[i, 1] < best:
            out.append(i)
            best = costs[i, 1]
    return sorted(out)


def correlation(a, b, ranked=True):
    if ranked:
        a, b = (np.argsort(np.argsort(v)) for v in (a, b))
    return np.corrcoef(a, b)[0, 1]


def exact(a, b, distance=abs, ranked=True, margin=-1e-9):
    bound = distance(correlation(a, b, ranked)) + margin
    drawn = [distance(correlation(a, order, ranked)) >= bound for order in permutations(b)]
    return sum(drawn) / len(drawn)


def together(acc, asr):
    if not acc or set(acc) != set(asr):
        raise ValueError("not the same seeds")
    return float(np.mean(list(acc.values()))), float(np.mean(list(asr.values())))


def means(acc, asr):
    return sum(acc.values()) / max(len(acc), 1), sum(asr.values()) / max(len(asr), 1)


def refusing(wrong):
    def fn(acc, asr):
        together(acc, asr)
        return wrong(acc, asr)

    return fn


def only_if(refuse):
    def fn(acc, asr):
        if refuse(acc, asr):
            raise ValueError
        return means(acc, asr)

    return fn


def leak(asr, choose=lambda others: others.mean(0).argmin(), honest=True):
    keep = [[i for i in range(len(asr)) if i != s or not honest] for s in range(len(asr))]
    got = [asr[s, choose(asr[keep[s]])] for s in range(len(asr))]
    return float(torch.stack(got).mean() - asr.min(1).values.mean())


def test_right_answers_pass(capsys):
    check_front(front)
    check_exact(exact)
    check_together(together)
    check_leak(leak)
    assert capsys.readouterr().out.count("passed, ") == 4


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_front, sweep, "equal rows"),
        (check_front, lambda c: front(c, worse=torch.Tensor.__lt__), "equal in one column and worse"),
        (check_front, lambda c: front(-c), "one better in both"),
        (check_front, lambda c: front(c[:, :2]), "good in the third alone"),
        (check_front, lambda c: sorted({int(i) for i in c.argmin(0)}), "equal rows"),
        (check_front, lambda c: [int(c.sum(1).argmin())], "a cheap row and a good one"),
        (check_front, lambda c: front(c)[::-1], "a cheap row and a good one"),
        (check_exact, lambda a, b: exact(a, b, distance=float), "the same order of 4"),
        (check_exact, lambda a, b: exact(a, b, ranked=False), "ranks count"),
        (check_exact, lambda a, b: exact(a, b, margin=1e-9), "the same order of 4"),
        (check_exact, lambda a, b: exact(sorted(a), b), "a in no order"),
        (check_exact, lambda a, b: abs(correlation(a, b)), "the same order of 4"),
        (check_together, means, "without one of the seeds"),
        (check_together, only_if(lambda a, b: len(a) != len(b)), "as many seeds, but others"),
        (check_together, only_if(lambda a, b: a.keys() != b.keys()), "no seed at all"),
        (check_together, only_if(lambda a, b: not set(a) <= set(b)), "an ACC without one of the seeds"),
        (check_together, lambda a, b: means(a, {s: b[s] for s in a}), "raised KeyError"),
        (check_together, refusing(lambda a, b: (max(a.values()), min(b.values()))), "three seeds, in value 0"),
        (check_together, refusing(lambda a, b: means(b, a)), "three seeds"),
        (check_together, only_if(lambda a, b: not a or list(a) != list(b)), "in another order"),
        (check_leak, lambda v: leak(v, honest=False), "best on one seed each"),
        (check_leak, lambda v: leak(v, choose=lambda o: o.min(0).values.argmin()), "not their least"),
        (check_leak, lambda v: -leak(v), "best on one seed each"),
        (check_leak, lambda v: float(v.mean(0).min() - v.min(1).values.mean()), "best on one seed each"),
        (check_leak, lambda v: leak(v) + float(v.min(1).values.mean()), "no leak"),
        (check_leak, lambda v: leak(v.T) if v.shape[0] == v.shape[1] else leak(v), "best on one seed each|no leak"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)


def test_an_empty_stub_says_that_it_is_empty():
    def stub(*_):
        raise NotImplementedError

    for check in (check_front, check_exact, check_together, check_leak):
        with pytest.raises(NotImplementedError):
            check(stub)
