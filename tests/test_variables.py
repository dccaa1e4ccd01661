"""Laws of variables.py: however a perturbation reaches a weight, the model computes the same; attaching leaves no trace."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zolr.attaching import attach, detach
from zolr.engine import Engine
from zolr.errors import UsageError
from zolr.estimators.backprop import Backprop
from zolr.estimators.forward import Forward
from zolr.estimators.spsa import Spsa
from zolr.keys import Key
from zolr.kinds import CATEGORIES, categories
from zolr.methods import compose
from zolr.variables import REALIZATIONS, shifted

PROJECTORS = ("stiefel", "two_sided", "identity")
VOCABULARY = 20


class Plain(nn.Module):
    """An MLP over a padded embedding; `tied` shares it with the head."""

    def __init__(self, tied: bool = False, padding: int | None = 0) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 6, padding_idx=padding), nn.LayerNorm(9)
        self.up, self.same, self.down = nn.Linear(6, 9), nn.Linear(9, 9, bias=False), nn.Linear(9, 6)
        self.head = nn.Linear(6, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.embed(input_ids))))
        return self.head(self.down(torch.tanh(self.same(x))))


def build(name: str) -> nn.Module:
    if name in ("mlp", "tied", "tied, no padding"):
        return Plain(name.startswith("tied"), None if "no padding" in name else 0)
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    size = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if name == "gpt2":  # Conv1D, tied, no padding row
        return GPT2LMHeadModel(GPT2Config(**size, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    size |= {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    if name == "bert":  # tied decoder, padding row 1, a bias with two names
        return BertForMaskedLM(BertConfig(**size, intermediate_size=12))
    if name == "llama":  # not tied, grouped heads, no biases
        return LlamaForCausalLM(LlamaConfig(**size, intermediate_size=12, num_key_value_heads=1))
    return OPTForCausalLM(
        OPTConfig(**size, ffn_dim=12, word_embed_proj_dim=4)
    )  # a subclassed embedding, projections


MODELS = ("mlp", "tied", "tied, no padding", "bert", "llama", "gpt2", "opt")
ROUNDING = {
    "llama": 1e-6
}  # its norms compute in float32 whatever the model is; the others are float64 throughout


@cache
def start(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).double().eval()
        for parameter in model.parameters():  # initial zeros and ones would hide mistakes
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return model


def make(name: str) -> nn.Module:
    return copy.deepcopy(start(name))


def draw_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 3:], mask[1, 3:] = 1, 0  # padded on the right
    ids[2, 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


BATCH = draw_batch()


def outputs(model: nn.Module) -> Tensor:
    got = model(**BATCH)
    return got if isinstance(got, Tensor) else got.logits


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    got = model(**batch)
    logits = got if isinstance(got, Tensor) else got.logits
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].roll(1, 1).flatten())


def method(projector: str, paradigm: str = "zo", side: str | None = None) -> Any:
    eps = {"eps": 1e-2} if paradigm == "zo" else {}
    rank = None if projector == "identity" else 3
    return compose("stiefel", paradigm, projector=projector, rank=rank, side=side, optimizer="sgd", **eps)


@contextmanager
def in_mid_window(
    name: str, projector: str, realization: Any, side: str | None = None
) -> Iterator[tuple[nn.Module, Engine]]:
    """A model in the middle of a window: coordinates and decay are not those of its start."""
    model = make(name)
    engine = Engine(model, method(projector, side=side), lr=1e-2, loss=loss, realization=realization)
    for v in engine.variables:
        if not v.is_full:
            v.value.data.copy_(v.mask(0.05 * Key(3).fold_in(v.name).normal(v.value.shape).double()))
            v.moved, v.decay = True, 0.9
    yield model, engine


def explicit(model: nn.Module, engine: Engine) -> nn.Module:
    """A plain copy whose weights are `decay * W + lift(B)`, written by hand."""
    plain = detach(copy.deepcopy(model))
    parameters = dict(plain.named_parameters())
    for v in engine.variables:
        if not v.is_full:
            lifted = v.subspace.lift(v.value.detach())
            parameters[v.name].data.mul_(v.decay).add_(lifted.T if v.transposed else lifted)
    return plain


# ---- E3: realizations and signs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_e3_every_realization_is_the_dense_weight(name, projector):
    for realization in REALIZATIONS:
        with in_mid_window(name, projector, realization) as (model, engine):
            plain = explicit(model, engine)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    assert torch.allclose(
                        outputs(model), outputs(plain), rtol=0, atol=ROUNDING.get(name, 1e-12)
                    ), realization


def slopes(
    name: str, projector: str, realization: str, signs: str, side: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    with in_mid_window(name, projector, realization, side) as (model, engine):
        got: dict[str, Tensor] = {}
        estimator = Spsa(eps=1e-2, probes=2, law="gaussian", signs=signs)  # type: ignore[arg-type]
        seen = estimator(
            lambda b: loss(model, b), [BATCH], engine.variables, lambda v, g: got.update({v.name: g}), Key(1)
        )
        assert seen.slopes is not None
        return torch.cat((seen.loss.reshape(1), seen.slopes)), got


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_e3_realizations_and_signs_give_the_same_losses_and_gradients(name, projector):
    expected, gradients = slopes(name, projector, "rebuild", "sequence")
    allowed = 100 * ROUNDING.get(name, 1e-12)  # a slope divides by 2 eps
    assert float(expected[1:].abs().min()) > 1e-4
    for realization in REALIZATIONS:
        for signs in ("sequence", "together") if realization != "inplace" else ("sequence",):
            got, other = slopes(name, projector, realization, signs)
            assert torch.allclose(got, expected, rtol=0, atol=allowed), (realization, signs)
            assert all(torch.allclose(other[n], gradients[n], rtol=0, atol=10 * allowed) for n in gradients)


class Branching(Plain):
    """A forward that looks at its numbers, which vmap has no rule for."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x if float(x.sum()) > -1e9 else -x)


