"""Laws of prediction and measurement: to the byte for every method, no growth over steps, no drift of what is not moved."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from zolr import lora
from zolr.engine import Engine
from zolr.estimators import changed, setting
from zolr.memory import WINDOW, LiveBytes, grow, hardest, kept, predict
from zolr.methods import METHODS, Method, compose
from zolr.models import build, checkpoint_activations, lm_loss, prompt_loss

PAIRS = [(name, paradigm) for name, row in METHODS.items() for paradigm in row.paradigms]
FAMILIES = {
    "roberta": dict(intermediate_size=72, num_attention_heads=2),
    "llama": dict(intermediate_size=80, num_attention_heads=2),
    "gpt2": dict(n_head=2),
}
ROWS, TOKENS = 5, 13  # odd on purpose: nothing is a multiple of anything


def config(family: str, **changes: Any) -> PreTrainedConfig:
    numbers = dict(vocab_size=211, hidden_size=48, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    return AutoConfig.for_model(family, **{**numbers, "bos_token_id": 1, **FAMILIES[family], **changes})


def short(method: Method, window: int = 3) -> Method:
    """The method with short windows, and nothing left to choose."""
    estimator: Any = method.estimator
    if setting(estimator, "eps", 1.0) is None:
        estimator = changed(estimator, eps=1e-3)
    if setting(estimator, "probes", 1) > 3:
        estimator = changed(estimator, probes=3)
    layers: Any = method.layers
    if layers.every is not None:  # both blocks of a model are met, for as long as state needs to be there
        layers = replace(layers, every=2)
    every = method.refresh_every and window
    return replace(method, estimator=estimator, refresh_every=every, layers=layers)


def batches(
    objective: str, rows: int, tokens: int, count: int, packed: bool = False
) -> list[dict[str, torch.Tensor]]:
    numbers = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 200, (rows, tokens), generator=numbers)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0  # padding, as predictions take it; without any, real masks are dropped
        labels = torch.zeros(rows, dtype=torch.long)
        prompt = dict(input_ids=ids, attention_mask=mask, positions=torch.ones_like(labels), labels=labels)
        found.append(dict(input_ids=ids, labels=ids.clone()) if objective == "lm" else prompt)
        if packed:  # two documents and a bit a row
            places = torch.arange(tokens).remainder(tokens // 2).expand(rows, -1)
            found[-1]["position_ids"] = places.contiguous()
    return found


def measured(shape: PreTrainedConfig, method: Method, settings: dict[str, Any], steps: int) -> LiveBytes:
    """Live bytes of real steps on real weights."""
    model, select = build(shape, dropout=0.0, dtype=settings["dtype"]), settings["select"]
    if settings.get("adapter"):
        pytest.importorskip("peft")
        lora.wrap(model, settings["adapter"])
        select = lora.trained
    checkpoint_activations(model, settings["checkpointing"])
    size = settings["batch_size"], settings["max_length"], settings["accumulation"]
    data = batches(settings["objective"], *size, settings.get("packed", False))
    loss: Any = lm_loss if settings["objective"] == "lm" else prompt_loss((3, 4))
    with LiveBytes() as live:
        live.track(model, *data)
        engine = Engine(model, method, lr=1e-3, loss=loss, select=select, guard=False)
        for _ in range(steps):
            engine.step(data)
    return live


def agrees(shape: PreTrainedConfig, method: Method, settings: dict[str, Any], steps: int) -> None:
    predicted = predict(shape, method, **settings)
    assert predicted.peak_bytes == pytest.approx(measured(shape, method, settings, steps).peak, rel=0.01)


# four cases take turns among the rows, which are many: two families, two precisions
CROSSED = [
    (name, paradigm, ("roberta", "llama")[i % 2], i % 4 > 1) for i, (name, paradigm) in enumerate(PAIRS)
]


@pytest.mark.parametrize(("name", "paradigm", "family", "low"), CROSSED)
def test_every_method_is_predicted_to_the_percent(family: str, name: str, paradigm: str, low: bool) -> None:
    """With one micro-batch in float32, and with two in bfloat16 and activations recomputed where there are any."""
    row = METHODS[name]
    learns = row.build(paradigm).projector.learns_from == "gradients"
    tokens = family == "llama" and not row.build(paradigm).private  # which needs one loss a row
    settings = dict(
        batch_size=ROWS,
        max_length=TOKENS,
        dtype=torch.bfloat16 if low else torch.float32,
        objective="lm" if tokens else "prompt",
        accumulation=2 if low else 1,
        checkpointing=low and paradigm == "fo",
        select="all" if row.adapter else row.trained(paradigm),
        adapter=row.adapter,
    )
    # a spectrum is full after a few windows; other methods hold all they ever will after one. One layer has every kind of
    # weight; policies that choose among layers need two
    shape = config(family, num_hidden_layers=2 if row.build(paradigm).layers.every or low else 1)
    agrees(shape, short(row.build(paradigm), 2 if learns else 3), settings, 13 if learns else 5)


@pytest.mark.parametrize("name", ["lisa", "badam", "gum", "dependent"])
def test_a_run_is_put_before_its_hardest_steps(name: str) -> None:
    """With blocks and coins as they are, whose worst a few steps from the beginning do not reach."""
    shape, every = config("llama", num_hidden_layers=4), METHODS[name].build("fo").refresh_every
    method = replace(compose(name, "fo"), refresh_every=every and WINDOW)
    data = batches("lm", ROWS, TOKENS, 1)
    model = build(shape, dropout=0.0)
    with LiveBytes() as live:
        live.track(model, *data)
        engine = Engine(model, method, lr=1e-3, loss=lm_loss, guard=False)
        grow(engine)
        engine.step(data)
        live.reset_peak()
        for steps in hardest(engine):
            for _ in range(steps):
                engine.step(data)
    predicted = predict(shape, method, batch_size=ROWS, max_length=TOKENS, objective="lm")
    assert predicted.peak_bytes == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize(("name", "checkpointing"), [("stiefel", False), ("stiefel", True), ("adamw", False)])
def test_dropout_is_predicted_as_it_is_trained(name: str, checkpointing: bool) -> None:
    """Masks are kept for the way back, and attention with dropout is not fused on the host."""
    shape = config(
        "roberta", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, num_attention_heads=4
    )
    model = build(shape)
    if checkpointing:
        checkpoint_activations(model)
    data = batches("prompt", 16, 31, 1)
    with LiveBytes() as live:
        live.track(model, *data)
        engine = Engine(model, short(compose(name, "fo")), lr=1e-3, loss=prompt_loss((3, 4)), guard=False)
        for _ in range(5):
            engine.step(data)
    size = dict(batch_size=16, max_length=31, checkpointing=checkpointing)
    own = predict(shape, short(compose(name, "fo")), dropout=None, **size)
    assert own.peak_bytes == pytest.approx(live.peak, rel=0.01)
    assert any("hidden_dropout_prob 0.1" in line for line in own.assumptions)
    without, card = (
        predict(shape, short(compose(name, "fo")), **size, **more)
        for more in ({}, dict(device="cuda", dropout=None))
    )
    assert without.peak_bytes < card.peak_bytes < own.peak_bytes  # on a card attention is fused all the same


@pytest.mark.parametrize(
    ("family", "name", "paradigm", "checkpointing", "rows", "tokens"),
    [
        ("llama", "adamw", "fo", False, 2, 257),
        ("gpt2", "adamw", "fo", True, 3, 512),
        ("llama", "stiefel", "fo", "selective", 7, 96),
        ("gpt2", "mezo", "zo", False, 2, 257),
        ("llama", "stiefel", "zo", False, 7, 96),
        ("gpt2", "stiefel", "fwd", False, 3, 130),
    ],
)
def test_documents_apart_are_predicted_with_their_mask(
    family: str, name: str, paradigm: str, checkpointing: Any, rows: int, tokens: int
) -> None:
    shape, method = config(family), short(compose(name, paradigm))
    settings = dict(batch_size=rows, max_length=tokens, dtype=torch.float32, objective="lm", packed=True)
    settings |= dict(accumulation=2, checkpointing=checkpointing, select="all")
    agrees(shape, method, settings, 4)
    if paradigm == "fo" and not checkpointing:  # each layer keeps a mask of float32 numbers for the way back
        joined = predict(shape, method, **{**settings, "packed": False})
        packed = predict(shape, method, **settings)
        assert packed.peak_bytes - joined.peak_bytes > 2 * 4 * rows * tokens**2
        assert any("documents apart" in line for line in packed.assumptions)


@pytest.mark.parametrize(("family", "select"), [("roberta", "norm"), ("llama", "attention"), ("gpt2", "all")])
def test_forward_mode_is_predicted_whatever_is_trained(family: str, select: str) -> None:
    """Tangents of weights that are not trained are zeros which nobody writes down."""
    settings = dict(batch_size=ROWS, max_length=TOKENS, dtype=torch.float32, objective="prompt")
    settings |= dict(accumulation=1, checkpointing=False, select=select)
    agrees(config(family), short(compose("stiefel", "fwd")), settings, 5)


@pytest.mark.parametrize(
    ("select", "objective"), [("attention", "prompt"), ("all", "prompt"), ("attention", "lm")]
)
def test_both_signs_in_one_pass_are_predicted(select: str, objective: str) -> None:
    """As rows of one batch, and by vmap where a vector is trained or a loss is that of tokens."""
    settings = dict(batch_size=ROWS, max_length=TOKENS, dtype=torch.float32, objective=objective)
    settings |= dict(accumulation=2, checkpointing=False, select=select)
    method = short(compose("stiefel", "zo", signs="together", eps=1e-3))
    agrees(config("roberta" if objective == "prompt" else "llama"), method, settings, 5)


@pytest.mark.parametrize("paradigm", ["fo", "zo"])
def test_a_spectrum_is_predicted_as_what_it_is(paradigm: str) -> None:
    """What `dependent` keeps beyond the bases of `stiefel` is in the figures."""
    size = dict(batch_size=2, max_length=5)
    learned = predict(config("roberta"), compose("dependent", paradigm, rank=4), **size)
    plain = predict(config("roberta"), compose("stiefel", paradigm, rank=4), **size)
    assert learned.coords_bytes > plain.coords_bytes
    assert not any("Stiefel" in line or "taken to be" in line for line in learned.assumptions)


@pytest.mark.slow
@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_a_middle_sized_model_is_predicted_to_the_percent(paradigm: str) -> None:
    shape = config("roberta", vocab_size=20000, hidden_size=384, num_hidden_layers=6)
    shape.intermediate_size, shape.num_attention_heads = 1536, 6
    settings = dict(batch_size=15, max_length=61, dtype=torch.float32, objective="prompt", accumulation=1)
    settings |= dict(checkpointing=False, select=METHODS["stiefel"].trained(paradigm))
    agrees(shape, short(compose("stiefel", paradigm), 2), settings, 5)


@pytest.mark.parametrize(("name", "paradigm"), [("stiefel", "zo"), ("stiefel", "fo"), ("dependent", "fo")])
def test_live_bytes_do_not_grow_from_step_10_to_step_1000(name: str, paradigm: str) -> None:
    """Sixty windows later a run holds what it held: what a step leaves behind is gone."""
    method = short(compose(name, paradigm, rank=2), 16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(7, 12), torch.randint(3, (7,))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    engine = Engine(model, method, lr=1e-3, loss=loss)
    with LiveBytes() as live:
        live.track(model, x, y)
        live.track(*(tensor for part in kept(engine).values() for tensor in part))
        at = {}
        for step in range(1, 1001):
            engine.step([(x, y)])
            if step in (10, 170, 1000):
                at[step] = live.live
    # a spectrum fills up in its first windows, all else is there at step 10
    first = 170 if name == "dependent" else 10
    assert at[1000] <= at[first], at
    assert engine.variables[0].window > 50


# --- precision ----------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def steps_without_movement(dtype: torch.dtype, realization: Any, method: str) -> float:
    """Relative change of the weights after 2,000 steps of which each probes and moves nothing."""
    torch.manual_seed(0)
    model = nn.Linear(24, 16, bias=False).to(dtype)
    nn.init.normal_(model.weight, std=0.04)
    before = model.weight.detach().clone()
    x = torch.randn(4, 24)

    def flat(model: nn.Module, batch: Any) -> torch.Tensor:
        # every probe is evaluated, and its loss says nothing
        return (model(batch.to(model.weight.dtype)).float() * 0).mean()

    parts = dict(projector=None if method == "mezo" else "stiefel")
    engine = Engine(
        model,
        compose(method, "zo", eps=1e-3, refresh_every=None if method == "mezo" else 200, **parts),
        lr=1e-6,
        loss=flat,
        realization=realization,
    )
    for _ in range(2000):
        assert not engine.step([x]).skipped
    after = engine.detach().weight.detach()
    return float((after.double() - before.double()).norm() / before.double().norm())


@pytest.mark.parametrize(
    ("method", "realization", "dtype"),
    [
        *(("stiefel", "side", dtype) for dtype in sorted(DTYPES)),
        *(("mezo", "rebuild", dtype) for dtype in sorted(DTYPES)),
        ("stiefel", "rebuild", "bfloat16"),
    ],
)
def test_weights_do_not_drift_where_nothing_moves(dtype: str, method: str, realization: str) -> None:
    assert steps_without_movement(DTYPES[dtype], realization, method) == 0.0


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_walk_in_place_drifts_where_nothing_moves(dtype: str) -> None:
    """MeZO's walk as published rounds at every visit, by a share of a unit in the last place: the coarser, the further."""
    drift = steps_without_movement(DTYPES[dtype], "inplace", "stiefel")
    assert torch.finfo(DTYPES[dtype]).eps < drift < 1.0


