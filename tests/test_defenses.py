"""Defences: one table, one behaviour each; a new defence is a new line. Then what FT and FP alone must do."""

import inspect
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
import toys
from torch import nn

from bdlib import models
from bdlib.data.imageset import CleanSet
from bdlib.defenses import ANP, FP, FT, FTSAM, IBAU, MNP, NAD, NPD, RNP, Repair
from bdlib.defenses.fp import last_linear, mean_activation
from bdlib.defenses.rnp import Ascent
from bdlib.metrics import accuracy, evaluate
from bdlib.models import normalized
from bdlib.training import Recipe, fit, predict
from bdlib.watch import Diverged

QUICK_FT = FT(lr=0.02, epochs=2, batch=32)
EPOCHS = Recipe(8, 32, 0.2, 0.9, 5e-4)
ASCENT = Ascent(lr=0.003, batch=32, milestones=(), epochs=20)
MASKS = {"masks", "threshold", "pruned", "choice", "snapshots"}
# a defence, small; the keys of its log records and details; whether it can find a neuron that clean images never move
DEFENCES = [
    (ANP(iterations=25, batch=32), {"iteration", "natural", "robust", "mean_mask"},
     MASKS, True),
    (FT(lr=0.2, epochs=8, batch=32), {"epoch", "loss", "accuracy", "lr", "seconds"}, {"snapshots"}, False),
    (FP(tune=QUICK_FT), {"epoch", "loss", "accuracy", "lr", "seconds"},
     {"activation", "order", "pruned", "choice", "snapshots"}, True),
    (NAD(teacher=replace(EPOCHS, epochs=3), student=EPOCHS, betas=(500, 1000), cutout=0),
     {"epoch", "loss", "accuracy", "lr", "seconds", "attention"},
     {"teacher", "teacher_log", "stages", "betas", "snapshots"}, False),
    (RNP(ascent=ASCENT, epochs=4, batch=32, max_drop=0.05), {"epoch", "loss", "accuracy", "mean_mask"},
     {*MASKS, "unlearned", "unlearning", "reached", "share", "networks"}, False),
    (NPD(bound=1.0, step=0.2, epochs=15, lr=0.05, batch=32, warm_up=1, layer="1.conv2"),
     {"epoch", "clean", "kept", "boosted", "escaped"}, {"layer", "polarizer", "warm_accuracy", "snapshots"}, False),
    (MNP(ascent=ASCENT, epochs=4, batch=32, max_drop=0.05), {"epoch", "loss", "accuracy", "mean_mask"},
     {*MASKS, "suppressed", "suppression", "reached", "penalty", "magnitude"}, False),
    (IBAU(lr=2e-2, batch=50, rounds=3), {"round", "fooled", "loss", "norm"}, {"perturbation", "snapshots"}, False),
    (FTSAM(rho=1.0, lr=0.2, epochs=8, batch=32), {"epoch", "loss", "accuracy", "lr", "seconds"},
     {"snapshots"}, False),
]  # fmt: skip
each = pytest.mark.parametrize(("defence", "records", "details", "finds"), DEFENCES, ids=[repr(d[0]) for d in DEFENCES])
each_alone = pytest.mark.parametrize("defence", [d[0] for d in DEFENCES], ids=lambda d: type(d).__name__)


# ---- the family


@each
@pytest.mark.parametrize("mixed", [False, True], ids=["eval", "mixed modes"])
def test_the_given_network_is_bit_equal_afterwards_and_a_new_one_returned(
    device, defence, records, details, finds, mixed
):
    net, clean = toys.trained(poisoned=True).to(device), toys.clean()
    clean = CleanSet(clean.images.to(device))
    if mixed:
        net.train()
        net[1].bn2.eval()
    net[1].conv1.weight.requires_grad_(True)
    before, pixels = toys.state(net), clean.images.images.clone()
    noise = torch.get_rng_state()
    repair = defence(net, clean, seed=1)
    assert toys.unchanged(before, net) and torch.equal(clean.images.images, pixels)
    assert torch.equal(torch.get_rng_state(), noise)  # seeds are explicit: no trace in the global state
    assert isinstance(repair, Repair) and repair.model is not net and repair.seconds > 0
    assert not {p.data_ptr() for p in repair.model.parameters()} & {p.data_ptr() for p in net.parameters()}
    assert not any(m.training for m in repair.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *repair.model.modules()))
    if not isinstance(defence, NPD):  # which adds a layer
        assert repair.model.state_dict().keys() == net.state_dict().keys()  # loads into a plain network
    assert set(repair.details) == details and repair.log and all(set(r) == records for r in repair.log)
    assert all(isinstance(v, int | float) for r in repair.log for v in r.values())