def test_e3_signs_together_fall_back_where_an_operation_has_no_batching_rule():
    losses = []
    for signs in ("sequence", "together"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Branching().double()
        estimator = Spsa(eps=1e-2, signs=signs)  # type: ignore[arg-type]
        used = lambda n, p: n.startswith(("embed", "head"))  # noqa: E731
        engine = Engine(
            model, replace(method("stiefel"), estimator=estimator), lr=1e-2, loss=loss, select=used
        )
        if signs == "together":
            with pytest.warns(UserWarning, match="signs are evaluated in sequence, not together: "):
                losses.append(engine.step([BATCH]).slope)
        else:
            losses.append(engine.step([BATCH]).slope)
        losses.append(engine.step([BATCH]).slope)
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-9)


class Merging(Plain):
    """A forward that takes the axis of the signs for examples of its own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = super().forward(input_ids, attention_mask)
        return out * 2 if torch._C._functorch.is_batchedtensor(out) else out


def test_e3_signs_together_are_compared_with_sequence_at_first_use():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Merging().double()
    estimator = Spsa(eps=1e-2, signs="together")
    engine = Engine(model, replace(method("stiefel"), estimator=estimator), lr=1e-2, loss=loss)
    with pytest.warns(UserWarning, match="in sequence, not together: the losses differ by"):
        first = engine.step([BATCH])
    assert engine.method.estimator.signs == "sequence"  # type: ignore[attr-defined]
    assert first.forwards == 4 + 2 and engine.step([BATCH]).forwards == 2  # tried, stepped


@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "opt"])
def test_e3_a_left_basis_gives_the_same_in_every_realization(name):
    expected, _ = slopes(name, "stiefel", "rebuild", "sequence", "left")
    for realization in REALIZATIONS:
        assert torch.allclose(
            slopes(name, "stiefel", realization, "sequence", "left")[0], expected, rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("realization", ["side", "rebuild"])
def test_e3_gradients_are_those_of_the_dense_weight(name, projector, realization):
    with in_mid_window(name, projector, realization) as (model, engine):
        plain = explicit(model, engine)
        for p in plain.parameters():
            p.requires_grad_(True)
        loss(plain, BATCH).backward()
        dense = {n: p.grad for n, p in plain.named_parameters()}
        got: dict[str, Tensor] = {}
        emit = lambda v, g: got.update({v.name: g.clone()})  # noqa: E731
        Backprop()(lambda b: loss(model, b), [BATCH], engine.variables, emit, Key(0))
        for v in engine.variables:
            gradient = dense[v.name]
            assert gradient is not None
            projected = v.subspace.project(gradient.T if v.transposed else gradient)
            assert torch.allclose(
                v.mask(got[v.name]), v.mask(projected), rtol=0, atol=ROUNDING.get(name, 1e-10)
            ), (realization, v.name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_e3_forward_mode_slopes_are_those_of_backprop(name, projector):
    with in_mid_window(name, projector, "auto") as (model, engine):
        gradients: dict[str, Tensor] = {}
        emit = lambda v, g: gradients.update({v.name: v.mask(g.clone())})  # noqa: E731
        Backprop()(lambda b: loss(model, b), [BATCH], engine.variables, emit, Key(0))
        seen: dict[str, Tensor] = {}
        estimate = Forward()(
            lambda b: loss(model, b), [BATCH], engine.variables, lambda v, g: seen.update({v.name: g}), Key(1)
        )
        assert estimate.slopes is not None
        slope = estimate.slopes[0]
        # one probe: the gradient is slope * z, so z is known and <gradient, z> must be the slope
        direct = sum(
            float((gradients[n] * v.mask(seen[n] / slope)).sum())
            for n, v in ((v.name, v) for v in engine.variables)
        )
        assert abs(direct - float(slope)) < ROUNDING.get(name, 1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
@pytest.mark.parametrize(
    ("projector", "side"),
    [("stiefel", "right"), ("stiefel", "left"), ("two_sided", None), ("identity", None)],
)
def test_e3_the_padding_row_never_moves(paradigm, projector, side, tied):
    for realization in ("side", "rebuild", "inplace") if paradigm == "zo" else ("side",):
        model = make("tied" if tied else "mlp")
        row = model.embed.weight[0].detach().clone()
        assert float(row.abs().min()) > 0
        method_ = replace(
            method(projector, paradigm, side), refresh_every=None if projector == "identity" else 2
        )
        engine = Engine(model, method_, lr=0.1, loss=loss, realization=realization)
        batch = {"input_ids": BATCH["input_ids"].clone(), "attention_mask": BATCH["attention_mask"]}
        batch["input_ids"][:, 1] = 0  # padding is looked up, and under a tied head also predicted
        for _ in range(5):
            engine.step([batch])
            with torch.no_grad():
                assert torch.allclose(model.embed(torch.tensor([0]))[0], row, rtol=0, atol=1e-12)
        assert engine.variables[0].name == "embed.weight" and len(engine.variables[0].sites) == 1 + tied
        plain = engine.detach()
        assert torch.allclose(plain.embed.weight[0], row, rtol=0, atol=1e-12)
        assert not torch.allclose(plain.embed.weight[3:], start("tied" if tied else "mlp").embed.weight[3:])


def test_e3_without_a_padding_row_every_row_moves():
    model = make("tied, no padding")
    engine = Engine(model, method("stiefel", "zo"), lr=0.1, loss=loss)
    for _ in range(3):
        engine.step([BATCH])
    assert bool((engine.detach().embed.weight != start("tied, no padding").embed.weight).any(1).all())


@pytest.mark.parametrize("realization", REALIZATIONS)
@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
def test_e3_inputs_of_any_shape(paradigm, realization):
    def squared(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).square().mean()

    inputs = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cases: list[tuple[Callable[[], nn.Module], list[Any]]] = [
        (lambda: nn.Linear(6, 4), [inputs, inputs[0], inputs[0, 0], inputs.mT.contiguous().mT]),
        (lambda: nn.Embedding(7, 4), [torch.tensor([[1, 2], [3, 3]]), torch.tensor([5]), torch.tensor(3)]),
    ]
    for layer, batches in cases:
        for batch in batches:
            results = []
            for chosen in (realization, "rebuild"):
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    model = layer().double()
                engine = Engine(model, method("stiefel", paradigm), lr=0.1, loss=squared, realization=chosen)  # type: ignore[arg-type]
                engine.step([batch])
                engine.step([batch])
                with torch.no_grad():
                    results.append(model(batch))
            assert results[0].shape == results[1].shape and torch.allclose(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("realization", ["side", "rebuild"])
@pytest.mark.parametrize("paradigm", ["fo", "zo", "fwd"])
def test_e3_runs_under_autocast(paradigm, realization):
    results = []
    for enabled in (False, True):

        def narrow(model: nn.Module, batch: dict[str, Tensor], enabled: bool = enabled) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return loss(model, batch).float()

        engine = Engine(
            make("tied").float(), method("stiefel", paradigm), lr=1e-2, loss=narrow, realization=realization
        )
        results.append([engine.step([BATCH]).loss for _ in range(3)])
    assert results[0] == pytest.approx(results[1], rel=0.02) and results[0] != results[1]


# ---- which path a site takes -----------------------------------------------------------------------------------------


class Doubling(nn.Linear):
    """A linear layer that is not one."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * F.linear(x, self.weight, self.bias) + self.weight.sum()


