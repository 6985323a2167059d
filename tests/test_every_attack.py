"""Every attack through the lab: trained once, stored with its trigger, found again bit for bit; one table for all."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
import toys

from bdlib import attacks, store
from bdlib import data as datasets
from bdlib.attacks import (
    BPP,
    CL,
    DFST,
    FC,
    LF,
    LIRA,
    SIG,
    SSBA,
    AdaptiveBlend,
    AdaptivePatch,
    BadNets,
    Blend,
    InputAware,
    InputAwareStatic,
    Refool,
    TrojanNN,
    TrojanPatch,
    WaNet,
)  # fmt: skip
from bdlib.data import Data
from bdlib.lab import NETWORKS, Controlling, Lab
from bdlib.metrics import evaluate
from bdlib.models import normalized
from bdlib.training import Recipe

T = toys.TARGET
TRAIN, TEST = toys.squares(260), toys.squares(40, seed=1)
EVERY = [
    BadNets(T, 0.2, size=3),
    Blend(T, 0.2),
    TrojanPatch(T, 0.2),
    TrojanNN(T, 0.2),
    CL(T, iterations=2, robust_epochs=1, robust_steps=1, width=8),
    SIG(T, frequency=3),
    Refool.official(T),
    InputAware(T, widths=(4, 8), mask_epochs=1),
    InputAwareStatic(T, 0.2, widths=(4, 8), mask_epochs=1, epochs=1),
    WaNet(T, 0.2),
    LF.closed_form(T),
    LF(T, count=8, together=8, passes=1),
    SSBA(T, 0.2, width=4, least_bits=0, least_psnr=0),
    FC(T, 0.4, iterations=3),
    DFST(T, 0.1, injector_epochs=1, sample=0.2),
    LIRA(T, widths=(4, 8), share=0.5),
    AdaptiveBlend.small(T),
    AdaptivePatch.small(T),
    BPP(T, 0.2),
]
each = pytest.mark.parametrize("attack", EVERY, ids=lambda a: type(a).__name__)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Toy images, a toy network, an empty store."""
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path))
    monkeypatch.setattr(datasets, "load", lambda name, device="cpu", verify=True: Data(TRAIN, TEST))
    monkeypatch.setitem(NETWORKS, "tiny", lambda k, mean, std, channels: normalized(toys.Tiny(k), mean, std))
    return lambda: Lab("small", device="cpu", recipe=Recipe(2, 32), reserve=60, network="tiny")


def test_the_table_is_complete():
    known = {n for n in attacks.__all__ if hasattr(getattr(attacks, n), "paper")}
    assert {type(a).__name__ for a in EVERY} == known and len(known) == 18


@each
def test_a_victim_comes_back_with_its_trigger_bit_for_bit(attack, lab, monkeypatch):
    first = lab().victim(attack, seed=3)
    monkeypatch.setattr(store, "save", lambda *_: pytest.fail("trained twice"))
    again = lab().victim(attack, seed=3)
    assert toys.same(first.model.state_dict(), again.model.state_dict()) and first.log == again.log
    assert toys.same(first.trigger.state_dict(), again.trigger.state_dict())
    x = TEST.images.float() / 255
    out = first.trigger(x)
    assert torch.equal(out, again.trigger(x)) and not torch.equal(out, x)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.allclose(torch.cat([first.trigger(x[:7]), first.trigger(x[7:])]), out, atol=1e-6)
    assert 0 <= evaluate(first.model, TEST, first.trigger).asr <= 1


@each
def test_settings_and_presets(attack):
    kind = type(attack)
    with pytest.raises(FrozenInstanceError):
        attack.target = 2  # type: ignore[misc]
    for preset in ("paper", "official", *(["small"] if hasattr(kind, "small") else [])):
        made = getattr(kind, preset)(2)
        assert isinstance(made, kind) and made.target == 2 and getattr(kind, preset).__doc__
    names = {f.name for f in fields(attack)}
    assert ("rate" in names) + ("class_rate" in names) == (2 if kind is Refool else 0 if kind is LIRA else 1)
    assert isinstance(attack, Controlling) != hasattr(attack, "poison")


@each
def test_a_target_outside_the_classes_is_named(attack):
    with pytest.raises(ValueError, match=r"target must be a class in \[0, 3\], got 4"):
        replace(attack, target=4).trigger((3, 12, 12), 4)


@pytest.mark.parametrize("attack", [a for a in EVERY if hasattr(a, "poison")], ids=lambda a: type(a).__name__)
def test_poisoned_and_covered_images_are_marked_and_no_other_is_touched(attack):
    model = toys.trained()
    before = toys.state(model)
    p = attack.poison(TRAIN, seed=1, model=model)
    assert toys.unchanged(before, model)
    marked = torch.zeros(len(TRAIN), dtype=torch.bool)
    marked[p.indices] = marked[p.cover] = True
    assert len(p.indices) > 0 and int(marked.sum()) == len(p.indices) + len(p.cover)  # disjoint
    assert torch.equal(p.data.images[~marked], TRAIN.images[~marked])
    assert torch.equal(p.data.labels[~marked], TRAIN.labels[~marked])
    assert torch.equal(p.data.labels[p.cover], TRAIN.labels[p.cover])
    assert torch.equal(p.data.labels[p.indices], p.mapping(TRAIN.labels[p.indices]))
    if "class_rate" in {f.name for f in fields(attack)} and attack.class_rate is not None:  # clean label
        assert torch.equal(p.data.labels, TRAIN.labels)
