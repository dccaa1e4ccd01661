"""Variable: one trained weight, its subspace and its coordinates; and how a model computes with them.

Attaching swaps the class of every module that uses a trained weight for a subclass that evaluates the weight at the
variable's current point. `detach` swaps it back. Names, keys, hooks and `deepcopy` are unaffected, and no weight is
written between folds.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from math import prod
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.prune import BasePruningMethod

from zolr import beside, merged
from zolr.errors import UsageError
from zolr.held import (
    RANK,
    Stack,
    compute,
    execution_device,
    is_decoded,
    is_packed,
    is_sharded,
    keep_codes,
    opened,
    shape_of,
    stand_in,
)
from zolr.keys import Key
from zolr.probes import BLOCK, Layout, Space, row_blocks
from zolr.rows import NotByRows
from zolr.subspaces import Coded, Full, Left, Right, Subspace, TwoSided, Viewed

Realization = Literal["auto", "side", "rebuild", "inplace"]
REALIZATIONS = ("auto", "side", "rebuild", "inplace")

# matrices that are trained whole and are together at most this share of the model are not worked on one by one
SMALL = 1 / 32

Shift = Tensor | Callable[[slice], Tensor]
Kind = Literal["linear", "conv1d", "embedding", "other"]

_BINDINGS = "_zolr_bindings"


@dataclass(frozen=True)
class Site:
    """One use of a weight.

    Args:
        module_name: dotted name of the module.
        module: the module; the weight is looked up through it at every use, since sharding replaces parameters.
        parameter: name of the parameter in the module.
        kind: how the module uses it.
    """

    module_name: str
    module: nn.Module
    parameter: str
    kind: Kind

    @property
    def name(self) -> str:
        """Dotted name of the parameter."""
        return f"{self.module_name}.{self.parameter}" if self.module_name else self.parameter

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as the module holds it now."""
        parameter = self.module._parameters[self.parameter]
        assert parameter is not None  # attach only binds parameters that exist
        return parameter


class Gathered:
    """Where the gradients of all micro-batches but the last go as they come, in place of a dense sum.

    Args:
        project: gradient `(m, n)` of the summed loss of a micro-batch, and the count of what is summed -> coordinates.
    """

    def __init__(self, project: Callable[[Tensor, Tensor | float], Tensor]) -> None:
        self.project = project
        self.total: Tensor | None = None

    @torch.no_grad()
    def add(self, gradient: Tensor, count: Tensor | float) -> None:
        """Take one gradient."""
        coords = self.project(gradient, count)
        self.total = coords if self.total is None else self.total + coords

    @torch.no_grad()
    def divide(self, count: Tensor | float) -> None:
        """Make the sum a mean."""
        self.total = None if self.total is None else self.total / count


