"""Which rows train, validate and test: k-shot splits, shares and cuts, each a function of its seed.

Reference: Gao, Fisch, Chen, Making pre-trained language models better few-shot learners (2021), whose splits
Malladi et al., Fine-tuning language models with just forward passes (2023), use as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from zolr.errors import DataError, UsageError, is_count
from zolr.tasks.examples import Example

TEST_SEED = 42  # the published protocol cuts test sets with this seed, whatever the seed of the run


def shuffled(count: int, seed: int) -> list[int]:
    """`range(count)` in the order of NumPy's seeded shuffle, which the published splits are drawn with."""
    import numpy as np

    if (
        not 0 <= seed < 2**32
    ):  # NumPy takes no other seed; hashing keeps seeds apart that a remainder would join
        from zolr.keys import Key

        seed = Key(seed).fold_in("split").integer() % 2**32
    order = list(range(count))
    np.random.RandomState(seed).shuffle(order)
    return order


def few_shot(
    pool: Sequence[Example],
    k: int,
    seed: int,
    classes: Sequence[str],
    held_out: Sequence[Example] = (),
    validate: bool = True,
) -> tuple[list[Example], list[Example]]:
    """k training and k validation examples of every class, no text twice.

    The pool is shuffled once; the first k rows of a class train and the next k validate. Rows whose texts
    came up before, or are in `held_out`, are passed over.

    Args:
        pool: labeled rows to choose from.
        k: examples of a class in each of the two splits, at least 1.
        seed: names the shuffle.
        classes: class names in index order.
        held_out: rows that must not be chosen, such as the test set.
        validate: choose validation examples too; without, a class needs k rows only.

    Returns:
        Training and validation examples, class after class.

    Raises:
        UsageError: k < 1.
        DataError: a class has fewer than 2k different rows (k without validation).
    """
    if not is_count(k):
        raise UsageError(f"k = {k!r} examples a class is not possible; use a whole number of at least 1")
    seen = {example.texts for example in held_out}
    by_class: list[list[Example]] = [[] for _ in classes]
    for row in shuffled(len(pool), seed):
        example = pool[row]
        if example.texts not in seen:
            seen.add(example.texts)
            by_class[example.label].append(example)
    parts = 2 if validate else 1
    for name, rows in zip(classes, by_class, strict=True):
        if len(rows) < parts * k:
            possible = len(rows) // parts
            raise DataError(
                f"class {name!r} has {len(rows)} different rows to choose from, but k = {k} needs {parts * k}"
                f"{f' ({k} to train and {k} to validate)' if validate else ''}; "
                f"{f'use k = {possible} or less' if possible else 'add rows of that class'}"
            )
    return [e for rows in by_class for e in rows[:k]], [e for rows in by_class for e in rows[k : parts * k]]


def hold_out(
    pool: Sequence[Example], share: float, seed: int, classes: Sequence[str], purpose: str
) -> tuple[list[Example], list[Example]]:
    """Set aside a share of every class.

    Rows with the same texts stay together, so the two parts share no text.

    Args:
        pool: labeled rows.
        share: part of each class to set aside, 0 < share < 1; at least one row of each class, and never all
            of them.
        seed: names the draw.
        classes: class names in index order.
        purpose: what the share is for, in the words of an error.

    Returns:
        The rest and the share, both in the order of the pool.

    Raises:
        UsageError: share out of range.
        DataError: a class has fewer than two different rows.
    """
    if not 0 < share < 1:
        raise UsageError(
            f"a {purpose} share of {share} is not possible; use a number between 0 and 1, such as 0.1"
        )
    groups: list[dict[tuple[str, ...], list[int]]] = [{} for _ in classes]
    for row in shuffled(len(pool), seed):
        groups[pool[row].label].setdefault(pool[row].texts, []).append(row)
    held: set[tuple[str, ...]] = set()
    for name, by_text in zip(classes, groups, strict=True):
        if len(by_text) < 2:
            raise DataError(
                f"class {name!r} has {len(by_text)} different rows, too few to set one aside for {purpose}; "
                f"add rows of that class, or give a file of its own for {purpose}"
            )
        wanted = min(max(1, round(share * len(by_text))), len(by_text) - 1)
        held.update(list(by_text)[:wanted])
    # a text that carries two labels goes with its first one: the two parts must not share it
    return [e for e in pool if e.texts not in held], [e for e in pool if e.texts in held]


def cut(examples: list[Example], rows: int | None, seed: int = TEST_SEED) -> list[Example]:
    """At most `rows` examples: all of them in their order, or the first `rows` of the seeded shuffle."""
    if rows is None or len(examples) <= rows:
        return examples
    if rows < 1:
        raise UsageError(f"{rows} rows is not possible; use at least 1")
    return [examples[row] for row in shuffled(len(examples), seed)[:rows]]


def cap(examples: list[Example], rows: int, seed: int, classes: Sequence[str]) -> list[Example]:
    """At most `rows` training examples, with the classes in their proportions and every class present.

    Raises:
        UsageError: fewer rows than classes.
    """
    if not is_count(rows, len(classes)):
        raise UsageError(
            f"{rows!r} training rows cannot show all {len(classes)} classes; use {len(classes)} or more"
        )
    if len(examples) <= rows:
        return examples
    by_class: list[list[Example]] = [[] for _ in classes]
    for row in shuffled(len(examples), seed):
        by_class[examples[row].label].append(examples[row])
    exact = [rows * len(members) / len(examples) for members in by_class]
    quota = [min(len(members), max(1, int(part))) for part, members in zip(exact, by_class, strict=True)]
    while sum(quota) < rows:  # largest remainder first
        open_classes = [i for i, members in enumerate(by_class) if quota[i] < len(members)]
        quota[max(open_classes, key=lambda i: (exact[i] - quota[i], -i))] += 1
    while sum(quota) > rows:  # only when rare classes were lifted to one row each
        quota[
            max(range(len(quota)), key=lambda i: quota[i] - exact[i] if quota[i] > 1 else float("-inf"))
        ] -= 1
    return [e for members, n in zip(by_class, quota, strict=True) for e in members[:n]]
