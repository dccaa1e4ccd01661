"""Text files as an endless, exactly repeatable stream of token rows for pretraining.

Files are cut into documents at blank lines, tokenized once, and packed end to end with the end-of-text token between
documents: one flat array of ids. A row is `length` consecutive ids of it, so no token is padding and none is dropped
but the tail of the last row. Which rows make up the batch of a step is a function of `(seed, step)` and of nothing
else: a run that stops and resumes, or that only wants step 1000, sees the same batches as one that never stopped.
"""

from __future__ import annotations

import array
import hashlib
import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import torch
from torch import Tensor

from zolr.errors import DataError
from zolr.keys import Key

Objective = Literal["clm", "mlm"]
OBJECTIVES: tuple[Objective, ...] = ("clm", "mlm")

IGNORED = -100  # the label that every loss of torch and transformers skips

END = "<|endoftext|>"  # also accepted as a line of its own in a text file, where story collections put it
PAD, UNKNOWN, MASK = "<|pad|>", "<|unk|>", "<|mask|>"

_SUFFIXES = (".txt", ".txt.xz")
_HELD_OUT = ("valid", "dev", "eval")  # how the names of evaluation files begin
_TEST = ("test",)  # never read unless named
_PIECE = (
    1 << 16
)  # characters: longer documents are read in pieces, so that one endless document fits in memory
_BLOCK = 1 << 20  # characters handed to the tokenizer at once


