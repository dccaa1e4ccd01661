"""How the gradient of the small function is obtained: the Estimator protocol and the registry.

An estimator is an ordinary gradient estimator over a list of tensors (the variables' values); it never meets the
projector, never writes a value and leaves no `.grad` behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from zolr.errors import UsageError
from zolr.keys import Key
from zolr.variables import Variable

Loss = Callable[[Any], Any]
Emit = Callable[[Variable, Tensor], None]


class Estimator(Protocol):
    """A frozen rule that turns losses into one gradient per variable."""

    paradigm: ClassVar[Literal["fo", "zo", "fwd"]]  # the family it belongs to
    exact: ClassVar[bool]  # the gradient is that of the given batches, without noise of the estimator's own

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


class Estimate:
    """What a step saw.

    Args:
        loss: mean loss, 0-dim.
        slopes: `(probes,)` directional derivatives, None under backprop.
    """

    def __init__(self, loss: Tensor, slopes: Tensor | None = None) -> None:
        self.loss, self.slopes = loss, slopes


def totals(output: Any) -> tuple[Tensor, Tensor | float]:
    """`(sum, count)` of a loss in any of its three forms, the sum in at least float32."""
    if isinstance(output, tuple):
        total, count = output
    elif output.dim() == 0:
        total, count = output, 1.0
    else:
        total, count = (
            output.float().sum() if output.dtype.itemsize < 4 else output.sum(),
            float(output.numel()),
        )
    return (total.float() if total.dtype.itemsize < 4 else total), count


def mean_loss(loss: Loss, batches: Sequence[Any]) -> Tensor:
    """Mean loss over micro-batches, summed in float64 in their order."""
    pairs = [totals(loss(batch)) for batch in batches]
    total = pairs[0][0].double()
    count = pairs[0][1]
    for more, n in pairs[1:]:
        total, count = total + more.double(), count + n
    return total / count


def rows_of(loss: Loss, batches: Sequence[Any]) -> float | None:
    """Examples (or tokens) that a loss averages over all micro-batches; None for plain means, which do not say."""
    outputs = [loss(batch) for batch in batches]
    if any(not isinstance(output, tuple) and output.dim() == 0 for output in outputs):
        return None
    return sum(float(totals(output)[1]) for output in outputs)


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


def seen_at(first: Estimate | None, last: Estimate) -> Estimate:
    """What a step that evaluates at two points saw: the loss of the first one, unless that of the last is not finite."""
    if first is None:
        return last
    return Estimate(torch.where(last.loss.isfinite(), first.loss, last.loss), last.slopes)


def check_reach(reach: float) -> None:
    """Refuse a distance that means nothing."""
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


def check_probes(probes: int) -> None:
    """Refuse a number of probes that means nothing."""
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise UsageError(f"{probes!r} probes a step are not possible; use a whole number of at least 1")


def check_eps(eps: float | None) -> None:
    """Refuse a radius that means nothing; None lets the engine choose."""
    if eps is not None and not 0 < eps < float("inf"):
        raise UsageError(
            f"eps = {eps} is no probe radius; use a positive number (1e-3 is usual), or leave it out"
        )


from zolr.estimators.ascent import Ascent  # noqa: E402  (the files obey the protocol above)
from zolr.estimators.backprop import Backprop  # noqa: E402
from zolr.estimators.forward import Forward  # noqa: E402
from zolr.estimators.likelihood_ratio import LikelihoodRatio  # noqa: E402
from zolr.estimators.lookahead import Lookahead  # noqa: E402
from zolr.estimators.spsa import Spsa  # noqa: E402

ESTIMATORS: dict[str, type] = {
    "backprop": Backprop,
    "spsa": Spsa,
    "likelihood_ratio": LikelihoodRatio,
    "forward": Forward,
}

PARADIGMS = {"fo": "backprop", "zo": "spsa", "fwd": "forward"}

# where another estimator evaluates, if not at the weights
POINTS: dict[str, type] = {"ascent": Ascent, "lookahead": Lookahead}
