"""Which weights of a model are trained at a time: the Layers protocol and the registry.

A policy divides a run into periods and names the blocks that are active in each. An inactive weight stays as it is: no
gradient of it is computed, and it has optimizer state only where the policy keeps it.
"""

from collections.abc import Collection, Mapping
from math import prod
from typing import ClassVar, Literal, Protocol

from zolr.errors import UsageError, is_count
from zolr.keys import Key

Outside = Literal["always", "never", "blocks"]


class Layers(Protocol):
    """A frozen rule; what is active is a function of its arguments."""

    keeps: ClassVar[bool]  # whether a block that becomes inactive keeps its optimizer state

    @property
    def every(self) -> int | None:
        """Optimizer steps of a period; None for one that does not end."""
        ...

    @property
    def outside(self) -> Outside:
        """What is done with weights outside of all blocks (embeddings, head, last norm): "always" active, "never", or each
        module of them a block more ("blocks")."""
        ...

    def active(self, blocks: int, period: int, key: Key) -> Collection[int]:
        """The blocks that are active in a period, out of `range(blocks)`; at least one.

        Args:
            key: name of the run's choices.
        """
        ...


def blocks_of(sizes: Mapping[str, tuple[int, ...]], outside: Outside) -> dict[str, str | None]:
    """The block that each weight belongs to, by the name of the module it is; None where it is active always.

    Blocks are the entries of numbered lists of modules (`model.layers.3`), of all lists that hold at least half as many
    numbers as the largest one. In a model without such a list every module that has weights is a block. Weights that are
    never active are left out.

    Args:
        sizes: shapes of the weights by their dotted names.

    >>> blocks_of({"embed.weight": (9, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4)}, "always")
    {'embed.weight': None, 'layers.0.w': 'layers.0', 'layers.1.w': 'layers.1'}
    """
    places, entries, members = {}, {}, {}
    for name, size in sizes.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if at is not None:
            prefix = ".".join(parts[:at])
            places[name] = prefix, ".".join(parts[: at + 1])
            entries[prefix] = entries.get(prefix, 0) + prod(size)
            members.setdefault(prefix, set()).add(parts[at])
    lists = {prefix for prefix in entries if len(members[prefix]) > 1}
    most = max((entries[prefix] for prefix in lists), default=0)
    lists = {prefix for prefix in lists if 2 * entries[prefix] >= most}
    result: dict[str, str | None] = {}
    for name in sizes:
        module = name.rpartition(".")[0]
        if name in places and places[name][0] in lists:
            result[name] = places[name][1]
        elif not lists or outside == "blocks":
            result[name] = module
        elif outside == "always":
            result[name] = None
    return result


def shuffled(blocks: int, key: Key) -> list[int]:
    """A uniform permutation of `range(blocks)`, from hashes alone: tensors without data (predictions) have no random numbers."""
    return sorted(range(blocks), key=lambda block: key.fold_in(block).integer())


def check_every(every: int) -> None:
    """Refuse a length of periods that means nothing."""
    if not is_count(every):
        raise UsageError(f"every = {every!r} is no number of steps; use a whole number of at least 1")


def check_outside(outside: str) -> None:
    """Refuse an unknown word."""
    if outside not in ("always", "never", "blocks"):
        raise UsageError(f"outside '{outside}' is not known; use 'always', 'never' or 'blocks'")


from zolr.layers.all import All  # noqa: E402  (the files obey the protocol above)
from zolr.layers.bernoulli import Bernoulli  # noqa: E402
from zolr.layers.cycle import Cycle  # noqa: E402
from zolr.layers.sampled import Sampled  # noqa: E402

LAYERS: dict[str, type] = {"all": All, "cycle": Cycle, "sampled": Sampled, "bernoulli": Bernoulli}
