"""The measurement itself: what it counts, divides and leaves out. Its seconds are nobody's to test."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import toys

from bdlib import provenance, speed
from bdlib.data.imageset import Augment, CleanSet
from bdlib.defenses.anp import ANP
from bdlib.defenses.mnp import MNP
from bdlib.defenses.nad import NAD
from bdlib.defenses.npd import NPD
from bdlib.defenses.rnp import RNP, Ascent
from bdlib.flops import STAGES, flops
from bdlib.metrics import accuracy
from bdlib.training import Recipe, fit
from bdlib.usual import PerSample, usual_epoch, usual_evaluation

GENTLE = Ascent(lr=0.01, batch=32, milestones=(), epochs=20, stop=0.6)
DEFENCES = {
    "ANP": ANP(iterations=3, batch=8, threshold=0.2),
    "RNP": RNP(GENTLE, epochs=2, batch=32),
    "NPD": NPD(epochs=2, warm_up=1, batch=32),
    "NAD": NAD(Recipe(1, 32), Recipe(2, 32)),
    "MNP": MNP(GENTLE, epochs=2, batch=32),
}


@pytest.fixture
def toy(monkeypatch):
    """A setting of toy images and networks; `measure` takes it for every device."""
    s = speed.Setting(
        "cpu", toys.squares(128), toys.squares(40, seed=9), {"tiny": toys.tiny, "other": partial(toys.tiny, 1)},
        Recipe(3, 64), lambda: (toys.trained(poisoned=True), toys.trigger(), {"poisoning": 1.0, "training": 2.0}),
        DEFENCES, dict.fromkeys(DEFENCES, toys.clean()), repeat=1, curves=True, images=64, workers=0,
    )  # fmt: skip
    monkeypatch.setattr(speed, "setting", lambda device, quick=False: s)
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: 1e9)
    return s


def clock(monkeypatch, seconds):
    """Every timed piece of work is done once and took so many seconds."""

    def wall(work, device, repeat):
        work()
        return {"seconds": seconds, "calls": 1}

    monkeypatch.setattr(speed, "_wall", wall)


# ---- clocks


@pytest.mark.parametrize(
    ("repeat", "expected"),
    [(3, {"seconds": 2.0, "calls": 3, "warm_up": 7.0}), (0, {"seconds": 9.0, "calls": 1})],
)
def test_the_first_call_is_warm_up_and_the_median_of_the_others_counts(repeat, expected, monkeypatch):
    now, took = [0.0], iter([9.0, 1.0, 5.0, 2.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    assert speed._wall(lambda: now.__setitem__(0, now[0] + next(took)), "cpu", repeat) == expected


def test_the_matmul_rate_is_operations_by_seconds(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "_wall", lambda work, *_: seen.append(flops(work)) or {"seconds": 0.5})
    assert speed.matmul_rate("cpu", torch.float32) == seen[0] / 0.5 > 1e9


# ---- what is timed


def test_noise_is_bright_repeatable_and_can_be_learnt():
    train, test = speed.noise(400, "cpu", classes=4), speed.noise(80, "cpu", classes=4, seed=2)
    assert train.images.dtype == torch.uint8 and train.shape == (3, 32, 32) and train.augment == Augment(4, True)
    assert 100 < float(train.floats.mean() * 255) < 155  # zeros would multiply faster
    assert torch.equal(train.images, speed.noise(400, "cpu", classes=4).images)
    assert not torch.equal(train.images[:80], test.images)
    net = toys.tiny(classes=4)
    fit(net, replace(train, augment=Augment()), Recipe(4, 50, lr=0.05))
    assert accuracy(net, test) > 0.9  # one picture a class, the same in both sets


@pytest.mark.parametrize("name", DEFENCES)
def test_the_floor_is_what_the_steps_that_were_made_cost(name, toy, monkeypatch):
    clock(monkeypatch, 4.0)
    model, trigger, _ = toy.victim()
    row = speed._defence(toy, name, model, trigger, rate=1e6)
    assert row["ratio"] == pytest.approx(4.0 / row["floor"]) and row["images"] == 200
    details = DEFENCES[name](model, toy.clean[name]).details
    work = 0
    for stage, (run, units) in STAGES[name].items():  # all units in one go, less the setting up
        n = units(DEFENCES[name], details)
        assert row["units"][stage] == n >= 1
        work += flops(lambda r=run, n=n: r(DEFENCES[name], model, toy.clean[name], n))
        work -= flops(lambda r=run: r(DEFENCES[name], model, toy.clean[name], 0))
    if name in ("RNP", "MNP"):  # stops unlearning early: as many epochs as were made, not as were allowed
        stage = "unlearn" if name == "RNP" else "suppress"
        assert row["units"][stage] == len(details["unlearning" if name == "RNP" else "suppression"]) < 20
    assert row["floor"] * 1e6 == pytest.approx(work)
    masked = name in ("ANP", "RNP", "MNP")
    assert ("curve" in row) == masked and ("choosing" in row) == (masked and name != "ANP")  # ANP's is fixed here


def test_mfu_is_operations_by_seconds_and_rate(toy, monkeypatch):
    clock(monkeypatch, 2.0)
    out = speed._networks(toy, rate=1e6)
    train, test = out["tiny"]["train"], out["tiny"]["evaluate"]
    assert set(out) == {"tiny", "other"}
    assert (train["images_per_second"], test["images_per_second"]) == (32, 20)  # 64 and 40 images in 2 s
    assert train["mfu"] == pytest.approx(32 * train["flop"] / 1e6)
    assert 2.5 * test["flop"] < train["flop"] <= 3 * test["flop"]


def test_an_epoch_is_compared_with_its_evaluation(toy, monkeypatch):
    seconds = iter([6.0, 2.0, 3.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(speed, "_wall", lambda work, *_: (work(), {"seconds": next(seconds)})[1])
    out = speed._epoch(toy, rate=1e9)
    assert (out["images"], out["tested"], out["workers"]) == (128, 70, 0)  # 40, and 30 that are not of the target
    assert (out["ratio_float32"], out["ratio_as_shipped"]) == (2, 4)


@pytest.mark.parametrize(("dtype", "batch", "alike"), [(None, 128, True), (None, 64, False), ("bfloat16", 128, False)])
def test_what_is_shipped_is_timed_apart_only_where_it_differs_from_float32(dtype, batch, alike, toy, monkeypatch):
    monkeypatch.setattr(provenance, "amp_dtype", lambda device: dtype and getattr(torch, dtype))
    out = speed._epoch(replace(toy, recipe=Recipe(3, batch)), rate=1e9)
    assert (out["as_shipped"] is out["float32"]) == alike


def test_the_usual_pipeline_learns_and_scores_as_ours_does():
    data, net = toys.squares(256), toys.tiny()
    assert usual_evaluation(toys.trained(), [PerSample(data), PerSample(data[:50])], workers=0) == pytest.approx(
        [accuracy(toys.trained(), data), accuracy(toys.trained(), data[:50])]
    )
    before = accuracy(net, data)
    for _ in range(4):
        usual_epoch(net, PerSample(data, Augment()), batch=32, workers=0)
    assert accuracy(net, data) > max(0.6, before + 0.2)


def test_a_picture_goes_through_pil_unchanged_or_is_cropped_from_its_padding():
    data = toys.squares(8)
    assert torch.allclose(torch.stack([PerSample(data)[i][0] for i in range(8)]), data.floats)
    shifted = torch.stack([PerSample(data, Augment(pad=2))[0][0] for _ in range(20)])
    padded = torch.nn.functional.pad(data.floats[0], (2, 2, 2, 2))
    crops = [padded[:, y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
    assert all(any(torch.allclose(s, c) for c in crops) for s in shifted)
    assert len({tuple(s.flatten().tolist()) for s in shifted}) > 3


# ---- the whole


def test_all_sections_in_one_run_and_as_text(toy):
    result = json.loads(json.dumps(speed.measure("cpu")))
    assert set(speed.SECTIONS) < set(result) and set(result["defences"]) == {"victim", *DEFENCES}
    assert result["matmul"]["float32"] == 1e9 and result["peak_bytes"] > 1e7
    assert {"device", "dtype", "torch", "commit", "date", "seconds", "quick"} <= set(result)
    text = speed.report(result)
    for word in ("augmentation", "as_shipped", "tiny", "evaluation    70 images", *DEFENCES, "one attack (3.0 s)"):
        assert word in text, word
    assert "QUICK" not in text and "QUICK" in speed.report({**result, "quick": True})


def test_sections_can_be_chosen(toy, monkeypatch):
    monkeypatch.setattr(speed, "_defences", lambda *_: pytest.fail("not asked for"))
    result = speed.measure("cpu", sections=["augment"])
    assert set(result) & set(speed.SECTIONS) == {"augment"}
    text = speed.report(result)
    assert "augmentation" in text and "evaluation" not in text and "epoch" not in text


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"section must be one of augment, .*, got 'training'"):
        speed.measure("cpu", sections=["augment", "training"])
    with pytest.raises(ValueError, match=r"device 'cuda' was asked for; torch .* finds no GPU"):
        speed.measure("cuda")


def test_a_quick_setting_is_the_real_one_made_small(monkeypatch):
    whole = speed.Setting(
        "cpu", speed.noise(600, "cpu"), speed.noise(300, "cpu"), {"tiny": partial(toys.tiny, 0, 10)}, Recipe(30, 128),
        lambda: pytest.fail("the real victim takes minutes"), DEFENCES,
        dict.fromkeys(DEFENCES, CleanSet(speed.noise(400, "cpu"))), calls=3,
    )  # fmt: skip
    monkeypatch.setattr(speed, "_on_processor", lambda device: whole)
    assert speed.setting("cpu") is whole
    s = speed.setting("cpu", quick=True)
    assert (len(s.train), len(s.test), s.repeat, s.calls) == (512, 256, 1, 0)
    assert set(s.defences) == set(s.clean) == set(DEFENCES) and len(s.clean["ANP"]) == 200
    model, trigger, seconds = s.victim()
    assert trigger.mapping.target == 0 and set(seconds) == {"poisoning", "training"}
    assert model(s.train.floats[:2]).shape == (2, 10)


def test_the_settings_of_a_gpu_are_those_of_the_papers(monkeypatch):
    small = speed.noise
    monkeypatch.setattr(speed, "noise", lambda n, device, seed=1: small(n // 10 if n > 5000 else n, "cpu", seed=seed))
    s = speed._on_gpu("cpu")
    assert s.defences == {d.__name__: d.paper() for d in (ANP, RNP, NPD, NAD, MNP)}
    assert {k: len(c) for k, c in s.clean.items()} == {"ANP": 500, "RNP": 500, "MNP": 500, "NPD": 2500, "NAD": 2500}
    assert (s.recipe.epochs, s.recipe.batch) == (30, 512) and s.calls == 3 and s.curves
    shapes = {k: make()(s.train.floats[:1]).shape for k, make in s.networks.items()}
    assert next(iter(shapes)) == "preact_resnet18" and set(shapes.values()) == {(1, 10)}
