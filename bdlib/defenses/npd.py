"""NPD: neural polarizer defence (Zhu et al., NeurIPS 2023).

repair = NPD.small()(model, clean, seed=0)
repair.model, repair.details["layer"]        # the network with one small layer put in; nothing else of it has changed
"""

import copy
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from bdlib.checks import require
from bdlib.data.imageset import Augment, CleanSet, ImageSet
from bdlib.defenses.base import Repair, check_inputs, seeded
from bdlib.defenses.rnp import batches
from bdlib.metrics import accuracy
from bdlib.training import evaluating
from bdlib.watch import Watch


class Polarizer(nn.Module):
    """A 1x1 convolution and a BatchNorm, both the identity at the start: C^2 + 2 C parameters.

    Args:
        channels: of the feature map ``(B, C, H, W)`` that it filters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # no random start: it would be overwritten, and leave a trace in the caller's random state
        self.conv = nn.utils.skip_init(nn.Conv2d, channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels)[:, :, None, None])

    def forward(self, features: Tensor) -> Tensor:
        return self.bn(self.conv(features))


def find_layer(model: nn.Module, example: Tensor, place: Literal["branch", "block"] = "branch") -> str:
    """Where the polarizer goes if nobody says: before the last but one convolution, projections on shortcuts apart.

    In the PreAct-ResNet-18 of the released code that is ``layer4.1.conv1``, on the residual branch: what the shortcut
    carries round it is never filtered. ``"block"`` takes the input of the whole residual block instead.

    Args:
        example: one image ``(1, C, H, W)`` in [0, 1].

    Raises:
        ValueError: fewer than two convolutions.
    """
    convs = [n for n, (module, _) in _inputs(model, example).items() if isinstance(module, nn.Conv2d)]
    convs = [n for n in convs if not any(word in n for word in ("shortcut", "downsample"))]
    if len(convs) < 2:
        found = f"{type(model).__name__} has {len(convs)} convolutions"
        raise ValueError(f"{found}, and the polarizer goes before the last but one; name a layer")
    layer = convs[-2]
    parent = layer.rpartition(".")[0]
    is_block = parent and not isinstance(model.get_submodule(parent), nn.Sequential)
    return parent if place == "block" and is_block else layer


def insert(model: nn.Module, layer: str, example: Tensor, *, after: bool = False) -> tuple[nn.Module, Polarizer]:
    """A copy of the network with a polarizer before (or `after`) the module called `layer`, everything else frozen.

    Returns:
        The copy, in evaluation mode, in which `layer` has become ``Sequential(polarizer, layer)``, and the polarizer.

    Raises:
        ValueError: no such module, or one whose input is no feature map.
    """
    inputs = _inputs(model, example, outputs=after)
    if layer not in inputs or inputs[layer][1] is None:
        raise ValueError(
            f"no module {layer!r} with a feature map (B, C, H, W) to filter; there are: {', '.join(inputs)}"
        )
    out = copy.deepcopy(model).eval().requires_grad_(False)
    polarizer = Polarizer(int(inputs[layer][1])).to(example.device).eval()  # type: ignore[arg-type]
    parent, _, name = layer.rpartition(".")
    inner = out.get_submodule(layer)
    pair = [("polarizer", polarizer), ("layer", inner)]
    setattr(out.get_submodule(parent), name, nn.Sequential(OrderedDict(pair[::-1] if after else pair)).eval())
    return out, polarizer


def surrogate(model: nn.Module, images: Tensor, labels: Tensor, npd: "NPD") -> tuple[Tensor, Tensor, Tensor]:
    """A made-up trigger for every image: the small change that pushes it most towards the class it is nearest to.

    ``min CE(f(x + d), T) with ||d||_2 <= bound``, by steps along the sign of the gradient and projection; T is the
    class other than the true one that the current network finds likeliest. It starts from d = 0, so the forward pass
    on the clean images serves the first step too.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)`` true classes.

    Returns:
        The changed images, clipped to [0, 1] and detached; the logits on the clean ones ``(B, K)``, with gradients to
        the polarizer; the targets T ``(B,)``.
    """
    x = images.detach().requires_grad_()
    clean = logits = model(x)
    masked = clean.detach().scatter(1, labels[:, None], npd.mask)
    targets = masked.argmax(1)  # (B,)
    delta = torch.zeros_like(images)
    for k in range(npd.steps):
        if k:
            x = (images + delta).requires_grad_()
            logits = model(x)
        loss = F.cross_entropy(logits, targets, reduction="none").clamp(-80, 80).mean()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=k == 0)
        moved = delta - npd.step * gradient.sign()
        norm = moved.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        moved = moved * (npd.bound / norm).clamp(max=1)
        # the released code leaves the loop once most of the batch is fooled; the same without waiting for the device
        fooled = (logits.detach().argmax(1) == targets).float().mean() > npd.enough
        delta = torch.where(fooled & (k > 0), delta, moved)
    return (images + delta).clamp(0, 1).detach(), clean, targets


def losses(clean: Tensor, changed: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The four terms of the outer problem, ``(4,)``: clean, kept, boosted, escaped.

    Args:
        clean, changed: logits ``(B, K)`` on clean and on changed images.
        labels, targets: ``(B,)`` true classes, and the classes that the changes aim at.

    Returns:
        ``CE(clean, y)``; ``CE(changed, argmax clean)``; ``-log(1 - p_j)`` for the likeliest wrong class j of the
        changed image; ``-log(1 - p_T)``. The logarithms are of ``1.0001 - p``, so none exceeds 9.3.
    """
    p = changed.softmax(1)
    wrong = p.scatter(1, labels[:, None], -1.0).amax(1)
    aimed = p.gather(1, targets[:, None])[:, 0]
    return torch.stack(
        [
            F.cross_entropy(clean, labels),
            F.cross_entropy(changed, clean.detach().argmax(1)),
            -(1.0001 - wrong + 1e-12).log().mean(),
            -(1.0001 - aimed + 1e-12).log().mean(),
        ]
    )


