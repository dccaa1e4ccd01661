"""`zolr pretrain`: train a language model on plain text, from random weights or from a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from annotated_types import Ge, Gt, Lt

from zolr.cli.config import Settings, add, flag
from zolr.errors import StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zolr.tasks.streams import TokenStream

TOKENIZER, TOKENS = "tokenizer", "tokens"  # working files in a run folder until the run is complete
CHUNK_ENTRIES = 1 << 21  # logits alive at once on a CPU: 8 MiB stay in its cache, and more is slower


@dataclass(frozen=True)
class Pretrain(Settings):
    """Settings of `zolr pretrain`."""

    model: str | None = flag(
        None, "Preset, folder, hub name or config.json; without it an architecture is made from the numbers below.", "Model", path=True
    )
    hidden_size: Annotated[int, Ge(8)] = flag(192, "Width.", "Model")
    layers: Annotated[int, Ge(1)] = flag(4, "Layers.", "Model")
    heads: Annotated[int, Ge(1)] = flag(4, "Attention heads; they divide the width.", "Model")
    ffn_size: Annotated[int, Ge(1)] | None = flag(
        None, "Inner width of the feed-forward layers.", "Model", shown="8/3 of the width (clm), 4 times it (mlm)"
    )
    data: tuple[str, ...] = flag((), "Text files or folders of .txt and .txt.xz files (repeat the flag).", "Data", path=True)
    held_out: tuple[str, ...] = flag(
        (), "Text to evaluate on.", "Data", shown="files of --data named valid*, dev*, eval*; else the last rows", path=True
    )
    tokenizer: str | None = flag(None, "Folder or hub name of a tokenizer.", "Data", shown="the model's own", path=True)
    train_tokenizer: bool = flag(False, "Learn a byte-level BPE tokenizer from the data first.", "Data")
    vocab_size: Annotated[int, Ge(260)] = flag(8192, "Tokens of the tokenizer to learn.", "Data")
    tokenizer_characters: Annotated[int, Ge(1)] = flag(8_000_000, "Characters of the data that the tokenizer is learned from.", "Data")
    length: Annotated[int, Ge(2)] = flag(128, "Tokens of a row.", "Data")
    objective: Literal["clm", "mlm"] = flag("clm", "Predict the next token (clm) or masked ones (mlm).", "Training")
    method: str = flag("adamw", "Row of `zolr methods`.", "Training")
    paradigm: str | None = flag(None, "fo, zo or fwd.", "Training", shown="the method's first")
    rank: Annotated[int, Ge(1)] | None = flag(None, "Rank of the subspaces.", "Training", shown="the method's")
    refresh_every: Annotated[int, Ge(1)] | None = flag(None, "Steps between two subspaces.", "Training", shown="the method's")
    steps: Annotated[int, Ge(1)] = flag(1000, "Optimizer steps.", "Training")
    batch_size: Annotated[int, Ge(1)] = flag(32, "Rows of a step.", "Training")
    accumulation: Annotated[int, Ge(1)] = flag(1, "Micro-batches that the rows of a step are cut into.", "Training")
    lr: Annotated[float, Gt(0)] | None = flag(None, "Learning rate at its highest.", "Training", shown="1e-3; without backprop the method's")
    warmup: Annotated[int, Ge(0)] = flag(0, "Steps over which the learning rate rises.", "Training")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = flag(
        "cosine", "What it does then; wsd holds it and falls linearly in the last --decay of the steps.", "Training"
    )
    decay: Annotated[float, Gt(0), Lt(1)] = flag(0.2, "Share of the steps that wsd falls over.", "Training")
    weight_decay: Annotated[float, Ge(0)] = flag(0.0, "Decoupled decay of matrices.", "Training")
    clip: Annotated[float, Gt(0)] | None = flag(None, "Largest norm of the gradient.", "Training", shown="none")
    seed: int = flag(0, "Names the weights, the rows of each step and the directions.", "Training")
    compute: Literal["float32", "bfloat16"] = flag(
        "float32", "What matrix products are computed in; weights, norms and losses stay float32.", "Compute"
    )
    threads: Annotated[int, Ge(1)] | None = flag(None, "CPU threads.", "Compute", shown="all cores")
    device: str | None = flag(None, "Device such as cpu or cuda.", "Compute", shown="cuda if there is one")
    eval_every: Annotated[int, Ge(0)] = flag(0, "Steps between evaluations; 0 evaluates at both ends.", "Output")
    eval_rows: Annotated[int, Ge(1)] = flag(256, "Held-out rows of an evaluation, spread over all of them.", "Output")
    save_every: Annotated[int, Ge(0)] = flag(0, "Steps between checkpoints; 0 saves when interrupted.", "Output")
    output: str | None = flag(None, "Run folder.", "Output", shown="runs/pretrain", saved=False)
    overwrite: bool = flag(False, "Replace what is in the run folder.", "Output", saved=False)
    resume: bool = flag(False, "Go on from the newest checkpoint of the run folder.", "Output", saved=False)
    quiet: bool = flag(False, "Print nothing but errors.", "Output", saved=False)


def run(settings: Pretrain) -> None:
    """Train a language model on plain text, from random weights or from a checkpoint."""
    from zolr.cli.runs import claimed, free_folder

    if not settings.data:
        raise UsageError("nothing to train on; give --data FILE or --data FOLDER")
    if settings.overwrite and settings.resume:
        raise UsageError("--overwrite and --resume exclude each other; give one of them")
    if settings.resume and settings.output is None:
        raise UsageError("--resume needs the run folder to go on in; give --output")
    if settings.hidden_size % settings.heads:
        raise UsageError(f"a width of {settings.hidden_size} cannot be divided among {settings.heads} heads; change --heads")
    if settings.batch_size % settings.accumulation:
        raise UsageError(f"a batch of {settings.batch_size} rows cannot be cut into {settings.accumulation} equal parts")
    folder = Path(settings.output) if settings.output else free_folder("pretrain")
    with claimed(folder, overwrite=settings.overwrite, resume=settings.resume) as claim:
        try:
            pretrain(settings, claim)
        except BaseException:
            claim.discard()
            raise


def pretrain(settings: Pretrain, claim: Any) -> dict[str, Any]:
    """Do the run and complete its folder; returns what `result.json` holds.

    Args:
        settings: what to do.
        claim: the run folder, a `zolr.cli.runs.RunFolder`.
    """
    import shutil

    import torch

    from zolr.checkpoints import newest, write_text
    from zolr.cli.config import as_dict, toml
    from zolr.cli.runs import CARD, CONFIG, RESULT, write_json
    from zolr.cli.screen import console, watching
    from zolr.engine import Engine
    from zolr.memory import resident
    from zolr.methods import METHODS, compose
    from zolr.tasks.streams import IGNORED
    from zolr.training import train

    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shown = console(settings.quiet)
    work: Path = claim.work

    method = compose(settings.method, settings.paradigm, rank=settings.rank, refresh_every=settings.refresh_every)
    row = METHODS[settings.method]
    # The rates of the rows are for fine-tuning: random weights stand more
    lr = settings.lr if settings.lr is not None else 1e-3 if method.paradigm == "fo" else row.lr.get(method.paradigm)

    train_files, valid_files = _files(settings)
    tokenizer = _tokenizer(settings, work, train_files)
    model = _model(settings, tokenizer).to(device)
    method = _without_embeddings(method, model)
    stream, valid = _streams(settings, work, tokenizer, train_files, valid_files)
    parameters = sum(p.numel() for p in model.parameters())
    per_step = settings.batch_size * settings.length
    shown.print(
        f"{type(model).__name__}, {parameters:,} parameters, vocabulary {len(tokenizer):,}; {stream.tokens:,} tokens in "
        f"{stream.rows:,} rows; {settings.steps:,} steps of {per_step:,} tokens, {settings.steps * per_step / stream.tokens:.2f} epochs"
    )

    loss = _loss(settings, model, device)
    engine = Engine(
        model,
        method,
        lr=lr,
        loss=loss,
        select=row.train,
        seed=settings.seed,
        weight_decay=settings.weight_decay,
        schedule=schedule(settings),
        clip=settings.clip,
    )
    if engine.trained_share < 1:
        shown.print(f"training {engine.trained_share:.1%} of the parameters")

    def batch_of_step(step: int) -> list[dict[str, "Tensor"]]:
        batch = stream.batch(step)
        size = settings.batch_size // settings.accumulation
        parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, settings.batch_size, size)]
        if settings.objective == "mlm":
            for part in parts:  # the head, the dearest layer of a small model, need not see the other 85 %
                part["counted"] = (part["labels"].flatten() != IGNORED).nonzero()[:, 0]
        return parts

    def evaluate() -> Mapping[str, float]:
        total, count = 0.0, 0
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in valid.evaluation(settings.eval_rows):
                part, number = loss(model, {key: value.to(device) for key, value in batch.items()})
                total, count = total + float(part), count + int(number)
        model.train(training)
        mean = total / max(count, 1)
        return {"loss": mean, "perplexity": float(torch.tensor(mean, dtype=torch.float64).exp())}

    found = newest(work / "checkpoints") if settings.resume else None
    if settings.resume and found is None:
        raise StorageError(f"no checkpoint to go on from in {claim.path}; start again with --overwrite")
    memory = lambda: resident(device)  # noqa: E731
    with watching(shown, memory, found.step if found else 0, settings.steps) as screen:
        outcome = train(
            engine,
            batch_of_step,
            steps=settings.steps,
            evaluate=evaluate,
            eval_every=settings.eval_every,
            metric="loss",
            best=None,  # the last weights: a schedule that ends at zero leaves the best ones there
            folder=work,
            save_every=settings.save_every,
            resume=settings.resume,
            device=device,
            reporter=screen,
        )

    trained: Any = engine.detach().to("cpu").eval()
    progress = outcome.progress
    result = {
        "verb": "pretrain",
        "method": settings.method,
        "paradigm": method.paradigm,
        "settings": as_dict(settings),
        "metric": "loss",
        "before": outcome.before,
        "after": outcome.after,
        "steps": progress.step,
        "skipped": progress.skipped,
        "forwards": progress.forwards,
        "tokens": progress.step * per_step,
        "seconds": round(progress.seconds, 2),
        "parameters": parameters,
        "trained_share": engine.trained_share,
        "held_out_tokens": valid.tokens,
        "peak_bytes_predicted": None,
        "peak_bytes_measured": resident(device).peak,
        "versions": _versions(),
    }

    def fill(aside: Path) -> None:
        trained.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_text(aside / CONFIG, toml(settings))
        write_text(aside / CARD, card(settings, result))
        write_json(aside / RESULT, result)

    for name in (TOKENIZER, TOKENS):
        shutil.rmtree(work / name, ignore_errors=True)
    claim.complete(fill)
    before, after = outcome.before.get("loss", float("nan")), outcome.after.get("loss", float("nan"))
    shown.print(
        f"held-out loss {before:.4f} -> {after:.4f} after {progress.step:,} steps, {result['tokens']:,} tokens, "
        f"{progress.seconds:,.0f} s; saved in {claim.path}"
    )
    return result


def _without_embeddings(method: Any, model: "nn.Module") -> Any:
    """The method with AdamW for embeddings and heads where it has Muon for all matrices.

    The rows of an embedding are vectors that meet gradients one by one; an orthogonal step, which moves all of them
    alike, suits only maps between hidden states (Jordan et al., 2024).
    """
    from dataclasses import replace

    import torch

    from zolr.optim import OptimizerRule
    from zolr.optim.by_shape import ByShape

    if method.optimizer.name != "muon":
        return method
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)}

    class HiddenMuon(OptimizerRule):
        def build(self, values: Any, lr: float) -> Any:
            apart = [v for v in values if v.dim() == 2 and v.shape[0] in tables]
            if not apart:
                return super().build(values, lr)
            rest = [v for v in values if all(v is not other for other in apart)]
            adamw = torch.optim.AdamW(apart, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
            inner = super().build(rest, lr)
            return ByShape([*(inner.parts if isinstance(inner, ByShape) else [inner]), adamw])

    return replace(method, optimizer=HiddenMuon(method.optimizer.name, method.optimizer.settings))


def schedule(settings: Pretrain) -> Callable[[int], float]:
    """The factor on the learning rate at each step: a linear rise, then what `settings.schedule` names.

    `wsd` up to the step where it begins to fall does not depend on `steps`: a run may be stopped, and resumed with
    another number of steps, as if that number had been given from the beginning.

    Reference: Hu et al., MiniCPM (2024), for wsd.
    """
    from math import cos, pi

    steps, warmup = settings.steps, settings.warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = min(1.0, (step - warmup) / max(1, steps - warmup))
        if settings.schedule == "linear":
            return 1.0 - share
        if settings.schedule == "cosine":
            return 0.5 * (1.0 + cos(pi * share))
        if settings.schedule == "wsd":
            return min(1.0, (steps - step) / max(1.0, settings.decay * steps))
        return 1.0

    return factor


def _files(settings: Pretrain) -> tuple[list[Path], list[Path]]:
    from zolr.tasks.streams import text_files

    train, valid = text_files(settings.data)
    if settings.held_out:
        valid = [file for part in text_files(settings.held_out) for file in part]
    return train, valid


def _tokenizer(settings: Pretrain, work: Path, files: list[Path]) -> Any:
    """The tokenizer: named, or the model's own, or learned from the data and kept for a resumed run."""
    from zolr.models import PRESETS, load_tokenizer
    from zolr.tasks.streams import train_tokenizer

    if settings.tokenizer and settings.train_tokenizer:
        raise UsageError("--tokenizer and --train-tokenizer exclude each other; give one of them")
    if settings.tokenizer:
        return load_tokenizer(settings.tokenizer)
    model = settings.model
    if model and model not in PRESETS and not model.endswith(".json") and not settings.train_tokenizer:
        return load_tokenizer(model)
    if not settings.train_tokenizer:
        raise UsageError(f"model '{model or 'made from numbers'}' has no tokenizer; give --tokenizer, or --train-tokenizer")
    folder = work / TOKENIZER
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(files, settings.vocab_size, folder, max_characters=settings.tokenizer_characters)
    return load_tokenizer(folder)


