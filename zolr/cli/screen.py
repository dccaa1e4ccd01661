"""What a person sees: one progress line while a run lasts, tables at its end. All of it goes to stderr; stdout is for results."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, TYPE_CHECKING, Any, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from zolr.engine import Info
    from zolr.training import Progress as Counters

SECONDS = 30.0  # between two lines of a log that nobody watches, where no evaluation comes in between
REFRESH = 4  # progress lines a second: more would be felt in a run whose step takes milliseconds


class _Stderr:
    """stderr, of which a run does not depend: its reader may have left (`2>&1 | head`), the disk with the log may be full."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def console(quiet: bool = False) -> Console:
    """A console on stderr."""
    return Console(file=cast(IO[str], _Stderr()), quiet=quiet, highlight=False, soft_wrap=True)


def size(count: float | None) -> str:
    """Bytes for people.

    >>> size(3 * 2**30), size(None)
    ('3.00 GiB', '-')
    """
    if count is None:
        return "-"
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}" if unit == "GiB" else f"{count / divisor:.0f} {unit}"
    return f"{count:.0f} B"


def sizes(*counts: int) -> list[str]:
    """Several of them, in bytes where two that differ would look alike.

    >>> sizes(3 * 2**30, 2**20), sizes(12_300_000, 12_310_000)
    (['3.00 GiB', '1 MiB'], ['12,300,000 B', '12,310,000 B'])
    """
    shown = [size(count) for count in counts]
    alike = len(set(shown)) < len(set(counts))
    return [f"{count:,} B" for count in counts] if alike else shown


def number(value: Any) -> str:
    """A table cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def outcome_columns(metric: str) -> list[str]:
    """Headings of what `outcome_cells` gives."""
    return [f"{metric} before", "after", "steps", "forwards", "tokens", "seconds", "peak", "predicted"]


def outcome_cells(result: Mapping[str, Any]) -> list[Any]:
    """What a run reached and what it cost, of a `result.json`."""
    return [
        *(result[key] for key in ("before", "after", "steps", "forwards", "tokens")),
        f"{result['seconds']:.1f}",
        size(result["peak_bytes_measured"]),
        size(result["peak_bytes_predicted"]),
    ]


class Titled(Table):
    """A table below a title that has the width of the console: that of few columns would break it."""

    def __init__(self, text: str, **how: Any) -> None:
        super().__init__(**how)
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The title, then the table."""
        yield Text(self.text, style="bold")
        yield from super().__rich_console__(console, options)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table with numbers to the right."""
    made = Titled(
        title,
        box=SIMPLE_HEAD,
        show_header=any(columns),
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], (int, float)) for row in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(number(cell)) for cell in row))  # "[...]" in a cell is text, not markup
    return made


@contextmanager
def predicting(shown: Console | None, what: str) -> Iterator[None]:
    """Say on a terminal what is predicted for as long as that takes, seconds or minutes.

    Args:
        shown: where to; None for nowhere.
        what: of which the peak is wanted.
    """
    from zolr.cli.workload import SLOW_VMAP

    said: Any = nullcontext()
    if shown is not None and shown.is_terminal and not shown.quiet:
        said = shown.status(f"predicting the peak memory of {escape(what)} ...")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SLOW_VMAP)
        with said:
            yield


class Screen:
    """A reporter (see `zolr.training`) that draws a progress line and prints each evaluation."""

    def __init__(
        self, shown: Console, bar: Progress, memory: Any, rates: Any = None, rows: str = "held-out"
    ) -> None:
        self._rows, self._said = rows, time.monotonic()
        self._console, self._bar, self._memory, self._rates = shown, bar, memory, rates
        self._task: Any = None
        self._steps = 0
        self._loss, self._drawn = 0.0, 0.0

    def begin(self, step: int, steps: int) -> None:
        """Show the line."""
        self._steps = steps
        self._task = self._bar.add_task("", total=steps, completed=step, text="")

    def stepped(self, progress: "Counters", info: "Info") -> None:
        """Move the line; the loss is a running mean, since one batch says little."""
        if not info.skipped:
            self._loss = info.loss if self._loss == 0.0 else 0.9 * self._loss + 0.1 * info.loss
        if time.monotonic() - self._drawn < 1 / REFRESH and 1 < progress.step < self._steps:
            return
        self._drawn = time.monotonic()
        live, peak = self._memory()
        parts = [f"{progress.step}/{self._steps}", f"loss {self._loss:.4f}"]
        if info.slope is not None:
            parts.append(f"slope {info.slope:.2g}")
        speed = f"{progress.step / max(progress.seconds, 1e-9):.1f}/s"
        parts += [f"lr {info.lr:.1e}", self._rates(progress) if self._rates else speed]
        parts.append(f"{size(live)}, at most {size(peak)}")
        if progress.skipped:
            parts.append(f"skipped {progress.skipped}")
        self._bar.update(self._task, completed=progress.step, text=" ".join(parts))
        if not self._console.is_terminal and time.monotonic() - self._said > SECONDS:
            self._said = time.monotonic()
            self._console.print(f"step {' '.join(parts)}", markup=False)

    def evaluated(self, progress: "Counters", metrics: Mapping[str, float]) -> None:
        """Print the metrics, and whether they are the best so far."""
        self._said = time.monotonic()
        star = " (best so far)" if progress.best_step == progress.step else ""
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if self._rates and progress.step:  # a log has no progress line
            text += f"  {self._rates(progress)}, memory at most {size(self._memory()[1])}"
        self._console.print(f"step {progress.step}, {self._rows} rows: {text}{star}")

    def noted(self, text: str) -> None:
        """Print a note."""
        self._console.print(text, markup=False)


@contextmanager
def watching(
    shown: Console, memory: Any, step: int, steps: int, rates: Any = None, rows: str = "held-out"
) -> Iterator[Screen]:
    """A screen with its progress line.

    Args:
        memory: function giving live and peak bytes.
        step, steps: where the run stands and where it ends.
        rates: function of the counters giving a run's speed in words; None shows steps a second.
        rows: what evaluations are measured on.
    """
    columns = (
        BarColumn(bar_width=8),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )  # 80 characters
    # Drawn by a thread only where somebody looks: logs get the evaluations and not thousands of lines
    bar = Progress(
        *columns,
        console=shown,
        refresh_per_second=REFRESH,
        transient=True,
        disable=shown.quiet or not shown.is_terminal,
    )
    with bar:
        screen = Screen(shown, bar, memory, rates, rows)
        screen.begin(step, steps)
        yield screen
