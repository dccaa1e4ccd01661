"""The text of `zolr pretrain`: which files, by which tokenizer, packed where, and which rows are held out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zolr.cli import runs
from zolr.cli.runs import DATA, TOKENIZER
from zolr.errors import DataError, UsageError

if TYPE_CHECKING:
    from zolr.cli.pretrain import Pretrain
    from zolr.tasks.streams import TokenStream

SPLIT = "last_rows"  # entry of data.json on the rows that are held out of the text to train on, where no other text is


def files_of(settings: Pretrain) -> tuple[list[Any], list[Any]]:
    """The text to train on and the text to evaluate on, none for the last rows of the former.

    Raises:
        DataError: all of it is held out.
    """
    from zolr.tasks.texts import every_source, sources

    train, valid = sources(settings.data, settings.hub_documents)
    if settings.held_out:
        valid = every_source(settings.held_out, settings.hub_documents)
        places = {_place(source) for source in valid}
        train = [source for source in train if _place(source) not in places]
        if not train:
            raise DataError(
                "all of --data is held out by --held-out, and nothing is left to train on; give other text"
            )
    return train, valid


def _place(source: Any) -> Any:
    """What two names of one file, or of one data set, share."""
    return source.resolve() if isinstance(source, Path) else source


def _shared(origins: Mapping[str, Any]) -> Iterator[str]:
    """Notes on text that a run would be evaluated on after training on it."""
    names: dict[str, list[str]] = {}
    for source in origins["train"]["sources"]:
        names.setdefault(source["sha256"], []).append(Path(source["name"]).name)
    if "held_out" not in origins:
        for name, count in ((found[0], len(found)) for found in names.values() if len(found) > 1):
            yield (
                f"note: {name} is there {count} times, so what is held out at the end may be trained on before; give it "
                "once, or give --held-out"
            )
        return
    for source in origins["held_out"]["sources"]:
        for name in names.get(source["sha256"], ())[:1]:
            yield f"note: {name} is text to train on and held-out text: the held-out loss is not that of unseen text"


def cache_folder(given: str | None) -> Path:
    """Where packed tokens are kept: as given, else `$ZOLR_CACHE/tokens`, else `tokens` in zolr's own cache of the user."""
    if given is not None:
        return Path(given)
    own = os.environ.get("ZOLR_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(own) if own else user / "zolr") / "tokens"


def tokenizer_of(settings: Pretrain, work: Path, files: list[Any]) -> Any:
    """The tokenizer: named, or the model's own, or learned from the data once and kept for a resumed run."""
    from zolr.models import PRESETS, load_config, load_tokenizer
    from zolr.tasks.streams import train_tokenizer
    from zolr.tasks.texts import HubText

    if settings.tokenizer:
        return load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    model = settings.model
    if model and model not in PRESETS and not model.endswith(".json"):
        # a model that does not exist is a nearer mistake than anything about its tokens
        load_config(model, trust_remote_code=settings.trust_remote_code)
        if settings.train_tokenizer:
            raise UsageError(
                f"--train-tokenizer makes tokens that model '{model}' has never seen; leave it out, or give a config.json"
            )
        return load_tokenizer(model, trust_remote_code=settings.trust_remote_code)
    if not settings.train_tokenizer:
        for source in files:
            if isinstance(source, HubText):  # a path that does not exist reads like one: that comes first
                source.check()
        raise UsageError(
            f"model '{model or 'made from numbers'}' has no tokenizer; give --tokenizer, or --train-tokenizer"
        )
    if (work / "tokenizer.json").is_file():  # of a finished run that is given more steps
        return load_tokenizer(work)
    folder = work / TOKENIZER
    if not folder.exists():
        aside = folder.with_name(f"{TOKENIZER}.part")  # a process that is killed leaves no half of one
        train_tokenizer(
            files,
            settings.vocab_size,
            aside,
            max_characters=settings.tokenizer_characters,
            column=settings.text_column,
        )
        aside.rename(folder)
    return load_tokenizer(folder)


@contextmanager
def kept_if_used(work: Path, first: bool) -> Iterator[None]:
    """A tokenizer that is learned inside goes again where the run is refused, or another command would find it as the run's.

    Args:
        first: whether this rank is the one that learns.
    """
    folder = work / TOKENIZER
    there = folder.exists()
    try:
        yield
    except BaseException:
        if first and not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def streams_of(
    settings: Pretrain, work: Path, tokenizer: Any, train: list[Any], valid: list[Any], shown: Any
) -> tuple[TokenStream, TokenStream, dict[str, Any]]:
    """The streams to train and to evaluate on, and what they were made of.

    Raises:
        DataError: a resumed run began with other data.
    """
    from zolr.tasks.shards import check_unchanged, pack
    from zolr.tasks.streams import TokenStream

    place = work / DATA
    known = runs.read_json(place) if settings.resume and place.is_file() else {}
    began = known.pop(SPLIT, None)

    def packed(given: list[Any]) -> Any:
        return pack(
            given,
            tokenizer,
            cache_folder(settings.cache),
            column=settings.text_column,
            rebuild=not known,
            noted=lambda text: shown.print(text, markup=False),
        )

    texts = {"train": packed(train)} | ({"held_out": packed(valid)} if valid else {})
    origins = {name: text.origin for name, text in texts.items()}
    for text in _shared(origins):
        shown.print(text, markup=False)
    for name, what in (("train", "text to train on"), ("held_out", "held-out text")):
        if name in known and name in origins:
            check_unchanged(origins[name], known[name], what)
    if known.keys() - origins.keys() or (known and origins.keys() - known.keys()):
        raise DataError(
            f"the run began {'with' if 'held_out' in known else 'without'} held-out files, and now it is the other way; "
            "give the same --data and --held-out"
        )
    common: dict[str, Any] = dict(length=settings.length, objective=settings.objective, seed=settings.seed)
    common["reset"] = settings.documents == "apart"
    stream = TokenStream.of_ids(texts["train"], tokenizer, batch_size=settings.rows, **common)
    usual = max(1, min(settings.eval_rows, stream.rows // 10))
    split = usual if began is None else began["rows"]  # what was trained on once stays text to train on
    if valid:
        held_out = TokenStream.of_ids(texts["held_out"], tokenizer, batch_size=settings.micro, **common)
    else:
        stream, last = stream.hold_out(split)
        held_out = replace(last, batch_size=settings.micro)
    if not known:  # once nothing of it is refused any more
        runs.write_json(place, origins if valid else {**origins, SPLIT: {"rows": split}})
    return stream, held_out, origins
