"""Records: every number of the book that no chapter computes live, one atomic record a cell, resumable.

    python -m bdlib bench records            # make what is missing or stale in book/results/small
    python -m bdlib bench records --list     # say what is there, missing, stale

A cell is an attack, a defence (or none), a clean budget and a seed. Its key is a hash of these, of the data and of the
code that computes it; a record whose key is no longer asked for is dropped.
"""

import json
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bdlib import attacks, files, provenance, store
from bdlib.attacks.badnets import BadNets
from bdlib.attacks.blend import Blend
from bdlib.attacks.sig import SIG
from bdlib.defenses.anp import ANP
from bdlib.defenses.fp import FP
from bdlib.defenses.ft import FT
from bdlib.defenses.ft_sam import FTSAM
from bdlib.defenses.ibau import IBAU
from bdlib.defenses.mnp import MNP
from bdlib.defenses.nad import NAD
from bdlib.defenses.npd import NPD
from bdlib.defenses.rnp import RNP, Ascent
from bdlib.lab import HELD_OUT, Lab
from bdlib.metrics import Scores, accuracy, der, evaluate
from bdlib.neurons import curve, grid
from bdlib.records import RESULTS, read

# no chapter draws their curves, each of which costs more than the repair
WITHOUT_ORACLE = ("budget", "mnp-variants", "defences-more", "rnp-unasked", "fresh-seeds")
SEEDS = (3, 4, 5)  # 0 to 2 were used to settle data set, network and recipes
SETTLING = (0, 1, 2, 6, 7, 8)  # of NPD's bound
FRESH = (9, 10, 11)  # looked at once, when every preset was settled


@dataclass(frozen=True)
class Cell:
    """One experiment on one seed.

    Args:
        experiment: the file it goes to, ``book/results/small/{experiment}.json``.
        label: what varies, as the figure shows it, e.g. ``{"lr": 0.02}``.
        attack: poisons the victim; None for a clean victim, which is scored under the triggers of both attacks.
        defense: repairs the victim; None scores the victim itself.
        clean: the defender's budget, ``{"count": 500}`` or ``{"per_class": 10}``.
    """

    experiment: str
    label: dict[str, Any]
    attack: Any
    defense: Any
    seed: int
    clean: tuple[tuple[str, int], ...] = ()


