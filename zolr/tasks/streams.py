"""Token ids as an endless, exactly repeatable stream of rows for pretraining.

Documents stand end to end with the end-of-text token between them (see `zolr.tasks.shards`). A row is `length` consecutive
ids, so no token is padding and none is dropped but the tail of the last row. Which rows make up the batch of a step is a
function of `(seed, step)` and of nothing else: a run that stops and resumes, or that only wants step 1000, sees the same
batches as one that never stopped, and ranks take their parts of the same batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from zolr.errors import DataError
from zolr.keys import Key
from zolr.tasks.shards import Ids, Packed
from zolr.tasks.texts import END, TEXT, Source, no_text, pieces

Objective = Literal["clm", "mlm"]
OBJECTIVES: tuple[Objective, ...] = ("clm", "mlm")

IGNORED = -100  # the label that every loss of torch and transformers skips

PAD, UNKNOWN, MASK = "<|pad|>", "<|unk|>", "<|mask|>"


def train_tokenizer(
    files: Sequence[Source],
    vocab_size: int,
    output: str | Path,
    *,
    max_characters: int | None = None,
    column: str = TEXT,
) -> Path:
    """Learns a byte-level BPE vocabulary and saves it as a folder that `AutoTokenizer.from_pretrained` loads.

    No text is unknown to it, as every byte is a token. `<|endoftext|>` ends documents in a stream and begins every
    encoded text, so that a prompt starts as a document does. A word has one id wherever it stands: the first word of
    a text is read as if a space preceded it.

    Args:
        files: Files and data sets to learn from.
        vocab_size: Tokens in all, the 256 bytes and 4 special ones included.
        output: The folder to write.
        max_characters: Stop reading after so many; the files are read in turns of one document, so that each has its
            share. None reads everything.
        column: Key of JSON lines, column of parquet files and data sets.

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
    tokenizer.train_from_iterator(_sample(files, max_characters, column), trainer=trainer)
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


