"""What the verbs work on: examples of a task, and a model that reads them by a prompt or by a classification head."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from zolr.cli import note
from zolr.cli.config import Settings, flag, nearest, spelled
from zolr.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from zolr.distributed import Team
    from zolr.methods import Adapter, Method
    from zolr.tasks import ClassInput, Encoded, Example, Prompt, Splits, Task

DEMO_TASK = "questions"  # the task that comes with the package, as the demo model does

REFERENCE_WIDTH = 768  # of the model that default rates of backprop are stated for

EVAL_ROWS = 500

SLOW_VMAP = "There is a performance drop"  # torch, of masks that a prediction makes on tensors without data

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Trust(Settings):
    """Whose code may run."""

    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.", "Model")


@dataclass(frozen=True)
class ModelChoice(Trust):
    """Which model."""

    model: str = flag(
        "demo",
        "Folder, hub name, preset with random weights, or the demo model of the package.",
        "Model",
        aliases=("model_name_or_path",),
        path=True,
    )


@dataclass(frozen=True)
class DataChoice(Settings):
    """Which examples, and how a model reads them."""

    head: Literal["prompt", "classes"] = flag(
        "prompt", "Predict a label word in a prompt, or train a fresh classification head (classes).", "Model"
    )
    task: str | None = flag(
        None, "Task by name, such as sst2, trec or questions.", "Data", shown="questions with the demo model"
    )
    data: str | None = flag(
        None, "Own file with texts and labels: csv, tsv, json, jsonl or parquet.", "Data", path=True
    )
    data_dir: str | None = flag(
        None, "Folder with the task's train.tsv, dev.tsv and test.tsv.", "Data", path=True
    )
    text_column: tuple[str, ...] = flag(
        (), "Column with the text; twice for pairs.", "Data", shown="text, or the task's"
    )
    label_column: str | None = flag(None, "Column with the label.", "Data", shown="label")
    template: str | None = flag(None, "Prompt, such as '{text} It was {mask}.'", "Data", shown="the task's")
    label_words: tuple[str, ...] = flag(
        (),
        "One word a class in class order: great,terrible; or class=word,class=word.",
        "Data",
        shown="the task's, or class names",
    )
    max_length: Annotated[int, Ge(1)] | None = flag(
        None, "Tokens of an example at most.", "Data", shown="the task's"
    )
    eval_rows: Annotated[int, Ge(1)] = flag(
        EVAL_ROWS, "Rows of the validation (but for --k) and of the test set at most.", "Data"
    )

    def check_source(self) -> None:
        """Refuse what is about own files where there is none, and two places to read from."""
        for name in ("text_column", "label_column", "validation", "test"):
            if self.data is None and getattr(self, name, None):
                raise UsageError(
                    f"--{spelled(name)} is about a file of your own; give the file as --data, or leave it out"
                )
        if self.data is not None and self.data_dir is not None:
            raise UsageError(
                f"--data {self.data} is read instead of the task's files in --data-dir {self.data_dir}; leave one of them out"
            )

    def check_prompt(self, head: str, why: str) -> None:
        """Refuse what is about a prompt where there is none.

        Args:
            head: of the model.
            why: that there is no prompt, for the error.
        """
        for name in ("template", "label_words"):
            if head == "classes" and getattr(self, name):
                raise UsageError(f"--{spelled(name)} is about the prompt, but {why}; leave it out")


@dataclass(frozen=True)
class Machine(Settings):
    """Where and in which precision."""

    dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "Precision of the weights: float32, bfloat16, float16.", "Memory"
    )
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.", "Memory")
    threads: Annotated[int, Ge(1)] | None = flag(
        None, "CPU threads.", "Memory", shown="torch's choice", saved=False
    )


@dataclass(frozen=True)
class Ranks(Settings):
    """What several processes do with one run, started by `torchrun` or `accelerate launch`."""

    probes_per_rank: Annotated[int, Ge(1)] | None = flag(
        None,
        "Probes of a step on each rank, on the whole batch (zo, fwd).",
        "Ranks",
        shown="ranks share the batches of a step, and each does all probes",
    )
    check_every: Annotated[int, Ge(1)] = flag(
        100, "Steps between comparisons of the weights of all ranks.", "Ranks"
    )
    peer_timeout: Annotated[float, Gt(0)] = flag(
        120.0, "Seconds without an answer after which a rank counts as lost.", "Ranks", saved=False
    )

    @property
    def spread(self) -> Literal["batches", "probes"]:
        """What the ranks share out."""
        return "batches" if self.probes_per_rank is None else "probes"

    @property
    def all_probes(self) -> int | None:
        """Probes of a step on all ranks; None where the method decides."""
        return None if self.probes_per_rank is None else self.probes_per_rank * world_size()


def world_size() -> int:
    """Number of processes of this run, as the program that started them says."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def teamed(ranks: Ranks, device: str, settings: str) -> Iterator[Team]:
    """The processes of this run.

    Args:
        device: as `Machine` has it.
        settings: of this process, which those of all others have to equal.

    Raises:
        UsageError: another rank was started with other settings.
    """
    from zolr.distributed import team_of

    with team_of(ranks.spread, timeout=ranks.peer_timeout, device=device_of(device)) as team:
        if team.told(settings) != settings:
            lines = set(settings.splitlines()) ^ set(team.told(settings).splitlines())
            raise UsageError(f"ranks 0 and {team.rank} have different settings: {'; '.join(sorted(lines))}")
        yield team


