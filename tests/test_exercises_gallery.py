"""The checkers of the gallery chapter accept the right answer and name the input on which a wrong one fails."""

import math

import pytest
import torch

from bdlib.exercises import CheckError
from bdlib.exercises.gallery import check_coherent, check_grating, check_wanted


def wave(images, delta, periods, places=None):
    H, W = images.shape[-2:]
    places = torch.arange(H)[:, None] + torch.arange(W) if places is None else places
    return images + delta / 255 * torch.sin(2 * math.pi * periods * places / W)


def relabel(labels, poisoned, mode, target, classes):
    if mode == "clean label":
        return labels.clone()
    new = (labels + 1) % classes if mode == "all-to-all" else torch.full_like(labels, target)
    return torch.where(poisoned, new, labels)


def pairs(differences):
    d = differences.flatten(1)
    inner, own = d @ d.T, d.square().sum(1)
    return float((inner.sum() - own.sum()) / (len(d) * (len(d) - 1)) / own.mean())


def test_right_answers_pass(capsys):
    check_grating(lambda x, delta, periods: wave(x, delta, periods).clamp(0, 1))
    check_wanted(relabel)
    check_coherent(pairs)
    said = capsys.readouterr().out
    assert [line.split(", ")[1] for line in said.splitlines()] == ["7 inputs", "6 inputs", "6 inputs"]


def in_place(labels, poisoned, mode, target, classes):
    if mode != "clean label":
        labels[poisoned] = target if mode == "all-to-one" else (labels[poisoned] + 1) % classes
    return labels


def cosine(differences):
    d = torch.nn.functional.normalize(differences.flatten(1))
    return float((d.sum(0).square().sum() - len(d)) / (len(d) * (len(d) - 1)))


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_grating, wave, "a white 32x32 image"),
        (check_grating, lambda x, d, f: wave(x, 255 * d, f).clamp(0, 1), "delta 40, 6 periods"),
        (check_grating, lambda x, d, f: wave(x, d, f, torch.arange(x.shape[-1])).clamp(0, 1), "delta 40, 6 periods"),
        (
            check_grating,
            lambda x, d, f: wave(x, d, f * x.shape[-1] / x.shape[-2]).clamp(0, 1),
            "20 high and 28 wide",
        ),
        (check_grating, lambda x, d, f: x.copy_(wave(x, d, f).clamp(0, 1)), "changed its argument 1"),
        (check_wanted, lambda y, p, mode, t, k: torch.where(p, torch.full_like(y, t), y), "all-to-all"),
        (check_wanted, lambda y, p, mode, t, k: relabel(y, p, mode, t, k + 1), "12 classes, all-to-all"),
        (check_wanted, lambda y, p, mode, t, k: relabel(y, torch.ones_like(p), mode, t, k), "all-to-one"),
        (check_wanted, in_place, "changed its argument 1"),
        (
            check_wanted,
            lambda y, p, mode, t, k: relabel(y, p, mode.replace("clean label", "all-to-all"), t, k),
            "clean label",
        ),
        (check_coherent, cosine, "three times as strong"),
        (check_coherent, lambda d: float(d.mean(0).square().sum() / d.square().sum((1, 2, 3)).mean()), "of their own"),
        (check_coherent, lambda d: abs(pairs(d)), "its negative"),
        (check_coherent, lambda d: d.flatten(1) @ d.flatten(1).T, "returned a tensor"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)
