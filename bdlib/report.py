"""What a matrix found: rows for the terminal, a report, a compact export; `bdlib.published` compares.

    print(header()); print(line(record))             # while it runs
    write(records, folder)                           # report.md, report.json, figures
    export(records, Path("paper.jsonl"))             # one record a line, for the book

Records are those that `bdlib.cells.make` returns: scores are shares in [0, 1]; a cell that failed carries "error".
"""

import io
import json
import re
import statistics as st
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bdlib import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Table = dict[tuple[str, str], list[Record]]  # by attack and defence

SCORES = {"acc": "ACC", "asr": "ASR", "ra": "RA"}
COLUMNS = {"dataset": 13, "network": 15, "attack": 12, "rate": 10, "defence": 8, "clean": 8, "seed": 4}


def name(record: Record) -> str:
    """The cell's name, as `bdlib.matrix.Cell` writes it."""
    return "/".join(str(record[k]) for k in COLUMNS if record[k] not in (None, ""))


def rate(record: Record) -> str:
    """The poison rate as text, ``"10%"`` of all images or ``"50%/class"``; "" for clean training or if not known."""
    if record["rate"] is not None:
        return f"{100 * record['rate']:g}%"
    found = re.search(r"\b(class_)?rate=([\d.e-]+)", record.get("settings", [""])[0])
    return f"{100 * float(found[2]):g}%{'/class' if found[1] else ''}" if found else ""


def _row(cells: Sequence[str]) -> str:
    widths = [*COLUMNS.values(), *(14 for _ in SCORES), 5]
    cut = (c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(cells, widths, strict=False))
    return "  ".join(f"{c:<{w}}" for c, w in zip(cut, widths, strict=False))


def header() -> str:
    """The head of the table whose rows `line` makes."""
    return f"{_row([*COLUMNS, *(f'{s}, %' for s in SCORES.values()), 'DER'])}  seconds"


def line(record: Record) -> str:
    """One record as a row: where it stands, scores before -> after in per cent, DER, seconds (of the repair, or of
    training where nothing is repaired); of a failed cell its error.
    """
    start = [rate(record) if k == "rate" else str(record[k]) for k in COLUMNS]
    if "error" in record:
        return f"{_row(start)}  ERROR {' '.join(record['error'].split())}"
    scores = []
    for key in SCORES:
        found = [s[key] for s in (record["before"], record.get("after", {})) if key in s]
        scores.append(" -> ".join(f"{100 * x:.1f}" for x in found))
    der = f"{record['der']:.3f}" if "der" in record else ""
    return f"{_row([*start, *scores, der])}  {record.get('seconds', record['train_seconds']):7.1f}"


def _values(records: Sequence[Record], key: str) -> list[float]:
    # of the repaired network, or of the victim itself where there is no repair
    good = [r for r in records if "error" not in r]
    if key in SCORES:
        good = [r.get("after", r["before"]) for r in good]
    return [r[key] for r in good if key in r]


