"""Figures of the book: one style, one meaning per colour, and never colour as the only sign.

    fig = plots.curve(neurons.curve(model, masks, thresholds, test, trigger), chosen=0.2)
    frame = plots.png(fig)             # palette PNG of a few KB, for a widget

Every function returns a closed Matplotlib `Figure`: show it as the last expression of a cell. Figures are at most
6.5 inches wide, with text of 8 points or more, dark on a white panel of their own: contrast 16:1 for text and at least
3:1 for every colour, on a light and on a dark page. (Grey text on a transparent figure, the alternative, stays below
4.5:1 on one of the two pages whichever grey is chosen.)
"""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

# Okabe-Ito colours: told apart with every common colour vision deficiency
CLEAN = "#0072B2"
TRIGGERED = "#D55E00"
TARGET = "#CC79A7"
PRUNED = "#7F7F7F"
DEFENDED = "#009E73"

WIDTH = 6.5  # inches, the widest figure
INK = "#222222"

STYLE: dict[str, Any] = {
    "figure.dpi": 144,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#555555",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.7,
}


class Look(NamedTuple):
    """What one kind of thing looks like in every figure: a colour, and the signs that replace it in grey."""

    colour: str
    marker: str
    dash: Any
    hatch: str


LOOKS = {
    "clean": Look(CLEAN, "o", "-", ""),
    "triggered": Look(TRIGGERED, "^", "--", "////"),
    "target": Look(TARGET, "s", ":", "...."),
    "pruned": Look(PRUNED, "X", "-.", "xxxx"),
    "defended": Look(DEFENDED, "D", (0, (6, 1.5)), "\\\\\\\\"),
}
LOOKS |= {
    "poisoned": LOOKS["triggered"],
    "backdoored": LOOKS["triggered"],
    "acc": LOOKS["clean"],
    "asr": LOOKS["triggered"],
    "ra": LOOKS["defended"],
    "target_acc": LOOKS["target"],
}
# for groups without a meaning of their own (methods, networks, seeds)
_NEUTRAL = (
    Look("#222222", "o", "-", ""),
    Look("#A6761D", "s", "--", "////"),
    Look("#5E4FA2", "^", ":", "...."),
    Look("#4D7C0F", "D", "-.", "xxxx"),
    Look("#8A8A8A", "v", (0, (6, 1.5)), "\\\\\\\\"),
    Look("#8B3A3A", "P", (0, (3, 1, 1, 1, 1, 1)), "++++"),
)
_NAMES = {"acc": "ACC", "asr": "ASR", "ra": "RA", "der": "DER", "target_acc": "target ACC", "accuracy": "accuracy"}