@each_alone
def test_the_seed_decides(defence, device):
    net, clean = toys.trained(poisoned=True).to(device), CleanSet(toys.clean(80).images.to(device))
    defence = replace(defence, iterations=6) if isinstance(defence, ANP) else defence

    def result(seed, noise):
        torch.manual_seed(noise)
        repair = defence(net, clean, seed=seed)
        return {**repair.model.state_dict(), **repair.details.get("masks", {})}

    a, b, c = result(0, 1), result(0, 2), result(1, 1)
    assert toys.same(a, b) and not toys.same(a, c)


@each
def test_attack_success_falls_and_accuracy_stays(defence, records, details, finds):
    net = toys.planted()[0] if finds else toys.trained(poisoned=True)
    test, trigger = toys.squares(200, seed=9), toys.trigger()
    before = evaluate(net, test, trigger)
    after = evaluate(defence(net, toys.clean()).model, test, trigger)
    assert before.asr > 0.95 and after.asr < 0.1 and after.acc > before.acc - 0.05, (before, after)


@each_alone
def test_a_clean_network_stays_good(defence):
    test = toys.squares(200, seed=9)
    assert accuracy(defence(toys.trained(), toys.clean()).model, test) > 0.93


@each_alone
def test_snapshots_are_kept_on_demand(defence):
    net, every = toys.trained(), 2
    defence = replace(defence, iterations=5) if isinstance(defence, ANP) else defence
    repair = defence(net, toys.clean(80), keep_every=every)
    steps = [at for at, _ in repair.details["snapshots"]]
    assert steps == list(range(every, len(repair.log) + 1, every)) and steps
    last = repair.details["snapshots"][-1][1]
    if isinstance(last, nn.Module):
        assert last is not repair.model and not last.training
        if steps[-1] == len(repair.log):
            assert toys.same(last.state_dict(), repair.model.state_dict())
    else:
        first = repair.details["snapshots"][0][1]
        assert not toys.same(first, last)  # copies, not one tensor twice
    assert defence(net, toys.clean(80)).details["snapshots"] == []


@each_alone
def test_a_defence_is_plain_data_with_presets(defence):
    kind = type(defence)
    for preset in (kind.paper(), kind.official(), kind.small()):
        assert isinstance(preset, kind) and preset == replace(preset)
    with pytest.raises(FrozenInstanceError):
        defence.batch = 1
    assert list(inspect.signature(kind.__call__).parameters) == ["self", "model", "clean", "seed", "keep_every"]
    assert set(inspect.getdoc(kind).split("Args:")[0]) and all(f.type for f in fields(kind))


@each_alone
@pytest.mark.parametrize(
    ("model", "images", "said"),
    [
        (lambda: toys.tiny(classes=3), lambda: toys.squares(40), "tells 3 classes apart, .* squares has 4"),
        (lambda: toys.trained(), lambda: toys.coded(torch.arange(8) % 4), r"\(N, 3, H, W\).*\(1, 1, 4, 4\)"),
        (lambda: toys.trained().to("meta"), lambda: toys.squares(40), "model on meta, clean images on cpu"),
    ],
    ids=["classes", "shape", "device"],
)  # fmt: skip
def test_a_network_and_images_that_do_not_belong_together_are_refused(defence, model, images, said):
    with pytest.raises(ValueError, match=said):
        defence(model(), CleanSet(images()))