class Late(nn.Embedding):
    """An embedding with an offset, as OPT's."""

    def forward(self, ids: Tensor, offset: int = 2) -> Tensor:  # type: ignore[override]
        return super().forward(ids + offset)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice, self.plain = (
            Late(VOCABULARY + 2, 6, padding_idx=1),
            Doubling(6, 6),
            nn.Linear(6, VOCABULARY),
        )
        self.sparse = nn.Embedding(VOCABULARY, 6, max_norm=1.0)
        self.normed = weight_norm(nn.Linear(6, 6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.plain(torch.tanh(self.normed(self.twice(self.embed(input_ids, offset=2)))))


@pytest.mark.parametrize("realization", REALIZATIONS)
def test_e3_subclasses_are_rebuilt_and_never_take_the_side_path(realization):
    model = Custom().double()
    engine = Engine(
        model,
        method("stiefel"),
        lr=1e-2,
        loss=loss,
        realization=realization,
        select=lambda n, _: "sparse" not in n,
        check=BATCH,
    )
    kinds = {s.name: s.kind for v in engine.variables for s in v.sites if len(v.shape) == 2}
    assert kinds["plain.weight"] == "linear" and {kinds["embed.weight"], kinds["twice.weight"]} == {"other"}
    assert all(kinds[n] == "other" for n in kinds if n.startswith("normed"))
    assert all(not v.prefers_side("other", 1) for v in engine.variables)
    engine.step([BATCH])
    engine.verify(BATCH)
    plain = engine.detach()
    assert type(plain.twice) is Doubling and type(plain.embed) is Late
    assert [s.kind for v in attach(model, lambda n, _: "sparse" in n) for s in v.sites] == [
        "other"
    ]  # it renormalizes


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_sites_and_of_weights(name):
    model = make(name)
    kinds = categories(model)
    assert set(kinds) == {n for n, _ in model.named_parameters()} and set(kinds.values()) <= set(CATEGORIES)
    assert all((kinds[n] in ("bias", "norm")) == (p.dim() == 1) for n, p in model.named_parameters())
    engine = Engine(model, method("stiefel"), lr=1e-2, loss=loss)
    sites = {s.name: s.kind for v in engine.variables for s in v.sites if len(v.shape) == 2}
    shared = {v.name for v in engine.variables if len(v.sites) > 1 and len(v.shape) == 2}
    embedding = {"bert": "bert.embeddings.word_embeddings.weight", "gpt2": "transformer.wte.weight"}.get(
        name, "embed.weight"
    )
    assert (embedding in shared) == (name in ("tied", "tied, no padding", "bert", "gpt2"))
    assert (
        kinds[embedding if embedding in kinds else next(n for n in kinds if "embed_tokens" in n)]
        == "embedding"
    )
    if name == "gpt2":
        assert "conv1d" in sites.values() and any(v.transposed for v in engine.variables)
        assert all(v.shape == tuple(reversed(v.weight.shape)) for v in engine.variables if v.transposed)
    if name == "opt":
        assert sites["model.decoder.embed_positions.weight"] == "other"
    if name == "llama":
        assert kinds["lm_head.weight"] == "head"


def test_auto_takes_the_path_that_moves_fewer_bytes():
    (variable,) = attach(nn.Linear(64, 64, bias=False), lambda n, p: True)
    variable.open(compose("stiefel", rank=4).projector.draw((64, 64), Key(0), like=torch.zeros(1)))
    with torch.no_grad():
        assert variable.prefers_side("linear", 4) and not variable.prefers_side("linear", 4096)
        assert variable.prefers_side("embedding", 4096)
    assert variable.prefers_side("linear", 4096)  # under autograd it saves x P alone
    for forced in ("side", "rebuild"):
        variable.realization = forced
        with torch.no_grad():
            assert (
                variable.prefers_side("linear", 4)
                == variable.prefers_side("linear", 4096)
                == (forced == "side")
            )


# ---- attaching leaves no trace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_attaching_keeps_keys_types_and_outputs(name):
    model = make(name)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        before = outputs(model)
    engine = Engine(model, method("stiefel"), lr=1e-2, loss=loss)
    assert list(model.state_dict()) == keys
    assert all(
        isinstance(m, kind) and type(m).__name__ == kind.__name__
        for m, kind in zip(model.modules(), kinds, strict=True)
    )
    with torch.no_grad():
        assert torch.equal(outputs(model), before)  # nothing has moved: the same operations
    engine.detach()
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["tied", "bert", "gpt2"])
def test_a_deepcopy_of_an_attached_model_is_a_model_of_its_own(name):
    with in_mid_window(name, "stiefel", "auto") as (model, engine):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            before = outputs(model)
            assert torch.equal(outputs(twin), before)
            for _ in range(3):
                engine.step([BATCH])
            engine.fold()
            assert torch.equal(outputs(twin), before) and not torch.equal(outputs(model), before)
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "realization",
    [
        "side",
        pytest.param(
            "rebuild",
            marks=pytest.mark.xfail(
                condition=torch.__version__ < (2, 12),
                reason="dynamo of torch 2.11 does not trace that a module's attribute goes again",
                strict=True,
            ),
        ),
    ],
)
def test_an_attached_model_compiles_as_one_graph(realization):
    torch._dynamo.reset()
    model = make("tied")
    engine = Engine(model, method("stiefel"), lr=1e-2, loss=loss, realization=realization)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = BATCH["input_ids"]
    with torch.no_grad():
        assert torch.equal(compiled(ids), model(ids))
        engine.step([BATCH])
        assert torch.equal(compiled(ids), model(ids))  # live coordinates, not constants of the trace
        v = engine.variables[0]
        with v.at(v.mask(v.value + 0.1)):
            inside = compiled(ids)
            assert torch.equal(inside, model(ids))
        assert torch.equal(compiled(ids), model(ids)) and not torch.equal(compiled(ids), inside)


