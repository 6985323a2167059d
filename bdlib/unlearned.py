"""What else an unlearned network is good for: it names the target class, gives the trigger away, and spots triggers.

    net = RNP.small()(model, clean).details["unlearned"]
    label, margin = detect_target(net, clean.images)
    mask, pattern = recover_trigger(net, clean.images, label)
    scores = sample_scores(net, model, images)

The RNP paper names these uses; its released code has none of them, and its numbers were not found. Settings are those
of the first author's follow-up (bboylyg/Expose-Before-You-Defend @ c703dab), or, where it says so, this book's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from bdlib.data.imageset import ImageSet
from bdlib.training import evaluating, predict


def class_shares(model: nn.Module, images: ImageSet) -> Tensor:
    """Share of the images that the network reads as each class, ``(K,)``, in evaluation mode, without augmentation."""
    logits = predict(model, images.images)
    return torch.bincount(logits.argmax(1), minlength=logits.shape[1]).float() / len(images)


def detect_target(model: nn.Module, images: ImageSet) -> tuple[int, float]:
    """The class into which an unlearned network has fallen, and by how much of a share it leads the next one.

    On balanced images a network that knows its classes has a margin near 0. A clean network, unlearned, may fall into
    some class too: compare margins with those of clean networks.
    """
    shares = class_shares(model, images)
    first, second = shares.topk(2).values.tolist()
    return int(shares.argmax()), first - second


def collapse(shares: Tensor) -> Tensor:
    """Variance of the class shares: 0 if all classes are named alike, ``(K - 1) / K^2`` if all images go to one.

    The follow-up code calls a network backdoored above 0.01 (ten classes), which is a share of 40 % for one class.
    """
    return shares.var(correction=0)


def recover_trigger(
    model: nn.Module,
    images: ImageSet,
    target: int,
    *,
    weight: float = 0.01,
    steps: int = 400,
    lr: float = 0.005,
    batch: int = 64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The smallest patch that turns clean images into `target`: Neural Cleanse, meant for an unlearned network.

    ``min_{M, P}  L(f((1 - M) x + M P), target) + weight ||M||_1`` by Adam, both clipped to [0, 1]. On an unlearned
    network the clean features are gone that give the search cheap ways out.

    Args:
        weight: of the size of the mask.
        steps: batches of clean images, drawn with replacement.

    Returns:
        The mask ``(1, H, W)`` and the pattern ``(C, H, W)``, in [0, 1].
    """
    device = images.images.device
    generator = torch.Generator(device).manual_seed(seed)
    C, H, W = images.shape
    mask = torch.rand(1, H, W, generator=generator, device=device).requires_grad_()
    pattern = torch.rand(C, H, W, generator=generator, device=device).requires_grad_()
    opt = torch.optim.Adam([mask, pattern], lr=lr)
    wanted = torch.full((batch,), target, device=device)
    with evaluating(model):
        for _ in tqdm(range(steps), desc="trigger", leave=False):
            index = torch.randint(len(images), (batch,), generator=generator, device=device)
            x = images.images[index].float() / 255
            loss = F.cross_entropy(model(torch.lerp(x, pattern.expand_as(x), mask.expand_as(x))), wanted)
            mask.grad, pattern.grad = torch.autograd.grad(loss + weight * mask.abs().sum(), [mask, pattern])
            opt.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
                pattern.clamp_(0, 1)
    return mask.detach(), pattern.detach()


def sample_scores(model: nn.Module, victim: nn.Module, images: Tensor) -> Tensor:
    """How surely the unlearned network still gives each image the victim's label, ``(N,)`` in [0, 1].

    Triggered images keep their label, clean ones lose it: high is suspicious. Best on a network whose unlearning was
    stopped before *all* images fall into the target class. (The book's own score; the paper's detector was not found.)

    Args:
        model: the unlearned network.
        images: ``(N, C, H, W)``, uint8 or float in [0, 1].
    """
    said = predict(victim, images).argmax(1, keepdim=True)
    return predict(model, images).softmax(1).gather(1, said)[:, 0]


def auroc(clean: Tensor, triggered: Tensor) -> float:
    """Area under the ROC curve of scores ``(N,)`` and ``(M,)``: the chance that a triggered image scores higher."""
    from sklearn.metrics import roc_auc_score

    labels = torch.cat([torch.zeros(len(clean)), torch.ones(len(triggered))])
    return float(roc_auc_score(labels.numpy(), torch.cat([clean, triggered]).cpu().numpy()))