def device_of(name: str) -> torch.device:
    """The device a setting names; of several processes on a machine each has one of its own.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # an unknown type is a RuntimeError, a missing one an AssertionError, ...
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UsageError(
            f"--device '{name}' is not there; {_without(name) or nearest(name, there)}"
        ) from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # nccl asks for it
    if device.type == "meta":
        raise UsageError("--device 'meta' holds no numbers; use cpu or cuda")
    return device


def _without(name: str) -> str:
    """Why there is no such GPU, where the name is that of one."""
    import torch

    if not name.startswith("cuda"):
        return ""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"this torch ({torch.__version__}) was built without CUDA; install one with it, or use cpu"
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver that fits it (see nvidia-smi and zolr doctor); use cpu"
    return ""


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def task_of(choice: DataChoice, model: str, what: str = "to train on") -> Task | None:
    """The task that is asked for; None for own files with classes of their own.

    Args:
        choice: of the user.
        model: its name; the demo model has a task, and one that does not exist is a nearer mistake than a task that is missing.
        what: for the error.
    """
    from zolr.tasks import find_task

    if choice.task is not None:
        return find_task(choice.task)
    if choice.data is not None:
        return None
    if model == "demo":
        return find_task(DEMO_TASK)
    from zolr.models import located
    from zolr.tasks import TASKS

    located(model)
    raise UsageError(f"nothing {what}; give --task ({', '.join(TASKS)}), or a file of your own as --data")


def splits_of(
    choice: DataChoice,
    task: Task | None,
    *,
    seed: int,
    k: int | None,
    train_rows: int | None,
    more: dict[str, Any],
) -> Splits:
    """Train, validation and test examples.

    Args:
        more: further arguments of `load_splits`.
    """
    from zolr.tasks import load_splits

    return load_splits(
        task,
        data_dir=choice.data_dir,
        data=choice.data,
        text_columns=choice.text_column or None,
        label_column=choice.label_column,
        k=k,
        seed=seed,
        train_rows=train_rows,
        validation_rows=choice.eval_rows,
        test_rows=choice.eval_rows,
        **more,
    )


def words_of(words: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Label words in class order, from `great,terrible` or `positive=great,negative=terrible`.

    Raises:
        UsageError: an unknown class, or one without a word.
    """
    flat = [word.strip() for part in words for word in part.split(",")]
    pairs = [word.rsplit("=", 1) for word in flat]
    if not all(len(pair) == 2 for pair in pairs):
        return tuple(flat)
    by_class = {name.strip(): word.strip() for name, word in pairs}
    for name in by_class:
        if name not in classes:
            raise UsageError(f"--label-words: there is no class '{name}'; {nearest(name, classes)}")
    missing = [name for name in classes if name not in by_class]
    if missing:
        raise UsageError(
            f"--label-words: class '{missing[0]}' has no word; give one for each of {', '.join(classes)}"
        )
    return tuple(by_class[name] for name in classes)


def metric_of(objective: str, task: Task | type[Task]) -> str:
    """What a run goes by, and shows."""
    return "f1" if objective == "f1" else task.metric


