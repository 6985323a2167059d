"""What a GPU's clock would show, on a machine without one: arithmetic a step, copies to the host, batches against PIL.

Bounds of arithmetic are in forward passes F of the same images: a step that optimises the weights takes 3, one that
optimises masks in a frozen network 2 for each loss, and the surrogate of NPD a forward and a gradient a step.
"""

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import pytest
import torch
import toys
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bdlib import models
from bdlib.data.imageset import Augment, CleanSet, ImageSet
from bdlib.defenses.anp import ANP
from bdlib.defenses.mnp import MNP
from bdlib.defenses.nad import NAD
from bdlib.defenses.npd import NPD
from bdlib.defenses.rnp import RNP, Ascent
from bdlib.flops import STAGES, flops, stage_flops
from bdlib.training import Recipe, augment, fit, predict
from bdlib.usual import PerSample

GREY = (0.5,) * 3
IMAGES = 4
PAPER = {d.__name__: d.paper() for d in (ANP, RNP, NPD, NAD, MNP)}
# stage, forwards a step: the fewest that the method allows (less 0.1 for the first convolution), and the gate
GATES = [
    ("ANP", "masks", 5.9, 6.1),  # ascent, robust and natural loss: a forward and a gradient of the inside each
    ("RNP", "unlearn", 2.9, 3.0),
    ("RNP", "recover", 1.9, 2.1),
    ("NPD", "warm-up", 1.1, 1.5),  # a forward, and back through the tail behind the polarizer
    ("NPD", "polarize", 6.0, 6.7),
    ("NAD", "teacher", 2.9, 3.0),
    ("NAD", "student", 3.9, 4.1),  # one forward of the teacher beside a training step
    ("MNP", "suppress", 2.9, 3.0),
    ("MNP", "masks", 3.8, 4.1),  # two networks under one set of masks
]


def noise(count: int = IMAGES, classes: int = 2) -> ImageSet:
    images = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, tuple("abcdefghij"[:classes]), "noise")


@pytest.fixture(scope="module")
def big():
    """PreAct-ResNet-18, and the operations of its forward pass over `IMAGES` images."""
    net = models.preact_resnet18(2, GREY, GREY).eval()
    return net, flops(lambda: predict(net, noise().images))


# ---- arithmetic


def test_operations_are_those_of_the_reference_counter(big):
    net, forward = big
    with FlopCounterMode(display=False) as reference:
        predict(net, noise().images)
    assert forward == reference.get_total_flops() == pytest.approx(IMAGES * 1.1108e9, rel=1e-3)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    assert flops(lambda: net(x).sum().backward()) == pytest.approx(3 * forward / 2, rel=0.01)  # weights and input
    assert flops(lambda: torch.ones(5, 7) @ torch.ones(7, 3)) == 2 * 5 * 7 * 3


def test_every_stage_of_every_defence_has_a_gate():
    assert {(name, stage) for name, stage, *_ in GATES} == {(n, stage) for n in STAGES for stage in STAGES[n]}


@pytest.mark.parametrize(("name", "stage", "least", "most"), GATES)
def test_a_step_costs_no_more_than_the_method_asks_for(name, stage, least, most, big):
    net, forward = big
    defence = replace(PAPER[name], batch=IMAGES) if name == "ANP" else PAPER[name]  # the others take what there is
    if hasattr(defence, "threshold"):
        defence = replace(defence, threshold=0.2)  # learns on all four images
    cost = stage_flops(defence, stage, net, CleanSet(noise())) / forward
    assert least <= cost <= most, f"{name} {stage}: {cost:.2f} forwards a step"


def test_a_training_step_costs_three_forwards(big):
    net, forward = big
    assert 2.9 <= flops(lambda: fit(net, noise(), Recipe(1, IMAGES))) / forward <= 3
    net.eval()


# ---- copies to the host

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")


