"""The pipeline that most public code on backdoors runs, to compare with: one PIL picture at a time, float32, batch 128.

After BackdoorBench @ f02e353 and bboylyg/RNP @ eeae192, without what they save to disk on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib.data.imageset import Augment, ImageSet


class PerSample(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One PIL image at a time through torchvision transforms; without `spec`, as for a test."""

    def __init__(self, data: ImageSet, spec: Augment | None = None) -> None:
        from torchvision import transforms as T

        self.arrays, self.labels = data.images.cpu().permute(0, 2, 3, 1).contiguous().numpy(), data.labels.tolist()
        change: list[Any] = [T.RandomCrop(data.shape[1:], padding=spec.pad)] if spec else []
        flip: list[Any] = [T.RandomHorizontalFlip()] if spec and spec.flip else []
        self.transform = T.Compose([T.ToPILImage(), *change, *flip, T.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.arrays[i]), self.labels[i]


def usual_epoch(model: nn.Module, data: PerSample, device: str = "cpu", *, batch: int = 128, workers: int = 2) -> None:
    """One epoch of the loop most public code runs: DataLoader, per-sample transforms, float32, `loss.item()` a step."""
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True, num_workers=workers)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    total = 0.0
    for x, y in loader:
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        total += loss.item()


@torch.no_grad()
def usual_evaluation(
    model: nn.Module, sets: Sequence[PerSample], device: str = "cpu", *, batch: int = 128, workers: int = 2
) -> list[float]:
    """Accuracy on each set as that code takes it after every epoch: a loader each, one read of the device a batch."""
    model.eval()
    out = []
    for data in sets:
        loader, right = torch.utils.data.DataLoader(data, batch, num_workers=workers), 0
        for x, y in loader:
            right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
        out.append(right / len(data))
    return out
