"""Both signs of a probe as rows of one batch: the numbers of passes in sequence, in one pass, and only where rows are independent."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from zolr.distributed import Team
from zolr.engine import Engine, _agreed
from zolr.estimators import setting
from zolr.methods import compose
from zolr.rows import NotByRows, repeated, rows_in

WIDTH, CLASSES = 12, 3
Batch = dict[str, Tensor]


class Net(nn.Module):
    """Rows of tokens through linear maps; `between` is what a test puts into the middle."""

    def __init__(
        self, linear: Callable[..., nn.Module] = nn.Linear, between: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.up = Conv1D(16, WIDTH) if linear is Conv1D else linear(WIDTH, 16)
        self.down = Conv1D(WIDTH, 16) if linear is Conv1D else linear(16, WIDTH, bias=False)
        self.between, self.head = between or nn.Identity(), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(self.between(x).mean(1))


def net(**parts: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**parts).double().eval()


def batch(rows: int = 4, seed: int = 0) -> Batch:
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (rows, 5), generator=numbers)
    return {"ids": ids, "labels": torch.randint(0, CLASSES, (rows,), generator=numbers)}


def loss(model: nn.Module, batch: Any) -> Any:
    return F.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")


def linear_maps(name: str, _: nn.Parameter) -> bool:
    return name in ("up.weight", "down.weight")


def engine(
    model: nn.Module, signs: str, how: Callable[..., Any] = loss, select: Any = linear_maps, **more: Any
) -> Engine:
    settings = {"rank": 3, "eps": 1e-3, "refresh_every": 3, "optimizer": "sgd", "signs": signs}
    kept = {name: more.pop(name) for name in ("hold", "weight_decay", "compile", "seed") if name in more}
    method = compose(more.pop("method", "stiefel"), "zo", **(settings | more))
    return Engine(model, method, lr=1e-2, loss=how, select=select, **kept)


def steps(run: Engine, count: int = 5, **given: Any) -> list[float]:
    """Losses and slopes of steps over two micro-batches."""
    found = []
    for number in range(count):
        info = run.step([batch(seed=2 * number, **given), batch(rows=3, seed=2 * number + 1)])
        found += [info.loss, info.slope or 0.0]
    return found


def way(run: Engine) -> str:
    return setting(run.method.estimator, "signs")


WAYS: dict[str, dict[str, Any]] = {
    "input side": {"side": "right"},
    "output side": {"side": "left"},
    "both sides": {"projector": "two_sided"},
    "several probes": {"probes": 3},
    "one-sided": {"sides": 1, "probes": 3},
    "gaussian": {"law": "gaussian", "projector": "gaussian"},
    "orthonormal": {"probes": 2, "directions": "orthonormal"},
    "beside": {"realization": "side"},
    "held": {"hold": True},
    "decay": {"weight_decay": 0.1},
    "private": {"method": "dpzero", "projector": "stiefel", "noise": 0.0},
}


@pytest.mark.parametrize("case", WAYS)
@pytest.mark.parametrize("linear", [nn.Linear, Conv1D], ids=["linear", "conv1d"])
def test_rows_of_one_batch_are_passes_in_sequence(case: str, linear: Any) -> None:
    found = {}
    for signs in ("sequence", "together", "rows"):
        given = dict(WAYS[case])
        realization = given.pop("realization", "auto")
        run = engine(net(linear=linear), signs, **given)
        for variable in run.variables:
            variable.realization = realization
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[signs] = steps(run)
        assert way(run) == ("sequence" if signs == "sequence" else "rows")
        assert all(v.moved or v.held for v in run.variables)
    assert found["together"] == found["rows"]
    assert found["rows"] == pytest.approx(found["sequence"], rel=0, abs=1e-10)


def test_the_slope_is_that_of_a_loop_written_by_hand() -> None:
    model = net()
    run = engine(model, "rows", refresh_every=100)
    data = batch()
    run.step([data])  # opens the subspace
    plain, weights = net(), {}
    for v in run.variables:
        weights[v.name] = (dict(model.named_parameters())[v.name].detach().clone(), v.value.detach().clone())
    seen: list[Tensor] = []
    estimator: Any = run.method.estimator
    z = {
        v.name: estimator.draw(run.active, run.key.fold_in("step", 1))[0](v.name).double() for v in run.active
    }
    for scale in (1e-3, -1e-3):
        for v in run.variables:
            weight, coords = weights[v.name]
            dict(plain.named_parameters())[v.name].data.copy_(
                weight + v.subspace.lift(coords + scale * z[v.name])
            )
        seen.append(loss(plain, data).mean().detach())
    info = run.step([data])
    assert info.slope == pytest.approx(abs(float(seen[0] - seen[1])) / 2e-3, rel=1e-9)
    assert info.loss == pytest.approx(float(seen[0] + seen[1]) / 2, rel=1e-12)


class Counted(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def test_both_signs_take_the_operations_of_one_forward() -> None:
    model, data = net(), batch()
    with torch.no_grad(), Counted() as plain:
        loss(model, data)
    run = engine(model, "together", refresh_every=100)
    run.step([data])
    with Counted() as step:
        run.step([data])
    for op in (torch.ops.aten.addmm.default, torch.ops.aten.tanh.default, torch.ops.aten.embedding.default):
        assert step.calls[op] == plain.calls[op] > 0
    assert step.calls[torch.ops.aten.baddbmm_.default] == 2  # of each trained map, with nothing else as large


# ---- where rows are not independent, or are no rows ---------------------------------------------------------------------


class Centered(nn.Module):
    """Takes the mean over the rows of a batch from each of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


