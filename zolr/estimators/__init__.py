"""How the gradient of the small function is obtained: the Estimator protocol and the registry.

An estimator is an ordinary gradient estimator over a list of tensors (the variables' values); it never meets the
projector, never writes a value and leaves no `.grad` behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from math import nan
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zolr.distributed import share_of
from zolr.errors import UsageError, check_numbers, is_count
from zolr.keys import Key
from zolr.probes import Probe
from zolr.rows import NotByRows, repeated, rows_in
from zolr.variables import Variable, by_rows, layout, shifted

Loss = Callable[[Any], Any]
Emit = Callable[[Variable, Tensor], None]
Direction = Callable[..., Tensor]
Part = TypeVar("Part")
Signs = Literal["sequence", "together", "rows"]
SIGNS: tuple[Signs, ...] = get_args(Signs)
FAR = 100.0  # how far points are moved, in units of the radius, to see whether rows of others notice


class Estimator(Protocol):
    """A frozen rule that turns losses into one gradient per variable."""

    paradigm: ClassVar[Literal["fo", "zo", "fwd"]]  # the family it belongs to
    exact: ClassVar[
        bool
    ]  # the gradient is that of the given batches, without noise; what is not exact is `Measuring`

    def __call__(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], emit: Emit, key: Key
    ) -> "Estimate":
        """Estimate the gradient of the mean loss over the batches in every variable's value.

        Args:
            loss: of one batch; a scalar mean, a `(sum, count)` pair, or per-example losses `(batch,)`.
            batches: micro-batches of one step.
            variables: where to differentiate.
            emit: takes `(variable, gradient)`, exactly once per variable.
            key: name of this step's randomness.
        """
        ...

    def forwards(self, batches: int) -> int:
        """Number of forward passes that one step over so many micro-batches costs (a backward counts as two)."""
        ...


class Prober(Estimator, Protocol):
    """An estimator whose gradient is `mean_i slope_i z_i` over directions that can be drawn again."""

    def draw(self, variables: Sequence[Variable], key: Key) -> Sequence[Callable[..., Tensor]]:
        """The directions of the step of that name."""
        ...


@dataclass(frozen=True)
class Estimate:
    """What a step saw.

    Args:
        loss: mean loss, 0-dim.
        slopes: `(probes,)` directional derivatives, None under backprop.
    """

    loss: Tensor
    slopes: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """What an estimator has measured; gradients are made from it one variable at a time.

    Args:
        loss: mean loss, 0-dim.
        slopes: directional derivatives, of which every gradient is a linear map.
        gradient: the estimate in one variable's coordinates.
        record: all that `Repeatable.from_slopes` needs; None where that is `slopes`.
    """

    loss: Tensor
    slopes: Tensor
    gradient: Callable[[Variable], Tensor]
    record: Tensor | None = None

    @property
    def recorded(self) -> Tensor:
        """What `Repeatable.from_slopes` needs, `(k,)`."""
        return self.slopes if self.record is None else self.record

    def hand_over(self, variables: Sequence[Variable], emit: Emit) -> Estimate:
        """Emit every gradient."""
        for variable in variables:
            emit(variable, self.gradient(variable))
        return Estimate(self.loss, self.slopes)


class Measuring(Estimator, Protocol):
    """An estimator whose gradients can wait until others have measured too, so that they can be mixed."""

    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Evaluate the loss; the arguments are those of a call."""
        ...


class BySlopes:
    """What `Measuring` estimators share: a call measures, and hands over at once."""

    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """See `Measuring`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], emit: Emit, key: Key
    ) -> Estimate:
        """Emit the gradients; see `Estimator`."""
        return self.measure(loss, batches, variables, key).hand_over(variables, emit)


class ByProbes(BySlopes):
    """What estimators share whose gradient is `(1/k) sum_i slope_i z_i` over independent directions."""

    probes: int
    law: str

    def draw(self, variables: Sequence[Variable], key: Key) -> Sequence[Direction]:
        """The step's directions; the same for the same key, whatever was drawn before. See `Prober`."""
        return [Probe(layout(variables), self.law, key.fold_in("probe", i)) for i in range(self.probes)]

    @torch.no_grad()
    def from_slopes(self, loss: Tensor, slopes: Tensor, variables: Sequence[Variable], key: Key) -> Found:
        """The step again; see `Repeatable`."""
        return self._found(loss, slopes, variables, self.draw(variables, key))

    def _found(
        self, loss: Tensor, slopes: Tensor, variables: Sequence[Variable], directions: Sequence[Direction]
    ) -> Found:
        return Found(loss, slopes, combined(variables, directions, self._weights(slopes)))

    def _weights(self, slopes: Tensor) -> Tensor:
        """What directions are multiplied by."""
        return slopes / self.probes