def _model(settings: Pretrain, tokenizer: Any) -> "nn.Module":
    """The model to train, with an embedding as large as the tokenizer where it is built here."""
    from transformers import AutoConfig

    from zolr.models import PRESETS, build, is_masked, load_model

    # Only these are the model's business: beginning, end and padding of a text, and the number of tokens
    changes = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if settings.model is None:
        model = build(_config(settings, changes), seed=settings.seed)
    elif settings.model in PRESETS:
        model = build(settings.model, seed=settings.seed, **changes)
    elif settings.model.endswith(".json"):
        try:
            config = AutoConfig.from_pretrained(settings.model)
        except (OSError, ValueError) as error:
            raise UsageError(f"model config '{settings.model}' cannot be used: {error}") from error
        model = build(config, seed=settings.seed, **changes)
    else:
        model = load_model(settings.model, seed=settings.seed)
        rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        if len(tokenizer) > rows:
            raise UsageError(f"model '{settings.model}' has {rows} tokens, the tokenizer {len(tokenizer)}; use the model's own tokenizer")
    if is_masked(model) != (settings.objective == "mlm"):
        kind, other = ("masked", "mlm") if is_masked(model) else ("causal", "clm")
        raise UsageError(f"{type(model).__name__} is a {kind} language model; train it with --objective {other}")
    return model