def cells(target: int) -> list[Cell]:
    """Every cell that the chapters of this edition read, the most telling first."""
    badnets, blend = BadNets(target=target), Blend(target=target)
    both: dict[str, Any] = {"BadNets": badnets, "Blend": blend}
    out: list[Cell] = []

    def add(
        experiment: str, label: dict[str, Any], attack: Any, defense: Any, on: Sequence[int] = SEEDS, **clean: int
    ) -> None:
        out.extend(Cell(experiment, label, attack, defense, s, tuple(clean.items())) for s in on)

    add("victims", {"attack": "none"}, None, None)
    for name, attack in both.items():
        add("victims", {"attack": name}, attack, None)
    for name, attack in both.items():
        add("defences", {"attack": name, "defence": "ANP"}, attack, ANP.small())
        add("defences", {"attack": name, "defence": "FP"}, attack, FP.small())
        for lr in (0.005, 0.02, 0.1):
            add("ft-lr", {"attack": name, "lr": lr}, attack, replace(FT.small(), lr=lr))
    for eps in (0.0, 0.1, 0.8):
        add("anp-eps", {"eps": eps}, badnets, replace(ANP.small(), eps=eps))
    for name, change in {
        "no projection": {"project": False},
        "random noise": {"adversarial": False},
        "running statistics": {"batch_statistics": False},
    }.items():
        add("anp-variants", {"variant": name}, badnets, replace(ANP.small(), **change))
    for rate in (0.002, 0.01, 0.03):
        for name, attack in both.items():
            add("poison-rate", {"attack": name, "rate": rate}, replace(attack, rate=rate), None)
    for images in (20, 5):
        add("anp-budget", {"per_class": images}, badnets, ANP.small(), per_class=images)
    every = both | {"SIG": SIG.small(target)}
    methods: dict[str, tuple[Any, ...]] = {
        "nad": (NAD.small(),),
        "rnp": (RNP.small(),),
        "npd": (NPD.small(),),
        "mnp": (MNP.small(),),
        "baselines": (IBAU.small(), FTSAM.small()),
    }
    for experiment, defences in methods.items():
        for name, attack in every.items():
            for defence in defences:
                add(experiment, {"attack": name, "defence": type(defence).__name__}, attack, defence)
    add("sig", {"attack": "SIG", "defence": "none"}, every["SIG"], None)
    for defence in (ANP.small(), FP.small(), replace(FT.small(), lr=0.1)):
        add("sig", {"attack": "SIG", "defence": type(defence).__name__}, every["SIG"], defence)
    variants: dict[str, dict[str, Any]] = {
        "nad-variants": {
            "no attention": replace(NAD.small(), betas=(0.0, 0.0, 0.0)),
            "attention x 10": replace(NAD.small(), betas=(5e3, 1e4, 1e4)),
        },
        "rnp-variants": {
            "released ascent": replace(RNP.small(), ascent=Ascent(batch=64)),
            "running statistics, clipped": replace(
                RNP.small(), ascent=replace(RNP.small().ascent, batch_statistics=False, clip=1.0)
            ),
        },
        "npd-variants": {
            "on the branch": replace(NPD.small(), place="branch"),
            "clean loss only": replace(NPD.small(), weights=(1.0, 0.0, 0.0, 0.0)),
            "bound 0.7": replace(NPD.small(), bound=0.7),
            "bound 2": replace(NPD.small(), bound=2.0),
            "last epoch": replace(NPD.small(), average=1),
            "no augmentation": replace(NPD.small(), augmented=False),
        },
        "mnp-variants": {
            "no penalty": replace(MNP.small(), penalty=0.0),
            "no preserving": replace(MNP.small(), kappa=0.0),
            "preserving x 1/30": replace(MNP.small(), kappa=1.0),
            "alternate": replace(MNP.small(), coupling="alternate"),
            "original": replace(MNP.small(), coupling="original"),
            "folded magnitude": replace(MNP.small(), kind="folded"),
        },
    }
    for experiment, changed in variants.items():
        for variant, defence in changed.items():
            add(experiment, {"variant": variant}, badnets, defence)
    for name, attack in {"none": None, "SIG": every["SIG"]}.items():  # what pruning without a suspicion would cost
        add("rnp-unasked", {"attack": name, "defence": "RNP"}, attack, replace(RNP.small(), suspect=0.0))
    add("anp-unbounded", {"attack": "none", "defence": "ANP"}, None, replace(ANP.small(), ceiling=1.0))
    for defence in (ANP.small(), RNP.small(), MNP.small(), NPD.small(), NAD.small(), FT.small(),
                    replace(FT.small(), lr=0.1), FP.small(), IBAU.small(), FTSAM.small()):  # fmt: skip
        label = {"defence": type(defence).__name__} | ({"lr": defence.lr} if isinstance(defence, FT) else {})
        add("clean-network", label, None, defence)
    for name, attack in {"none": None, "BadNets": badnets}.items():
        for bound in (0.7, 0.8, 0.9, 1.0):
            defence = replace(NPD.small(), bound=bound)
            on = SETTLING if attack else sorted(SETTLING + SEEDS)  # those of SEEDS to see, not to settle by
            add("npd-bound", {"attack": name, "bound": bound}, attack, defence, on=on)
        for defence in (ANP.small(), RNP.small(), MNP.small(), NPD.small()):
            add("fresh-seeds", {"attack": name, "defence": type(defence).__name__}, attack, defence, on=FRESH)
    tuned_weights = (FT.small(), FP.small(), NAD.small(), IBAU.small(), FTSAM.small())
    for images in (20, 10):
        for defence in (*tuned_weights, RNP.small(), MNP.small(), NPD.small()):  # ANP: anp-budget
            label = {"attack": "BadNets", "defence": type(defence).__name__, "per_class": images}
            add("budget", label, badnets, defence, per_class=images)
    known = attacks.every(target)
    for name, attack in known.items():
        add("attacks", {"attack": name}, attack, None)
    add("attacks", {"attack": "Refool", "preset": "official"}, attacks.Refool.official(target), None)
    for part, value in {"watermark": 0.0, "epsilon": 0.0, "size": None}.items():
        add("fc-parts", {"attack": "FC", "without": part}, replace(known["FC"], **{part: value}), None)
    for name in ("CL", "SSBA", "InputAware", "AdaptiveBlend"):  # clean label, per image, own training, adaptive
        for defence in (NAD.small(), ANP.small(), RNP.small(), NPD.small(), MNP.small()):
            add("defences-more", {"attack": name, "defence": type(defence).__name__}, known[name], defence)
    for rate in (0.002, 0.01, 0.03):
        for attack in (attacks.TrojanPatch(target), attacks.LF.closed_form(target)):
            label = {"attack": type(attack).__name__, "rate": rate}
            add("attack-rate", label, replace(attack, rate=rate), None)
    for rate in (0.1, 0.25):
        add("attack-rate", {"attack": "SIG", "rate": rate}, replace(every["SIG"], class_rate=rate), None)
    return out


@cache
def _code(*modules: str) -> str:
    # not bdlib.neurons: only defences with masks draw a curve, and these import it
    return provenance.fingerprint("bdlib.metrics", "bdlib.training", "bdlib.models", *modules)


