"""Prompts: a template around the texts, and a label word for each class.

A template is one line such as `{sentence1:drop-last}? {mask}, {sentence2:lower-first}`. A field is a column,
with filters behind colons; `{mask}` is where a label word would stand; `{{` and `}}` are braces. The
tokenizer's own special tokens go around it. Every part is tokenized by itself, with the space in front of it
as part of it, as in the published prompts: a space before a text belongs to the text, a space before `{mask}`
to the label word.

Reference: Gao, Fisch, Chen, Making pre-trained language models better few-shot learners (2021).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zolr.errors import DataError, UsageError, is_count
from zolr.tasks.batches import Encoded
from zolr.tasks.examples import Example, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILTERS: dict[str, Callable[[str], str]] = {
    "drop-last": lambda text: text[:-1],  # the published NLI prompts cut the final period so, whatever it is
    "lower-first": lambda text: text[:1].lower() + text[1:],
    "strip-end": lambda text: text.rstrip(" \t\n.!?"),
}

_TOKENS = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")


@dataclass(frozen=True)
class Part:
    """A stretch of a template that is tokenized by itself.

    Args:
        kind: "literal", "field" or "mask".
        text: the literal text, or the name of the field.
        space: a field or the mask with a space in front of it.
        filters: what is done to the text of a field, in order.
    """

    kind: Literal["literal", "field", "mask"]
    text: str
    space: bool = False
    filters: tuple[str, ...] = ()

    def render(self, texts: dict[str, str]) -> str:
        """The text of a literal or field; an empty field has no space in front."""
        if self.kind != "field":
            return self.text
        text = texts[self.text]
        for name in self.filters:
            text = FILTERS[name](text)
        return " " + text if self.space and text else text


def parse_template(template: str, columns: Sequence[str]) -> tuple[Part, ...]:
    """The parts of a template.

    Args:
        template: see the module.
        columns: names that a field can have.

    Raises:
        UsageError: an unknown field or filter, no field, a stray brace, or not exactly one `{mask}`.

    >>> [part.text for part in parse_template("{question} It asks for a {mask}.", ["question"])]
    ['question', ' It asks for a', '{mask}', '.']
    """
    where = f"template {template!r}"
    parts: list[Part] = []
    literal = ""

    def close() -> bool:
        """Add the literal so far, less a space at its end, which goes with what comes next; was there one?"""
        nonlocal literal
        space = literal.endswith(" ")
        literal = literal.removesuffix(" ")
        if literal:
            parts.append(Part("literal", literal))
        literal = ""
        return space

    for token in _TOKENS.findall(template):
        if token in ("{{", "}}"):
            literal += token[0]
        elif token in ("{", "}"):
            raise UsageError(
                f"{where} has a single {token!r} in it; "
                f"write fields as {{name}}, and a brace as {token * 2!r}"
            )
        elif not token.startswith("{"):
            literal += token
        else:
            name, *filters = (piece.strip() for piece in token[1:-1].split(":"))
            if name == "mask":
                if filters:
                    raise UsageError(f"{where} has a filter on {{mask}}; write {{mask}} alone")
                parts.append(Part("mask", "{mask}", close()))
                continue
            if name not in columns:
                raise UsageError(
                    f"{where} has an unknown field {name!r}; {nearest(name, [*columns, 'mask'])}"
                )
            for word in filters:
                if word not in FILTERS:
                    raise UsageError(f"{where} has an unknown filter {word!r}; {nearest(word, FILTERS)}")
            parts.append(Part("field", name, close(), tuple(filters)))
    if literal:
        parts.append(Part("literal", literal))
    masks = sum(part.kind == "mask" for part in parts)
    if masks != 1:
        raise UsageError(f"{where} has {{mask}} {masks} times; put it once, where the label word would stand")
    if not any(part.kind == "field" for part in parts):
        raise UsageError(f"{where} has no text in it; use {', '.join(f'{{{c}}}' for c in columns)}")
    return tuple(parts)


# tokenizing


class _Pieces:
    """Token ids of stretches of text, whatever the tokenizer does about spaces.

    Byte-level tokenizers keep a space in the token behind it, word-piece ones drop it, and sentencepiece ones
    also put one in front of every text they are given, which is wrong for a stretch that continues another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        # a first word that looks like a second one: spaces are dropped, or one is put in front of every text
        self.alike = self.ids(["a a"])[0] == 2 * self.ids(["a"])[0]

    def ids(self, texts: Sequence[str], literal: bool = False) -> list[list[int]]:
        """Ids of whole texts; a special token written in one is plain text, unless the text is our own."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not literal,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else it warns of texts that are cut later
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def continued(self, texts: Sequence[str], literal: bool = False) -> list[list[int]]:
        """Ids of texts that stand behind other text."""
        if not self.alike:
            return self.ids(texts, literal)
        spaced = iter(
            self.ids([t[1:] for t in texts if t.startswith(" ")], literal)
        )  # the tokenizer adds the space
        return [next(spaced) if t.startswith(" ") else self._glued(t, literal) for t in texts]

    def _glued(self, text: str, literal: bool) -> list[int]:
        if text:
            for anchor in ("a", ")", "\n"):  # one that does not merge with the text
                (before,), (both,) = self.ids([anchor]), self.ids([anchor + text], literal)
                if before and both[: len(before)] == before:
                    return both[len(before) :]
        return self.ids([text], literal)[0]

    def word(self, word: str) -> int:
        """The id of a label word with a space in front of it."""
        stripped = word.strip()
        if not stripped:
            raise UsageError("a label word is empty; give one word for each class")
        before, both = self.ids(["a", f"a {stripped}"], literal=True)
        pieces = both[len(before) :] if both[: len(before)] == before else both
        names = self.tokenizer.convert_ids_to_tokens(pieces)
        way_out = "choose another word, or train a classification head, which needs none"
        if len(pieces) != 1:
            raise UsageError(
                f"label word {word!r} is {len(pieces)} tokens {names} to tokenizer {self.name!r}, not one; "
                f"{way_out}"
            )
        if pieces[0] == self.tokenizer.unk_token_id:
            raise UsageError(f"label word {word!r} is unknown to tokenizer {self.name!r}; {way_out}")
        return pieces[0]

    def frame(self, texts: int) -> tuple[list[list[int]], list[int] | None]:
        """Special tokens before, between and behind texts, and the token type of each text if it has one."""
        words = ["a", "b"][:texts]
        encoded = self.tokenizer(*words)
        ids, kinds = list(encoded["input_ids"]), encoded.get("token_type_ids")
        found: list[list[int]] = []
        types: list[int] = []
        at = 0
        for i, bare in enumerate(self.ids(words)):
            start = next((j for j in range(at, len(ids)) if ids[j : j + len(bare)] == bare), None)
            if start is None and i:  # behind another text it may be encoded as a continuation
                bare = self.continued([" " + words[i]])[0]
                start = next((j for j in range(at, len(ids)) if ids[j : j + len(bare)] == bare), None)
            if start is None:
                raise UsageError(
                    f"tokenizer {self.name!r} does not keep a text in one piece; use another tokenizer"
                )
            found.append(ids[at:start])
            types.append(kinds[start] if kinds else 0)
            at = start + len(bare)
        found.append(ids[at:])
        return found, types if kinds else None


def fit(lengths: Sequence[int], room: int) -> list[int]:
    """Lengths that add up to at most `room`, by cutting the longest first.

    >>> fit([9, 4, 2], 11)
    [5, 4, 2]
    """
    kept = [min(length, room) for length in lengths]
    while sum(kept) > room:
        longest = max(range(len(kept)), key=kept.__getitem__)
        second = max((n for i, n in enumerate(kept) if i != longest), default=0)
        kept[longest] -= min(sum(kept) - room, max(1, kept[longest] - second))
    return kept


def _assemble(
    parts: Sequence[list[int]], is_text: Sequence[bool], cuts: Sequence[int | None], max_length: int
) -> tuple[list[list[int]], bool]:
    """The parts with texts cut to their limits, then to what `max_length` leaves; and whether any was cut."""
    texts = [i for i, text in enumerate(is_text) if text]
    fixed = sum(len(ids) for i, ids in enumerate(parts) if not is_text[i])
    limited = [
        min(len(parts[i]), cut if cut is not None else len(parts[i]))
        for i, cut in zip(texts, cuts, strict=True)
    ]
    kept = dict(zip(texts, fit(limited, max_length - fixed), strict=True))
    result = [ids[: kept[i]] if i in kept else ids for i, ids in enumerate(parts)]
    return result, any(kept[i] < len(parts[i]) for i in texts)


def _check_limits(
    max_length: int, cuts: Sequence[int | None], columns: Sequence[str]
) -> tuple[int | None, ...]:
    if not is_count(max_length):
        raise UsageError(f"max_length {max_length!r} is not possible; use a whole number of tokens")
    cuts = tuple(cuts) or (None,) * len(columns)
    if len(cuts) != len(columns) or any(cut is not None and cut < 1 for cut in cuts):
        raise UsageError(
            f"cuts {cuts} do not fit the texts {tuple(columns)}; give a number of tokens or None for each"
        )
    return cuts


class Prompt:
    """A template and its label words, ready for one tokenizer.

    An example becomes the ids of `[special] parts [special]`, at most `max_length` of them: texts are cut,
    first to their own limits and then the longest first, and the template and the mask never. A causal model
    predicts the label word as the next token, so its template ends with `{mask}`, which adds no token.

    Args:
        template: see the module.
        label_words: one word for each class, in index order; looked up with a space in front, and one token
            each.
        tokenizer: a transformers tokenizer.
        masked: for a masked language model; else for a causal one.
        max_length: tokens at most, special ones included.
        cuts: tokens at most for each text, or None; a text's leading space counts with its first token.
        columns: names of the texts of an example, in their order.

    Raises:
        UsageError: a template, word or limit that cannot work.
    """

    def __init__(
        self,
        template: str,
        label_words: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        masked: bool,
        max_length: int,
        cuts: Sequence[int | None] = (),
        columns: Sequence[str] = ("sentence",),
    ) -> None:
        self.template, self.words, self.columns = template, tuple(label_words), tuple(columns)
        self.tokenizer: Any = tokenizer
        self.masked, self.max_length = masked, max_length
        self.cuts = _check_limits(max_length, cuts, columns)
        self.parts = parse_template(template, columns)
        self._pieces = _Pieces(tokenizer)
        self.label_ids = [self._pieces.word(word) for word in self.words]
        for i, word in enumerate(self.words):
            first = self.label_ids.index(self.label_ids[i])
            if first < i:
                raise UsageError(
                    f"label words {self.words[first]!r} and {word!r} are the same token to tokenizer "
                    f"{self._pieces.name!r}; choose words that differ"
                )
        before, behind = self._pieces.frame(1)[0]
        if masked:
            if self.tokenizer.mask_token_id is None:
                raise UsageError(
                    f"tokenizer {self._pieces.name!r} has no mask token, so its model is no masked language "
                    "model; use the causal template, or a masked model"
                )
            slot = [int(self.tokenizer.mask_token_id)]
        else:
            rest = next((part.text for part in reversed(self.parts) if part.kind != "mask"), "")
            if self.parts[-1].kind != "mask":
                raise UsageError(
                    f"template {template!r} has {rest!r} behind {{mask}}, but a causal model predicts the "
                    "next token; end the template with {mask}"
                )
            slot, behind = [], []
        self._before, self._slot, self._behind = before, slot, behind
        self._fixed = [self._fixed_ids(i, part) for i, part in enumerate(self.parts)]
        needed = len(before) + len(behind) + sum(len(ids) for ids in self._fixed)
        texts = sum(part.kind == "field" for part in self.parts)
        if max_length < needed + texts:
            raise UsageError(
                f"max_length {max_length} leaves no room for a text: "
                f"the template alone takes {needed} tokens; use at least {needed + texts}"
            )

    def _fixed_ids(self, index: int, part: Part) -> list[int]:
        if part.kind == "literal":
            encode = self._pieces.continued if index else self._pieces.ids
            return encode([part.text], literal=True)[0]
        return self._slot if part.kind == "mask" else []

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as ids with the position to read the label word's logits at.

        The position is that of the mask token, or for a causal model that of the last token.
        """
        texts = [dict(zip(self.columns, example.texts, strict=True)) for example in examples]
        columns: list[list[list[int]]] = []  # ids by part and example
        for i, part in enumerate(self.parts):
            if part.kind == "field":
                encode = self._pieces.continued if i else self._pieces.ids
                columns.append(encode([part.render(text) for text in texts]))
            else:
                columns.append([self._fixed[i]] * len(examples))
        is_text = [False, *(part.kind == "field" for part in self.parts), False]
        cut_of = dict(zip(self.columns, self.cuts, strict=True))
        cuts = [cut_of[part.text] for part in self.parts if part.kind == "field"]
        mask = next(i for i, part in enumerate(self.parts) if part.kind == "mask") + 1
        result: list[Encoded] = []
        for row, example in enumerate(examples):
            parts = [self._before, *(column[row] for column in columns), self._behind]
            parts, truncated = _assemble(parts, is_text, cuts, self.max_length)
            ids = [token for part in parts for token in part]
            position = sum(map(len, parts[:mask])) if self.masked else len(ids) - 1
            if position < 0:
                raise DataError(f"the text {example.texts[0]!r} has no token to predict from; drop that row")
            result.append(
                {"input_ids": ids, "label": example.label, "truncated": truncated, "position": position}
            )
        return result

    def render(self, example: Example) -> str:
        """The prompt as text, uncut; `____` stands for the label word of a causal model."""
        texts = dict(zip(self.columns, example.texts, strict=True))
        slot = self.tokenizer.mask_token if self.masked else "____"
        slots = {True: f" {slot}", False: slot}
        return "".join(slots[p.space] if p.kind == "mask" else p.render(texts) for p in self.parts)

    def show(self, example: Example) -> str:
        """Three lines for people: the prompt, its tokens with ids, and the label word to predict."""
        (encoded,) = self.encode([example])
        names = self.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        tokens = " ".join(f"{name}:{token}" for name, token in zip(names, encoded["input_ids"], strict=True))
        cut = f" (cut to {len(names)} tokens)" if encoded["truncated"] else ""
        words = ", ".join(f"{word}:{token}" for word, token in zip(self.words, self.label_ids, strict=True))
        answer = self.words[example.label] if example.label >= 0 else "not known"
        lines = (
            f"prompt  {self.render(example)}{cut}",
            f"tokens  {tokens}",
            f"answer  {answer} at position {encoded.get('position')}, out of {words}",
        )
        return "\n".join(lines)


