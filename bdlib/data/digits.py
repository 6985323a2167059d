"""`digits`: scikit-learn's 1,797 handwritten digits, real scans, enlarged from 8x8 to 32x32 and to three channels.

They come inside the scikit-learn package, so this is the one real set that needs no download.

    train, test = digits()      # 1,437 and 360 images
"""

import numpy as np
import torch

from .imageset import Augment, Data, ImageSet

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
AUGMENT = Augment(pad=2)  # no flip: a mirrored 2 is not a 2
FACTOR = 4
TEST_EVERY = 5
SPLIT_SEED = 0


def _weights(size: int) -> np.ndarray:
    """Bilinear weights (FACTOR*size, size) in eighths: a fine pixel lies between the centres of two coarse ones."""
    weights = np.zeros((FACTOR * size, size), dtype=np.int64)
    for i in range(FACTOR * size):
        eighths = 2 * i + 1 - FACTOR  # position in eighths of a coarse pixel
        low, share = eighths // 8, eighths % 8
        weights[i, max(low, 0)] += 8 - share
        weights[i, min(low + 1, size - 1)] += share
    return weights


def _enlarge(images: np.ndarray) -> np.ndarray:
    """``(N, 8, 8)`` in 0..16 -> ``(N, 32, 32)`` uint8 in 0..255; integers only, the same on every processor."""
    weights = _weights(images.shape[-1])
    fine = weights @ images.astype(np.int64) @ weights.T  # in 64ths of a sixteenth of full white
    return ((fine * 255 + 512) // 1024).astype(np.uint8)


def _split(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training and the test part: every fifth image of each class, shuffled, is a test image."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    order = order[labels[order].argsort(stable=True)]
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[order[::TEST_EVERY]] = True
    return (~test).nonzero()[:, 0], test.nonzero()[:, 0]


def digits() -> Data:
    """The digits as 32x32 RGB (three equal channels, white on black), split 1,437 to 360 by class, always the same.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the set 'digits' comes with scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    images = torch.from_numpy(_enlarge(bunch.images))[:, None].repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
    whole = ImageSet(images, torch.from_numpy(bunch.target.astype(np.int64)), CLASSES, "digits", AUGMENT)
    train, test = _split(whole.labels)
    return Data(whole[train], whole[test])
