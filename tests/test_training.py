"""Training: augmentation against torchvision, learning rates against torch, the loop against a loop by hand."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import toys
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, nn
from torchvision.transforms import functional as TF

from bdlib.data.imageset import Augment
from bdlib.training import Recipe, Step, _batches, _steps, augment, evaluating, fit, predict


def generator(device="cpu", seed=0):
    return Generator(device).manual_seed(seed)


def chi_square(counts, expected):
    """(statistic - degrees of freedom) in standard deviations: about 0 for a fair draw, huge for another one."""
    c = torch.tensor(counts, dtype=torch.float64)
    return float((((c - expected) ** 2 / expected).sum() - (len(c) - 1)) / math.sqrt(2 * (len(c) - 1)))


# ---- augmentation


def test_crops_and_flips_are_those_of_torchvision_and_uniform(device):
    pad, n = 4, 16200
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8)  # no two pixels alike, none is padding
    padded, views = TF.pad(image, pad), []
    for top, left, flip in itertools.product(range(9), range(9), (False, True)):
        view = TF.crop(padded, top, left, 8, 8)
        views.append(TF.hflip(view) if flip else view)
    place = {bytes(v.flatten().tolist()): i for i, v in enumerate(views)}
    assert len(place) == 162
    out = augment(image.expand(n, 1, 8, 8).to(device), Augment(pad, flip=True), generator(device)).cpu()
    drawn = [place[bytes(v)] for v in out.flatten(1).tolist()]  # KeyError: a view torchvision cannot make
    assert abs(chi_square(torch.tensor(drawn).bincount(minlength=162).tolist(), n / 162)) < 4
    same_as_next = sum(a == b for a, b in itertools.pairwise(drawn)) / (n - 1)
    assert same_as_next < 3 / 162  # every image draws for itself


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_erases_one_clipped_square_at_a_uniform_place(device, side):
    n = 12800
    out = augment(torch.ones(n, 2, 8, 8, device=device), Augment(cutout=side), generator(device)).cpu()
    assert torch.equal(out[:, 0], out[:, 1])  # the same hole in every channel
    holes = {}
    for y, x in itertools.product(range(8), range(8)):
        view = torch.ones(8, 8)
        view[max(0, y - side // 2) : y - side // 2 + side, max(0, x - side // 2) : x - side // 2 + side] = 0
        holes[tuple(view.flatten().tolist())] = len(holes)
    assert len(holes) == 64
    drawn = torch.tensor([holes[tuple(v)] for v in out[:, 0].flatten(1).tolist()])
    assert abs(chi_square(drawn.bincount(minlength=64).tolist(), n / 64)) < 4


@given(
    st.integers(1, 5), st.integers(0, 3), st.booleans(), st.integers(0, 9), st.integers(0, 99),
    st.sampled_from([torch.uint8, torch.float32]),
)  # fmt: skip
def test_augmentation_invents_no_pixel(batch, pad, flip, cutout, seed, dtype):
    images = torch.randint(1, 256, (batch, 3, 6, 5), dtype=torch.uint8, generator=generator(seed=seed)).to(dtype)
    before = images.clone()
    out = augment(images, Augment(pad, flip, cutout), generator(seed=seed))
    assert out.shape == images.shape and out.dtype == dtype and torch.equal(images, before)
    assert torch.equal(out, augment(images, Augment(pad, flip, cutout), generator(seed=seed)))
    for a, b in zip(images, out, strict=True):
        assert set(b.flatten().tolist()) <= set(a.flatten().tolist()) | {0}
    if not (pad or flip or cutout):
        assert torch.equal(out, images)
    if flip and not pad and not cutout:
        assert all(torch.equal(b, a) or torch.equal(b, a.flip(2)) for a, b in zip(images, out, strict=True))


# ---- learning rates


def rates(recipe, steps):
    return [recipe.lr_at(i, steps) for i in range(recipe.epochs * steps)]


def test_cosine_and_milestones_are_those_of_torch():
    weight = nn.Parameter(torch.zeros(1))

    def torchs(make):
        opt = torch.optim.SGD([weight], lr=0.3)
        schedule, out = make(opt), []
        for _ in range(40):
            out.append(opt.param_groups[0]["lr"])
            opt.step()
            schedule.step()
        return out

    cosine = torchs(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40))
    assert rates(Recipe(8, lr=0.3, schedule="cosine"), 5) == pytest.approx(cosine)
    stairs = torchs(lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [15, 30], 0.2))
    recipe = Recipe(8, lr=0.3, schedule="milestones", milestones=(3, 6), gamma=0.2)
    assert rates(recipe, 5) == pytest.approx(stairs)
    assert rates(Recipe(3, lr=0.3, schedule="constant"), 4) == [0.3] * 12


def test_one_cycle_rises_then_falls_in_straight_lines():
    r = rates(Recipe(10, lr=0.5, schedule="one-cycle", warmup=0.3), 10)
    assert r[:31] == pytest.approx([0.5 * i / 30 for i in range(31)])
    assert r[30:] == pytest.approx([0.5 * (100 - i) / 70 for i in range(30, 100)])


def test_a_rate_without_steps_is_defined():
    assert Recipe(0).lr_at(0, 0) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1), ("batch", 0), ("lr", -0.1), ("lr", math.nan), ("momentum", 1.0), ("weight_decay", -1e-4),
        ("schedule", "linear"), ("warmup", 0.0), ("warmup", 1.0), ("label_smoothing", 1.0),
    ],
)  # fmt: skip
def test_a_recipe_names_the_bad_value(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value!r}"):
        Recipe(**{"epochs": 1, field: value})


# ---- the loop


@given(st.integers(1, 70), st.integers(1, 20))
def test_an_epoch_is_a_permutation_without_a_batch_of_one(n, size):
    batches = list(_batches(n, size, generator(), torch.device("cpu")))
    assert len(batches) == _steps(n, size)
    seen = torch.cat(batches).tolist()
    assert len(set(seen)) == len(seen) >= n - 1 and set(seen) <= set(range(n))
    assert size == 1 or n == 1 or min(map(len, batches)) > 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_fit_is_the_loop_by_hand(device, nesterov):
    data = toys.squares(90).to(device)
    recipe = Recipe(2, 32, 0.05, nesterov=nesterov, schedule="cosine", label_smoothing=0.1)
    ours, theirs = toys.tiny(), toys.tiny().to(device)
    log = fit(ours, data, recipe, seed=3)
    g, opt = generator(device, 3), torch.optim.SGD(theirs.parameters(), 0.05, 0.9, 0, 5e-4, nesterov)
    schedule, losses, right = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6), [], []
    theirs.train()
    for _ in range(2):
        for index in torch.randperm(90, generator=g, device=device).split(32):
            logits = theirs(data.images[index].float() / 255)
            loss = F.cross_entropy(logits, data.labels[index], label_smoothing=0.1)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            losses += [float(loss.detach())] * len(index)
            right += (logits.argmax(1) == data.labels[index]).tolist()
    tolerance = 1e-4 if device == "cpu" else 0.05  # a GPU trains in bfloat16
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance)
    assert [r["epoch"] for r in log] == [1, 2] and all(r["seconds"] > 0 for r in log)
    assert log[1]["loss"] == pytest.approx(sum(losses[90:]) / 90, rel=tolerance)
    assert log[1]["accuracy"] == pytest.approx(sum(right[90:]) / 90, abs=0.05 if device != "cpu" else 1e-6)
    assert log[1]["lr"] == pytest.approx(recipe.lr_at(5, 3)) and not ours.training


def test_fit_is_its_seed_and_leaves_the_global_one_alone(device):
    data = toys.squares(96, augment=Augment(1, cutout=2)).to(device)

    def run(seed, noise):
        net = toys.tiny()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        fit(net, data, Recipe(2, 32), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return net.state_dict()

    a, b, c = run(0, 1), run(0, 2), run(1, 1)
    assert toys.same(a, b) and not toys.same(a, c)


def test_fit_learns(device):
    test = toys.squares(200, seed=1).to(device)
    net = toys.tiny()
    log = fit(net, toys.squares(384).to(device), toys.QUICK)
    assert (predict(net, test.images).argmax(1) == test.labels).float().mean() > 0.95 and log[-1]["accuracy"] > 0.95


class Spy(Step):
    """Keeps what it is shown."""

    def __init__(self, before_augment):
        self.before_augment, self.changed, self.trained = before_augment, [], []

    def change(self, images, labels, generator):
        self.changed += list(images.clone())
        return images, labels

    def loss(self, model, images, labels, smoothing):
        self.trained += list(images.clone())
        return super().loss(model, images, labels, smoothing)


@pytest.mark.parametrize("before", [False, True])
def test_a_step_changes_the_batch_on_the_side_of_augmentation_it_asks_for(before):
    data, spy = toys.squares(40, augment=Augment(3)), Spy(before)
    fit(toys.tiny(), data, Recipe(1, 20), step=spy)
    stored = [x.float() / 255 for x in data.images]
    untouched = [any(torch.equal(x, s) for s in stored) for x in spy.changed]
    assert all(untouched) if before else sum(untouched) < 10  # 1 draw in 49 moves nothing
    assert sum(any(torch.equal(x, s) for s in stored) for x in spy.trained) < 10  # trained on: always augmented


def test_a_poisoned_image_is_augmented_with_its_trigger():
    """Static attacks write into the stored set; a crop then moves the patch with the picture."""
    data = toys.squares(60, augment=Augment(2))
    poisoned, spy = toys.ATTACK.poison(data), Spy(False)
    fit(toys.tiny(), poisoned.data, Recipe(1, 60), step=spy)
    patch = poisoned.trigger.pattern[:, -3:, -3:]
    places = set()
    for x in spy.trained:
        windows = x.unfold(1, 3, 1).unfold(2, 3, 1)  # (3, 10, 10, 3, 3)
        hits = (windows == patch[:, None, None]).all(0).flatten(2).all(2).nonzero()
        places |= {tuple(h.tolist()) for h in hits}
    assert len(places) > 2  # not in its corner alone


def test_recipe_augment_false_leaves_images_alone():
    data, spy = toys.squares(40, augment=Augment(3)), Spy(False)
    fit(toys.tiny(), data, Recipe(1, 20, augment=False), step=spy)
    assert all(any(torch.equal(x, s) for s in data.floats) for x in spy.trained)


def test_no_wait_for_the_device_inside_an_epoch():
    def waits(images):
        data = toys.squares(images, augment=Augment(1, True, 2))
        with toys.Waits() as mode:
            fit(toys.tiny(), data, Recipe(1, 16))
        return mode.count

    assert waits(32) == waits(128) <= 4  # two steps or eight: only the epoch's record is read


def test_bad_sets_and_diverged_losses_are_named():
    with pytest.raises(ValueError, match="empty image set"):
        fit(toys.tiny(), toys.squares(8)[:0], Recipe(1))
    with pytest.raises(
        ValueError, match=r"train diverged at step \d+: the loss is (nan|inf); lower lr, which is 1e\+30"
    ):
        fit(toys.tiny(), toys.squares(64), Recipe(4, 16, lr=1e30))


def test_no_epoch_changes_no_weight():
    net = toys.tiny()
    before = copy.deepcopy(net.state_dict())
    assert fit(net, toys.squares(16), Recipe(0)) == [] and toys.same(before, net.state_dict())


def test_after_epoch_is_told_the_epochs_done():
    done = []
    fit(toys.tiny(), toys.squares(16), Recipe(3), after_epoch=done.append)
    assert done == [1, 2, 3]


# ---- prediction


def mixed(net):
    """Some modules in train mode, some not."""
    net.train()
    net[1].bn1.eval()
    return net


def test_predict_restores_every_mode_and_changes_nothing(device):
    net = mixed(toys.tiny()).to(device)
    before = toys.state(net)
    predict(net, toys.squares(20).images.to(device))
    assert toys.unchanged(before, net)
    with pytest.raises(RuntimeError, match="stop"), evaluating(net):
        assert not any(m.training for m in net.modules())
        raise RuntimeError("stop")
    assert net.training and not net[1].bn1.training


class Hungry(nn.Module):
    """Runs out of GPU memory, as a test can have it, on more than `room` images at once."""

    def __init__(self, room):
        super().__init__()
        self.room, self.tried = room, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError("no room")
        return x.mean((2, 3))


def test_out_of_memory_halves_the_batch_and_says_so():
    images, net = toys.squares(40).images, Hungry(6)
    with pytest.warns(UserWarning) as said:
        found = predict(net, images, batch=20)
    assert net.tried == [20, 10, 5, 5, 5, 5, 5, 5, 5, 5] and torch.equal(found, predict(Hungry(40), images))
    assert [str(w.message) for w in said] == [
        f"out of GPU memory: evaluating in batches of {n} instead" for n in (10, 5)
    ]


def test_halving_gives_up_at_one_image_and_lets_other_errors_through():
    net = Hungry(0)
    with pytest.warns(UserWarning), pytest.raises(torch.cuda.OutOfMemoryError):
        predict(net, toys.squares(9).images, batch=6)
    assert net.tried == [6, 3, 1]
    with pytest.raises(RuntimeError, match="mat1"):
        predict(nn.Linear(3, 2), toys.squares(9).images)


def test_predict_computes_in_float32_where_logits_are_to_be_compared(monkeypatch):
    """A logit has three digits in bfloat16: two networks that are the same function seem to differ."""
    net, images = toys.tiny().eval(), toys.squares(40).images
    exact = net(images.float() / 255).detach()
    monkeypatch.setattr("bdlib.training.amp_dtype", lambda device: torch.bfloat16)
    assert torch.allclose(predict(net, images, amp=False), exact, atol=1e-6)
    assert not torch.allclose(predict(net, images), exact, atol=1e-5)


def test_predict_depends_on_neither_batch_size_nor_number_type(device):
    net, x = toys.trained().to(device), toys.squares(33).images.to(device)
    a = predict(net, x)
    assert a.shape == (33, toys.CLASSES) and a.dtype == torch.float32 and a.device.type == device
    for other in (predict(net, x, batch=7), predict(net, x.float() / 255)):
        assert torch.allclose(a, other, atol=1e-5 if device == "cpu" else 0.1)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.full((2, 3, 8, 8), 1.5), "got 1.5 to 1.5"),
        (torch.full((2, 3, 8, 8), -0.1), "got -0.1"),
        (torch.full((2, 3, 8, 8), math.nan), "nan"),
        (torch.rand(3, 8, 8), r"\(N, C, H, W\), got \(3, 8, 8\)"),
    ],
)
def test_predict_names_bad_images(images, said):
    with pytest.raises(ValueError, match=said):
        predict(toys.tiny(), images)
