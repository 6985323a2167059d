"""A neuron is a BatchNorm channel; a mask is one factor in [0, 1] for each. ANP, RNP and MNP share these tools.

masks = ones(model)                              # {"1.bn1": (64,), ...}
soft = Soft(model)                               # a frozen copy whose channels can be scaled from outside
logits = soft(images, masks)                     # differentiable in the masks
pruned = prune(model, masks, threshold=0.2)      # a new network, gamma = 0 where mask <= 0.2
records = curve(model, masks, thresholds, test, trigger)
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.metrics import accuracy, triggered_images
from bdlib.training import evaluating, predict
from bdlib.triggers import Trigger

Masks = dict[str, Tensor]
Log = list[dict[str, float]]
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def batchnorms(model: nn.Module) -> dict[str, Norm]:
    """Every BatchNorm layer with learnable gamma and beta, by name, in the order of registration.

    Raises:
        ValueError: a network without any: it has no neurons that these methods could mask.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, Norm) and m.affine}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm layer with learnable gamma, so it has no neuron to mask; "
            "use a network with BatchNorm (resnet18, vgg19_bn ...) or a defence that does not prune, such as FT"
        )
    return found


def ones(model: nn.Module) -> Masks:
    """A mask of ones: every neuron fully present. ``{layer name: (C,)}`` on the model's device."""
    return {name: torch.ones_like(m.weight) for name, m in batchnorms(model).items()}


def flat(masks: Masks) -> Tensor:
    """All mask values as one vector ``(neurons,)``, in the order of the layers."""
    return torch.cat([m.detach().flatten() for m in masks.values()])