class Experts(nn.Module):
    """Sends each token to one of two maps, which see the tokens that were picked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.two = (nn.Linear(WIDTH, n) for n in (1, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        first = self.gate(tokens)[:, 0] > 0
        out = torch.zeros_like(tokens)
        out[first], out[~first] = self.one(tokens[first]), self.two(tokens[~first])
        return out.view_as(x)


class Norm(nn.Module):
    """A batch norm over the features of tokens."""

    def __init__(self, tracks: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=tracks)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class Pooled(nn.Module):
    """A map of one vector a row."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.mean(1))[:, None]


def of_sum(model: nn.Module, batch: Any) -> Any:
    return loss(model, batch).sum(), torch.tensor(float(len(batch["labels"])))


def of_inner(model: nn.Module, batch: Any) -> Any:
    return loss(model, {name: batch[name] for name in ("ids", "labels")})


APART: dict[str, tuple[nn.Module | None, Callable[..., Any], Any, str]] = {
    "a plain mean": (None, lambda m, b: loss(m, b).mean(), linear_maps, "together"),
    "a sum and a count": (None, of_sum, linear_maps, "together"),
    "a vector is trained": (None, loss, lambda n, p: linear_maps(n, p) or n == "up.bias", "together"),
    "an embedding is trained": (
        None,
        loss,
        lambda n, p: linear_maps(n, p) or n == "embed.weight",
        "together",
    ),
    "one vector a row": (Pooled(), loss, lambda n, p: n == "between.map.weight", "together"),
    "rows that see each other": (Centered(), loss, linear_maps, "together"),
    "experts": (Experts(), loss, lambda n, p: n.startswith("between") and p.dim() == 2, "sequence"),
    "statistics of the batch": (Norm(tracks=False), loss, linear_maps, "together"),
}


@pytest.mark.parametrize("case", APART)
def test_what_is_not_of_rows_takes_another_way(case: str) -> None:
    between, how, select, expected = APART[case]
    found = {}
    for signs in ("sequence", "together"):
        run = engine(net(between=copy.deepcopy(between)), signs, how=how, select=select)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            first = run.step([batch(seed=50), batch(seed=51)])
            found[signs] = steps(run)
        apart = [str(w.message) for w in said if "signs are evaluated" in str(w.message)]
        assert bool(apart) == (signs == "together" and expected == "sequence"), apart
    assert way(run) == expected
    tried = (
        6 if case == "rows that see each other" else 4
    )  # what is known not to be of rows is not tried by them
    assert first.forwards == 2 * (tried + 2)
    assert found["together"] == pytest.approx(found["sequence"], rel=0, abs=1e-10)


def test_a_batch_that_is_no_rows_later_is_evaluated_all_the_same() -> None:
    found = {}
    for signs in ("sequence", "rows"):
        run = engine(net(), signs, how=of_inner)
        first = run.step([batch()])
        second = run.step([{**batch(seed=1), "weights": torch.ones(CLASSES)}])
        found[signs] = [first.loss, first.slope, second.loss, second.slope]
    assert way(run) == "rows"
    assert found["rows"] == pytest.approx(found["sequence"], rel=0, abs=1e-10)


class Leaning(nn.Module):
    """Takes a little of the mean over the rows of a batch from each of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.01 * x.mean(0, keepdim=True)


class Placed(nn.Module):
    """Picks the token of each row by its place among all tokens of the batch, as the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.net.embed(ids)
        x = x + self.net.down(torch.tanh(self.net.up(x)))
        return self.net.head(x.flatten(0, 1)[places])


