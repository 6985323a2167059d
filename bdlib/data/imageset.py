"""An image set is one uint8 tensor on a device, its labels, and the augmentation that is safe for it.

train, test = bdlib.data.load("signs")
train.images                       # (N, C, H, W) uint8, editable by index: poisoning is a tensor write
clean = clean_set(train, count=500, seed=0)
clean.learn, clean.select          # what a defence may learn from, what it may choose a threshold on
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Random changes that keep the class of an image of this set.

    Args:
        pad: zero-pad by this many pixels, then crop back at a random place; 0 is off.
        flip: mirror left-right with probability 1/2. Never for signs or digits: it changes the class.
        cutout: side in pixels of one erased square; 0 is off.
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("pad", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more pixels, got {getattr(self, name)}")


@dataclass(frozen=True)
class ImageSet:
    """Images, labels, class names, and the augmentation that belongs to them.

    Args:
        images: ``(N, C, H, W)`` uint8, on any device.
        labels: ``(N,)`` int64 in ``[0, len(classes))``, same device.
        classes: one name per class.
        name: short name of the set, as in `load(name)`.
        augment: what training may do to an image without changing its class.
        notes: facts about the copy at hand that records must repeat, e.g. "md5 not verified".

    Raises:
        ValueError: wrong dtype, shape or label range; the message names the value.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    augment: Augment = field(default_factory=Augment)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise ValueError(f"images must be uint8 of shape (N, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise ValueError(f"labels must be int64 of shape ({len(x)},), got {y.dtype} of shape {tuple(y.shape)}")
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= len(self.classes)):
            raise ValueError(f"labels must lie in [0, {len(self.classes) - 1}], got {int(y.min())} to {int(y.max())}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | slice) -> "ImageSet":
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    @property
    def floats(self) -> Tensor:
        """All images as ``(N, C, H, W)`` float32 in [0, 1], as attacks and defences see them."""
        return self.images.float() / 255

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel in [0, 1], rounded to 4 decimals."""
        level = torch.arange(256, dtype=torch.float64) / 255
        counts = [torch.bincount(c.flatten().cpu(), minlength=256).double() for c in self.images.unbind(1)]
        n = counts[0].sum()  # pixels a channel; a histogram holds all that is needed, and no float copy of the set
        means = [float(h @ level / n) for h in counts]
        stds = [float(((h @ level**2 - n * m**2) / (n - 1)).sqrt()) for h, m in zip(counts, means, strict=True)]
        return tuple(round(m, 4) for m in means), tuple(round(s, 4) for s in stds)

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of shape, pixels and labels."""
        h = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        h.update(self.images.cpu().contiguous().numpy().tobytes())
        h.update(self.labels.cpu().numpy().tobytes())
        return h.hexdigest()[:16]


class Data(NamedTuple):
    """A training and a test set of the same classes."""

    train: ImageSet
    test: ImageSet


KFOLD_BELOW = 200  # with fewer clean images a held-out part is too small to choose a threshold on
FOLDS = 4


@dataclass(frozen=True)
class CleanSet:
    """The defender's clean images, already shuffled, with a part held out for choosing a threshold.

    Args:
        images: the whole budget, ``(N, C, H, W)`` uint8.
        held_out: share of the images kept out of learning, in (0, 1).
    """

    images: ImageSet
    held_out: float = 0.3

    def __post_init__(self) -> None:
        if len(self.images) < FOLDS:
            raise ValueError(f"a clean set needs {FOLDS} images or more, got {len(self.images)}")

    def __len__(self) -> int:
        return len(self.images)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        n = len(self.images)
        if n >= KFOLD_BELOW:
            cut = max(1, n - max(1, round(n * self.held_out)))
            order = torch.arange(n)
            return [(order[:cut], order[cut:])]
        fold = torch.arange(n) % FOLDS
        return [((fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]) for k in range(FOLDS)]

    def folds(self) -> list[tuple[ImageSet, ImageSet]]:
        """Pairs (learn, select): one pair, or four-fold cross-validation below 200 images."""
        return [(self.images[learn], self.images[select]) for learn, select in self._parts()]

    @property
    def learn(self) -> ImageSet:
        """What a defence may learn from (of the first fold)."""
        return self.folds()[0][0]

    @property
    def select(self) -> ImageSet:
        """What a defence may choose a threshold on (of the first fold); never learnt from."""
        return self.folds()[0][1]


def clean_set(
    pool: ImageSet,
    *,
    count: int | None = None,
    fraction: float | None = None,
    per_class: int | None = None,
    held_out: float = 0.3,
    seed: int = 0,
) -> CleanSet:
    """Draw the defender's clean images from `pool`: exactly one of the three budgets.

    Args:
        pool: clean, correctly labelled images, by preference not used to train the victim.
        count: this many images, uniformly.
        fraction: this share of the pool in (0, 1], uniformly.
        per_class: this many images of every class.
        held_out: share kept for choosing a threshold.
        seed: of the draw.

    Raises:
        ValueError: not exactly one budget; a budget the pool cannot meet; a class without any image.
    """
    if sum(b is not None for b in (count, fraction, per_class)) != 1:
        raise ValueError(f"give exactly one of count, fraction, per_class, got {count=}, {fraction=}, {per_class=}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")
    n, labels = len(pool), pool.labels.cpu()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if per_class is not None:
        have = torch.bincount(labels, minlength=len(pool.classes))
        if per_class < 1 or per_class > int(have.min()):
            k = int(have.argmin())
            raise ValueError(
                f"per_class must be in [1, {int(have.min())}], got {per_class}: "
                f"class {pool.classes[k]!r} has {int(have[k])} images in the pool"
            )
        hits = torch.nn.functional.one_hot(labels[order], len(pool.classes)).cumsum(0)  # (N, K) running counts
        order = order[hits.gather(1, labels[order, None])[:, 0] <= per_class]
    else:
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        count = count if count is not None else round(fraction * n)  # type: ignore[operator]
        if not 1 <= count <= n:
            raise ValueError(f"count must be in [1, {n}], got {count}")
        order = order[:count]
    missing = set(range(len(pool.classes))) - set(labels[order].tolist())
    if missing:
        names = ", ".join(pool.classes[k] for k in sorted(missing))
        raise ValueError(
            f"the clean set of {len(order)} images has none of: {names}; raise the budget or use per_class"
        )
    return CleanSet(pool[order.to(pool.images.device)], held_out)
