"""Variable: one trained weight, its subspace and its coordinates; `zolr.attaching` says how a model computes with them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zolr import beside, merged
from zolr.held import (
    RANK,
    Stack,
    is_packed,
    is_sharded,
    opened,
    stand_in,
)
from zolr.keys import Key
from zolr.probes import Layout, Space, row_blocks
from zolr.rows import NotByRows
from zolr.subspaces import Coded, Full, Left, Right, Subspace, TwoSided, Viewed

Realization = Literal["auto", "side", "rebuild", "inplace"]
REALIZATIONS = ("auto", "side", "rebuild", "inplace")

Shift = Tensor | Callable[[slice], Tensor]
Kind = Literal["linear", "conv1d", "embedding", "other"]

BINDINGS = "_zolr_bindings"  # where an attached module has its variables


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
        if not all(readable(site.module, site.parameter) for site in self.sites):
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
        """Whether the weight has another shape, dtype or device now than the coordinates go with, or had their memory and has its own."""
        value, weight = self._value, self.weight
        if value is None or self.held:
            return False
        if weight.dtype != self._own_dtype or weight.device != value.device:
            return True
        if tuple(weight.shape) != (self.shape[::-1] if self.transposed else self.shape):
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
        self.subspace = widen(self.without_frozen_row(subspace), self.weight.dtype)
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
            left, right = widen(self.subspace, self.dtype).outer(self.value.data)
            self.stack.push(left, right.mT)
            self.value.data.zero_()
            self.moved = False
            return
        weight = self.weight.data.t() if self.transposed else self.weight.data
        wide = torch.float64 if exact else self.dtype
        coords = self.value.data.to(wide)
        if not exact and weight.dtype == wide and isinstance(self.subspace, Right | Left):
            weight.addmm_(*widen(self.subspace, wide).outer(coords), beta=self.decay)
            self.value.data.zero_()
            self.moved, self.decay = False, 1.0
            return
        for rows in row_blocks(self.shape):
            block = (weight[rows].to(wide) * self.decay).contiguous()  # Conv1D's are not
            if exact:
                _add_in_rank_order(block, self.subspace, coords, rows)
            else:
                block += widen(self.subspace, wide).lift(coords, rows)
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
            live = widen(self.subspace, self.dtype).outer(self.value.detach())
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
        return module.__dict__.get("weight") is None and merged.pays(self.subspace, tokens(x), self.folds)

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


def widen(subspace: Subspace, dtype: torch.dtype) -> Subspace:
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
        return widen(subspace.plain, dtype)
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


def tokens(x: Any) -> int:
    """Rows of an input `(..., n)`: what a linear map multiplies."""
    return x.numel() // max(1, x.shape[-1]) if isinstance(x, Tensor) and x.dim() else 1


def readable(module: nn.Module, parameter: str) -> bool:
    """Whether the numbers of a weight are there, and are what the module computes with."""
    weight = module._parameters[parameter]
    if weight is None or is_packed(module, parameter) or is_sharded(weight):
        return False
    return weight.device.type != "meta"


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
    shifts = [v.mask(in_dtype(direction(v.name), v.value.dtype)) for v in variables]
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


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or where it has another dtype a copy of it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
