"""TrojanNN: a patch that drives chosen neurons of a clean network far beyond what images do (Liu et al. 2018).

TrojanNN(target=5, rate=0.1).poison(train, seed=0, model=clean_network)
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from bdlib.attacks.base import Poisoned, check_rate, choose, poison_with
from bdlib.attacks.inside import frozen, head, read
from bdlib.attacks.trojan import Region, patch
from bdlib.checks import require
from bdlib.data.imageset import ImageSet
from bdlib.triggers import LabelMap, Trigger

CALIBRATION = 1000  # images on which the usual activations are measured


@dataclass(frozen=True)
class TrojanNN:
    """``x' = (1 - m) x + m p``, where p was optimised: ``sum over n of (a_n(m p) - goal_n)^2`` is made small.

    The neurons n are inputs of the last linear layer, a_n(m p) their activations on the patch before black. Signed
    gradient steps stay within epsilon of white; the best patch on the way is kept. Then the victim is trained from
    scratch on the poisoned set. A neuron behind a ReLU that the patch leaves at 0 has no slope to follow, so only those
    count that some of `starts` random patches excite, and the best of these is where the search starts (our
    reconstruction).
    Source: BackdoorBench @ f02e353.

    Args:
        target: label the attacker wants (all-to-one).
        rate: share of all training images that are poisoned, in [0, 1].
        region: where the patch lies.
        neurons: how many are driven.
        select: those with the largest weights: summed over all classes ("all": ``sum over k of |W_kn|``), or in the row
            of the target alone ("target": our reconstruction of a targeted choice); or "random", see `official`.
        goal: activation wanted; None is ten times the 99.9th percentile of each neuron on clean images (our choice: out
            of reach, but in proportion; pooled activations never come near the 100 of the released code).
        epsilon: largest distance of a pixel from white, in [0, 1).
        step: of a gradient step, above 0.
        steps: at most; a sum below 1e-3 ends it before.
        starts: patches to start from, the first of them white; 1 starts from white and lets every neuron be picked.
        join: "overwrite" the pixels, or "wrap": add and let the sum run over, as released code does.
        raw: let the network see the patch as it is, without the normalisation that it was trained with.
    """

    needs_model: ClassVar[bool] = True

    target: int = 0
    rate: float = 0.1
    region: Region = field(default_factory=Region)
    neurons: int = 2
    select: Literal["all", "target", "random"] = "all"
    goal: float | None = None
    epsilon: float = 0.3
    step: float = 0.1
    steps: int = 1000
    starts: int = 64
    join: Literal["overwrite", "wrap"] = "overwrite"
    raw: bool = False

    def __post_init__(self) -> None:
        check_rate(self.rate)
        checks = {
            "neurons": (self.neurons >= 1, "1 or more"),
            "select": (self.select in ("all", "target", "random"), "all, target or random"),
            "epsilon": (0 <= self.epsilon < 1, "in [0, 1)"),
            "step": (self.step > 0, "above 0"),
            "steps": (self.steps >= 1, "1 or more"),
            "starts": (self.starts >= 1, "1 or more"),
            "join": (self.join in ("overwrite", "wrap"), "overwrite or wrap"),
        }
        require(self, checks)

    @classmethod
    def paper(cls, target: int = 0) -> "TrojanNN":
        """Two neurons of the trained network, epsilon 0.3, step 0.1, 1000 steps, 10 % of all images."""
        return cls(target)

    @classmethod
    def official(cls, target: int = 0) -> "TrojanNN":
        """As BackdoorBench @ f02e353 runs: arbitrary neurons, goal 100, no normalisation, a sum that wraps.

        (Its head of 1000 classes does not fit the checkpoint and stays random, so that its largest weights are chance.)
        """
        return cls(target, select="random", goal=100.0, starts=1, join="wrap", raw=True)

    @classmethod
    def small(cls, target: int = 0) -> "TrojanNN":
        """For the book's small network: 200 steps, since 8 bring a pixel through its whole range."""
        return cls(target, steps=200)

    def trigger(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Trigger:
        """The trigger before the search, for images of shape ``(C, H, W)``: a white patch.

        Raises:
            ValueError: an image so small that the patch covers no pixel.
        """
        mask = self.region.mask(*shape[1:])
        return patch(torch.ones(shape), mask, self.join, LabelMap(self.target, classes))

    def pick(self, weight: Tensor, responds: Tensor | None = None, seed: int = 0) -> Tensor:
        """``(neurons,)`` indices of the neurons to drive.

        Args:
            weight: ``(K, F)``, of the last layer.
            responds: ``(F,)`` bool, those that may be picked; None is all.
            seed: of a random choice.

        Raises:
            ValueError: more neurons than there are to pick from.
        """
        responds = torch.ones_like(weight[0], dtype=torch.bool) if responds is None else responds
        if self.neurons > (there := int(responds.sum())):
            raise ValueError(f"neurons must be at most {there}, those that respond to the patch, got {self.neurons}")
        if self.select == "random":
            score = torch.rand(len(weight[0]), generator=Generator().manual_seed(seed)).to(weight.device)
        else:
            score = weight.abs().sum(0) if self.select == "all" else weight[self.target]
        return score.masked_fill(~responds, -torch.inf).topk(self.neurons).indices

    def drive(self, model: nn.Module, chosen: Tensor, goal: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Optimise the patch.

        Args:
            model: the clean network, `frozen`.
            chosen: ``(n,)`` the neurons.
            goal: ``(n,)`` what they should reach.
            start: ``(C, H, W)``, on the network's device, 0 off the patch.

        Returns:
            The best pattern ``(C, H, W)``, 0 off the patch, and the activations ``(steps made, n)`` on the way.
        """
        high = (start > 0).float()  # white on the patch: no pixel of it is 0, or `epsilon` reaches black
        low, pattern, best = (1 - self.epsilon) * high, start, start
        least = torch.full((), torch.inf, device=start.device)
        trace: list[Tensor] = []
        for _ in tqdm(range(self.steps), desc="TrojanNN patch", leave=False):
            x = pattern.clone().requires_grad_()
            reached = read(model, x[None])[1][0, chosen]
            loss = (reached - goal).square().sum()
            (slope,) = torch.autograd.grad(loss, x)
            trace.append(reached.detach())
            best = torch.where(loss < least, pattern, best)
            least = torch.minimum(loss.detach(), least)
            if float(least) < 1e-3:
                break
            pattern = torch.minimum(torch.maximum(pattern - self.step * slope.sign(), low), high)
        return best, torch.stack(trace)

    @torch.no_grad()
    def prepare(self, model: nn.Module, images: ImageSet, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """What `drive` needs: the neurons ``(n,)``, their goals ``(n,)`` and the patch to start from ``(C, H, W)``."""
        mask, device = self.region.mask(*images.shape[1:]), images.images.device
        noise = torch.rand((self.starts, *images.shape), generator=Generator().manual_seed(seed))
        noise[0] = 0  # the first start is plain white
        starts = ((1 - self.epsilon * noise) * mask).to(device)
        fired = read(model, starts)[1]  # (starts, F)
        chosen = self.pick(head(model).weight, fired.amax(0) > 0 if self.starts > 1 else None, seed)
        if self.goal is None:
            part = images.images[:: max(1, len(images) // CALIBRATION)]
            usual = torch.cat([read(model, x.float() / 255)[1][:, chosen] for x in part.split(250)])  # (N, n)
            goal = 10 * torch.quantile(usual, 0.999, dim=0)
        else:
            goal = torch.full((len(chosen),), float(self.goal), device=device)
        first = (fired[:, chosen] - goal).square().sum(1).argmin()
        return chosen, goal, starts[first]

    def poison(self, images: ImageSet, seed: int = 0, model: nn.Module | None = None) -> Poisoned:
        """Fit the patch on a clean `model`, then poison; `seed` draws the images.

        Raises:
            ValueError: no model, or too few neurons that respond to the patch.
        """
        if model is None:
            raise ValueError("TrojanNN drives neurons of a cleanly trained network: give model")
        mapping = LabelMap(self.target, len(images.classes))
        net = frozen(model, images.images.device, raw=self.raw)
        pattern, _ = self.drive(net, *self.prepare(net, images, seed))
        trigger = patch(pattern.cpu(), self.region.mask(*images.shape[1:]), self.join, mapping)
        indices = choose(images, self.rate, mapping, include_target=True, seed=seed)
        return poison_with(trigger, images, indices)
