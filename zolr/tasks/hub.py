"""Public data sets by their name on the Hugging Face hub, for when there is no local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zolr.errors import DataError, cause_of
from zolr.hub import offline_if_silent
from zolr.tasks.examples import Example, nearest


@dataclass(frozen=True)
class Hub:
    """Where a task lies on the hub, and how its columns and labels are called there.

    Args:
        id: repository of the data set.
        columns: its text columns, in the order of the task's columns.
        label: its label column.
        labels: from the label on the hub to our class name. The label is the *name* where the hub knows one
            (so that no order has to be trusted), else the stored value as text. Letter case does not count.
        splits: from our split ("train", "dev", "test") to the name on the hub; only splits that have labels.
        config: name of the configuration, where there are several.
        revision: branch, where the default one cannot be read any more.
    """

    id: str
    columns: tuple[str, ...]
    label: str
    labels: Mapping[str, str]
    splits: Mapping[str, str]
    config: str | None = None
    revision: str | None = None


def load_hub(hub: Hub, classes: Sequence[str]) -> dict[str, list[Example]]:
    """The splits of a data set of the hub; rows without a label (-1) are left out.

    Raises:
        DataError: the data set cannot be fetched, or is not what `hub` says.
    """
    import datasets

    name = f"data set {hub.id!r}" + (f" ({hub.config})" if hub.config else "")
    splits: dict[str, list[Example]] = {}
    for split, there in hub.splits.items():
        try:
            with offline_if_silent():
                rows: Any = datasets.load_dataset(hub.id, hub.config, split=there, revision=hub.revision)
        except (
            Exception
        ) as error:  # whatever the client, the network or the parser raises, the way out is the same
            cause = cause_of(error, 200) or type(error).__name__
            raise DataError(
                f"{name} cannot be loaded from the hub ({cause}); "
                "without a network, give --data-dir a folder with "
                "train.tsv, dev.tsv, test.tsv and meta.json, or set ZOLR_DATA to a folder that has it under "
                "tasks/"
            ) from error
        for column in (*hub.columns, hub.label):
            if column not in rows.column_names:
                raise DataError(
                    f"{name} has no column {column!r} any more; {nearest(column, rows.column_names)}"
                )
        known = getattr(rows.features[hub.label], "names", None)
        by_label = {key.lower(): list(classes).index(ours) for key, ours in hub.labels.items()}
        examples = splits[split] = []
        for number, row in enumerate(rows, 1):
            value = row[hub.label]
            if value == -1 or value is None:
                continue
            key = (known[value] if known else str(value)).lower()
            if key not in by_label:
                raise DataError(
                    f"{name}, {there} row {number}: the label {key!r} is not expected; "
                    f"{nearest(key, by_label)}"
                )
            examples.append(Example(tuple(str(row[column]) for column in hub.columns), by_label[key]))
    return splits
