"""Laws of memory.py: bytes counted equal bytes that exist, fake tensors count as real ones do."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, PreTrainedConfig

from zolr import memory, models
from zolr.engine import Engine
from zolr.errors import BudgetError, DataError, UsageError
from zolr.held import RANK
from zolr.memory import OVERHEAD, PARTS, LiveBytes, kept, largest_batch, measure, predict, resident, size_of
from zolr.methods import METHODS, compose
from zolr.models import build, checkpoint_activations, class_loss, lm_loss, prompt_loss
from zolr.optim import OptimizerRule
from zolr.projectors import PROJECTORS

KB = 1024  # one tensor of 256 float32 numbers


def kb(n: int = 1) -> torch.Tensor:
    return torch.ones(256 * n)


def test_every_storage_is_counted_once_and_until_its_last_view_is_gone():
    with LiveBytes() as live:
        x = kb()
        views = [x.view(16, 16), x[::2], x.t() if x.dim() > 1 else x[1:]]
        assert (live.live, live.peak) == (KB, KB)
        del x
        assert live.live == KB
        del views
        assert (live.live, live.peak) == (0, KB)


def test_small_tensors_take_a_whole_block():
    with LiveBytes() as live:
        x = torch.zeros(1)
        assert live.live == 512
        y = torch.zeros(129)
        assert live.live == 512 + 1024
        del x, y


def test_in_place_operations_and_out_arguments_make_nothing_new():
    with LiveBytes() as live:
        x, y = kb(), kb()
        x.add_(y).mul_(2)
        torch.add(x, y, out=y)
        assert (live.live, live.peak) == (2 * KB, 2 * KB)
        x.resize_(512)
        assert live.live == 3 * KB
        empty = torch.empty(0)
        torch.add(y, y, out=empty)
        assert live.live == 4 * KB


def test_lists_of_tensors_are_counted():
    with LiveBytes() as live:
        xs = [kb() for _ in range(3)]
        ys = torch._foreach_add(xs, 1.0)
        parts = kb(4).split(256)
        assert live.live == (3 + 3 + 4) * KB
        del ys, parts
        assert live.live == 3 * KB


def test_inference_tensors_are_counted():
    with LiveBytes() as live, torch.inference_mode():
        x = kb()
        y = x * 2
        assert live.live == 2 * KB
        del x, y


def test_temporaries_of_an_expression_set_the_peak():
    with LiveBytes() as live:
        x = kb()
        y = (x + 1) * 2 - x  # x, x + 1 and its double are alive together, then the double and the result
        assert (live.live, live.peak) == (2 * KB, 3 * KB)
        del y


def test_known_tensors_are_counted_once_with_ties_and_gradients():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight  # tied
    assert size_of(model) == KB + 2 * 512
    model(torch.ones(1, 16)).sum().backward()
    assert size_of(model) == 2 * KB + 4 * 512
    with LiveBytes() as live:
        batch = {"x": kb()}
        assert live.track(batch) == 0  # seen when it was made
        assert live.track(model, batch) == 2 * KB + 4 * 512
        model.zero_grad()
        assert live.live == KB + 2 * 512 + KB


def test_peak_is_attributed_to_the_innermost_phase_and_can_be_reset():
    with LiveBytes() as live:
        live.base_phase("outside")
        x = kb()
        assert live.peak_phase == "outside"
        with live.phase("forward"):
            with live.phase("head"):
                y = kb(8)
            del y
            z = kb()
        assert (live.peak, live.peak_phase) == (9 * KB, "head")
        live.reset_peak()
        assert (live.peak, live.peak_phase) == (2 * KB, "outside")
        del z
        y = kb(4)
        assert (live.peak, live.peak_phase) == (5 * KB, "outside")
        del x, y


def test_profile_lists_what_lived_at_the_peak():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    batch = {"x": torch.ones(512, 256)}
    with LiveBytes(profile=True) as live, torch.no_grad():
        live.track(model, batch)
        with live.phase("forward"):
            model(batch["x"])
    assert sum(r.bytes for r in live.records) == live.peak
    made = {(r.op, r.module, r.shape) for r in live.records if r.phase == "forward"}
    # the linear's output and the rectified one are alive together
    assert made == {("aten.addmm.default", "0", (512, 256)), ("aten.relu.default", "1", (512, 256))}
    assert {r.op for r in live.records if r.bytes >= 256 * KB and not r.phase} == {"0.weight", "x"}


def test_counting_changes_nothing_and_leaves_nothing_behind():
    x = torch.randn(64, 64, requires_grad=True)
    (plain,) = torch.autograd.grad(x.exp().sum(), x)
    with LiveBytes(profile=True) as live:
        (counted,) = torch.autograd.grad(x.exp().sum(), x)
    peak = live.peak
    torch.ones(1000)
    assert torch.equal(plain, counted) and live.peak == peak
    with pytest.raises(ZeroDivisionError), LiveBytes(profile=True):
        _ = 1 / 0
    assert type(torch.ones(1) + 1) is torch.Tensor


CONFIGS = {
    "bert": dict(num_attention_heads=2, intermediate_size=128),
    "llama": dict(num_attention_heads=2, intermediate_size=128, tie_word_embeddings=True),
    "gpt2": dict(n_head=2),
}


def case(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small model in train mode without dropout, and a batch that suits every loss."""
    numbers = dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, max_position_embeddings=64)
    config = AutoConfig.for_model(family, **numbers, **CONFIGS[family], pad_token_id=0)
    model = build(config, dropout=0.0).train()
    ids = torch.ones(8, 32, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0  # padding: without any, real masks are dropped, which fake ones cannot be
    return model, dict(input_ids=ids, attention_mask=mask, positions=torch.ones(8, dtype=torch.long))


def peak_of(family: str, step: str) -> int:
    model, batch = case(family)
    with LiveBytes() as live:
        live.track(model, batch)
        if step == "forward":
            with torch.no_grad():
                prompt_loss([3, 4])(model, {**batch, "labels": batch["positions"]})
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
            for _ in range(2):
                total, count = lm_loss(model, {**batch, "labels": batch["input_ids"]}, chunk=64)
                (total / count).backward()
                optimizer.step()
                optimizer.zero_grad()
    return live.peak


@pytest.mark.parametrize("step", ["forward", "adamw"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_fake_tensors_count_as_real_ones_do(family, step):
    real = peak_of(family, step)
    with FakeTensorMode():
        fake = peak_of(family, step)
    assert fake == pytest.approx(real, rel=0.01)


def small(**changes) -> PreTrainedConfig:
    numbers = dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    return AutoConfig.for_model("roberta", **{**numbers, "intermediate_size": 256, **changes})


VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
READING = {  # families whose weights are drawn by what reads values, on torch 2.13
    "modernbert": dict(cls_token_id=1, sep_token_id=2),
    "gemma3": dict(
        text_config=dict(
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
        ),
        vision_config=dict(**VISION, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
    ),
}


@pytest.mark.parametrize("family", sorted(READING))
def test_how_weights_are_drawn_is_no_part_of_a_prediction(family):
    numbers = dict(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    more = {**({} if family == "gemma3" else {**numbers, "intermediate_size": 128}), **READING[family]}
    config = AutoConfig.for_model(family, **more, pad_token_id=0)
    found = predict(config, compose("stiefel", "zo"), batch_size=2, max_length=16, lr=1e-3)
    assert found.weights_bytes == size_of(build(config)) < found.peak_bytes


PREDICTED = {
    "zo": ("stiefel", "zo", {}),
    "zo, rebuilt": ("stiefel", "zo", dict(realization="rebuild")),
    "zo, two batches, side": ("lozo", "zo", dict(realization="side", accumulation=2)),
    "zo, language model": ("lozo-m", "zo", dict(objective="lm")),
    "mezo": ("mezo", "zo", {}),
    "fo": ("stiefel", "fo", {}),
    "fo, decay and clip": ("stiefel", "fo", dict(weight_decay=0.1, clip=1.0)),
    "fo, checkpointing": ("stiefel", "fo", dict(checkpointing=True)),
    "fo, selective checkpointing": ("stiefel", "fo", dict(checkpointing="selective")),
    "fo, two batches": ("rso", "fo", dict(accumulation=2)),
    "fo, classes": ("rso", "fo", dict(objective="classes")),
    "adamw": ("adamw", "fo", {}),
    "adamw, language model": ("adamw", "fo", dict(objective="lm")),
    "fo, adafactor": ("stiefel", "fo", dict(optimizer="adafactor")),
    "muon": ("muon", "fo", {}),
    "fwd": ("stiefel", "fwd", {}),
}


# what tests/test_prediction.py does not have among its rows
BESIDES = sorted(
    set(PREDICTED) - {"zo", "zo, language model", "mezo", "fo", "adamw", "adamw, language model", "muon"}
)


@pytest.mark.parametrize("name", BESIDES)
def test_predicted_peak_is_that_of_the_real_step(name):
    row, paradigm, settings = PREDICTED[name]
    settings = dict(settings)
    rows, tokens = 16, 32
    method = compose(row, paradigm, optimizer=settings.pop("optimizer", None))
    method = replace(method, refresh_every=method.refresh_every and 2)
    if getattr(method.estimator, "eps", 1.0) is None:
        method = replace(method, estimator=replace(method.estimator, eps=1e-3))
    before = torch.get_rng_state()
    predicted = predict(small(), method, batch_size=rows, max_length=tokens, **settings)
    assert torch.equal(torch.get_rng_state(), before)

    objective = settings.get("objective", "prompt")
    model = build(small(), kind="classes" if objective == "classes" else "lm", num_labels=2, dropout=0.0)
    checkpoint_activations(model, settings.get("checkpointing", False))
    batches = []
    for _ in range(settings.get("accumulation", 1)):
        ids = torch.ones(rows, tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        row_of_ones = torch.ones(rows, dtype=torch.long)
        batch = dict(input_ids=ids, attention_mask=mask, positions=row_of_ones, labels=row_of_ones.clone())
        if objective == "lm":
            batch = dict(input_ids=ids, labels=ids.clone())
        elif objective == "classes":
            del batch["positions"]
        batches.append(batch)
    loss = {"prompt": prompt_loss((3, 4)), "classes": class_loss, "lm": lm_loss}[objective]
    with LiveBytes() as live:
        live.track(model, *batches)
        kept = {k: v for k, v in settings.items() if k in ("realization", "weight_decay", "clip")}
        engine = Engine(model, method, lr=1e-3, loss=loss, guard=False, **kept)
        for _ in range(5):  # more steps than are predicted: windows of two, no step of which takes more
            engine.step(batches)
    assert predicted.peak_bytes == pytest.approx(live.peak, rel=0.01)
    assert predicted.weights_bytes == size_of(model)
    assert predicted.forward_peak_bytes <= predicted.peak_bytes


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_a_held_run_is_predicted_as_it_is_with_its_stacks_full(paradigm):
    method = compose("stiefel", paradigm, rank=4, eps=1e-3 if paradigm == "zo" else None)
    method = replace(method, refresh_every=2)
    size = dict(batch_size=16, max_length=32)
    peaks = []
    for rank in (12, 24):
        predicted = predict(small(), method, hold=True, hold_rank=rank, **size)
        ids = torch.ones(16, 32, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        batch = dict(input_ids=ids, attention_mask=mask, positions=ids[:, 0], labels=ids[:, 0].clone())
        model = build(small(), dropout=0.0)
        with LiveBytes() as live:
            live.track(model, batch)
            engine = Engine(
                model, method, lr=1e-3, loss=prompt_loss((3, 4)), guard=False, hold=True, hold_rank=rank
            )
            for _ in range(2 * (rank // 4) + 6):
                engine.step([batch])
        stacks = [v.stack for v in engine.variables if v.stack is not None]
        assert max(s.rank for s in stacks) == rank and all(s.rank == s.cap for s in stacks)
        assert predicted.peak_bytes == pytest.approx(live.peak, rel=0.01)
        peaks.append(predicted.peak_bytes)
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("paradigm", ["zo", "fo"])
def test_attaching_copies_no_weights(paradigm):
    """Masters in float32 are for weights that are trained as a whole; of others there is never one."""
    model = build(small(), dtype=torch.bfloat16, dropout=0.0)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with LiveBytes() as live:
        before = live.track(model)
        method = compose("stiefel", paradigm, rank=2, eps=3e-3 if paradigm == "zo" else None)
        engine = Engine(model, method, lr=1e-3, loss=prompt_loss((3, 4)), select="linear+embedding")
    coordinates = sum(v.value.numel() * 4 + 2 * 2 * v.shape[1] + 1024 for v in engine.variables)
    assert live.peak - before < coordinates + max(p.numel() for p in matrices) * 4
    assert sum(p.numel() * 4 for p in matrices) > 2 * (live.peak - before)


def test_predicted_parts_are_those_of_the_rows():
    weights = size_of(build(small()))
    adamw = predict(small(), compose("adamw"), batch_size=2, max_length=8)
    values = sum(-(-p.numel() * 4 // 512) * 512 for p in build(small()).parameters())
    assert adamw.weights_bytes == weights and adamw.coords_bytes == 0
    steps = 512 * len(list(build(small()).parameters()))
    assert adamw.optimizer_bytes == 2 * values + steps
    mezo = predict(small(), compose("mezo"), batch_size=2, max_length=8)
    assert mezo.optimizer_bytes == mezo.coords_bytes == 0
    zo = predict(small(), compose("stiefel", "zo", rank=4, optimizer="adamw"), batch_size=2, max_length=8)
    assert 0 < zo.optimizer_bytes < values / 4 and 0 < zo.coords_bytes < values / 4


@pytest.mark.parametrize(
    "name", ["zo", "mezo", "fo, classes", "fo, checkpointing", "adamw, language model", "fwd"]
)
def test_parts_of_a_peak_add_up_to_it(name):
    row, paradigm, settings = PREDICTED[name]
    settings = dict(settings)
    method = compose(row, paradigm, optimizer=settings.pop("optimizer", None))
    plain = predict(small(), method, batch_size=16, max_length=32, **settings)
    predicted = predict(small(), method, batch_size=16, max_length=32, profile=True, **settings)
    assert tuple(predicted.parts) == PARTS and sum(predicted.parts.values()) == predicted.peak_bytes
    assert (predicted.peak_bytes, predicted.phase) == (
        plain.peak_bytes,
        plain.phase,
    )  # looking changes nothing
    assert plain.parts == {} and plain.module == ""
    parts = predicted.parts
    assert parts["weights"] == predicted.weights_bytes
    assert parts["coords"] >= predicted.coords_bytes and parts["optimizer"] <= predicted.optimizer_bytes
    assert 0 < parts["activations"] or predicted.phase not in ("forward", "backward")
    assert parts["rest"] < parts["activations"] + parts["weights"]
    if paradigm == "zo":
        assert parts["gradients"] == 0 or predicted.phase in ("update", "optimizer")


@pytest.mark.parametrize("row", ["stiefel", "adamw", "muon"])
def test_an_ordinary_step_has_the_state_of_the_optimizer_from_its_beginning(row):
    """The step after a refresh, which drops that state, takes less and must not stand for all."""
    predicted = predict(small(), compose(row, "fo"), batch_size=16, max_length=32, profile=True)
    assert predicted.parts["optimizer"] == predicted.optimizer_bytes > 0
    assert predicted.parts["coords"] == predicted.coords_bytes


def plain_adamw(*names):
    """A row with an AdamW that has temporaries, which the fused one has not."""
    return replace(compose(*names), optimizer=OptimizerRule("adamw", {"fused": False}))


def test_full_adamw_holds_two_moments_and_every_gradient_at_the_end_of_backward():
    config = small(max_position_embeddings=300)
    predicted = predict(config, plain_adamw("adamw"), batch_size=1, max_length=2, profile=True)
    net = build(config)
    trained = sum(-(-p.numel() * 4 // 512) * 512 for p in net.parameters())
    assert predicted.phase == "backward" and predicted.module.endswith("word_embeddings")
    assert predicted.parts["optimizer"] == predicted.optimizer_bytes
    # the tied table has the gradients of both its uses beside their sum
    assert predicted.parts["gradients"] == trained + 2 * 512 * 64 * 4
    assert predicted.parts["activations"] == predicted.parts["logits"] == 0


def test_a_refresh_and_a_streamed_step_are_seen_with_all_they_hold():
    size = dict(batch_size=1, max_length=2, profile=True)  # next to no activations
    refreshed = predict(small(), plain_adamw("stiefel", "zo"), **size)
    # folding in float64 while the state that it drops is still there
    assert refreshed.phase == "open" and refreshed.parts["optimizer"] == refreshed.optimizer_bytes > 0
    streamed = predict(small(), plain_adamw("mezo", "zo"), **size)
    table = 512 * 64 * 4
    # one table's direction at a time, with its copy without a padding row and the moved table
    assert streamed.phase == "forward" and streamed.parts["gradients"] == 0
    assert 3 * table <= streamed.parts["rest"] < 3.5 * table


def test_logits_and_rebuilt_weights_are_no_activations():
    vocabulary, tokens = 5000, 8 * 16
    config = small(vocab_size=vocabulary)
    floor = predict(config, batch_size=8, max_length=16, objective="lm", profile=True)
    assert floor.parts["logits"] >= tokens * vocabulary * 4
    assert floor.parts["activations"] < tokens * vocabulary * 4
    assert floor.phase == "forward" and floor.module == ""  # in the loss, outside of every module
    mezo = predict(config, compose("mezo"), batch_size=1, max_length=4, profile=True)
    embedding = vocabulary * 64 * 4  # the tied table is rebuilt for its use as a head
    assert mezo.parts["rest"] >= embedding > 10 * mezo.parts["activations"]


def test_the_peak_of_a_backward_is_put_to_the_module_whose_forward_made_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4096), nn.Linear(4096, 8))
    for wide in (1, 2):
        trained = model[wide].weight
        model.requires_grad_(False)
        trained.requires_grad_(True)
        with LiveBytes(profile=True) as live:
            live.track(model)
            out = model(torch.ones(4, 8)).sum()
            live.base_phase("backward")
            live.reset_peak()
            out.backward()  # its largest tensor is the gradient of the wide weight
        assert (live.peak_phase, live.peak_module) == ("backward", str(wide))
        trained.grad = None


def test_labels_stand_for_this_and_earlier_peaks():
    with LiveBytes(profile=True) as live:
        x, y = kb(3), kb()
        with live.making("inside"):
            z = kb(2)
        del y
        live.label("said", x)
        live.label("too late", x, z)
        assert {r.bytes: r.part for r in live.records} == {3 * KB: "said", 2 * KB: "inside", KB: ""}
        del x, z


def test_what_a_model_asks_of_its_values_cannot_be_predicted():
    def nosy(model, batch):
        loss = lm_loss(model, batch)
        return loss if bool((batch["labels"] > 3).all()) else loss

    size = dict(batch_size=2, max_length=8, objective="lm")
    with pytest.raises(UsageError, match="decides by values .* measure a run"):
        predict(small(num_hidden_layers=1), compose("stiefel", "fo"), loss=nosy, **size)
    x = torch.ones(3, requires_grad=True)
    assert x.square().sum().requires_grad


def test_forward_alone_is_the_floor():
    floor = predict(small(), batch_size=16, max_length=32)
    assert (floor.peak_bytes, floor.ratio, floor.phase) == (floor.forward_peak_bytes, 1.0, "forward")
    assert floor.weights_bytes < floor.peak_bytes
    profiled = predict(small(), batch_size=16, max_length=32, profile=True)
    assert sum(r.bytes for r in profiled.records) == floor.peak_bytes
    assert "records" not in profiled.as_dict() and profiled.as_dict()["ratio"] == 1.0
    assert profiled.as_dict()["overhead"] == OVERHEAD and profiled.as_dict()["parts"] == profiled.parts


def test_checkpointing_and_low_precision_take_less():
    size = dict(batch_size=32, max_length=64)
    plain = predict(small(), compose("stiefel", "fo"), **size)
    assert (
        predict(small(), compose("stiefel", "fo"), checkpointing=True, **size).peak_bytes < plain.peak_bytes
    )
    kinds = [
        predict(small(num_hidden_layers=8), compose("stiefel", "fo"), checkpointing=how, **size).peak_bytes
        for how in (True, "selective", False)
    ]
    assert kinds == sorted(set(kinds))
    bf16 = predict(small(), compose("stiefel", "fo"), dtype=torch.bfloat16, **size)
    assert bf16.weights_bytes == pytest.approx(plain.weights_bytes / 2, rel=0.05)
    assert bf16.peak_bytes < 0.65 * plain.peak_bytes


@pytest.mark.parametrize("family", ["roberta", "llama", "gpt2"])
def test_autograd_keeps_no_input_of_a_trained_linear_map_that_nothing_else_needs(family):
    """What a step in subspaces keeps for the way back is what a frozen model keeps, and `(tokens, r)` a linear map."""
    rows, tokens, rank = 4, 32, 3
    numbers = dict(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=2)
    numbers |= dict(intermediate_size=160, n_embd=48, n_layer=2, n_head=2)
    ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, positions=ids[:, 0] % tokens, labels=ids[:, 0] % 2)

    def kept(train) -> int:
        model = build(AutoConfig.for_model(family, **numbers), dropout=0.0)
        run, engine = train(model)
        known = LiveBytes()
        known.track(model, batch)
        if engine is not None:
            known.track(*(v.value for v in engine.variables))
            known.track(*(t for v in engine.variables for t in v.subspace.tensors().values()))
        before = known.live

        def keep(tensor):
            known.track(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
        return known.peak - before

    loss = prompt_loss((3, 4))

    def frozen(model):  # the way back goes through every operation, and no matrix is trained
        model.requires_grad_(False)
        table = model.get_input_embeddings()
        table.register_forward_hook(lambda m, args, out: out.detach().requires_grad_())
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        return lambda: loss(model, batch).mean().backward(), None

    def dense(model):
        return lambda: loss(model, batch).mean().backward(), None

    def ours(model):
        engine = Engine(model, compose("stiefel", "fo", rank=rank), lr=1e-6, loss=loss, guard=False)
        engine.step([batch])
        return lambda: engine.step([batch]), engine

    linears = 6 if family != "llama" else 7
    linears = 2 * (4 if family == "gpt2" else linears) + 2  # gpt2 has queries, keys and values in one; heads
    room = linears * (512 + rows * tokens * rank * 4)
    whole = rows * tokens * 48 * 4  # one input of a linear map
    needed, least = kept(frozen), kept(ours)
    assert least <= needed + room
    assert kept(dense) > needed + room + whole


@pytest.mark.parametrize("projector", ["coordinate", "srht", "range_finder"])
def test_a_projector_of_no_row_can_be_predicted(projector):
    needs_gradient = PROJECTORS[projector].needs == "gradient"
    row, paradigm = ("galore", "fo") if needs_gradient else ("stiefel", "zo")
    method = compose(row, paradigm, projector=projector)
    predicted = predict(small(num_hidden_layers=1), method, batch_size=4, max_length=16)
    assert predicted.peak_bytes > predicted.weights_bytes


def test_attaching_low_precision_weights_makes_no_copies_of_them():
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4))).bfloat16()
    with LiveBytes() as live:
        weights = live.track(model)
        Engine(model, compose("stiefel", "zo", rank=4, eps=1e-3), lr=1e-3, loss=lambda m, x: m(x).mean())
    assert weights < live.peak < 1.2 * weights  # float32 masters would be twice the weights


def test_a_prediction_is_the_same_whatever_was_predicted_before():
    config = small()

    def peak(name, size=3):
        method = METHODS[name].build("zo" if "zo" in METHODS[name].paradigms else None)
        return predict(config, method, batch_size=size, max_length=8, accumulation=2).peak_bytes

    first = peak("zo-muon")
    others = {name: peak(name) for name in ("adamw", "galore")}
    peak("zo-muon", 5)
    assert peak("zo-muon") == first and {name: peak(name) for name in others} == others


def test_own_losses_are_predicted():
    def in_bfloat16(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return lm_loss(model, batch)

    size = dict(batch_size=64, max_length=64, objective="lm")
    plain = predict(small(), compose("stiefel", "fo"), **size)
    assert predict(small(), compose("stiefel", "fo"), loss=in_bfloat16, **size).peak_bytes < plain.peak_bytes


def test_predicting_between_real_steps_disturbs_nothing():
    model = build(small())
    ids = torch.ones(2, 8, dtype=torch.long)
    batch = dict(input_ids=ids, positions=ids[:, 0], labels=ids[:, 0])
    method = compose("stiefel", "zo", eps=1e-3)
    engine = Engine(model, method, lr=1e-3, loss=prompt_loss((3, 4)))
    engine.step([batch])
    predict(small(), method, batch_size=2, max_length=8)
    assert not engine.step([batch]).skipped
    assert all(type(p.data) is torch.Tensor for p in model.parameters())


@pytest.mark.slow
def test_large_models_are_predicted_without_their_weights(monkeypatch):
    before = resident().now
    with measure() as measured:
        size = dict(batch_size=64, max_length=128)
        zo = predict(
            "roberta-large", compose("stiefel", "zo"), select="attention", **size
        )  # as it trains by default
        fo = predict("roberta-large", compose("stiefel", "fo"), checkpointing=True, **size)
    with (
        monkeypatch.context() as patch
    ):  # as the stock forward does it, which makes the inner states of all tokens
        patch.setattr(models, "CHUNK_ENTRIES", 1 << 30)
        stock = predict("roberta-large", **size)
    assert stock.forward_peak_bytes == pytest.approx(1.79e9, rel=0.005)
    assert zo.forward_peak_bytes < stock.forward_peak_bytes - 0.1e9
    assert zo.ratio <= 1.03
    assert fo.peak_bytes <= 3.4e9
    if not measured.process_from_start:
        assert measured.process_bytes - before < 0.5 * zo.weights_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most"), [("int8", 0.62e9), ("nf4", 0.48e9)])
def test_a_quantized_large_model_with_its_stacks_full_stays_small(how, most):
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[how])
    size = dict(batch_size=64, max_length=128, dtype=torch.bfloat16, select="attention", quantize=how)
    held = predict("roberta-large", compose("stiefel", "zo"), hold=True, **size)
    assert held.peak_bytes <= most
    stacks = 96 * 2 * 1024 * RANK * 4  # attention maps of 24 layers, two factors, float32
    assert held.coords_bytes > stacks
    assert any(f"rank {RANK} beside every held matrix" in line for line in held.assumptions)


@pytest.mark.parametrize("knee", [0, 100, 2000])
@pytest.mark.parametrize("budget", [1040, 5000, 40_000, 10**9])
def test_largest_batch_is_found_in_few_predictions(budget, knee):
    asked = []

    def peak_at(rows: int) -> int:  # weights and optimizer, or weights and activations, whichever is more
        asked.append(rows)
        return -(-max(1000 + knee + rows, 1000 + 37 * rows) // 8) * 8

    if knee + 1001 > budget:
        with pytest.raises(BudgetError, match="one row takes"):
            largest_batch(peak_at, budget)
        return
    best = largest_batch(peak_at, budget, most=512)
    assert len(asked) <= 12 and len(set(asked)) == len(asked)
    assert peak_at(best) <= budget and (best == 512 or peak_at(best + 1) > budget)
    known = {rows: peak_at(rows) for rows in (1, 8)}
    asked.clear()
    assert largest_batch(peak_at, budget, most=512, known=known) == best and not {1, 8} & set(asked)
    # a straight line, and two of its points: the first size above the budget, and the one below it
    assert knee or len(asked) <= 3


def test_impossible_predictions_are_refused():
    with pytest.raises(UsageError, match="batch_size = 0"):
        predict(small(), batch_size=0, max_length=8)
    with pytest.raises(UsageError, match="batch_size = 10* is not possible; use at most 2147483648"):
        predict(small(), batch_size=10**20, max_length=8)
    with pytest.raises(UsageError, match="objective 'prompts' is not known"):
        predict(small(), batch_size=1, max_length=8, objective="prompts")
    with pytest.raises(UsageError, match="signs 'together' mean nothing under paradigm 'fo'"):
        predict(small(), compose("adamw"), batch_size=1, max_length=8, signs="together")
    with pytest.raises(UsageError, match="packed rows mean nothing to objective 'prompt'"):
        predict(small(), batch_size=1, max_length=8, packed=True)
    with pytest.raises((UsageError, DataError), match="did you mean 'roberta-large'"):
        predict("roberta-larg", batch_size=1, max_length=8)


def test_linear_layer_peaks_are_the_analytic_ones():
    tokens, n, m = 64, 128, 256
    layer = nn.Linear(n, m, bias=False)
    x = torch.ones(tokens, n)
    weight, given, out = 4 * m * n, 4 * tokens * n, 4 * tokens * m
    with LiveBytes() as live, torch.no_grad():
        live.track(layer, x)
        layer(x)
    assert live.peak == weight + given + out
    with LiveBytes() as live:
        live.track(layer, x)
        F.linear(x, layer.weight).square().sum().backward()
    # at the end of the square's backward: twice the output, its gradient; then the weight's gradient
    assert live.peak >= weight + given + out * 2
    assert layer.weight.grad is not None and live.live == 2 * weight + given


def test_measured_stretch_reports_each_counter():
    model, batch = case("bert")
    with measure(model, batch) as measured, torch.no_grad():
        prompt_loss([3, 4])(model, {**batch, "labels": batch["positions"]})
    assert measured.counter == "live tensors" and measured.reserved_bytes is None
    assert size_of(model, batch) < measured.peak_bytes < measured.process_bytes
    with pytest.raises(ValueError), measure() as failed:
        kept = torch.ones(1000)
        raise ValueError
    assert failed.peak_bytes == 4096 and kept.numel() == 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="process counters are read from /proc")
def test_process_peak_follows_a_large_tensor_and_can_be_reset():
    with measure() as measured:
        x = torch.ones(32 << 20)
        size = x.numel() * 4
        del x
    before = resident()
    assert before.peak >= before.now > 0
    with measure() as small:
        torch.ones(10)
    assert measured.peak_bytes == size
    if not small.process_from_start:
        assert small.process_bytes < measured.process_bytes - size // 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counter_agrees_with_live_bytes():
    model, batch = case("bert")
    model, batch = model.cuda(), {k: v.cuda() for k, v in batch.items()}
    batch["labels"] = batch["positions"]
    with torch.no_grad():
        prompt_loss([3, 4])(model, batch)  # warm-up: workspaces
        with LiveBytes() as live:
            live.track(model, batch)
            prompt_loss([3, 4])(model, batch)
        base = torch.cuda.memory_allocated() - size_of(model, batch)
        with measure(device="cuda") as measured:
            prompt_loss([3, 4])(model, batch)
    assert measured.peak_bytes - base == pytest.approx(live.peak, rel=0.05)
    assert measured.reserved_bytes is not None and measured.reserved_bytes >= measured.peak_bytes


def test_a_card_adds_a_workspace_for_each_thread_that_multiplies(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # optimizers ask the driver
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert memory.workspace("cpu") == 0
    for capability, size in (((8, 6), 8_519_680), ((10, 0), 32 << 20), ((9, 0), 32 << 20)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        assert memory.workspace("cuda") == memory.workspace(torch.device("cuda", 0)) == size
    for paradigm, threads in (("zo", 1), ("fo", 2)):
        method = compose("stiefel", paradigm, rank=4)
        plain, card = (
            predict(small(), method, batch_size=2, max_length=8, profile=True, device=device)
            for device in ("cpu", "cuda")
        )
        assert card.peak_bytes - plain.peak_bytes == card.parts["workspaces"] == threads * size
        assert card.forward_peak_bytes - plain.forward_peak_bytes == size
        assert sum(card.parts.values()) == card.peak_bytes and plain.parts["workspaces"] == 0
        assert card.weights_bytes == plain.weights_bytes
        assert len(card.assumptions) == len(plain.assumptions) + 1
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8:4096:2")
    assert memory.workspace("cuda") == (16 * 8 + 4096 * 2) << 10


def test_what_a_step_replaces_is_not_kept_alive_by_its_measurement():
    x, y = torch.randn(4, 64), torch.randn(4, 64)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    method = compose("stiefel", "zo", rank=32, refresh_every=1)
    engine = Engine(torch.nn.Linear(64, 64, bias=False), method, lr=1e-3, loss=loss)
    engine.step([(x, y)])
    with measure(engine, x, y) as found:
        for _ in range(3):
            engine.step([(x, y)])
    held = [tensor for part in kept(engine).values() for tensor in part]
    with measure(engine.model, *held, x, y) as more:
        for _ in range(3):
            engine.step([(x, y)])
    # a basis is replaced at every step, and a list of what was kept holds the first one
    assert more.peak_bytes - found.peak_bytes >= 64 * 32 * 4


def test_a_model_that_drops_no_layer_is_predicted():
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode(), memory._FakeLiveBytes() as live, live.phase("forward"):
        assert not torch.rand([]) < 0.0
        with pytest.raises(DataDependentOutputException):
            bool(torch.rand([]) < 0.1)
        with pytest.raises(DataDependentOutputException):
            bool(torch.randn([]) < 0.0)
