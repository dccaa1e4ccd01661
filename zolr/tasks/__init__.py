"""What a model is trained on: tasks, prompts, splits and own files.

`TASKS` is the table of tasks known by name; `load_splits` reads one of them, or own files, into train,
validation and test examples. `streams` has the token streams of pretraining.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from zolr.errors import DataError, UsageError
from zolr.tasks.batches import (
    Encoded,
    TrainingBatches,
    collate,
    evaluation_batches,
    truncation_share,
)
from zolr.tasks.examples import UNLABELED, Example, Splits, nearest, without
from zolr.tasks.fewshot import cap, cut, few_shot, hold_out
from zolr.tasks.files import load_file, load_folder, read_texts
from zolr.tasks.hub import Hub, load_hub
from zolr.tasks.prompts import ClassInput, Prompt, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TASKS",
    "UNLABELED",
    "ClassInput",
    "Encoded",
    "Example",
    "Hub",
    "Prompt",
    "Splits",
    "Task",
    "TrainingBatches",
    "collate",
    "evaluation_batches",
    "find_task",
    "load_file",
    "load_splits",
    "own_task",
    "pad_id",
    "read_texts",
    "truncation_share",
]


@dataclass(frozen=True)
class Task:
    """A classification task: its texts, its classes, and how it is put to a language model.

    Args:
        name: how it is called on the command line.
        summary: one line for people.
        columns: names of its texts, which are the fields of the templates.
        classes: class names in index order.
        words: one label word for each class, in the same order.
        template: prompt for masked models.
        causal_template: prompt for causal models; ends with `{mask}`.
        max_length: tokens of a prompt at most.
        cuts: tokens at most for each text; empty for no limits.
        folder: its folder under a data folder.
        hub: where it lies on the hub; None for the set that comes with the package.
        metric: "accuracy" or "matthews".
    """

    name: str
    summary: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    words: tuple[str, ...]
    template: str
    causal_template: str
    max_length: int = 128
    cuts: tuple[int | None, ...] = ()
    folder: str = ""
    hub: Hub | None = None
    metric: str = "accuracy"

    def prompt(
        self, tokenizer: PreTrainedTokenizerBase, masked: bool, max_length: int | None = None
    ) -> Prompt:
        """The task's prompt for a tokenizer; `max_length` can shorten it to what a model takes."""
        template = self.template if masked else self.causal_template
        length = min(self.max_length, max_length or self.max_length)
        return Prompt(template, self.words, tokenizer, masked, length, self.cuts, self.columns)

    def class_input(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> ClassInput:
        """The task's texts for a classification head."""
        return ClassInput(
            tokenizer, min(self.max_length, max_length or self.max_length), self.cuts, self.columns
        )

    def changed(
        self,
        template: str | None = None,
        words: Sequence[str] | None = None,
        max_length: int | None = None,
        cuts: Sequence[int | None] | None = None,
    ) -> Task:
        """The task with another template (for masked and causal models alike), words or limits.

        Raises:
            UsageError: a number of words that is not the number of classes.
        """
        task = self
        if template is not None:
            task = replace(task, template=template, causal_template=template)
        if words is not None:
            if len(words) != len(self.classes):
                raise UsageError(
                    f"{len(words)} label words ({', '.join(words)}) for {len(self.classes)} classes "
                    f"({', '.join(self.classes)}); give one for each, in this order"
                )
            task = replace(task, words=tuple(words))
        if max_length is not None:
            task = replace(task, max_length=max_length)
        return task if cuts is None else replace(task, cuts=tuple(cuts))


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_PAIR = ("sentence1", "sentence2")
_SENTIMENT = {
    "columns": ("sentence",),
    "classes": ("negative", "positive"),
    "words": ("terrible", "great"),
    "template": "{sentence} It was {mask}.",
    "causal_template": "{sentence} It was {mask}",
}
_ENTAILMENT = {
    "columns": _PAIR,
    "template": "{sentence1:drop-last}? {mask}, {sentence2:lower-first}",
    "max_length": 256,
}
_NLI = _ENTAILMENT | {
    "classes": ("entailment", "neutral", "contradiction"),
    "words": ("Yes", "Maybe", "No"),
    "causal_template": "{sentence1} Question: {sentence2:strip-end}? Yes, no, or maybe? Answer: {mask}",
}
_NLI_LABELS = _same("entailment", "neutral", "contradiction")
_SENTIMENT_LABELS = _same("negative", "positive")

# templates, words and limits of the first six, and of mr, cr, subj and cola, are those of the published
# prompts; their causal templates, and all of agnews, boolq and questions, are ours
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            summary="movie reviews, negative or positive",
            **_SENTIMENT,
            folder="sst2",
            hub=Hub(
                "nyu-mll/glue",
                ("sentence",),
                "label",
                _SENTIMENT_LABELS,
                {"train": "train", "dev": "validation"},
                config="sst2",
            ),
        ),
        Task(
            name="sst5",
            summary="movie reviews on a scale of five",
            columns=("sentence",),
            classes=("terrible", "bad", "okay", "good", "great"),
            words=("terrible", "bad", "okay", "good", "great"),
            template="{sentence} It was {mask}.",
            causal_template="{sentence} It was {mask}",
            cuts=(110,),
            folder="sst5",
            hub=Hub(
                "SetFit/sst5",
                ("text",),
                "label_text",
                {
                    "very negative": "terrible",
                    "negative": "bad",
                    "neutral": "okay",
                    "positive": "good",
                    "very positive": "great",
                },
                {"train": "train", "dev": "validation", "test": "test"},
            ),
        ),
        Task(
            name="snli",
            summary="does a caption follow from another, contradict it, or neither",
            **_NLI,
            folder="snli",
            hub=Hub(
                "stanfordnlp/snli",
                ("premise", "hypothesis"),
                "label",
                _NLI_LABELS,
                {"train": "train", "dev": "validation", "test": "test"},
            ),
        ),
        Task(
            name="mnli",
            summary="does a sentence of mixed genres follow from another, contradict it, or neither",
            **_NLI,
            cuts=(240, None),
            folder="mnli_m",
            hub=Hub(
                "nyu-mll/glue",
                ("premise", "hypothesis"),
                "label",
                _NLI_LABELS,
                {"train": "train", "dev": "validation_matched"},
                config="mnli",
            ),
        ),
        Task(
            name="rte",
            summary="does a sentence follow from a news text",
            **_ENTAILMENT,
            classes=("entailment", "not_entailment"),
            words=("Yes", "No"),
            causal_template="{sentence1} Question: {sentence2:strip-end}? Yes or no? Answer: {mask}",
            cuts=(240, None),
            folder="rte",
            hub=Hub(
                "nyu-mll/glue",
                _PAIR,
                "label",
                _same("entailment", "not_entailment"),
                {"train": "train", "dev": "validation"},
                config="rte",
            ),
        ),
        Task(
            name="trec",
            summary="what a question asks for, six kinds",
            columns=("sentence",),
            classes=("DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC"),
            words=("Description", "Entity", "Expression", "Human", "Number", "Location"),
            template="{mask}: {sentence}",
            causal_template="{sentence} Category: {mask}",
            cuts=(110,),
            folder="trec6",
            hub=Hub(
                "CogComp/trec",
                ("text",),
                "coarse_label",
                _same("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
                {"train": "train", "test": "test"},
                revision="refs/convert/parquet",  # its main branch is a loading script, which no longer runs
            ),
        ),
        Task(
            name="mr",
            summary="movie reviews, negative or positive (Pang and Lee)",
            **_SENTIMENT,
            cuts=(110,),
            folder="mr",
            hub=Hub(
                "cornell-movie-review-data/rotten_tomatoes",
                ("text",),
                "label",
                {"neg": "negative", "pos": "positive"},
                {"train": "train", "dev": "validation", "test": "test"},
            ),
        ),
        Task(
            name="cr",
            summary="customer reviews, negative or positive",
            **_SENTIMENT,
            cuts=(110,),
            folder="cr",
            hub=Hub(
                "SetFit/SentEval-CR",
                ("text",),
                "label_text",
                _SENTIMENT_LABELS,
                {"train": "train", "test": "test"},
            ),
        ),
        Task(
            name="subj",
            summary="subjective or objective sentences on movies",
            columns=("sentence",),
            classes=("subjective", "objective"),
            words=("subjective", "objective"),
            template="{sentence} This is {mask}.",
            causal_template="{sentence} This is {mask}",
            cuts=(110,),
            folder="subj",
            hub=Hub(
                "SetFit/subj",
                ("text",),
                "label_text",
                _same("subjective", "objective"),
                {"train": "train", "test": "test"},
            ),
        ),
        Task(
            name="agnews",
            summary="news by topic, four kinds",
            columns=("sentence",),
            classes=("World", "Sports", "Business", "Sci/Tech"),
            words=("World", "Sports", "Business", "Technology"),
            template="{mask} News: {sentence}",
            causal_template="{sentence} Topic: {mask}",
            folder="agnews",
            hub=Hub(
                "fancyzhx/ag_news",
                ("text",),
                "label",
                _same("World", "Sports", "Business", "Sci/Tech"),
                {"train": "train", "test": "test"},
            ),
        ),
        Task(
            name="boolq",
            summary="yes-or-no questions on a passage",
            columns=_PAIR,  # question, passage
            classes=("no", "yes"),
            words=("No", "Yes"),
            template="{sentence2} Question: {sentence1:strip-end}? Answer: {mask}.",
            causal_template="{sentence2} Question: {sentence1:strip-end}? Answer: {mask}",
            max_length=256,
            folder="boolq",
            hub=Hub(
                "google/boolq",
                ("question", "passage"),
                "answer",
                {"False": "no", "True": "yes"},
                {"train": "train", "dev": "validation"},
            ),
        ),
        Task(
            name="cola",
            summary="is a sentence acceptable English",
            columns=("sentence",),
            classes=("unacceptable", "acceptable"),
            words=("incorrect", "correct"),
            template="{sentence} This is {mask}.",
            causal_template="{sentence} This is {mask}",
            folder="cola",
            hub=Hub(
                "nyu-mll/glue",
                ("sentence",),
                "label",
                _same("unacceptable", "acceptable"),
                {"train": "train", "dev": "validation"},
                config="cola",
            ),
            metric="matthews",
        ),
        Task(
            name="questions",
            summary="what a question asks for, six kinds; comes with the package",
            columns=("question",),
            classes=("person", "place", "number", "time", "thing", "reason"),
            words=("person", "place", "number", "time", "thing", "reason"),
            template="{question} The answer is a {mask}.",
            causal_template="{question} {mask}",
            max_length=64,
            folder="questions",
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UsageError: there is none; the error names the nearest.
    """
    if name not in TASKS:
        raise UsageError(f"task {name!r} is not known; {nearest(name, TASKS)}")
    return TASKS[name]


def own_task(name: str, columns: Sequence[str], classes: Sequence[str]) -> Task:
    """A task for own files: the class names are the label words, unless `Task.changed` sets others.

    Raises:
        UsageError: a column whose name a template cannot hold.
    """
    for column in columns:
        if set(column) & set("{}:") or column == "mask" or column != column.strip():
            raise UsageError(
                f"column {column!r} cannot be a field of a template; rename it, without braces or colons"
            )
    texts = " ".join(f"{{{column}}}" for column in columns)
    return Task(
        name=name,
        summary="own data",
        columns=tuple(columns),
        classes=tuple(classes),
        words=tuple(classes),
        template=f"{texts} This is {{mask}}.",
        causal_template=f"{texts} This is {{mask}}",
        max_length=128 if len(columns) == 1 else 256,
    )


def folder_of(task: Task, data_dir: str | Path | None) -> Path | None:
    """Where the files of a published task lie; None where there are none, or the package or the hub has them.

    Args:
        data_dir: the folder that was given; None for that of ZOLR_DATA.
    """
    shared = os.environ.get("ZOLR_DATA")
    folders: tuple[Path, ...] = ()
    if data_dir is not None:
        root = Path(data_dir)
        folders = (root, root / task.folder, root / task.name, root / "tasks" / task.folder)
    elif task.hub is not None and shared:
        folders = (Path(shared) / "tasks" / task.folder,)
    return next((folder for folder in folders if (folder / "train.tsv").is_file()), None)


def _official(task: Task, data_dir: str | Path | None) -> tuple[dict[str, list[Example]], str]:
    """The labeled splits of a task as they are published, and where they come from."""
    folder = folder_of(task, data_dir)
    if folder is not None:
        return load_folder(folder, task.columns, task.classes), str(folder)
    if data_dir is not None:
        raise DataError(
            f"{Path(data_dir)}: there is no train.tsv of task {task.name!r} in it; "
            f"give the folder that holds train.tsv, or the one above it with {task.folder}/train.tsv"
        )
    if task.hub is None:
        folder = Path(__file__).parent.parent / "demo" / task.folder
        return load_folder(folder, task.columns, task.classes), "the package"
    config = f" ({task.hub.config})" if task.hub.config else ""
    return load_hub(task.hub, task.classes), f"the hub: {task.hub.id}{config}"


def _own(
    task: Task | None,
    data: str | Path,
    validation_data: str | Path | None,
    test_data: str | Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    classes: Sequence[str] | None,
) -> tuple[dict[str, list[Example]], tuple[str, ...], tuple[str, ...]]:
    """The splits there are files for, the names of the texts, and the classes."""
    columns = tuple(text_columns or (task.columns if task else ("text",)))
    label = label_column or "label"
    if task and classes is not None:
        raise UsageError(
            f"task {task.name!r} has its classes ({', '.join(task.classes)}); give no others, or no task"
        )
    if task and len(columns) != len(task.columns):
        raise UsageError(
            f"task {task.name!r} has {len(task.columns)} texts ({', '.join(task.columns)}), "
            f"but the text columns are {', '.join(columns)}; name as many"
        )
    wanted = task.classes if task else classes
    train, found = load_file(data, columns, label, wanted)
    # integers stand for places in a list of classes only where somebody wrote that list
    order = None if wanted is not None else ()
    parts = {"train": train}
    for split, path in (("dev", validation_data), ("test", test_data)):
        if path is not None:
            parts[split] = load_file(path, columns, label, found, order)[0]
    return parts, task.columns if task else columns, found


def _rest(source: str, rows: list[Example], taken: dict[str, list[Example]]) -> list[Example]:
    """The rows that are in none of the splits `taken`.

    Raises:
        DataError: there is none.
    """
    pool = without(rows, *taken.values())
    if not pool:
        raise DataError(
            f"{source}: every row of it is a {' or a '.join(taken)} row too; give different files for them"
        )
    return pool


def load_splits(
    task: str | Task | None = None,
    *,
    data_dir: str | Path | None = None,
    data: str | Path | None = None,
    validation_data: str | Path | None = None,
    test_data: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    k: int | None = None,
    seed: int = 0,
    train_rows: int | None = None,
    validation_rows: int | None = 1000,
    test_rows: int | None = 1000,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> Splits:
    """The train, validation and test examples of a task or of own files; the splits share no text.

    The test set is the official test split, else the official dev split. With `k`, training and validation
    are k examples a class each out of the training split. Without, validation is the dev split, or a share of
    the training split where dev is the test set or missing. Own files are treated alike; one file alone gives
    all three.

    Args:
        task: a name of `TASKS`, a `Task`, or None for own files with classes of their own.
        data_dir: local folder of the task; by default $ZOLR_DATA/tasks/NAME where it exists, else the hub.
        data: own file to train on, instead of the task's data.
        validation_data: own file to validate on.
        test_data: own file to test on.
        text_columns: text columns of own files; by default the task's, or "text".
        label_column: label column of own files; by default "label".
        classes: class names of own files in index order; by default the task's, or those found in `data`.
        k: training examples a class, and validation examples a class.
        seed: names every draw but the cut of the test set.
        train_rows: training rows at most, classes in proportion; not together with `k`.
        validation_rows: validation rows at most, or None for all; `k` does not heed it.
        test_rows: test rows at most, or None for all; cut with seed 42 as in the published protocol.
        validation_share: share of the training rows to validate on where no split is there for it.
        test_share: share of the rows of an own file to test on where no file is given for it.

    Raises:
        UsageError: settings that contradict each other, or an unknown task.
        DataError: data that cannot be used.
    """
    if k is not None and train_rows is not None:
        raise UsageError(
            f"k = {k} and train_rows = {train_rows} both limit the training rows; give one of them"
        )
    known = find_task(task) if isinstance(task, str) else task
    if data is not None:
        if data_dir is not None:
            raise UsageError(
                f"data = {str(data)!r} is read instead of the task's files in data_dir = {str(data_dir)!r}; give one of them"
            )
        parts, columns, found = _own(
            known, data, validation_data, test_data, text_columns, label_column, classes
        )
        name, source = (known.name if known else Path(data).name), str(data)
        removed = 0
        if "test" not in parts:
            pool = _rest(source, parts["train"], {"validation": parts["dev"]} if "dev" in parts else {})
            removed = len(parts["train"]) - len(pool)
            parts["train"], parts["test"] = hold_out(pool, test_share, seed, found, "testing")
        test, dev = cut(parts["test"], test_rows, seed), parts.get("dev")
    else:
        given = {"validation_data": validation_data, "test_data": test_data, "text_columns": text_columns}
        given |= {"label_column": label_column, "classes": classes}
        extra = [setting for setting, value in given.items() if value is not None]
        if extra:
            raise UsageError(f"{extra[0]} is about own files; give the file to train on as data")
        if known is None:
            raise UsageError(
                f"nothing to train on; give a task ({', '.join(TASKS)}) or a file of your own as data"
            )
        parts, source = _official(known, data_dir)
        name, columns, found, removed = known.name, known.columns, known.classes, 0
        if len(parts) < 2:
            raise DataError(f"{source}: there is neither a dev nor a test split; add test.tsv")
        # as published: dev is the test set where the labels of test are not public, and k-shot runs validate
        # on training rows
        test = cut(parts["test"] if "test" in parts else parts["dev"], test_rows)
        dev = parts.get("dev") if "test" in parts and k is None else None
    rows = parts["train"]
    if dev is not None:
        if not (dev := without(dev, test)):
            raise DataError(
                f"{source}: every validation row is a test row too; give different files for the two"
            )
    pool = _rest(source, rows, {"test": test} if dev is None else {"test": test, "validation": dev})
    if dev is not None:
        removed += len(rows) - len(pool)
        train, validation = pool, cut(dev, validation_rows, seed)
        if k is not None:
            train, _ = few_shot(pool, k, seed, found, validate=False)
    elif k is not None:
        train, validation = few_shot(rows, k, seed, found, held_out=test)
    else:
        removed += len(rows) - len(pool)
        train, dev = hold_out(pool, validation_share, seed, found, "validation")
        validation = cut(dev, validation_rows, seed)
    if train_rows is not None:
        train = cap(train, train_rows, seed, found)
    missing = [name for i, name in enumerate(found) if not any(example.label == i for example in train)]
    if missing:
        raise DataError(
            f"{source}: no training row is of class {missing[0]!r}; add some, or leave that class out"
        )
    return Splits(name, columns, found, train, validation, test, source, removed)
