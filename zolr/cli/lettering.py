"""Numbers on the axes of a picture, and names of runs above it, as many as there is room for."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import ceil, floor, inf, log, log10
from typing import Any

LABEL_SIZE = 9  # points of the names of runs
LABEL_LINES = 3  # of a name in a legend; the settings that do not fit in them are left out


def counts(panel: Any) -> None:
    """Few numbers on the axis of what has been spent, and large ones in short."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, SymmetricalLogLocator

    wide = panel.get_xscale() == "symlog"
    locator = SymmetricalLogLocator(panel.xaxis.get_transform()) if wide else MaxNLocator(5)
    panel.xaxis.set_major_locator(locator)
    large = EngFormatter(sep="")
    panel.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: large(value) if abs(value) >= 1 else f"{value:.6g}")
    )


def plain_ticks(axis: Any) -> None:
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


def widths(figure: Any, size: float) -> Callable[[str], float]:
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


def legend(figure: Any, samples: Sequence[Any], names: Sequence[str], title: str | None = None) -> None:
    """The names above all panels, and over them a title: one of the figure itself would lie on them.

    The figure becomes higher by what they take.
    """
    letter, width = LABEL_SIZE / 72, widths(figure, LABEL_SIZE)
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