class Soft:
    """A frozen copy of a network whose BatchNorm channels are scaled by factors given in each call.

    ``gamma * weight_factor * x_hat + beta * bias_factor`` per channel. Nothing but the factors receives gradients, so
    the backward pass costs one forward instead of two. The original network is never touched.

    Args:
        model: any network with BatchNorm.
        batch_statistics: normalise by the statistics of the batch, as the released ANP and RNP code do (their running
            statistics drift, in the copy); else by the running statistics. Other layers, dropout included, stay in
            evaluation mode.
    """

    def __init__(self, model: nn.Module, *, batch_statistics: bool = True) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.norms = batchnorms(self.model)
        for m in self.norms.values():
            m.train(batch_statistics)

    def __call__(self, images: Tensor, weight_factor: Masks, bias_factor: Masks | None = None) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> logits ``(B, K)``."""
        scaled = {f"{name}.weight": self.norms[name].weight * f for name, f in weight_factor.items()}
        if bias_factor is not None:
            scaled |= {f"{name}.bias": self.norms[name].bias * f for name, f in bias_factor.items()}
        return torch.func.functional_call(self.model, scaled, (images,))


def prune(model: nn.Module, masks: Masks, threshold: float) -> nn.Module:
    """A copy of the network in which gamma is 0 wherever the mask is at most `threshold`; beta stays.

    The other neurons keep their gamma as it is, not gamma times mask (as in the released ANP and RNP code).

    Args:
        masks: ``{BatchNorm name: (C,)}``.
        threshold: in mask units; below 0 prunes nothing, 1 or more prunes everything.

    Layers without a mask stay whole.

    Raises:
        ValueError: masks that do not fit the network.
    """
    pruned = copy.deepcopy(model)
    norms = batchnorms(pruned)
    with torch.no_grad():
        for name, mask in masks.items():
            if name not in norms or norms[name].weight.shape != mask.shape:
                raise ValueError(f"no BatchNorm layer {name!r} with {len(mask)} channels in this network")
            norms[name].weight.masked_fill_(mask.to(norms[name].weight.device) <= threshold, 0)
    return pruned


def grid(steps: int = 20) -> list[float]:
    """Thresholds 0, 1/steps, ... 1 - 1/steps, made from integers (a floating range loses or gains one)."""
    return [i / steps for i in range(steps)]


@torch.no_grad()
def _sweep(
    model: nn.Module, masks: Masks, thresholds: Sequence[float], sets: Sequence[Tensor]
) -> tuple[list[int], list[list[Tensor]]]:
    """Predicted classes on each set of images, once per distinct pruned set of neurons.

    Returns the number of pruned neurons per threshold, and for each threshold the list of predictions.
    """
    if not thresholds:
        raise ValueError("thresholds is empty; give at least one, e.g. grid()")
    values = flat(masks)
    counts = [int(c) for c in torch.stack([(values <= t).sum() for t in thresholds]).tolist()]  # the only sync
    work = copy.deepcopy(model).eval()
    norms = batchnorms(work)
    gammas = {n: m.weight.detach().clone() for n, m in norms.items()}
    done: dict[int, list[Tensor]] = {}
    for threshold, count in zip(thresholds, counts, strict=True):
        if count in done:  # pruned sets are nested: the same size is the same set
            continue
        for name, mask in masks.items():
            norms[name].weight.copy_(gammas[name] * (mask.to(gammas[name].device) > threshold))
        done[count] = [predict(work, x).argmax(1) for x in sets]
    return counts, [done[c] for c in counts]


def curve(
    model: nn.Module, masks: Masks, thresholds: Sequence[float], test: ImageSet, trigger: Trigger
) -> list[dict[str, float]]:
    """ACC, ASR and RA against the pruning threshold. It looks at test labels and trigger: an oracle, for figures only.

    Returns:
        One record a threshold: threshold, pruned (neurons), acc, asr, ra.
    """
    images, labels = triggered_images(test, trigger)
    counts, predictions = _sweep(model, masks, thresholds, [test.images, images])
    wanted = trigger.mapping(labels)
    shares = torch.stack(
        [torch.stack([(c == test.labels).float().mean(), (t == wanted).float().mean(), (t == labels).float().mean()])
         for c, t in predictions]
    ).tolist()  # fmt: skip
    return [
        {"threshold": t, "pruned": n, "acc": acc, "asr": asr, "ra": ra}
        for t, n, (acc, asr, ra) in zip(thresholds, counts, shares, strict=True)
    ]


def clean_curve(model: nn.Module, masks: Masks, thresholds: Sequence[float], clean: ImageSet) -> list[dict[str, float]]:
    """Accuracy on the defender's own clean images against the threshold: all that a defender can know.

    Returns:
        One record a threshold: threshold, pruned (neurons), accuracy.
    """
    counts, predictions = _sweep(model, masks, thresholds, [clean.images])
    shares = torch.stack([(p == clean.labels).float().mean() for (p,) in predictions]).tolist()
    return [{"threshold": t, "pruned": n, "accuracy": a} for t, n, a in zip(thresholds, counts, shares, strict=True)]


def choose_threshold(thresholds: Sequence[float], accuracies: Sequence[float], before: float, max_drop: float) -> float:
    """The largest threshold at which clean accuracy has dropped by at most `max_drop`; -1 (prune nothing) if none.

    Args:
        accuracies: one per threshold, on held-out clean images, in [0, 1].
        before: accuracy of the unpruned network on the same images.
        max_drop: allowed drop, as a share in [0, 1] (0.02 is two points).
    """
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop must be in [0, 1] (0.02 is two points), got {max_drop}")
    fine = [t for t, a in zip(thresholds, accuracies, strict=True) if before - a <= max_drop + 1e-9]
    return max(fine, default=-1.0)


def learn_and_choose(
    model: nn.Module,
    clean: CleanSet,
    learn: Callable[[ImageSet, int], tuple[Masks, Log]],
    *,
    threshold: float | None = None,
    max_drop: float = 0.02,
    ceiling: float = 1.0,
    seed: int = 0,
) -> tuple[Masks, Log, dict[str, Any]]:
    """Learn masks on a defender's clean images and settle the threshold without a look at anything else.

    With a fixed `threshold` the masks are learnt on all images. Else they are learnt on `clean.learn` and the
    threshold is chosen on `clean.select`; a set so small that `clean.folds()` makes several folds of it learns once
    per fold, averages the clean curves, and learns the masks that count anew on all images.

    Args:
        learn: ``learn(images, seed) -> (masks, log)``; the last call is the one whose masks are returned.
        threshold: prune where mask <= threshold; None chooses it by `choose_threshold` from `grid()`.
        max_drop: when choosing, the allowed drop of clean accuracy, as a share.
        ceiling: when choosing, no threshold above this.

    Returns:
        Masks, log, and details: masks, threshold, pruned (neurons), choice (the clean curve; empty if fixed).
    """
    folds, choice = clean.folds(), []
    if threshold is None:
        sweeps, before = [], 0.0
        for k, (part, select) in enumerate(folds):
            masks, log = learn(part, seed + k)
            sweeps.append(clean_curve(model, masks, grid(), select))
            before += accuracy(model, select) / len(folds)
        choice = [
            {"threshold": t, "accuracy": sum(s[i]["accuracy"] for s in sweeps) / len(sweeps)}
            for i, t in enumerate(grid())
        ]
        low = [r for r in choice if r["threshold"] <= ceiling]
        threshold = choose_threshold([r["threshold"] for r in low], [r["accuracy"] for r in low], before, max_drop)
        if len(folds) > 1:
            masks, log = learn(clean.images, seed)
    else:
        masks, log = learn(clean.images, seed)
    pruned = int((flat(masks) <= threshold).sum())
    return masks, log, {"masks": masks, "threshold": threshold, "pruned": pruned, "choice": choice}


def magnitude(model: nn.Module) -> Masks:
    """``|gamma|`` of every neuron: how large its output is, since BatchNorm rescales whatever feeds it."""
    return {name: m.weight.detach().abs() for name, m in batchnorms(model).items()}


def saliency(model: nn.Module, data: ImageSet, *, batch: int = 500) -> Masks:
    """``|dL/dm|`` at mask 1 on the set's cross-entropy: how much the loss depends on a neuron, to first order.

    Evaluated with running statistics, without augmentation.
    """
    soft = Soft(model, batch_statistics=False)
    masks = {n: m.requires_grad_() for n, m in ones(model).items()}
    total = {n: torch.zeros_like(m) for n, m in masks.items()}
    for x, y in zip(data.images.split(batch), data.labels.split(batch), strict=True):
        loss = F.cross_entropy(soft(x.float() / 255, masks), y, reduction="sum")
        for (n, t), g in zip(total.items(), torch.autograd.grad(loss, list(masks.values())), strict=True):
            total[n] = t + g
    return {n: (t / len(data)).abs() for n, t in total.items()}


@torch.no_grad()
def trigger_activated_change(model: nn.Module, images: Tensor, trigger: Trigger, *, batch: int = 500) -> Masks:
    """How much the trigger moves each neuron: mean distance between its output maps with and without the trigger.

    ``TAC_k = mean_i || out_k(trigger(x_i)) - out_k(x_i) ||_2`` over BatchNorm outputs. It needs the trigger: a
    microscope for chapters, no part of any defence.

    Args:
        images: ``(N, C, H, W)``, uint8 or float in [0, 1].

    Returns:
        ``{layer name: (C,)}``.
    """
    norms = batchnorms(model)
    taken: Masks = {}

    def tap(name: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs, output: taken.__setitem__(name, output)

    handles = [m.register_forward_hook(tap(name)) for name, m in norms.items()]
    total = {name: torch.zeros_like(m.weight) for name, m in norms.items()}
    try:
        with evaluating(model):
            for x in images.split(batch):
                x = x.float() / 255 if x.dtype == torch.uint8 else x
                model(x)
                clean = dict(taken)
                model(trigger(x))
                for name in total:
                    total[name] += (taken[name] - clean[name]).flatten(2).norm(dim=2).sum(0)
    finally:
        for h in handles:
            h.remove()
    return {name: t / len(images) for name, t in total.items()}
