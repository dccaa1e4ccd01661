"""Learning rates that methods are pretrained at where nobody gives one."""

from typing import NamedTuple


class Rate(NamedTuple):
    """A learning rate of pretraining by backprop, and where it is from.

    Args:
        lr: of embeddings, head and vectors; of matrices too, times `scale`.
        scale: factor on the steps of projected matrices; None for the method's own.
    """

    lr: float
    why: str
    scale: float | None = None
    transport: str | None = None  # of moments at a new subspace; None is the method's own


# the rates of the methods are for fine-tuning, and random weights stand more
USUAL = Rate(1e-3, "that of all rows of which no more is known")
_GALORE = Rate(1e-2, "the published rate of its C4 runs")
_LIKE_GALORE = Rate(1e-2, "ours: that of galore, none is known")
_APART = Rate(
    1e-2,
    "ours: of embeddings, head and vectors, and 0.3 of it for matrices, which drawn subspaces want apart, with moments "
    "kept from one subspace to the next (benchmarks/pretraining.py)",
    scale=0.3,
    transport="keep",
)
_GRID = (
    "ours: among the best of a grid in 60 steps of a small llama (benchmarks/methods.py), no more is known"
)
# where there is something to go by
RATES: dict[str, Rate] = {
    **dict.fromkeys(("galore", "fira", "apollo", "apollo-mini"), _GALORE),
    "q-galore": _GALORE._replace(lr=1.5e-2),
    **dict.fromkeys(("grasswalk", "grassjump"), _LIKE_GALORE),
    **dict.fromkeys(("stiefel", "dependent"), _APART),
    "rso": Rate(
        1e-2,
        "ours: of embeddings, head and vectors, and a tenth of it for matrices (benchmarks/pretraining.py)",
        scale=0.1,
    ),
    **dict.fromkeys(("vlorp", "plumage", "muon"), Rate(3e-3, _GRID)),
    **dict.fromkeys(("gum", "mofasgd", "flora", "lorenza"), Rate(1e-2, _GRID)),
    "adalomo": Rate(3e-2, _GRID),
    **dict.fromkeys(
        ("sgd", "lomo", "extrapolation"), Rate(1e-1, f"{_GRID}; goes with the size of gradients")
    ),
}


def rate_of(method: str) -> Rate:
    """What a method is pretrained at by backprop where the user gives no rate."""
    return RATES.get(method, USUAL)