class ClassInput:
    """Texts as a classification head wants them: one, or a pair joined by the tokenizer's separator.

    A tokenizer without a separator gets a line break between the texts. Texts are cut as in `Prompt`.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens at most, special ones included.
        cuts: tokens at most for each text, or None.
        columns: names of the texts of an example, one or two.

    Raises:
        UsageError: limits that cannot work, or more than two texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        cuts: Sequence[int | None] = (),
        columns: Sequence[str] = ("sentence",),
    ) -> None:
        if len(columns) not in (1, 2):
            raise UsageError(
                f"a classification head takes one text or two, not {len(columns)}; "
                "use a prompt, or join the texts"
            )
        self.columns, self.max_length = tuple(columns), max_length
        self.tokenizer: Any = tokenizer
        self.cuts = _check_limits(max_length, cuts, columns)
        self._pieces = _Pieces(tokenizer)
        self._frame, self._types = self._pieces.frame(len(columns))
        self._joined = len(columns) == 2 and not self._frame[1]
        if self._joined:
            self._frame[1] = self._pieces.continued(["\n"], literal=True)[0]
        needed = sum(map(len, self._frame))
        if max_length < needed + len(columns):
            raise UsageError(
                f"max_length {max_length} leaves no room for a text; use at least {needed + len(columns)}"
            )

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as ids, with token types where pairs have them."""
        columns = [
            self._pieces.ids([example.texts[i] for example in examples]) for i in range(len(self.columns))
        ]
        is_text = [i % 2 == 1 for i in range(2 * len(columns) + 1)]
        result: list[Encoded] = []
        for row, example in enumerate(examples):
            parts = [self._frame[0]]
            for ids, column in zip(self._frame[1:], columns, strict=True):
                parts += [column[row], ids]
            parts, truncated = _assemble(parts, is_text, self.cuts, self.max_length)
            one: Encoded = {
                "input_ids": [token for part in parts for token in part],
                "label": example.label,
                "truncated": truncated,
            }
            if self._types and len(columns) == 2:
                first = sum(map(len, parts[:3]))  # the separator goes with the text before it
                rest = sum(map(len, parts[3:]))
                one["token_type_ids"] = [self._types[0]] * first + [self._types[1]] * rest
            result.append(one)
        return result

    def show(self, example: Example) -> str:
        """Two lines for people: the tokens with their ids, and the class to predict."""
        (encoded,) = self.encode([example])
        names = self.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        tokens = " ".join(f"{name}:{token}" for name, token in zip(names, encoded["input_ids"], strict=True))
        cut = f" (cut to {len(names)} tokens)" if encoded["truncated"] else ""
        return f"tokens  {tokens}{cut}\nanswer  class {example.label if example.label >= 0 else 'not known'}"


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its end-of-text, else 0: the attention mask hides it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