class Plain(nn.Module):
    """No BatchNorm, no linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@each_alone
def test_a_broken_network_is_refused_before_any_work(defence):
    net = toys.trained()
    net[1].bn2.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"1.bn2.weight of the network holds NaN or infinity before step 1"):
        defence(net, toys.clean())


@each_alone
def test_a_loss_that_is_no_number_stops_it_and_gives_the_last_good_state_back(defence):
    net = toys.trained()
    list(net.modules())[-1].weight.data.mul_(1e38)  # finite itself, but no logit is
    before = toys.state(net)
    with pytest.raises(Diverged, match=r"diverged at step 1: the loss is (nan|inf); lower lr, which is") as caught:
        defence(net, toys.clean())
    assert toys.unchanged(before, net) and caught.value.good == 0
    assert caught.value.state and all(bool(t.isfinite().all()) for t in caught.value.state.values())


@each_alone
def test_a_class_with_a_single_clean_image_is_refused(defence):
    images = toys.squares(80)
    lonely = (images.labels == 2).nonzero()[1:, 0]
    kept = torch.tensor([i for i in range(80) if i not in set(lonely.tolist())])
    with pytest.raises(ValueError, match=r"needs 2 clean images or more of every class, got 1 of"):
        defence(toys.trained(), CleanSet(images[kept]))


def test_a_network_without_what_a_defence_prunes_is_refused():
    with pytest.raises(ValueError, match="Plain has no BatchNorm"):
        ANP(iterations=1)(Plain(), toys.clean())
    with pytest.raises(ValueError, match="Plain has no linear layer"):
        FP()(Plain(), toys.clean())
    FT(epochs=1)(Plain(), toys.clean())  # fine-tuning asks for nothing


# ---- FT


def test_ft_is_plain_training_of_a_copy():
    net, clean = toys.trained(poisoned=True), toys.clean()
    by_hand = toys.trained(poisoned=True)
    fit(by_hand, clean.images, Recipe(2, 32, 0.02, nesterov=False, schedule="cosine"), seed=7)
    assert toys.same(QUICK_FT(net, clean, seed=7).model.state_dict(), by_hand.state_dict())


def test_ft_uses_batch_statistics_and_the_whole_clean_set():
    repair = QUICK_FT(toys.trained(), toys.clean(200))
    old, new = toys.trained()[1], repair.model[1]
    assert int(new.bn1.num_batches_tracked - old.bn1.num_batches_tracked) == 2 * 7  # 2 epochs of 200 / 32
    assert not torch.equal(new.bn1.running_mean, old.bn1.running_mean)
    assert all(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_ft_presets_are_the_benchmarks():
    assert FT.paper() == FT.official() == FT(lr=0.01, epochs=100, batch=256, momentum=0.9, weight_decay=5e-4)
    log = FT(lr=0.4, epochs=4, batch=100)(toys.trained(), toys.clean(200)).log
    assert [r["lr"] for r in log] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 8)) for k in (1, 3, 5, 7)])


def test_ft_cannot_reach_a_neuron_that_clean_images_never_move():
    """Why fine-tuning fails where the trigger's neuron is silent on clean data: no gradient arrives there."""
    net, _ = toys.planted()
    after = FT(lr=0.05, epochs=4, batch=32)(net, toys.clean()).model
    assert evaluate(after, toys.squares(200, seed=9), toys.trigger()).asr > 0.9


@pytest.mark.parametrize(("field", "value"), [("lr", -1.0), ("epochs", -1), ("batch", 0), ("momentum", 1.0)])
def test_ft_names_the_bad_value(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        FT(**{field: value})


# ---- FP


def test_activation_is_the_mean_input_of_the_last_linear_layer(device):
    net, data = toys.trained().train().to(device), toys.squares(50).to(device)
    before = toys.state(net)
    name, layer = last_linear(net)
    assert name == "1.linear"
    mean = mean_activation(net, layer, data, batch=16)
    assert toys.unchanged(before, net) and not layer._forward_pre_hooks
    body = net.eval()[1]
    h = F.relu(body.bn2(body.conv2(F.relu(body.bn1(body.conv1(net[0](data.floats)))))))
    assert torch.allclose(mean, F.adaptive_avg_pool2d(h, 2).flatten(1).mean(0), atol=1e-5)


def test_fp_prunes_the_features_that_clean_images_use_least_and_keeps_them_pruned():
    net, clean = toys.trained(poisoned=True), toys.clean()
    repair = FP(tune=FT(lr=0.2, epochs=3, batch=32, weight_decay=5e-3))(net, clean)
    d, weight = repair.details, repair.model[1].linear.weight
    activation = mean_activation(net, net[1].linear, clean.learn)
    n = d["pruned"]
    assert 0 < n < 64 and torch.equal(d["activation"], activation) and torch.equal(d["order"], activation.argsort())
    gone = torch.zeros(64, dtype=torch.bool)
    gone[activation.argsort()[:n]] = True
    assert not weight[:, gone].any()  # still zero after fine-tuning, exactly n of them
    assert (weight[:, ~gone] != net[1].linear.weight[:, ~gone]).all()  # the others were tuned
    assert type(repair.model[1].linear) is nn.Linear and "1.linear.weight" in repair.model.state_dict()


def test_fp_stops_at_the_last_count_within_the_bound_on_held_out_images():
    net, clean = toys.trained(poisoned=True), toys.clean()
    repair = FP(max_drop=0.1, step=0.03, tune=FT(epochs=0))(net, clean)
    choice, order = repair.details["choice"], repair.details["order"]
    assert [r["pruned"] for r in choice] == list(range(0, 2 * len(choice), 2))  # ceil(0.03 * 64) = 2 a step
    weight = net[1].linear.weight
    for r in choice:
        pruned = toys.trained(poisoned=True)
        pruned[1].linear.weight.data[:, order[: r["pruned"]]] = 0
        assert r["accuracy"] == pytest.approx(accuracy(pruned, clean.select))
    allowed = [r["pruned"] for r in choice if r["accuracy"] >= 0.9 * choice[0]["accuracy"] - 1e-9]
    n = repair.details["pruned"]
    assert n == max(allowed) and choice[-1]["pruned"] > n  # the one that broke the bound is not the one returned
    expected = weight.clone()
    expected[:, order[:n]] = 0
    assert torch.equal(repair.model[1].linear.weight, expected)  # the exact count, all else as it was
    assert accuracy(repair.model, clean.select) == pytest.approx(
        next(r["accuracy"] for r in choice if r["pruned"] == n)
    )


def test_fp_without_tolerance_prunes_what_costs_nothing():
    net, clean = toys.trained(poisoned=True), toys.clean()
    repair = FP(max_drop=0, tune=FT(epochs=0))(net, clean)
    assert accuracy(repair.model, clean.select) >= accuracy(net, clean.select)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_drop": 1.5}, r"max_drop must be in \[0, 1\], got 1.5"),
        ({"step": 0.0}, r"step must be in \(0, 1\], got 0"),
    ],
)
def test_fp_names_the_bad_value(arguments, said):
    with pytest.raises(ValueError, match=said):
        FP(**arguments)