@dataclass(frozen=True)
class TokenStream:
    """Rows of a flat sequence of ids as language-modeling batches, each a function of `(seed, step)` alone.

    Row `i` of `n` covers the ids from `i * length` on. The rows of an epoch are a permutation keyed by the seed and
    the epoch; step `s` takes the places `s * batch_size ... (s + 1) * batch_size - 1` of the endless sequence of
    epochs, so a batch may end one epoch and begin the next.

    Causal (`clm`): `labels[t]` is the target of position `t`, that is id `t + 1`, already shifted.
    Masked (`mlm`): of the ids that are not special, 15 % are to be predicted; 80 % of those are shown as the mask
    token, 10 % as a random token, 10 % as they are. All other labels are -100.

    With `reset` a document does not see the ones before it in its row: batches have `position_ids`, which begin again at
    every boundary token. Decoders of transformers that get these and no attention mask look no further back than to
    position 0. The boundary token then is the first of the document that it precedes, and the last label of the one
    before it. Without `reset` the boundary token is all that tells a model where a document ends.

    Args:
        ids: Token ids, `(tokens,)`; an array, or `Ids` of several.
        length: Positions of a row.
        batch_size: Rows of a batch.
        objective: "clm" or "mlm".
        seed: Names the order of rows, and the masks.
        mask_id: The mask token, for "mlm".
        special_ids: Ids that "mlm" neither masks nor shows at random.
        vocab_size: Random replacements of "mlm" are drawn below it.
        share: Share of the ids to predict under "mlm".
        reset: The boundary id at which positions begin again, for "clm"; None never begins again.

    Raises:
        DataError: There are too few ids for one row, or "mlm" has no mask token.
    """

    ids: np.ndarray | Ids
    length: int
    batch_size: int
    objective: Objective = "clm"
    seed: int = 0
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    share: float = 0.15
    reset: int | None = None
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
    def of_ids(
        cls,
        packed: Packed,
        tokenizer: Any,
        *,
        length: int,
        batch_size: int,
        objective: Objective = "clm",
        seed: int = 0,
        reset: bool = False,
    ) -> TokenStream:
        """Builds the stream of packed ids, with the special tokens that the tokenizer names."""
        return cls(
            packed.ids,
            length=length,
            batch_size=batch_size,
            objective=objective,
            seed=seed,
            mask_id=tokenizer.mask_token_id,
            special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
            vocab_size=len(tokenizer),
            reset=packed.manifest["boundary"] if reset else None,
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

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """The batch of one step, or the part of it that one of several ranks takes.

        Args:
            step: Optimizer step, from 0 on.
            rank: Which of `world_size` equal parts, from 0 on; the parts of all ranks, one after the other, are the batch.
            world_size: Parts; it divides `batch_size`.

        Returns:
            `input_ids` and `labels`, both `(batch_size / world_size, length)` int64; with `reset` also `position_ids`.

        Raises:
            DataError: A negative step, or parts that do not exist.
        """
        if step < 0:
            raise DataError(f"step {step} is negative; steps count from 0")
        if world_size < 1 or self.batch_size % world_size or not 0 <= rank < world_size:
            raise DataError(
                f"rank {rank} of {world_size} has no equal part of {self.batch_size} rows; "
                "use a batch that the number of ranks divides"
            )
        first = step * self.batch_size
        places = [divmod(first + offset, self.rows) for offset in range(self.batch_size)]
        picked = [int(self._order(epoch)[place]) for epoch, place in places]
        size = self.batch_size // world_size
        part = slice(rank * size, (rank + 1) * size)
        if self.objective == "clm":
            return self._causal(picked[part])
        # masks are drawn for the whole batch, so that they do not depend on the number of ranks
        whole = self._masked(self._rows_of(picked), Key(self.seed).fold_in("mask", step).generator())
        return {name: value[part] for name, value in whole.items()}

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
        """Yields rows in their order, the same ones with the same masks at every call, whatever the seed and batch size.

        Args:
            limit: At most so many rows, spread evenly over all of them; None takes every row.

        Yields:
            Batches as `batch` gives them; the last one may have fewer rows.
        """
        picked = self.evaluated(limit)
        for start in range(0, len(picked), self.batch_size):
            rows = picked[start : start + self.batch_size]
            if self.objective == "clm":
                yield self._causal(rows)
                continue
            keys = [Key(0).fold_in("evaluation mask", row).generator() for row in rows]
            parts = [self._masked(self._rows_of([r]), key) for r, key in zip(rows, keys, strict=True)]
            yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def evaluated(self, limit: int | None = None) -> list[int]:
        """The rows that `evaluation` gives."""
        count = self.rows if limit is None else min(limit, self.rows)
        return [place * self.rows // count for place in range(count)]

    def _over(self, ids: np.ndarray | Ids) -> TokenStream:
        return replace(self, ids=ids)

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:  # several threads may ask at once, and draw the same
            for old in [known for known in list(self._orders) if abs(known - epoch) > 1]:
                self._orders.pop(old, None)
            order = self._orders[epoch] = Key(self.seed).fold_in("rows", epoch).permutation(self.rows)
        return order

    def _rows_of(self, rows: Sequence[int], extra: int = 0) -> Tensor:
        width = self.length + extra
        flat = np.stack([np.asarray(self.ids[r * self.length : r * self.length + width]) for r in rows])
        return torch.from_numpy(flat.astype(np.int64))  # (b, length + extra)

    def _causal(self, rows: Sequence[int]) -> dict[str, Tensor]:
        ids = self._rows_of(rows, 1)  # (b, length + 1)
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        if self.reset is not None:
            places = torch.arange(self.length).expand(len(rows), -1)
            begins = torch.where(batch["input_ids"] == self.reset, places, torch.zeros_like(places))
            batch["position_ids"] = places - begins.cummax(1).values
        return batch

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


@contextmanager
def ahead(
    batch_of_step: Callable[[int], Any], workers: int, last: int | None = None
) -> Iterator[Callable[[int], Any]]:
    """A function like `batch_of_step` whose next batches are made while the present one is used.

    Batches are functions of their step, so it does not matter who makes them: nothing is repeated or lost, and a step that
    is asked for out of order is made when it is asked for.

    Args:
        batch_of_step: a pure function.
        workers: threads; so many batches are made ahead. 0 makes none.
        last: the step before which to stop making.
    """
    if not workers:
        yield batch_of_step
        return
    with ThreadPoolExecutor(workers, "batches") as pool:
        made: deque[tuple[int, Future[Any]]] = deque()

        def batches(step: int) -> Any:
            while made and made[0][0] < step:
                made.popleft()
            if made and made[0][0] > step:
                return batch_of_step(step)
            following = made[-1][0] + 1 if made else step
            stop = step + workers + 1 if last is None else min(step + workers + 1, max(last, step + 1))
            for number in range(following, stop):
                made.append((number, pool.submit(batch_of_step, number)))
            return made[0][1].result()

        try:
            yield batches
        finally:
            for _, future in made:
                future.cancel()


def _sample(files: Sequence[Source], max_characters: int | None, column: str) -> Iterator[str]:
    """Yields pieces of text file by file in turns, until `max_characters` are out."""
    turns = [pieces([file], column) for file in files]
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
        raise no_text(files)
