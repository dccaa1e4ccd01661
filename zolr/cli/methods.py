"""`zolr methods`: the table of methods, or one of them in full."""

import json
from dataclasses import dataclass, fields
from typing import Any

import typer

from zolr.cli.config import Settings, add, flag, nearest
from zolr.errors import UsageError


@dataclass(frozen=True)
class Methods(Settings):
    """Settings of `zolr methods`."""

    name: str | None = flag(
        None, "One method to show in full; all of them without it.", "Method", argument=True
    )
    json: bool = flag(False, "Print JSON.", "Output", saved=False)


def run(settings: Methods) -> None:
    """The methods of the literature that zolr knows, and what each is made of."""
    from rich.console import Console

    from zolr.methods import METHODS

    if settings.name is not None and settings.name not in METHODS:
        raise UsageError(f"method '{settings.name}' is not known; {nearest(settings.name, list(METHODS))}")
    if settings.json:
        shown = [_described(row) for name, row in METHODS.items() if settings.name in (None, name)]
        print(json.dumps(shown if settings.name is None else shown[0], indent=2))
        return
    from zolr.cli.screen import table

    console = Console(highlight=False)
    if settings.name is None:
        rows = [(name, ", ".join(row.paradigms), row.summary) for name, row in METHODS.items()]
        made = table("methods", ("name", "paradigms", "what it does"), rows)
        for column in made.columns[:2]:
            column.no_wrap = True
        console.print(made)
        console.print("`zolr methods NAME` shows one in full; `zolr finetune --method NAME` runs it.")
        return
    described = _described(METHODS[settings.name])
    compositions = described.pop("composition")
    lines = [
        (key, ", ".join(value) if isinstance(value, list) else value)
        for key, value in described.items()
        if value
    ]
    for paradigm, parts in compositions.items():
        lines += [
            (f"{paradigm}: {part}", _in_words(made)) for part, made in parts.items() if not _is_empty(made)
        ]
    console.print(table(settings.name, ("", ""), lines))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "methods", Methods, run, config=False)


def _described(row: Any) -> dict[str, Any]:
    """A row of the table as JSON."""
    texts = {
        key: getattr(row, key) for key in ("name", "summary", "equation", "follows", "reference", "limits")
    }
    from zolr.cli.rates import rate_of

    rate = rate_of(row.name)
    return {
        **texts,
        "paradigms": list(row.paradigms),
        "fine-tuning": "; ".join(f"{paradigm}: {_rate_of(row, paradigm)}" for paradigm in row.paradigms),
        "pretraining": f"learning rate {rate.lr:g} by backprop ({rate.why})" if "fo" in row.paradigms else "",
        **({"adapter": _parts(row.adapter)} if row.adapter else {}),
        "composition": {p: _parts(row.build(p)) for p in row.paradigms},
    }


def _rate_of(row: Any, paradigm: str) -> str:
    """What a method is fine-tuned at where the user gives no rate."""
    from zolr.cli.workload import REFERENCE_WIDTH

    rate = row.lr.get(paradigm)
    if rate is None:
        return "learning rate measured on the first batch"
    if paradigm == "fo" and row.methods[paradigm].normalizes:
        return f"learning rate {rate:g} for a model of width {REFERENCE_WIDTH}, going with one over the width"
    return f"learning rate {rate:g}"


def _is_empty(value: Any) -> bool:
    return value is None or value in ({}, [], "")


def _parts(method: Any) -> dict[str, Any]:
    """What a method is made of: every part with its hyper-parameters."""
    return {field.name: _plain(getattr(method, field.name)) for field in fields(method)}


def _plain(part: Any) -> Any:
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    if isinstance(part, dict):
        return {str(key): _plain(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_plain(value) for value in part]
    if hasattr(part, "__dataclass_fields__"):
        return {"part": type(part).__name__, **{f.name: _plain(getattr(part, f.name)) for f in fields(part)}}
    return str(part)


def _in_words(part: Any) -> str:
    """`Stiefel(rank 8, side right)`."""
    if isinstance(part, dict):
        inner = ", ".join(
            f"{key} {_in_words(value)}"
            for key, value in part.items()
            if key != "part" and not _is_empty(value)
        )
        return f"{part['part']}({inner})" if "part" in part else inner
    if isinstance(part, list):
        return ", ".join(map(_in_words, part))
    return str(part)
