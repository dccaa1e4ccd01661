"""`zolr plot`: loss curves of runs against what they cost, and maps of what was diagnosed, layer by layer. Needs matplotlib."""

from __future__ import annotations

import json
import re
import tomllib
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, inf, isfinite, log, log10
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

KINDS = ("eval", "diagnosis", "loss")  # keys by which lines of `metrics.jsonl` are told apart

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
    "keep-last",
    "check-every",
    "undo",
    "trust-remote-code",
)

# settings that do nothing unless others are as said
IDLE: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(
        ("vocab-size", "tokenizer-characters"), lambda settings: not settings.get("train-tokenizer")
    ),
    **dict.fromkeys(
        ("hidden-size", "layers", "heads", "ffn-size"), lambda settings: settings.get("model") is not None
    ),
    "decay": lambda settings: settings.get("schedule") != "wsd",
}

LABEL_SIZE = 9  # points of the names of runs
LABEL_LINES = 3  # of a name in a legend; the settings that do not fit in them are left out
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
        DataError: there is no run, it has not begun, or a file of it is damaged.
    """
    path = folder / runs.METRICS
    if not path.is_file():
        raise DataError(f"{folder} holds no {runs.METRICS}; give the folder of a run")
    kinds: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
    for line in _lines(path):
        if kind := _kind(line):
            kinds[kind].append(line)
    if not any(kinds.values()):
        raise DataError(
            f"{path} holds no step and no evaluation; wait until the run has made some, or leave it out"
        )
    return Traced(folder, _settings(folder), kinds["loss"], kinds["eval"], kinds["diagnosis"])


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a `metrics.jsonl`, without one that its run was killed in."""
    content = path.read_bytes()
    texts, lines = content.splitlines(), []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode("utf-8-sig"))
            fault = _fault(line)
        except (ValueError, RecursionError) as error:
            if number == len(texts) and not content.endswith(b"\n"):  # every whole line has an end
                break
            line, fault = None, _why_no_json(error)
        if fault:
            raise DataError(
                f"{path} is damaged in line {number}: {fault}; remove that line, or copy the file again"
            )
        lines.append(line)
    return lines


