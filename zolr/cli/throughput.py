"""What a run gets out of a machine: tokens a second, floating-point operations against the peak of the device, evenness of steps."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import device, nn

    from zolr.engine import Info
    from zolr.training import Progress, Reporter

# Products of dense 16-bit matrices a second, accumulated in float32, as the makers state them without sparsity. The first
# name that a device's own contains counts, so longer names come first.
PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
}


def flops_of_a_forward(model: nn.Module, length: int) -> int:
    """Floating-point operations that a forward pass needs for one token: `2 N + 4 L d T`.

    `N` counts the entries of all matrices that a token is multiplied with: every one but embeddings that are only looked up.
    `4 L d T` are the two products of attention of each of `L` layers of width `d` over all `T` positions of a row, as if none
    were masked. A backward pass needs twice as many, so a token that is trained on costs `6 N + 12 L d T`; what
    checkpointing computes again does not count.

    Args:
        length: positions of a row.

    Reference: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    from torch import nn

    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and hasattr(output, "weight"):
        looked_up.discard(id(output.weight))  # a tied head multiplies
    entries = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in looked_up)
    return 2 * entries + 4 * config.num_hidden_layers * config.hidden_size * length


def peak_flops(on: device, low: bool, given: float | None = None) -> float | None:
    """Operations a second that a device can do at most; None where nobody has said.

    Args:
        on: the device.
        low: whether matrices are multiplied in 16 bits, which is what is known of devices.
        given: what the user says; it counts.
    """
    if given is not None or on.type != "cuda" or not low:
        return given
    import torch

    name = torch.cuda.get_device_name(on)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Throughput:
    """Speed of a run, from the counters of its progress and the seconds of single steps.

    Steps whose memory was counted, and the first one of a session, which makes state and warms caches up, say nothing
    about the others and are left out of `steps`.

    Args:
        flops: operations of a forward pass for one token (see `flops_of_a_forward`).
        peak: operations a second that the device can do at most; None if not known.
    """

    def __init__(self, flops: int, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self._from: tuple[float, int, int] | None = None  # seconds, tokens seen, tokens through forwards
        self._first: int | None = None
        self._steps, self._seconds, self._refreshed = array("q"), array("d"), array("b")

    def stepped(self, progress: Progress, seconds: float, refreshed: bool, counted: bool) -> None:
        """One step is done.

        Args:
            seconds: that it took.
            refreshed: whether it drew new subspaces.
            counted: whether its memory was counted meanwhile, which slows it down.
        """
        if self._first is None or counted:
            self._first = progress.step if self._first is None else self._first
            return
        self._steps.append(progress.step)
        self._seconds.append(seconds)
        self._refreshed.append(refreshed)

    def rates(self, progress: Progress) -> dict[str, float]:
        """Tokens and model operations a second since this was first asked, and the share of the peak where that is known."""
        now = (progress.seconds, progress.tokens_seen, progress.tokens)
        if self._from is None:
            self._from = now
        begun = self._from if now[0] > self._from[0] else (0.0, 0, 0)
        seconds = max(now[0] - begun[0], 1e-9)
        found = {
            "tokens_per_second": (now[1] - begun[1]) / seconds,
            "flops_per_second": (now[2] - begun[2]) * self._flops / seconds,
        }
        if self._peak:
            found["mfu"] = found["flops_per_second"] / self._peak
        return found

    def line(self, progress: Progress) -> str:
        """The rates for a person."""
        found = self.rates(progress)
        shown = f"{found['tokens_per_second']:,.0f} tok/s "
        if "mfu" in found:
            return shown + f"MFU {found['mfu']:.1%}"
        return shown + f"{found['flops_per_second'] / 1e12:.3g} TFLOP/s"

    def steps(self) -> dict[str, Any]:
        """Seconds of steps: median, worst and which one it was, and the median of those that drew new subspaces."""
        if not self._seconds:
            return {"timed": 0}
        median, worst = statistics.median(self._seconds), max(self._seconds)
        at_refresh = [s for s, new in zip(self._seconds, self._refreshed, strict=True) if new]
        return {
            "timed": len(self._seconds),
            "median": round(median, 6),
            "worst": round(worst, 6),
            "worst_step": self._steps[self._seconds.index(worst)],
            "worst_over_median": round(worst / median, 3),
            "at_refresh": round(statistics.median(at_refresh), 6) if at_refresh else None,
        }


class Timed:
    """A reporter that times steps, and hands everything on to another one."""

    def __init__(self, to: Reporter, speed: Throughput, counting: Callable[[], bool]) -> None:
        self._to, self._speed, self._counting, self._seconds = to, speed, counting, 0.0

    def stepped(self, progress: Progress, info: Info) -> None:
        """One optimizer step is done; the first one of a session, whose time is not known here, is not timed."""
        seconds, self._seconds = progress.seconds - self._seconds, progress.seconds
        self._speed.stepped(progress, seconds, info.refreshed, self._counting())
        self._to.stepped(progress, info)

    def evaluated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """One evaluation is done."""
        self._to.evaluated(progress, metrics)

    def noted(self, text: str) -> None:
        """Something a person should know."""
        self._to.noted(text)
