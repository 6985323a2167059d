"""The checkers of "Inside a backdoored network" accept the right answer and name the input where a wrong one fails."""

import pytest
import torch

from bdlib.exercises import CheckError
from bdlib.exercises.inside import check_centroids, check_gradcam, check_hide


def gradcam(maps, grads):
    return torch.relu(torch.einsum("nc,nchw->nhw", grads.mean((2, 3)), maps))


def shares(clean, triggered, a, b):
    def nearer(x, one, other):
        return (torch.cdist(x, one[None]) < torch.cdist(x, other[None])).float().mean()

    return float(nearer(clean, a, b) + nearer(triggered, b, a)) / 2


def told(clean, triggered):
    return shares(clean[1::2], triggered[1::2], clean[::2].mean(0), triggered[::2].mean(0))


def pooled(clean, triggered):
    a, b = clean[::2].mean(0), triggered[::2].mean(0)
    right = [(x - own).norm(dim=1) < (x - other).norm(dim=1)
             for x, own, other in ((clean[1::2], a, b), (triggered[1::2], b, a))]  # fmt: skip
    return float(torch.cat(right).float().mean())


def lenient(clean, triggered):
    a, b = clean[::2].mean(0), triggered[::2].mean(0)
    right = [((x - own).norm(dim=1) <= (x - other).norm(dim=1)).float().mean()
             for x, own, other in ((clean[1::2], a, b), (triggered[1::2], b, a))]  # fmt: skip
    return float(sum(right)) / 2


def in_place(gamma, beta, weight, factor):
    gamma *= factor
    return gamma, beta * factor, weight / factor[:, None, None]


def test_right_answers_pass(capsys):
    check_gradcam(gradcam)
    check_centroids(told)
    check_hide(lambda g, b, w, f: (g * f, b * f, w / f[:, None, None]))
    said = capsys.readouterr().out
    assert said.count("passed, 7 inputs") == 1 and said.count("passed, 6 inputs") == 2


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        (check_gradcam, lambda a, g: torch.relu((g * a).sum(1)), "the same weight"),
        (check_gradcam, lambda a, g: torch.relu((g.sum((2, 3), keepdim=True) * a).sum(1)), "the map itself"),
        (check_gradcam, lambda a, g: torch.relu((g.mean((2, 3), keepdim=True) * a).mean(1)), "not a mean"),
        (check_gradcam, lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1), "nothing is left"),
        (check_gradcam, lambda a, g: torch.relu(g.mean((2, 3), keepdim=True) * a).sum(1), "before the ReLU"),
        (check_gradcam, lambda a, g: gradcam(a, g)[0], "result has shape"),
        (check_centroids, lambda a, b: shares(a, b, a.mean(0), b.mean(0)), "odd rows judged"),
        (check_centroids, lambda a, b: shares(a[::2], b[::2], a[::2].mean(0), b[::2].mean(0)), "odd rows judged"),
        (check_centroids, lenient, "every row is a tie"),
        (check_centroids, pooled, "both count one half"),
        (check_centroids, lambda a, b: 2 * told(a, b), "far apart"),
        (check_hide, lambda g, b, w, f: (g * f, b, w / f[:, None, None]), "not 0"),
        (check_hide, lambda g, b, w, f: (g * f, b * f, w), "every channel halved"),
        (check_hide, lambda g, b, w, f: (g, b, w), "every channel halved"),
        (check_hide, lambda g, b, w, f: (g / f, b / f, w * f[:, None, None]), "every channel halved"),
        (check_hide, lambda g, b, w, f: (g * f, b * f, w / f.mean()), "four different factors, three outputs"),
        (check_hide, in_place, "changed its argument 1"),
    ],
)
def test_a_wrong_answer_is_told_where_it_fails(check, wrong, said):
    with pytest.raises(CheckError, match=said):
        check(wrong)


def test_a_weight_scaled_along_its_outputs_is_found():
    def wrong(g, b, w, f):
        return g * f, b * f, w / (f[:, None, None, None] if len(w) == len(f) else f[None, :, None, None])

    with pytest.raises(CheckError, match="which axis"):
        check_hide(wrong)