def cell_key(cell: Cell, lab: Lab) -> str:
    """What a record must carry to be current: cell, data, scale and the code that computes it."""
    modules = [type(m).__module__ for m in (cell.attack, cell.defense) if m is not None]
    data = [part.fingerprint() for part in (lab.train, lab.pool, lab.test)]
    split = {} if cell.defense is None else {"held_out": HELD_OUT}
    return store.key(cell=repr(cell), data=data, scale=repr(lab.scale), code=_code(*modules), **split)


def run(cell: Cell, lab: Lab) -> dict[str, Any]:
    """Compute one cell: train or find its victim, repair it, score both.

    Returns:
        A record: label, seed, attack, defence, clean_images, before, after (scores), der, threshold, pruned, choice
        (the defender's curve), share (see `RNP`), oracle (ACC and ASR against the threshold), cpu_seconds, and the
        provenance of the run.
    """
    victim = lab.victim(cell.attack, seed=cell.seed)
    record: dict[str, Any] = {"label": cell.label, "seed": cell.seed, "attack": repr(cell.attack)}
    if cell.attack is None:  # the floor: what a clean network says to the same triggers
        for attack in (BadNets(target=lab.target), Blend(target=lab.target)):
            trigger = attack.trigger(lab.train.shape, len(lab.train.classes), cell.seed)
            record[type(attack).__name__] = evaluate(victim.model, lab.test, trigger).asdict()
        record["before"] = {"acc": accuracy(victim.model, lab.test)}
    else:
        record["before"] = evaluate(victim.model, lab.test, victim.trigger).asdict()  # type: ignore[arg-type]
    record["train_cpu_seconds"] = victim.facts["cpu_seconds"]
    if cell.defense is not None:
        clean = lab.clean(**dict(cell.clean), seed=cell.seed)
        start = time.process_time()  # of all threads: it does not grow when the machine is shared
        repair = cell.defense(victim.model, clean, seed=cell.seed)
        cpu_seconds = time.process_time() - start
        record |= {"defence": repr(cell.defense), "clean_images": len(clean), "cpu_seconds": cpu_seconds}
        record |= {k: repair.details[k] for k in ("threshold", "pruned", "choice", "share") if k in repair.details}
        if victim.trigger is None:
            record["after"] = {"acc": accuracy(repair.model, lab.test)}
        else:
            after = evaluate(repair.model, lab.test, victim.trigger)
            record |= {"after": after.asdict(), "der": der(Scores(**record["before"]), after)}
            masks = repair.details.get("masks")
            if masks and cell.experiment not in WITHOUT_ORACLE:
                record["oracle"] = curve(victim.model, masks, grid(), lab.test, victim.trigger)
    return rounded(record) | provenance.run_info(lab.device)


def rounded(value: Any) -> Any:
    """A record with its numbers cut to four decimals, more than 2,000 test images can tell apart."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def status(lab: Lab, folder: Path = RESULTS, only: str = "") -> Iterator[tuple[Cell, str, dict[str, Any] | None]]:
    """Each cell with its key and its current record, or None where that is missing, stale or failed."""
    known: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells(lab.target):
        if only in cell.experiment:
            if cell.experiment not in known:
                there = read(cell.experiment, folder) if (folder / f"{cell.experiment}.json").exists() else []
                known[cell.experiment] = {r.get("key", ""): r for r in there if "error" not in r}
            key = cell_key(cell, lab)
            yield cell, key, known[cell.experiment].get(key)


def make(lab: Lab, folder: Path = RESULTS, only: str = "") -> int:
    """Compute what is missing, write after every cell. Returns the number of cells that failed.

    A failing cell is recorded with its error and tried again by the next call; Ctrl-C loses at most one cell.
    """
    todo = list(status(lab, folder, only))
    done = {key: record for _, key, record in todo if record is not None}
    files_of: dict[str, list[str]] = {}
    for cell, key, _ in todo:
        files_of.setdefault(cell.experiment, []).append(key)

    def write(experiment: str) -> None:
        rows = [json.dumps(done[k]) for k in files_of[experiment] if k in done]
        raw = ("[\n" + ",\n".join(rows) + "\n]\n").encode()
        path = folder / f"{experiment}.json"
        if not path.exists() or path.read_bytes() != raw:
            files.write_bytes(path, raw)

    failed = 0
    for cell, key, record in tqdm(todo, desc="records"):
        if record is not None:
            continue
        try:
            done[key] = {"key": key, **run(cell, lab)}
        except Exception as error:  # one bad cell must not cost the others
            failed += 1
            done[key] = {
                "key": key,
                "label": cell.label,
                "seed": cell.seed,
                "error": f"{type(error).__name__}: {error}",
            }
            warnings.warn(f"{cell}: {traceback.format_exc(limit=3)}", stacklevel=2)
        write(cell.experiment)
    for experiment in files_of:  # also drops records that no cell asks for any more
        write(experiment)
    return failed