class Variable:
    """One trained weight of a model.

    Attributes:
        name: dotted name of the parameter at its first site.
        sites: every module that uses the weight; a tied embedding and head are two sites of one variable.
        shape: `(m, n) = (out_features, in_features)`; a `Conv1D` weight is read transposed. Vectors keep their shape.
        subspace: the subspace of the current window.
        value: the coordinates that are trained, float32 (float64 for a float64 model). For a Full subspace of a
            float32 weight it shares the weight's memory; for a low-precision weight it is a float32 master.
        window: number of subspaces opened before this one.
        decay: product of `1 - lr * weight_decay` since the window began; it multiplies the weight in the forward.
        held: the weight is never written (see `zolr.held`): a fold goes to `stack`, and a Full value is a copy.
        stack: what a held matrix has been moved by in closed windows.
        steady: subspaces of one kind and size follow each other in the same memory.
        folds: a step may be folded into the weight at once, where that makes backprop cheaper (see `zolr.merged`).
        folding: the step at hand is to be.

    Args:
        sites: where the weight is used.
        realization: how a perturbation reaches it.
        held: never write the weight; one that cannot be read is held in any case.
        cap: rank of the stack of a held matrix at most.
        dtype: of the model's numbers, for a weight whose own dtype says nothing about them.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        realization: Realization = "auto",
        *,
        held: bool = False,
        cap: int = RANK,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sites = list(sites)
        self.name = self.sites[0].name
        self.transposed = any(site.kind == "conv1d" for site in self.sites)
        self.realization: Realization = realization
        self._stand_in: nn.Parameter | None = None
        if not all(_readable(site.module, site.parameter) for site in self.sites):
            self._stand_in = stand_in(self.sites[0].module, self.sites[0].parameter, dtype)
        self.held = held or self._stand_in is not None
        self.stack: Stack | None = None
        weight = self.weight
        self.shape = tuple(reversed(weight.shape)) if self.transposed else tuple(weight.shape)
        self._own_dtype = weight.dtype
        self.dtype = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32
        self.frozen_row = next(
            (
                s.module.padding_idx
                for s in self.sites
                if isinstance(s.module, nn.Embedding)
                and s.parameter == "weight"  # others that a subclass has are no tables
                and s.module.padding_idx is not None
            ),
            None,
        )
        self.window = -1
        self.decay = 1.0
        self.moved = False
        self.touched = False
        self.lent = False  # to who reads it past its module, see `as_read`
        self.watch: Callable[[Tensor], None] | None = None  # sees the inputs of every linear site
        self._point: Tensor | None = None
        self._rows: tuple[Callable[[slice], Tensor], float] | None = None
        self._plain = True
        self._value: nn.Parameter | None = None
        self._space: tuple[Subspace, Space] | None = None
        self.steady = False
        self.small = False  # beside the model: see `_mark_small`
        self.folds = self.folding = False
        self._offset: Callable[[], Tensor] | None = None
        self.steps_in: Subspace | None = (
            None  # where a dense method steps, which has no coordinates of its own here
        )
        self.gathered: Gathered | None = None  # of a dense method that accumulates in its coordinates
        if self.held and len(self.shape) == 2:
            m, n = self.shape
            self.stack = Stack((m, n), cap, weight.data)
            self.subspace: Subspace = Right(weight.new_zeros(n, 0), m)
            self.value = nn.Parameter(weight.new_zeros(m, 0, dtype=self.dtype), requires_grad=False)
            return
        self.subspace = Full(self.shape)

    @property
    def value(self) -> nn.Parameter:
        """The trained coordinates; a copy of a whole weight is made when it is first asked for."""
        if self._value is None:
            self._value = nn.Parameter(self._whole(), requires_grad=False)
        return self._value

    @value.setter
    def value(self, value: nn.Parameter) -> None:
        self._value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Variable":
        """A copy whose coordinates are the memory of its own weight, where they are that here."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ |= {name: copy.deepcopy(part, memo) for name, part in self.__dict__.items()}
        if self._value is not None and twin._value is not None and self.shares and not self.replaced:
            # that of the copied module, which is not there as a whole yet
            data = copy.deepcopy(self.weight, memo).data
            twin._value.data = data.t() if self.transposed else data
        return twin

    def __repr__(self) -> str:
        return (
            f"Variable({self.name}, {self.shape}, {type(self.subspace).__name__}{self.subspace.coords_shape})"
        )

    @property
    def weight(self) -> nn.Parameter:
        """The model's parameter; of one that cannot be read a stand-in of its shape, dtype, device and size."""
        return self.sites[0].weight if self._stand_in is None else self._stand_in

    def _whole(self) -> Tensor:
        """The weight, as a Full subspace trains it: its own memory, or a copy where it is held or of low precision."""
        if not self.held:
            data = self.weight.data.t() if self.transposed else self.weight.data
            return data if data.dtype == self.dtype else data.to(self.dtype)
        site = self.sites[0]
        with opened(site.module):
            loose: Any = site.weight
            data = loose.full_tensor() if is_sharded(loose) else loose.data
            return (data.t() if self.transposed else data).detach().to(self.dtype, copy=True)

    @property
    def is_full(self) -> bool:
        """Whether the coordinates are the weight itself."""
        return type(self.subspace) is Full

    @property
    def shares(self) -> bool:
        """Whether the coordinates are the weight's own memory."""
        return self.is_full and not self.held and self.weight.dtype == self.dtype

    @property
    def replaced(self) -> bool:
        """Whether the weight has another dtype or device now than the coordinates go with, or had their memory and has its own."""
        value, weight = self._value, self.weight
        if value is None or self.held:
            return False
        if weight.dtype != self._own_dtype or weight.device != value.device:
            return True
        if not self.is_full or value.dtype.itemsize < 4:
            return False
        here, there = weight.untyped_storage()._cdata, value.untyped_storage()._cdata
        return value.dtype == self._own_dtype and (weight.dtype != value.dtype or here != there)

    @property
    def offloaded(self) -> bool:
        """Whether the weight is away between two uses."""
        return any(site.weight.device.type == "meta" for site in self.sites)

    @property
    def sharded(self) -> bool:
        """Whether every rank has a piece of the weight."""
        return any(is_sharded(site.weight) for site in self.sites)

    @property
    def space(self) -> Space:
        """The coordinates as a space that probes are drawn in."""
        if self._space is None or self._space[0] is not self.subspace:  # asked for many times a step
            shape = self.subspace.coords_shape
            blocked = self.is_full and len(shape) > 1 and not self.small
            self._space = self.subspace, Space(self.name, shape, blocked)
        return self._space[1]

    # ---- windows -------------------------------------------------------------------------------------------------

    def open(self, subspace: Subspace) -> None:
        """Start a window: the coordinates are zero (Full: they are the weight).

        The caller folds the old window first.
        """
        shared = self.is_full
        self.subspace = self._settled(self.without_frozen_row(subspace))
        weight = self.weight
        if self.is_full:
            self.value = nn.Parameter(self._whole())
        elif not shared and self.value.shape == subspace.coords_shape:
            self.value.data.zero_()  # the same Parameter, so that optimizers keep knowing it
        else:
            self.value = nn.Parameter(weight.new_zeros(subspace.coords_shape, dtype=self.dtype))
        self.moved = False
        self.decay = 1.0
        self.window += 1

    def _settled(self, subspace: Subspace) -> Subspace:
        """The subspace, in the memory of the one before where the variable is steady and both are alike."""
        old = self.subspace
        if not self.steady or type(old) is not type(subspace) or self.is_full:
            return subspace
        before, after = old.tensors(), subspace.tensors()
        if any(before[name].shape != tensor.shape for name, tensor in after.items()):
            return subspace
        for name, tensor in after.items():
            before[name].copy_(tensor)
        loose: Any = old
        for name in set(vars(loose)) - {f.name for f in fields(loose)}:
            del loose.__dict__[name]  # what was worked out from the basis before
        return old

    @contextmanager
    def within(self, subspace: Subspace, again: Callable[[], Subspace] | None = None) -> Iterator[None]:
        """Another subspace around the stored weight inside the context, its coordinates at zero; nothing is folded.

        Args:
            again: draws the one that it has, which then takes no memory meanwhile.
        """
        before, value = self.subspace if again is None else None, self.value
        self.subspace = _widened(self.without_frozen_row(subspace), self.weight.dtype)
        if again is None or self.moved or value.shape != subspace.coords_shape:
            zeros = self.weight.new_zeros(subspace.coords_shape, dtype=self.dtype)
            self.value = nn.Parameter(zeros, requires_grad=False)
        del subspace
        try:
            yield
        finally:
            if before is None:
                assert again is not None
                before = self.without_frozen_row(again())
            self.subspace, self.value = before, value

    def without_frozen_row(self, subspace: Subspace) -> Subspace:
        """A basis of rows must not reach the padding row."""
        if self.frozen_row is None or isinstance(subspace, Full | Right | Viewed):
            return subspace
        if isinstance(subspace, Coded):
            plain = self.without_frozen_row(subspace.plain)
            # a code for 0 is exact; the basis stays as it is where no row of it is the padding's
            return Coded.of(plain, subspace.bits) if isinstance(plain, Left) else subspace
        basis = subspace.basis if isinstance(subspace, Left) else subspace.left  # type: ignore[union-attr]
        basis = basis.clone()
        basis[self.frozen_row] = 0
        if isinstance(subspace, Left):
            return Left(basis, subspace.n)
        assert isinstance(subspace, TwoSided)
        return TwoSided(basis, subspace.right)

    def mask(self, coords: Tensor, own: bool = False) -> Tensor:
        """Coordinates (a gradient or a shift) that leave the padding row of an embedding alone.

        Args:
            own: they may be overwritten.
        """
        if self.frozen_row is None or not isinstance(self.subspace, Full | Right | Viewed):
            return coords
        coords = coords if own else coords.clone()
        parts = self.subspace.parts if isinstance(self.subspace, Viewed) else 1
        coords[..., self.frozen_row * parts : (self.frozen_row + 1) * parts, :] = 0
        return coords

    @torch.no_grad()
    def fold(self, *, exact: bool = False, key: Key | None = None) -> None:
        """`W <- decay * W + lift(value)`, `value <- 0`; the model's output does not change.

        For a held weight, `stack <- stack + lift(value)`; what the stack's cap drops does change the output.

        Args:
            exact: accumulate in float64, one rank after the other, with one rounding at the end, so that the bits
                are the same on every machine (for forward-only runs); otherwise one matrix product.
            key: name of the rounding noise of a weight below float32, which is rounded stochastically.
        """
        if self.is_full:
            if self.weight.dtype != self.dtype:
                self.commit()
            return
        if not self.moved and self.decay == 1.0:
            return
        if self.stack is not None:
            left, right = _widened(self.subspace, self.dtype).outer(self.value.data)
            self.stack.push(left, right.mT)
            self.value.data.zero_()
            self.moved = False
            return
        weight = self.weight.data.t() if self.transposed else self.weight.data
        wide = torch.float64 if exact else self.dtype
        coords = self.value.data.to(wide)
        if not exact and weight.dtype == wide and isinstance(self.subspace, Right | Left):
            weight.addmm_(*_widened(self.subspace, wide).outer(coords), beta=self.decay)
            self.value.data.zero_()
            self.moved, self.decay = False, 1.0
            return
        for rows in row_blocks(self.shape):
            block = (weight[rows].to(wide) * self.decay).contiguous()  # Conv1D's are not
            if exact:
                _add_in_rank_order(block, self.subspace, coords, rows)
            else:
                block += _widened(self.subspace, wide).lift(coords, rows)
            low = weight.dtype.itemsize < 4
            seed = key.fold_in("rounding", self.name, rows.start) if low and key is not None else None
            weight[rows] = (
                _round_stochastically(block, weight.dtype, seed) if seed else block.to(weight.dtype)
            )
        self.value.data.zero_()
        self.moved = False
        self.decay = 1.0

    def commit(self) -> None:
        """Copy a float32 master of a Full subspace into its low-precision weight."""
        commit([self])

    # ---- evaluation ----------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether the point carries no tangent and no vmap axis, and is not that of another estimate's choice."""
        return self._plain and self._offset is None

    @property
    def redrawn(self) -> bool:
        """Whether a shift as large as the weight is drawn anew at every use."""
        return self._rows is not None

    @property
    def shifted_to(self) -> Tensor | None:
        """The point that a context has set, None outside of one."""
        return self._point

    @property
    def stacked(self) -> bool:
        """Whether a context has set several points, each for rows of its own (see `by_rows`)."""
        return self._point is not None and self._point.dim() > self.value.dim()

    @contextmanager
    def at(self, point: Tensor, *, plain: bool = True) -> Iterator[None]:
        """Evaluate the model with the coordinates at `point` inside the context.

        Args:
            point: tensor of coords_shape; may carry a tangent or a vmap axis, then `plain` must be False. With one more axis
                in front, several points for as many equal parts of the rows.
        """
        before = self._point, self._rows, self._plain
        self._point, self._rows, self._plain = point, None, plain
        try:
            yield
        finally:
            self._point, self._rows, self._plain = before

    @contextmanager
    def shifted(self, shift: Shift, scale: float | Tensor = 1.0, *, plain: bool = True) -> Iterator[None]:
        """Evaluate the model at `value + scale * shift` inside the context; `value` is never written.

        Args:
            shift: tensor of coords_shape, or (Full only) a function of a block of rows for spaces as large as a
                weight, called again at every use.
            scale: number, or a 0-dim tensor under vmap (then `plain` must be False).
        """
        if self.realization == "inplace":
            with self._walked(shift, scale):
                yield
        elif isinstance(shift, Tensor):
            with self.at(self.value.detach() + scale * self.mask(shift), plain=plain):
                yield
        elif not plain:
            with self.at(self.value.detach() + scale * self.mask(shift(slice(None))), plain=False):
                yield
        else:
            assert not isinstance(scale, Tensor)
            before = self._point, self._rows, self._plain
            self._point, self._rows, self._plain = None, (shift, scale), True
            try:
                yield
            finally:
                self._point, self._rows, self._plain = before

    @contextmanager
    def offset_by(self, offset: Callable[[], Tensor]) -> Iterator[None]:
        """Have every evaluation inside the context moved by `offset()`, on top of `at` and `shifted`; `value` stays.

        The gradient in `value` is then that at the moved point. The context has to span the backward pass: activation
        checkpoints run the forward again in it.

        Args:
            offset: gives a tensor of coords_shape, the same one at every call; called again at every use, so that what
                is as large as a weight need not be kept.
        """
        before, self._offset = self._offset, offset
        try:
            yield
        finally:
            self._offset = before

    @torch.no_grad()
    def _displacement(self) -> Tensor:
        assert self._offset is not None
        return self.mask(self._offset().to(self.value))

    @contextmanager
    def _walked(self, shift: Shift, scale: float | Tensor) -> Iterator[None]:
        """MeZO's in-place walk as published: the weight itself is moved and moved back, with its rounding drift."""
        self._walk(shift, float(scale))
        try:
            yield
        finally:
            self._walk(shift, -float(scale))

    @torch.no_grad()
    def _walk(self, shift: Shift, scale: float) -> None:
        weight = self.weight.data.t() if self.transposed else self.weight.data
        if not self.shape:
            weight += scale * shift if isinstance(shift, Tensor) else 0
            return
        scale = (
            scale / self.decay
        )  # the forward multiplies the weight, and what is walked with it, by the decay
        for rows in row_blocks(self.shape):
            if self.is_full:
                part = shift[rows] if isinstance(shift, Tensor) else shift(rows)
            else:
                assert isinstance(shift, Tensor)
                part = self.subspace.lift(self.mask(shift).to(weight.dtype), rows)
            if self.is_full and self.frozen_row is not None and rows.start <= self.frozen_row < rows.stop:
                part = part.clone()
                part[self.frozen_row - rows.start] = 0
            weight[rows].add_(scale * part.to(weight.dtype))

    def point(self) -> Tensor | None:
        """Coordinates to evaluate at, or None when the stored weight alone is the answer."""
        point = self._center()
        if self._offset is None:
            return point
        if point is None and self.is_full:
            point = (self.weight.t() if self.transposed else self.weight).detach().to(self.dtype)
        return self._displacement() if point is None else point + self._displacement()

    def _center(self) -> Tensor | None:
        """The point without an offset."""
        if self._point is not None:
            return self._point
        if torch.is_grad_enabled():
            return self.value
        return self.value if self.held or (self.moved and not self.is_full) else None

    def moved_by(self) -> tuple[Tensor, Tensor]:
        """`(left, right)`, `(m, k)` and `(n, k)`: the held matrix has been moved by `left @ right.T` in all windows."""
        assert self.stack is not None
        left, right = self.stack.left, self.stack.right
        if self.moved:
            live = _widened(self.subspace, self.dtype).outer(self.value.detach())
            left = torch.cat([left, live[0].to(left)], dim=1)
            right = torch.cat([right, live[1].mT.to(right)], dim=1)
        return left, right

    def dense(self, point: Tensor | None) -> Tensor | None:
        """The weight as the module should see it now, or None when the stored one is right."""
        if self._rows is not None:
            shift, scale = self._rows
            weight = self.weight.detach().clone()
            oriented = weight.t() if self.transposed else weight
            for rows in row_blocks(self.shape):
                part = shift(rows)
                if self.frozen_row is not None and rows.start <= self.frozen_row < rows.stop:
                    part = part.clone()
                    part[self.frozen_row - rows.start] = 0
                oriented[rows].add_(part, alpha=scale)  # rounded once, also where the weight is narrower
            if self._offset is not None:
                oriented += self._displacement().to(weight.dtype)
            return weight
        if point is None:
            return None if self.decay == 1.0 else self.weight * self.decay
        if self.stacked:
            raise NotByRows(f"{self.name} is not trained beside a product with its stored weight")
        weight = self.weight
        stack = self.stack
        if self.is_full:
            oriented = point.to(weight.dtype)
        elif self._plain and not torch.is_grad_enabled():
            oriented = self._rebuilt(weight.t() if self.transposed else weight, point.to(weight.dtype))
            if stack is not None:
                oriented.addmm_(stack.left.to(weight.dtype), stack.right.mT.to(weight.dtype))
        else:
            oriented = (weight.t() if self.transposed else weight) * self.decay
            oriented = oriented + self.subspace.lift(point.to(weight.dtype))
            if stack is not None:
                oriented = oriented + (stack.left @ stack.right.mT).to(weight.dtype)
        return oriented.t() if self.transposed else oriented

    @torch.no_grad()
    def live(self) -> Tensor | None:
        """The weight that the model computes with, as a tensor of its own; None where the stored one is that, or is all there is
        to see of it: held weights, and pieces of sharded ones."""
        dense = None if self.held or self.sharded else self.dense(self.point())
        return None if dense is None else dense.contiguous()

    @torch.no_grad()
    def settle(self) -> None:
        """Take the stored weight, which has been written by somebody else, for all there is: nothing moves it any more."""
        if self.held or self.sharded or self._value is None:
            return
        if not self.is_full:
            self._value.zero_()
        elif not self.shares and not self.replaced:
            self._value.copy_(self._whole())
        self.moved, self.decay = False, 1.0

    def _rebuilt(self, weight: Tensor, coords: Tensor) -> Tensor:
        """`decay * W + lift(coords)` in a fresh tensor, with no second one of that size beside it."""
        return torch.addmm(weight, *self.subspace.outer(coords), beta=self.decay)

    def prefers_side(self, kind: Kind, tokens: int) -> bool:
        """Whether the side path is the cheaper way to this site.

        Without autograd, rebuilding the weight moves `2 m n` numbers and the side path `tokens (n + 2 m)`. With
        autograd the side path always wins: it saves `x P` only.
        """
        if self.is_full or kind == "other" or self.realization == "rebuild":
            return False
        if (
            self._stand_in is not None
            or self.realization == "side"
            or kind == "embedding"
            or torch.is_grad_enabled()
            or not self._plain
            or self.stacked
        ):
            return True
        m, n = self.shape
        # a rebuilt copy must also stay below the activations that the module makes anyway, or it would set the peak
        return tokens * (n + 2 * m) < 2 * m * n or m * n > tokens * m

    def merges(self, module: nn.Module, kind: Kind, x: Tensor, point: Tensor) -> bool:
        """Whether backprop to this site is cheaper through a weight that is put together (see `zolr.merged`).

        Only in full precision: a weight that is rounded after it was put together may lose what the coordinates add.
        """
        if self.realization != "auto" or not self._by_hand(kind, x):
            return False
        kinds = {x.dtype, point.dtype, self.weight.dtype, getattr(self.subspace, "basis", x).dtype}
        if not (kinds <= {torch.float32} or kinds <= {torch.float64}):
            return False
        return module.__dict__.get("weight") is None and merged.pays(self.subspace, _tokens(x), self.folds)

    def goes_beside(self, module: nn.Module, kind: Kind, x: Tensor) -> bool:
        """Whether backprop to this site is written by hand (see `zolr.beside`): where all is of one type and plain."""
        if not self._plain or not self._by_hand(kind, x):
            return False
        loose: Any = module
        kinds = {x.dtype, loose.weight.dtype, x.dtype if loose.bias is None else loose.bias.dtype}
        return len(kinds) == 1 and beside.covers(self.subspace) and not is_packed(module, "weight")

    def _by_hand(self, kind: Kind, x: Tensor) -> bool:
        """Whether a backward pass that is written by hand may stand for this site's at all."""
        if not torch.is_grad_enabled() or kind != "linear" or self.held:
            return False
        return not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()