@runtime_checkable
class Repeatable(Measuring, Protocol):
    """An estimator whose step can be made again from its slopes alone, without a loss or data."""

    def from_slopes(self, loss: Tensor, slopes: Tensor, variables: Sequence[Variable], key: Key) -> Found:
        """What `measure` found, bit for bit, when it was called with these variables and this key.

        Args:
            loss: `Found.loss` of then.
            slopes: `Found.recorded` of then, float64.
        """
        ...


class Guided(Estimator, Protocol):
    """An estimator that looks where another one has found something."""

    def measure(
        self,
        loss: Loss,
        batches: Sequence[Any],
        variables: Sequence[Variable],
        key: Key,
        guide: Found | None = None,
    ) -> Found:
        """Evaluate the loss; the arguments are those of a call, and what the other one has found."""
        ...


def setting(part: Any, name: str, default: Any = None) -> Any:
    """A setting of a part, or of the first part inside of it that has one of this name."""
    for owner in owners(part, name):
        return getattr(owner, name)
    return default


def changed(part: Part, **settings: Any) -> Part:
    """A part with other settings; those that it does not have go to every part inside of it that does.

    Raises:
        UsageError: no part has one of the settings.
    """
    for name in settings:
        if not owners(part, name):
            raise UsageError(f"there is no setting '{name}' in {type(part).__name__}; leave it out")
    own = {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
    given = {name: value for name, value in settings.items() if name in own}
    for name, inner in own.items():
        below = {n: v for n, v in settings.items() if n not in own and owners(inner, n)}
        if below:
            given[name] = changed(inner, **below)
    return replace(part, **given)  # type: ignore[type-var]


def owners(part: Any, name: str) -> list[Any]:
    """The part itself if it has a setting of this name, otherwise those of its parts that do."""
    if not is_dataclass(part):
        return []
    names = [f.name for f in fields(part)]
    return [part] if name in names else [o for n in names for o in owners(getattr(part, n), name)]


def totals(output: Any) -> tuple[Tensor, Tensor | float]:
    """`(sum, count)` of a loss in any of its three forms, the sum in at least float32.

    Raises:
        UsageError: something else.
    """
    pair = isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor)
    if not (pair or isinstance(output, Tensor)):
        raise UsageError(
            f"the loss is of type {type(output).__name__}; return a scalar mean, a (sum, count) pair of tensors, or a "
            "tensor with one number per example"
        )
    parts = output if isinstance(output, tuple) else (output,)
    if any(isinstance(part, Tensor) and part.is_complex() for part in parts):
        raise UsageError("the loss is complex; return a real number, such as its absolute value")
    if isinstance(output, tuple):
        for part in output:
            if not (part.numel() == 1 if isinstance(part, Tensor) else isinstance(part, Real)):
                kind = f"tensor {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise UsageError(
                    f"the loss is a pair with a {kind} in it; return (sum, count) of one number each, or the loss alone, without "
                    "what the model gave"
                )
        total, count = (
            part.reshape(()) if isinstance(part, Tensor) and part.dim() else part for part in output
        )
    elif output.dim() == 0:
        total, count = output, 1.0
    else:
        total, count = (
            output.float().sum() if output.dtype.itemsize < 4 else output.sum(),
            float(output.numel()),
        )
    return (total.float() if total.dtype.itemsize < 4 else total), count