def described(task: Task) -> dict[str, Any]:
    """A task as JSON, from which `task_from` makes it again."""
    return {key: value for key, value in asdict(task).items() if key not in ("hub", "folder")}


def task_from(saved: dict[str, Any], where: Path) -> Task:
    """The task of a finished run.

    Raises:
        DataError: the file is not of a run.
    """
    from zolr.tasks import Task

    names = {f.name for f in fields(Task)}
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in saved.items()
            if key in names
        }
        return Task(**values)
    except TypeError as error:
        raise DataError(f"{where} does not describe a task: {error}") from error


class Workload:
    """A model with what it takes to read examples, and to say how well it does.

    Args:
        name: folder, preset, hub name or "demo".
        task: template, words, classes and limits.
        head: "prompt" or "classes".
        max_length: tokens of an example at most, where that was asked for; else the task's limit or the model's.
        dtype, device: of the weights.
        seed: of a fresh classification head, and of an adapter.
        team: who shares the evaluation.
        adapter: what the model is wrapped in, in place; None for nothing.
        apart: load into host memory, for `cut` to bring each rank its part.
        trust_remote_code: run Python code that comes with the model.
        loading: further settings of `models.load_model`: quantize, device_map, offload_folder.

    Raises:
        UsageError: a length that the model cannot read, or an adapter whose package is missing.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        head: str,
        *,
        max_length: int | None = None,
        dtype: str = "float32",
        device: torch.device,
        seed: int = 0,
        adapter: Adapter | None = None,
        team: Team | None = None,
        apart: bool = False,
        trust_remote_code: bool = False,
        **loading: Any,
    ) -> None:
        import torch

        from zolr import lora, models
        from zolr.tasks import pad_id

        self.name, self.head, self.device, self.team = name, head, device, team
        with noted() as self.notes:
            self.tokenizer = models.load_tokenizer(name, trust_remote_code=trust_remote_code)
            self.model: nn.Module = models.load_model(
                name,
                kind="classes" if head == "classes" else "lm",
                num_labels=len(task.classes) if head == "classes" else None,
                dtype=getattr(torch, dtype),
                device="cpu" if apart else device,
                seed=seed,
                trust_remote_code=trust_remote_code,
                **loading,
            )
        config: Any = self.model.config
        longest = longest_text(config, self.tokenizer)
        if longest is not None and max_length is not None and max_length > longest:
            raise UsageError(
                f"--max-length {max_length} is more than model '{name}' can read; use {longest} or less"
            )
        self.task = task = task.changed(
            max_length=max_length or min(task.max_length, longest or task.max_length)
        )
        self.input: Prompt | ClassInput
        if head == "classes":
            self.input = task.class_input(self.tokenizer)
            classifies(self.model, task.classes, self.tokenizer)
            self.logits: Callable[[nn.Module, Any], Tensor] = models.class_logits
            self.loss: Callable[[nn.Module, Any], Tensor] = models.class_loss
        else:
            prompt = self.input = task.prompt(self.tokenizer, masked=models.is_masked(self.model))
            self.logits = lambda model, batch: models.prompt_logits(model, batch, prompt.label_ids)
            self.loss = models.prompt_loss(prompt.label_ids)
        self.pad_id = pad_id(self.tokenizer)
        self.wrapped: Any = adapter and lora.wrap(
            self.model, adapter, classifier=head == "classes", seed=seed
        )

    def cut(self, whole: Sequence[str]) -> None:
        """Cut the weights over the ranks of the team.

        Args:
            whole: modules that stay whole on every rank.
        """
        from zolr import models, sharded
        from zolr.distributed import Team

        sharded.cut(self.model, self.team or Team(), self.device, whole)
        if self.head == "prompt" and models.splits(self.model):  # which calls parts of the model
            self.loss, self.logits = sharded.inside(self.loss), sharded.inside(self.logits)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as token ids."""
        return self.input.encode(examples)

    def objective(self, name: str) -> Callable[[nn.Module, Any], Tensor]:
        """What training minimizes: the loss, the error rate, or one minus macro F1 of the batch."""
        if name == "loss":
            return self.loss
        if name == "accuracy":
            return lambda model, batch: (self.logits(model, batch).argmax(-1) != batch["labels"]).float()
        return lambda model, batch: (
            1.0 - macro_f1(self.logits(model, batch).argmax(-1), batch["labels"], len(self.task.classes))
        )

    def predictions(self, encoded: Sequence[Encoded], batch_size: int) -> Tensor:
        """Logits of all examples `(rows, classes)`, float32 on the host, in their order."""
        import torch

        from zolr.distributed import Share
        from zolr.held import is_sharded
        from zolr.modes import mode
        from zolr.tasks import evaluation_batches

        out = torch.empty(len(encoded), len(self.task.classes))
        batches = list(evaluation_batches(encoded, batch_size=batch_size, pad_id=self.pad_id))
        share, seen = Share(batches, self.team), [out.new_empty(0, out.shape[1])]
        with mode(self.model, training=False), torch.no_grad():
            for _, batch in share:
                moved = {key: part.to(self.device) for key, part in batch.items()}
                seen.append(self.logits(self.model, moved).float().cpu())
            if any(map(is_sharded, self.model.parameters())):  # all ranks gather weights, or none
                for _ in range(max(share.lengths) - len(share)):
                    moved = {key: part.to(self.device) for key, part in batches[0][1].items()}
                    self.logits(self.model, moved)
        out[[row for rows, _ in batches for row in rows]] = share.rows(torch.cat(seen).mT, "evaluation").mT
        return out

    def evaluate(self, encoded: Sequence[Encoded], batch_size: int) -> dict[str, float]:
        """Accuracy, macro F1, Matthews correlation and mean loss; a loss that is not finite is reported as it is."""
        import torch

        from zolr.training import METRICS, score

        logits = self.predictions(encoded, batch_size)
        labels = torch.tensor([one["label"] for one in encoded])
        scores = {name: score(name, logits.argmax(-1), labels, len(self.task.classes)) for name in METRICS}
        return {**scores, "loss": float(torch.nn.functional.cross_entropy(logits, labels))}


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Macro F1 over the classes that occur in a batch, a scalar on the device.

    `2 TP / (predicted + true)` per class; torchmetrics would wait for the device at every call.
    """
    import torch.nn.functional as F

    guess, truth = F.one_hot(predicted, classes).float(), F.one_hot(labels, classes).float()  # (b, c)
    both, total = (guess * truth).sum(0), guess.sum(0) + truth.sum(0)
    return (2 * both / total.clamp_min(1)).sum() / (total > 0).sum()


def width_of(model: nn.Module) -> int:
    """Hidden size of a transformers model."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "hidden_size", REFERENCE_WIDTH))