def _mean(values: Sequence[float], scale: float, digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {scale * st.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * st.mean(values):.{digits}f}{spread}"


def _groups(records: Sequence[Record]) -> dict[str, Table]:
    """Per data set, network and clean budget, the records of each attack and defence; victims stand in every budget."""
    groups: dict[str, Table] = {}
    for place in dict.fromkeys((r["dataset"], r["network"]) for r in records):
        here = [r for r in records if (r["dataset"], r["network"]) == place]
        for clean in dict.fromkeys(r["clean"] for r in here if r["clean"]) or [""]:
            table = groups.setdefault(", ".join([*place, f"clean {clean}"] if clean else place), {})
            for r in here:
                if r["clean"] in ("", clean):
                    table.setdefault((f"{r['attack']} {_shown(r, here)}".strip(), r["defence"]), []).append(r)
    return groups


def _shown(record: Record, records: Sequence[Record]) -> str:
    # a cell that failed has no settings to read the attack's own rate from; its victim or neighbours have
    alike = (r for r in records if (r["attack"], r["rate"]) == (record["attack"], record["rate"]))
    return rate(record) or next(filter(None, map(rate, alike)), "")


def _axes(table: Table, key: str) -> tuple[list[str], list[str]]:
    attacks, defences = list(dict.fromkeys(a for a, _ in table)), sorted({d: 0 for _, d in table}, key="none".__ne__)
    if key == "der":  # neither clean networks nor victims have one
        attacks = [a for a in attacks if any(_values(table.get((a, d), []), key) for d in defences)]
        defences = [d for d in defences if d != "none"]
    return attacks, defences


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _repairs(records: Sequence[Record]) -> dict[tuple[str, str], list[float]]:
    """Seconds of every repair, per defence and per data set with network."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in records:
        if "seconds" in r:
            found.setdefault((r["defence"], f"{r['dataset']}, {r['network']}"), []).append(r["seconds"])
    return found


def markdown(records: Sequence[Record]) -> str:
    """The report as Markdown: what ran where, one table a data set, network and clean budget, failures, seconds."""
    good, bad = [r for r in records if "error" not in r], [r for r in records if "error" in r]
    said = {k: {str(r[k]) for r in good} for k in ("device", "dtype", "torch", "commit", "date")}
    said["recipe"] = {f"{k} {r[k]}" for r in records for k in ("epochs", "batch", "lr") if r.get(k) is not None}
    said["data"] = {f"{r['dataset']}: {note}" for r in good for note in r["notes"]}
    parts = ["# Report", f"{len(records)} cells, {len(bad)} failed."]
    parts.append("\n".join(f"- {k}: {'; '.join(sorted(v))}" for k, v in said.items() if v))
    for title, table in _groups(records).items():
        seeds = sorted({str(r["seed"]) for rows in table.values() for r in rows})
        spread = f"; mean ± standard deviation over the seeds {', '.join(seeds)}" if len(seeds) > 1 else ""
        parts += [f"## {title}", f"ACC / ASR in per cent{spread}. The column none is the victim itself."]
        parts.append(_scores_table(table, ("acc", "asr"), 100, 1))
        if any(_values(rows, "der") for rows in table.values()):
            parts += ["DER, from 0 to 1; doing nothing earns 0.5.", _scores_table(table, ("der",), 1, 3)]
    if times := _repairs(records):
        defences, places = (list(dict.fromkeys(k[i] for k in times)) for i in (0, 1))
        medians = {k: f"{st.median(v):.1f}" for k, v in times.items()}
        rows = [[d, *(medians.get((d, p), "") for p in places)] for d in defences]
        parts += ["## Seconds of a repair, median", _markdown_table(["defence", *places], rows)]
    if bad:
        parts += ["## Failed", "\n".join(f"- {name(r)}: {' '.join(r['error'].split())}" for r in bad)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _scores_table(table: Table, keys: Sequence[str], scale: float, digits: int) -> str:
    attacks, defences = _axes(table, keys[0])
    rows = []
    for attack in attacks:
        rows.append([attack])
        for defence in defences:
            there = table.get((attack, defence), [])
            text = " / ".join(filter(None, (_mean(_values(there, k), scale, digits) for k in keys)))
            failed = sum("error" in r for r in there)
            rows[-1].append(" ".join(filter(None, (text, f"({failed} failed)" if failed else ""))))
    return _markdown_table(["attack", *defences], rows)


def figures(records: Sequence[Record]) -> "dict[str, Figure]":
    """Heat maps of ACC, ASR and DER (attacks x defences, darker is worse), and the seconds of every repair.

    Raises:
        ImportError: Matplotlib or Pillow is not installed.
    """
    drawn = {}
    for title, table in _groups(records).items():
        for key in ("acc", "asr", "der"):
            if any(_values(rows, key) for rows in table.values()):
                drawn[f"{key}-{re.sub('[^a-z0-9]+', '-', title.replace('%', ' percent'))}"] = _heat(table, key, title)
    if times := _repairs(records):
        drawn["seconds"] = _seconds(times)
    return drawn


def _square(there: Sequence[Record], key: str, digits: int) -> tuple[float, str]:
    """How bad a cell is, 0 to 1, and its text; bad entirely: 12 points of ACC lost, each image, no better than before.

    A cell all of whose runs failed is a cross.
    """
    values = _values(there, key)
    if not values:
        return 0.0, "×" if any("error" in r for r in there) else ""
    value = st.mean(values)
    lost = st.mean([r["before"]["acc"] - r["after"]["acc"] for r in there if "after" in r] or [0.0])
    bad = {"acc": lost / 0.12, "asr": value, "der": 2 * (1 - value)}[key]
    return min(max(bad, 0.0), 1.0), f"{value:.2f}" if key == "der" else f"{100 * value:.{digits}f}"


def _heat(table: Table, key: str, title: str) -> "Figure":
    from matplotlib.colors import LinearSegmentedColormap

    from bdlib import plots

    attacks, defences = _axes(table, key)
    said = {"acc": "ACC, %; darker: more points lost", "asr": "ASR, %; darker: more left", "der": "DER; darker: worse"}
    colours = LinearSegmentedColormap.from_list(key, ["white", plots.look(key, 1).colour])
    width = min(plots.WIDTH, 1.6 + 0.5 * len(defences))
    with plots.style():
        fig, ax = plots.plt.subplots(figsize=(width, 0.25 * len(attacks) + 1.3), layout="constrained")
        shade = np.zeros((len(attacks), len(defences)))
        for i, j in np.ndindex(shade.shape):
            shade[i, j], text = _square(table.get((attacks[i], defences[j]), []), key, int(len(defences) < 13))
            ax.text(j, i, text, ha="center", va="center", fontsize=8)
        # at most 0.6 of the colour, on which dark text can be read
        ax.imshow(shade, cmap=colours, vmin=0, vmax=1 / 0.6, aspect="auto")
        steep = max(map(len, defences)) > 6
        ax.set_xticks(range(len(defences)), defences, rotation=40 * steep, ha="right" if steep else "center")
        ax.set_yticks(range(len(attacks)), attacks)
        ax.grid(False)
        ax.tick_params(length=0)
        fig.suptitle("\n".join(textwrap.wrap(f"{title}: {said[key]}", int(width / 0.075))), fontsize=9)
    plots.plt.close(fig)
    return fig


def _seconds(times: Mapping[tuple[str, str], Sequence[float]]) -> "Figure":
    from bdlib import plots

    defences, places = (list(dict.fromkeys(k[i] for k in times)) for i in (0, 1))
    with plots.style():
        height = 0.28 * len(defences) + 0.9 + 0.2 * len(places)
        fig, ax = plots.plt.subplots(figsize=(5.6, height), layout="constrained")
        for i, place in enumerate(places):
            look = plots.look(place, i)
            ax.plot([], [], look.marker, color=look.colour, mfc="none", mew=1.3, label=place)
            for y, defence in enumerate(defences):
                if found := times.get((defence, place)):
                    ax.plot(found, [y] * len(found), look.marker, color=look.colour, mfc="none", mew=1.3)
                    ax.plot(st.median(found), y, "|", color=plots.INK, ms=12, mew=2)
        ax.set_yticks(range(len(defences)), defences)
        ax.set(xscale="log", xlabel="seconds of a repair (bar: median)", ylim=(len(defences) - 0.5, -0.5))
        ax.xaxis.set_major_formatter("{x:g}")
        fig.legend(loc="outside lower center", ncols=1)
    plots.plt.close(fig)
    return fig


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """``report.md``, ``report.json`` and the figures, in `folder`; without Matplotlib a warning takes their place.

    Returns:
        The files written.
    """
    text, raw, drawn = markdown(records), io.BytesIO(), {}
    try:
        drawn = figures(records)
    except ImportError as error:
        warnings.warn(f'the report has no figures: {error}; pip install "bdlib[plots]"', stacklevel=2)
    whole = {"report.json": ("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n").encode()}
    for title, figure in drawn.items():
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=150)
        whole[f"{title}.png"] = raw.getvalue()
        text += f"\n![{title.replace('-', ' ')}]({title}.png)\n"
    whole["report.md"] = text.encode()
    for file, content in whole.items():
        files.write_bytes(folder / file, content)
    return [folder / file for file in whole]


def export(records: Sequence[Record], path: Path) -> int:
    """One record a line, in the order given, without settings that were left alone; failed cells are left out.

    Returns:
        The number of failed cells.
    """
    good = [r for r in records if "error" not in r]
    kept = ({k: v for k, v in r.items() if k in COLUMNS or (v is not None and v is not False)} for r in good)
    files.write_bytes(path, "".join(f"{json.dumps(r, separators=(',', ':'))}\n" for r in kept).encode())
    return len(records) - len(good)
