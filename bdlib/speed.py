"""How fast is it? Measured in one run on this machine, by medians; never a test.

python -m bdlib bench speed         # training, evaluation and defences, against the usual pipeline and the FLOP floor
python -m bdlib bench poison        # every trigger over a training set
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bdlib import attacks, provenance
from bdlib.attacks.badnets import BadNets
from bdlib.data.imageset import Augment, CleanSet, ImageSet, clean_set
from bdlib.defenses.anp import ANP
from bdlib.defenses.base import Repair
from bdlib.defenses.mnp import MNP
from bdlib.defenses.nad import NAD
from bdlib.defenses.npd import NPD
from bdlib.defenses.rnp import RNP, Ascent
from bdlib.flops import STAGES, flops, stage_flops
from bdlib.lab import HELD_OUT, NETWORKS, SCALES, Lab
from bdlib.machine import device_of, peak_bytes
from bdlib.metrics import accuracy, evaluate, triggered_images
from bdlib.neurons import clean_curve, curve, grid
from bdlib.training import Recipe, augment, fit
from bdlib.triggers import Trigger
from bdlib.usual import PerSample, usual_epoch, usual_evaluation

SECTIONS = ("augment", "epoch", "networks", "evaluation", "defences")
SLOW = ("SSBA", "DFST", "LIRA", "InputAware", "InputAwareStatic")  # a network a picture: a part of the set will do
Result = dict[str, Any]
Made = tuple[nn.Module, Trigger, dict[str, float]]  # a victim, its trigger, and what making it took


def _median_seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time, repeat: int = 3) -> float:
    """Median time of `work`, by default of all threads of this process; one run beforehand is not counted."""
    work()
    times = []
    for _ in range(repeat):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def _wall(work: Callable[[], Any], device: str, repeat: int) -> Result:
    """Median wall seconds of `repeat` calls, and what the call before them took longer; 0 times that call alone."""
    times = []
    for _ in range(repeat + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:] or times)
    return {"seconds": median, "calls": max(1, repeat), **({"warm_up": times[0] - median} if repeat else {})}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: str, dtype: torch.dtype, repeat: int = 5) -> float:
    """Operations a second of a large product of random matrices: the most that a network could reach here."""
    n, times = (8192, 20) if torch.device(device).type == "cuda" else (1536, 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))  # zeros would be faster on a GPU
    return 2 * n**3 * times / float(_wall(lambda: [a @ b for _ in range(times)], device, repeat)["seconds"])


@dataclass(frozen=True)
class Setting:
    """Data, networks, schedules and repetitions of one device.

    Args:
        train, test: on the device, never black: a GPU multiplies zeros faster.
        networks: makers of what `train` and `predict` are timed on.
        recipe: as shipped; the usual pipeline has its own.
        victim: makes one; with the seconds it took where that is part of the measurement.
        defences, clean: by name.
        repeat: calls whose median counts, after one that does not.
        calls: the same of a defence, its choice and its curve; 0 times one call alone, hundreds of steps long and warm.
        curves: whether to time the ACC and ASR curve of the methods that prune.
        images: how many of `train` the networks are timed on.
        workers: processes of each loader of the usual pipeline.
    """

    device: str
    train: ImageSet
    test: ImageSet
    networks: Mapping[str, Callable[[], nn.Module]]
    recipe: Recipe
    victim: Callable[[], Made]
    defences: dict[str, Any]
    clean: dict[str, CleanSet]
    repeat: int = 3
    calls: int = 0
    curves: bool = False
    images: int = 1024
    workers: int = min(8, os.cpu_count() or 1)


def setting(device: str, quick: bool = False) -> Setting:
    """Signs and the small network on a processor; noise shaped as CIFAR-10 and the papers' networks on a GPU.

    Args:
        quick: few images, one repetition, defences cut to a few steps: to see that it runs, not how fast.
    """
    s = _on_gpu(device) if torch.device(device).type == "cuda" else _on_processor(device)
    if not quick:
        return s
    brief, few, train = Ascent(epochs=1), next(iter(s.clean.values())).images[:200], s.train[:512]
    cut = {"ANP": ANP(iterations=4), "RNP": RNP(brief, epochs=1), "NPD": NPD(epochs=1, warm_up=0),
           "NAD": NAD(Recipe(1), Recipe(1)), "MNP": MNP(brief, epochs=1)}  # fmt: skip
    victim = partial(_made, s.networks, train, replace(s.recipe, epochs=1), 0)
    clean = dict.fromkeys(cut, CleanSet(few, HELD_OUT))
    return replace(
        s, train=train, test=s.test[:256], victim=victim, defences=cut, clean=clean, repeat=1, calls=0, images=256
    )


def _on_processor(device: str) -> Setting:
    lab = Lab("small", device=device, dataset="signs", network="small")
    networks = {k: Lab("small", device=device, dataset="signs", network=k).network for k in ("small", "wide_resnet")}

    def victim() -> Made:
        found = lab.victim(BadNets(target=lab.target))
        assert found.trigger is not None
        return found.model, found.trigger, {}

    defences = {"ANP": ANP.small(), "RNP": RNP.small(), "NPD": NPD.small(), "NAD": NAD.small(), "MNP": MNP.small()}
    clean = dict.fromkeys(defences, lab.clean())
    train, test = lab.train[:2500], lab.test[:1000]  # half of each set keeps all sections within minutes on one core
    return Setting(device, train, test, networks, lab.scale.recipe, victim, defences, clean)


def _on_gpu(device: str) -> Setting:
    train, test, pool = noise(50_000, device), noise(10_000, device, seed=2), noise(5000, device, seed=3)
    names, (mean, std) = ("preact_resnet18", "resnet18", "wide_resnet", "vgg19_bn"), train.stats()
    networks = {k: lambda make=NETWORKS[k]: make(10, mean, std).to(device) for k in names}
    recipe = SCALES["full"].recipe
    defences = {"ANP": ANP.paper(), "RNP": RNP.paper(), "NPD": NPD.paper(), "NAD": NAD.paper(), "MNP": MNP.paper()}
    # as published: 5 % of the training set, or 500 images
    clean = {k: clean_set(pool, count=2500 if k in ("NAD", "NPD") else 500, held_out=HELD_OUT) for k in defences}
    victim = partial(_made, networks, train, recipe, 0)
    return Setting(
        device, train, test, networks, recipe, victim, defences, clean, calls=3, curves=True, images=len(train)
    )


def _made(networks: Mapping[str, Callable[[], nn.Module]], train: ImageSet, recipe: Recipe, target: int) -> Made:
    """A victim of BadNets on the first network, and how long poisoning and training took."""
    model, device, times = next(iter(networks.values()))(), str(train.images.device), [time.perf_counter()]
    poisoned = BadNets(target=target).poison(train)
    _wait(device)
    times.append(time.perf_counter())
    fit(model, poisoned.data, recipe)
    _wait(device)
    times.append(time.perf_counter())
    return model, poisoned.trigger, {"poisoning": times[1] - times[0], "training": times[2] - times[1]}


def noise(n: int, device: str, *, classes: int = 10, seed: int = 1) -> ImageSet:
    """Images ``(n, 3, 32, 32)``: half a random picture of their class, half noise, so that a network can learn them.

    An untrained network would do for most clocks, but RNP and MNP stop unlearning when nothing is left to forget.
    """
    generator = torch.Generator(device)
    pictures = torch.randint(256, (classes, 3, 32, 32), generator=generator.manual_seed(0), device=device)
    labels = torch.arange(n, device=device) % classes
    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8, device=device)
    images.random_(0, 256, generator=generator.manual_seed(seed))
    for part in torch.arange(n, device=device).split(5000):
        images[part] = ((images[part].long() + pictures[labels[part]]) // 2).to(torch.uint8)
    return ImageSet(images, labels, tuple(map(str, range(classes))), "noise", Augment(pad=4, flip=True))


def measure(device: str | None = None, *, quick: bool = False, sections: Sequence[str] = SECTIONS) -> Result:
    """Time what is shipped against the usual pipeline and against the arithmetic it cannot do without.

    Run it on an idle machine: except for augmentation, which is compared by process time, the clock is on the wall.

    Args:
        device: "cpu" or "cuda"; by default see `bdlib.machine.device_of`.
        quick: see `setting`.
        sections: any of `SECTIONS`.

    Returns:
        matmul (operations a second by number type) and a dict a section; times in seconds, warm-up apart. "floor" is
        the time of the steps' operations at the matmul rate of the number type that training uses; choosing a
        threshold and curves are work on top. peak_bytes: of GPU memory, or of the process. seconds: of it all.

    Raises:
        ValueError: an unknown section; a device that is not there.
    """
    if unknown := [s for s in sections if s not in SECTIONS]:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {unknown[0]!r}")
    device = device_of(device or "")
    start, s, info = time.perf_counter(), setting(device, quick), provenance.run_info(device)
    types = {torch.float32, provenance.amp_dtype(device) or torch.float32}
    rates = {str(t).removeprefix("torch."): matmul_rate(device, t) for t in sorted(types, key=str)}
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts = {"augment": _augment, "epoch": _epoch, "networks": _networks, "evaluation": _evaluation,
             "defences": _defences}  # fmt: skip
    result: Result = {"quick": quick, "matmul": rates}
    for name in tqdm([n for n in SECTIONS if n in sections], desc="speed", leave=False):
        result[name] = parts[name](s, rates[info["dtype"]])
    return {**result, "peak_bytes": peak_bytes(device), "seconds": time.perf_counter() - start, **info}


def _augment(s: Setting, rate: float) -> Result:
    """Images a second through crop and flip to floats: all of a batch at once, and one at a time."""
    spec, n = Augment(pad=4, flip=True), min(5000, len(s.train))
    data, generator = s.train[:n], torch.Generator(s.device).manual_seed(0)

    def batched() -> None:
        for x in data.images.split(s.recipe.batch):
            augment(x, spec, generator).float().div(255)
        _wait(s.device)

    samples, gpu = PerSample(data, spec), torch.device(s.device).type == "cuda"
    ours = _median_seconds(batched, time.perf_counter if gpu else time.process_time, s.repeat)
    theirs = _median_seconds(lambda: [samples[i] for i in range(n)], repeat=s.repeat)
    return {"batched": n / ours, "per_sample": n / theirs, "ratio": theirs / ours}


def _epoch(s: Setting, rate: float) -> Result:
    """One epoch of training, and the ACC and ASR evaluation that the usual code makes after it."""
    make = next(iter(s.networks.values()))
    trigger = BadNets(target=0).trigger(s.train.shape, len(s.train.classes)).to(s.device)
    images, labels = triggered_images(s.test, trigger)
    pictures = PerSample(s.train, Augment(4, True))
    sets = [PerSample(s.test), PerSample(replace(s.test, images=images, labels=labels))]
    usual, plain, shipped = make(), make(), make()
    recipes = {"float32": replace(s.recipe, epochs=1, batch=128, amp=False), "as_shipped": replace(s.recipe, epochs=1)}
    ways = {
        "usual": (
            lambda: usual_epoch(usual, pictures, s.device, workers=s.workers),
            lambda: usual_evaluation(usual, sets, s.device, workers=s.workers),
        ),
        "float32": (lambda: fit(plain, s.train, recipes["float32"]), lambda: evaluate(plain, s.test, trigger)),
        "as_shipped": (
            lambda: fit(shipped, s.train, recipes["as_shipped"]),
            lambda: evaluate(shipped, s.test, trigger),
        ),
    }
    if provenance.amp_dtype(s.device) is None and s.recipe.batch == 128:
        del ways["as_shipped"]  # the same computation: two clocks on it would differ by chance
    out: Result = {"images": len(s.train), "tested": len(s.test) + len(labels), "workers": s.workers}
    for name, (train, test) in ways.items():
        out[name] = {"train": _wall(train, s.device, s.repeat), "evaluate": _wall(test, s.device, s.repeat)}
    out.setdefault("as_shipped", out["float32"])
    total = {k: out[k]["train"]["seconds"] + out[k]["evaluate"]["seconds"] for k in ("usual", "float32", "as_shipped")}
    return out | {f"ratio_{k}": total["usual"] / total[k] for k in ("float32", "as_shipped")}


def _networks(s: Setting, rate: float) -> Result:
    """Images a second of training and of evaluation, and the share of the matmul rate that they reach (MFU)."""
    out: Result = {}
    data, one = s.train[: s.images], replace(s.recipe, epochs=1)
    for name, make in s.networks.items():
        net, few = make(), data[:64]
        works: dict[str, tuple[Callable[[ImageSet], Any], ImageSet]]
        works = {"train": (partial(fit, net, recipe=one), data), "evaluate": (partial(accuracy, net), s.test)}
        out[name] = {}
        for kind, (work, on) in works.items():
            each = flops(partial(work, few)) / len(few)
            timed = _wall(partial(work, on), s.device, s.repeat)
            per_second = len(on) / timed["seconds"]
            out[name][kind] = {"images_per_second": per_second, "flop": each, "mfu": per_second * each / rate, **timed}
    return out


def _evaluation(s: Setting, rate: float) -> Result:
    """ACC, ASR and RA of the first network, its triggered images made anew."""
    net = next(iter(s.networks.values()))()
    trigger = BadNets(target=0).trigger(s.train.shape, len(s.train.classes)).to(s.device)
    floor = flops(lambda: evaluate(net, s.test, trigger)) / rate
    timed = _wall(lambda: evaluate(net, s.test, trigger), s.device, s.repeat)
    images = len(s.test) + len(triggered_images(s.test, trigger)[1])
    return {"images": images, "floor": floor, "ratio": timed["seconds"] / floor, **timed}


def _defences(s: Setting, rate: float) -> Result:
    """Every defence on one victim; what the victim took, where it was made here."""
    model, trigger, seconds = s.victim()
    rows = {name: _defence(s, name, model, trigger, rate) for name in s.defences}
    return {"victim": seconds, **rows} if seconds else rows


def _defence(s: Setting, name: str, model: nn.Module, trigger: Trigger, rate: float) -> Result:
    """Seconds of a defence, the floor of its steps, and what choosing a threshold and drawing a curve take."""
    defence, clean, repairs = s.defences[name], s.clean[name], list[Repair]()
    each = {stage: stage_flops(defence, stage, model, clean) for stage in STAGES[name]}  # warms the caches as well
    row = _wall(lambda: repairs.append(defence(model, clean)), s.device, s.calls)
    details = repairs[-1].details
    units = {stage: STAGES[name][stage][1](defence, details) for stage in each}
    floor = sum(each[stage] * units[stage] for stage in each) / rate
    row |= {"preset": repr(defence), "images": len(clean), "units": units, "floor": floor}
    row["ratio"] = row["seconds"] / floor
    if "masks" in details:
        if details["choice"]:
            choose = partial(clean_curve, model, details["masks"], grid(), clean.select)
            row["choosing"] = _wall(choose, s.device, s.calls)["seconds"]
        if s.curves:
            draw = partial(curve, model, details["masks"], grid(), s.test, trigger)
            row["curve"] = _wall(draw, s.device, s.calls)["seconds"]
    return row


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


def report(result: Result) -> str:
    """The measurements as text, a section a block; those that were not asked for are left out."""
    rates = ", ".join(f"{r / 1e9:,.0f} GFLOP/s in {t}" for t, r in result["matmul"].items())
    lines = [f"speed on {result['device']}, trained in {result['dtype']}; matmul {rates}"]
    lines += ["  QUICK: to see that it runs, not how fast"] if result["quick"] else []
    if a := result.get("augment"):
        one = f"batched {a['batched']:,.0f} images/s, one at a time {a['per_sample']:,.0f}"
        lines.append(f"  augmentation  {one}: {a['ratio']:.1f} times")
    if e := result.get("epoch"):
        lines.append(f"  epoch of {e['images']:,} images, and ACC and ASR on {e['tested']:,}")
        for k in ("usual", "float32", "as_shipped"):
            ratio = f", {e[f'ratio_{k}']:.2f} times" if k != "usual" else f", {e['workers']} workers"
            t, v = e[k]["train"]["seconds"], e[k]["evaluate"]["seconds"]
            lines.append(f"    {k:<16} {t:8.3f} + {v:.3f} s{ratio}")
    for name, kinds in result.get("networks", {}).items():
        both = ", ".join(f"{k} {v['images_per_second']:,.0f} images/s (MFU {v['mfu']:.0%})" for k, v in kinds.items())
        lines.append(f"  {name:<16} {both}")
    if v := result.get("evaluation"):
        lines.append(f"  evaluation    {v['images']:,} images in {v['seconds']:.3f} s, floor {v['floor']:.3f} s")
    for name, row in result.get("defences", {}).items():
        if name != "victim":
            parts = "".join(f", {k} {row[k]:.2f} s" for k in ("choosing", "curve") if k in row)
            lines.append(
                f"  {name:<16} {row['seconds']:8.2f} s, {row['ratio']:.1f} times its {row['floor']:.2f} s{parts}"
            )
    if victim := result.get("defences", {}).get("victim"):
        whole = sum(victim.values()) + sum(r["seconds"] for k, r in result["defences"].items() if k != "victim")
        lines.append(f"  one attack ({sum(victim.values()):.1f} s) and all defences: {whole:.1f} s")
    memory = f"peak memory {peak / 1e9:.2f} GB, " if (peak := result["peak_bytes"]) else ""
    return "\n".join([*lines, f"  {memory}{result['seconds']:.0f} s in all"])
