"""Backprop beside a frozen weight: gradients of the plain expression, in fewer operations; casts of a whole pass in one call."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zolr
from zolr import beside
from zolr.keys import Key
from zolr.models import checkpoint_activations
from zolr.subspaces import Left, Right, TwoSided


def draw(name: str, *shape: int) -> Tensor:
    return Key(0).fold_in(name).normal(shape).double()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("biased", [True, False])
def test_outputs_and_gradients_are_those_of_two_products(right: bool, decay: float, biased: bool) -> None:
    m, n, r = 6, 10, 3
    weight, x, turn = draw("weight", m, n), draw("x", 4, 7, n), draw("turn", 4, 7, m)
    basis, bias = draw("basis", n if right else m, r), draw("bias", m) if biased else None
    subspace = Right(basis, m) if right else Left(basis, n)
    coords = draw("coords", *subspace.coords_shape)
    found = []
    for by_hand in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, coords, *([] if bias is None else [bias]))]
        a, b, *c = inputs
        if by_hand:
            out = beside.linear(a, weight, c[0] if c else None, decay, subspace, b)
        else:
            out = decay * (a @ weight.mT) + subspace.apply(a, b) + (c[0] if c else 0)
        found.append((out, *torch.autograd.grad((out * turn).sum(), inputs)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_asked_for_is_not_made(right: bool, wanted: tuple[bool, ...]) -> None:
    subspace = Right(draw("basis", 10, 3), 6) if right else Left(draw("basis", 6, 3), 10)
    inputs = [draw("x", 8, 10), draw("coords", *subspace.coords_shape), draw("bias", 6)]
    inputs = [t.requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    x, coords, bias = inputs
    out = beside.linear(x, draw("weight", 6, 10), bias, 1.0, subspace, coords)
    plain = x @ draw("weight", 6, 10).mT + subspace.apply(x, coords) + bias
    asked = [t for t in inputs if t.requires_grad]
    one, other = (torch.autograd.grad(t.square().sum(), asked) for t in (out, plain))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_other_kinds_are_not_covered() -> None:
    assert not beside.covers(TwoSided(draw("a", 6, 2), draw("b", 10, 2)))


# ---- runs -------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(layers)
        )
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Losses of examples."""
    logits = model(batch)[:, :-1].float()
    return nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(1)


def batches(number: int, rows: int = 2) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.randint(11, (rows, 5), generator=numbers) for _ in range(number)]


