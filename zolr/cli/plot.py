"""`zolr plot`: loss curves of runs against what they cost, and maps of what was diagnosed, layer by layer. Needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from annotated_types import Ge

from zolr.cli.config import Settings, add, flag, nearest
from zolr.cli.lettering import LABEL_SIZE, counts, legend, plain_numbers, plain_ticks, shortened, widths
from zolr.cli.traces import AXES, Traced, folder_names, labels, number, short_names, traced
from zolr.errors import DataError, UsageError


@dataclass(frozen=True)
class Figure:
    """One figure of a diagnosis.

    Args:
        key: in `metrics.jsonl`.
        name: of the axis.
        log: whether it is drawn on a logarithmic scale.
        expected: key of what theory says.
        floor: size up to which it is zero to rounding.
        needs: what a run must have for it, beside a gradient.
    """

    key: str
    name: str
    log: bool = False
    expected: str = ""
    floor: float = 0.0
    needs: str = ""


# differences of sums of squares in float32, relative to one: what is exactly zero comes out at 1e-8 or so, of either sign
ROUNDING = 1e-6

PROBES, CHANGE = "a probe radius, chosen in the first step", "a change of the subspace with a first moment"

FIGURES = {
    "energy": Figure("energy", "energy of the gradient in the subspace"),
    "norm": Figure("norm", "norm of the gradient", log=True),
    "rank": Figure("rank_effective", "effective rank of the gradient", log=True),
    "stable-rank": Figure("rank_stable", "stable rank of the gradient", log=True),
    "gain": Figure("gain", "mean estimate along the gradient (1: unbiased)", needs=PROBES),
    "bias": Figure(
        "bias",
        "squared bias of an estimate over the squared gradient",
        floor=ROUNDING,
        needs=PROBES,
    ),
    "variance": Figure(
        "variance",
        "variance of an estimate over the squared gradient",
        log=True,
        expected="variance_expected",
        floor=ROUNDING,
        needs=PROBES,
    ),
    "cosine": Figure("cosine", "cosine of an estimate and the gradient", needs=PROBES),
    "moments": Figure(
        "moment_kept", "energy of the first moment kept at a change of the subspace", needs=CHANGE
    ),
    "moment-cosine": Figure(
        "moment_cosine", "cosine of the first moment before and after a change", needs=CHANGE
    ),
}

MAPS_A_ROW = 4

UNKNOWN, ZERO = "0.85", "white"  # cells of a map that have no color of the scale
THEORY: Mapping[str, Any] = {"linestyle": (0, (1, 1.5)), "linewidth": 2.4, "alpha": 0.6}

MOST_LABELS = 48  # layers that have their names on an axis; more of them show where a block begins

# edges of the times, names of the layers, and a row for each of them
Table = tuple[list[float], list[str], list[list[float | None]]]


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
    smooth: Annotated[float, Ge(1)] | None = flag(
        None, "Steps that a training loss is averaged over.", "Output", shown="a fiftieth of the run"
    )


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
    if settings.what in FIGURES:
        traces = having(traces, settings.what, _why_no_map)
    else:
        traces = having(traces, settings.what, _why_no_curve)
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


def having(traces: Sequence[Traced], what: str, why_not: Callable[[Traced, str], str | None]) -> list[Traced]:
    """The runs that have what is to be drawn; the others are named in notes.

    Raises:
        DataError: no run has it.
    """
    reasons = [why_not(trace, what) for trace in traces]
    lacking = [(trace.folder, why) for trace, why in zip(traces, reasons, strict=True) if why]
    if len(lacking) == len(traces):
        raise DataError(
            f"there is no {what} to draw: {'; '.join(f'{folder}: {why}' for folder, why in lacking)}"
        )
    for folder, why in lacking:
        warnings.warn(f"{folder} is left out of the picture of {what}: {why}", stacklevel=2)
    return [trace for trace, why in zip(traces, reasons, strict=True) if not why]


def _why_no_map(trace: Traced, what: str) -> str | None:
    """Why a run has no map of a figure."""
    figure = FIGURES[what]
    if not trace.diagnoses:
        return "it was not diagnosed; train with --diagnose-every N"
    _, _, rows = _table(trace, figure.key, "steps")
    if any(value is not None for row in rows for value in row):
        return None
    if rows:
        return f"{figure.key} is not finite in any of its diagnoses"
    needs = f"; it needs {figure.needs}" if figure.needs else ""
    return f"none of its diagnoses has {figure.key}{needs}"


def _why_no_curve(trace: Traced, metric: str) -> str | None:
    """Why a run has no curve of a metric."""
    if metric == "loss" and any(number(line["loss"]) is not None for line in trace.steps):
        return None
    seen = [line["eval"][metric] for line in trace.evaluations if metric in line["eval"]]
    if any(number(value) is not None for value in seen):
        return None
    return f"its {metric} is never finite" if seen else f"no evaluation of it has {metric}"


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

    figure = _canvas(6.6 * len(axes) + 0.4, 4.6)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    drawn: list[float] = []
    for panel, axis in zip(panels, axes, strict=True):
        ends = []
        for i, trace in enumerate(traces):
            style = _style(i)
            if metric == "loss" and trace.steps:
                points = [
                    (float(s.get(AXES[axis][0], 0)), v)
                    for s in trace.steps
                    if (v := number(s["loss"])) is not None
                ]
                means = smoothed([v for _, v in points], smooth or len(points) / 50)
                panel.plot([x for x, _ in points], means, linewidth=1.0, alpha=0.45, **style)
                drawn += means
            seen = [
                (trace.at(e["step"], axis), v)
                for e in trace.evaluations
                if (v := number(e["eval"].get(metric))) is not None
            ]
            ends += [x for x, _ in seen if x > 0][-1:] or [
                trace.at(s["step"], axis) for s in trace.steps[-1:]
            ]
            drawn += [v for _, v in seen]
            if seen:
                panel.plot(
                    [x for x, _ in seen], [v for _, v in seen],
                    linewidth=1.4, marker=MARKERS[i % len(MARKERS)], markersize=5.5, markeredgecolor="white",
                    markeredgewidth=0.6, **style,
                )  # fmt: skip
        if ends and max(ends) > SPREAD * min(ends):
            # what was measured before the first step has cost nothing: up to the first cost the axis is linear
            panel.set_xscale("symlog", linthresh=_first_cost(traces, axis), linscale=0.3)
        panel.set_xlim(left=0)
        panel.set_xlabel(AXES[axis][1])
        _plain(panel, "both")
        counts(panel)
    if metric == "loss":
        panels[0].set_ylabel("loss (nats): held-out with markers, training pale")
        _zoom(panels[0], drawn)
    else:
        panels[0].set_ylabel(f"held-out {metric}")
        if metric == "perplexity":
            panels[0].set_yscale("log")
            plain_ticks(panels[0].yaxis)
    samples = [
        _sample(marker=MARKERS[i % len(MARKERS)], markersize=5.5, **_style(i)) for i in range(len(traces))
    ]
    legend(figure, samples, labels(traces))
    figure.savefig(path, dpi=150)


def _first_cost(traces: Sequence[Traced], axis: str) -> float:
    """The least that is spent after a step of any run."""
    costs = (float(line.get(AXES[axis][0], 0.0)) for trace in traces for line in trace.steps)
    return min((cost for cost in costs if cost > 0), default=1.0)


def _zoom(panel: Any, values: Sequence[float]) -> None:
    """Leave out of sight what a few first steps alone reach, if it would flatten all others."""
    if len(values) < 20:
        return
    ordered = sorted(values)
    low, most, high = ordered[0], ordered[-1], ordered[int(0.97 * (len(ordered) - 1))]
    if most - low > 2 * (high - low) > 0:
        panel.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _sample(**style: Any) -> Any:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linewidth=1.4, **style)


@dataclass(frozen=True)
class Scale:
    """The colors of the maps.

    Args:
        log: whether they go with the logarithm.
        low: value of the first color.
        high: of the last one.
    """

    log: bool
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], log: bool) -> Scale:
        """A scale for all of these values; on a logarithmic one zeros have no place."""
        positive = [value for value in values if value > 0]
        if log and positive and max(positive) > 3 * min(positive):
            return cls(True, min(positive), max(positive))
        low, high = min(0.0, *values), max(0.0, *values)
        return cls(False, low, high if high > low else low + 1.0)

    def norm(self) -> Any:
        """As matplotlib has it."""
        from matplotlib.colors import LogNorm, Normalize

        return LogNorm(self.low, self.high) if self.log else Normalize(self.low, self.high)

    def color(self, value: float) -> Any:
        """The color of a value."""
        return colors()(self.norm()(value)) if value > 0 or not self.log else ZERO


def colors() -> Any:
    """The colors of a scale, and one for what is below it."""
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(under=ZERO)


def draw_maps(traces: Sequence[Traced], figure: Figure, axis: str, path: Path) -> None:
    """Write a map a run, layers against time, and above them the figure of all weights that have a subspace together.

    Args:
        traces: runs that have the figure.
        axis: a key of `AXES`.
    """
    tables = [_table(trace, figure.key, axis, figure.floor) for trace in traces]
    rows = -(-len(traces) // MAPS_A_ROW)
    columns = -(-len(traces) // rows)
    height = min(14.0, max(3.0, 0.8 + 0.17 * max(len(layers) for _, layers, _ in tables)))
    canvas = _canvas(2.4 + 4.4 * columns, 2.2 + rows * height)
    grid = canvas.add_gridspec(1 + rows, columns, height_ratios=(1.9, *[height] * rows))
    above = canvas.add_subplot(grid[0, :])
    values = [v for _, _, cells in tables for row in cells for v in row if v is not None]
    scale = Scale.of(values, figure.log)
    panels = [canvas.add_subplot(grid[1 + i // columns, i % columns]) for i in range(len(traces))]
    meshes = [_map(panel, table, scale, axis) for panel, table in zip(panels, tables, strict=True)]
    if len(traces) > 1:
        width = widths(canvas, LABEL_SIZE)
        for panel, name in zip(panels, folder_names([trace.folder for trace in traces]), strict=True):
            panel.set_title(shortened(name, 3.8, width), fontsize=LABEL_SIZE, parse_math=False)
    below = _draw_totals(above, traces, tables, figure, axis)
    bar = canvas.colorbar(meshes[0], ax=[above, *panels], fraction=0.05, pad=0.01, aspect=40)
    if scale.log:
        plain_ticks(bar.ax.yaxis)
    legend(canvas, *_names_of_lines(traces, figure, axis), figure.name)
    unknown = any(v is None for _, _, cells in tables for row in cells for v in row)
    zero = 0.0 in values and (scale.log or figure.floor > 0)  # else the bar of colors says it all
    _key(canvas, figure, unknown, scale.color(0.0) if zero else None, below)
    canvas.savefig(path, dpi=150)


def _map(panel: Any, table: Table, scale: Scale, axis: str) -> Any:
    """Draw the cells of one run, and name its layers."""
    import numpy as np

    edges, layers, rows = table
    cells = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    if scale.log:
        cells[cells <= 0] = scale.low / 10  # under the scale, which has a color for that
    mesh = panel.pcolormesh(
        edges, range(len(rows) + 1), cells, norm=scale.norm(), cmap=colors(), rasterized=True
    )
    panel.set_ylim(len(rows), 0)
    panel.set_facecolor(UNKNOWN)
    if scale.log and not any(v for row in rows for v in row):  # all blank, as if it had failed
        panel.text(0.5, 0.5, "zero", transform=panel.transAxes, ha="center", va="center", color="0.35")
    short = short_names(layers)
    ticks = _ticks(short)
    panel.set_yticks([t + 0.5 for t in ticks], [short[t] for t in ticks], fontsize=7)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel(AXES[axis][1])
    counts(panel)
    return mesh


def _draw_totals(
    panel: Any, traces: Sequence[Traced], tables: Sequence[Table], figure: Figure, axis: str
) -> bool:
    """Draw the figure of all weights together, and say whether zeros lie below a logarithmic axis."""
    from zolr.cli.picture import _plain

    totals = [
        _totals(trace, figure.key, axis, figure.floor) or _means(edges, rows)
        for trace, (edges, _, rows) in zip(traces, tables, strict=True)
    ]
    said = [_totals(trace, figure.expected, axis) if figure.expected else [] for trace in traces]
    values = [value for points in (*totals, *said) for _, value in points]
    wide = Scale.of(values or [0.0], figure.log).log
    below = False
    for i, (points, theory) in enumerate(zip(totals, said, strict=True)):
        seen = [(x, v) for x, v in points if v > 0 or not wide]
        zeros = [x for x, v in points if v <= 0 and wide]
        below = below or bool(zeros)
        panel.plot(
            [x for x, _ in seen], [v for _, v in seen], marker="o", markersize=3, linewidth=1.4, **_style(i)
        )
        panel.plot(
            zeros, [0.0] * len(zeros), marker="v", markersize=6, markerfacecolor="white",
            transform=panel.get_xaxis_transform(), clip_on=False, in_layout=False,
            **{**_style(i), "linestyle": "none"},
        )  # fmt: skip
        drawn = [(x, v) for x, v in theory if v > 0 or not wide]
        panel.plot([x for x, _ in drawn], [v for _, v in drawn], **{**_style(i), **THEORY})
    ends = [edge for edges, _, _ in tables for edge in edges]
    panel.set_xlim(min(ends), max(ends))  # one map below it lies under its own points
    panel.set_xlabel(AXES[axis][1])
    panel.set_ylabel("all projected\nweights" if figure.key != "norm" else "all weights", fontsize=9)
    if wide:
        panel.set_yscale("log")
        plain_ticks(panel.yaxis)
    _plain(panel, "both")
    counts(panel)
    return below


def _names_of_lines(traces: Sequence[Traced], figure: Figure, axis: str) -> tuple[list[Any], list[str]]:
    """Line samples and their names; what theory says is dotted in the color of each run, and named once."""
    samples = [_sample(marker="o", markersize=3, **_style(i)) for i in range(len(traces))]
    names = labels(traces)
    if figure.expected and any(_totals(trace, figure.expected, axis) for trace in traces):
        from matplotlib.lines import Line2D

        samples.append(Line2D([], [], color="0.35", **THEORY))
        names.append("theory")
    return samples, names


def _key(canvas: Any, figure: Figure, unknown: bool, zero: Any, below: bool) -> None:
    """Say under all maps what cells and marks mean that no scale explains.

    Args:
        unknown: whether there are cells of no value.
        zero: color of those that are zero, or None.
        below: whether zeros are marked below an axis.
    """
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cell = Patch(facecolor=zero, edgecolor="0.35")
    mark = Line2D([], [], color="0.35", linestyle="none", marker="v", markersize=6, markerfacecolor="white")
    said = f"zero to rounding (at most {plain_numbers([figure.floor])[0]})" if figure.floor else "zero"
    marks = {}
    if zero is not None or below:
        marks[said] = tuple([cell] * (zero is not None) + [mark] * below)
    if unknown:
        marks["not known"] = Patch(facecolor=UNKNOWN, edgecolor="0.35")
    if marks:
        canvas.legend(
            list(marks.values()), list(marks), loc="outside lower center", ncols=len(marks), frameon=False,
            fontsize=LABEL_SIZE, handler_map={tuple: HandlerTuple(ndivide=None)},
        )  # fmt: skip


def _rounded(value: float | None, floor: float) -> float | None:
    """A value, or zero where it differs from that by rounding alone."""
    return 0.0 if value is not None and abs(value) <= floor else value


def _table(trace: Traced, key: str, axis: str, floor: float = 0.0) -> Table:
    """A figure of the layers that have it, at the times at which any has it."""
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
        [_rounded(number(line["diagnosis"]["layers"].get(name, {}).get(key)), floor) for line in found]
        for name in layers
    ]
    return edges, layers, rows


def _totals(trace: Traced, key: str, axis: str, floor: float = 0.0) -> list[tuple[float, float]]:
    """A figure at each time, of all weights that have a subspace as if they were one; of all weights where none has, and the norm."""
    points = []
    for line in trace.diagnoses:
        found = line["diagnosis"]
        part = found["total"] if key == "norm" else found.get("projected", found["total"])
        if (value := _rounded(number(part.get(key)), floor)) is not None:
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
