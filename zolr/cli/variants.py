"""One word for a method with its paradigm and its own settings: `stiefel:fo@rank=8@lr=1e-3`, as several verbs take it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from zolr.cli.config import nearest, resolve
from zolr.errors import UsageError


def methods_in(parts: Sequence[str]) -> list[str]:
    """The methods of a flag, one a word, of parts that each may hold several.

    What has a `=` before any `@` names no method: it is the rest of a value with a comma in it.

    >>> methods_in(["adamw, stiefel:fo@ranks=q_proj=16,up_proj=8@lr=1e-3,", "mezo"])
    ['adamw', 'stiefel:fo@ranks=q_proj=16,up_proj=8@lr=1e-3', 'mezo']
    >>> methods_in([",lr=1"])
    ['lr=1']
    """
    words: list[str] = []
    for part in parts:
        for place, piece in enumerate(part.split(",")):
            if place and words and "=" in piece.partition("@")[0]:
                words[-1] += f",{piece.strip()}"
            elif piece.strip():
                words.append(piece.strip())
    return words


def variant(word: str, flag: str = "--methods") -> tuple[str, dict[str, Any]]:
    """The full name and the settings of `stiefel:fo@lr=1e-3`, checked.

    Args:
        word: `NAME[:PARADIGM][@SETTING=VALUE]...`, settings spelled as those of `zolr finetune`, or `PART.NAME` as for
            its `--set`.
        flag: where the word was given, for errors.

    Returns:
        The word with its paradigm, and the settings of `Finetune` that it gives.

    Raises:
        UsageError: an unknown method, paradigm or setting, one that is no matter of a method, or a value out of range.
    """
    from zolr.cli.choices import Writing
    from zolr.cli.finetune import Finetune
    from zolr.methods import METHODS

    head, *more = word.split("@")
    name, _, paradigm = head.partition(":")
    if name not in METHODS:
        raise UsageError(f"{flag}: method '{name}' is not known; {nearest(name, list(METHODS))}")
    METHODS[name].build(paradigm or None)
    own: dict[str, Any] = {}
    for part in more:
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{flag}: '{part}' in '{word}' is no setting; write it as @lr=1e-3")
        field = key.replace("-", "_")
        if field in ("method", "paradigm"):
            right = f"{name}:{value}" if field == "paradigm" else value
            raise UsageError(f"{flag}: '{part}' in '{word}' comes first in such a word; write {right}")
        if field in {f.name for f in fields(Writing)}:
            raise UsageError(
                f"{flag}: '{key}' in '{word}': where and how often a run is written is the same for all of them; leave it out"
            )
        if "." in key or key == "set":
            own["set"] = (*own.get("set", ()), value if key == "set" else part)
            continue
        try:
            own[field] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            own[field] = value  # words need no quotes
    checked = resolve(Finetune, own)
    own = {key: getattr(checked, key) for key in own}
    paradigm = paradigm or METHODS[name].paradigms[0]
    return "@".join([f"{name}:{paradigm}", *more]), {**own, "method": name, "paradigm": paradigm}
