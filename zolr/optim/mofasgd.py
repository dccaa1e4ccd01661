"""Momentum that exists only as its leading singular triples: MoFaSGD."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zolr.errors import UsageError, is_count
from zolr.factorizations import triples
from zolr.optim import Each
from zolr.probes import one_thread


class MomentumFactorizedSgd(Each):
    """`M = U diag(s) Vᵀ` of rank r, moved along its own tangent space; `p -= lr U Vᵀ`.

    `M <- SVD_r(beta M + U Uᵀ G + G V Vᵀ - U Uᵀ G V Vᵀ)`: what of a gradient lies outside of both spans is lost, the
    spans turn by what lies in one of them. The sum has rank 2 r at most and is decomposed by two thin QR and one SVD of
    `2 r` by `2 r`, so no second matrix of the gradient's size is made. The first gradient gives the first triples. The
    step has singular values 1, and 0 for triples that hold nothing but rounding; as torch's Muon does it to be as large as
    AdamW's, the rate is multiplied by `0.2 sqrt(max(m, n))`. What lies outside of both spans can be descended as it is:
    `p -= lr outside (I - U Uᵀ) G (I - V Vᵀ)`.

    Args:
        lr: learning rate.
        rank: r, at least 1; capped at the shorter side.
        beta: memory of the momentum, in [0, 1).
        adjust: multiply the rate so.
        outside: factor on the part of the gradient outside of both new spans (the paper's eta_2, with lr taken out); 0 leaves
            it out, as every published run does.
        released: the step of the released code, `p -= lr share U diag(min(limit, 1/s)) Vᵀ` with 0 for s below 1e-4, at the
            bare rate, and its start, whose first triples are those of the weight.
        share: see `released`.
        limit: see `released`.
        weight_decay: must be 0; decay is the engine's.

    Raises:
        UsageError: a rank or beta out of range, or a parameter that is no matrix.

    Reference: MoFaSGD arXiv 2507.08091.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        rank: int = 16,
        beta: float = 0.95,
        adjust: bool = True,
        outside: float = 0.0,
        released: bool = False,
        share: float = 0.25,
        limit: float = 5.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not is_count(rank):
            raise UsageError(f"rank {rank!r} is not possible; use a whole number of at least 1")
        if not 0 <= beta < 1:
            raise UsageError(f"beta = {beta} is no memory of a momentum; use a number in [0, 1)")
        if not 0 <= outside < float("inf"):
            raise UsageError(f"outside = {outside} is no factor on a gradient; use a number of at least 0")
        super().__init__(
            params,
            {
                "outside": outside,
                "lr": lr,
                "rank": rank,
                "beta": beta,
                "adjust": adjust,
                "released": released,
                "share": share,
                "limit": limit,
                "weight_decay": weight_decay,
            },
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise UsageError(
                        f"mofasgd factors matrices, not shape {tuple(p.shape)}; use adamw for it"
                    )

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if not p.numel():
            return
        state, rank = self.state[p], min(group["rank"], *p.shape)
        if state:
            factors = advanced(state["left"], state["values"], state["right"], gradient, group["beta"])
        elif group["released"]:
            factors = advanced(*triples(p, rank), gradient, group["beta"])
        else:
            factors = triples(gradient, rank)
        state.update(zip(("left", "values", "right"), factors, strict=True))
        left, values, right = factors
        if group["released"]:
            weights = group["share"] * values.reciprocal().clamp_max(group["limit"]) * (values > 1e-4)
        else:
            weights = (values > values[0] * max(p.shape) * torch.finfo(p.dtype).eps).to(p)
            weights *= 0.2 * max(p.shape) ** 0.5 if group["adjust"] else 1.0
        if group["outside"]:
            rest = gradient - left @ (left.mT @ gradient)
            p.sub_((rest - rest @ right @ right.mT).mul_(group["lr"] * group["outside"]))
        p.addmm_(left * weights, right.mT, alpha=-group["lr"])


@one_thread()
def advanced(
    left: Tensor, values: Tensor, right: Tensor, gradient: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The triples of `beta M` plus the part of the gradient in the tangent space of `M = left diag(values) rightᵀ`."""
    r = values.shape[0]
    seen, met = gradient @ right, gradient.mT @ left  # (m, r), (n, r)
    q, upper = torch.linalg.qr(torch.cat((left, seen), dim=1))  # (m, k), (k, 2r)
    p, lower = torch.linalg.qr(torch.cat((right, met), dim=1))  # (n, l), (l, 2r)
    eye = torch.eye(r, dtype=values.dtype, device=values.device)
    core = torch.cat(
        (
            torch.cat((beta * values.diag() - left.mT @ seen, eye), dim=1),
            torch.cat((eye, torch.zeros_like(eye)), dim=1),
        )
    )  # (2r, 2r)
    u, s, v = torch.linalg.svd(upper @ core @ lower.mT, full_matrices=False)
    return _copy(q @ u[:, :r]), _copy(s[:r]), _copy(p @ v.mT[:, :r])


def _copy(matrix: Tensor) -> Tensor:
    return matrix.clone(memory_format=torch.contiguous_format)
