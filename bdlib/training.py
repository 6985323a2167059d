"""One training loop for victims, fine-tuning and training-controlled attacks, with everything on the device.

log = fit(model, train, Recipe(epochs=10, lr=0.1), seed=0)     # trains `model` in place
logits = predict(model, test.images)                           # (N, K), the whole set at once
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from bdlib.data.imageset import Augment, ImageSet
from bdlib.provenance import amp_dtype
from bdlib.watch import Watch

Schedule = Literal["one-cycle", "cosine", "milestones", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How to train: an optimiser under a learning-rate schedule.

    Args:
        epochs: passes over the set; 0 trains nothing.
        batch: images a step.
        lr: peak learning rate.
        optimizer: "sgd" with `momentum`, Nesterov's by default, or "adam" with `momentum` as its beta1.
        schedule: "one-cycle" (linear up to `lr` over the first `warmup` of the steps, linear down to 0), "cosine"
            (down to 0 over the run), "milestones" (times `gamma` at the listed epochs) or "constant".
        warmup: share of the steps spent rising, one-cycle only.
        augment: whether to apply the augmentation that belongs to the set.
        amp: bfloat16 where the processor computes it natively; False is float32 everywhere.
    """

    epochs: int
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    schedule: Schedule = "one-cycle"
    warmup: float = 0.3
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    label_smoothing: float = 0.0
    augment: bool = True
    amp: bool = True
    optimizer: Literal["sgd", "adam"] = "sgd"

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "batch": (self.batch >= 1, "1 or more"),
            "lr": (self.lr >= 0, "0 or more"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "schedule": (self.schedule in ("one-cycle", "cosine", "milestones", "constant"),
                         "one-cycle, cosine, milestones or constant"),
            "warmup": (0 < self.warmup < 1, "in (0, 1)"),
            "optimizer": (self.optimizer in ("sgd", "adam"), "sgd or adam"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
        }  # fmt: skip
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def optimiser(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser; the loop sets its learning rate at every step."""
        if self.optimizer == "adam":
            return torch.optim.Adam(params, lr=self.lr, betas=(self.momentum, 0.999), weight_decay=self.weight_decay)
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(params, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=nesterov)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        t = step / max(1, self.epochs * steps_per_epoch)  # share of the run that lies behind
        if self.schedule == "one-cycle":
            return self.lr * (t / self.warmup if t < self.warmup else (1 - t) / (1 - self.warmup))
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * t)) / 2
        passed = sum(step // steps_per_epoch >= m for m in self.milestones)
        return self.lr * self.gamma**passed


class Step:
    """What happens to a batch, and the loss. Training-controlled attacks override one or both."""

    before_augment = False  # True: `change` wants the batch before augmentation; the field's order for static triggers

    def change(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, H, W)`` in [0, 1] and labels ``(B,)`` to train on; the default changes nothing."""
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the logits ``(B, K)`` it was computed from."""
        logits = model(images)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits


def augment(images: Tensor, spec: Augment, generator: Generator) -> Tensor:
    """Crop, flip and erase, drawn anew for each image, as one gather and no loop.

    Args:
        images: ``(B, C, H, W)``, uint8 or float.
        spec: what to do; zero padding, as the papers' training code pads before it normalises.
        generator: on the device of the images.

    Returns:
        ``(B, C, H, W)``, same type.
    """
    B, _, H, W = images.shape
    dev = images.device

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator, device=dev)

    if spec.pad or spec.flip:
        p = spec.pad
        rows = torch.arange(H, device=dev) + (
            draw(2 * p + 1, B, 1) if p else torch.zeros(B, 1, dtype=torch.long, device=dev)
        )
        cols = torch.arange(W, device=dev).expand(B, W)
        if spec.flip:
            cols = torch.where(draw(2, B, 1).bool(), W - 1 - cols, cols)
        if p:
            cols = cols + draw(2 * p + 1, B, 1)
            images = F.pad(images, (p, p, p, p))
        batch = torch.arange(B, device=dev)[:, None, None]
        images = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    if k := spec.cutout:  # a k x k square centred on a random pixel, clipped at the border
        y, x = draw(H, B, 1) - k // 2, draw(W, B, 1) - k // 2
        r, c = torch.arange(H, device=dev), torch.arange(W, device=dev)
        hole = ((r >= y) & (r < y + k))[:, None, :, None] & ((c >= x) & (c < x + k))[:, None, None, :]
        images = images.masked_fill(hole, 0)
    return images


def _autocast(device: torch.device, on: bool = True) -> AbstractContextManager[None]:
    dtype = amp_dtype(device) if on else None
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def _batches(n: int, size: int, generator: Generator, device: torch.device) -> Iterator[Tensor]:
    """One epoch of index batches; the last, smaller one is kept unless it is a single image (BatchNorm needs two)."""
    yield from torch.randperm(n, generator=generator, device=device).split(size)[: _steps(n, size)]


def _steps(n: int, size: int) -> int:
    return max(1, n // size + (n % size > 1))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the previous mode of every module afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def fit(
    model: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    step: Step | None = None,
    note: str = "train",
    after_epoch: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place on `data`, on the device where the images are.

    Args:
        model: any classifier ``(B, C, H, W)`` in [0, 1] -> ``(B, K)``.
        data: uint8 images, poisoned or clean.
        recipe: optimiser, schedule, epochs.
        seed: of batch order, augmentation and of whatever `step` draws.
        step: what a training step does; the default is cross-entropy.
        note: label of the progress bar.
        after_epoch: called with the number of epochs done, e.g. to keep a snapshot.

    Returns:
        One record an epoch: epoch, loss, accuracy on the training batches as trained, lr, seconds.

    Raises:
        ValueError: an empty set.
        Diverged: a loss or a weight that is no longer finite; `model` is set back to the last epoch that was good.
    """
    if len(data) == 0:
        raise ValueError("cannot train on an empty image set")
    step, device = step or Step(), data.images.device
    generator = Generator(device).manual_seed(seed)
    model.to(memory_format=torch.channels_last).to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = recipe.optimiser(params)
    model.train()
    log: list[dict[str, float]] = []
    bar = tqdm(range(recipe.epochs), desc=note, leave=False)
    done, steps = 0, _steps(len(data), recipe.batch)
    watch = Watch(note, model.state_dict(), f"lower lr, which is {recipe.lr}", every=steps)
    for epoch in bar:
        start, loss_sum, right, seen = (
            time.perf_counter(),
            torch.zeros((), device=device),
            torch.zeros((), device=device),
            0,
        )
        for index in _batches(len(data), recipe.batch, generator, device):
            x, y = data.images[index], data.labels[index]  # (B, C, H, W) uint8, (B,)
            if step.before_augment:
                x, y = step.change(x.float() / 255, y, generator)
            if recipe.augment:
                x = augment(x, data.augment, generator)
            if not step.before_augment:
                x, y = step.change(x.float() / 255, y, generator)
            for group in opt.param_groups:
                group["lr"] = recipe.lr_at(done, steps)
            with _autocast(device, recipe.amp):
                loss, logits = step.loss(
                    model, x.contiguous(memory_format=torch.channels_last), y, recipe.label_smoothing
                )
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            watch(loss)
            loss_sum += loss.detach() * len(y)  # stays on the device: no sync inside an epoch
            right += (logits.detach().argmax(1) == y).sum()
            seen, done = seen + len(y), done + 1
        record = {
            "epoch": epoch + 1, "loss": float(loss_sum / seen), "accuracy": float(right / seen),
            "lr": recipe.lr_at(done - 1, steps), "seconds": time.perf_counter() - start,
        }  # fmt: skip
        log.append(record)
        if after_epoch is not None:
            after_epoch(epoch + 1)
        bar.set_postfix(loss=f"{record['loss']:.3f}", accuracy=f"{record['accuracy']:.3f}")
    model.eval()
    return log


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch: int | None = None, amp: bool = True) -> Tensor:
    """Logits of a whole set, in evaluation mode; the model's mode is restored.

    Args:
        images: ``(N, C, H, W)``, uint8 or float in [0, 1].
        amp: bfloat16 where the processor computes it natively; False is float32, for comparing logits (a GPU's
            convolutions are then in TF32 unless `torch.backends.cudnn.allow_tf32` is False).
        batch: images a pass; by default 5,000 on a GPU, which that many fill, and 250 on a processor, whose caches hold
            no more (1,000 take 1.5 times as long). Halved, with a warning, as often as a GPU runs out of memory.

    Returns:
        ``(N, K)`` float32 on the device of the images.

    Raises:
        ValueError: float images outside [0, 1] or of the wrong shape.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if images.is_floating_point() and len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError(f"float images must lie in [0, 1], got {float(images.min()):.3g} to {float(images.max()):.3g}")
    if batch is None:
        batch = 250 if images.device.type == "cpu" else 5000
    while True:
        try:
            with evaluating(model), _autocast(images.device, amp):
                return torch.cat([model(_floats(x)).float() for x in images.split(batch)])
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        batch = batch // 2  # out of the handler, whose traceback keeps what did not fit
        torch.cuda.empty_cache()
        warnings.warn(f"out of GPU memory: evaluating in batches of {batch} instead", stacklevel=3)


def _floats(images: Tensor) -> Tensor:
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    return x.contiguous(memory_format=torch.channels_last)