def _why_no_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON, {error.msg} (character {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _kind(line: Mapping[str, Any]) -> str | None:
    return next((kind for kind in KINDS if kind in line), None)


def _fault(line: Any) -> str | None:
    """What keeps a JSON value from being a line of `metrics.jsonl`."""
    if not isinstance(line, dict):
        return f"{json.dumps(line)[:20]} where an object should be"
    kind = _kind(line)
    if kind is None:
        return None  # of no interest here
    if not isinstance(line.get("step"), int):
        return "it names no step"
    for key, _ in AXES.values():
        if _number(line.get(key, 0)) is None:
            return f"{key} is no number"
    if kind == "loss":
        return None
    found = line[kind]
    if not isinstance(found, dict):
        return f"{kind} is no object"
    if kind == "diagnosis":
        layers = found.get("layers")
        parts = [found.get("total"), found.get("projected", {}), layers]
        parts += layers.values() if isinstance(layers, dict) else []
        if not all(isinstance(part, dict) for part in parts):
            return "the diagnosis has no figures of layers, or none of all of them"
    return None


def _settings(folder: Path) -> Mapping[str, Any]:
    """The settings of a run, none if its folder has no file of them."""
    path = folder / runs.CONFIG
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged: {error}; restore it, or remove it to draw the run under the name of its folder alone"
        ) from error


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as much of what is above each as tells it from the others.

    >>> folder_names([Path("/a/x/run"), Path("/a/y/run"), Path("/a/x/other")])
    ['x/run', 'y/run', 'other']
    """
    paths = [folder.resolve() for folder in folders]
    names = []
    for path in paths:
        ends = (path.parts[-depth:] for depth in range(1, len(path.parts) + 1))
        alone = (end for end in ends if all(p == path or p.parts[-len(end) :] != end for p in paths))
        names.append(str(Path(*next(alone))))
    return names


def labels(traces: Sequence[Traced]) -> list[str]:
    """A name for each run: its folder's, and, of several, its method and the settings in which they differ."""
    folders = folder_names([trace.folder for trace in traces])
    if len(traces) == 1:
        return folders
    spelled = [_telling(trace.settings) for trace in traces]
    keys = dict.fromkeys(key for settings in spelled for key in settings)
    differing = [key for key in keys if len({settings.get(key, "") for settings in spelled} - {None}) > 1]
    differing = dict.fromkeys(["method", "paradigm", *differing])
    names = []
    for folder, settings in zip(folders, spelled, strict=True):
        parts = [part for key in differing if (part := settings.get(key))]
        names.append(f"{folder}: {', '.join(parts)}" if parts else folder)
    return names


def _telling(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The settings that can tell one run from another, each as it is shown: what is off as nothing, what does nothing as None."""
    found: dict[str, str | None] = {}
    for key, value in settings.items():
        if key in ASIDE:
            continue
        if key in IDLE and IDLE[key](settings):
            found[key] = None
            continue
        if isinstance(value, bool):
            found[key] = key if value else ""
            continue
        value = f"{value:g}" if isinstance(value, float) else _short(value)
        plain = key in ("method", "paradigm", "model", "task", "projector")
        found[key] = value if plain else f"{key} {value}"
    return found


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
    lacking = [(trace.folder, why) for trace in traces if (why := why_not(trace, what))]
    if len(lacking) == len(traces):
        raise DataError(
            f"there is no {what} to draw: {'; '.join(f'{folder}: {why}' for folder, why in lacking)}"
        )
    for folder, why in lacking:
        warnings.warn(f"{folder} is left out of the picture of {what}: {why}", stacklevel=2)
    return [trace for trace in traces if not why_not(trace, what)]


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
    if metric == "loss" and any(_number(line["loss"]) is not None for line in trace.steps):
        return None
    seen = [line["eval"][metric] for line in trace.evaluations if metric in line["eval"]]
    if any(_number(value) is not None for value in seen):
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
                    markeredgewidth=0.6, **style,
                )  # fmt: skip
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
    samples = [
        _sample(marker=MARKERS[i % len(MARKERS)], markersize=5.5, **_style(i)) for i in range(len(traces))
    ]
    _legend(figure, samples, labels(traces))
    figure.savefig(path, dpi=150)


def _first_cost(traces: Sequence[Traced], axis: str) -> float:
    """The least that is spent after a step of any run."""
    costs = (float(line.get(AXES[axis][0], 0.0)) for trace in traces for line in trace.steps)
    return min((cost for cost in costs if cost > 0), default=1.0)


def _counts(panel: Any) -> None:
    """Few numbers on the axis of what has been spent, and large ones in short."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, SymmetricalLogLocator

    wide = panel.get_xscale() == "symlog"
    locator = SymmetricalLogLocator(panel.xaxis.get_transform()) if wide else MaxNLocator(5)
    panel.xaxis.set_major_locator(locator)
    large = EngFormatter(sep="")
    panel.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: large(value) if abs(value) >= 1 else f"{value:.6g}")
    )


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them on an upright logarithmic axis, as many as there is room for."""
    from matplotlib.ticker import Formatter, Locator, NullLocator

    class Ticks(Locator):
        def __call__(self) -> Sequence[float]:
            low, high = sorted(axis.get_view_interval())
            height = axis.axes.bbox.height / axis.axes.figure.dpi * 72
            return log_ticks(low, high, int(height / (1.8 * LABEL_SIZE)))

    class Numbers(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return plain_numbers([x])[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return plain_numbers(values)

    axis.set_major_locator(Ticks())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(Numbers())


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers for a logarithmic axis, no two of them nearer than a share of one in `most`.

    >>> log_ticks(6.2, 8.1, 8)
    [6.5, 7.0, 7.5, 8.0]
    >>> log_ticks(2.0, 2e7, 8)
    [10.0, 100.0, 1000.0, 10000.0, 100000.0, 1000000.0, 10000000.0]
    """
    from matplotlib.ticker import MaxNLocator

    most = min(10, max(5, most))  # fewer hold no two round numbers of some ranges
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    kinds = [[m * 10.0**k for k in decades for m in parts] for parts in ((1, 2, 5), (1, 3))]
    kinds += [[10.0**k for k in decades if k % step == 0] for step in range(1, len(decades))]
    for count in range(2, 11):  # for less than a decade
        steps = MaxNLocator(count, steps=(1, 2, 2.5, 5, 10), min_n_ticks=2)
        kinds.append(list(steps.tick_values(low, high)))
    inside = [[float(v) for v in kind if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)] for kind in kinds]
    near = (log(high) - log(low)) / most
    fitting = [
        ticks for ticks in inside if all(log(b / a) >= near for a, b in zip(ticks, ticks[1:], strict=False))
    ]
    return max(fitting, key=len)


def plain_numbers(values: Sequence[float]) -> list[str]:
    """Numbers with the digits that tell them apart, very large and small ones as powers of ten.

    >>> plain_numbers([0.5, 2000.0, 1e5, 2.5e-7])
    ['0.5', '2,000', '10⁵', '2.5×10⁻⁷']
    >>> plain_numbers([1.0, 1.000025])
    ['1', '1.000025']
    """
    ordered = sorted(set(values))
    gap = min((b - a for a, b in zip(ordered, ordered[1:], strict=False)), default=inf)
    digits = 6
    while digits < 17 and any(abs(float(f"{v:.{digits}g}") - v) > 0.01 * gap for v in values):
        digits += 1
    return [_plain_number(value, digits) for value in values]