def style() -> AbstractContextManager[None]:
    """The book's Matplotlib settings, for a figure drawn by hand: ``with plots.style(): fig, ax = plt.subplots()``."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]


def look(name: str, position: int = 0) -> Look:
    """The look that belongs to a name ("clean", "asr", ...), or the neutral one at a position in the cycle."""
    return LOOKS.get(name.lower(), _NEUTRAL[position % len(_NEUTRAL)])


def images(
    grid: Tensor | Sequence[Tensor],
    titles: Sequence[str] | None = None,
    *,
    rows: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    columns: int = 8,
    width: float = WIDTH,
) -> Figure:
    """A grid of images, enlarged without smoothing.

    Args:
        grid: ``(N, C, H, W)`` float in [0, 1] or uint8, wrapped after `columns`; or a sequence of such batches, one
            row each.
        titles: one per image of a single batch; for a sequence of batches one per column.
        rows: one label per row of a sequence of batches.
        kinds: the look of each image's frame ("clean", "triggered", "target", ...), counted as `titles`.
        columns: images in a row of a single batch.
        width: inches, at most 6.5.

    Raises:
        ValueError: an image of the wrong shape or range, or a list that does not match the grid.
    """
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, got {columns}")
    single = isinstance(grid, Tensor | np.ndarray)
    if single:
        flat = [_pixels(image) for image in grid]
        table = [flat[i : i + columns] for i in range(0, len(flat), columns)]
    else:
        table = [[_pixels(image) for image in row] for row in grid]
    if not table or not all(table):
        raise ValueError(f"the grid must hold at least one image in each row, got rows of {[len(r) for r in table]}")
    across = max(len(row) for row in table)
    expected = sum(len(row) for row in table) if single else across
    for name, items, count in (("titles", titles, expected), ("kinds", kinds, expected), ("rows", rows, len(table))):
        if items is not None and len(items) != count:
            raise ValueError(f"{name} must have {count} entries, got {len(items)}")

    high, wide = table[0][0].shape[:2]
    side = min((_width(width) - (0.9 if rows else 0.1)) / across, 1.6)
    if titles is not None:  # 8 point letters are about 0.075 inches wide
        titles = [
            textwrap.fill(t, max(6, int(side / 0.075)), break_long_words=False) if "\n" not in t else t for t in titles
        ]
    headline = max((t.count("\n") + 1 for t in titles or ()), default=0) * 0.16
    size = (side * across + (0.9 if rows else 0.1), (side * high / wide + 0.05) * len(table) + 0.1)
    size = (size[0], size[1] + headline * (len(table) if single else 1))
    with style():
        fig, axes = plt.subplots(len(table), across, figsize=size, squeeze=False, layout="constrained")
        fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[call-arg, union-attr]
        for r, c in np.ndindex(len(table), across):
            ax = axes.item(r, c)
            index = r * columns + c if single else c
            if c >= len(table[r]):
                ax.set_axis_off()
                continue
            _show(ax, table[r][c], None if kinds is None else look(kinds[index]))
            if titles is not None and (single or r == 0):
                ax.set_title(titles[index], fontsize=8, pad=3)
            if rows is not None and c == 0:
                ax.set_ylabel(rows[r], rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    return _close(fig)


def triple(
    clean: Tensor,
    triggered: Tensor,
    logits: Tensor,
    classes: Sequence[str],
    *,
    other_logits: Tensor | None = None,
    other: str = "clean",
    target: int | None = None,
    gain: float | None = None,
    width: float = WIDTH,
) -> Figure:
    """The book's idiom: the image, what the trigger changes (amplified), the triggered image, and the top five classes.

    Bars are what the network says of the triggered image, circles another answer to compare with: what it says of the
    clean one, or what it said before a defence. The first class of the other answer is always among the five.

    Args:
        clean, triggered: ``(C, H, W)`` or ``(N, C, H, W)``, float in [0, 1] or uint8; one row per image.
        logits: ``(K,)`` or ``(N, K)``, the network's logits on the triggered images (log-probabilities serve as well).
        classes: K names.
        other_logits: the other answer, of the same shape; None leaves the circles out.
        other: what the other answer is, for the legend, e.g. "clean" or "before the defence".
        target: the attacker's class, drawn in its own colour.
        gain: factor on the difference; None takes the largest of 1, 2, 5, 10, 20, 50 that does not clip.
        width: inches, at most 6.5.

    Raises:
        ValueError: shapes that do not belong together.
    """
    before, after = (x if x.ndim == 4 else x[None] for x in (clean, triggered))
    scores = _probabilities(logits, len(before), len(classes), "logits")
    scores_other = (
        None if other_logits is None else _probabilities(other_logits, len(before), len(classes), "other_logits")
    )
    if before.shape != after.shape:
        raise ValueError(
            f"clean and triggered images must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    change = torch.stack([_unit(b) - _unit(a) for a, b in zip(before, after, strict=True)])
    if gain is None:
        largest = float(change.abs().max())
        gain = max((g for g in (1, 2, 5, 10, 20, 50) if g * largest <= 1), default=1)
    side = (_width(width) - 1.3) / 4.5  # the rest of the width goes to the class names
    with style():
        fig, axes = plt.subplots(
            len(before),
            4,
            figsize=(width, max(side + 0.12, 0.95) * len(before) + 0.5),
            squeeze=False,
            layout="constrained",
            gridspec_kw={"width_ratios": [1, 1, 1, 1.5]},
        )
        fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[call-arg, union-attr]
        for row, axs in enumerate(axes):
            _show(axs[0], _pixels(before[row]), LOOKS["clean"])
            _show(axs[1], _pixels((0.5 + 0.5 * gain * change[row]).clamp(0, 1)))
            _show(axs[2], _pixels(after[row]), LOOKS["triggered"])
            _top_five(axs[3], scores[row], None if scores_other is None else scores_other[row], classes, target)
        for ax, title in zip(axes[0], ("clean", f"difference × {gain:g}", "with trigger", "top 5, %"), strict=True):
            ax.set_title(title)
        _bar_legend(fig, target is not None, None if scores_other is None else other)
    return _close(fig)


def verdict(
    image: Tensor,
    logits: Tensor,
    classes: Sequence[str],
    *,
    target: int | None = None,
    other_logits: Tensor | None = None,
    width: float = 3.6,
) -> Figure:
    """One image beside the five classes that the network finds likeliest: the small form of `triple`, for a widget.

    Args:
        image: ``(C, H, W)``, float in [0, 1] or uint8.
        logits: ``(K,)``, what the network says of it.
        classes: K names.
        target: the attacker's class, drawn in its own colour.
        other_logits: ``(K,)``, another answer, drawn as circles (it has no legend: the text around it says what it is);
            its first class is always among the five.
        width: inches, at most 6.5.

    Raises:
        ValueError: shapes that do not belong together.
    """
    scores = _probabilities(logits, 1, len(classes), "logits")[0]
    circles = None if other_logits is None else _probabilities(other_logits, 1, len(classes), "other_logits")[0]
    with style():
        # fixed places, so that nothing jumps when a slider moves from one frame to the next
        fig = plt.figure(figsize=(_width(width), 1.45))
        side = 1.25 / width
        _show(fig.add_axes((0.05 / width, 0.07, side, 1.25 / 1.45)), _pixels(image))
        ax = fig.add_axes((side + 0.25 / width, 0.17, 1 - side - 1.5 / width, 0.8))
        _top_five(ax, scores, circles, classes, target)
        ax.set_xticklabels(["0", "50", "100 %"])
    return _close(fig)


def history(
    records: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    columns: Sequence[str] = ("loss", "accuracy"),
    width: float = WIDTH,
) -> Figure:
    """Training curves: one panel per column, one line per run.

    Args:
        records: the per-epoch records of `fit`, or a name for each of several such lists.
        columns: the keys to draw; fractions (accuracy, acc, asr, ra) are shown in per cent.
        width: inches, at most 6.5.

    Raises:
        ValueError: no records, or a column that they do not have.
    """
    runs: Mapping[str, Sequence[Mapping[str, Any]]] = records if isinstance(records, Mapping) else {"": records}
    if not runs or not all(runs.values()):
        raise ValueError("records must hold at least one epoch for each run, got none")
    with style():
        fig, axes = plt.subplots(1, len(columns), figsize=(_width(width), 2.3), squeeze=False, layout="constrained")
        for ax, column in zip(axes[0], columns, strict=True):
            for position, (name, run) in enumerate(runs.items()):
                kind = look(name or column, position)
                x, y = _column(run, "epoch"), _column(run, column) * _scale(column)
                every = max(1, len(x) // 12)
                ax.plot(x, y, color=kind.colour, ls=kind.dash, marker=kind.marker, markevery=every, label=name or None)
            ax.set(xlabel="epoch", ylabel=_name(column))
            ax.xaxis.get_major_locator().set_params(integer=True)
        if len(runs) > 1:
            axes[0][-1].legend()
    return _close(fig)


def curve(
    records: Sequence[Mapping[str, Any]],
    chosen: float | None = None,
    *,
    label: str = "chosen on clean data",
    oracle: bool = True,
    columns: Sequence[str] = ("acc", "asr"),
    width: float = WIDTH,
    height: float = 2.7,
) -> Figure:
    """ACC and ASR against the pruning threshold, with the threshold that the defender chose.

    Args:
        records: one per threshold, with `threshold`, `pruned` (channels) and fractions `acc`, `asr`, `ra`.
        chosen: a threshold to mark by a line, by rule the defender's; its values are written beside it.
        label: what that threshold is; a slider passes "slider".
        oracle: the records were scored with test labels and the trigger; the figure then says so.
        columns: the keys to draw.
        width, height: inches; the width at most 6.5.

    Raises:
        ValueError: no records, or a key that they do not have.
    """
    if not records:
        raise ValueError("records must hold at least one threshold, got none")
    rows = sorted(records, key=lambda record: record["threshold"])
    x = _column(rows, "threshold")
    with style():
        fig, ax = plt.subplots(figsize=(_width(width), height), layout="constrained")
        for column in columns:
            kind = look(column)
            meaning = {"acc": "ACC: clean images, right", "asr": "ASR: triggered images, target"}.get(column)
            meaning = meaning or {"ra": "RA: triggered images, right"}.get(column, _name(column))
            ax.plot(
                x,
                100 * _column(rows, column),
                color=kind.colour,
                ls=kind.dash,
                marker=kind.marker,
                markevery=max(1, len(x) // 24),
                label=meaning,
            )
        ax.set(xlabel="pruning threshold", ylabel="% of images", ylim=(-3, 103))
        if all("pruned" in row for row in rows) and len(rows) > 1:
            _count_axis(ax, x, _column(rows, "pruned"))
        if chosen is not None:
            _mark_choice(ax, rows, chosen, label, columns)
        handles, labels = ax.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3)
        if oracle:
            ax.set_title("oracle view: scored with test labels and trigger", loc="left", fontsize=8, style="italic")
    return _close(fig)


def mask_histogram(
    masks: Mapping[str, Tensor] | Tensor,
    threshold: float | None = None,
    *,
    bins: int = 25,
    width: float = WIDTH,
    height: float = 2.3,
) -> Figure:
    """How many channels have which mask value; those at or below the threshold are hatched grey.

    Args:
        masks: ``(C,)`` per layer, in [0, 1], or one tensor.
        threshold: channels with a mask <= threshold are pruned; None draws no line.
        bins: bars between 0 and 1.
        width, height: inches; the width at most 6.5.

    Raises:
        ValueError: a mask outside [0, 1], or none at all.
    """
    values = _mask_values(masks if isinstance(masks, Mapping) else {"masks": masks})
    everything = np.concatenate(list(values.values()))
    pruned = everything <= (-1 if threshold is None else threshold)
    edges = np.linspace(0, 1, bins + 1)
    with style():
        fig, ax = plt.subplots(figsize=(_width(width), height), layout="constrained")
        low, high = np.histogram(everything[pruned], edges)[0], np.histogram(everything[~pruned], edges)[0]
        # side by side on a log scale would mislead, and stacks do: a bar is split only where the threshold cuts it
        ax.bar(edges[:-1], high + low, 1 / bins, align="edge", color="#C9DDEB", edgecolor=INK, lw=0.6, label="kept")
        ax.bar(
            edges[:-1], low, 1 / bins, align="edge", color="#D9D9D9", edgecolor="#555555", hatch="xxxx", label="pruned"
        )
        ax.set_yscale("symlog", linthresh=1)
        top = max(10.0, float((high + low).max()))
        ax.set(xlim=(-0.02, 1.02), ylim=(0, top * 2.2), xlabel="mask value", ylabel="channels")
        ticks = [0] + [10**p for p in range(int(math.log10(top)) + 1)]
        ax.set_yticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        if threshold is not None:
            right = threshold < 0.6
            ax.axvline(threshold, color=INK, lw=1.4)
            note = f" threshold {threshold:g}: {int(pruned.sum())} of {len(everything)} pruned "
            ax.text(
                threshold,
                0.97,
                note,
                transform=ax.get_xaxis_transform(),
                ha="left" if right else "right",
                va="top",
                fontsize=8,
                bbox={"color": "white", "pad": 1},
            )
    return _close(fig)


def masks_by_layer(
    masks: Mapping[str, Tensor],
    change: Mapping[str, Tensor] | None = None,
    *,
    threshold: float | None = None,
    width: float = WIDTH,
) -> Figure:
    """One dot per channel: its layer, its mask, and how much the trigger moves it (larger and darker is more).

    Args:
        masks: ``(C,)`` per layer, in [0, 1], first layer on top.
        change: trigger-activated change, ``(C,)`` per layer, 0 or more; None draws all dots alike.
        threshold: channels with a mask <= threshold are drawn as crosses.
        width: inches, at most 6.5.

    Raises:
        ValueError: masks outside [0, 1], or a `change` that does not match the masks.
    """
    values = _mask_values(masks)
    shade = {name: np.zeros(len(v)) for name, v in values.items()}
    if change is not None:
        for name, value in values.items():
            given = change.get(name)
            if given is None or tuple(given.shape) != value.shape:
                shape = None if given is None else tuple(given.shape)
                raise ValueError(f"change must have shape {value.shape} for layer {name!r}, got {shape}")
            shade[name] = given.detach().double().cpu().numpy()
    largest = max(float(s.max()) for s in shade.values()) or 1.0
    # the range starts below 0 so that the palest dot can still be seen on white
    tint = ScalarMappable(Normalize(-0.12 * largest, largest), "YlOrRd")
    with style():
        # the colour bar's label needs 1.7 inches, however few the layers
        height = max(0.32 * len(values) + 0.9, 1.2 if change is None else 2.2)
        fig, ax = plt.subplots(figsize=(_width(width), height), layout="constrained")
        for row, (name, value) in enumerate(values.items()):
            # a fixed irrational step spreads the dots without a random generator
            offset = (np.arange(len(value)) * 0.6180339887) % 1 - 0.5
            order = np.argsort(shade[name], kind="stable")
            size = 10 + 60 * shade[name] / largest if change is not None else np.full(len(value), 14.0)
            cut = value <= (-1 if threshold is None else threshold)
            for part, marker in ((~cut, "o"), (cut, "X")):
                keep = order[part[order]]
                ax.scatter(
                    value[keep],
                    row + 0.62 * offset[keep],
                    s=size[keep] * (1.5 if marker == "X" else 1),
                    c=tint.to_rgba(shade[name][keep]) if change is not None else "#8FB8D4",
                    marker=marker,
                    edgecolors=INK,
                    linewidths=0.4,
                )
        ax.set_yticks(range(len(values)), list(values))
        ax.set(xlim=(-0.03, 1.03), ylim=(len(values) - 0.4, -0.6), xlabel="mask value")
        ax.grid(axis="y", visible=False)
        if change is not None:
            bar = fig.colorbar(tint, ax=ax, pad=0.02, aspect=12, shrink=min(1.0, 8 / len(values)))
            bar.set_label("trigger-activated change\n(larger dot: more)", fontsize=8)
            bar.ax.set_ylim(0, largest)
        if threshold is not None:
            ax.axvline(threshold, color=INK, lw=1.2, ls="--")
            ax.set_title(f"dashed: threshold {threshold:g}; cross: pruned", loc="left", fontsize=8)
    return _close(fig)


def spread(
    records: Sequence[Mapping[str, Any]],
    x: str,
    y: str | Sequence[str],
    group: str | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    log: bool = False,
    width: float = WIDTH,
    height: float = 2.6,
) -> Figure:
    """The mean as a line and every run as a point, so that nobody has to trust an average.

    Args:
        records: one per run, with the keys named by `x`, `y` and `group`.
        x: a key with numbers, or with strings, which keep the order in which they appear.
        y: one key or several; fractions named acc, asr, ra, der or accuracy are shown in per cent. Several keys share
            a panel without a `group`, and get a panel each with one.
        group: one line per value of this key.
        labels: text for a key or a group value where the name itself does not serve.
        log: logarithmic x axis (numbers above 0).
        width, height: inches; the width at most 6.5.

    Raises:
        ValueError: no records, a missing key, or log with values that have no logarithm.
    """
    keys = [y] if isinstance(y, str) else list(y)
    for key in [x, *keys, *([group] if group else [])]:
        _column(records, key, numbers=False)
    labels = labels or {}
    names = list(dict.fromkeys(record[x] for record in records))
    numeric = all(isinstance(name, int | float) for name in names)
    place = {name: float(name) if numeric else float(i) for i, name in enumerate(names)}
    if log and min(place.values()) <= 0:
        raise ValueError(f"log needs every {x} above 0, got {min(place.values())}")
    groups = list(dict.fromkeys(record[group] for record in records)) if group else [None]
    panels = [[key] for key in keys] if group else [keys]
    with style():
        fig, axes = plt.subplots(1, len(panels), figsize=(_width(width), height), squeeze=False, layout="constrained")
        for ax, panel in zip(axes[0], panels, strict=True):
            lines = [(key, value) for key in panel for value in groups]
            for position, (key, value) in enumerate(lines):
                rows = [record for record in records if group is None or record[group] == value]
                kind = look(key if value is None else str(value), position)
                name = key if value is None else str(value)
                shift = 0.0 if numeric else (position - (len(lines) - 1) / 2) * 0.12
                _line_and_points(ax, rows, place, x, key, kind, shift, labels.get(name, _NAMES.get(name, name)))
            ylabel = labels.get(panel[0], _name(panel[0])) if len(panel) == 1 else "% of images"
            ax.set(xlabel=labels.get(x, x), ylabel=ylabel)
            if log:
                ax.set_xscale("log")
            if log or not numeric or len(names) <= 8:
                ax.set_xticks(list(place.values()), [f"{n:g}" if numeric else str(n) for n in names], minor=False)
                ax.minorticks_off()
        handles, text = axes[0][0].get_legend_handles_labels()
        if len(text) > 1:
            fig.legend(handles, text, loc="outside lower center", ncols=min(len(text), 4))
    return _close(fig)


def png(picture: Figure | Tensor | np.ndarray, *, colors: int = 64, width: int | None = None) -> bytes:
    """A palette PNG: a few KB instead of tens, so that a slider can carry a dozen frames in the page.

    Args:
        picture: a `Figure`, or an image ``(C, H, W)``, float in [0, 1] or uint8, enlarged without smoothing.
        colors: size of the palette, 2 to 256.
        width: pixels; None takes 96 per inch of a figure (text at reading size), and 4 per pixel of an image.

    Returns:
        The file's bytes.

    Raises:
        ValueError: colours or width out of range.
    """
    if not 2 <= colors <= 256:
        raise ValueError(f"colors must be in [2, 256], got {colors}")
    if width is not None and width < 1:
        raise ValueError(f"width must be 1 pixel or more, got {width}")
    if isinstance(picture, Figure):
        raw = io.BytesIO()
        inches = picture.get_size_inches()[0]
        picture.savefig(raw, format="png", dpi=96 if width is None else width / inches)
        image = Image.open(raw).convert("RGB")
    else:
        image = Image.fromarray(_pixels(picture))
        wide = 4 * image.width if width is None else width
        image = image.resize((wide, round(image.height * wide / image.width)), Image.Resampling.NEAREST)
    out = io.BytesIO()
    # k-means after median cut keeps small coloured marks that the cut alone would merge into grey
    palette = image.quantize(colors, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    palette.save(out, format="png", optimize=True)
    return out.getvalue()


def _width(width: float) -> float:
    if not 0 < width <= WIDTH:
        raise ValueError(f"width must be in (0, {WIDTH}] inches, got {width}")
    return width


def _close(fig: Figure) -> Figure:
    # an open figure would be shown a second time at the end of the cell, and would stay in memory
    plt.close(fig)
    return fig


def _unit(image: Tensor | np.ndarray) -> Tensor:
    """(C, H, W) of either kind -> float64 in [0, 1]."""
    x = torch.as_tensor(image).detach().cpu()
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"an image must have shape (C, H, W) with C = 1 or 3, got {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x.double() / 255
    if not x.is_floating_point():
        raise ValueError(f"an image must be uint8 or float in [0, 1], got {x.dtype}")
    if not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise ValueError(
            f"a float image must lie in [0, 1], got {float(x.min()):.3g} to {float(x.max()):.3g}: clamp it first"
        )
    return x.double()


def _pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """(C, H, W) of either kind -> (H, W, 3) uint8."""
    x = (_unit(image) * 255).round().to(torch.uint8)
    return x.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def _show(ax: Axes, pixels: np.ndarray, frame: Look | None = None) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set(color=frame.colour if frame else "#999999", linewidth=2.2 if frame else 0.6)
        spine.set_linestyle(frame.dash if frame else "-")


def _probabilities(logits: Tensor, rows: int, classes: int, name: str) -> np.ndarray:
    x = torch.as_tensor(logits).detach().cpu().double()
    x = x if x.ndim == 2 else x[None]
    if x.shape != (rows, classes):
        raise ValueError(f"{name} must have shape ({rows}, {classes}), got {tuple(x.shape)}")
    return x.softmax(1).numpy()


def _top_five(
    ax: Axes, after: np.ndarray, before: np.ndarray | None, classes: Sequence[str], target: int | None
) -> None:
    best = list(np.argsort(-after, kind="stable")[:5])
    if before is not None and int(before.argmax()) not in best:
        best[-1] = int(before.argmax())
    for row, k in enumerate(best):
        kind = LOOKS["target"] if k == target else LOOKS["triggered"]
        ax.barh(row, 100 * after[k], 0.62, color=kind.colour, edgecolor="white", hatch=kind.hatch, lw=0)
        ax.barh(row, 100 * after[k], 0.62, fill=False, edgecolor=INK, lw=0.6)
        if before is not None:
            ax.plot(100 * before[k], row, "o", mfc="white", mec=CLEAN, mew=1.6, ms=5.5, clip_on=False, zorder=5)
    ax.set_yticks(range(len(best)), [_short(classes[k]) for k in best])
    ax.yaxis.tick_right()
    ax.tick_params(length=0)
    ax.tick_params(axis="y", pad=6)  # clear of a circle at 100
    ax.set(xlim=(0, 100), ylim=(len(best) - 0.4, -0.6), xticks=[0, 50, 100])
    ax.grid(axis="y", visible=False)


def _bar_legend(fig: Figure, target: bool, other: str | None) -> None:
    handles: list[Any] = []
    for name, text, wanted in (("triggered", "with trigger", True), ("target", "with trigger: target class", target)):
        kind = LOOKS[name]
        if wanted:
            handles.append(plt.Rectangle((0, 0), 1, 1, fc=kind.colour, ec="white", hatch=kind.hatch, label=text))
    if other is not None:
        handles.append(plt.Line2D([], [], ls="", marker="o", mfc="white", mec=CLEAN, mew=1.6, ms=5.5, label=other))
    fig.legend(handles=handles, loc="outside lower right", ncols=3, handlelength=1.4)


def _short(name: str, limit: int = 16) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _count_axis(ax: Axes, x: np.ndarray, counts: np.ndarray) -> None:
    """Write the number of pruned channels along the top, at no more than seven thresholds."""
    every = max(1, math.ceil(len(x) / 7))
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(x[::every]), [f"{int(c)}" for c in counts[::every]])
    top.set_xlabel("channels pruned", fontsize=8)
    top.tick_params(length=2, labelsize=8)
    top.spines["top"].set_visible(False)


def _mark_choice(
    ax: Axes, rows: Sequence[Mapping[str, Any]], chosen: float, label: str, columns: Sequence[str]
) -> None:
    nearest = min(rows, key=lambda row: abs(row["threshold"] - chosen))
    low, high = ax.get_xlim()
    left = chosen > (low + high) / 2
    ax.axvline(chosen, color=INK, lw=1.3)
    numbers = "\n".join(f"{_NAMES.get(c, c)} {100 * nearest[c]:.1f} %" for c in columns if nearest.get(c) is not None)
    ax.annotate(
        f"{label}: {chosen:g}\n{numbers}",
        (chosen, 50),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=8,
        bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1},
    )
    for column in columns:
        if nearest.get(column) is not None:
            kind = look(column)
            ax.plot(
                nearest["threshold"],
                100 * nearest[column],
                kind.marker,
                clip_on=False,
                ms=9,
                mfc="none",
                mec=kind.colour,
                mew=2,
            )


def _line_and_points(
    ax: Axes,
    rows: Sequence[Mapping[str, Any]],
    place: Mapping[Any, float],
    x: str,
    key: str,
    kind: Look,
    shift: float,
    label: str,
) -> None:
    at = np.array([place[row[x]] for row in rows])
    values = _column(rows, key) * _scale(key)
    means = [(p, values[at == p].mean()) for p in sorted(set(at))]
    ax.plot(*np.array(means).T + np.array([[shift], [0]]), color=kind.colour, ls=kind.dash)
    ax.plot(at + shift, values, ls="", marker=kind.marker, mfc="none", mec=kind.colour, mew=1.3, ms=5.5)
    # an empty line for the legend: line and point together
    ax.plot([], [], color=kind.colour, ls=kind.dash, marker=kind.marker, mfc="none", mew=1.3, ms=5.5, label=label)


def _mask_values(masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    # in their own dtype: a float32 mask of 0.2 is at the threshold 0.2, as it is when pruning compares them
    values = {name: torch.as_tensor(m).detach().cpu().numpy().ravel() for name, m in masks.items()}
    if not values or not all(len(v) for v in values.values()):
        raise ValueError("masks must hold at least one channel per layer, got none")
    for name, v in values.items():
        if not (v.min() >= 0 and v.max() <= 1):
            raise ValueError(f"masks must lie in [0, 1], got {v.min():.3g} to {v.max():.3g} in layer {name!r}")
    return values


def _column(records: Iterable[Mapping[str, Any]], key: str, numbers: bool = True) -> np.ndarray:
    records = list(records)
    if not records:
        raise ValueError("records must hold at least one entry, got none")
    for record in records:
        if key not in record:
            raise ValueError(f"no {key!r} in a record: it has {', '.join(map(repr, record))}")
    return np.array([record[key] for record in records], dtype=float if numbers else object)


def _scale(key: str) -> float:
    return 100.0 if key in _NAMES else 1.0


def _name(key: str) -> str:
    return f"{_NAMES[key]} (%)" if key in _NAMES else key