def test_a_master_in_float32_takes_the_drift_of_the_walk_back() -> None:
    """Weights below float32 that are trained whole are written anew from their master at every step."""
    assert steps_without_movement(torch.bfloat16, "inplace", "mezo") == 0.0


OVERFLOWS = pytest.mark.xfail(
    condition=torch.__version__ >= (2, 13),  # 2.11 does not
    reason="torch's forward derivative of layer norm overflows float16",
    strict=True,
)


@pytest.mark.parametrize(
    ("paradigm", "dtype"),
    [
        *((paradigm, dtype) for paradigm in ("zo", "fo") for dtype in ("bfloat16", "float16")),
        ("fwd", "bfloat16"),
        pytest.param("fwd", "float16", marks=OVERFLOWS),
    ],
)
def test_low_precision_weights_have_float32_coordinates_and_losses(paradigm: str, dtype: str) -> None:
    model = build(config("roberta"), dropout=0.0, dtype=DTYPES[dtype])
    losses: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        value = prompt_loss((3, 4))(model, batch)
        losses.append(value.dtype)
        return value

    engine = Engine(model, short(compose("stiefel", paradigm), 2), lr=1e-3, loss=loss)
    for _ in range(3):
        assert not engine.step(batches("prompt", ROWS, TOKENS, 2)).skipped
    assert set(losses) == {torch.float32}
    for variable in engine.variables:
        assert variable.value.dtype == torch.float32 and variable.weight.dtype == DTYPES[dtype]
    for tensor in kept(engine)["optimizer"]:
        assert not tensor.is_floating_point() or tensor.dtype == torch.float32
    trained = engine.detach()
    assert all(p.dtype == DTYPES[dtype] for p in trained.parameters())
