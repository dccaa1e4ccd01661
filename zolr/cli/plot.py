"""`zolr plot`: loss curves of runs against what they cost, and maps of what was diagnosed, layer by layer. Needs matplotlib."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import typer

from zolr.cli import runs
from zolr.cli.config import Settings, add, flag, nearest
from zolr.errors import DataError, UsageError

AXES = {
    "tokens": ("tokens_seen", "tokens of the batches"),
    "seconds": ("seconds", "seconds of steps"),
    "steps": ("step", "steps"),
    "forwards": ("forwards", "forward passes (a backward counts as two)"),
}


@dataclass(frozen=True)
class Figure:
    """One figure of a diagnosis.

    Args:
        key: in `metrics.jsonl`.
        name: of the axis.
        log: whether it is drawn on a logarithmic scale.
        expected: key of what theory says.
    """

    key: str
    name: str
    log: bool = False
    expected: str = ""


FIGURES = {
    "energy": Figure("energy", "energy of the gradient in the subspace"),
    "norm": Figure("norm", "norm of the gradient", log=True),
    "rank": Figure("rank_effective", "effective rank of the gradient", log=True),
    "stable-rank": Figure("rank_stable", "stable rank of the gradient", log=True),
    "gain": Figure("gain", "mean estimate along the gradient (1: unbiased)"),
    "bias": Figure("bias", "squared bias of an estimate over the squared gradient"),
    "variance": Figure(
        "variance",
        "variance of an estimate over the squared gradient",
        log=True,
        expected="variance_expected",
    ),
    "cosine": Figure("cosine", "cosine of an estimate and the gradient"),
    "moments": Figure("moment_kept", "energy of the first moment kept at a change of the subspace"),
    "moment-cosine": Figure("moment_cosine", "cosine of the first moment before and after a change"),
}

# settings that do not tell one run from another
ASIDE = (
    "threads",
    "device",
    "save-every",
    "eval-every",
    "eval-rows",
    "diagnose-every",
    "diagnose-draws",
    "workers",
)

MOST_LABELS = 48  # layers that have their names on an axis; more of them show where a block begins


@dataclass(frozen=True)
class Plot(Settings):
    """Settings of `zolr plot`."""

    runs: tuple[str, ...] = flag((), "Run folders; unfinished ones too.", "Data", argument=True, path=True)
    output: str | None = flag(
        None,
        "Picture to write: .png, .pdf, .svg.",
        "Output",
        shown="plot.png; of another --what than loss plot-WHAT.png",
    )
    x: Literal["tokens", "seconds", "steps", "forwards"] | None = flag(
        None,
        "What curves are drawn against: tokens, seconds, steps, forwards.",
        "Output",
        shown="tokens and seconds; maps against tokens",
    )
    what: str = flag(
        "loss",
        f"loss, or another metric of the evaluations; or of --diagnose-every: {', '.join(FIGURES)}.",
        "Output",
    )
    smooth: float | None = flag(
        None, "Steps that a training loss is averaged over.", "Output", shown="a fiftieth of the run"
    )


@dataclass(frozen=True)
class Traced:
    """What a run folder tells: its settings, and the lines of `metrics.jsonl` by kind."""

    folder: Path
    settings: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    diagnoses: Sequence[Mapping[str, Any]]

    @cached_property
    def spent(self) -> dict[int, Mapping[str, Any]]:
        """The line of each step."""
        return {line["step"]: line for line in self.steps}

    def at(self, step: int, axis: str) -> float:
        """What has been spent after a step."""
        return float(self.spent.get(step, {}).get(AXES[axis][0], 0.0))


def traced(folder: Path) -> Traced:
    """Read a run folder, finished or not.

    Raises:
        DataError: there is no run, or a file of it is damaged.
    """
    path = folder / runs.METRICS
    if not path.is_file():
        raise DataError(f"{folder} holds no {runs.METRICS}; give the folder of a run")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number > 1 and not text.endswith("}"):  # the last line of a killed run may be cut
                break
            raise DataError(f"{path} is damaged in line {number}: {error}") from error
    config = folder / runs.CONFIG
    settings = tomllib.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    kinds: dict[str, list[Mapping[str, Any]]] = {"eval": [], "diagnosis": [], "loss": []}
    for line in lines:
        kind = next((kind for kind in kinds if kind in line), None)
        if kind:
            kinds[kind].append(line)
    return Traced(folder, settings, kinds["loss"], kinds["eval"], kinds["diagnosis"])


def labels(traces: Sequence[Traced]) -> list[str]:
    """A name for each run: its folder's, and, of several, its method and the settings in which they differ."""
    if len(traces) == 1:
        return [traces[0].folder.resolve().name]
    keys = list(dict.fromkeys(key for trace in traces for key in trace.settings if key not in ASIDE))
    differing = [key for key in keys if len({repr(trace.settings.get(key)) for trace in traces}) > 1]
    differing = ["method", "paradigm", *(key for key in differing if key not in ("method", "paradigm"))]
    names = []
    for trace in traces:
        parts = []
        for key in differing:
            value = trace.settings.get(key)
            if value is None:
                continue
            value = f"{value:g}" if isinstance(value, float) else _short(value)
            plain = key in ("method", "paradigm", "model", "task", "projector")
            parts.append(value if plain else f"{key} {value}")
        names.append(f"{trace.folder.resolve().name}: {', '.join(parts)}" if parts else trace.folder.name)
    return names


