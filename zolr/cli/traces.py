"""Runs as their folders tell of them: settings, and the lines of `metrics.jsonl` by kind; and names that tell them apart."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from zolr.cli import runs
from zolr.errors import DataError

AXES = {
    "tokens": ("tokens_seen", "tokens of the batches"),
    "seconds": ("seconds", "seconds of steps"),
    "steps": ("step", "steps"),
    "forwards": ("forwards", "forward passes (a backward counts as two)"),
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
        if number(line.get(key, 0)) is None:
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


def number(value: Any) -> float | None:
    """A number that can be drawn; what is not finite is a word in the file."""
    return float(value) if isinstance(value, (int, float)) and isfinite(value) else None