def _widened(subspace: Subspace, dtype: torch.dtype) -> Subspace:
    """The subspace with its basis in `dtype`."""
    if isinstance(subspace, Right):
        return Right(subspace.basis.to(dtype), subspace.m)
    if isinstance(subspace, Left):
        return Left(subspace.basis.to(dtype), subspace.n)
    if isinstance(subspace, TwoSided):
        return TwoSided(subspace.left.to(dtype), subspace.right.to(dtype))
    if isinstance(subspace, Viewed):
        return Viewed(subspace.basis.to(dtype), subspace.m, subspace.parts)
    if isinstance(subspace, Coded):
        return _widened(subspace.plain, dtype)
    return subspace


def _add_in_rank_order(block: Tensor, subspace: Subspace, coords: Tensor, rows: slice) -> None:
    """`block += lift(coords)[rows]` in float64, one rank at a time.

    A product of two float32 numbers is exact in float64, so a fused multiply-add gives the same bits as a separate
    multiply and add: the result does not depend on the machine.
    """
    if isinstance(subspace, TwoSided):
        inner = torch.zeros(
            coords.shape[0], subspace.right.shape[0], dtype=coords.dtype, device=coords.device
        )
        for j in range(coords.shape[1]):
            inner.addcmul_(coords[:, j : j + 1], subspace.right[:, j].to(coords.dtype))
        if subspace.right.dtype != torch.float64:
            inner = inner.float().to(coords.dtype)  # short enough for the next products to be exact
        left, right = subspace.left[rows].to(coords.dtype), inner
    elif isinstance(subspace, Right):
        left, right = coords[rows], subspace.basis.to(coords.dtype).mT
    elif isinstance(subspace, Viewed):
        left, right = subspace.by_row(coords)[rows].flatten(0, 1), subspace.basis.to(coords.dtype).mT
    else:
        assert isinstance(subspace, Left)
        left, right = subspace.basis[rows].to(coords.dtype), coords
    if isinstance(subspace, Viewed):
        block = block.view(-1, right.shape[1])
    for j in range(left.shape[1]):
        block.addcmul_(left[:, j : j + 1], right[j])


