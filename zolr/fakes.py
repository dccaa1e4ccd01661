"""Fakes: torch's tensors without data, made in half the time where a step does the same thing again and again.

A model repeats its layers and a step its forward passes, so nearly every operation has been seen before, on tensors that
look the same. torch remembers results too, but describes each argument anew in two dozen fields before it looks one up;
that and the calls around it are most of what a predicted step costs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

# whose values say all there is to know
PLAIN = (
    type(None),
    bool,
    int,
    float,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class _Same(NamedTuple):
    """One of the arguments, as operations in place return it."""

    number: int


class _View(NamedTuple):
    """A view of one of the arguments."""

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Plain(NamedTuple):
    """No tensor."""

    value: Any


class _New(NamedTuple):
    """A tensor of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_Output = _Same | _View | _New | _Plain

_GROUPED = (
    getattr(torch.ops.aten._grouped_mm, "default", None) if hasattr(torch.ops.aten, "_grouped_mm") else None
)

# of draws with a generator and of those without: torch describes the first by running them, a hundred times as slow, and to
# numbers that are not there the generator means nothing
_DRAWN = {
    op.generator: op.default for op in (torch.ops.aten.randn, torch.ops.aten.rand, torch.ops.aten.randperm)
}

# what an operation returned for arguments of one look, and the type that several outputs come in
_known: dict[Any, tuple[type | None, list[_Output]]] = {}


def _counts() -> tuple[int, int]:
    """Results that torch took from its table, and those that it did not."""
    return FakeTensorMode.cache_hits, FakeTensorMode.cache_misses + sum(
        FakeTensorMode.cache_bypasses.values()
    )


class Fakes(FakeTensorMode):
    """A fake mode that knows what it has done before.

    What may be remembered is torch's to decide: a result goes into the table when torch itself takes it from its own.
    All that decides that result is in the key here too: the operation, and of each tensor shape, stride, type, device, flags and
    for views the offset, of all else the value.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default wraps every call and imports the compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or make again what it returned."""
        if func is _GROUPED and args[0].dtype != torch.bfloat16:
            made = self._grouped(*args, **(kwargs or {}))
            return self.dispatch(torch.ops.aten.new_empty.default, types, made[:2], {"dtype": made[2]})
        if func in _DRAWN:
            func = _DRAWN[func]
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
        key: list[Any] = [
            func,
            torch.get_default_dtype(),
            torch._C._get_default_device(),
            torch.is_inference_mode_enabled(),
        ]
        tensors: list[FakeTensor] = []
        kwargs = kwargs or {}
        views = getattr(func, "is_view", True)
        if not (self._look(args, key, tensors, views) and self._look(kwargs, key, tensors, views)):
            return self.dispatch(func, types, args, kwargs)
        looks = tuple(key)
        found = _known.get(looks)
        if found is not None:
            kind, outputs = found
            made = [self._made(output, tensors) for output in outputs]
            return made[0] if kind is None else kind(made)
        hits, others = _counts()
        out = self.dispatch(func, types, args, kwargs)
        several = type(out) in (tuple, list)
        # one from the table and nothing else: not that of an operation inside of one that is no part of it
        if _counts() == (hits + 1, others):
            every: Any = out if several else [out]
            seen = [self._seen(views, one, tensors) for one in every]
            outputs = [one for one in seen if one is not None]
            if len(outputs) == len(seen):
                _known[looks] = type(out) if several else None, outputs
        return out

    @staticmethod
    def _grouped(
        a: Tensor,
        b: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[int], torch.dtype]:
        """A tensor of the device of a product by groups, its shape and its type.

        torch computes such products in any type and describes them in bfloat16 alone. Groups are those of the first axis of what
        has three, or of the axis that two matrices share.
        """
        groups = (
            [len(offs)]
            if offs is not None and a.dim() == b.dim() == 2
            else [*a.shape[:-2], *b.shape[:-2]][:1]
        )
        shape = [*(groups if a.dim() == b.dim() else []), a.shape[-2], b.shape[-1]]
        return a, shape, out_dtype or a.dtype

    def _look(
        self,
        args: Sequence[Any] | Mapping[str, Any],
        key: list[Any],
        tensors: list[FakeTensor],
        views: bool,
    ) -> bool:
        """Write down what decides the result; False where something is met that is not known well enough."""
        if isinstance(args, Mapping):
            key.extend(args)
            args = list(args.values())
        for arg in args:
            kind = type(arg)
            if kind is FakeTensor:
                if arg.fake_mode is not self or arg.constant is not None or arg.layout is not torch.strided:
                    return False
                tensors.append(arg)
                key += (
                    arg.shape,
                    arg.stride(),
                    arg.storage_offset() if views else 0,
                    arg.dtype,
                    arg.fake_device,
                    arg.requires_grad,
                    arg.is_conj(),
                    arg.is_neg(),
                )
            elif kind in PLAIN:
                key += (kind, arg)  # 1 and 1.0 are equal, and give other types
            elif kind in (list, tuple):
                key += (kind, len(arg))
                if not self._look(arg, key, tensors, views):
                    return False
            else:
                return False
        return True

    def _seen(self, views: bool, out: Any, tensors: Sequence[FakeTensor]) -> _Output | None:
        """How an output can be made again; None where it is more than its look."""
        if type(out) in PLAIN:
            return _Plain(out)
        for number, tensor in enumerate(tensors):
            if out is tensor:
                return _Same(number)
        if type(out) is not FakeTensor or out.layout is not torch.strided or out.constant is not None:
            return None
        if out.requires_grad or out.is_conj() or out.is_neg():
            return None
        storage = out.untyped_storage()
        for number, tensor in enumerate(tensors):
            if tensor.untyped_storage()._cdata == storage._cdata:
                view = _View(
                    number, out.shape, out.stride(), int(out.storage_offset()), out.dtype, out.fake_device
                )
                return view if views else None
        new = _New(out.shape, out.stride(), out.dtype, out.fake_device)
        same = (
            out.storage_offset() == 0 and self._made(new, ()).untyped_storage().nbytes() == storage.nbytes()
        )
        return new if same else None

    def _made(self, output: _Output, tensors: Sequence[Tensor]) -> Any:
        if isinstance(output, _Same):
            return tensors[output.number]
        if isinstance(output, _Plain):
            return output.value
        empty = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        if isinstance(output, _View):
            of = tensors[output.number].untyped_storage()
            empty.set_(of, output.offset, output.shape, output.stride)  # pyright: ignore
        return FakeTensor(self, empty, output.device)
