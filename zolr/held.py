"""Held weights: weights that a run never writes, and the low-rank sum that it keeps beside them.

A weight is held because its numbers are coded (quantized), because they are not there between two uses (offloaded, or
sharded over ranks), or because the user wants an adapter. What closed windows have moved it by is a sum of products of thin factors, which
stays one such product.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.probes import row_blocks

PROBES = 64  # vectors that the size of a coded weight is estimated from; the error is about 1 / sqrt(64 m)

RANK = 64  # of the sum that is kept beside a held weight, unless said otherwise

_BITSANDBYTES = ("Linear8bitLt", "Linear4bit", "LinearNF4", "LinearFP4")


class Stack:
    """`U Vᵀ`: what closed windows have moved a weight `(m, n)` by, kept to a rank.

    Exact until the rank passes `cap`; then the part of smallest Frobenius norm is dropped (Eckart-Young), by QR of both
    factors and an SVD of the small core, without forming an `(m, n)` matrix.

    Args:
        shape: `(m, n)` of the weight.
        cap: rank at most.
        like: its device, and its dtype where that is wider than float32.

    Attributes:
        left: `U (m, k)`.
        right: `V (n, k)`.
        lost: squared Frobenius norm of all that was dropped, 0-dim.
    """

    def __init__(self, shape: tuple[int, ...], cap: int, like: Tensor) -> None:
        m, n = shape
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.cap = min(cap, m, n)
        self.left = torch.zeros(m, 0, dtype=dtype, device=like.device)
        self.right = torch.zeros(n, 0, dtype=dtype, device=like.device)
        self.lost = torch.zeros((), dtype=dtype, device=like.device)

    @property
    def rank(self) -> int:
        """Number of columns of both factors."""
        return self.left.shape[1]

    @property
    def energy(self) -> Tensor:
        """Squared Frobenius norm of the sum, 0-dim."""
        return ((self.left.mT @ self.left) * (self.right.mT @ self.right)).sum()

    def push(self, left: Tensor, right: Tensor) -> None:
        """Add `left @ right.T`, `(m, r)` and `(n, r)`."""
        self.left = torch.cat([self.left, left.to(self.left)], dim=1)
        self.right = torch.cat([self.right, right.to(self.right)], dim=1)
        if self.rank > self.cap:
            self._compress()

    def _compress(self) -> None:
        q, a = torch.linalg.qr(self.left)  # (m, k), (k, k)
        p, b = torch.linalg.qr(self.right)  # (n, k), (k, k)
        u, s, vh = torch.linalg.svd(a @ b.mT)
        root = s[: self.cap].sqrt()
        self.lost = self.lost + s[self.cap :].square().sum()
        self.left = q @ (u[:, : self.cap] * root)  # (m, cap)
        self.right = p @ (vh[: self.cap].mT * root)  # (n, cap)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name."""
        return {"left": self.left, "right": self.right, "lost": self.lost}

    def load(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Take over what `tensors` gave; None empties it."""
        if tensors is None:
            m, n = self.left.shape[0], self.right.shape[0]
            tensors = {"left": self.left.new_zeros(m, 0), "right": self.right.new_zeros(n, 0)}
            tensors |= {"lost": torch.zeros_like(self.lost)}
        self.left = tensors["left"].to(self.left, copy=True)
        self.right = tensors["right"].to(self.right, copy=True)
        self.lost = tensors["lost"].to(self.lost, copy=True)


class _Decoding(torch.autograd.Function):
    """`x @ W.T` of a coded weight whose derivative decodes it again, instead of keeping what forward decoded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.weight.dequantize().to(grads[0].dtype), None


def compute(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`plain(module, ...)`, the module's own forward, with as little kept for backward as there can be."""
    if torch.is_grad_enabled() and is_decoded(module) and len(args) == 1 and args[0].requires_grad:
        loose: Any = module
        out = _Decoding.apply(args[0], loose.weight)
        return out if loose.bias is None else out + loose.bias  # the bias may be trained
    return plain(module, *args, **kwargs)


def is_decoded(module: nn.Module) -> bool:
    """Whether torch's own linear map decodes the module's weight, and autograd would keep the result (torchao)."""
    cls = type(module.__dict__["_parameters"].get("weight"))
    # the usual one first: torch.compile cannot trace what comes after
    return cls is not nn.Parameter and cls.__module__.startswith("torchao.")


def is_packed(module: nn.Module, parameter: str) -> bool:
    """Whether the numbers of a weight are coded, so that only its module can compute with them.

    Covers the linear modules of bitsandbytes and tensors of torchao; both are known by name, so that neither package
    has to be there.
    """
    weight = module._parameters[parameter]
    if parameter != "weight" or weight is None:
        return False
    if _is_bitsandbytes(module):
        return not weight.is_floating_point()
    return is_decoded(module)


def _is_bitsandbytes(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__module__.startswith("bitsandbytes.") and cls.__name__ in _BITSANDBYTES


def is_sharded(weight: Any) -> bool:
    """Whether a weight is a piece on every rank (fully_shard), and whole only inside the forward of what it belongs to."""
    return type(weight).__name__ == "DTensor" and type(weight).__module__.startswith("torch.distributed.")


def shape_of(module: nn.Module, parameter: str) -> tuple[int, ...]:
    """Shape of a weight as a matrix; four-bit codes are stored as one column of bytes."""
    weight = module._parameters[parameter]
    assert weight is not None
    if is_packed(module, parameter):
        loose: Any = module
        return (loose.out_features, loose.in_features)
    return tuple(weight.shape)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its first name, as `shape_of`."""
    modules = dict(model.named_modules())
    places = ((name, name.rpartition(".")) for name, _ in model.named_parameters())
    return {name: shape_of(modules[owner], own) for name, (owner, _, own) in places}


def keep_codes(module: nn.Module) -> None:
    """Have a four-bit module keep its codes as they are.

    On CPUs with AVX512-BF16 bitsandbytes writes them in another order at the first evaluation and computes in
    bfloat16 without a derivative from then on.

    Raises:
        UsageError: that has happened.
    """
    if not hasattr(module, "support_avx512bf16_for_cpu"):
        return
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise UsageError(
            "the four-bit weights have been repacked for bfloat16 by an evaluation on this CPU, which cannot be trained "
            "through; load the model again and attach before evaluating it"
        )
    loose: Any = module
    loose.support_avx512bf16_for_cpu = False


def execution_device(module: nn.Module) -> torch.device | None:
    """Device that accelerate's hook brings a module's weights to for each use; None without such a hook."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


@contextmanager
def opened(module: nn.Module) -> Iterator[None]:
    """The module's weights are there inside, as in its forward, also when accelerate has them elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@torch.no_grad()
def stand_in(module: nn.Module, parameter: str, dtype: torch.dtype) -> nn.Parameter:
    """One number in the shape of a weight that cannot be read: its root mean square.

    Of coded weights it is estimated by the module's answer to normal vectors, `E‖W z‖² = ‖W‖²`.

    Args:
        dtype: of the result, where the weight's own says nothing about the numbers it stands for.
    """
    shape = shape_of(module, parameter)
    with opened(module):
        weight = module._parameters[parameter]
        assert weight is not None
        if is_packed(module, parameter):
            if weight.is_floating_point():
                dtype = weight.dtype
            z = Key(0).fold_in("size").normal((PROBES, shape[1]))
            z = torch.cat([z, torch.zeros(1, shape[1])]).to(weight.device, dtype)
            out = type(module).forward(module, z).float()
            size = ((out[:-1] - out[-1]).square().mean() / shape[1]).sqrt()
        elif is_sharded(weight):
            loose, dtype = weight, weight.dtype
            wide = torch.promote_types(dtype, torch.float32)
            size = (loose.to(wide).square().sum().full_tensor() / max(1, weight.numel())).sqrt()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            dtype = weight.dtype
            total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=weight.device)
            for rows in row_blocks(shape) if shape else ():
                total = total + weight[rows].to(total.dtype).square().sum()
            size = (total / max(1, weight.numel())).sqrt()
    return nn.Parameter(size.to(dtype).expand(shape), requires_grad=False)