def _plain_number(value: float, digits: int) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}×{power}"


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


def _widths(figure: Any, size: float) -> Callable[[str], float]:
    """A measure of texts in inches."""
    from matplotlib.font_manager import FontProperties

    renderer, font = figure.canvas.get_renderer(), FontProperties(size=size)
    return lambda text: renderer.get_text_width_height_descent(text, font, False)[0] / figure.dpi


def shortened(text: str, room: float, width: Callable[[str], float]) -> str:
    """A text without its middle, if it is too wide: names of runs often differ at their ends.

    >>> shortened("questions-stiefel-zo-0", 12, len)
    'questi…-zo-0'
    """
    if width(text) <= room:
        return text

    def cut(kept: int) -> str:
        return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"

    return cut(max(1, bisect_right(range(len(text)), room, key=lambda kept: width(cut(kept))) - 1))


def fitted(text: str, room: float, width: Callable[[str], float], lines: int = LABEL_LINES) -> str:
    """A name of a run in so many lines at most, broken between its settings; the last ones are left out if need be.

    >>> print(fitted("a: stiefel, fo, rank 4, steps 40", 16, len, 2))
    a: stiefel, fo,
    rank 4, steps 40
    >>> print(fitted("a: stiefel, fo, rank 4, steps 40", 15, len, 2))
    a: stiefel, fo,
    rank 4, …
    """
    found = [""]
    for part in re.split("(?<=[,:]) ", text):
        longer = f"{found[-1]} {part}".strip()
        if width(longer) <= room:
            found[-1] = longer
            continue
        found += [shortened(part, room, width)]
    found = [line for line in found if line]
    if len(found) <= lines:
        return "\n".join(found)
    parts = f"{found[lines - 1]} …".split(", ")
    while len(parts) > 1 and width(", ".join(parts)) > room:
        parts = [*parts[:-2], "…"]
    return "\n".join([*found[: lines - 1], shortened(", ".join(parts), room, width)])


def _legend(figure: Any, samples: Sequence[Any], names: Sequence[str], title: str | None = None) -> None:
    """The names above all panels, and over them a title: one of the figure itself would lie on them.

    The figure becomes higher by what they take.
    """
    letter, width = LABEL_SIZE / 72, _widths(figure, LABEL_SIZE)
    room = figure.get_figwidth() - 2 * letter  # without a margin on both sides
    beside, between = 3.2 * letter, 2.0 * letter  # the line sample of a name, and what is between two columns
    column = beside + between + max(map(width, names))
    columns = max(1, min(len(names), int((room + between) / column)))
    shown = [fitted(name, room - beside, width) for name in names] if columns == 1 else names
    key = figure.legend(
        samples, ["-"] * len(shown), loc="outside upper center", ncols=columns, frameon=False,
        fontsize=LABEL_SIZE, title=title, title_fontproperties={"weight": "bold", "size": 11},
    )  # fmt: skip
    for text, name in zip(key.get_texts(), shown, strict=True):
        text.set_parse_math(False)  # a name of a folder may have anything in it
        text.set_text(name)
    figure.set_figheight(figure.get_figheight() + key.get_window_extent().height / figure.dpi)


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
        width = _widths(canvas, LABEL_SIZE)
        for panel, name in zip(panels, folder_names([trace.folder for trace in traces]), strict=True):
            panel.set_title(shortened(name, 3.8, width), fontsize=LABEL_SIZE, parse_math=False)
    below = _draw_totals(above, traces, tables, figure, axis)
    bar = canvas.colorbar(meshes[0], ax=[above, *panels], fraction=0.05, pad=0.01, aspect=40)
    if scale.log:
        _plain_ticks(bar.ax.yaxis)
    _legend(canvas, *_names_of_lines(traces, figure, axis), figure.name)
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
    _counts(panel)
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
        _plain_ticks(panel.yaxis)
    _plain(panel, "both")
    _counts(panel)
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
        [_rounded(_number(line["diagnosis"]["layers"].get(name, {}).get(key)), floor) for line in found]
        for name in layers
    ]
    return edges, layers, rows


def _totals(trace: Traced, key: str, axis: str, floor: float = 0.0) -> list[tuple[float, float]]:
    """A figure at each time, of all weights that have a subspace as if they were one; of all weights where none has, and the norm."""
    points = []
    for line in trace.diagnoses:
        found = line["diagnosis"]
        part = found["total"] if key == "norm" else found.get("projected", found["total"])
        if (value := _rounded(_number(part.get(key)), floor)) is not None:
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
