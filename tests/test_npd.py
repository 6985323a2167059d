"""NPD against its specification: the polarizer, where it goes, the made-up triggers, the losses, the traps."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torchvision
import toys
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bdlib import models
from bdlib.data.imageset import Augment, CleanSet, ImageSet
from bdlib.defenses import NPD
from bdlib.defenses.npd import Polarizer, find_layer, insert, losses, standardise, surrogate
from bdlib.metrics import accuracy, evaluate
from bdlib.models import normalized
from bdlib.training import predict

GREY = (0.5,) * 3
QUICK = NPD(bound=1.0, step=0.2, epochs=15, lr=0.05, batch=32, warm_up=0, layer="1.conv2")
ONE = toys.squares(1).floats


def pieces(model):
    """The tensors of a network without its polarizer, under their old names."""
    return {n.replace(".layer.", "."): t for n, t in model.state_dict().items() if ".polarizer." not in n}


# ---- the layer


@pytest.mark.parametrize("layer", ["1.conv2", "1.bn1", "1.bn2"])
def test_a_fresh_polarizer_is_the_identity(layer):
    net, x = toys.trained(), toys.squares(20).floats
    with_it, polarizer = insert(net, layer, ONE)
    before, after = predict(net, x), predict(with_it, x)
    assert float((after - before).abs().max()) < 1e-3 * float(before.abs().max())
    c = polarizer.conv.in_channels
    assert sum(p.numel() for p in polarizer.parameters()) == c * c + 2 * c


def test_two_polarized_networks_live_side_by_side_and_can_be_copied_saved_and_loaded():
    net, x = toys.trained(), toys.squares(8).floats
    (a, pa), (b, _) = insert(net, "1.conv2", ONE), insert(net, "1.bn2", ONE)
    with torch.no_grad():
        pa.conv.weight.mul_(0.5)
    other = copy.deepcopy(a)
    assert torch.equal(predict(other, x), predict(a, x)) and not torch.allclose(predict(b, x), predict(a, x))
    fresh = insert(toys.tiny(), "1.conv2", ONE)[0]
    fresh.load_state_dict(a.state_dict())
    assert torch.equal(predict(fresh, x), predict(a, x))
    with pytest.raises(RuntimeError):  # the bare network does not take it in silence
        toys.tiny().load_state_dict(a.state_dict())
    assert torch.equal(predict(net, x), predict(toys.trained(), x))  # the given one never noticed


@pytest.mark.parametrize(
    ("make", "side", "branch", "block"),
    [
        (lambda: models.preact_resnet18(10, GREY, GREY), 32, "1.layer4.1.conv1", "1.layer4.1"),  # as released
        (lambda: models.resnet18(10, GREY, GREY), 32, "1.layer4.1.conv1", "1.layer4.1"),
        (lambda: models.small(10, GREY, GREY), 32, "1.layer3.0.conv1", "1.layer3.0"),
        (lambda: models.wide_resnet(10, GREY, GREY), 32, "1.layer3.1.conv1", "1.layer3.1"),
        (lambda: models.vgg19_bn(10, GREY, GREY), 32, "1.features.46", "1.features.46"),
        (lambda: normalized(torchvision.models.resnet18(), GREY, GREY), 64, "1.layer4.1.conv1", "1.layer4.1"),
    ],
    ids=["preact", "resnet18", "small", "wide", "vgg", "torchvision"],
)
def test_a_place_is_found_in_every_network(make, side, branch, block):
    net, example = make(), torch.rand(1, 3, side, side)
    wide = isinstance(net[1], models.ResNet) and branch.startswith("1.layer3.1")
    if not wide or hasattr(net[1].layer3, "1"):
        assert find_layer(net, example) == branch and find_layer(net, example, "block") == block
    else:
        assert find_layer(net, example) == "1.layer3.0.conv1"


def test_a_shortcut_carries_everything_round_the_branch_and_nothing_round_the_block():
    """The trap of the released position: even a polarizer that stops everything leaves logits that depend on x."""
    net = models.preact_resnet18(10, GREY, GREY).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spread = {}
    for layer in ("1.layer4.1.conv1", "1.layer4.1"):
        with_it, polarizer = insert(net, layer, x[:1])
        with torch.no_grad():
            polarizer.conv.weight.zero_()
            logits = with_it(x)
        spread[layer] = float((logits - logits[0]).abs().max())
    assert spread["1.layer4.1.conv1"] > 1e-3 and spread["1.layer4.1"] == 0


def test_after_a_module_is_a_place_too():
    net = models.small(10, GREY, GREY).eval()
    with_it, polarizer = insert(net, "1.layer3", torch.rand(1, 3, 32, 32), after=True)
    with torch.no_grad():
        polarizer.conv.weight.zero_()
        logits = with_it(torch.rand(4, 3, 32, 32))
    assert polarizer.conv.in_channels == 256 and float((logits - logits[0]).abs().max()) == 0


def test_a_bad_place_is_named():
    with pytest.raises(ValueError, match=r"no module '1.nowhere' with a feature map .*1\.conv1"):
        insert(toys.tiny(), "1.nowhere", ONE)
    with pytest.raises(ValueError, match=r"no module '1\.linear' with a feature map"):
        insert(toys.tiny(), "1.linear", ONE)
    with pytest.raises(ValueError, match="has 1 convolutions"):
        find_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 4)), ONE)


# ---- the inner problem


def test_made_up_triggers_keep_within_the_bound_and_the_pixels():
    net, data = toys.trained(), toys.squares(40)
    for bound, step, steps in ((0.5, 0.1, 2), (2.0, 0.2, 3), (50.0, 0.1, 1)):
        changed, clean, targets = surrogate(net, data.floats, data.labels, NPD(bound=bound, step=step, steps=steps))
        size = (changed - data.floats).flatten(1).norm(dim=1)
        assert float(size.max()) <= bound + 1e-4 and float(changed.min()) >= 0 and float(changed.max()) <= 1
        assert not changed.requires_grad and clean.requires_grad and (targets != data.labels).all()


def test_a_sign_step_on_a_cifar_image_always_reaches_the_bound():
    """0.1 sqrt(3 * 32 * 32) = 5.5: one step of 0.1 leaves the ball of 3, so projection puts it on the surface."""
    assert 0.1 * math.sqrt(3 * 32 * 32) > 3
    grey = ImageSet(torch.full((4, 3, 32, 32), 128, dtype=torch.uint8), torch.arange(4), tuple("abcdefghij"), "grey")
    net = models.small(10, GREY, GREY).eval()
    changed, _, _ = surrogate(net, grey.floats, grey.labels, NPD())
    assert torch.allclose((changed - grey.floats).flatten(1).norm(dim=1), torch.tensor(3.0), atol=1e-3)


def test_the_true_class_is_never_the_target_unless_as_released():
    class Far(nn.Module):  # all other logits below the released mask of -10
        def forward(self, x):
            return torch.tensor([[5.0, -20.0, -30.0]]).expand(len(x), 3) + 0 * x.mean((1, 2, 3))[:, None]

    x, y = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    assert surrogate(Far(), x, y, NPD())[2].tolist() == [1, 1]
    assert surrogate(Far(), x, y, NPD.official())[2].tolist() == [0, 0]


def test_the_change_pushes_towards_its_target_and_stops_early_when_it_gets_there():
    net, data = toys.trained(), toys.squares(40)
    npd = NPD(bound=4.0, step=0.4)
    changed, clean, targets = surrogate(net, data.floats, data.labels, npd)

    def aimed(logits):
        return float(logits.softmax(1).gather(1, targets[:, None]).mean())

    assert aimed(predict(net, changed)) > 0.5 > aimed(clean.detach())
    once = surrogate(net, data.floats, data.labels, replace(npd, steps=1))[0]
    fooled = float((predict(net, once).argmax(1) == targets).float().mean())
    assert 0 < fooled < 1
    for enough, early in ((0.9 * fooled, True), (min(1.0, 1.1 * fooled), False)):
        at = surrogate(net, data.floats, data.labels, replace(npd, enough=enough))[0]
        assert torch.equal(once, at) == early


# ---- the outer problem


def test_the_four_terms_on_a_hand_made_example():
    clean = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    changed = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
    labels, targets = torch.tensor([0]), torch.tensor([1])
    terms = losses(clean, changed, labels, targets)
    p = changed.detach().softmax(1)[0].detach()
    expected = [
        -float(clean.detach().log_softmax(1)[0, 0]),
        -float(p[0].log()),  # towards what the network says of the clean image
        -math.log(1.0001 - float(p[2]) + 1e-12),  # the likeliest wrong class is 2
        -math.log(1.0001 - float(p[1]) + 1e-12),  # the target is 1
    ]
    assert terms.tolist() == pytest.approx(expected, rel=1e-4)
    (slope,) = torch.autograd.grad(terms[3], changed)
    moved = (changed - 0.1 * slope).detach().softmax(1)[0]
    assert float(moved[1]) < float(p[1])  # a step down lowers the probability of the target
    sure = losses(clean.detach(), torch.tensor([[0.0, 100.0, 0.0]]), labels, targets)
    assert float(sure[3]) == pytest.approx(-math.log(1e-4), rel=1e-2)  # the offset keeps it finite


# ---- the whole


def test_nothing_but_the_polarizer_is_trained_and_the_rest_is_bit_equal():
    net = toys.trained(poisoned=True)
    repair = QUICK(net, toys.clean())
    assert toys.same(pieces(repair.model), net.state_dict()) and not repair.model.training
    polarizer = repair.details["polarizer"]
    assert isinstance(polarizer, Polarizer) and repair.details["layer"] == "1.conv2"
    assert not torch.equal(polarizer.conv.weight[:, :, 0, 0], torch.eye(8))
    assert {n for n, p in repair.model.named_parameters() if p.requires_grad} == {
        f"1.conv2.polarizer.{n}" for n, _ in polarizer.named_parameters()
    }


def test_the_backdoor_goes_and_it_takes_the_adversarial_terms():
    net, test, trigger = toys.trained(poisoned=True), toys.squares(200, seed=9), toys.trigger()
    after = evaluate(QUICK(net, toys.clean()).model, test, trigger)
    control = evaluate(replace(QUICK, weights=(1, 0, 0, 0))(net, toys.clean()).model, test, trigger)
    assert after.asr < 0.1 and after.acc > 0.95 and control.asr > 0.9


def test_the_polarizer_is_the_mean_of_the_last_epochs_or_the_last():
    net, clean = toys.trained(poisoned=True), toys.clean()
    layers = {}
    for average in (1, 2, 9):
        repair = replace(QUICK, epochs=3, average=average)(net, clean, keep_every=1)
        layers[average] = repair.details["polarizer"].state_dict()
        inside = {n.split("polarizer.")[1]: t for n, t in repair.model.state_dict().items() if "polarizer." in n}
        assert toys.same(inside, layers[average])  # the network that is returned carries the mean
        steps = [s.state_dict() for _, s in repair.details["snapshots"]]
    place = next(n for n in steps[0] if n.endswith("polarizer.conv.weight"))
    for average, of in {1: steps[-1:], 2: steps[-2:], 9: steps}.items():  # fewer epochs than asked for: all
        mean = torch.stack([s[place] for s in of]).mean(0)
        assert torch.allclose(layers[average]["conv.weight"], mean, atol=1e-7), average
    assert torch.equal(layers[1]["conv.weight"], steps[-1][place])


def test_the_released_warm_up_standardises_and_the_other_keeps_the_identity():
    """In train mode BatchNorm replaces every channel by its z-score while lr 1e-4 hardly trains."""
    net, clean = toys.trained(), toys.clean()
    kept = replace(QUICK, warm_up=5, epochs=0)(net, clean)
    assert kept.details["warm_accuracy"] > accuracy(net, clean.images) - 0.02
    x = toys.squares(50).floats
    with_it, polarizer = insert(net, "1.conv2", ONE)
    standardise(with_it, polarizer, clean.images)
    assert torch.allclose(predict(with_it, x), predict(net, x), atol=1e-3 * float(predict(net, x).abs().max()))
    assert float(polarizer.bn.running_var.max()) > 0
    released = replace(QUICK, warm_up=5, epochs=0, keep_identity=False)(net, clean)
    features = []
    handle = released.details["polarizer"].register_forward_hook(lambda m, i, o: features.append((i[0], o)))
    released.model(clean.images.floats)
    handle.remove()
    (before, after), live = features[0], features[0][0].std((0, 2, 3)) > 1e-3
    assert not torch.allclose(before.mean((0, 2, 3))[live], after.mean((0, 2, 3))[live], atol=0.05)
    assert float(after.mean((0, 2, 3))[live].abs().max()) < float(before.mean((0, 2, 3))[live].abs().max())


def test_a_step_costs_less_than_seven_forwards():
    net = models.preact_resnet18(10, GREY, GREY)
    data = ImageSet(torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8), tuple("abcdefghij"), "x")
    with FlopCounterMode(display=False) as once:
        predict(net, data.images)
    repaired, _ = insert(net, find_layer(net, data.floats[:1]), data.floats[:1])
    with FlopCounterMode(display=False) as step:
        # the counter's hooks refuse gradients of a module's own input, so the network gets a copy of it
        changed, logits, targets = surrogate(lambda x: repaired(x + 0), data.floats, data.labels, NPD())
        losses(logits, repaired(changed), data.labels, targets).sum().backward()
    assert step.get_total_flops() <= 6.7 * once.get_total_flops()


def test_nothing_waits_for_the_device_inside_a_step():
    net, data = toys.trained(), toys.squares(16)
    with toys.Waits() as counter:
        changed, logits, targets = surrogate(net, data.floats, data.labels, NPD())
        losses(logits, net(changed), data.labels, targets).sum().backward()
    assert counter.count == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bound": 0.0}, "bound must be above 0, got 0"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"weights": (1.0, 1.0)}, r"weights must be four numbers of 0 or more, got \(1.0, 1.0\)"),
        ({"enough": 2.0}, r"enough must be in \[0, 1\], got 2"),
        ({"average": 0}, "average must be 1 or more, got 0"),
        ({"place": "stem"}, "place must be branch or block, got 'stem'"),
    ],
)
def test_a_bad_value_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        NPD(**arguments)


def test_clean_images_are_taken_as_they_are_unless_asked(monkeypatch):
    """The released code trains on the test transform; `augmented` goes through the images' own augmentation."""
    seen, trained = [], []

    def spy(images, spec, generator):
        seen.append((len(images), spec))
        return images.flip(3) if spec.pad else images

    def look(model, images, *rest):
        trained.append(images)
        return surrogate(model, images, *rest)

    monkeypatch.setattr("bdlib.defenses.rnp.augment", spy)
    monkeypatch.setattr("bdlib.defenses.npd.surrogate", look)
    net, clean = toys.trained(), CleanSet(toys.squares(40, augment=Augment(pad=1)))
    for augmented in (False, True):
        replace(QUICK, epochs=1, augmented=augmented)(net, clean)
    # one epoch of forty in batches of 32 each
    assert seen == [(n, spec) for spec in (Augment(), clean.images.augment) for n in (32, 8)]
    plain, flipped = torch.cat(trained[:2]), torch.cat(trained[2:])
    assert torch.equal(plain.flip(3), flipped) and not torch.equal(plain, flipped)  # what augmentation gives is used
    assert not NPD.paper().augmented and not NPD.official().augmented and NPD.small().augmented
