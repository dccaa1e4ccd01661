"""The picture of `zolr compare`: peak memory as bars, and quality against what it cost. Needs matplotlib."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import Any

from zolr.cli import runs

# told apart by people of every color vision (Okabe and Ito 2008); with markers, for a print without colors
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "-.", ":")  # one for each time the colors are through

AXIS_LETTERS, KEY_LETTERS = 30, 44  # of a line of a name beside its bars, and among the curves

SPREAD = 25  # ratio of the longest to the shortest run from which on costs are drawn on a logarithmic axis


def curve(folder: Path, metric: str) -> list[tuple[float, float, float]]:
    """Forward passes, seconds and validation score at every evaluation of a run, from its `metrics.jsonl`."""
    spent, points = {0: (0.0, 0.0)}, []
    path = folder / runs.METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        if "eval" not in entry:
            if "forwards" in entry:  # a step, and not a diagnosis
                spent[entry["step"]] = entry["forwards"], entry["seconds"]
            continue
        score = entry["eval"].get(metric)
        if isinstance(score, (int, float)) and isfinite(
            score
        ):  # one that is not finite is a word in the file
            points.append((*spent[entry["step"]], float(score)))
    return points


def draw(rows: Sequence[Mapping[str, Any]], budget: int | None, path: Path, *, title: str) -> None:
    """Write the picture.

    Args:
        rows: of `zolr compare`.
        budget: bytes, drawn as a line.
        path: where to; its ending says in which format.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = next((row["metric"] for row in rows if "metric" in row), "accuracy")
    lines = [wrapped(row["label"], AXIS_LETTERS).count("\n") + 1 for row in rows]
    height = max(4.2, 1.4 + len(rows) * max(0.52, 0.08 + 0.17 * max(lines)))
    figure = Figure(figsize=(13.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = _both(figure.subfigures(1, 2, width_ratios=(1.0, 1.35), wspace=0.02))
    _memory(left, rows, budget)
    _quality(right, rows, metric)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)


def wrapped(label: str, letters: int) -> str:
    """A label in lines of so many letters at most, broken between its settings where that is possible.

    >>> print(wrapped("stiefel:fo lr=0.003 rank=4 + selective checkpointing", 30))
    stiefel:fo lr=0.003 rank=4
    + selective checkpointing
    """
    parts = label.replace(" + ", "\n+ ").splitlines() if len(label) > letters else [label]
    return "\n".join(line for part in parts for line in wrap(part, letters, break_on_hyphens=False))


def _both(parts: Any) -> tuple[Any, Any]:
    return parts[0], parts[1]


def _styles(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How each row is drawn: with checkpointing it goes the same way, so it looks like its method and lets it through."""
    plain = [re.sub(r" \+ (selective )?checkpointing", "", row["label"]) for row in rows]
    places = {name: i for i, name in enumerate(dict.fromkeys(plain))}
    styles = []
    for row, name in zip(rows, plain, strict=True):
        i = places[name]
        style = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
        }
        if row["label"] != name:
            style |= {"linestyle": (0, (3, 3)), "markerfacecolor": "white"}
        styles.append(style)
    return styles


def _memory(figure: Any, rows: Sequence[Mapping[str, Any]], budget: int | None) -> None:
    """Two bars a method, the first one on top: predicted above measured."""
    axes = figure.subplots()
    peaks = [row.get(key) or 0 for row in rows for key in ("peak_bytes_predicted", "peak_bytes_measured")]
    most = max([*peaks, budget or 0, 1])
    unit, size = next(
        ((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if most >= s), ("B", 1)
    )
    thick, styles = 0.38, _styles(rows)
    for place, row in enumerate(rows):
        color = styles[place]["color"]
        predicted, measured = row.get("peak_bytes_predicted"), row.get("peak_bytes_measured")
        top, low = place - thick / 2, place + thick / 2
        for value, at, how in (
            (predicted, top, {"facecolor": "white", "edgecolor": color, "hatch": "////", "linewidth": 1.2}),
            (measured, low, {"facecolor": color, "edgecolor": color, "linewidth": 1.2}),
        ):
            if value:
                axes.barh(at, value / size, thick, **how)
        for value, at, missing in (
            (predicted, top, "not predicted"),
            (measured, low, row["status"] if row["status"] != "done" else "not measured"),
        ):
            text = _digits(value / size) if value else missing
            axes.annotate(
                text, ((value or 0) / size, at), (4, 0), textcoords="offset points", va="center", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # the line of the budget ends there
            )  # fmt: skip
    if budget is not None:
        axes.axvline(budget / size, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            "budget", (budget / size, 1.0), (0, 2), ("data", "axes fraction"), "offset points", ha="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [wrapped(row["label"], AXIS_LETTERS) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * most / size)
    axes.set_xlabel(f"peak memory of a step ({unit})")
    _plain(axes, "x")
    from matplotlib.patches import Patch

    kinds = [
        Patch(facecolor="white", edgecolor="0.35", hatch="////", label="predicted"),
        Patch(facecolor="0.35", edgecolor="0.35", label="measured"),
    ]
    figure.legend(handles=kinds, loc="outside upper center", ncols=2, frameon=False, fontsize=9)


def _quality(figure: Any, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """The validation score against forward passes, and against seconds, on one scale."""
    by_forwards, by_seconds = figure.subplots(1, 2, sharey=True)
    styles = _styles(rows)
    curves = {i: curve(Path(row["folder"]), metric) for i, row in enumerate(rows) if row.get("folder")}
    curves = {i: points for i, points in curves.items() if points}
    for axes, column, name in (
        (by_forwards, 0, "forward passes (a backward counts as two)"),
        (by_seconds, 1, "seconds of steps"),
    ):
        ends = [points[-1][column] for points in curves.values() if points[-1][column] > 0]
        wide = bool(ends) and max(ends) > SPREAD * min(ends)
        for i, points in curves.items():
            seen = [p for p in points if p[column] > 0] if wide else points
            axes.plot(
                [p[column] for p in seen],
                [p[2] for p in seen],
                label=rows[i]["label"],
                # a later curve on top of an equal one leaves it to be seen
                markersize=6.5 - 2.0 * i / len(rows),
                linewidth=2.4 - 1.0 * i / len(rows),
                **styles[i],
            )
        if wide:
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel(name)
        _plain(axes, "both")
    by_forwards.set_ylabel(f"validation {metric}")
    if curves:
        handles, names = by_forwards.get_legend_handles_labels()
        names = [wrapped(name, KEY_LETTERS) for name in names]
        _key(figure, handles, names)


def _key(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend above the axes, of as many columns as there is room for."""
    for columns in range(min(3, len(names)), 0, -1):
        key = figure.legend(
            handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize=9
        )
        if columns == 1 or key.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        key.remove()


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _digits(value: float) -> str:
    """Three digits, or all there are before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
