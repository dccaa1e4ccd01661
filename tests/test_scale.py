"""`Method.scale`: the factor on the steps of projected matrices, where nothing is lifted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zolr.engine import Engine, Made
from zolr.methods import Method, compose


class Tiny(nn.Module):
    """An embedding, two matrices, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 8)
        self.a, self.norm, self.b = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 9)
        self.head = nn.Linear(9, 23, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every position."""
        return self.head(self.b(self.norm(self.a(self.table(ids)).tanh())))


def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny().double()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten().roll(1))


def batch(step: int) -> Tensor:
    return torch.randint(23, (4, 5), generator=torch.Generator().manual_seed(step))


def trained(
    method: Method, steps: int = 5, lr: float = 0.05, net: nn.Module | None = None, **more: Any
) -> dict[str, Tensor]:
    engine = Engine(net or model(), method, lr=lr, loss=loss, **more)
    for step in range(steps):
        engine.step([batch(step)])
    return dict(engine.detach().state_dict())


def equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def course(step: int) -> float:
    return 1.0 / (1 + step)


def test_under_sgd_it_scales_the_projection() -> None:
    """`W − lr s G P Pᵀ` is a step at rate `lr s`, and one with `P` times the root of s."""
    plain = compose("stiefel", "fo", rank=3, optimizer="sgd", refresh_every=2, tables="full")
    projector: Any = plain.projector
    found = trained(replace(plain, scale=0.25), schedule=course)
    equal(found, trained(replace(plain, projector=replace(projector, c=0.25)), schedule=course), 1e-12)
    unscaled = trained(plain, schedule=course)
    assert not torch.allclose(found["a.weight"], unscaled["a.weight"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_dense_base_has_two_rates(name: str) -> None:
    """Matrices at `scale` times the rate, tables and vectors at the rate: as a loop with two groups has it."""
    net = model()
    matrices = [net.a.weight, net.b.weight]
    apart = [net.table.weight, net.head.weight]
    vectors = [p for p in net.parameters() if all(p is not q for q in (*matrices, *apart))]
    if name == "adamw":
        inner = [(torch.optim.AdamW, matrices, 0.3, {}), (torch.optim.AdamW, apart + vectors, 1.0, {})]
    else:
        inner = [
            (torch.optim.Muon, matrices, 0.3, {"adjust_lr_fn": "match_rms_adamw"}),
            (torch.optim.AdamW, apart, 1.0, {"betas": (0.9, 0.95)}),
            (torch.optim.AdamW, vectors, 1.0, {}),
        ]
    optimizers = [(cls(values, lr=0.05, weight_decay=0.0, **more), s) for cls, values, s, more in inner]
    for step in range(5):
        loss(net, batch(step)).backward()
        for optimizer, factor in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * course(step) * factor
            optimizer.step()
            optimizer.zero_grad()
    equal(trained(compose(name, tables="full", scale=0.3), schedule=course), net.state_dict(), 1e-12)


def test_a_torch_scheduler_sees_the_rate_itself() -> None:
    method = compose("stiefel", "fo", rank=3, scale=0.5)
    seen = []

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        seen.extend(group["lr"] for group in optimizer.param_groups)
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    engine = Engine(model(), method, lr=0.04, loss=loss, schedule=schedule)
    assert set(seen) == {0.04} and len(seen) == 2
    assert [engine.step([batch(i)]).lr for i in range(3)] == [0.04, 0.02, 0.01]
    inside: list[float] = []
    engine.optimizer.register_step_pre_hook(
        lambda optimizer, *_: inside.extend(group["lr"] for group in optimizer.param_groups)
    )
    assert engine.step([batch(3)]).lr == 0.005 and sorted(inside) == [0.0025, 0.005]


@pytest.mark.parametrize("name", ["stiefel", "muon"])
def test_a_run_goes_on_with_the_same_bits(name: str) -> None:
    rank = {"rank": 3, "refresh_every": 2} if name == "stiefel" else {}
    method = compose(name, "fo", scale=0.3, tables="full", **rank)
    first = Engine(model(), method, lr=0.05, loss=loss, schedule=course)
    for step in range(3):
        first.step([batch(step)])
    second = Engine(model(), method, lr=0.05, loss=loss, schedule=course)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        first.step([batch(step)])
        second.step([batch(step)])
    equal(second.detach().state_dict(), first.detach().state_dict(), 0.0)


def test_steps_are_made_again_at_both_rates() -> None:
    method = compose("stiefel", "zo", rank=3, scale=0.3, refresh_every=2, set=["estimator.eps=1e-3"])
    first, record = Engine(model(), method, lr=0.05, loss=loss, schedule=course), list[Made]()
    first.ahead = record.append
    for step in range(5):
        first.step([batch(step)])
    second = Engine(model(), method, lr=0.05, loss=loss, schedule=course)
    for made in record:
        second.again(made)
    equal(second.detach().state_dict(), first.detach().state_dict(), 0.0)