def _config(settings: Pretrain, changes: dict[str, Any]) -> Any:
    """A llama (clm) or roberta (mlm) config with the numbers of the settings."""
    from transformers import AutoConfig

    width = settings.hidden_size
    numbers = dict(changes, hidden_size=width, num_hidden_layers=settings.layers, num_attention_heads=settings.heads)
    if settings.objective == "clm":
        # 8/3 of the width with a gate costs what 4 times the width costs without one; multiples of 32 are fast
        numbers["intermediate_size"] = settings.ffn_size or -(-8 * width // 3 // 32) * 32
        numbers |= dict(max_position_embeddings=max(512, settings.length), tie_word_embeddings=True, rms_norm_eps=1e-6)
        return AutoConfig.for_model("llama", **numbers)
    numbers["intermediate_size"] = settings.ffn_size or 4 * width
    # RoBERTa counts positions from its padding index on
    numbers["max_position_embeddings"] = max(512, settings.length) + changes["pad_token_id"] + 1
    numbers |= dict(type_vocab_size=1, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoConfig.for_model("roberta", **numbers)


def _streams(
    settings: Pretrain, work: Path, tokenizer: Any, train: list[Path], valid: list[Path]
) -> "tuple[TokenStream, TokenStream]":
    from zolr.tasks.streams import TokenStream

    common: dict[str, Any] = dict(
        length=settings.length, batch_size=settings.batch_size, objective=settings.objective, seed=settings.seed, cache=work / TOKENS
    )
    stream = TokenStream.of_text(train, tokenizer, **common)
    if valid:
        return stream, TokenStream.of_text(valid, tokenizer, **common)
    return stream.hold_out(max(1, min(settings.eval_rows, stream.rows // 10)))


def _loss(settings: Pretrain, model: "nn.Module", device: Any) -> Callable[..., Any]:
    import torch

    from zolr.models import lm_loss

    chunk = None
    if device.type == "cpu":
        chunk = max(64, CHUNK_ENTRIES // model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    low = settings.compute == "bfloat16"

    def loss(model: "nn.Module", batch: Mapping[str, "Tensor"]) -> "tuple[Tensor, Tensor]":
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return lm_loss(model, batch, chunk=chunk)

    return loss


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("zolr", "torch", "transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def card(settings: Pretrain, result: Mapping[str, Any]) -> str:
    """The model card of a run folder."""
    kind = "causal" if settings.objective == "clm" else "masked"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        "---\nlibrary_name: transformers\ntags: [zolr]\n---\n\n"
        f"# A {kind} language model of {result['parameters']:,} parameters\n\n"
        f"Trained by `zolr pretrain --method {settings.method}` on {result['tokens']:,} tokens of plain text "
        f"in {result['steps']:,} steps of {settings.batch_size} rows of {settings.length} tokens.\n"
        f"Held-out loss: {result['before'].get('loss', float('nan')):.4f} before, "
        f"{result['after'].get('loss', float('nan')):.4f} after (nats per token).\n\n"
        f"`config.toml` repeats the run: `zolr pretrain --config config.toml`. Made with {versions}.\n"
    )


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "pretrain", Pretrain, run)
