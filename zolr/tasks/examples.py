"""What a data set is once it is read: labeled examples in three splits that share no text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

UNLABELED = -1  # the label of a text that is only to be predicted


class Example(NamedTuple):
    """One row: its texts in the order of the columns, and the index of its class.

    A named tuple, because a data set holds many of them.
    """

    texts: tuple[str, ...]
    label: int = UNLABELED


@dataclass(frozen=True)
class Splits:
    """Train, validation and test examples of one task; no text of `train` is in another split.

    Args:
        name: the task, or the name of the file the examples come from.
        columns: names of the texts, as a template calls them.
        classes: class names in index order.
        train: examples to train on.
        validation: examples to choose the best step on.
        test: examples to report on.
        source: where the examples come from, for people.
        removed: training rows left out because their texts are also held out.
    """

    name: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    source: str = ""
    removed: int = 0


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, then all that are known.

    >>> nearest("sts2", ["sst2", "rte"])
    "did you mean 'sst2'? known: sst2, rte"
    """
    names = [str(k) for k in known]
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    listed = f"known: {', '.join(names) or 'none'}"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def without(examples: list[Example], *held_out: list[Example]) -> list[Example]:
    """The examples whose texts are in none of the held-out lists."""
    texts = {example.texts for held in held_out for example in held}
    return [example for example in examples if example.texts not in texts]
