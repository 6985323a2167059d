"""Tables that pages make of the committed records when the book is built, so that no page types a number.

::

    ```{full-scale}
    :defence: anp
    ```

lists every record of book/results/full that repairs with this defence (or, with ``:attack: wanet``, the victims of this
attack; ``all`` stands for every one), beside the published rows for the same data set, attack and method. Where none
was made on a GPU it says so.
``{record-files}`` lists the files of records: what each holds, where and when it was made, and its CPU time.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from bdlib import published as others
from bdlib.names import ATTACKS, DEFENCES

RESULTS = Path("book/results")
ARROW = "\u00a0→\u00a0"  # does not break
Record = dict[str, Any]


def full_records(folder: Path) -> list[Record]:
    """Every record of the matrix that was exported, those of a GPU first."""
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda r: not on_gpu(r))


def on_gpu(record: Record) -> bool:
    """Whether a record was made on a GPU; a processor's name ends in its number of threads."""
    return not record["device"].endswith("threads")


def published_rows(record: Record, published: list[Record]) -> list[Record]:
    """What the two tables that hold several methods report for the same data set, attack and method, 10 % poisoned."""
    (found,) = others.compare([record], published)
    return [p for p in found["published"] if p["id"].startswith(("leaderboard", "ftsam")) and p["poison_rate"] == 10]


def _score(rows: list[Record], key: str, parts: tuple[str, ...]) -> str:
    """The mean in per cent, before → after a repair; empty where a record has none."""
    if not all(key in r.get(part, {}) for r in rows for part in parts):
        return ""
    return ARROW.join(f"{100 * mean(r[part][key] for r in rows):.1f}" for part in parts)


def _line(*entries: object) -> str:
    return f"| {' | '.join(str(e) for e in entries)} |"


def table(rows: list[Record], published: list[Record], defence: str) -> list[str]:
    """A Markdown table: each setting once with the mean over its seeds, the published rows below their attack's."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    known = ["none", *ATTACKS]  # the order of the attacks, each in its usual setting first
    for r in sorted(rows, key=lambda r: (not on_gpu(r), known.index(r["attack"].partition(":")[0]), r["attack"])):
        groups[r["dataset"], r["network"], r["attack"], r["rate"], r["defence"], r["clean"], r["device"]].append(r)
    data = {others.DATASETS.get(r["dataset"], r["dataset"]) for r in rows}
    where = f"network, on {min(data)}" if len(data) == 1 else "data, network"
    head = ["attack", where, *(["clean images"] if defence else []), "ACC, %", "ASR, %"]
    head.append("seconds" if defence else "seconds of training")
    lines, quoted = [_line(*head), _line(*["---"] * len(head))], set()
    for (dataset, network, attack, *_), found in groups.items():
        method = attack.partition(":")[0]
        title = ATTACKS.get(method, "clean training") + attack[len(method) :].replace(":", ", ")
        place = others.NETWORKS.get(network, network)
        if len(data) > 1:
            place = f"{others.DATASETS.get(dataset, dataset)}, {place}"
        seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
        took = f"{mean(r['seconds' if defence else 'train_seconds'] for r in found):.0f}"
        scores = [_score(found, key, ("before", "after") if defence else ("before",)) for key in ("acc", "asr")]
        lines.append(_line(title, place + seeds, *([found[0]["clean_images"]] if defence else []), *scores, took))
        for p in published_rows(found[0], published):
            if p["id"] not in quoted:
                quoted.add(p["id"])
                after = ARROW.lstrip() if defence else ""
                theirs = [*([_budget(p)] if defence else []), f"{after}{p['acc']}", f"{after}{p['asr']}"]
                lines.append(_line(ATTACKS[method], f"*{p['network']}* {{cite:p}}`{p['cite']}`", *theirs, ""))
    return lines


def _budget(published: Record) -> str:
    said = published["clean_budget"] or ""
    count = re.search(r"([\d,]+) images", said)
    return count[1] if count else said


def remarks(rows: list[Record]) -> str:
    """Where the records were made, and what has to be known of the data."""
    devices = dict.fromkeys(r["device"] for r in rows)
    notes = dict.fromkeys(note for r in rows for note in r["notes"])
    seeds = ", ".join(map(str, sorted({r["seed"] for r in rows})))
    commits = ", ".join(f"`{c}`" for c in dict.fromkeys(r["commit"] for r in rows))
    return (
        f"Ours: {'; '.join(devices)}; seed {seeds}; commit {commits}; {max(r['date'] for r in rows)}. "
        + " ".join(f"Data: {note}." for note in notes)
    ).strip()


class FullScale(SphinxDirective):
    """The table of one defence or one attack."""

    option_spec: ClassVar = {"defence": directives.unchanged, "attack": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Nodes of a sentence, the table and its remarks."""
        base = Path(self.env.srcdir) / RESULTS
        for path in (*(base / "full").glob("*.jsonl"), base / "published.json"):
            self.env.note_dependency(str(path))
        defence, attack = self.options.get("defence", ""), self.options.get("attack", "")
        if (defence in DEFENCES) == (attack in (*ATTACKS, "all")):
            known = f"one of :defence: {', '.join(DEFENCES)} and :attack: {', '.join(ATTACKS)}, all"
            return [self.state_machine.reporter.warning(f"full-scale needs {known}", line=self.lineno)]
        rows = [
            r for r in full_records(base / "full")
            if (r["defence"].partition(":")[0] == defence if defence else r["defence"] == "none")
            and (defence or attack in (r["attack"].partition(":")[0], "all"))
        ]  # fmt: skip
        preset = (
            f"chapter --defences none,{defence}" if defence else "paper" + f" --attacks {attack}" * (attack != "all")
        )
        command, lines = f"`python -m bdlib bench --preset {preset}`", []
        if not any(map(on_gpu, rows)):
            lines = [f"No run on a GPU with the paper's network is on record yet; {command} makes it."]
            lines += ["What there is comes from a processor.", ""] if rows else [""]
        if rows:
            lines += [*table(rows, json.loads((base / "published.json").read_text()), defence), "", remarks(rows)]
        return parsed(self, lines)


class RecordFiles(SphinxDirective):
    """Every file of records: its cells, seeds, device, date and CPU time."""

    def run(self) -> list[nodes.Node]:
        """Nodes of the table."""
        base = Path(self.env.srcdir) / RESULTS
        head = ["file", "records", "seeds", "made on", "until", "CPU minutes"]
        lines = [_line(*head), _line(*["---"] * len(head))]
        for path in [*sorted((base / "small").glob("*.json")), *sorted((base / "full").glob("*.jsonl"))]:
            self.env.note_dependency(str(path))
            text = path.read_text()
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
            spent = sum(r.get("cpu_seconds", 0) for r in rows) / 60
            seeds = ", ".join(map(str, sorted({r["seed"] for r in rows})))
            devices = "; ".join(dict.fromkeys(r["device"] for r in rows))
            name = f"`{path.parent.name}/{path.name}`"
            last = max(r["date"] for r in rows)
            lines.append(_line(name, len(rows), seeds, devices, last, f"{spent:.0f}"))
        return parsed(self, lines)


def parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """Markdown lines as nodes of the page."""
    box = nodes.container(classes=["records"])
    box.document = directive.state.document
    directive.state.nested_parse(StringList(lines, directive.env.docname), directive.content_offset, box)
    return box.children