def _round_stochastically(block: Tensor, dtype: torch.dtype, key: Key) -> Tensor:
    """Round up or down with the probabilities that keep the mean; the noise has a name."""
    down = block.to(dtype)
    step = torch.where(down.to(block.dtype) > block, -1.0, 1.0)
    up = (
        torch.nextafter(down, (down + step * float("inf")).to(dtype))
        if dtype.itemsize >= 4
        else _neighbor(down, step)
    )
    gap = up.to(block.dtype) - down.to(block.dtype)
    share = torch.where(gap == 0, torch.zeros_like(block), (block - down.to(block.dtype)) / gap)
    noise = key.uniform(block.shape).to(block)
    return torch.where(noise < share, up, down)


def _neighbor(x: Tensor, direction: Tensor) -> Tensor:
    """The next 16-bit float above (direction > 0) or below x."""
    bits = x.view(torch.int16)
    away = (x > 0) == (direction > 0)
    moved = torch.where(away, bits + 1, bits - 1).view(x.dtype)
    tiny = torch.ones_like(bits).view(x.dtype)  # smallest positive subnormal
    return torch.where(x == 0, torch.where(direction > 0, tiny, -tiny), moved)


class _Narrow(torch.autograd.Function):
    """Tensors in other types, all in one call there and one back."""

    @staticmethod
    def forward(ctx: Any, kinds: Sequence[torch.dtype], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds = [value.dtype for value in values]
        return tuple(_cast(values, kinds))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        cast = _cast([grad for _, grad in found], [ctx.kinds[i] for i, _ in found])
        result: list[Tensor | None] = [None] * (1 + len(grads))
        for (i, _), grad in zip(found, cast, strict=True):
            result[1 + i] = grad
        return tuple(result)


def _cast(tensors: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> list[Tensor]:
    result = [torch.empty_like(tensor, dtype=kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    if result:
        torch._foreach_copy_(result, list(tensors))  # pyright: ignore
    return result


def narrow(variables: Sequence[Variable], values: Sequence[Tensor]) -> list[Tensor]:
    """The values in the types that weights are computed with, differentiable; rounded once for a whole pass.

    On a GPU a cast of each value and of each gradient, a launch each, costs more than the products in the coordinates.
    Gradients come back in the values' own type, at the end of the backward pass. As they are left those whose gradients would be
    large, or would be added up in the narrow type.
    """
    chosen = [
        i
        for i, (variable, value) in enumerate(zip(variables, values, strict=True))
        if variable.weight.dtype.itemsize < value.dtype.itemsize
        and value.requires_grad
        and not (variable.space.blocked or len(variable.sites) > 1)
    ]
    result = list(values)
    if chosen:
        points = _Narrow.apply([variables[i].weight.dtype for i in chosen], *(values[i] for i in chosen))
        for i, point in zip(chosen, points, strict=True):
            result[i] = point
    return result


@contextmanager
def narrowed(variables: Sequence[Variable]) -> Iterator[None]:
    """Evaluate the model at its values, see `narrow`; not where a recording reads their memory, which does that for itself."""
    here = [v for v in variables if v.plain and v.shifted_to is None and not (v.steady or v.redrawn)]
    try:
        for variable, point in zip(here, narrow(here, [v.value for v in here]), strict=True):
            if point is not variable.value:
                variable._point = point
        yield
    finally:
        for variable in here:
            variable._point = None


class Variables(list[Variable]):
    """The variables of one run, with the layout of a flat draw over them, built once for given shapes."""

    _built: tuple[tuple[Space, ...], Layout] | None = None

    def layout(self) -> Layout:
        """The layout of one flat draw over all variables."""
        spaces = tuple(v.space for v in self)
        if self._built is None or self._built[0] != spaces:
            self._built = spaces, Layout(spaces, self[0].weight.device)
        return self._built[1]


# ---- attaching ------------------------------------------------------------------------------------------------------


def _kind(module: nn.Module, parameter: str) -> Kind:
    """How a module uses a parameter; subclasses of the known types may do anything, so only exact types count."""
    if parameter == "weight":
        cls = type(module)
        if [base.__name__ for base in cls.__bases__[:1]] == [
            "FSDPModule"
        ]:  # what fully_shard makes of a class
            cls = cls.__bases__[1]
        if cls is nn.Linear or is_packed(module, parameter):
            return "linear"
        if isinstance(module, nn.Embedding) and cls is nn.Embedding:
            usual = module.max_norm is None and not (module.sparse or module.scale_grad_by_freq)
            return "embedding" if usual else "other"
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return "conv1d"
    return "other"


@contextmanager
def _shadowed(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let the module read `tensors` instead of its parameters of the same names.

    The instance dictionary is looked up before `nn.Module.__getattr__` finds a parameter; the parameter itself stays
    registered and untouched.
    """
    try:
        for name, tensor in tensors.items():
            module.__dict__[name] = tensor
        yield
    finally:
        for name in tensors:
            module.__dict__.pop(name, None)


def _tokens(x: Any) -> int:
    return x.numel() // max(1, x.shape[-1]) if isinstance(x, Tensor) and x.dim() else 1


@cache
def _attached(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` that evaluates its bound weights at their variables' points."""
    around = _around(cls)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors: dict[str, Tensor] | None = None
        side: tuple[Variable, Kind, Tensor | None] | None = None
        bindings: dict[str, tuple[Variable, Kind]] = self.__dict__[_BINDINGS]
        for name, (variable, kind) in bindings.items():
            variable.touched = True
            if variable.watch is not None and (kind in ("linear", "conv1d") or isinstance(self, nn.Linear)):
                inputs = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(inputs, Tensor) and inputs.shape[-1:] == (variable.shape[1],):
                    variable.watch(inputs)
            point = variable.point()
            if variable._rows is None and args and variable.prefers_side(kind, _tokens(args[0])):
                side = variable, kind, point
            else:
                dense = variable.dense(point)
                if dense is not None:
                    tensors = tensors or {}
                    tensors[name] = dense
        run = partial(compute, self, cls.forward) if side is None else partial(_with_side, cls, self, side)
        if tensors is None and around is None:
            return run(*args, **kwargs)
        with _shadowed(self, tensors or {}), nullcontext() if around is None else around(self):
            return run(*args, **kwargs)

    # a state of the model is that of the weights it computes with, and loading one makes it compute with those

    def save(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        cls._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, (variable, _) in self.__dict__[_BINDINGS].items():
            if prefix + name in destination and (live := variable.live()) is not None:
                destination[prefix + name] = live

    def load(self: Any, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
        cls._load_from_state_dict(self, state, prefix, *others)  # pyright: ignore[reportArgumentType]
        for name, (variable, _) in self.__dict__[_BINDINGS].items():
            if prefix + name in state:
                variable.settle()

    own = {"_save_to_state_dict": save, "_load_from_state_dict": load, "_zolr_original": cls}
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, **own})


def _around(cls: type[nn.Module]) -> Callable[[Any], AbstractContextManager[None]] | None:
    """What the forward of a module of torch has to run in that reads weights of its parts past them; None for all others."""
    if cls is nn.MultiheadAttention:
        return lambda module: as_read(module.out_proj)
    if issubclass(cls, nn.TransformerEncoder | nn.TransformerEncoderLayer):
        return _part_by_part
    return None


@contextmanager
def _part_by_part(_: nn.Module) -> Iterator[None]:
    """Keep encoder layers from the kernel that takes all of their weights at once, in evaluation without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _with_side(
    cls: type[nn.Module],
    module: nn.Module,
    side: tuple[Variable, Kind, Tensor | None],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Output of a linear or embedding module plus the side path of its variable."""
    variable, kind, point = side
    decay = variable.decay
    if variable.stacked:
        if kind == "embedding":
            raise NotByRows(f"{variable.name} is looked up by row")
        plain = lambda x: compute(module, cls.forward, x, *args, **kwargs)  # noqa: E731
        return _rows_beside(plain, variable, x, cast(Tensor, point))
    if kind == "embedding":
        out = cls.forward(module, x, *args, **kwargs)
        out = out if decay == 1.0 else out * decay
        if point is None:
            return out
        ids = x.flatten()
        rows = variable.subspace.lift(point.to(out.dtype), ids)
        if variable.stack is not None:
            rows = rows + (variable.stack.left[ids] @ variable.stack.right.mT).to(out.dtype)
        rows = rows.reshape(out.shape)
        in_place = variable._plain and not torch.is_grad_enabled()
        return out.add_(rows) if in_place else out + rows
    if point is not None and not args and not kwargs and variable.merges(module, kind, x, point):
        subspace: Any = variable.subspace
        # what is recorded once has to hold when the coordinates have moved
        still = point is variable.value and not variable.moved and not variable.steady
        out = merged.linear(x, variable.weight, decay, subspace, point, still)
        variable.folding = variable.folds
        loose: Any = module
        return out if loose.bias is None else out + loose.bias
    if point is not None and not args and not kwargs and variable.goes_beside(module, kind, x):
        widened: Any = _widened(variable.subspace, x.dtype)
        loose: Any = module
        return beside.linear(x, loose.weight, loose.bias, decay, widened, point.to(x.dtype))
    # W (decay x) + bias: the decay multiplies the weight and not the bias
    out = compute(module, cls.forward, x if decay == 1.0 else x * decay, *args, **kwargs)
    if point is None:
        return out
    stack = variable.stack
    if variable._plain and not torch.is_grad_enabled() and out.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if stack is None:
            factors = variable.subspace.factors(rows, _as(point, x.dtype))
        else:  # one product for the window and the stack: they read x and write out once
            live = _widened(variable.subspace, x.dtype).outer(point.to(x.dtype))
            left = torch.cat([live[0], stack.left.to(x.dtype)], dim=1)  # (m, r + k)
            factors = rows @ torch.cat([live[1].mT, stack.right.to(x.dtype)], dim=1), left.mT
        assert factors is not None  # Full subspaces never take the side path
        # under autocast the output is narrower than the factors, and in-place products do not cast
        out.view(-1, out.shape[-1]).addmm_(_as(factors[0], out.dtype), _as(factors[1], out.dtype))
        return out
    if stack is None:
        return out + variable.subspace.apply(x, point.to(x.dtype))
    # apart from the window's product: autograd saves the inputs of that one alone
    out = out + _widened(variable.subspace, x.dtype).apply(x, point.to(x.dtype))
    return out + (x @ stack.right.to(x.dtype)) @ stack.left.mT.to(x.dtype)


def _rows_beside(plain: Callable[[Tensor], Tensor], variable: Variable, x: Tensor, points: Tensor) -> Tensor:
    """Output of a linear module plus the side path of its variable, at one point for each of equal parts of the rows.

    Args:
        plain: the module itself.
        x: `(k b, ..., n)`, the rows of `k` parts behind each other.
        points: `(k, *coords_shape)`.
    """
    # without an axis between, rows may be those that the model has picked for this module, as many of each part or not
    if x.dim() < 3 or len(x) % len(points):
        raise NotByRows(
            f"the inputs {tuple(x.shape)} of {variable.name} do not say which rows they belong to"
        )
    subspace = variable.subspace
    if not isinstance(subspace, Right | Left | TwoSided):
        raise NotByRows(f"{variable.name} has coordinates in a {type(subspace).__name__.lower()} subspace")
    out = plain(x if variable.decay == 1.0 else x * variable.decay)
    if not out.is_contiguous():
        raise NotByRows(f"the output of {variable.name} is a view")
    parts = x.reshape(len(points), -1, x.shape[-1])
    inner, outer = (_as(factor, out.dtype) for factor in subspace.factors(parts, _as(points, x.dtype)))
    out.view(len(points), -1, out.shape[-1]).baddbmm_(inner, outer.expand(len(points), -1, -1))
    if variable.stack is not None:
        left, right = variable.stack.left.to(x.dtype), variable.stack.right.to(x.dtype)
        seen = x.reshape(-1, x.shape[-1]) @ right
        out.view(-1, out.shape[-1]).addmm_(_as(seen, out.dtype), _as(left.mT, out.dtype))
    return out


@contextmanager
def as_read(module: nn.Module) -> Iterator[None]:
    """Have a module's trained weights read as they are evaluated, by who does not go through its forward."""
    tensors: dict[str, Tensor] = {}
    bindings: dict[str, tuple[Variable, Kind]] = module.__dict__.get(_BINDINGS, {})
    for name, (variable, _) in bindings.items():
        variable.touched = variable.lent = True
        dense = variable.dense(variable.point())
        if dense is not None:
            tensors[name] = dense
    try:
        with _shadowed(module, tensors):
            yield
    finally:
        for variable, _ in bindings.values():
            variable.lent = False


def multiplied_with(module: nn.Module) -> Tensor | None:
    """The matrix `W` for which a module gives `x Wᵀ` now and does nothing else, for who takes gradients of it by hand.

    None where it adds a bias or a path beside, is of another type, or is watched by hooks.
    """
    cls = getattr(type(module), "_zolr_original", type(module))
    loose: Any = module
    hooks = (loose._forward_hooks, loose._forward_pre_hooks, loose._backward_hooks, loose._backward_pre_hooks)
    if cls is not nn.Linear or module.bias is not None or "forward" in module.__dict__ or any(hooks):
        return None
    bindings: dict[str, tuple[Variable, Kind]] = module.__dict__.get(_BINDINGS, {})
    if "weight" not in bindings:
        return None if is_packed(module, "weight") or is_sharded(loose.weight) else loose.weight
    variable, _ = bindings["weight"]
    if not variable.is_full or variable.held or not variable.plain or variable.watch is not None:
        return None
    variable.touched = True
    dense = variable.dense(variable.point())
    return loose.weight if dense is None else dense


def _readable(module: nn.Module, parameter: str) -> bool:
    """Whether the numbers of a weight are there, and are what the module computes with."""
    weight = module._parameters[parameter]
    if weight is None or is_packed(module, parameter) or is_sharded(weight):
        return False
    return weight.device.type != "meta"


def binds(module: Any, variable: Variable) -> bool:
    """Whether something is a module that computes with a variable."""
    bindings = module.__dict__.get(_BINDINGS, {}) if isinstance(module, nn.Module) else {}
    return any(bound is variable for bound, _ in bindings.values())


def is_attached(model: nn.Module) -> bool:
    """Whether some module computes with the variables of a run."""
    return any(_BINDINGS in module.__dict__ for module in model.modules())


def attach(
    model: nn.Module,
    select: Callable[[str, nn.Parameter], bool],
    realization: Realization = "auto",
    *,
    hold: Callable[[str, nn.Parameter], bool] | bool = False,
    cap: int = RANK,
) -> Variables:
    """Make variables of the selected weights of a model and let the model compute with them.

    Every use of a selected parameter becomes a site of the same variable. All parameters of the model stop requiring
    gradients (gradients are taken in the variables' values); `detach` restores that.

    Args:
        select: of a parameter's first name and the parameter, whether to train it.
        realization: how a perturbation reaches a weight; "auto" picks per site by the bytes moved.
        hold: of a parameter's first name and the parameter, whether never to write it (see `zolr.held`); quantized
            and offloaded weights are held in any case.
        cap: rank of what is kept beside a held matrix at most.

    Raises:
        UsageError: nothing selected, a model attached already, an unknown realization, or a weight that it, or the
            module it is in, does not allow.
    """
    if realization not in REALIZATIONS:
        raise UsageError(f"realization '{realization}' is not known; use one of {', '.join(REALIZATIONS)}")
    sites: dict[int, list[Site]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    tied = _tied_while_away(model)
    for module_name, module in model.named_modules():
        if _BINDINGS in module.__dict__:
            raise UsageError(f"module '{module_name}' is attached to a run already; detach that run first")
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            code = tied.get(full_name, id(parameter))
            first.setdefault(code, (full_name, parameter))
            sites.setdefault(code, []).append(Site(module_name, module, name, _kind(module, name)))
    trained = {
        code: sites[code]
        for code, (name, p) in first.items()
        if (
            p.is_floating_point()
            or p.is_complex()
            or is_packed(sites[code][0].module, sites[code][0].parameter)
        )
        and p.numel()  # a layer without outputs has nothing to train
        and select(name, p)
    }
    for code, group in trained.items():
        _check_trainable(*first[code], group)
    chosen = list(trained.values())
    if not chosen:
        raise UsageError(
            "no weight of the model is selected for training (a head that is tied to an embedding counts as one); widen the "
            "selection (select='all', --train all)"
        )
    dtype = next((p.dtype for _, p in first.values() if p.is_floating_point()), torch.float32)
    held = [hold if isinstance(hold, bool) else hold(*first[code]) for code in trained]
    for group, wanted in zip(chosen, held, strict=True):
        _check_held(group, realization, wanted)
    variables = [
        Variable(group, realization, held=wanted, cap=cap, dtype=dtype)
        for group, wanted in zip(chosen, held, strict=True)
    ]
    _mark_small(variables, sum(parameter.numel() for _, parameter in first.values()))
    for variable in variables:
        for site in variable.sites:
            module = site.module
            if _BINDINGS not in module.__dict__:
                module.__dict__[_BINDINGS] = {}
                _become(module, _attached(type(module)))
            module.__dict__[_BINDINGS][site.parameter] = (variable, site.kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if _BINDINGS in module.__dict__:
            continue
        # not trained, but in the way of backward, or reads what is trained in its parts
        if is_decoded(module) or (_around(type(module)) is not None and is_attached(module)):
            module.__dict__[_BINDINGS] = {}
            _become(module, _attached(type(module)))
    return Variables(variables)


def _mark_small(variables: Sequence[Variable], entries: int) -> None:
    """Say which matrices are so small beside the model, all together, that a direction over them may be drawn and applied whole.

    A draw for each of them, at every use anew, would cost many times as many calls as the forward pass itself: adapters are
    hundreds of such matrices.

    Args:
        entries: of all weights of the model.
    """
    left = entries * SMALL
    for variable in sorted(variables, key=lambda variable: prod(variable.shape)):
        left -= prod(variable.shape)
        variable.small = left >= 0 and prod(variable.shape) <= BLOCK // 4


def _check_trainable(name: str, parameter: nn.Parameter, sites: Sequence[Site]) -> None:
    """Refuse what would be trained by nobody, without a word."""
    if parameter.is_complex():
        raise UsageError(
            f"weight '{name}' is complex, which no method here trains; leave it out with a narrower selection, or make it of two "
            "real ones"
        )
    for site in sites:
        for hook in site.module._forward_pre_hooks.values():
            kind = type(hook).__name__
            if kind in ("WeightNorm", "SpectralNorm") and type(hook).__module__.startswith("torch.nn.utils."):
                raise UsageError(
                    f"{kind} of torch.nn.utils puts weight '{name}' to use before the forward of its module, where nothing moves it; "
                    "use torch.nn.utils.parametrizations, which does not"
                )
            if isinstance(hook, BasePruningMethod):
                raise UsageError(
                    f"pruning ({kind}) puts weight '{name}' to use before the forward of its module, where nothing moves it; make it "
                    "lasting by torch.nn.utils.prune.remove, or mask by a parametrization"
                )


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module, also below a hook of accelerate, which keeps the forward that it calls."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = MethodType(cls.forward, module)


def _tied_while_away(model: nn.Module) -> dict[str, int]:
    """Identities of weights that transformers ties: offloaded ones are no longer the same object in both places."""
    names: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: id(parameters[source])
        for name, source in names.items()
        if name in parameters and source in parameters and parameters[name].device.type == "meta"
    }


def _check_held(sites: Sequence[Site], realization: Realization, wanted: bool) -> None:
    """Refuse what a weight that is not written, or cannot be read, does not allow."""
    name, places = sites[0].name, [(site.module, site.parameter) for site in sites]
    readable = all(_readable(*place) for place in places)
    if readable and not wanted:
        return
    away = "is sharded" if is_sharded(sites[0].weight) else "is offloaded"
    why = "is held" if readable else "is quantized" if is_packed(*places[0]) else away
    if realization == "inplace" or (realization == "rebuild" and not readable):
        raise UsageError(
            f"weight '{name}' {why}, so realization '{realization}' cannot reach it; use 'auto' or 'side'"
        )
    dims = len(shape_of(*places[0]))
    if (not readable and dims > 1 and any(site.kind == "other" for site in sites)) or dims > 2:
        raise UsageError(
            f"weight '{name}' {why}, and what {type(sites[0].module).__name__} does with it is not known; "
            "leave it out with a narrower selection (--train attention, or the like)"
        )
    if sites[0].weight.device.type == "meta" and execution_device(sites[0].module) is None:
        raise UsageError(f"weight '{name}' holds no numbers (device 'meta'); load the model first")
    for module, _ in places:
        keep_codes(module)


def detach(model: nn.Module, trainable: Sequence[str] | None = None) -> nn.Module:
    """Give every module its own class back; weights are left as they are (fold first).

    Args:
        trainable: names of parameters that shall require gradients again.
    """
    for module in model.modules():
        if _BINDINGS in module.__dict__:
            del module.__dict__[_BINDINGS]
            _become(module, type(module)._zolr_original)  # type: ignore[attr-defined]
    if trainable is not None:
        wanted = set(trainable)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in wanted:
                parameter.requires_grad_(True)
    return model


def layout(variables: Sequence[Variable]) -> Layout:
    """The layout of one flat draw over some variables."""
    return (variables if isinstance(variables, Variables) else Variables(variables)).layout()


@torch.no_grad()
def commit(variables: Sequence[Variable]) -> None:
    """Copy the float32 masters of Full subspaces into their low-precision weights, in one call for all."""
    chosen = [v for v in variables if v.is_full and not v.held and v.weight.dtype != v.dtype]
    if chosen:
        weights = [v.weight.t() if v.transposed else v.weight for v in chosen]
        torch._foreach_copy_(weights, [v.value for v in chosen])  # pyright: ignore


@contextmanager
def shifted(
    variables: Sequence[Variable],
    direction: Callable[..., Tensor],
    scale: float | Tensor,
    *,
    plain: bool = True,
) -> Iterator[None]:
    """Evaluate the model with every variable moved by `scale * direction(name)`."""
    if not plain or isinstance(scale, Tensor):
        at_once, others = [], list(variables)
    else:
        at_once = [v for v in variables if not v.space.blocked and v.realization != "inplace"]
        others = [v for v in variables if v.space.blocked or v.realization == "inplace"]
    before = [(v._point, v._rows, v._plain) for v in at_once]
    with ExitStack() as stack:
        for variable in others:
            name = variable.name
            if variable.space.blocked:
                dtype = variable.value.dtype
                shift: Shift = lambda rows, name=name, dtype=dtype: direction(name, rows).to(dtype)  # noqa: E731
            else:
                shift = direction(name).to(variable.value.dtype)
            stack.enter_context(variable.shifted(shift, scale, plain=plain))
        try:
            for variable, point in zip(at_once, _moved(at_once, direction, scale), strict=True):
                variable._point, variable._rows, variable._plain = point, None, True
            yield
        finally:
            for variable, kept in zip(at_once, before, strict=True):
                variable._point, variable._rows, variable._plain = kept


def _moved(
    variables: Sequence[Variable], direction: Callable[..., Tensor], scale: float | Tensor
) -> list[Tensor]:
    """`value + scale * direction(name)` of every variable, in the dtype that its weight is computed with.

    One call for all: on a GPU a launch for each would cost as much as the sums themselves.
    """
    if not variables:
        return []
    values = [v.value.detach() for v in variables]
    shifts = [v.mask(_as(direction(v.name), v.value.dtype)) for v in variables]
    points = list(torch._foreach_add(values, shifts, alpha=scale))  # pyright: ignore
    narrow = [i for i, v in enumerate(variables) if v.weight.dtype.itemsize < points[i].dtype.itemsize]
    if narrow:
        rounded = _cast([points[i] for i in narrow], [variables[i].weight.dtype for i in narrow])
        for i, point in zip(narrow, rounded, strict=True):
            points[i] = point
    return points


@contextmanager
def by_rows(
    variables: Sequence[Variable], directions: Sequence[Callable[..., Tensor]], scales: Sequence[float]
) -> Iterator[None]:
    """Evaluate the model with each of equal parts of the rows of a batch at `value + scale * direction(name)` of its own.

    Raises:
        NotByRows: here or in the forward, where a variable is no low-rank change beside a linear map of three axes or more.
    """
    for variable in variables:
        if variable.is_full or variable.space.blocked or variable.realization in ("inplace", "rebuild"):
            raise NotByRows(f"{variable.name} is not trained beside a product with its stored weight")
    each = [_moved(variables, d, scale) for d, scale in zip(directions, scales, strict=True)]
    points = [one.new_empty(len(each), *one.shape) for one in each[0]]
    for i, moved in enumerate(each):  # stacked one by one they would be a launch each
        torch._foreach_copy_([stack[i] for stack in points], moved)  # pyright: ignore
    with placed(variables, points):
        yield


@contextmanager
def placed(variables: Sequence[Variable], points: Sequence[Tensor | None]) -> Iterator[None]:
    """Evaluate the model with every variable at its point (see `Variable.at`), those without one as they are."""
    with ExitStack() as stack:
        for variable, point in zip(variables, points, strict=True):
            if point is not None:
                stack.enter_context(variable.at(point))
        yield


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
