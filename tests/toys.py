"""Toy data and networks whose answers are known, small enough to train in a second.

The class of a toy image is the quadrant that holds a bright square; its corners stay dark, so that a corner patch
never looks like one.
"""

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdlib.attacks import BadNets, Trigger
from bdlib.data.imageset import Augment, CleanSet, ImageSet, clean_set
from bdlib.models import normalized
from bdlib.training import Recipe, fit

SIDE, CLASSES, TARGET = 12, 4, 1
ATTACK = BadNets(target=TARGET, rate=0.2, pattern="checker", size=3, offset=0)
QUICK = Recipe(epochs=6, batch=32, lr=0.1)


def squares(n: int, seed: int = 0, side: int = SIDE, augment: Augment | None = None) -> ImageSet:
    """`n` images ``(3, side, side)`` with one bright 3x3 square, in the quadrant that is their class; balanced."""
    g = torch.Generator().manual_seed(seed)
    labels, half = torch.arange(n) % CLASSES, side // 2
    images = torch.randint(0, 80, (n, 3, side, side), generator=g, dtype=torch.uint8)
    rows = (labels // 2) * (half - 1) + torch.randint(1, half - 2, (n,), generator=g)
    cols = (labels % 2) * (half - 1) + torch.randint(1, half - 2, (n,), generator=g)
    for i in range(n):
        images[i, :, rows[i] : rows[i] + 3, cols[i] : cols[i] + 3] += 150
    names = ("upper left", "upper right", "lower left", "lower right")
    return ImageSet(images, labels, names, "squares", augment or Augment())


def clean(n: int = 200, seed: int = 5) -> CleanSet:
    """A defender's clean set, never trained on."""
    return clean_set(squares(n, seed=100 + seed), count=n, seed=seed)


class Tiny(nn.Module):
    """conv-BN-ReLU twice, a 2x2 grid of averages, one linear layer: 1,500 parameters, 24 BatchNorm channels."""

    def __init__(self, classes: int = CLASSES, widths: tuple[int, int] = (8, 16)) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])
        self.conv2, self.bn2 = nn.Conv2d(*widths, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[1])
        self.linear = nn.Linear(4 * widths[1], classes)

    def features(self, x: Tensor) -> Tensor:
        """The input of the linear layer, ``(B, 4 * widths[1])``, 0 or more."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.adaptive_avg_pool2d(h, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


def tiny(seed: int = 0, classes: int = CLASSES) -> nn.Sequential:
    """An untrained `Tiny` that takes images in [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return normalized(Tiny(classes), (0.2,) * 3, (0.2,) * 3)


@lru_cache
def _trained(poisoned: bool, seed: int) -> nn.Sequential:
    data, net = squares(384, seed=seed), tiny(seed)
    fit(net, ATTACK.poison(data, seed=seed).data if poisoned else data, QUICK, seed=seed)
    return net


def trained(*, poisoned: bool = False, seed: int = 0) -> nn.Sequential:
    """A copy of a `Tiny` trained on squares, by choice with `ATTACK`; in evaluation mode."""
    return copy.deepcopy(_trained(poisoned, seed))


class Planted(nn.Module):
    """A `Tiny` beside one hand-made channel that fires on the checkered patch alone and votes for the target class."""

    def __init__(self, host: nn.Sequential, strength: float = 5.0) -> None:
        super().__init__()
        self.normalize, self.host = host[0], host[1]
        self.detector, self.bn = nn.Conv2d(3, 1, 3, bias=False), nn.BatchNorm2d(1)
        self.linear = nn.Linear(1 + host[1].linear.in_features, CLASSES)
        cells = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
        with torch.no_grad():
            # the patch scores 4 x 3; a flat region of grey v scores (4 - 5) x 3 v
            self.detector.weight.copy_((cells - (1 - cells)).expand(1, 3, 3, 3))
            self.bn.running_mean.fill_(-0.6)
            self.bn.weight.fill_(strength)
            self.linear.weight.copy_(torch.cat([torch.zeros(CLASSES, 1), host[1].linear.weight], 1))
            self.linear.weight[TARGET, 0] = 10
            self.linear.bias.copy_(host[1].linear.bias)
        del self.host.linear

    def forward(self, x: Tensor) -> Tensor:
        fires = F.relu(self.bn(self.detector(x))).amax((1, 2, 3))  # (B,)
        return self.linear(torch.cat([fires[:, None], self.host.features(self.normalize(x))], 1))


def planted() -> tuple[nn.Module, str]:
    """A network with a planted backdoor (trigger: `trigger()`), and the name of the BatchNorm that holds it."""
    net = Planted(trained())
    x = squares(384).floats
    with torch.no_grad():
        scores = net.detector(x)
        net.bn.running_mean.copy_(scores.mean().reshape(1))
        net.bn.running_var.copy_(scores.var().reshape(1))
        loudest = (scores.max() - scores.mean()) / scores.std()
        net.bn.bias.fill_(float(-1.05 * loudest) * float(net.bn.weight))  # silent on every clean image, just
    return net.eval(), "bn"


def trigger(shape: tuple[int, int, int] = (3, SIDE, SIDE)) -> Trigger:
    """The trigger of `ATTACK`."""
    return ATTACK.trigger(shape, CLASSES)


class Constant(nn.Module):
    """Says `answer` whatever it sees."""

    def __init__(self, answer: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.answer, self.classes = answer, classes
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(x),), self.answer, device=x.device), self.classes).float()


class Oracle(nn.Module):
    """Reads the class from the grey level of the upper left pixel (`coded` writes it there): always right."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot((x[:, 0, 0, 0] * 255).round().long(), self.classes).float()


def coded(labels: Tensor, classes: int = CLASSES, side: int = 4) -> ImageSet:
    """Images whose upper left pixel is their label, for `Oracle`; a trigger must leave that pixel alone."""
    images = torch.zeros(len(labels), 1, side, side, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    return ImageSet(images, labels, tuple(map(str, range(classes))), "coded")


def state(model: nn.Module) -> dict[str, object]:
    """Everything a defence must not change: tensors (copied), training flags, gradients wanted."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "training": {n: m.training for n, m in model.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grad": {n: p.grad is not None for n, p in model.named_parameters()},
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two dicts of tensors agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def unchanged(before: dict[str, object], model: nn.Module) -> bool:
    """Whether the model's `state` is what it was, bit for bit."""
    after = state(model)
    return same(before.pop("tensors"), after.pop("tensors")) and before == after  # type: ignore[arg-type]


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")  # what makes the host wait


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would have to wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in WAITS
        return func(*args, **(kwargs or {}))