def parts_of(loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Sums and counts of the micro-batches at hand, `(2, n)` float64."""
    pairs = [totals(loss(batch)) for batch in batches]
    if not pairs:  # of a rank without a micro-batch
        return torch.zeros(2, 0, dtype=torch.float64, device=share_of(batches).device)
    sums = torch.stack([total.double() for total, _ in pairs])
    counts = [n.double() if isinstance(n, Tensor) else sums.new_full((), n) for _, n in pairs]
    return torch.stack([sums, torch.stack([n.to(sums.device) for n in counts])])


def mean_of(batches: Sequence[Any], parts: Tensor) -> Tensor:
    """Mean losses `(...)` of a step from the `(..., 2, n)` of the micro-batches at hand, summed in their order."""
    sums, counts = share_of(batches).whole(parts).unbind(-2)
    total, count = sums[..., 0], counts[..., 0]
    for i in range(1, sums.shape[-1]):
        total, count = total + sums[..., i], count + counts[..., i]
    return total / count


def mean_loss(loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Mean loss over micro-batches, summed in float64 in their order."""
    return mean_of(batches, parts_of(loss, batches))


def rows_of(loss: Loss, batches: Sequence[Any]) -> float | None:
    """Examples (or tokens) that a loss averages over all micro-batches; None for plain means, which do not say."""
    outputs = [loss(batch) for batch in batches]
    seen = [totals(output)[1] for output in outputs]  # also says what is no loss at all
    plain = [isinstance(output, Tensor) and output.dim() == 0 for output in outputs]
    counts = [nan if one else float(count) for one, count in zip(plain, seen, strict=True)]
    total = float(share_of(batches).whole(torch.tensor(counts, dtype=torch.float64)).sum())
    return None if total != total else total


@contextmanager
def same_noise(device: torch.device) -> Iterator[Callable[[], None]]:
    """Global generators are as before afterwards, and the yielded function rewinds them to that state.

    Two evaluations of a stochastic loss (dropout) thus see the same noise.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        host = torch.get_rng_state()
        cuda = [torch.cuda.get_rng_state(d) for d in devices]

        def rewind() -> None:
            torch.set_rng_state(host)
            for d, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, d)

        yield rewind


@contextmanager
def moved(offsets: Mapping[Variable, Callable[[], Tensor]]) -> Iterator[None]:
    """Have every evaluation inside the context moved by these offsets (see `Variable.offset_by`)."""
    with ExitStack() as stack:
        for variable, offset in offsets.items():
            stack.enter_context(variable.offset_by(offset))
        yield


@contextmanager
def ungathered(variables: Sequence[Variable]) -> Iterator[None]:
    """Have gradients inside the context come whole, though the last evaluation of the step gathers them."""
    before = [v.gathered for v in variables]
    for variable in variables:
        variable.gathered = None
    try:
        yield
    finally:
        for variable, gathered in zip(variables, before, strict=True):
            variable.gathered = gathered


class OfInner:
    """An attribute of an evaluation point that is that of the estimator inside."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, point: Any, owner: type | None = None) -> Any:
        return self if point is None else getattr(point.inner, self.name)


def _loss_at(first: Estimate | None, last: Tensor) -> Tensor:
    """The loss of a step that evaluates at two points: that of the first one, unless that of the last is not finite."""
    return last if first is None else torch.where(last.isfinite(), first.loss, last)


class Elsewhere:
    """An estimator that takes the gradient of `inner` at another point, and hands it over as that of where it stands.

    A subclass says which way to go. All evaluations of a step see the same noise.
    """

    inner: Estimator
    reach: float
    paradigm: ClassVar[Any] = OfInner()
    exact: ClassVar[Any] = OfInner()  # where the gradient is taken may be random, what it is there is not

    def way(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> tuple[Estimate | None, dict[Variable, Callable[[], Tensor]]]:
        """What was seen in finding the way, and the offset of each variable."""
        raise NotImplementedError

    def __call__(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], emit: Emit, key: Key
    ) -> Estimate:
        """Emit the gradients; see `Estimator`."""
        if not self.exact:
            return self.measure(loss, batches, variables, key).hand_over(variables, emit)
        with self._there(loss, batches, variables, key) as seen:
            there = self.inner(loss, batches, variables, emit, key)
        return replace(there, loss=_loss_at(seen, there.loss))

    @torch.no_grad()
    def measure(self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key) -> Found:
        """Measure the slopes that `inner` has there; see `Measuring`."""
        with self._there(loss, batches, variables, key) as seen:
            there = cast(Measuring, self.inner).measure(loss, batches, variables, key)
        return replace(there, loss=_loss_at(seen, there.loss))

    @contextmanager
    def _there(
        self, loss: Loss, batches: Sequence[Any], variables: Sequence[Variable], key: Key
    ) -> Iterator[Estimate | None]:
        """Every evaluation inside the context is at the other point; what was seen on the way there."""
        if not self.reach:
            yield None
            return
        with same_noise(variables[0].value.device) as rewind:
            seen, offsets = self.way(loss, batches, variables, key)
            rewind()
            with moved(offsets):
                yield seen


def itself(offset: Tensor) -> Tensor:
    """An offset that is there already."""
    return offset


def check_reach(reach: float) -> None:
    """Refuse a distance that means nothing."""
    check_numbers(reach=reach)
    if not 0 <= reach < float("inf"):
        raise UsageError(f"reach = {reach} is no distance; use a number of at least 0 (0 evaluates in place)")


def combine(variable: Variable, directions: Sequence[Callable[..., Tensor]], weights: Tensor) -> Tensor:
    """`sum_i weights[i] * z_i` in one variable's coordinates."""
    gradient: Tensor | None = None
    for direction, weight in zip(directions, weights.to(variable.value.dtype).unbind(), strict=True):
        z = direction(variable.name).to(variable.value.dtype)
        gradient = z * weight if gradient is None else gradient.addcmul_(z, weight)
    assert gradient is not None
    return gradient


def combined(
    variables: Sequence[Variable], directions: Sequence[Direction], weights: Tensor
) -> Callable[[Variable], Tensor]:
    """`sum_i weights[i] * z_i` in the coordinates of any of the variables.

    On a GPU a launch for each would cost as much as the products themselves, so those smaller than a weight are made in
    a few calls for all when the first of them is asked for.
    """
    ready: dict[str, Tensor] = {}

    def make() -> None:
        small = [v for v in variables if not v.space.blocked]
        for dtype in {v.value.dtype for v in small}:
            own = [v for v in small if v.value.dtype == dtype]
            sums: list[Tensor] = []
            for direction, weight in zip(directions, weights.to(dtype).unbind(), strict=True):
                parts = [direction(v.name).to(dtype) for v in own]
                scaled = list(torch._foreach_mul(parts, weight))  # pyright: ignore
                sums = list(torch._foreach_add(sums, scaled)) if sums else scaled  # pyright: ignore
            ready.update({v.name: total for v, total in zip(own, sums, strict=True)})

    def gradient(variable: Variable) -> Tensor:
        if variable.space.blocked:
            return combine(variable, directions, weights)
        if variable.name not in ready:
            make()
        return ready.pop(variable.name)

    return gradient


class _MappedMasks(TorchFunctionMode):
    """Gives attention masks the axis that queries have under vmap.

    torch's rules for fused attention put that axis of queries, keys and values into the rows of the batch, and hand on a mask
    that has none as it is: fewer rows than the kernel is asked to mask.

    Args:
        mapped: 0-dim, with the axis.
    """

    def __init__(self, mapped: Tensor) -> None:
        super().__init__()
        self.mapped = mapped

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, with another mask where it is attention."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False))
            args, kwargs = args[:3], {**kwargs, **named}
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.dtype == torch.bool:
                kwargs["attn_mask"] = mask & (self.mapped == self.mapped)
            elif mask is not None:
                kwargs["attn_mask"] = mask + (0 * self.mapped).to(mask.dtype)
        return func(*args, **kwargs)


def evaluate(
    measure: Callable[[Loss, Sequence[Any]], Tensor],
    loss: Loss,
    batches: Sequence[Any],
    variables: Sequence[Variable],
    points: Sequence[tuple[Direction, float]],
    rewind: Callable[[], None],
    signs: Signs = "sequence",
) -> list[Tensor]:
    """What is measured at the coordinates moved by `scale * direction`, for every point.

    Args:
        measure: makes a tensor of a loss and its batches, as `parts_of` does.
        points: directions and scales.
        rewind: of `same_noise`; every point sees the same noise.
        signs: the points one after the other ("sequence"), or in one pass: by vmap ("together"), or as rows of one batch
            ("rows"), which falls back on vmap where a batch or the way through the model is not of rows. A loss with a
            function `on_rows(batch, count)` makes that batch itself.
    """
    measured = lambda: measure(loss, batches)  # noqa: E731
    if len(points) < 2:
        signs = "sequence"
    if signs == "rows":
        try:
            return _by_rows(measure, loss, batches, variables, points, rewind)
        except NotByRows:
            signs = "together"
    if signs == "together":
        like = variables[0].value
        # filled on the device: a copy from the host would wait for it
        scales = torch.stack([like.new_full((), scale) for _, scale in points])
        shared = points[0][0] if all(d is points[0][0] for d, _ in points) else None
        drawn = {} if shared else {v.name: torch.stack([d(v.name) for d, _ in points]) for v in variables}

        def moved(scale: Tensor, parts: dict[str, Tensor]) -> Tensor:
            direction = shared or (lambda name, rows=None: parts[name] if rows is None else parts[name][rows])
            with shifted(variables, direction, scale, plain=False), _MappedMasks(scale):
                return measured()

        rewind()
        return list(torch.func.vmap(moved, randomness="same")(scales, drawn).unbind())
    values = []
    for direction, scale in points:
        rewind()
        with shifted(variables, direction, scale):
            values.append(measured())
    return values


def _by_rows(
    measure: Callable[[Loss, Sequence[Any]], Tensor],
    loss: Loss,
    batches: Sequence[Any],
    variables: Sequence[Variable],
    points: Sequence[tuple[Direction, float]],
    rewind: Callable[[], None],
) -> list[Tensor]:
    """What is measured at every point, each micro-batch in one pass that has its rows once for each point.

    Raises:
        NotByRows: the batch, the loss or the way through the model is not of rows.
    """
    directions, scales = zip(*points, strict=True)
    count, outputs = len(points), []
    if not len(batches):  # of a rank without a micro-batch
        return [measure(loss, batches)] * count
    with by_rows(variables, directions, scales):
        rewind()
        for batch in batches:
            rows = rows_in(batch)
            own = getattr(loss, "on_rows", None)  # of a loss that may say no
            output = loss(repeated(batch, count)) if own is None else own(batch, count)
            if not isinstance(output, Tensor) or output.shape != (count * rows,):
                raise NotByRows("the loss is not one number for each row")
            outputs.append(output.chunk(count))
    # what the batches were at a point, their losses are: `measure` adds up the same numbers as elsewhere
    return [measure(lambda own: own, [each[i] for each in outputs]) for i in range(count)]


def compared(
    measure: Callable[[Loss, Sequence[Any]], Tensor],
    loss: Loss,
    batches: Sequence[Any],
    variables: Sequence[Variable],
    points: Sequence[tuple[Direction, float]],
    signs: Signs,
) -> tuple[Signs, str, int]:
    """How points can be evaluated in one pass, by rows if they can; in sequence, and why, if in none.

    vmap has no rule for an operation that looks at values, and a model may treat the leading axis as its own, or rows
    depend on each other: the points are evaluated in sequence too, and compared.

    Args:
        signs: what is asked for, "together" (either way) or "rows". Rows are evaluated twice: the second time all points but the
            first one are far away, which the rows of the first one must not notice.

    Returns:
        The way, the reason, and forwards a micro-batch that it took.
    """
    with same_noise(variables[0].value.device) as rewind:
        expected = evaluate(measure, loss, batches, variables, points, rewind)
        reason, passes = "", len(points)
        for way in ("rows", "together") if signs == "together" else ("rows",):
            try:
                if way == "rows":
                    found = _by_rows(measure, loss, batches, variables, points, rewind)
                else:
                    found = evaluate(measure, loss, batches, variables, points, rewind, way)
            except (RuntimeError, NotImplementedError, NotByRows) as error:  # torch's where a rule is missing
                reason = str(error).strip().split("\n")[0]
                passes += 0 if isinstance(error, NotByRows) else len(points)  # known before a pass is over
                continue
            passes += len(points)
            reason = _difference(expected, found, variables)
            if way == "rows" and not reason:
                far = [points[0], *((direction, FAR * scale) for direction, scale in points[1:])]
                passes += len(points)
                reason = _dependence(found, _by_rows(measure, loss, batches, variables, far, rewind))
            if not reason:
                return way, "", passes
    return "sequence", reason, passes


def _dependence(near: Sequence[Tensor], far: Sequence[Tensor]) -> str:
    """What says that rows of one batch are not those of their own points, where all but the first point were moved far away.

    In half precision the losses of two points differ by less than rounding may. But the rows of the first point go through the
    same operations in the same places both times.
    """
    if not near[0].numel():  # of a rank without a micro-batch
        return ""
    gap, size = (near[0] - far[0]).abs().max(), near[0].abs().max()
    if not bool(gap <= 8 * torch.finfo(torch.float32).eps * size):
        return f"a row's loss depends on the rows beside it, by {float(gap):.2g}"
    if not all(bool((a != b).any()) for a, b in zip(near[1:], far[1:], strict=True)):
        return "rows are not evaluated at their own points"
    return ""


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor], variables: Sequence[Variable]) -> str:
    """By how much two evaluations of the same points differ; empty where it is rounding."""
    precision = max(torch.finfo(v.weight.dtype).eps for v in variables)
    if not expected[0].numel():  # of a rank without a micro-batch
        return ""
    gaps = [(a - b).abs().max() for a, b in zip(expected, found, strict=True)]
    allowed = min(100 * precision, 0.05) * expected[0].abs().max().clamp_min(1.0)
    if all(bool(gap <= allowed) for gap in gaps):
        return ""
    return f"the losses differ by {max(map(float, gaps)):.2g}"


