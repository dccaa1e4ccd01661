"""Verify: an attached model computes what its dense weights would."""

from collections.abc import Callable, Sequence

import torch

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.reads import Reads
from zolr.variables import Variables


@torch.no_grad()
def verify(
    variables: Variables, evaluate: Callable[[], float], key: Key, tolerance: float | None = None
) -> None:
    """Compare the effect of random coordinates of every weight, one at a time, with that of the dense weight they stand for.

    Args:
        variables: of the attached model.
        evaluate: its loss on one batch.
        key: of the coordinates.
        tolerance: on the loss; by default from the precision of the weight and the size of the effect.

    Raises:
        UsageError: a weight whose effect is not the same, by name (read past its module's forward, usually).
    """
    for variable in variables:
        variable.touched = False
    with Reads(variables, derived=False) as reads:
        base = evaluate()
    # what nothing uses acts as its dense weight does, which is not at all
    past = [v.name for v in variables if not v.touched and v.name in reads.found]
    if past:
        raise UsageError(
            f"weight '{past[0]}' is used by no forward of its module{_others(past)}, but read past it ({reads.found[past[0]]}), so nothing "
            f"would train it; leave it out with a narrower selection (--train, or select={_without(past)})"
        )
    for variable in variables:
        if variable.held:  # there is no dense weight to compare with
            continue
        shift = key.fold_in(variable.name).normal(variable.subspace.coords_shape)
        shift = variable.mask(shift.to(variable.value))
        dense = variable.subspace.lift(shift.to(variable.weight.dtype))
        size = 0.05 * float(variable.weight.float().square().mean().sqrt() + 1e-3)
        shift, dense = shift * size, dense * size
        with variable.shifted(shift):
            side = evaluate()
        kept = variable.weight.data.clone()
        try:
            oriented = variable.weight.data.t() if variable.transposed else variable.weight.data
            oriented += dense / variable.decay
            direct = evaluate()
        finally:
            variable.weight.data.copy_(kept)
        precision = torch.finfo(variable.weight.dtype).eps
        # a weight that acts otherwise may come that close to the effect by chance: no wider than its rounding asks for
        share = min(1e-2, max(1e-6, 1e4 * precision))
        allowed = tolerance or 1e3 * precision * max(1.0, abs(base)) + share * abs(direct - base)
        if not abs(side - direct) <= allowed:
            rebuilt = "" if variable.realization == "rebuild" else ", or use realization 'rebuild'"
            raise UsageError(
                f"weight '{variable.name}' acts differently through its coordinates (loss {side:.6g}) than as a "
                f"dense weight (loss {direct:.6g}); exclude it from training{rebuilt}"
            )


def _others(names: Sequence[str]) -> str:
    more = len(names) - 1
    return f" (and so {'is' if more == 1 else 'are'} {more} more)" if more else ""


def _without(names: Sequence[str]) -> str:
    """A predicate that leaves out what ends like these names."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    return (
        f"lambda name, p: not name.endswith({tuple(ends)!r})"
        if len(ends) < 4
        else "a predicate of name and parameter"
    )
