"""Layer policies: who is active when, and that what is not costs and changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.held import shapes
from zolr.keys import Key
from zolr.layers import LAYERS, blocks_of
from zolr.layers.bernoulli import Bernoulli
from zolr.layers.cycle import Cycle
from zolr.layers.sampled import Sampled
from zolr.memory import predict
from zolr.methods import compose
from zolr.models import build

KEY = Key(3)


class Stack(nn.Module):
    """An embedding, four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 9)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)
        )
        self.needs: list[bool] = []

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        self.needs = [h.requires_grad]
        for layer in self.layers:
            h = h + layer(h)
            self.needs.append(h.requires_grad)
        return self.head(self.norm(h))


def stack() -> Stack:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Stack()


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


IDS = torch.randint(9, (12, 4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_a_cycle_gives_every_block_one_turn_a_round(order):
    rounds = [[next(iter(Cycle(order=order).active(5, 5 * r + i, KEY))) for i in range(5)] for r in range(20)]
    assert all(sorted(r) == list(range(5)) for r in rounds)
    fixed = {"ascending": [0, 1, 2, 3, 4], "descending": [4, 3, 2, 1, 0]}
    assert all(r == fixed[order] for r in rounds) if order in fixed else len({tuple(r) for r in rounds}) > 10


@pytest.mark.parametrize(("layers", "share"), [(Sampled(count=2), 2 / 5), (Bernoulli(share=0.3), 0.3)])
def test_random_policies_have_their_marginals(layers, share):
    periods = 2000
    drawn = [set(layers.active(5, period, KEY)) for period in range(periods)]
    assert all(drawn) and drawn[:10] == [set(layers.active(5, p, KEY)) for p in range(10)]
    if isinstance(layers, Bernoulli):  # where no coin says yes, one block comes in all the same
        share += (1 - share) ** 5 / 5
    for block in range(5):
        found = sum(block in each for each in drawn) / periods
        assert abs(found - share) < 5 * (share * (1 - share) / periods) ** 0.5


def test_blocks_are_the_numbered_lists_of_real_models():
    for preset in ("bert-base", "roberta-base", "gpt2", "opt-125m", "llama-20m"):
        model = build(preset, device="meta")
        found = blocks_of(shapes(model), "always")
        numbers: Any = model.config
        assert len({b for b in found.values() if b}) == numbers.num_hidden_layers, preset
    sizes = shapes(stack())
    for outside in ("always", "never", "blocks"):
        found = blocks_of(sizes, outside)
        assert found["layers.2.0.weight"] == "layers.2"
        embed = {"always": None, "blocks": "embed"}
        assert ("embed.weight" in found) == (outside != "never")
        assert outside == "never" or found["embed.weight"] == embed[outside]
    assert blocks_of({"up.weight": (2, 2), "up.bias": (2,), "down.weight": (2, 2)}, "never") == {
        "up.weight": "up", "up.bias": "up", "down.weight": "down",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["badam", "lisa"])
def test_what_is_not_active_has_no_gradient_no_change_and_state_only_where_it_is_kept(name):
    model = stack()
    engine = Engine(model, compose(name, switch_every=2), lr=1e-2, loss=loss, weight_decay=0.1)
    names = [v.name for v in engine.variables]
    assert ("embed.weight" in names) == (name == "lisa")
    met: set[str] = set()
    for step, ids in enumerate(IDS[:8]):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine.step([ids])
        active = {v.name for v in engine.active}
        met = met | active if name == "lisa" else active
        assert len({n.split(".")[1] for n in active if n.startswith("layers")}) == (
            2 if name == "lisa" else 1
        )
        for v in engine.variables:
            assert bool((v.weight != before[v.name]).any()) == (v.name in active), (step, v.name)
            assert v.value.grad is None and (v.value in engine.optimizer.state) == (v.name in met)
        if (
            name == "badam"
        ):  # nothing below the active block is in the graph, which is where backward saves its work
            first = min(int(n.split(".")[1]) for n in active)
            assert model.needs == [depth > first for depth in range(5)]
        steps = {float(engine.optimizer.state[v.value]["step"]) for v in engine.active}
        assert name == "lisa" or steps == {step % 2 + 1.0}  # begins afresh at a switch


def test_any_method_takes_a_policy():
    for name, paradigm, settings in (
        ("stiefel", "fo", {"rank": 2, "refresh_every": 3}),
        ("galore", "fo", {"rank": 2, "refresh_every": 3}),
        ("lozo", "zo", {}),
        ("stiefel", "fwd", {"rank": 2, "refresh_every": 3}),
        ("adazo-sam", "fo", {}),
    ):
        method = compose(name, paradigm, blocks="cycle", switch_every=2, **settings)
        model = stack()
        engine = Engine(model, method, lr=1e-3, loss=loss)
        for ids in IDS[:4]:
            before = {n: p.detach().clone() for n, p in engine.export().named_parameters()}
            engine.step([ids])
            after = {n: p.detach() for n, p in engine.export().named_parameters()}
            moved = {n for n in after if bool((after[n] != before[n]).any())}
            assert moved and moved <= {v.name for v in engine.active}, name


def test_predictions_know_who_is_active():
    sizes: dict[str, int] = {}
    for name in ("adamw", "badam", "lisa"):
        found = predict("llama-20m", compose(name), batch_size=2, max_length=16)
        sizes[name] = found.optimizer_bytes
        assert any("periods" in text for text in found.assumptions) == (name != "adamw")
    assert sizes["badam"] < 0.3 * sizes["adamw"]
    assert sizes["lisa"] == pytest.approx(sizes["adamw"], rel=0.01)  # as after many periods


def test_bad_settings_are_refused():
    for layers, settings, words in (
        (Cycle, {"every": 0}, "every = 0 is no number of steps"),
        (Cycle, {"order": "up"}, "order 'up' is not known"),
        (Cycle, {"outside": "no"}, "outside 'no' is not known"),
        (Sampled, {"count": 0}, "0 blocks cannot be drawn"),
        (Bernoulli, {"share": 0.0}, "share = 0.0 is no probability"),
    ):
        with pytest.raises(UsageError, match=words):
            layers(**settings)
    with pytest.raises(UsageError, match="blocks 'cycel' is not known; did you mean 'cycle'"):
        compose("adamw", blocks="cycel")
    with pytest.raises(UsageError, match="blocks 'all' has no setting 'every'"):
        compose("adamw", switch_every=3)
    assert set(LAYERS) == {"all", "cycle", "sampled", "bernoulli"}
    assert replace(compose("adamw"), layers=Cycle()).layers == compose("badam").layers
