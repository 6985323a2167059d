"""How fast is it? Ratios measured in one run on this machine, by process time and medians; never a test.

python -m bdlib bench speed
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib import provenance
from bdlib.data.imageset import Augment, ImageSet
from bdlib.lab import Lab
from bdlib.training import Recipe, augment, fit, predict


def _median_seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time, repeat: int = 3) -> float:
    """Median time of `work`, by default of all threads of this process; one run beforehand is not counted."""
    work()
    times = []
    for _ in range(repeat):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


class _PerSample(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The usual pipeline: one PIL image at a time through torchvision transforms."""

    def __init__(self, data: ImageSet, spec: Augment) -> None:
        from torchvision import transforms as T

        self.arrays, self.labels = data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.labels.tolist()
        steps: list[Any] = [T.ToPILImage(), T.RandomCrop(data.shape[1:], padding=spec.pad)]
        self.transform = T.Compose([*steps, *([T.RandomHorizontalFlip()] if spec.flip else []), T.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.arrays[i]), self.labels[i]


def usual_epoch(model: nn.Module, data: ImageSet, spec: Augment, *, batch: int, workers: int) -> None:
    """One epoch of the loop most public code runs: DataLoader, per-sample transforms, float32, `loss.item()` a step."""
    loader = torch.utils.data.DataLoader(_PerSample(data, spec), batch, shuffle=True, num_workers=workers)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    total = 0.0
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        total += loss.item()


def measure() -> dict[str, Any]:
    """Augmentation, training step and evaluation against the usual pipeline, on the CPU with the small network.

    Process time counts the work of this process in all threads. The usual loop's workers are processes of their own, so
    whole epochs are compared by wall time: run it on an idle machine.
    """
    lab = Lab("small", device="cpu")
    data, spec, recipe = lab.train, Augment(pad=4, flip=True), lab.scale.recipe
    n, generator = len(data), torch.Generator().manual_seed(0)
    index = [torch.randperm(n, generator=generator)[i : i + recipe.batch] for i in range(0, n, recipe.batch)]
    samples = _PerSample(data, spec)
    ours = _median_seconds(lambda: [augment(data.images[i], spec, generator).float().div(255) for i in index])
    theirs = _median_seconds(lambda: [samples[i] for i in range(n)])
    result: dict[str, Any] = {"augment": {"batched": n / ours, "per_sample": n / theirs, "ratio": theirs / ours}}

    def wall(work: Callable[[], Any]) -> float:
        return _median_seconds(work, time.perf_counter)

    one = Recipe(epochs=1, batch=recipe.batch)
    nets = [lab.network(0) for _ in range(3)]
    shipped = wall(lambda: fit(nets[0], data, one))
    usual = wall(lambda: usual_epoch(nets[1], data, lab.train.augment, batch=recipe.batch, workers=2))
    float32 = wall(lambda: fit(nets[2], data, replace(one, amp=False)))
    result["epoch"] = {
        "as_shipped": n / shipped, "float32": n / float32, "usual": n / usual,
        "ratio_as_shipped": usual / shipped, "ratio_float32": usual / float32,
    }  # fmt: skip
    result["evaluation"] = {"images_per_second": len(lab.test) / wall(lambda: predict(nets[0], lab.test.images))}
    return {**result, **provenance.run_info("cpu")}


def report(result: dict[str, Any]) -> str:
    """The measurements as a table of images a second."""
    a, e = result["augment"], result["epoch"]
    training = f"as shipped {e['as_shipped']:,.0f}, float32 {e['float32']:,.0f}, usual loop {e['usual']:,.0f}"
    lines = [
        f"speed on {result['device']}, {result['dtype']}, images a second",
        f"  augmentation  batched {a['batched']:,.0f}, per sample {a['per_sample']:,.0f}: {a['ratio']:.1f} times",
        f"  training      {training}: {e['ratio_as_shipped']:.2f} and {e['ratio_float32']:.2f} times",
        f"  evaluation    {result['evaluation']['images_per_second']:,.0f}",
    ]
    return "\n".join(lines)