def test_forward_hooks_are_kept():
    model, calls = make("mlp"), []
    handle = model.up.register_forward_hook(lambda module, args, out: calls.append("after"))
    model.up.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.embed.register_forward_hook(
        lambda module, args, out: out + 1.0
    )  # hooks that change an output still do
    with torch.no_grad():
        expected = outputs(model)
    engine = Engine(model, method("stiefel"), lr=1e-2, loss=loss)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(outputs(model), expected) and calls == ["before", "after"]
    engine.step([BATCH])
    assert calls == ["before", "after"] * 3
    engine.detach()
    handle.remove()
    calls.clear()
    outputs(model)
    assert calls == ["before"]


class Failing(nn.Linear):
    """Raises while its forward runs."""

    broken, saw = False, False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.broken:
            Failing.saw = "weight" in self.__dict__
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("realization", REALIZATIONS)
def test_e4_an_exception_inside_a_forward_leaves_no_shadow(projector, realization):
    model = nn.Sequential(nn.Linear(5, 5), Failing(5, 5), nn.Linear(5, 5)).double()
    x = torch.ones(2, 5, dtype=torch.float64)
    engine = Engine(model, method(projector), lr=1e-2, loss=lambda m, b: m(b).sum(), realization=realization)
    engine.step([x])
    direction = lambda name, rows=slice(None): torch.ones_like(values[name])[rows]  # noqa: E731
    values = {v.name: v.value.detach() for v in engine.variables}
    with torch.no_grad():
        before, contents = model(x), [sorted(m.__dict__) for m in model.modules()]
        points = [(v._point, v._rows, v._plain) for v in engine.variables]
        for plain in (True, False) if realization != "inplace" else (True,):
            Failing.broken, Failing.saw = True, False
            try:
                with pytest.raises(KeyboardInterrupt), shifted(engine.variables, direction, 0.1, plain=plain):
                    model(x)
            finally:
                Failing.broken = False
            assert Failing.saw or realization == "inplace"  # the weight was shadowed when it happened
            assert [(v._point, v._rows, v._plain) for v in engine.variables] == points
            assert [sorted(m.__dict__) for m in model.modules()] == contents
            assert torch.allclose(model(x), before, rtol=0, atol=1e-12 if realization == "inplace" else 0)