def fitted(rate: float, method: Method, width: int) -> float:
    """A default rate of backprop, stated for a model of width 768, for another width.

    Steps of a rule that divides by the size of the gradient (Adam) change the output of a linear map in proportion to its
    inputs, so the rate goes with `1 / width` (Yang et al., Tensor Programs V, arXiv 2203.03466).
    """
    scales = method.paradigm == "fo" and method.normalizes
    return rate * REFERENCE_WIDTH / width if scales else rate


def longest_text(config: Any, tokenizer: Any) -> int | None:
    """Tokens a model can read at most, None where nothing says so."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**6 else []
    if (positions := positions_of(config)) is not None:
        limits.append(positions)
    return min(limits, default=None)


def classifies(model: nn.Module, classes: Sequence[str], tokenizer: Any) -> None:
    """Write into a classifier's config what its classes are, and what rows are padded with.

    Args:
        tokenizer: that makes its rows; None where it is not known.
    """
    from zolr.models import is_masked
    from zolr.tasks import pad_id

    config: Any = model.config
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: i for i, label in enumerate(classes)}
    # causal ones find the last token of a row by what it is padded with
    if tokenizer is not None and not is_masked(model):
        config.get_text_config().pad_token_id = pad_id(tokenizer)


def positions_of(config: Any) -> int | None:
    """Positions a model is made for, None where its config does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # models of this family count positions from the padding id on
    family = "roberta" in config.model_type or config.model_type == "camembert"
    return positions - (config.pad_token_id + 1 if family else 0)


@contextmanager
def noted() -> Iterator[list[str]]:
    """Warnings of a block as lines for the screen instead of Python's own format."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", SLOW_VMAP)
        yield notes
    notes += [note(w.message) for w in caught if issubclass(w.category, UserWarning)]
