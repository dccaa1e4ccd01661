"""How long Adam's steps are before and after an independent jump of the subspace, by transport.

    python benchmarks/transports.py

Gradients `(64, 256)` are a constant of deviation 0.3 plus noise of deviation 1, seen in a Haar subspace of rank 16 that
is drawn again after 300 steps. Printed is the root mean square of a step at rate 1, which is the same before and long after.
"""

import torch
from torch import Tensor, nn

from zolr.keys import Key
from zolr.optim import ADAM_DEGREES
from zolr.projectors.stiefel import Stiefel
from zolr.transports import TRANSPORTS

M, N, RANK, JUMP, AFTER = 64, 256, 16, 300, (0, 5, 10, 20, 50, 100, 299)


def sizes(name: str) -> list[float]:
    """Root mean square of every step."""
    like = torch.zeros(0, dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(M, N, dtype=torch.float64, generator=noise)

    law = Stiefel(rank=RANK, c=RANK / N)  # orthonormal columns
    constant, subspace = 0.3 * normal(), law.draw((M, N), Key(0).fold_in(0), like=like)
    value = nn.Parameter(torch.zeros(M, RANK, dtype=torch.float64))
    optimizer = torch.optim.AdamW([value], lr=1.0, weight_decay=0.0)
    result = []
    for step in range(JUMP + AFTER[-1] + 1):
        if step == JUMP:
            new = law.draw((M, N), Key(0).fold_in(1), like=like)
            state, settings = optimizer.state.pop(value), optimizer.param_groups[0]
            state = TRANSPORTS[name]()(state, ADAM_DEGREES, new.change_from(subspace), settings)
            if state:
                optimizer.state[value] = state
            subspace = new
        value.data.zero_()
        value.grad = subspace.project(constant + normal())
        optimizer.step()
        result.append(float(value.data.square().mean().sqrt()))
    return result


def main() -> None:
    """Print the table."""
    print("| transport | before | " + " | ".join(f"+{i}" for i in AFTER) + " |")
    print("|---|" + "---|" * (len(AFTER) + 1))
    for name in TRANSPORTS:
        found = sizes(name)
        shown = [found[JUMP - 1], *(found[JUMP + i] for i in AFTER)]
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in shown) + " |")


if __name__ == "__main__":
    main()
