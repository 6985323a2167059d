"""The lab: a victim is trained once for its configuration and code, and found again bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
import toys

from bdlib import data as datasets
from bdlib import lab as module
from bdlib import provenance, store
from bdlib.attacks import BadNets, Blend
from bdlib.data import Data
from bdlib.lab import NETWORKS, SCALES, Lab
from bdlib.metrics import evaluate
from bdlib.models import normalized
from bdlib.training import Recipe, predict

TRAIN, TEST = toys.squares(200), toys.squares(40, seed=1)


def make(device="cpu", **given):
    return Lab("small", device=device, **{"recipe": Recipe(2, 32), "reserve": 60, "network": "tiny", **given})


@pytest.fixture(autouse=True)
def toy_world(tmp_path, monkeypatch):
    """Toy data under every name, a toy network, an empty store; returns the number of trainings so far."""
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path))
    monkeypatch.delenv("BDLIB_SCALE", raising=False)
    monkeypatch.delenv("BDLIB_DEVICE", raising=False)
    monkeypatch.setattr(
        datasets, "load", lambda name, device="cpu", verify=True: Data(TRAIN.to(device), TEST.to(device))
    )
    monkeypatch.setitem(
        NETWORKS, "tiny", lambda classes, mean, std, channels: normalized(toys.Tiny(classes), mean, std)
    )
    trainings, fit = [], module.fit
    monkeypatch.setattr(module, "fit", lambda *a, **k: trainings.append(k) or fit(*a, **k))
    return trainings


ATTACKS = [None, BadNets(toys.TARGET, 0.2, size=3), Blend(toys.TARGET, 0.2)]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_a_victim_is_trained_once_and_found_again(device, attack, toy_world):
    first, again = make(device).victim(attack, seed=3), make(device).victim(attack, seed=3)
    assert len(toy_world) == 1
    x = TEST.images.to(device)
    assert torch.equal(predict(first.model, x), predict(again.model, x))
    assert toys.same(first.model.state_dict(), again.model.state_dict())
    assert torch.equal(first.indices.cpu(), again.indices.cpu()) and first.log == again.log
    assert not first.model.training and not again.model.training
    assert json.loads(json.dumps(first.facts)) == again.facts  # a tuple comes back as a list
    assert {"attack", "seed", "code", "commit", "device", "date", "seconds"} <= set(again.facts)
    if attack is None:
        assert first.trigger is again.trigger is None and len(first.indices) == 0
    else:
        f = x.float() / 255
        assert torch.equal(first.trigger(f), again.trigger(f)) and first.trigger.mapping == again.trigger.mapping
        assert len(first.indices) == 28
        assert evaluate(first.model, make(device).test, first.trigger) == evaluate(
            again.model, make(device).test, again.trigger
        )


def test_another_configuration_is_another_victim(toy_world, monkeypatch):
    attack = ATTACKS[1]
    make().victim(attack)
    others = [
        lambda: make().victim(attack, seed=1),
        lambda: make().victim(replace(attack, rate=0.1)),
        lambda: make().victim(None),
        lambda: make(recipe=Recipe(2, 32, lr=0.05)).victim(attack),
        lambda: make(reserve=50).victim(attack),
        lambda: make(network="tiny2").victim(attack),
    ]
    monkeypatch.setitem(NETWORKS, "tiny2", NETWORKS["tiny"])
    for n, other in enumerate(others, start=2):
        other()
        assert len(toy_world) == n
    make().victim(attack)
    assert len(toy_world) == len(others) + 1  # and the first is still there


def test_changed_code_or_data_is_another_victim(toy_world, monkeypatch):
    make().victim()
    with monkeypatch.context() as m:
        m.setattr(provenance, "fingerprint", lambda *modules: "0" * 16)
        make().victim()
    assert len(toy_world) == 2
    brighter = replace(TRAIN, images=TRAIN.images + 1)
    monkeypatch.setattr(datasets, "load", lambda name, **_: Data(brighter, TEST))
    make().victim()
    assert len(toy_world) == 3


def test_the_code_of_a_victim_is_that_of_training_models_and_its_attack(monkeypatch):
    asked = []
    monkeypatch.setattr(provenance, "fingerprint", lambda *m: asked.append(set(m)) or "0" * 16)
    make().victim(ATTACKS[1])
    make().victim()
    assert asked[0] >= {"bdlib.training", "bdlib.models", "bdlib.attacks.badnets"}
    assert "bdlib.attacks.badnets" not in asked[1]


def test_a_damaged_victim_is_trained_anew_and_is_the_same(toy_world, tmp_path):
    first = make().victim(ATTACKS[1])
    (path,) = (tmp_path / "victims").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="damaged.*made anew"):
        again = make().victim(ATTACKS[1])
    assert len(toy_world) == 2 and toys.same(first.model.state_dict(), again.model.state_dict())


def test_a_store_that_fails_still_yields_the_victim(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep the victim"):
        assert make().victim().log


def test_an_interrupted_training_stores_nothing(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(module, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make().victim()
    assert not list(tmp_path.rglob("*.safetensors")) and make().victim().log


def test_the_defender_draws_from_images_no_victim_saw():
    lab = make()
    assert (len(lab.train), len(lab.pool), len(lab.test)) == (140, 60, 40)
    seen = {bytes(x.flatten().tolist()) for x in lab.train.images}
    kept = {bytes(x.flatten().tolist()) for x in lab.pool.images}
    assert len(seen) == 140 and len(kept) == 60 and not seen & kept
    assert len(seen | kept) == len(TRAIN) and lab.train.labels.unique().numel() == 4  # shuffled before the cut
    clean = lab.clean(count=40, seed=2)
    assert len(clean) == 40 and {bytes(x.flatten().tolist()) for x in clean.images.images} <= kept
    assert torch.equal(lab.clean(count=40, seed=2).images.images, clean.images.images)
    assert not torch.equal(lab.clean(count=40, seed=3).images.images, clean.images.images)
    assert lab.clean(per_class=5).images.labels.bincount().tolist() == [5] * 4
    assert torch.equal(make().train.images, lab.train.images)  # the same cut in every run


def test_an_untrained_network_is_its_seed_and_leaves_no_trace():
    lab = make()
    torch.manual_seed(5)
    noise = torch.get_rng_state()
    a, b, c = lab.network(0), lab.network(0), lab.network(1)
    assert torch.equal(torch.get_rng_state(), noise)
    assert toys.same(a.state_dict(), b.state_dict()) and not toys.same(a.state_dict(), c.state_dict())
    assert torch.allclose(a[0].mean.flatten(), torch.tensor(lab.train.stats()[0]))


@pytest.mark.parametrize("scale", SCALES)
def test_scales_name_sets_and_networks_that_exist(scale):
    s = SCALES[scale]
    assert s.network in NETWORKS and s.dataset in datasets.names() and 0 < s.clean <= s.reserve


def test_the_environment_chooses_scale_and_device(monkeypatch):
    monkeypatch.setenv("BDLIB_SCALE", "full")
    monkeypatch.setenv("BDLIB_DEVICE", "cpu")
    assert Lab().scale == SCALES["full"] and Lab().device == "cpu"
    assert Lab("small").scale == SCALES["small"]


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda: Lab("huge"), "scale must be one of small, full, got 'huge'"),
        (lambda: Lab("small", network="alexnet"), "network must be one of small, .*got 'alexnet'"),
        (lambda: make(reserve=200).train, r"reserve must be in \[0, 199\].*got 200"),
        (lambda: make(reserve=-1).train, r"reserve must be in \[0, 199\].*got -1"),
        (lambda: make().victim(BadNets(target=9, size=3)), r"target must be a class in \[0, 3\], got 9"),
        (lambda: make().clean(count=61), r"count must be in \[1, 60\], got 61"),
        (lambda: make().clean(count=2), "has none of"),
    ],
)
def test_bad_input_is_named(use, said):
    with pytest.raises(ValueError, match=said):
        use()


def test_a_victim_moves_to_the_lab_device(device):
    make(device).victim(ATTACKS[1])
    victim = make(device).victim(ATTACKS[1])
    assert next(victim.model.parameters()).device.type == victim.indices.device.type == device
    assert next(victim.trigger.buffers()).device.type == device


def test_nothing_but_the_victim_is_stored(tmp_path):
    make().victim(ATTACKS[2])
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    tensors, facts = store.load(path.stem)
    assert {n.split(".")[0] for n in tensors} == {"model", "trigger", "indices"} and facts["seed"] == 0
