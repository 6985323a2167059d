"""RNP: reconstructive neuron pruning (Li et al., ICML 2023).

repair = RNP.small()(model, clean, seed=0)
repair.details["unlearned"], repair.details["masks"], repair.details["threshold"]
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from bdlib.checks import require
from bdlib.data.imageset import CleanSet, ImageSet
from bdlib.defenses.base import Repair, check_inputs, seeded
from bdlib.neurons import Log, Masks, Soft, learn_and_choose, ones, prune
from bdlib.training import augment
from bdlib.unlearned import class_shares
from bdlib.watch import Watch


def batches(data: ImageSet, size: int, generator: Generator) -> list[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches ``(B, C, H, W)`` in [0, 1] and labels ``(B,)``; no batch of one image."""
    order = torch.randperm(len(data), generator=generator, device=data.images.device)
    parts = [part for part in order.split(size) if len(part) > 1 or len(data) == 1]
    return [(augment(data.images[p], data.augment, generator).float() / 255, data.labels[p]) for p in parts]


@dataclass(frozen=True)
class Ascent:
    """Unlearning: ``max_theta  L(theta) - weight_decay / 2 ||theta||^2`` on clean images, until they are forgotten.

    The trigger is in none of the images, so a backdoor outlives what the network knew of them. This is stage 1 of RNP,
    and "clean suppression" of MNP. Source: bboylyg/RNP @ eeae192.

    Args:
        lr, momentum, weight_decay: of SGD on minus the cross-entropy; the decay shrinks the weights (PyTorch adds it
            to the gradient that is descended).
        epochs: at most this many passes over the images.
        batch: images a step. What counts is steps, not epochs: double the batch and half as much is forgotten.
        milestones: epochs after which the learning rate is a tenth.
        stop: end after the epoch whose running training accuracy (batch statistics, augmented images, weights that
            move on the way) is at most this, in [0, 1].
        batch_statistics: BatchNorm in train mode, as released; False keeps it, like the rest, in evaluation mode.
        clip: largest norm of the gradient; None does not clip. (The released code means to clip at 20, but does so
            after the gradients are zeroed and before they are computed: nothing is clipped.)
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 21
    batch: int = 128
    milestones: tuple[int, ...] = (10, 20)
    stop: float = 0.2
    batch_statistics: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "lr": (self.lr >= 0, "0 or more"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "epochs": (self.epochs >= 0, "0 or more"),
            "batch": (self.batch >= 2, "2 or more"),
            "stop": (0 <= self.stop <= 1, "in [0, 1]"),
            "clip": (self.clip is None or self.clip > 0, "above 0, or None"),
        }
        require(self, checks)

    def __call__(
        self, model: nn.Module, images: ImageSet, seed: int = 0, keep: Callable[[int, nn.Module], None] | None = None
    ) -> tuple[nn.Module, Log, bool]:
        """Unlearn `images` on a copy of `model`.

        Args:
            keep: called after every epoch with its number and the copy.

        Returns:
            The copy as the last epoch left it (evaluation mode), one record an epoch (epoch, loss: the cross-entropy,
            accuracy, lr), and whether `stop` was reached; if not, the caller has to know.

        Raises:
            Diverged: a loss or a weight that is no longer finite.
        """
        work, generator = copy.deepcopy(model), seeded(images.images.device, seed)
        params = [p.requires_grad_() for p in work.parameters()]
        opt = torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        watch = Watch("unlearning", work.state_dict(), f"lower lr, which is {self.lr}")
        log: Log = []
        for epoch in tqdm(range(self.epochs), desc="unlearn", leave=False):
            work.train(self.batch_statistics)  # `keep` may have changed the mode
            rate = opt.param_groups[0]["lr"] = self.lr * 0.1 ** sum(epoch >= m for m in self.milestones)
            total, seen = torch.zeros(2, device=images.images.device), 0  # loss, right; images
            for x, y in batches(images, self.batch, generator):
                logits = work(x)
                loss = F.cross_entropy(logits, y)
                opt.zero_grad()
                (-loss).backward()  # uphill
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(params, self.clip)
                opt.step()
                watch(loss)
                total += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
                seen += len(y)
            watch.look()
            loss_sum, right = total.tolist()  # the only transfer of an epoch: the stop rule needs it
            log.append({"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": right / seen, "lr": rate})
            if keep is not None:
                keep(epoch + 1, work)
            if log[-1]["accuracy"] <= self.stop:
                break
        return work.eval(), log, bool(log and log[-1]["accuracy"] <= self.stop)


def fit_masks(
    terms: Sequence[tuple[Soft, float]],
    data: ImageSet,
    *,
    lr: float,
    epochs: int,
    batch: int,
    seed: int = 0,
    start: Masks | None = None,
    penalty: Masks | None = None,
    alternate: bool = False,
    keep: Callable[[int, Masks], None] | None = None,
) -> tuple[Masks, Log]:
    """Masks from 1 by SGD (momentum 0.9, no decay), clipped to [0, 1] after every step. RNP and MNP share it.

    ``min_m  sum_a weight_a L(net_a scaled by m) + sum_j penalty_j m_j``; nothing but the masks has gradients.

    Args:
        terms: frozen networks of one architecture with the weight of their cross-entropy.
        start: masks to begin with; None is all 1.
        penalty: price of each mask ``{layer: (C,)}``; None is free.
        alternate: one term a step in turn, the penalty with the first, instead of all in every step.
        keep: called after every epoch with its number and the masks.

    Returns:
        Masks ``{layer: (C,)}`` in [0, 1], and one record an epoch: epoch, loss and accuracy (of the first term, on
        augmented batches), mean_mask.

    Raises:
        Diverged: a loss or a mask that is no longer finite.
    """
    device, generator = data.images.device, seeded(data.images.device, seed)
    first = ones(terms[0][0].model) if start is None else start
    masks = {n: m.clone().requires_grad_() for n, m in first.items()}
    opt = torch.optim.SGD(masks.values(), lr=lr, momentum=0.9)
    watch = Watch("masks", masks, f"lower lr, which is {lr}")
    totals, seen, step = torch.zeros(epochs, 3, device=device), [0] * epochs, 0  # loss, right, mean mask; images
    for epoch in tqdm(range(epochs), desc="masks", leave=False):
        for x, y in batches(data, batch, generator):
            now = [step % len(terms)] if alternate else range(len(terms))
            losses = {a: (F.cross_entropy(logits := terms[a][0](x, masks), y), logits) for a in now}
            loss = torch.stack([terms[a][1] * value for a, (value, _) in losses.items()]).sum()
            if penalty is not None and 0 in losses:
                loss = loss + torch.stack([(penalty[n] * m).sum() for n, m in masks.items()]).sum()
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            with torch.no_grad():
                for m in masks.values():
                    m.clamp_(0, 1)
                watch(loss)
                if 0 in losses:
                    value, logits = losses[0]
                    totals[epoch, :2] += torch.stack([value * len(y), (logits.argmax(1) == y).sum()])
                    seen[epoch] += len(y)
        watch.look()
        with torch.no_grad():
            totals[epoch, 2] = torch.cat(list(masks.values())).mean()
        if keep is not None:
            keep(epoch + 1, {n: m.detach().clone() for n, m in masks.items()})
    log = [
        {"epoch": e + 1, "loss": loss / max(1, n), "accuracy": right / max(1, n), "mean_mask": mean}
        for e, ((loss, right, mean), n) in enumerate(zip(totals.tolist(), seen, strict=True))
    ]
    return {n: m.detach() for n, m in masks.items()}, log


@dataclass(frozen=True)
class RNP:
    """Forget the clean images, find the few neurons through which they come back, prune those in the original.

    Stage 1 raises the clean loss over all weights (`Ascent`): what is left works for the backdoor. Stage 2 lowers it
    again over one mask a neuron, on the frozen unlearned network; the masks that fall belong to the backdoor. Stage 3
    sets gamma to 0 where mask <= threshold, in the *original* network; beta stays. Introduced in chapter "RNP";
    source: algorithm 1 of the paper, and bboylyg/RNP @ eeae192. How the paper chooses its stop value and its threshold
    was not found.

    Args:
        ascent: stage 1.
        suspect: prune only if the unlearned network reads at least this share of the clean images as one class, in
            [0, 1]; 0 always prunes. The paper reads the target class off that collapse, its first author's later code
            (bboylyg/Expose-Before-You-Defend @ c703dab) also whether there is a backdoor: from 0.4 on ten classes.
        alpha: factor of the recovery loss; with SGD and no decay, a factor of `lr` and nothing else.
        lr: learning rate of the masks (SGD with momentum 0.9), in stage 2.
        epochs, batch: of stage 2.
        batch_statistics: BatchNorm in train mode while masks are learnt, as released; its running statistics move too.
        threshold: prune where mask <= threshold; None chooses it on the held-out clean images.
        max_drop: when choosing, the allowed drop of clean accuracy, as a share.
        digits: round the masks to this many decimals before pruning (the released text file keeps 4); None keeps all.
    """

    ascent: Ascent = field(default_factory=Ascent)
    suspect: float = 0.0
    alpha: float = 0.2
    lr: float = 0.2
    epochs: int = 20
    batch: int = 128
    batch_statistics: bool = True
    threshold: float | None = None
    max_drop: float = 0.02
    digits: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "suspect": (0 <= self.suspect <= 1, "in [0, 1]"),
            "alpha": (self.alpha >= 0, "0 or more"),
            "lr": (self.lr >= 0, "0 or more"),
            "epochs": (self.epochs >= 0, "0 or more"),
            "batch": (self.batch >= 2, "2 or more"),
            "max_drop": (0 <= self.max_drop <= 1, "in [0, 1]"),
        }
        require(self, checks)

    @classmethod
    def paper(cls) -> "RNP":
        """Algorithm 1 with the released schedule, the clipping that its code intends, and a legal threshold.

        The paper's own stop value, learning rates and threshold were not found.
        """
        return cls(ascent=Ascent(clip=20.0))

    @classmethod
    def official(cls) -> "RNP":
        """The released code as it runs: no clipping, masks written with 4 decimals. It sweeps thresholds only."""
        return cls(digits=4)

    @classmethod
    def small(cls) -> "RNP":
        """For the book's small network, settled on seeds 0 and 1: a gentle ascent, half the steps of recovery.

        The network has few neurons to spare, and RNP takes clean ones along: eight points may be lost, and most of them
        are the target class itself, see chapter "RNP". So nothing is pruned unless the network shows a target class.
        """
        return cls(Ascent(lr=0.002, batch=64, milestones=()), suspect=0.4, epochs=10, batch=64, max_drop=0.08)

    def __call__(self, model: nn.Module, clean: CleanSet, seed: int = 0, keep_every: int = 0) -> Repair:
        """Unlearn and recover on `clean`, choose a threshold on its held-out part, prune the original network.

        Args:
            model: a network with BatchNorm; it is not changed.
            clean: the defender's images; as for `ANP`, masks are learnt on `clean.learn` and the threshold is chosen
                on `clean.select`.
            seed: of batches and augmentation.
            keep_every: keep copies every so many epochs of both stages; 0 keeps none.

        Returns:
            `Repair` with the log of the recovery (`fit_masks`) and details: unlearned (network), unlearning (the log of
            `Ascent`), reached (whether its stop rule was), share (of the clean images in the class that the unlearned
            network names most), networks ``[(epoch, network)]`` on the way, masks, threshold (-1 if the share is
            below `suspect`), pruned, choice, snapshots ``[(epoch, masks)]``.

        Raises:
            ValueError: no BatchNorm; inputs that `check_inputs` refuses; `Diverged`, with the last good state.
        """
        check_inputs(model, clean)
        start = time.perf_counter()
        ones(model)  # refuses a network without BatchNorm before any work is done
        kept: dict[str, Any] = {}

        def learn(images: ImageSet, seed: int) -> tuple[Masks, Log]:
            networks: list[tuple[int, nn.Module]] = []
            snapshots: list[tuple[int, Masks]] = []

            def keep_network(epoch: int, network: nn.Module) -> None:
                if keep_every and epoch % keep_every == 0:
                    networks.append((epoch, copy.deepcopy(network).eval()))

            def keep_masks(epoch: int, masks: Masks) -> None:
                if keep_every and epoch % keep_every == 0:
                    snapshots.append((epoch, masks))

            unlearned, unlearning, reached = self.ascent(model, images, seed, keep_network)
            kept.update(
                unlearned=unlearned, unlearning=unlearning, reached=reached, networks=networks, snapshots=snapshots
            )
            return self.recover(unlearned, images, seed, keep_masks)

        masks, log, details = learn_and_choose(
            model, clean, learn, threshold=self.threshold, max_drop=self.max_drop, seed=seed
        )
        kept["share"] = float(class_shares(kept["unlearned"], clean.images).max())
        if kept["share"] < self.suspect:
            details |= {"threshold": -1.0, "pruned": 0}
        repaired = prune(model, masks, details["threshold"]).eval()
        return Repair(repaired, log, {**details, **kept}, time.perf_counter() - start)

    def recover(
        self,
        unlearned: nn.Module,
        images: ImageSet,
        seed: int = 0,
        keep: Callable[[int, Masks], None] | None = None,
    ) -> tuple[Masks, Log]:
        """Stage 2 alone: masks ``{layer: (C,)}`` that bring the images back to an unlearned network."""
        soft = Soft(unlearned, batch_statistics=self.batch_statistics)
        masks, log = fit_masks(
            [(soft, self.alpha)], images, lr=self.lr, epochs=self.epochs, batch=self.batch, seed=seed, keep=keep
        )
        return masks if self.digits is None else {n: m.round(decimals=self.digits) for n, m in masks.items()}, log