def test_repaired_networks_are_scored_like_any_other():
    net = toys.trained()
    repaired = ANP(iterations=2, batch=8, threshold=-1.0)(net, toys.clean()).model
    x = toys.squares(20).images
    assert torch.equal(predict(repaired, x), predict(net, x))


# ---- any network


def shorter(defence):
    """The defence with about two steps of everything."""
    short = {
        ANP: {"iterations": 2, "batch": 4},
        FT: {"epochs": 1, "batch": 4},
        FP: {"step": 0.5, "tune": FT(epochs=1, batch=4)},
        NAD: {"teacher": Recipe(1, 4, 0.01), "student": Recipe(1, 4, 0.01), "betas": (500, 1000, 1000)},
        RNP: {"ascent": Ascent(epochs=1, batch=4), "epochs": 1, "batch": 4},
        NPD: {"epochs": 1, "batch": 4, "warm_up": 1, "layer": None},
        MNP: {"ascent": Ascent(epochs=1, batch=4), "epochs": 1, "batch": 4},
        IBAU: {"rounds": 1, "steps": 1, "batch": 4},
        FTSAM: {"epochs": 1, "batch": 4},
    }[type(defence)]
    return replace(defence, **({"threshold": 0.5} if hasattr(defence, "threshold") else {}), **short)


GREY = (0.5,) * 3
NETWORKS = {
    "small": (32, lambda: models.small(4, GREY, GREY)),
    "resnet18": (32, lambda: models.resnet18(4, GREY, GREY)),
    "preact_resnet18": (32, lambda: models.preact_resnet18(4, GREY, GREY)),
    "wide_resnet": (32, lambda: models.wide_resnet(4, GREY, GREY)),
    "vgg19_bn": (32, lambda: models.vgg19_bn(4, GREY, GREY)),
    "torchvision resnet18": (64, lambda: normalized(torchvision.models.resnet18(num_classes=4), GREY, GREY)),
    "torchvision mobilenet_v2": (64, lambda: normalized(torchvision.models.mobilenet_v2(num_classes=4), GREY, GREY)),
    "torchvision vgg11_bn": (64, lambda: normalized(light_vgg(), GREY, GREY)),
}


def light_vgg():
    """torchvision's, but for the two hidden layers of 4,096 in its classifier: 120 M weights, ten seconds a defence."""
    net = torchvision.models.vgg11_bn(num_classes=4)
    net.classifier = nn.Linear(512 * 7 * 7, 4)
    return net


@pytest.mark.parametrize("network", NETWORKS)
@each_alone
def test_every_defence_runs_on_every_network(defence, network):
    side, make = NETWORKS[network]
    net, data = make().eval(), toys.squares(8, side=side)
    before = toys.state(net)
    repair = shorter(defence)(net, CleanSet(data))
    assert toys.unchanged(before, net)
    logits = predict(repair.model, data.images)
    assert logits.shape == (8, 4) and bool(logits.isfinite().all())