def _short(value: Any) -> str:
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value).rsplit("/", 1)[-1]


def short_names(names: Sequence[str]) -> list[str]:
    """Names of weights without what all or most of them share.

    >>> short_names(["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
    ['embed_tokens', '0 q_proj', 'lm_head']
    """
    found = []
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        block = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        last = (
            parts[-1]
            if block is None or parts[-1] not in ("dense", "query_key_value")
            else "".join(parts[-2:])
        )
        found.append(last if block is None else f"{parts[block]} {last}")
    # the same word twice in a block (two layers called dense, say) needs what stands before it
    return [
        s
        if found.count(s) == 1
        else re.sub(r"^.*?(?=\d|$)", "", name.removesuffix(".weight")).replace(".", " ") or name
        for s, name in zip(found, names, strict=True)
    ]


def smoothed(values: Sequence[float], over: float) -> list[float]:
    """Running means of about `over` values, the first ones of as many as there are.

    >>> smoothed([2.0, 4.0, 4.0], 1)
    [2.0, 4.0, 4.0]
    """
    keep, mean, weight, found = 1.0 - 1.0 / max(1.0, over), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found


def run(settings: Plot) -> None:
    """Loss curves of runs against what they cost, or maps of their diagnoses."""
    if not settings.runs:
        raise UsageError("nothing to plot; give run folders, such as runs/pretrain")
    check_matplotlib("zolr plot")
    traces = [traced(Path(folder)) for folder in settings.runs]
    usual = "plot.png" if settings.what == "loss" else f"plot-{settings.what}.png"
    output = Path(settings.output or usual)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--output {output}: pictures are .png, .pdf or .svg files")
    metrics = {key for trace in traces for line in trace.evaluations for key in line["eval"]} | {"loss"}
    if settings.what not in (*FIGURES, *metrics):
        raise UsageError(
            f"--what '{settings.what}' is not known; {nearest(settings.what, [*sorted(metrics), *FIGURES])}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if settings.what in FIGURES:
        draw_maps(traces, FIGURES[settings.what], settings.x or "tokens", output)
    else:
        draw_curves(
            traces,
            settings.what,
            [settings.x] if settings.x else ["tokens", "seconds"],
            settings.smooth,
            output,
        )
    print(output.absolute())


def check_matplotlib(who: str) -> None:
    """Refuse where pictures cannot be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError(f"{who} draws with matplotlib, which is not installed; pip install 'zolr[plot]'")


def _style(place: int) -> dict[str, Any]:
    from zolr.cli.picture import COLORS, DASHES

    return {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place // len(COLORS) % len(DASHES)]}


def _canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _number(value: Any) -> float | None:
    """A number that can be drawn; what is not finite is a word in the file."""
    return float(value) if isinstance(value, (int, float)) and isfinite(value) else None


def draw_curves(
    traces: Sequence[Traced], metric: str, axes: Sequence[str], smooth: float | None, path: Path
) -> None:
    """Write the curves: training loss as lines, evaluations as markers on lines of their own.

    Args:
        metric: of the evaluations; "loss" shows that of training too.
        axes: keys of `AXES`, a panel each.
        smooth: see `smoothed`.
    """
    from zolr.cli.picture import MARKERS, SPREAD, _plain

    names = labels(traces)
    figure = _canvas(6.6 * len(axes) + 0.4, 5.0)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    drawn: list[float] = []
    for panel, axis in zip(panels, axes, strict=True):
        ends = []
        for i, (trace, name) in enumerate(zip(traces, names, strict=True)):
            style = _style(i)
            if metric == "loss" and trace.steps:
                points = [
                    (float(s.get(AXES[axis][0], 0)), v)
                    for s in trace.steps
                    if (v := _number(s["loss"])) is not None
                ]
                means = smoothed([v for _, v in points], smooth or len(points) / 50)
                panel.plot([x for x, _ in points], means, linewidth=1.0, alpha=0.45, **style)
                drawn += means
            seen = [
                (trace.at(e["step"], axis), v)
                for e in trace.evaluations
                if (v := _number(e["eval"].get(metric))) is not None
            ]
            ends += [x for x, _ in seen if x > 0][-1:] or [
                trace.at(s["step"], axis) for s in trace.steps[-1:]
            ]
            drawn += [v for _, v in seen]
            if seen:
                panel.plot(
                    [x for x, _ in seen], [v for _, v in seen],
                    linewidth=1.4, marker=MARKERS[i % len(MARKERS)], markersize=5.5, markeredgecolor="white",
                    markeredgewidth=0.6, label=name, **style,
                )  # fmt: skip
            else:
                panel.plot([], [], label=name, **style)
        if ends and max(ends) > SPREAD * min(ends):
            # what was measured before the first step has cost nothing: up to the first cost the axis is linear
            panel.set_xscale("symlog", linthresh=_first_cost(traces, axis), linscale=0.3)
        panel.set_xlim(left=0)
        panel.set_xlabel(AXES[axis][1])
        _plain(panel, "both")
        _counts(panel)
    if metric == "loss":
        panels[0].set_ylabel("loss (nats): held-out with markers, training pale")
        _zoom(panels[0], drawn)
    else:
        panels[0].set_ylabel(f"held-out {metric}")
        if metric == "perplexity":
            panels[0].set_yscale("log")
            _plain_ticks(panels[0].yaxis)
    _legend(figure, panels[0], names)
    figure.savefig(path, dpi=150)


def _first_cost(traces: Sequence[Traced], axis: str) -> float:
    """The least that is spent after a step of any run."""
    costs = (float(line.get(AXES[axis][0], 0.0)) for trace in traces for line in trace.steps)
    return min((cost for cost in costs if cost > 0), default=1.0)


def _counts(panel: Any) -> None:
    """Few numbers on the axis of what has been spent, and large ones in short."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, SymmetricalLogLocator

    wide = panel.get_xscale() == "symlog"
    locator = SymmetricalLogLocator(panel.xaxis.get_transform()) if wide else MaxNLocator(5)
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, and few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _zoom(panel: Any, values: Sequence[float]) -> None:
    """Leave out of sight what a few first steps alone reach, if it would flatten all others."""
    if len(values) < 20:
        return
    ordered = sorted(values)
    low, most, high = ordered[0], ordered[-1], ordered[int(0.97 * (len(ordered) - 1))]
    if most - low > 2 * (high - low) > 0:
        panel.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _legend(figure: Any, panel: Any, names: Sequence[str], title: str | None = None) -> None:
    """The names above all panels, and over them a title: one of the figure itself would lie on them."""
    handles, shown = panel.get_legend_handles_labels()
    fitting = int(8.25 * figure.get_figwidth() / (max(map(len, names)) + 6))
    columns = max(1, min(len(names), fitting))
    figure.legend(
        handles, shown, loc="outside upper center", ncols=columns, frameon=False, fontsize=9, title=title,
        title_fontproperties={"weight": "bold", "size": 11},
    )  # fmt: skip


def draw_maps(traces: Sequence[Traced], figure: Figure, axis: str, path: Path) -> None:
    """Write a map a run, layers against time, and above them the figure of all weights that have a subspace together.

    Raises:
        DataError: no run was diagnosed, or none has this figure.
    """
    from matplotlib.colors import LogNorm, Normalize

    from zolr.cli.picture import _plain

    tables = [_table(trace, figure.key, axis) for trace in traces]
    values = [
        v for _, _, rows in tables for row in rows for v in row if v is not None and (v > 0 or not figure.log)
    ]
    if not values:
        raise DataError(
            f"no run has a diagnosis of {figure.key}; train with --diagnose-every N (estimates need a probe radius, and moments "
            "a change of the subspace)"
        )
    names, count = labels(traces), len(traces)
    most = max(len(rows) for _, _, rows in tables)
    height = min(14.0, max(3.0, 0.8 + 0.17 * most))
    canvas = _canvas(2.4 + 4.4 * count, 2.6 + height)
    grid = canvas.add_gridspec(2, count, height_ratios=(1.9, height))
    above = canvas.add_subplot(grid[0, :])
    wide = figure.log and max(values) > 3 * min(values)
    lowest, highest = (min(values), max(values)) if wide else (min(0.0, min(values)), max(values))
    norm = LogNorm(lowest, highest) if wide else Normalize(lowest, highest or 1.0)
    panels, mesh = [], None
    for i, (trace, name, (edges, layers, rows)) in enumerate(zip(traces, names, tables, strict=True)):
        totals = _totals(trace, figure.key, axis) or _means(edges, rows)
        gone = "" if not wide or any(v > 0 for _, v in totals) else ": zero"  # and on no logarithmic axis
        above.plot(
            *zip(*totals, strict=True),
            label=name + gone,
            marker="o",
            markersize=3,
            linewidth=1.4,
            **_style(i),
        )
        if figure.expected and (said := _totals(trace, figure.expected, axis)):
            style = {**_style(i), "linestyle": (0, (1, 1.5))}
            above.plot(*zip(*said, strict=True), linewidth=2.4, alpha=0.6, label=f"{name}: theory", **style)
        panel = canvas.add_subplot(grid[1, i])
        panels.append(panel)
        import numpy as np

        cells = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
        if wide:
            cells[~(cells > 0)] = np.nan
        mesh = panel.pcolormesh(
            edges, range(len(rows) + 1), cells, norm=norm, cmap="viridis", rasterized=True
        )
        panel.set_ylim(len(rows), 0)
        panel.set_facecolor("0.9")  # what is not known, or zero on a logarithmic scale
        if np.isnan(cells).all():
            known = any(v is not None for row in rows for v in row)
            panel.text(
                0.5,
                0.5,
                "zero" if known else "not known",
                transform=panel.transAxes,
                ha="center",
                color="0.35",
            )
        short = short_names(layers)
        ticks = _ticks(short)
        panel.set_yticks([t + 0.5 for t in ticks], [short[t] for t in ticks], fontsize=7)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel(AXES[axis][1])
        _counts(panel)
        panel.set_title(name if count > 1 else "", fontsize=9)
    if count == 1:
        above.set_title(names[0], fontsize=9)
    ends = [edge for edges, _, _ in tables for edge in edges]
    above.set_xlim(min(ends), max(ends))  # one map below it lies under its own points
    above.set_xlabel(AXES[axis][1])
    above.set_ylabel("all projected\nweights" if figure.key != "norm" else "all weights", fontsize=9)
    if wide:
        above.set_yscale("log")
        _plain_ticks(above.yaxis)
    _plain(above, "both")
    _counts(above)
    if count > 1 or figure.expected:
        _legend(canvas, above, above.get_legend_handles_labels()[1], figure.name)
    else:
        canvas.suptitle(figure.name, fontweight="bold", fontsize=11)
    bar = canvas.colorbar(mesh, ax=[above, *panels], fraction=0.05, pad=0.01, aspect=40)
    if wide:
        _plain_ticks(bar.ax.yaxis)
    canvas.savefig(path, dpi=150)


def _table(trace: Traced, key: str, axis: str) -> tuple[list[float], list[str], list[list[float | None]]]:
    """Edges of the times, names of the layers that have the figure, and a row for each of them."""
    found = [
        line
        for line in trace.diagnoses
        if any(key in layer for layer in line["diagnosis"]["layers"].values())
    ]
    layers = list(
        dict.fromkeys(n for line in found for n, layer in line["diagnosis"]["layers"].items() if key in layer)
    )
    times = [trace.at(line["step"], axis) for line in found]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)] or [max(times, default=1.0)]
    edges = [t - gap / 2 for t, gap in zip(times, [*gaps, gaps[-1]], strict=False)]
    edges = [max(0.0, edge) for edge in edges] + ([times[-1] + gaps[-1] / 2] if times else [])
    rows = [
        [_number(line["diagnosis"]["layers"].get(name, {}).get(key)) for line in found] for name in layers
    ]
    return edges, layers, rows


def _totals(trace: Traced, key: str, axis: str) -> list[tuple[float, float]]:
    """A figure at each time, of all weights that have a subspace as if they were one; of all weights where none has, and the norm."""
    points = []
    for line in trace.diagnoses:
        found = line["diagnosis"]
        part = found["total"] if key == "norm" else found.get("projected", found["total"])
        if (value := _number(part.get(key))) is not None:
            points.append((trace.at(line["step"], axis), value))
    return points


def _means(edges: Sequence[float], rows: Sequence[Sequence[float | None]]) -> list[tuple[float, float]]:
    """Mean over the layers at each time, of a figure that weights have only one by one."""
    points = []
    for k, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        known = [v for row in rows if (v := row[k]) is not None]
        if known:
            points.append(((a + b) / 2, sum(known) / len(known)))
    return points


def _ticks(names: Sequence[str]) -> list[int]:
    """Which layers get their names: all, or where a block begins."""
    if len(names) <= MOST_LABELS:
        return list(range(len(names)))
    blocks = [name.split(" ")[0] for name in names]
    begins = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    step = -(-len(begins) // MOST_LABELS)
    return begins[::step]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "plot", Plot, run, config=False)