def text_files(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Lists the text files that a mix of files and folders stands for, as training files and held-out files.

    A file that is named is a training file, whatever it is called. In a folder, searched to the bottom and read in
    order of name, `.txt` and `.txt.xz` files count; those whose name begins with valid, dev or eval are held out, and
    those that begin with test are left alone.

    Args:
        paths: Files and folders.

    Returns:
        Training files and held-out files.

    Raises:
        DataError: A path does not exist, or no training file was found.
    """
    train: list[Path] = []
    held_out: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            train.append(path)
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                if not (file.is_file() and file.name.endswith(_SUFFIXES)):
                    continue
                if file.name.startswith(_HELD_OUT):
                    held_out.append(file)
                elif not file.name.startswith(_TEST):
                    train.append(file)
        else:
            raise DataError(
                f"no file or folder {str(path)!r}; give the path of a text file, or of a folder of them"
            )
    if not train:
        given = ", ".join(repr(str(path)) for path in paths) or "nothing"
        raise DataError(
            f"no {' or '.join(_SUFFIXES)} file to train on in {given}; name the files one by one if they end otherwise"
        )
    return train, held_out


def documents(files: Iterable[str | Path]) -> Iterator[str]:
    """Yields the documents of text files: the stretches between blank lines, without the line break at their end.

    Args:
        files: UTF-8 text files; a name that ends in `.xz` is decompressed on the way.

    Yields:
        One document after the other, never an empty one.

    Raises:
        DataError: A file cannot be read, is not UTF-8 text, or is a damaged `.xz`.
    """
    parts: list[str] = []
    for text, ends in _pieces(files):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts.clear()


def train_tokenizer(
    files: Sequence[str | Path], vocab_size: int, output: str | Path, *, max_characters: int | None = None
) -> Path:
    """Learns a byte-level BPE vocabulary and saves it as a folder that `AutoTokenizer.from_pretrained` loads.

    No text is unknown to it, as every byte is a token. `<|endoftext|>` ends documents in a stream and begins every
    encoded text, so that a prompt starts as a document does. A word has one id wherever it stands: the first word of
    a text is read as if a space preceded it.

    Args:
        files: Text files to learn from.
        vocab_size: Tokens in all, the 256 bytes and 4 special ones included.
        output: The folder to write.
        max_characters: Stop reading after so many; the files are read in turns of one document, so that each has its
            share. None reads everything.

    Returns:
        The folder.

    Raises:
        DataError: The vocabulary is too small for the bytes, or a file is empty, unreadable or not text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, PAD, UNKNOWN, MASK]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise DataError(
            f"vocabulary of {vocab_size} tokens: bytes and special tokens alone are {smallest}; ask for more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(files, max_characters), trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{END} $A",
        pair=f"{END} $A $B:1",
        special_tokens=[(END, tokenizer.token_to_id(END))],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        mask_token=MASK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    folder = Path(output)
    wrapped.save_pretrained(str(folder))
    return folder


def tokenize(files: Sequence[str | Path], tokenizer, *, cache: str | Path | None = None) -> np.ndarray:
    """Turns text files into one flat array of ids, an end-of-text token after each document.

    The text passes through in blocks, so that memory holds the ids (two bytes each below 65,536 tokens) and about a
    megabyte of text.

    Args:
        files: Text files, read in the order given.
        tokenizer: A tokenizer of transformers; its special tokens are not added, but for the end of each document.
        cache: A folder for the finished ids. The file in it is named after the contents of the text files and of the
            tokenizer, so that a stale one is never read; a run that finds it skips the work and maps the file.

    Returns:
        Ids, `(tokens,)`, uint16 or int32.

    Raises:
        DataError: A file is unreadable or not text, all of them together are empty, or the tokenizer has no token to
            end a document with.
    """
    target = None
    if cache is not None:
        target = Path(cache) / f"tokens-{_fingerprint(files, tokenizer)}.npy"
        if target.exists():
            return np.load(target, mmap_mode="r", allow_pickle=False)

    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DataError("the tokenizer has neither an end-of-text nor a separator token; set its eos_token")
    small = len(tokenizer) <= 1 << 16
    ids = array.array("H" if small else "i")
    for block in _blocks(_pieces(files)):
        encoded = tokenizer(
            [text for text, _ in block], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for row, (_, ends) in zip(encoded, block, strict=True):
            ids.extend(row)
            if ends:
                ids.append(end)
    if not ids:
        raise DataError(f"no text in {_names(files)}; give files with at least one line that is not blank")
    tokens = np.frombuffer(ids, dtype=np.uint16 if small else np.int32)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(f".{os.getpid()}.tmp")  # a reader must never see half a file
        with aside.open("wb") as handle:
            np.save(handle, tokens, allow_pickle=False)
        os.replace(aside, target)
    return tokens


@dataclass(frozen=True)
class TokenStream:
    """Rows of a flat array of ids as language-modeling batches, each a function of `(seed, step)` alone.

    Row `i` of `n` covers the ids from `i * length` on. The rows of an epoch are a permutation keyed by the seed and
    the epoch; step `s` takes the places `s * batch_size ... (s + 1) * batch_size - 1` of the endless sequence of
    epochs, so a batch may end one epoch and begin the next.

    Causal (`clm`): `labels[t]` is the target of position `t`, that is id `t + 1`, already shifted.
    Masked (`mlm`): of the ids that are not special, 15 % are to be predicted; 80 % of those are shown as the mask
    token, 10 % as a random token, 10 % as they are. All other labels are -100.

    Args:
        ids: Token ids, `(tokens,)`.
        length: Positions of a row.
        batch_size: Rows of a batch.
        objective: "clm" or "mlm".
        seed: Names the order of rows, and the masks.
        mask_id: The mask token, for "mlm".
        special_ids: Ids that "mlm" neither masks nor shows at random.
        vocab_size: Random replacements of "mlm" are drawn below it.
        share: Share of the ids to predict under "mlm".

    Raises:
        DataError: There are too few ids for one row, or "mlm" has no mask token.
    """

    ids: np.ndarray
    length: int
    batch_size: int
    objective: Objective = "clm"
    seed: int = 0
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    share: float = 0.15
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise DataError(f"objective {self.objective!r} is none of {', '.join(OBJECTIVES)}")
        if self.length < 1 or self.batch_size < 1:
            raise DataError(
                f"rows of {self.length} tokens in batches of {self.batch_size}: both must be at least 1"
            )
        if self.rows < 1:
            raise DataError(
                f"{len(self.ids)} tokens do not fill one row of {self.length}; give more text or a shorter length"
            )
        if self.objective == "mlm" and (self.mask_id is None or self.vocab_size < 1):
            raise DataError(
                "objective 'mlm' needs a tokenizer with a mask token; use one, or objective 'clm'"
            )

    @classmethod
    def of_text(
        cls,
        files: Sequence[str | Path],
        tokenizer,
        *,
        length: int,
        batch_size: int,
        objective: Objective = "clm",
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> TokenStream:
        """Builds the stream of text files: `tokenize`, with the special tokens that the tokenizer names."""
        return cls(
            tokenize(files, tokenizer, cache=cache),
            length=length,
            batch_size=batch_size,
            objective=objective,
            seed=seed,
            mask_id=tokenizer.mask_token_id,
            special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
            vocab_size=len(tokenizer),
        )

    @property
    def rows(self) -> int:
        """Whole rows in one epoch."""
        extra = 1 if self.objective == "clm" else 0  # the last position of a causal row needs the id after it
        return (len(self.ids) - extra) // self.length

    @property
    def tokens(self) -> int:
        """Tokens in one epoch."""
        return self.rows * self.length

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of one step.

        Args:
            step: Optimizer step, from 0 on.

        Returns:
            `input_ids` and `labels`, both `(batch_size, length)` int64.
        """
        if step < 0:
            raise DataError(f"step {step} is negative; steps count from 0")
        first = step * self.batch_size
        places = [divmod(first + offset, self.rows) for offset in range(self.batch_size)]
        picked = [int(self._order(epoch)[place]) for epoch, place in places]
        return self._assemble(picked, Key(self.seed).fold_in("mask", step))

    def hold_out(self, rows: int) -> tuple[TokenStream, TokenStream]:
        """Cuts the last `rows` rows off for evaluation.

        Args:
            rows: Rows to hold out, at least 1 and fewer than there are.

        Returns:
            The stream to train on, and the held-out one.

        Raises:
            DataError: Either part would be empty.
        """
        if not 1 <= rows < self.rows:
            raise DataError(f"cannot hold out {rows} of {self.rows} rows; give more text, or shorter rows")
        cut = (self.rows - rows) * self.length
        # The causal part keeps one id beyond the cut: it is the target of its last position, and no input.
        extra = 1 if self.objective == "clm" else 0
        return self._over(self.ids[: cut + extra]), self._over(self.ids[cut:])

    def evaluation(self, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Yields rows in their order, the same ones with the same masks at every call.

        Args:
            limit: At most so many rows, spread evenly over all of them; None takes every row.

        Yields:
            Batches as `batch` gives them; the last one may have fewer rows.
        """
        count = self.rows if limit is None else min(limit, self.rows)
        picked = [place * self.rows // count for place in range(count)]
        for start in range(0, count, self.batch_size):
            yield self._assemble(
                picked[start : start + self.batch_size], Key(self.seed).fold_in("evaluation mask", start)
            )

    def _over(self, ids: np.ndarray) -> TokenStream:
        from dataclasses import replace

        return replace(self, ids=ids)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            for old in [known for known in self._orders if abs(known - epoch) > 1]:
                del self._orders[old]
            self._orders[epoch] = Key(self.seed).fold_in("rows", epoch).permutation(self.rows)
        return self._orders[epoch]

    def _assemble(self, rows: Sequence[int], key: Key) -> dict[str, Tensor]:
        width = self.length + (self.objective == "clm")
        flat = np.stack([self.ids[row * self.length : row * self.length + width] for row in rows])
        ids = torch.from_numpy(flat.astype(np.int64))  # (b, length) or (b, length + 1)
        if self.objective == "clm":
            return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        return self._masked(ids, key.generator())

    def _masked(self, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        open_ = ~torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype))  # (b, t)
        chosen = open_ & (torch.rand(ids.shape, generator=generator) < self.share)
        fate = torch.rand(ids.shape, generator=generator)
        randoms = torch.randint(self.vocab_size, ids.shape, generator=generator)
        if not chosen.any() and open_.any():
            # A mean over no token at all would be 0 / 0; only tiny batches come here.
            chosen.view(-1)[open_.view(-1).nonzero()[0]] = True
        # A special token drawn as the replacement would look like the end of a document: show the mask instead.
        special = torch.isin(randoms, torch.tensor(self.special_ids, dtype=randoms.dtype))
        randoms[special] = cast(int, self.mask_id)
        shown = torch.where(chosen & (fate < 0.8), torch.full_like(ids, cast(int, self.mask_id)), ids)
        shown = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), randoms, shown)
        return {"input_ids": shown, "labels": torch.where(chosen, ids, torch.full_like(ids, IGNORED))}


def _names(files: Sequence[str | Path]) -> str:
    shown = ", ".join(str(file) for file in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _open(file: Path) -> IO[str]:
    if file.name.endswith(".xz"):
        return lzma.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _pieces(files: Iterable[str | Path]) -> Iterator[tuple[str, bool]]:
    """Yields `(text, ends)`: documents, the long ones in several pieces of which the last one ends."""
    for file in map(Path, files):
        held: list[str] = []  # lines not yet handed on; blank ones never enter
        size = 0
        started = False  # a piece of the present document has been handed on
        try:
            with _open(file) as handle:
                for line in iter(lambda handle=handle: handle.readline(_PIECE), ""):
                    if "\0" in line:
                        raise DataError(f"{file} holds null bytes and is no text; give UTF-8 text files")
                    if not line.strip() or line.strip() == END:
                        if held or started:
                            yield "".join(held).removesuffix("\n"), True
                        held, size, started = [], 0, False
                        continue
                    # One line is kept back: only at the next one is it known whether the document goes on.
                    if size + len(line) > _PIECE and held:
                        yield "".join(held), False
                        held, size, started = [], 0, True
                    held.append(line)
                    size += len(line)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 text ({error.reason} at byte {error.start} of a block); convert it first"
            ) from error
        except (lzma.LZMAError, EOFError) as error:
            raise DataError(f"{file} is a damaged or truncated .xz file ({error}); copy it again") from error
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror or error}); check the path and its permissions"
            ) from error
        if held or started:
            yield "".join(held).removesuffix("\n"), True


def _blocks(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    block: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece[0])
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _sample(files: Sequence[str | Path], max_characters: int | None) -> Iterator[str]:
    """Yields pieces of text file by file in turns, until `max_characters` are out."""
    turns = [_pieces([file]) for file in files]
    out = 0
    while turns:
        alive = []
        for turn in turns:
            piece = next(turn, None)
            if piece is None:
                continue
            if max_characters is not None and out >= max_characters:
                return
            out += len(piece[0])
            alive.append(turn)
            yield piece[0]
        turns = alive
    if not out:
        raise DataError(f"no text in {_names(files)}; give files with at least one line that is not blank")


def _fingerprint(files: Sequence[str | Path], tokenizer) -> str:
    digest = hashlib.sha256(repr((tokenizer.eos_token_id, tokenizer.sep_token_id, len(tokenizer))).encode())
    fast = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(
        (fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))).encode()
    )
    for file in map(Path, files):
        try:
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror or error}); check the path and its permissions"
            ) from error
    return digest.hexdigest()[:16]