class Waits(toys.Waits):
    """Also sees a boolean index, which looks for its ones on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0].startswith("index") and isinstance(args[1], list | tuple):
            self.count += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return super().__torch_dispatch__(func, types, args, kwargs)


class Copies(ExitStack):
    """Counts what brings a number from the device to the host: calls on tensors, and the operations underneath."""

    def __enter__(self):
        super().__enter__()
        self.calls, self.waits = Counter(), self.enter_context(Waits())
        for name in READS:
            self.enter_context(patch.object(Tensor, name, self.counting(name)))
        return self

    def counting(self, name):
        original = getattr(Tensor, name)

        def call(tensor, *args, **kwargs):
            self.calls[name] += 1
            return original(tensor, *args, **kwargs)

        return call

    def total(self):
        return {**self.calls, "operations": self.waits.count}


def copies(work):
    with Copies() as counter:
        work()
    return counter.total()


def test_the_counter_sees_every_way_to_read_a_tensor():
    x = torch.tensor([1.0, 2.0])
    ways = {
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "numpy": lambda: x.numpy(),
        "__bool__": lambda: not x[0],
        "__float__": lambda: float(x[0]),
        "__int__": lambda: int(x[0]),
        "__index__": lambda: [0, 1, 2][torch.tensor(1)],
        "operations": lambda: x[x > 1],
    }
    for name, way in ways.items():
        assert copies(way).get(name, 0) >= 1, name
    assert copies(lambda: (x * 2).sum()) == {"operations": 0}

    def loop(steps):
        return copies(lambda: sum(x[0].item() for _ in range(steps)))

    assert loop(8)["item"] - loop(4)["item"] == 4
    assert Tensor.item is torch._C.TensorBase.item  # and is gone afterwards


def loop(name, steps):
    """One epoch (for ANP: a run) of so many steps on the same 64 images."""
    data, net, size = toys.squares(64, augment=Augment(1, True, 2)), toys.trained(), 64 // steps
    clean, one = CleanSet(data), Recipe(1, size)
    return {
        "fit": lambda: fit(net, data, one),
        "ANP": lambda: ANP(iterations=steps, batch=8).learn(net, data),
        "unlearn": lambda: Ascent(epochs=1, batch=size)(net, data),
        "recover": lambda: RNP(epochs=1, batch=size).recover(net, data),
        "NPD": lambda: NPD(epochs=1, warm_up=1, batch=size)(net, clean),
        "NAD": lambda: NAD(one, one)(net, clean),
        "MNP": lambda: MNP(Ascent(epochs=1, batch=size), epochs=1, batch=size).learn(net, net, data),
    }[name]


@pytest.mark.parametrize("name", ["fit", "ANP", "unlearn", "recover", "NPD", "NAD", "MNP"])
def test_nothing_comes_to_the_host_inside_a_step(name):
    few, many = (copies(loop(name, steps)) for steps in (4, 8))
    assert few == many


def test_the_look_for_nan_comes_to_the_host_once_in_fifty_steps():
    def reads(iterations):
        return copies(lambda: ANP(eps=0, iterations=iterations, batch=4).learn(toys.tiny(), toys.squares(16)))

    short, once, twice = reads(49), reads(51), reads(101)  # each ends with one look more
    look = {k: once[k] - short[k] for k in once}
    assert look["tolist"] == look["__bool__"] == 1
    assert {k: twice[k] - once[k] for k in once} == look


# ---- batches against one picture at a time


def test_a_batched_crop_is_four_times_as_fast_as_pil():
    pytest.importorskip("torchvision")
    spec, count, generator = Augment(pad=4, flip=True), 1024, torch.Generator().manual_seed(0)
    data, threads = noise(count, 10), torch.get_num_threads()
    pictures = PerSample(data, spec)

    def batched():
        for x in data.images.split(128):
            augment(x, spec, generator).float().div(255)

    def singly():
        for i in range(count):
            pictures[i]

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    torch.set_num_threads(1)
    try:
        seconds(batched), seconds(singly)  # warm
        ratios = [seconds(singly) / seconds(batched) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert median(ratios) >= 4, f"{ratios} times"