def test_contexts_nest_and_restore():
    model = make("mlp")
    engine = Engine(model, method("stiefel"), lr=1e-2, loss=loss)
    v = engine.variables[0]
    one = v.mask(torch.ones_like(v.value))
    with torch.no_grad():
        still = outputs(model)
        with v.shifted(one, 0.1):
            first = outputs(model)
            with v.at(v.value.detach() + 0.2 * one):
                assert not torch.equal(outputs(model), first)
            assert torch.equal(outputs(model), first)
        assert torch.equal(outputs(model), still) and not torch.equal(first, still)
    assert not bool(v.value.any())


def test_bad_attachments_are_refused():
    model = make("mlp")
    with pytest.raises(UsageError, match="realization 'sideways' is not known; use one of auto, side"):
        attach(model, lambda n, p: True, "sideways")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no weight of the model is selected.*widen"):
        attach(model, lambda n, p: False)
    attach(model, lambda n, p: n.startswith("up"))
    with pytest.raises(UsageError, match="module 'up' is attached to a run already; detach that run first"):
        attach(model, lambda n, p: True)
    detach(model, ["up.weight"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["up.weight"]
    attach(model, lambda n, p: True)


# ---- verify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_verify_passes_on_real_models(name, projector):
    model = make(name).float()
    engine = Engine(model, method(projector), lr=1e-2, loss=loss, weight_decay=0.1)
    engine.step([BATCH])  # coordinates and decay of a window that has begun
    before = engine.state_dict()["variables"]
    engine.verify(BATCH)
    after = engine.state_dict()["variables"]
    assert all(torch.equal(before[n]["weight"], after[n]["weight"]) for n in before)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("realization", ["side", "rebuild"])
def test_verify_passes_below_float32(projector, realization):
    for dtype in (torch.bfloat16, torch.float16):
        engine = Engine(
            make("tied").to(dtype),
            method(projector),
            lr=1e-2,
            loss=loss,
            realization=realization,
            check=BATCH,
        )
        engine.step([BATCH])
        engine.verify(BATCH)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        own = type("OwnAttention", (nn.MultiheadAttention,), {})  # of which nobody knows what it reads
        self.embed, self.attention = nn.Embedding(VOCABULARY, 8), own(8, 2, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(self.attention(x, x, x)[0])


class PastTheModule(Plain):
    """A head that reads the embedding's weight itself."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return (
            self.down(torch.tanh(self.same(self.norm(self.up(self.embed(input_ids)))))) @ self.embed.weight.T
        )


@pytest.mark.parametrize(
    ("model", "name", "way_out"),
    [
        (Attention, "attention.out_proj.weight", "narrower selection"),
        (PastTheModule, "embed.weight", "exclude it from training"),
    ],
)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_verify_names_a_weight_that_is_read_past_its_modules_forward(model, name, way_out, projector):
    torch.manual_seed(0)
    broken = model().double()
    used = (lambda n, p: not n.startswith("head")) if model is PastTheModule else "all"
    with pytest.raises(UsageError, match=f"weight '{name}' .*{way_out}"):
        Engine(broken, method(projector), lr=1e-2, loss=loss, check=BATCH, select=used)
    # without the weights at fault the same model is fine
    wrong = {Attention: ("attention.out_proj",), PastTheModule: ("embed", "head")}[model]
    rest = lambda n, p: not n.startswith(wrong)  # noqa: E731
    Engine(broken, method(projector), lr=1e-2, loss=loss, check=BATCH, select=rest).step([BATCH])


class Encoder(nn.Module):
    """Layers of torch that read the weights of their parts past these: attention always, the layers in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        blank = None if attention_mask is None else attention_mask == 0
        return self.head(self.layers(self.embed(input_ids), src_key_padding_mask=blank))


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
@pytest.mark.parametrize("select", ["all", "linear", "narrow"])
def test_an_encoder_of_torch_is_evaluated_at_its_live_weights(paradigm: str, select: str) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen = batch["attention_mask"] > 0  # torch makes zeros of what is not
        return F.cross_entropy(model(**batch)[seen], batch["input_ids"][seen])

    model = Encoder()
    used = (lambda n, p: ".linear1." in n) if select == "narrow" else select
    eps = {"eps": 1e-3} if paradigm == "zo" else {}
    run = Engine(
        model, compose("stiefel", paradigm, rank=2, **eps), lr=3e-2, loss=loss, check=BATCH, select=used
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reads weight|.*no forward of the first step")
        for _ in range(3):
            run.step([BATCH])
    found = []
    for training, grad in ((True, True), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            found.append(float(loss(model, BATCH)))
    assert torch.backends.mha.get_fastpath_enabled()
    plain = run.detach().eval()
    with torch.no_grad():
        found.append(float(loss(plain, BATCH)))
    assert found == pytest.approx(found[:1] * 4, rel=1e-5)
    moved = {name for name, weight in plain.named_parameters() if not torch.equal(weight, before[name])}
    attention = {"layers.layers.0.self_attn.out_proj.weight", "layers.layers.1.self_attn.in_proj_weight"}
    assert (attention <= moved) == (select != "narrow") and "layers.layers.0.linear1.weight" in moved
