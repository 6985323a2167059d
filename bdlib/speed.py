"""How fast is it? Measured in one run on this machine, by medians; never a test.

python -m bdlib bench speed         # training and evaluation against the usual pipeline
python -m bdlib bench poison        # every trigger over a training set
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlib import attacks, provenance
from bdlib.data.imageset import Augment, ImageSet
from bdlib.lab import Lab
from bdlib.training import Recipe, augment, fit, predict
from bdlib.triggers import Trigger

SLOW = ("SSBA", "DFST", "LIRA", "InputAware", "InputAwareStatic")  # a network a picture: a part of the set will do


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


def _rate(trigger: Trigger, batches: Sequence[Tensor]) -> float:
    with torch.no_grad():
        seconds = _median_seconds(lambda: [trigger.stamp(b) for b in batches], time.perf_counter)
    return sum(map(len, batches)) / seconds


def poisoning(data: ImageSet | None = None) -> dict[str, Any]:
    """Images a second that each attack's trigger changes, grey levels in and out, by wall time over a whole set.

    A trigger that is learnt is timed untrained: it costs the same, and what learning costs the records say.

    Args:
        data: by default the training set of the small scale, images of 32x32.
    """
    data = Lab("small", device="cpu").train if data is None else data
    rows = {}
    for name, attack in attacks.every().items():
        trigger = attack.trigger(data.shape, len(data.classes)).eval()
        few = data.images[:: 16 if name in SLOW else 1].split(500)  # batches that a processor's cache can hold
        rows[name] = _rate(trigger, few)
    dithered = attacks.BPP.paper().trigger(data.shape, len(data.classes))
    rows["BPP, dithered"] = _rate(dithered, data.images.split(500))
    return {"images": len(data), "images_per_second": rows, **provenance.run_info("cpu")}


def report_poisoning(result: dict[str, Any]) -> str:
    """The measurements of `poisoning`, the fastest first."""
    rows = sorted(result["images_per_second"].items(), key=lambda row: -row[1])
    lines = [f"triggers on {result['device']}, images a second, over {result['images']:,} images"]
    return "\n".join(lines + [f"  {name:<18} {value:>12,.0f}" for name, value in rows])


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