@dataclass(frozen=True)
class NPD:
    """Put one small layer into the network and train it, alone, to pass what is clean and stop what pushes.

    The network is frozen. The layer starts as the identity and learns on clean images and on images that carry a
    made-up trigger each (`surrogate`): to keep the prediction of the clean image and to lower the probability of the
    class that the change aims at (`losses`). Introduced in chapter "NPD"; source: BackdoorBench @ f02e353, where the
    authors released it; of the paper only the abstract and introduction were readable, none of its tables.

    Args:
        bound: largest 2-norm of a change, in pixel values of [0, 1], above 0 (3 moves a CIFAR image's pixels by 0.054
            on average).
        step, steps: of the inner problem.
        enough: share of a batch that has to be fooled for the inner problem to end early, in [0, 1].
        weights: of the four terms in `losses`.
        epochs, lr, batch, momentum, weight_decay: of SGD on the polarizer, at a constant rate; the decay pulls towards
            0, as released, and not towards the identity.
        warm_up: epochs on clean images alone before, at a rate of 1e-4.
        keep_identity: set the polarizer's BatchNorm from one pass so that it stays the identity. False is the released
            warm-up in train mode: it standardises every channel and hardly trains, so accuracy falls before the work
            starts.
        layer: name of the module before which the polarizer goes; None finds one, see `find_layer`.
        place: "branch" (as released; the shortcut carries everything round it) or "block", for `find_layer`.
        mask: what replaces the logit of the true class when the target is chosen: minus infinity, or -10 as released,
            under which the true class itself can be "chosen".
        augmented: crop and shift the clean images as in training (this book's; the released code does not).
        average: the polarizer that is kept is the mean of those after the last so many epochs, 1 or more. (This book's,
            after izmailov2018averaging; the released code keeps the last, 1. At a constant rate it goes on jumping.)
    """

    bound: float = 3.0
    step: float = 0.1
    steps: int = 2
    enough: float = 0.6
    weights: tuple[float, float, float, float] = (1.0, 0.4, 0.4, 0.4)
    epochs: int = 50
    lr: float = 0.01
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warm_up: int = 5
    keep_identity: bool = True
    layer: str | None = None
    place: Literal["branch", "block"] = "branch"
    mask: float = float("-inf")
    augmented: bool = False
    average: int = 1

    def __post_init__(self) -> None:
        checks = {
            "bound": (self.bound > 0, "above 0"),
            "step": (self.step >= 0, "0 or more"),
            "steps": (self.steps >= 1, "1 or more"),
            "enough": (0 <= self.enough <= 1, "in [0, 1]"),
            "weights": (len(self.weights) == 4 and min(self.weights) >= 0, "four numbers of 0 or more"),
            "epochs": (self.epochs >= 0, "0 or more"),
            "warm_up": (self.warm_up >= 0, "0 or more"),
            "batch": (self.batch >= 2, "2 or more"),
            "lr": (self.lr >= 0, "0 or more"),
            "average": (self.average >= 1, "1 or more"),
            "place": (self.place in ("branch", "block"), "branch or block"),
        }
        require(self, checks)

    @classmethod
    def paper(cls) -> "NPD":
        """The released settings for CIFAR-10 with their faults mended: identity kept, true class never a target.

        The paper's own settings were not readable.
        """
        return cls()

    @classmethod
    def official(cls) -> "NPD":
        """The released code as it runs on CIFAR-10: warm-up in train mode, a mask of -10."""
        return cls(keep_identity=False, mask=-10.0)

    @classmethod
    def small(cls) -> "NPD":
        """For the book's small network: signs differ by small symbols, so a smaller bound.

        Augmented images and the mean of the last 14 epochs cost a network that was never attacked less. Both were tried
        after two other settings had been seen to fail on seeds 3 to 5. The bound was then settled on seeds 0 to 2 and
        6 to 8: the largest of 0.7 to 1 at which what such networks lose, mean and two standard deviations, is at most
        three points. On seed 4 it is 3.2 all the same, see chapter "NPD".
        """
        return cls(bound=0.8, epochs=28, lr=0.05, batch=64, warm_up=0, place="block", augmented=True, average=14)

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Insert a polarizer and train it on all clean images: NPD chooses no threshold.

        Args:
            model: any network with two convolutions or more; it is not changed.
            clean: the defender's images.
            seed: of the batches.
            keep_every: keep a copy of the repaired network every so many epochs in ``details["snapshots"]``.

        Returns:
            `Repair` with one record an epoch (epoch, clean, kept, boosted, escaped: see `losses`) and details:
            polarizer, layer, warm_accuracy (on the clean images after the warm-up), snapshots ``[(epoch, network)]``.

        Raises:
            ValueError: no place for the polarizer; inputs that `check_inputs` refuses; `Diverged`, with the polarizer's
                last good state.
        """
        check_inputs(model, clean)
        start, images = time.perf_counter(), clean.images
        example = images.floats[:1]
        layer = self.layer if self.layer is not None else find_layer(model, example, self.place)
        repaired, polarizer = insert(model, layer, example)
        generator = seeded(example.device, seed)
        drawn = images if self.augmented else replace(images, augment=Augment())
        if self.keep_identity:
            standardise(repaired, polarizer, images)
        watch = Watch("NPD", polarizer.state_dict(), f"lower lr, which is {self.lr}")
        warm = torch.optim.SGD(polarizer.parameters(), lr=1e-4)
        polarizer.train(not self.keep_identity)
        for _ in range(self.warm_up):
            for x, y in batches(drawn, self.batch, generator):
                warm.zero_grad()
                loss = F.cross_entropy(repaired(x), y)
                loss.backward()
                warm.step()
                watch(loss)
        polarizer.eval()
        details: dict[str, Any] = {"layer": layer, "warm_accuracy": accuracy(repaired, images), "snapshots": []}
        opt = torch.optim.SGD(
            polarizer.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        weights = torch.tensor(self.weights, device=example.device)
        sums = torch.zeros(self.epochs, 4, device=example.device)
        averaged = AveragedModel(polarizer)
        for epoch in tqdm(range(self.epochs), desc="NPD", leave=False):
            parts = batches(drawn, self.batch, generator)
            for x, y in parts:
                changed, logits, targets = surrogate(repaired, x, y, self)
                terms = losses(logits, repaired(changed), y, targets)
                opt.zero_grad()
                loss = (weights * terms).sum()
                loss.backward()
                opt.step()
                watch(loss)
                sums[epoch] += terms.detach() / len(parts)
            watch.look()
            if epoch >= self.epochs - self.average:
                averaged.update_parameters(polarizer)
            if keep_every and (epoch + 1) % keep_every == 0:
                details["snapshots"].append((epoch + 1, copy.deepcopy(repaired)))
        polarizer.load_state_dict(averaged.module.state_dict())
        names = ("clean", "kept", "boosted", "escaped")
        log = [{"epoch": e + 1, **dict(zip(names, row, strict=True))} for e, row in enumerate(sums.tolist())]
        return Repair(repaired, log, {**details, "polarizer": polarizer}, time.perf_counter() - start)


@torch.no_grad()
def standardise(model: nn.Module, polarizer: Polarizer, images: ImageSet) -> None:
    """Set the polarizer's running statistics to those of its input, gamma and beta so that it stays the identity."""
    taken: list[Tensor] = []
    handle = polarizer.conv.register_forward_hook(lambda module, inputs, output: taken.append(output))
    try:
        with evaluating(model):
            model(images.floats)
    finally:
        handle.remove()
    bn, values = polarizer.bn, taken[0]
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
    bn.running_mean.copy_(mean)  # type: ignore[union-attr]
    bn.running_var.copy_(var)  # type: ignore[union-attr]
    bn.weight.copy_((var + bn.eps).sqrt())
    bn.bias.copy_(mean)


def _inputs(model: nn.Module, example: Tensor, outputs: bool = False) -> dict[str, tuple[nn.Module, int | None]]:
    """Every module in the order of use, with the channels of its input (or output) if that is a feature map."""
    found: dict[str, tuple[nn.Module, int | None]] = {}

    def tap(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output if outputs else inputs[0]
            found[name] = (module, value.shape[1] if isinstance(value, Tensor) and value.ndim == 4 else None)

        return hook

    handles = [m.register_forward_hook(tap(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