def check_probes(probes: int) -> None:
    """Refuse a number of probes that means nothing."""
    if not is_count(probes):
        raise UsageError(f"{probes!r} probes a step are not possible; use a whole number of at least 1")


def check_signs(signs: str) -> None:
    """Refuse a way to evaluate signs that there is not."""
    if signs not in SIGNS:
        raise UsageError(
            f"signs '{signs}' is not known; use {', '.join(map(repr, SIGNS[:-1]))} or '{SIGNS[-1]}'"
        )


def check_eps(eps: float | None) -> None:
    """Refuse a radius that means nothing; None lets the engine choose."""
    check_numbers(eps=eps)
    if eps is not None and not 0 < eps < float("inf"):
        raise UsageError(
            f"eps = {eps} is no probe radius; use a positive number (1e-3 is usual), or leave it out"
        )


from zolr.estimators.ascent import Ascent  # noqa: E402  (the files obey the protocol above)
from zolr.estimators.backprop import Backprop  # noqa: E402
from zolr.estimators.coordinates import Coordinates  # noqa: E402
from zolr.estimators.forward import Forward  # noqa: E402
from zolr.estimators.likelihood_ratio import LikelihoodRatio  # noqa: E402
from zolr.estimators.lookahead import Lookahead  # noqa: E402
from zolr.estimators.mixture import Mixture  # noqa: E402
from zolr.estimators.private_spsa import PrivateSpsa  # noqa: E402
from zolr.estimators.spsa import Spsa  # noqa: E402

ESTIMATORS: dict[str, type] = {
    "backprop": Backprop,
    "spsa": Spsa,
    "private_spsa": PrivateSpsa,
    "coordinates": Coordinates,
    "mixture": Mixture,
    "likelihood_ratio": LikelihoodRatio,
    "forward": Forward,
}

PARADIGMS = {"fo": "backprop", "zo": "spsa", "fwd": "forward"}

# where another estimator evaluates, if not at the weights
POINTS: dict[str, type] = {"ascent": Ascent, "lookahead": Lookahead}