def of_places(model: nn.Module, batch: Any) -> Tensor:
    logits = model(
        batch["ids"], torch.arange(len(batch["labels"])) * 5 if "places" not in batch else batch["places"]
    )
    return F.cross_entropy(logits.float(), batch["labels"], reduction="none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dependence_that_rounding_hides_is_seen_where_other_points_are_far(dtype: torch.dtype) -> None:
    """In bfloat16 the losses of both signs differ by less than rounding may."""
    run = engine(net(between=Leaning()).to(dtype), "together")
    run.step([batch()])
    assert way(run) == "together"
    run = engine(
        Placed().to(dtype), "together", how=of_places, select=lambda n, p: p.dim() == 2 and ".up." in n
    )
    run.step([{**batch(), "places": torch.arange(4) * 5}])
    assert way(run) == "together"


# ---- batches, and what is remembered ------------------------------------------------------------------------------------


def test_a_batch_is_repeated_in_its_own_type() -> None:
    rows = batch()
    assert rows_in(rows) == 4
    twice = repeated(BatchEncoding({**rows, "name": "x"}), 2)
    assert isinstance(twice, BatchEncoding) and twice["name"] == "x"
    assert torch.equal(twice.ids, torch.cat([rows["ids"]] * 2))
    ids, (labels, flag) = repeated((rows["ids"], [rows["labels"], None]), 3)
    assert ids.shape == (12, 5) and torch.equal(labels[4:8], rows["labels"]) and flag is None
    for other in (
        {},
        {"x": torch.ones(())},
        {"x": torch.ones(2), "y": torch.ones(3)},
        {"x": torch.ones(2), "y": object()},
    ):
        with pytest.raises(NotByRows):
            rows_in(other)


def test_an_encoded_batch_goes_by_rows() -> None:
    run = engine(net(), "rows", how=lambda m, b: F.cross_entropy(m(b.ids), b.labels, reduction="none"))
    run.step([BatchEncoding(batch())])
    assert way(run) == "rows"


def test_the_way_is_tried_once_and_kept() -> None:
    one, other = engine(net(), "together"), engine(net(), "together")
    assert one.step([batch()]).forwards == 6 + 2
    other.load_state_dict(one.state_dict())
    other.model.load_state_dict(one.model.state_dict())
    a, b = one.step([batch(seed=1)]), other.step([batch(seed=1)])
    assert (a.loss, a.slope) == pytest.approx((b.loss, b.slope), rel=1e-9) and a.forwards == b.forwards == 2
    assert way(other) == "rows" and way(copy.deepcopy(one)) == "rows"


def test_a_compiled_loss_goes_by_rows() -> None:
    found = {}
    for compiled in (False, True):
        run = engine(net(), "rows", compile=compiled)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found[compiled] = steps(run, 3)
        assert way(run) == "rows"
    assert found[True] == pytest.approx(found[False], rel=0, abs=1e-9)


def test_what_asks_for_rows_alone_goes_in_sequence_where_there_are_none() -> None:
    run = engine(net(), "rows", how=lambda m, b: loss(m, b).mean())
    with pytest.warns(
        UserWarning, match="in sequence, not together: the loss is not one number for each row"
    ):
        run.step([batch()])
    assert way(run) == "sequence"
    assert replace(run.method.estimator, signs="rows") != run.method.estimator  # type: ignore[type-var]


INNER = {
    "ascent": {"point": "ascent"},
    "lookahead": {"point": "lookahead"},
    "mixture": {"method": "zo-hgd"},
}


@pytest.mark.parametrize("case", INNER)
def test_signs_of_a_part_inside_are_settled_too(case: str) -> None:
    found = {}
    for signs in ("sequence", "together"):
        run = engine(net(), signs, **({"projector": "stiefel"} | INNER[case]))
        found[signs] = steps(run)
        assert way(run) == ("rows" if signs == "together" else signs)
    assert found["together"] == pytest.approx(found["sequence"], rel=0, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_training_keeps_points_apart(dtype: torch.dtype) -> None:
    """Two rows of one batch have dropout masks of their own, which in bfloat16 rounding would hide."""
    model = net(between=nn.Dropout(0.01)).to(dtype)
    method = compose("stiefel", "fo", rank=2, optimizer="sgd", point="ascent", signs="together")
    run = Engine(model.train(), method, lr=1e-3, loss=loss, select=linear_maps)
    for number in range(3):
        run.step([batch(seed=number)])
    assert way(run) == "together"


class Asked(Team):
    """The ranks of a run, of which each has been asked for the largest of two numbers."""

    def __init__(self, *asked: list[int]) -> None:
        super().__init__()
        self.left = list(asked)

    def largest(self, number: int) -> int:
        assert number in self.left[0]
        return max(self.left.pop(0))


@pytest.mark.parametrize(
    ("ways", "agreed"), [((2, 2), 2), ((2, 1), 0), ((1, None), 1), ((None, 2, 2), 2), ((2, 0), 0)]
)
def test_ranks_agree_on_a_way_without_those_that_had_nothing_to_try(
    ways: tuple[int | None, ...], agreed: int
) -> None:
    highest = [-1 if way is None else way for way in ways]
    lowest = [-3 if way is None else -way for way in ways]
    assert [_agreed(Asked(highest, lowest), way) for way in ways] == [agreed] * len(ways)