def engine(dtype: torch.dtype = torch.bfloat16, layers: int = 3, side: str = "right", **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(layers).to(dtype)
    method = zolr.compose("stiefel", "fo", rank=4, refresh_every=3, side=side)
    return zolr.Engine(net, method, lr=1e-2, loss=loss, **more)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(run: Any, data: list[Tensor]) -> Counter[str]:
    run.step(data)
    with Operations() as counted:
        run.step(data)
    return counted.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_more_costs_its_products_and_no_casts_sums_or_divisions(dtype: torch.dtype) -> None:
    few, many = (operations(engine(dtype, layers), batches(1)) for layers in (2, 6))
    more = many - few
    # in forward its own product, x P and (x P) Bᵀ; in backward the two of x and that of B; GELU and the norm have others
    names = ("mm.default", "addmm.default", "addmm_.default", "mm.out", "addmm.out")
    products = sum(more[f"aten.{name}"] for name in names)
    assert products == 4 * 7
    assert more["aten.add.Tensor"] == 4 * 2  # of the residual stream, there and back
    for name in ("_to_copy.default", "copy_.default", "div_.Tensor", "div.Tensor", "mul.Tensor"):
        assert more[f"aten.{name}"] == 0, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("micro", [1, 2])
def test_values_rounded_together_are_those_rounded_one_by_one(
    micro: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, weights, losses = batches(8 * micro), [], []
    for together in (True, False):
        if not together:
            monkeypatch.setattr("zolr.estimators.backprop.narrowed", lambda variables: nullcontext())
        run = engine(side=side, weight_decay=0.1)
        losses.append([run.step(data[i * micro : (i + 1) * micro]).loss for i in range(8)])
        weights.append([p.detach().clone() for p in run.detach().parameters()])
    assert losses[0] == losses[1] and losses[0][-1] != losses[0][0]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_in_low_precision_gradients_are_close_to_those_of_float32() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        run, taken = engine(dtype), {}
        for variable, wide in zip(run.variables, engine(torch.float32).variables, strict=True):
            if not variable.is_full:
                variable.value.data.copy_(0.01 * Key(1).fold_in(variable.name).normal(variable.value.shape))
                variable.moved = True
            elif dtype == torch.float32:
                variable.value.data.copy_(wide.value.data.bfloat16())
        if dtype == torch.float32:
            for p in run.model.parameters():
                p.data.copy_(p.data.bfloat16())
        run.method.estimator(
            lambda batch, run=run: loss(run.model, batch),
            batches(1, 16),
            run.variables,
            lambda v, g, taken=taken: taken.update({v.name: g}),
            Key(0),
        )
        found.append(taken)
        assert {g.dtype for g in taken.values()} == {torch.float32}
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, exact in found[0].items():
        assert float((found[1][name] - exact).norm() / exact.norm()) < 0.03, name


def test_points_are_taken_back_also_when_the_loss_fails() -> None:
    run = engine()

    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        loss(model, batch)
        raise ValueError("broken")

    run.step(batches(1))
    run._loss = broken
    with pytest.raises(ValueError, match="broken"):
        run.step(batches(1))
    assert all(v.shifted_to is None and v.value.grad is None for v in run.variables)
    run._loss = loss
    assert run.step(batches(1)).loss > 0


def test_a_tied_weight_adds_its_gradients_up_in_float32() -> None:
    run = engine()
    tied = engine()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().bfloat16()
    net.head.weight = net.embed.weight
    tied = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=4), lr=1e-2, loss=loss)
    seen: dict[str, set[str]] = {}
    for name, chosen in (("tied", tied), ("apart", run)):
        points: set[str] = set()

        def watching(
            model: nn.Module, batch: Tensor, chosen: Any = chosen, points: set[str] = points
        ) -> Tensor:
            points.update(v.name for v in chosen.variables if v.shifted_to is not None)
            return loss(model, batch)

        chosen._loss = watching
        chosen.step(batches(1))
        seen[name] = points
    assert "embed.weight" in seen["apart"] and "embed.weight" not in seen["tied"]
    assert seen["tied"] == seen["apart"] - {"embed.weight", "head.weight"} != set()


def test_activations_that_are_computed_again_see_the_same_points() -> None:
    from zolr.models import build

    losses = []
    for checkpointing in (False, True):
        net = build(
            "roberta-base",
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=300,
            dtype=torch.bfloat16,
            dropout=0.0,
            seed=0,
        )
        checkpoint_activations(net, checkpointing)
        of = lambda model, batch: model(input_ids=batch).logits.float().square().mean((1, 2))  # noqa: E731
        run = zolr.Engine(net, zolr.compose("stiefel", "fo", rank=4, refresh_every=2), lr=1e-3, loss=of)
        data = torch.randint(5, 300, (3, 7), generator=torch.Generator().manual_seed(0))
        losses.append([run.step([data]).loss for _ in range(5)])
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 1), (2, 3, 5), (1, 2, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_model_may_write_into_the_output(shape: tuple[int, ...], dtype: torch.dtype, biased: bool) -> None:
    """As inplace activations do, and models that scale their queries."""
    model = nn.Sequential(nn.Linear(6, 6, biased), nn.Linear(6, 6, biased), nn.ReLU(inplace=True))
    model.append(nn.Linear(6, 1)).to(dtype)
    x = draw("x", *shape, 6).to(dtype)
    engine = zolr.Engine(
        model,
        zolr.compose("stiefel", "fo", rank=2),
        lr=1e-2,
        loss=lambda model, x: model(x).float().square().mean(),
    )
    losses = [engine.step([x]).loss for _ in range(4)]
    assert losses[-1] < losses[0]
