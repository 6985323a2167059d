"""Published values beside our own, with what differs in their circumstances.

    published = json.loads(Path("book/results/published.json").read_text())
    print(beside(compare(records, published)))

Records are those of `bdlib.cells`; published rows hold per cent, and say where they come from.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bdlib.report import SCORES, Record, name, rate

# how the published rows call what is here called otherwise
DATASETS = {"cifar10": "CIFAR-10", "gtsrb": "GTSRB"}
NETWORKS = {"preact_resnet18": "PreAct-ResNet-18", "resnet18": "ResNet-18", "wide_resnet": "WRN-16-1"}
ATTACKS = {
    "badnets": ("BadNets", "BadNets-A2O"), "blend": ("Blended",), "wanet": ("WaNet",), "input-aware": ("Input-aware",),
    "bpp": ("BPP",), "lf": ("LF",), "ssba": ("SSBA",), "trojan": ("TrojanNN",), "cl": ("CLB", "LC"), "sig": ("SIG",),
}  # fmt: skip
METHODS = {"anp": "ANP", "nad": "NAD", "rnp": "RNP", "ft": "FT", "fp": "FP", "i-bau": "i-BAU", "ft-sam": "FT-SAM",
           "none": "none"}  # fmt: skip
OWN = ("threshold", "pruned_percent", "epoch", "eps", "inner_steps")  # settings that some rows state


def compare(records: Sequence[Record], published: Sequence[Record]) -> list[dict[str, Any]]:
    """Every published row of the same data set, attack and method beside each cell, and how its circumstances differ.

    Args:
        published: rows of ``book/results/published.json``, numbers in per cent.

    Returns:
        One dict a cell: cell (its name), acc, asr, ra (per cent, None where there is none) and published, a list of
        rows, each with "differs", a list of texts.
    """
    out = []
    for r in (r for r in records if "error" not in r):
        attacks, method = ATTACKS.get(r["attack"].split(":")[0], ()), METHODS.get(r["defence"].split(":")[0])
        same = [p for p in published if p["dataset"] == DATASETS.get(r["dataset"]) and p["attack"] in attacks]
        rows = [{**p, "differs": differences(r, p)} for p in same if p["method"] == method]
        scores = r.get("after", r["before"])
        numbers = {k: round(100 * scores[k], 2) if k in scores else None for k in SCORES}
        out.append({"cell": name(r), **numbers, "published": rows})
    return out


def differences(record: Record, published: Record) -> list[str]:
    """Network, poison rate and number of clean images, where the two do not agree."""
    theirs, budget = published["poison_rate"], published["clean_budget"]
    here = {"network": NETWORKS.get(record["network"], record["network"]), "poisoned": rate(record)}
    unsaid = "see the note" if "poisoned" in published["note"] else ""  # other counts than a share of all images
    there = {"network": published["network"], "poisoned": unsaid if theirs is None else f"{theirs:g}%"}
    if record["defence"] != "none":
        count, share = re.search(r"([\d,]+) images", budget or ""), re.search(r"([\d.]+) %", budget or "")
        here["clean images"] = str(record["clean_images"])
        if count:
            there["clean images"] = count[1].replace(",", "")
        else:  # a share of a training set whose size is not said
            same = share is not None and record["clean"] == f"{share[1]}%"
            there["clean images"] = here["clean images"] if same else budget or ""
    return [f"{k} {there[k] or 'not said'} (here {here[k] or 'none'})" for k in here if there[k] != here[k]]


def beside(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `compare` found, as text: each cell, under it the published rows, and at the end their sources."""
    out, sources = [f"{'ACC':<7}{'ASR':<7}{'RA':<7}in per cent"], dict[str, int]()
    for row in (row for row in rows if row["published"]):
        out += ["", f"{_numbers(row)}{row['cell']}"]
        for p in row["published"]:
            number = sources.setdefault(f"{p['source']}: {p['note']}", len(sources) + 1)
            own = [f"{k.replace('_', ' ')} {p[k]}" for k in OWN if p.get(k) is not None]
            text = "; ".join([*own, *(p["differs"] or ["same network, poison rate and clean budget"])])
            out.append(f"{_numbers(p)}  {p['attack']}, {p['method']} [{number}] {text}")
    out += ["", *(f"[{number}] {source}" for source, number in sources.items())] if sources else []
    if alone := [row["cell"] for row in rows if not row["published"]]:
        out += ["", f"no published value: {', '.join(alone)}"]
    return "\n".join(out)


def _numbers(row: Mapping[str, Any]) -> str:
    return "".join(f"{'-' if row[k] is None else format(row[k], '.1f'):<7}" for k in SCORES)
