"""MNP: magnitude-based neuron pruning (Li, Jiang & Yi, arXiv 2405.17750, 2024), in part a reconstruction.

repair = MNP.small()(model, clean, seed=0)
correlation(model, clean.images)             # {layer: Spearman's rho of magnitude and saliency}

What is known: the objective of clean suppression whole, that of the weight penalty in form, clean preserving in words
(all second hand), and that masks are learnt with these objectives before neurons are pruned. How they are coupled and
normalised, every number, and the statistic of the detector were not found: they are this book's reconstruction, and
marked as such below.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.checks import require
from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.defenses.base import Repair, check_inputs
from bdlib.defenses.rnp import Ascent, fit_masks
from bdlib.neurons import Log, Masks, Soft, batchnorms, learn_and_choose, ones, prune
from bdlib.neurons import saliency as absolute_saliency
from bdlib.training import evaluating

Magnitude = Literal["filter", "folded", "gamma"]


def magnitude(model: nn.Module, example: Tensor, kind: Magnitude = "filter", *, relative: bool = False) -> Masks:
    """How large a neuron is.

    "filter" is the 1-norm of the convolution's filter that feeds the BatchNorm channel, the literal reading of the
    method. BatchNorm undoes any rescaling of that filter, so two others stand beside it: "folded" (gamma / sigma times
    that norm, the filter that a network without BatchNorm would have) and "gamma". A channel that no convolution feeds
    (pre-activation networks) has its ``|gamma|`` in all three.

    Args:
        example: one image ``(1, C, H, W)``, to see which convolution feeds which BatchNorm.
        relative: divide by the mean of the layer, so that deep layers with their larger filters do not pay most.

    Returns:
        ``{layer: (C,)}``, 0 or more.

    Raises:
        ValueError: an unknown kind; a network without BatchNorm.
    """
    if kind not in ("filter", "folded", "gamma"):
        raise ValueError(f"kind must be filter, folded or gamma, got {kind!r}")
    feeds, out = feeders(model, example), {}
    for name, bn in batchnorms(model).items():
        gamma = bn.weight.detach().abs()
        if kind == "gamma" or name not in feeds:
            size = gamma
        else:
            size = feeds[name].weight.detach().abs().flatten(1).sum(1)
            if kind == "folded":
                size = size * gamma * torch.rsqrt(bn.get_buffer("running_var") + bn.eps)
        out[name] = size / size.mean().clamp(min=1e-12) if relative else size
    return out


def feeders(model: nn.Module, example: Tensor) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolution (or linear layer) whose output each BatchNorm normalises, by the BatchNorm's name."""
    made: dict[int, nn.Module] = {}
    keep: list[Tensor] = []  # an id is unique only while its tensor lives
    found: dict[str, Any] = {}

    def made_by(module: nn.Module, inputs: Any, output: Tensor) -> None:
        made[id(output)] = module
        keep.append(output)

    def seen_by(name: str) -> Any:
        return lambda module, inputs: found.update({name: made[id(inputs[0])]} if id(inputs[0]) in made else {})

    handles = [m.register_forward_hook(made_by) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles += [m.register_forward_pre_hook(seen_by(n)) for n, m in batchnorms(model).items()]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def correlation(model: nn.Module, images: ImageSet, kind: Magnitude = "filter") -> dict[str, float]:
    """Spearman's rank correlation of magnitude and saliency on clean images, per layer.

    In a clean network large neurons are the important ones; a backdoor's neurons are large and, to clean images,
    unimportant. That the correlation tells backdoored networks from clean ones is the paper's claim; the statistic is
    reconstructed.

    Returns:
        ``{layer: rho}``, in [-1, 1].
    """
    from scipy.stats import spearmanr

    sizes, importance = magnitude(model, images.floats[:1], kind), absolute_saliency(model, images)
    return {n: float(spearmanr(sizes[n].cpu(), importance[n].cpu()).statistic) for n in sizes}


def suspicion(model: nn.Module, images: ImageSet, kind: Magnitude = "filter") -> float:
    """One number for a network: minus the mean correlation over the later half of its layers, in [-1, 1].

    Larger is more suspicious. It means something only beside the values of clean networks of the same architecture:
    no threshold is known. Reconstructed.
    """
    values = list(correlation(model, images, kind).values())
    return -sum(values[len(values) // 2 :]) / max(1, len(values) - len(values) // 2)


@dataclass(frozen=True)
class MNP:
    """Suppress what is clean, then learn masks that pay for magnitude and keep what clean images need.

    Clean suppression (stated): ``max_theta L(theta) - mu ||theta||^2``, RNP's ascent with a decay of 2 mu. Masks
    (coupling reconstructed): ``min_m L(m, suppressed) + lambda sum_j m_j w_j + kappa L(m, original)`` with w the
    magnitude; the second term is the weight penalty, the third clean preserving. A mask then survives where saliency
    over magnitude is at least lambda. Then gamma = 0 where mask <= threshold, in the original network. With lambda =
    kappa = 0 this is RNP. Introduced in chapter "MNP".

    Args:
        ascent: clean suppression; its ``weight_decay`` is 2 mu.
        penalty: lambda, 0 or more; None takes the `quantile` of saliency over magnitude at mask 1 (reconstructed).
        quantile: in [0, 1].
        kappa: weight of clean preserving, 0 or more.
        alpha: factor of the suppressed network's loss.
        coupling: all [reconstructed]. "joint": one objective. "alternate": suppressed and original in turn.
            "original": the original network in both terms, the suppressed one gives the magnitudes only.
            "resuppress": suppress again halfway, from the network pruned so far.
        kind, relative: the magnitude, see `magnitude`.
        lr, epochs, batch: of the masks (SGD with momentum 0.9).
        threshold, max_drop: as for `RNP`.
    """

    ascent: Ascent = field(default_factory=Ascent)
    penalty: float | None = None
    quantile: float = 0.05
    kappa: float = 1.0
    alpha: float = 1.0
    coupling: Literal["joint", "alternate", "original", "resuppress"] = "joint"
    kind: Magnitude = "filter"
    relative: bool = True
    lr: float = 0.04
    epochs: int = 20
    batch: int = 128
    threshold: float | None = None
    max_drop: float = 0.02

    def __post_init__(self) -> None:
        checks = {
            "penalty": (self.penalty is None or self.penalty >= 0, "0 or more, or None"),
            "quantile": (0 <= self.quantile <= 1, "in [0, 1]"),
            "kappa": (self.kappa >= 0, "0 or more"),
            "alpha": (self.alpha >= 0, "0 or more"),
            "coupling": (
                self.coupling in ("joint", "alternate", "original", "resuppress"),
                "joint, alternate, original or resuppress",
            ),
            "kind": (self.kind in ("filter", "folded", "gamma"), "filter, folded or gamma"),
            "lr": (self.lr >= 0, "0 or more"),
            "epochs": (self.epochs >= 0, "0 or more"),
            "batch": (self.batch >= 2, "2 or more"),
            "max_drop": (0 <= self.max_drop <= 1, "in [0, 1]"),
        }
        require(self, checks)

    @classmethod
    def paper(cls) -> "MNP":
        """This book's reading of the paper, whose settings were not found: RNP's ascent, the joint coupling."""
        return cls()

    @classmethod
    def official(cls) -> "MNP":
        """The same as `paper`: no released code was found."""
        return cls()

    @classmethod
    def small(cls) -> "MNP":
        """For the book's small network, settled on seeds 0 to 2: `RNP.small`'s ascent, and strong clean preserving.

        kappa decides here: at 1 the result is RNP's, at 30 most of the accuracy that RNP loses stays.
        """
        ascent = Ascent(lr=0.002, batch=64, milestones=())
        return cls(ascent=ascent, kappa=30.0, lr=0.1, epochs=20, batch=64)

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Suppress and learn masks on `clean`, choose a threshold on its held-out part, prune the original network.

        Args:
            model, clean, seed: as for `RNP`.
            keep_every: keep copies every so many epochs; 0 keeps none.

        Returns:
            `Repair` with the log of the masks (`bdlib.defenses.rnp.fit_masks`) and details: suppressed (network),
            suppression (the log of `Ascent`), reached (whether its stop rule was), penalty (lambda as used), magnitude
            ``{layer: (C,)}`` as used, masks, threshold, pruned, choice, snapshots ``[(epoch, masks)]``.

        Raises:
            ValueError: no BatchNorm; inputs that `check_inputs` refuses; `Diverged`, with the last good state.
        """
        check_inputs(model, clean)
        start = time.perf_counter()
        ones(model)  # refuses a network without BatchNorm before any work is done
        kept: dict[str, Any] = {}

        def learn(images: ImageSet, seed: int) -> tuple[Masks, Log]:
            snapshots: list[tuple[int, Masks]] = []

            def keep(epoch: int, masks: Masks) -> None:
                if keep_every and epoch % keep_every == 0:
                    snapshots.append((epoch, masks))

            suppressed, suppression, reached = self.ascent(model, images, seed)
            masks, log, used = self.learn(model, suppressed, images, seed, keep)
            kept.update(suppressed=suppressed, suppression=suppression, reached=reached, snapshots=snapshots, **used)
            return masks, log

        masks, log, details = learn_and_choose(
            model, clean, learn, threshold=self.threshold, max_drop=self.max_drop, seed=seed
        )
        repaired = prune(model, masks, details["threshold"]).eval()
        return Repair(repaired, log, {**details, **kept}, time.perf_counter() - start)

    def learn(
        self,
        original: nn.Module,
        suppressed: nn.Module,
        images: ImageSet,
        seed: int = 0,
        keep: Callable[[int, Masks], None] | None = None,
    ) -> tuple[Masks, Log, dict[str, Any]]:
        """The masks alone ``{layer: (C,)}``, their log, and what was used: penalty (lambda), magnitude."""
        sizes = magnitude(suppressed, images.floats[:1], self.kind, relative=self.relative)
        fit_on = original if self.coupling == "original" else suppressed
        price = self.penalty if self.penalty is not None else slope(fit_on, images, sizes, self.quantile)
        penalty = {n: price * w for n, w in sizes.items()} if price else None
        # the suppressed network in train mode, as in RNP; the original one as it will be used
        terms = [(Soft(fit_on, batch_statistics=self.coupling != "original"), self.alpha)]
        if self.kappa:
            terms.append((Soft(original, batch_statistics=False), self.kappa))
        halves = [self.epochs] if self.coupling != "resuppress" else [self.epochs // 2, self.epochs - self.epochs // 2]
        masks, log = ones(original), list[dict[str, float]]()
        for part, epochs in enumerate(halves):
            if part:
                smaller, _, _ = self.ascent(scaled(original, masks), images, seed)
                terms[0] = (Soft(smaller), self.alpha)
            masks, records = fit_masks(
                terms, images, lr=self.lr, epochs=epochs, batch=self.batch, seed=seed + part, start=masks,
                penalty=penalty, alternate=self.coupling == "alternate", keep=keep,
            )  # fmt: skip
            log += [{**r, "epoch": r["epoch"] + len(log)} for r in records]
        return masks, log, {"penalty": price, "magnitude": sizes}


def slope(model: nn.Module, images: ImageSet, sizes: Masks, quantile: float) -> float:
    """The lambda under which this share of the useful neurons lies: a quantile of ``-dL/dm / w`` at mask 1.

    Useful are those whose ratio is positive; the others fall without any penalty. Reconstructed: at the optimum a mask
    stays 1 only where saliency is lambda times magnitude or more, so the quantile says how many lie below the line.
    """
    soft = Soft(model)
    masks = {n: m.requires_grad_() for n, m in ones(model).items()}
    loss = F.cross_entropy(soft(images.floats, masks), images.labels)
    grads = torch.autograd.grad(loss, list(masks.values()))
    ratio = torch.cat([-g / sizes[n].clamp(min=1e-12) for n, g in zip(masks, grads, strict=True)])
    useful = ratio[ratio > 0]
    return float(useful.quantile(quantile)) if len(useful) else 0.0


def scaled(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy whose gammas are multiplied by the masks."""
    out = copy.deepcopy(model)
    with torch.no_grad():
        for name, bn in batchnorms(out).items():
            bn.weight.mul_(masks[name])
    return out
