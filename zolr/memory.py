"""Memory: count the bytes that live, predict the peak of a step without weights, measure it in a run.

All three say what they count. `LiveBytes` counts storages of tensors, rounded up to 512 bytes as the CUDA
allocator does; it sees neither what one kernel allocates and frees inside itself nor the allocator's own
slack.
"""

import contextlib
import copy
import os
import re
import resource
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, masking_utils

from zolr import keys, lora
from zolr.engine import Engine
from zolr.errors import BudgetError, DataError, UsageError, ZolrError, cause_of
from zolr.estimators import changed, mean_loss, setting
from zolr.fakes import Fakes
from zolr.held import RANK
from zolr.layers import LAYERS
from zolr.methods import Adapter, Method, key_of
from zolr.models import (
    Checkpointing,
    Codes,
    build,
    checkpoint_activations,
    class_loss,
    code,
    coded_maps,
    dropouts,
    lm_loss,
    load_config,
    prompt_loss,
    set_dropout,
)
from zolr.spectra import Spectrum
from zolr.subspaces import Left, Right
from zolr.tuning import Probing

ROUNDING = 512  # bytes; the CUDA caching allocator hands out multiples of this

# What comes on top of every figure here; most of it depends on device, driver and libraries, and has no number
OVERHEAD = (
    "CUDA context and loaded kernels, cache and fragmentation of the allocator, workspaces of cuSOLVER and attention "
    "kernels; unless a card is named, cuBLAS's: 34 MB from Hopper on, 9 MB before, twice with backprop"
)

# bytes that torch gives to cuBLAS for each thread that multiplies (CUBLAS_WORKSPACE_CONFIG says otherwise): from compute
# capability 9.0 on, and before
WORKSPACES = (8 * 4096 * 1024, (2 * 4096 + 8 * 16) * 1024)


# --- counting -----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Record:
    """One live storage at the peak: who made it, how it looked when it was made, and what it is.

    Args:
        part: what it was said to be (see `LiveBytes.label` and `LiveBytes.making`); empty where nobody said.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: str
    phase: str
    module: str
    part: str = ""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most there ever were at once.

    While the mode is on, every storage that an operation returns is counted once, however many views share
    it, until its last view is gone. What existed before is counted when it is told of by `track`. Works on
    real tensors of any device and on fake tensors (enter it inside the fake mode).

    Args:
        profile: also remember shape, dtype, operation and module of every storage, for `records`.

    >>> with LiveBytes() as live:
    ...     x = torch.zeros(1000); y = x.view(10, 100); del x; z = y + 1; del y
    >>> live.live, live.peak
    (4096, 8192)
    """

    def __init__(self, *, profile: bool = False) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peak_phase = ""
        self.peak_module = ""  # where the peak was reached, also in backward; filled when profiling
        self.records: list[
            Record
        ] = []  # the storages alive at the peak, largest first; filled when profiling
        self._profile = profile
        self._phases = [""]
        self._modules: list[str] = []
        self._names: dict[int, str] = {}
        self._part = ""
        # the number of the next autograd node whenever a module is entered or left, and the module from there on
        self._entered: list[tuple[int, str]] = []
        self._known: dict[int, tuple[weakref.ref, int]] = {}  # storage address -> reference, bytes
        self._made: dict[int, Record] = {}
        self._fresh_peak = False  # the peak has moved since the records were taken
        self._hooks: list[Any] = []

    def track(self, *things: "nn.Module | Tensor | Mapping[str, Tensor] | Engine") -> int:
        """Count tensors that exist already: parameters, buffers and gradients of a model, batches, tensors, and of an
        engine its model and all that it keeps from step to step.

        Returns:
            Bytes that were not counted before.
        """
        before = self.live
        for thing in things:
            if isinstance(thing, Engine):
                self.track(thing.model, *(tensor for part in kept(thing).values() for tensor in part))
                continue
            if isinstance(thing, nn.Module):
                named: list[tuple[str, Tensor]] = [*thing.named_parameters(), *thing.named_buffers()]
                named += [
                    (f"{name}.grad", p.grad) for name, p in thing.named_parameters() if p.grad is not None
                ]
                self._names |= {id(module): name for name, module in thing.named_modules()}
            elif isinstance(thing, Tensor):
                named = [("tensor", thing)]
            else:
                named = list(thing.items())
            for name, tensor in named:
                self._count(tensor, name)
        self._settle()
        return self.live - before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is going on, so that the peak can be attributed; the innermost name counts."""
        self.enter_phase(name)
        try:
            yield
        finally:
            self.leave_phase()

    def enter_phase(self, name: str) -> None:
        """Begin a phase that `leave_phase` ends, where no block can be written, as in hooks."""
        self._phases.append(name)

    def leave_phase(self) -> None:
        """End the innermost phase."""
        self._phases.pop()

    def base_phase(self, name: str) -> None:
        """Name what goes on outside any `phase` block from now on."""
        self._phases[0] = name

    def label(self, part: str, *tensors: Tensor) -> None:
        """Say what some tensors are, for the records of this and of earlier peaks; the first word on one stands."""
        for tensor in tensors:
            for storage in _storages(tensor):
                record = self._made.get(storage._cdata)
                if record is not None and not record.part:
                    record.part = part

    @contextlib.contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Say what everything made inside is."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def reset_peak(self) -> None:
        """Start a new peak at what lives now."""
        self.peak, self.peak_phase, self.records = self.live, self._phases[-1], []
        self.peak_module = self._module()
        self._fresh_peak = self._profile

    def __enter__(self) -> "LiveBytes":
        """Start counting."""
        if self._profile:
            global_hooks = nn.modules.module
            self._hooks = [
                global_hooks.register_module_forward_pre_hook(self._enter_module),
                global_hooks.register_module_forward_hook(self._leave_module, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting; figures stay readable."""
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._take_records()
        self._known.clear()  # drops the callbacks: what dies later is no longer followed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default wraps every call and imports the compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls under fake tensors; makes nothing
        out = func(*args, **(kwargs or {}))
        self._count_all(out, func)
        self._settle()
        return out

    def _count_all(self, out: Any, op: Any) -> None:
        if isinstance(out, Tensor):
            self._count(out, op)
        elif isinstance(out, (list, tuple)):
            for each in out:
                self._count_all(each, op)

    def _count(self, tensor: Tensor, op: Any) -> None:
        for storage in _storages(tensor):
            self._count_storage(storage, tensor, op)

    def _count_storage(self, storage: torch.UntypedStorage, tensor: Tensor, op: Any) -> None:
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        address = storage._cdata
        known = self._known.get(address)
        if known is not None:
            if known[1] != size:  # resized in place, as operations with out= do
                self._known[address] = (known[0], size)
                self.live += size - known[1]
                if address in self._made:
                    self._made[address] = replace(self._made[address], bytes=size)
            return
        self._known[address] = (weakref.ref(storage, lambda _: self._gone(address)), size)
        self.live += size
        if self._profile:
            module = self._modules[-1] if self._modules else ""
            self._made[address] = Record(
                size, tuple(tensor.shape), tensor.dtype, str(op), self._phases[-1], module, self._part
            )

    def _settle(self) -> None:
        if self.live > self.peak:
            self.peak, self.peak_phase = self.live, self._phases[-1]
            self._fresh_peak = self._profile
            if self._profile:
                self.peak_module = self._module()

    def _module(self) -> str:
        """The module at work: the innermost one, or in backward the one whose forward made the current node."""
        if self._modules:
            return self._modules[-1]
        node: Any = torch._C._current_autograd_node() if self._entered else None
        number = getattr(node, "_sequence_nr", None)
        if number is None or type(node).__name__ == "AccumulateGrad":  # belongs to a weight, not to a place
            return ""
        place = bisect_right(self._entered, number(), key=lambda entry: entry[0])
        return self._entered[place - 1][1] if place else ""

    def _gone(self, address: int) -> None:
        known = self._known.get(address)
        if known is None:
            return
        self._take_records()
        del self._known[address]
        self._made.pop(address, None)
        self.live -= known[1]

    def _take_records(self) -> None:
        # Taken only when the count is about to fall from a new peak, not at each of the many steps up to it
        if self._fresh_peak and self.live == self.peak:
            self.records = sorted(self._made.values(), reverse=True, key=lambda r: r.bytes)
            self._fresh_peak = False

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._modules.append(self._names.get(id(module), type(module).__name__))
        self._note_module()

    def _leave_module(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._modules:
            self._modules.pop()
        self._note_module()

    def _note_module(self) -> None:
        # a private name: without it modules are named in forward only
        number = getattr(torch.autograd, "_get_sequence_nr", None)
        if number is not None and torch.is_grad_enabled():
            self._entered.append((number(), self._modules[-1] if self._modules else ""))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """What holds the numbers of a tensor: usually one storage; none on the meta device, for sparse layouts and where nothing is
    held."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    if device.type == "meta" or tensor._is_zerotensor():  # zeros that forward mode never writes down
        return
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # wrapper subclasses hold their data in inner tensors
        for name in flatten()[0]:
            yield from _storages(getattr(tensor, name))
        return
    try:
        yield tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse layouts have no single storage
        return


def size_of(*things: nn.Module | Tensor | Mapping[str, Tensor]) -> int:
    """Bytes of the distinct storages behind models and tensors, rounded as `LiveBytes` does."""
    return LiveBytes().track(*things)


# --- predicting ---------------------------------------------------------------------------------------------

Objective = Literal["prompt", "classes", "lm"]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Any]

# A predicted run: its first step makes the optimizer's state, the second runs on top of it, and where subspaces
# change, the third begins a new window on top of it
WINDOW = 2

# From the third micro-batch on nothing is new but the batches themselves, which all exist from the beginning
ENOUGH_BATCHES = 3

MOST = 1 << 31  # rows of a batch, tokens of a row, micro-batches: bytes of tensors are counted in 64 bits

# numbers of a config that have to be above zero
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
)  # fmt: skip

# Periods of a layer policy among which the worst is looked for
PERIODS = 64
LONG = 1 << 10  # steps of a period there, so that none ends while it is looked at

# What a peak is made of. "rest": the batch, directions of probes, weights rebuilt for one use, gradients of
# activations, scratch; "workspaces": cuBLAS's, where a card is named
PARTS = ("weights", "coords", "gradients", "optimizer", "activations", "logits", "rest", "workspaces")


@dataclass(frozen=True)
class Prediction:
    """Peak of a step, and what is in it; bytes.

    Args:
        peak_bytes: most bytes alive at once in a step, weights and batch included.
        forward_peak_bytes: the same of one forward without autograd: the least that any method can take.
        weights_bytes: parameters and buffers, those of an adapter included.
        coords_bytes: bases, coordinates that are not the weights themselves, and spectra that a projector keeps.
        optimizer_bytes: state of the optimizer.
        phase: where the peak is: "open" (drawing, folding), "forward", "backward", "update" or "optimizer".
        assumptions: what the figures rest on, one sentence each.
        module: the module at work at the peak; empty outside of all, and unless asked for.
        parts: bytes at the peak of each of `PARTS`, which add up to it; empty unless asked for.
        records: live storages at the peak, largest first; empty unless asked for.
    """

    peak_bytes: int
    forward_peak_bytes: int
    weights_bytes: int
    coords_bytes: int
    optimizer_bytes: int
    phase: str
    assumptions: tuple[str, ...]
    module: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)
    records: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def ratio(self) -> float:
        """Peak over the peak of a plain forward."""
        return self.peak_bytes / self.forward_peak_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings by name, without the records."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "records"}
        plain |= {"assumptions": list(self.assumptions), "parts": dict(self.parts), "overhead": OVERHEAD}
        return {**plain, "ratio": self.ratio}


def predict(
    model: str | os.PathLike[str] | PreTrainedConfig,
    method: Method | None = None,
    *,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    objective: Objective = "prompt",
    loss: Loss | None = None,
    num_labels: int = 2,
    accumulation: int = 1,
    checkpointing: Checkpointing = False,
    signs: Literal["sequence", "together"] | None = None,
    lr: float | None = 1e-3,
    select: str | Callable[[str, nn.Parameter], bool] = "all",
    realization: Any = "auto",
    weight_decay: float = 0.0,
    clip: float | None = None,
    attn_implementation: str | None = None,
    adapter: Adapter | None = None,
    quantize: Codes | None = None,
    hold: bool = False,
    hold_rank: int = RANK,
    device: torch.device | str = "cpu",
    dropout: float | None = 0.0,
    packed: bool = False,
    steps: int | None = None,
    profile: bool = False,
) -> Prediction:
    """Predict the peak memory of a training step by running that very step on tensors without data.

    The engine's own `step` runs under fake tensors: the first makes the optimizer's state, the second has it
    from the beginning, a third closes a window, begins the next and steps in it. What grows over many windows is as large as
    it gets from the beginning. No weights are read or made, and a model of any size takes seconds.

    Args:
        model: a preset, a folder or hub name (its config is read), or a transformers config.
        method: what to train with; None predicts the forward alone.
        batch_size: rows of a micro-batch.
        max_length: tokens of a row, padding included.
        objective: "prompt" (logits at one position a row), "classes" or "lm" (every token).
        loss: of the model and a batch of the objective, where a run wraps the usual loss (autocast, ...).
        num_labels: classes of objective "classes".
        accumulation: micro-batches a step.
        checkpointing: keep the inputs of layers only and compute the rest again in backward; "selective": of half of them.
        signs: of a forward-only probe, "sequence" or "together"; None as the method says.
        lr: None where a forward-only run chooses it. A first step that chooses rate or radius has other subspaces beside its own.
        select, realization, weight_decay, clip, hold, hold_rank: as for `Engine`.
        quantize: as for `load_model`.
        adapter: what the model is wrapped in, which is then trained instead of `select`.
        device: where the step is to run; a card that is there adds cuBLAS's workspaces to peak and forward (see `workspace`).
        dropout: of training steps (fo); None leaves the probabilities of the config. Masks are kept for the way back, and on the
            host attention is not fused where it has any; on a card it is.
        packed: rows of objective "lm" hold several documents that do not see each other: batches have `position_ids` that begin
            again, from which transformers makes a mask of `(batch_size, 1, max_length, max_length)`.
        steps: of the run; one that is over before its subspaces change is predicted without that. None for as many as it takes.
        profile: list the live storages at the peak, add them up by what they are, and name the module.

    Raises:
        UsageError: a size below 1, or settings that cannot work together.
    """
    sizes = {"batch_size": batch_size, "max_length": max_length, "accumulation": accumulation}
    for name, size in sizes.items():
        if not 1 <= size <= MOST:
            bound = "at least 1" if size < 1 else f"at most {MOST}"
            raise UsageError(f"{name} = {size} is not possible; use {bound}")
    if objective not in LOSSES:
        raise UsageError(f"objective '{objective}' is not known; use one of {', '.join(LOSSES)}")
    if packed and objective != "lm":
        raise UsageError(
            f"packed rows mean nothing to objective '{objective}'; use 'lm', or leave packed out"
        )
    config = model if isinstance(model, PreTrainedConfig) else load_config(model)
    check_predictable(config, objective)
    plain: Any = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):  # of a model that was quantized while it was loaded
        del plain.quantization_config
    if dropout is None and torch.device(device).type == "cuda":
        set_dropout(plain, 0.0, attention=True)
    loss = loss or LOSSES[objective]
    trains = method is not None and method.paradigm == "fo"  # others evaluate the model as it is used

    def fresh(**options: Any) -> Any:
        net = build(
            plain,
            kind="classes" if objective == "classes" else "lm",
            num_labels=num_labels if objective == "classes" else None,
            dtype=dtype,
            attn_implementation=attn_implementation,
            dropout=dropout,
            **options,
        )
        if quantize == "int8":
            code(net, quantize)
        elif quantize == "nf4":
            _code_as_nf4(net)
        return net

    def wrapped(adapter: Adapter) -> Any:
        with unset_fake_temporarily():  # PEFT moves what it makes, which modules of fake tensors cannot
            net = fresh(device="meta")
            lora.wrap(net, adapter, classifier=objective == "classes")
        return _on_host(net)

    def step(method: Method) -> tuple[LiveBytes, int, int, int]:
        net = fresh() if adapter is None else wrapped(adapter)
        checkpoint_activations(net, checkpointing)
        with _FakeLiveBytes(profile=profile) as live:
            live.track(net, *batches)
            live.label("weights", *net.parameters(), *net.buffers())
            engine = Engine(
                net,
                method,
                lr=1e-3,
                loss=_in_phases(loss, live, "backward" if method.paradigm == "fo" else "update"),
                select=select if adapter is None else lora.trained,
                realization=realization,
                weight_decay=weight_decay,
                clip=clip,
                guard=False,
                hold=hold,
                hold_rank=hold_rank,
                undo=False,  # what is kept aside is no tensor, and has no numbers here
            )
            grow(engine)
            if method.layers.every:
                live.reset_peak()  # no step takes what giving state to all weights did
            engine.optimizer.register_step_pre_hook(lambda *_: live.enter_phase("optimizer"))
            engine.optimizer.register_step_post_hook(lambda *_: live.leave_phase())
            if profile:
                _label_as_made(engine, live)
            if chooses:
                with torch.no_grad(), engine._elsewhere(0):
                    probing = Probing(
                        lambda: mean_loss(engine._loss_of, batches[:ENOUGH_BATCHES]), keys.Key(0)
                    )
                    probing.along(engine.active, "step", 0, 1e-3)
            if _worst_window(engine) is not None:
                assumptions.append(
                    f"the worst of the first {PERIODS} windows of seed 0, in which coins leave weights whole"
                )
            for steps in hardest(engine):
                for _ in range(steps):
                    live.base_phase("open")
                    engine.step(batches[:ENOUGH_BATCHES])
                    _label_kept(engine, live)
        counted = LiveBytes()
        weights = counted.track(net)
        held = kept(engine)
        return live, weights, counted.track(*held["coords"]), counted.track(*held["optimizer"])

    with _values_explained(), Fakes(), _texts_in_a_row(packed), _few_rounds():
        try:
            net = fresh()
        except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, ZolrError):
                raise
            raise DataError(_unbuilt(plain, error)) from error
        batches = [_batch(objective, batch_size, max_length, packed) for _ in range(accumulation)]
        with LiveBytes(profile=profile and method is None) as forward:
            weights = forward.track(net)
            forward.track(*batches)
            forward.label("weights", *net.parameters(), *net.buffers())
            with torch.no_grad(), forward.phase("forward"):
                loss(net, batches[0])
        assumptions = [
            f"{batch_size} x {max_length} tokens a micro-batch, {str(dtype).removeprefix('torch.')} weights",
            f"{net.config._attn_implementation} attention, fused where the kernel exists; {_dropout(plain, dropout if trains else 0.0)}",
            f"rows are {'packed, documents apart' if packed else 'padded'}; the optimizer holds temporaries of one tensor at a time (not foreach)",
            f"bytes of live tensors, each rounded up to {ROUNDING}; what no tensor holds comes on top",
        ]
        if quantize is not None:
            assumptions.append(f"{quantize} codes in the base model, one weight decoded at a time")
        if method is not None and method.layers.every:
            assumptions.append(
                f"blocks '{key_of(LAYERS, method.layers)}': the worst of the first {PERIODS} periods, optimizer state of "
                f"{'all blocks, as after many of them' if method.layers.keeps else 'the active blocks'}"
            )
        if hold:
            assumptions.append(
                f"rank {hold_rank} beside every held matrix, which it reaches after many windows"
            )
        live, coords, state = forward, 0, 0
        if method is not None:
            eps = setting(method.estimator, "eps", 0.0)
            chooses = not method.estimator.exact and (eps is None or (lr is None and eps != 0.0))
            method = _runnable(method, signs, steps)
            if method.refresh_every not in (None, WINDOW):
                assumptions.append(f"{steps} steps, which is too few for subspaces to change")
            live, weights, coords, state = step(method)
    scratch, threads = workspace(device), 2 if method is not None and method.paradigm == "fo" else 1
    if scratch:
        assumptions.append(
            f"{scratch / 1e6:.1f} MB of workspace for cuBLAS in each thread that multiplies: {threads} in a step"
        )
    return Prediction(
        peak_bytes=live.peak + threads * scratch,
        forward_peak_bytes=forward.peak + scratch,
        weights_bytes=weights,
        coords_bytes=coords,
        optimizer_bytes=state,
        phase=live.peak_phase,
        assumptions=tuple(assumptions),
        module=live.peak_module,
        parts=_parts(live.records, net) | {"workspaces": threads * scratch} if profile else {},
        records=tuple(live.records),
    )


def _numbers(config: PreTrainedConfig, *names: str) -> dict[str, int]:
    """Those of a config that it has once for all layers."""
    found = {}
    for name in names:
        with contextlib.suppress(Exception):  # one a layer, or several texts
            if isinstance(number := getattr(config.get_text_config(), name), int):
                found[name] = number
    return found


def _unbuilt(config: PreTrainedConfig, error: BaseException) -> str:
    """Why a config makes no model: the number that is at fault, where that is known."""
    numbers = _numbers(config, "vocab_size", "pad_token_id")
    if numbers.get("pad_token_id", -1) >= numbers.get("vocab_size", 0):
        told = " and ".join(f"{name} = {number}" for name, number in numbers.items())
        return f"the model's config has {told}, where padding has no row; correct one of them"
    return f"the model's config makes no model: {cause_of(error)}; correct it, or give a preset"


def workspace(device: torch.device | str) -> int:
    """Bytes that torch sets aside for cuBLAS in each thread that multiplies on this device; 0 without CUDA.

    The host's thread is one, autograd's another. `CUBLAS_WORKSPACE_CONFIG` (":KiB:number", repeated) sets the size, as
    it does for torch.
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return 0
    asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if asked:
        return sum(int(size) * 1024 * int(number) for size, number in asked)
    return WORKSPACES[torch.cuda.get_device_capability(device) < (9, 0)]


def _on_host(net: nn.Module) -> nn.Module:
    """A model of the meta device with tensors of the current (fake) mode, in place; what was shared stays shared."""
    made: dict[int, Any] = {}

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    for module in net.modules():
        for name, old in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(old) not in made:
                made[id(old)] = nn.Parameter(like(old), requires_grad=old.requires_grad)
            module._parameters[name] = made[id(old)]
        for name, old in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
            module._buffers[name] = made.setdefault(id(old), like(old))
    return net


class _FakeLiveBytes(LiveBytes):
    """Counts fake tensors as real ones are counted where the two would differ.

    A number that is read from a tensor outside of the model is answered by 1 (Adafactor scales by norms, a projector
    asks how many directions its law has chosen); what a model itself asks of its tensors stays an error, but for whether
    a uniform number is below 0, which is how some models drop no layer.

    Forward mode has tensors of zeros that hold nothing: `ZeroTensor`, for the tangent of a weight that is not trained.
    Made under the fake mode they lose their device, so plain fake tensors that are not counted stand for them.
    """

    def __init__(self, *, profile: bool = False) -> None:
        super().__init__(profile=profile)
        # storages of tensors that stand for a ZeroTensor, of uniform numbers, and of answers that are False
        self._zeros: dict[int, weakref.ref] = {}
        self._uniform: dict[int, weakref.ref] = {}
        self._false: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.rand.default:
            return _noted(self._uniform, super().__torch_dispatch__(func, types, args, kwargs))
        if func is torch.ops.aten.lt.Scalar and args[1] <= 0 and _is_in(self._uniform, args[0]):
            return _noted(self._false, super().__torch_dispatch__(func, types, args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default:
            if _is_in(self._false, args[0]):
                return False
            dtype = args[0].dtype
            if dtype.is_floating_point:
                return 1.0
            if not {"forward", "backward"} & set(self._phases):
                return True if dtype == torch.bool else 1
        if func is torch.ops.aten._efficientzerotensor.default:
            with unset_fake_temporarily() if not args[0] else contextlib.nullcontext():
                # one for a plain number is asked for its value at once, so it is real
                return _noted(self._zeros, torch.zeros(*args, **(kwargs or {})))
        if self._zeros and any(_is_in(self._zeros, arg) for arg in args):
            args = [self._faked(arg) for arg in args]
            if func in KEEP_ZERO:
                return _noted(self._zeros, func(*args, **(kwargs or {})))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _faked(self, thing: Any) -> Any:
        """A stand-in that is real, as a fake one."""
        if isinstance(thing, FakeTensor) or not _is_in(self._zeros, thing):
            return thing
        return _noted(self._zeros, torch.zeros(thing.shape, dtype=thing.dtype, device=thing.device))

    def _count_storage(self, storage: torch.UntypedStorage, tensor: Tensor, op: Any) -> None:
        if storage._cdata not in self._zeros:
            super()._count_storage(storage, tensor, op)


def _noted(where: dict[int, weakref.ref], tensor: Tensor) -> Tensor:
    """The tensor, whose storage is known there for as long as it lives."""
    for storage in _storages(tensor):
        forget = partial(where.pop, storage._cdata, None)
        where[storage._cdata] = weakref.ref(storage, lambda _, forget=forget: forget())
    return tensor


def _is_in(where: dict[int, weakref.ref], thing: Any) -> bool:
    return isinstance(thing, Tensor) and any(s._cdata in where for s in _storages(thing))


# operations that give a ZeroTensor for a ZeroTensor; all others make it real for the moment, at the cost of one number
KEEP_ZERO = (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)


class _Decoded(torch.autograd.Function):
    """`x @ W.T` with a weight that is decoded for the use, in backward once more, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.size = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ grads[0].new_empty(ctx.size), None


class _Nf4(nn.Module):
    """The storages of a four-bit linear map of bitsandbytes, whose tensors cannot be fake ones."""

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bias = out_features, in_features, bias
        entries = out_features * in_features
        codes = torch.zeros(-(-entries // 2), 1, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", torch.zeros(-(-entries // 64)))  # a float32 scale per 64 weights

    def forward(self, x: Tensor) -> Tensor:
        out: Any = _Decoded.apply(x, (self.out_features, self.in_features))
        if self.bias is None:
            return out
        return out + self.bias if torch.is_grad_enabled() else out.add_(self.bias)


# attaching knows coded modules by these two names
_Nf4.__module__, _Nf4.__name__ = "bitsandbytes.nn.modules", "Linear4bit"


def _code_as_nf4(net: nn.Module) -> None:
    """Put stand-ins of four-bit maps where `load_model` would put those."""
    for name, module in coded_maps(net, "nf4").items():
        loose: Any = module
        shape = tuple(loose.weight.shape)
        out, into = shape if isinstance(module, nn.Linear) else shape[::-1]
        net.set_submodule(name, _Nf4(out, into, loose.bias))


def largest_batch(
    peak_at: Callable[[int], int], budget: int, most: int = 4096, known: Mapping[int, int] | None = None
) -> int:
    """The largest batch whose peak fits a budget, in few predictions.

    A peak is close to a maximum of straight lines in the batch size, so chords between a batch that fits and
    one that does not lie above it, and secants through two that fit lie below.

    Args:
        peak_at: peak in bytes of a batch size; does not fall as the batch grows.
        budget: bytes.
        most: largest batch to consider.
        known: peaks that need not be asked for.

    Raises:
        BudgetError: a batch of one row does not fit.

    >>> largest_batch(lambda rows: 1000 + 7 * rows, 1100)
    14
    """
    peaks = {size: peak for size, peak in (known or {}).items() if 1 <= size <= most}
    if 1 not in peaks:
        peaks[1] = peak_at(1)
    if peaks[1] > budget:
        raise BudgetError(
            f"a batch of one row takes {peaks[1]:,} bytes, the budget is {budget:,} bytes; "
            "use shorter rows, a smaller model or dtype, --paradigm zo, or activation checkpointing"
        )
    while True:
        fitting = sorted(size for size, peak in peaks.items() if peak <= budget)
        low, high = fitting[-1], min((size for size in peaks if size > fitting[-1]), default=most + 1)
        if high - low <= 1:
            return low
        if high in peaks:
            guess = low + (budget - peaks[low]) * (high - low) // max(1, peaks[high] - peaks[low])
        elif len(fitting) > 1:
            before = fitting[-2]
            guess = low + (budget - peaks[low]) * (low - before) // max(1, peaks[low] - peaks[before]) + 1
        else:
            guess = 2 * low
        guess = min(max(guess, low + 1), high - 1)
        peaks[guess] = peak_at(guess)


LOSSES: dict[str, Loss] = {
    "prompt": prompt_loss((3, 4)),
    "classes": class_loss,
    "lm": lm_loss,
}


def _batch(objective: str, rows: int, tokens: int, packed: bool) -> dict[str, Tensor]:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.zeros_like(ids if objective == "lm" else ids[:, 0])}
    if objective != "lm":
        batch["attention_mask"] = torch.ones_like(ids)
    if objective == "prompt":
        batch["positions"] = torch.zeros_like(ids[:, 0])
    if packed:
        batch["position_ids"] = torch.zeros_like(ids)
    return batch


def grow(engine: Engine) -> None:
    """Have an engine that has made no step hold what it will after many windows.

    Stacks beside held weights are full, as are the spectra that a projector learns from gradients, and weights that rest have the
    optimizer state that they keep. Numbers are no longer those of a run: this is for whoever measures.
    """
    for variable in engine.variables:
        if variable.stack is not None:
            m, n, rank, like = *variable.shape, variable.stack.cap, variable.stack.left
            variable.stack.push(like.new_zeros(m, rank), like.new_zeros(n, rank))
    _fill_spectra(engine)
    if engine.method.layers.every:
        _keep_states(engine)


def hardest(engine: Engine) -> Iterator[int]:
    """Put an engine before each place where its steps may take the most, and say how many steps to make there.

    That is a change of subspaces with all state there, the blocks of layers that take most, and the window in which a coin leaves
    most to the optimizer, of the first `PERIODS`. For windows of `WINDOW` steps.

    >>> import torch, zolr
    >>> model = torch.nn.Linear(8, 8)
    >>> method = zolr.compose("stiefel", "fo", rank=2, refresh_every=WINDOW)
    >>> list(hardest(zolr.Engine(model, method, lr=0.1, loss=lambda model, x: model(x).square().mean())))
    [3]
    """
    worst, every = _worst_window(engine), engine.method.layers.every or 0
    for period in _worst_periods(engine):
        engine.step_count = max(engine.step_count, period * every)
        begun = engine.step_count % WINDOW
        if worst is not None:
            for core in engine.windows.cores.values():
                core.window = worst - 2  # the next one is that before the worst
            yield 2 * WINDOW + -begun % WINDOW  # a whole one, with its state from the beginning
        else:
            yield WINDOW + 1 - begun if engine.method.refresh_every else WINDOW


def _worst_periods(engine: Engine) -> list[int]:
    """Periods of a layer policy in which a step may take most: with the most numbers active, and with the deepest backward."""
    if engine.method.layers.every is None:
        return [0]
    order = {v.name: i for i, v in enumerate(engine.variables)}
    size, depth = {}, {}
    for period in range(PERIODS):
        active = engine.active_in(period)
        size[period] = sum(v.weight.numel() for v in active)
        # models list their weights from the input on, so that the first active one is where backward ends
        inner = [order[v.name] for v in active if engine._blocks[v.name] is not None]
        depth[period] = min(inner, default=0)
    deepest = min(depth, key=lambda period: (depth[period], -size[period]))
    return sorted({max(size, key=lambda period: size[period]), deepest})


def _worst_window(engine: Engine) -> int | None:
    """The window in which most numbers are in the hands of the optimizer, where a coin may leave it whole weights.

    While it is opened, one weight after the other as backprop comes by, those to come are as the window before left them.
    """
    chosen = [v for v in reversed(engine.variables) if v.name in engine.windows.cores]
    sizes = [
        [prod(v.shape) * engine.windows.comes_whole(v, window) for v in chosen] for window in range(PERIODS)
    ]
    if not any(map(any, sizes)):
        return None

    def most(window: int) -> int:
        before, after = sizes[window - 1], sizes[window]
        return max(sum(after[:i]) + sum(before[i:]) for i in range(len(chosen) + 1))

    return max(range(1, PERIODS), key=most)


def _keep_states(engine: Engine) -> None:
    """Give every weight the optimizer state that it has after many periods, one gradient alive at a time."""
    if not engine.method.layers.keeps:
        return
    for variable in engine.variables:
        value = engine.trained(variable)
        if value.numel():
            engine._step_alone(value, torch.zeros_like(value))


def _dropout(config: Any, dropout: float | None) -> str:
    found = dropouts(config) if dropout is None else {}
    return ", ".join(f"{name} {p:g}" for name, p in found.items() if p) or f"dropout {dropout or 0:g}"


def _fill_spectra(engine: Engine) -> None:
    """Have what a projector learns from gradients as large as it gets: a spectrum gains directions in each window."""
    projector = engine.method.projector
    for variable in engine.variables:
        space = engine.subspace(variable)
        if projector.learns_from == "gradients" and isinstance(space, Right | Left):
            n = space.basis.shape[0]
            vectors = torch.eye(
                n, min(projector.eigenpairs, n), dtype=torch.float64, device=space.basis.device
            )
            values = torch.ones(vectors.shape[1], dtype=torch.float64)
            engine.windows.spectra[variable.name] = Spectrum(vectors, values, 1e-3)


def check_predictable(config: PreTrainedConfig, objective: str) -> None:
    """Refuse a model whose steps cannot be predicted.

    Raises:
        UsageError: it is an encoder-decoder that tells classes apart.
        DataError: numbers of its config that no model can have.
    """
    numbers = _numbers(config, *COUNTS)
    for name, number in numbers.items():
        if number < 1:
            raise DataError(f"the model's config has {name} = {number}; write at least 1 there")
    heads, shared = numbers.get("num_attention_heads", 0), numbers.get("num_key_value_heads", 1)
    if heads % shared:
        raise DataError(
            f"the model's config has num_attention_heads = {heads}, which is no multiple of its num_key_value_heads = {shared}; "
            "correct one of them"
        )
    if objective == "classes" and getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"model family '{config.model_type}' is an encoder-decoder, whose classification head looks for the end of each "
            "text among its tokens, and a prediction has no tokens; finetune with --head classes, which measures the peak"
        )


@contextlib.contextmanager
def _values_explained() -> Iterator[None]:
    """One line for what fake tensors do not have."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UsageError(
            f"the step decides by values ({error.func}), which fake tensors do not have: its memory cannot be predicted, "
            "measure a run"
        ) from error


@contextlib.contextmanager
def _texts_in_a_row(several: bool) -> Iterator[None]:
    """Have transformers take rows for packed ones, or each for one text.

    It asks the values of `position_ids` for that. Where there are none it takes rows for packed ones, and makes the mask that
    keeps their texts apart; real rows of one text need none.
    """
    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if several or before is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


@contextlib.contextmanager
def _few_rounds() -> Iterator[None]:
    """Signs that need not be random: every round of their generator after the second holds what that one does."""
    before = keys._ROUNDS
    keys._ROUNDS = 2
    try:
        yield
    finally:
        keys._ROUNDS = before


def _runnable(method: Method, signs: str | None, steps: int | None) -> Method:
    """The method with windows so short that the last step sees a change, if the run has one, and nothing left to choose."""
    estimator: Any = method.estimator
    if signs is not None:
        if setting(estimator, "signs") is None:
            raise UsageError(
                f"signs '{signs}' mean nothing under paradigm '{method.paradigm}'; leave them out"
            )
        estimator = changed(estimator, signs=signs)
    if setting(estimator, "eps", 0.0) is None:
        estimator = changed(estimator, eps=1e-3)
    layers: Any = method.layers
    if layers.every is not None:
        layers = replace(layers, every=LONG)
    every = method.refresh_every and WINDOW
    # a law that is learned from inputs is full from the beginning here, and coins may leave any window the worst
    coins = any(method.residual.whole(keys.Key(window)) for window in range(PERIODS))
    changes = method.projector.learns_from == "inputs" or coins
    if every and steps is not None and steps <= (method.refresh_every or 0) and not changes:
        every = LONG
    return replace(method, estimator=estimator, refresh_every=every, layers=layers)


def _in_phases(loss: Any, live: LiveBytes, after: str) -> Any:
    def counted(model: nn.Module, batch: Any) -> Any:
        with live.phase("forward"):
            value = loss(model, batch)
        live.base_phase(after)
        return value

    return counted


def kept(engine: Engine) -> dict[str, list[Tensor]]:
    """What an engine holds from step to step besides the model, by the part of the memory that it is.

    Returns:
        "coords": values, bases, and what a projector has learned of its law; "optimizer": the optimizer's state.
    """
    coords: list[Tensor] = []
    for variable in engine.variables:
        name = variable.name
        coords += [variable.value, engine.trained(variable)]
        if variable.stack is not None:
            coords += variable.stack.tensors().values()
        if name in engine.windows.cores:
            coords += engine.windows.cores[name].kept.values()
        # the state of an engine that belongs to no variable is its own business, and memory is ours
        for owner in (
            engine.subspace(variable),
            engine.windows.spectra.get(name),
            engine.windows.moments.get(name),
        ):
            coords += [t for t in getattr(owner, "__dict__", {}).values() if isinstance(t, Tensor)]
    states = engine.optimizer.state.values()
    return {"coords": coords, "optimizer": [t for s in states for t in s.values() if isinstance(t, Tensor)]}


def _label_as_made(engine: Engine, live: LiveBytes) -> None:
    """Have what a step makes labeled: bases, gradients, and weights that are rebuilt for one use."""

    def label_gradient(value: Tensor) -> None:
        if value.grad is not None:
            live.label("gradients", value.grad)

    def label_gradients(*_: Any) -> None:
        for variable in engine.variables:
            label_gradient(variable.value)

    def rebuilding(dense: Callable[..., Any]) -> Callable[..., Any]:
        def rebuilt(*args: Any) -> Any:
            with live.making("rest"):  # would count as an activation of the module that asks for it
                return dense(*args)

        return rebuilt

    _label_kept(engine, live)
    # all gradients are in place when the optimizer steps, which labels those of every paradigm; the hooks of
    # autograd see one before the engine masks it (an embedding's is copied without its padding row)
    engine.optimizer.register_step_pre_hook(label_gradients)
    for variable in engine.variables:
        loose: Any = variable
        loose.dense = rebuilding(variable.dense)
        if engine.method.paradigm == "fo":
            variable.value.requires_grad_(True)
            variable.value.register_post_accumulate_grad_hook(label_gradient)


def _label_kept(engine: Engine, live: LiveBytes) -> None:
    """Label what outlives a step."""
    for part, tensors in kept(engine).items():
        live.label(part, *tensors)


def _parts(records: list[Record], net: nn.Module) -> dict[str, int]:
    """Bytes of live storages by what they are, in the order of `PARTS`."""
    config: Any = net.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    tables = {tuple(p.shape) for p in net.parameters() if p.dim() == 2 and vocabulary in p.shape}
    tables |= {shape[::-1] for shape in tables}  # the gradient of a linear map is made transposed
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for record in records:
        parts[_part_of(record, vocabulary, tables)] += record.bytes
    return parts


def _part_of(record: Record, vocabulary: int | None, tables: set[tuple[int, ...]]) -> str:
    """What a storage is: as labeled, else by the phase that made it and its shape."""
    if record.part or record.phase not in ("forward", "backward"):
        return record.part or "rest"
    forward = record.phase == "forward" or bool(record.module)  # modules at work in backward: checkpoints
    if not forward and record.shape in tables:
        return "gradients"  # of a tied table, on its way to the sum
    if record.dtype.is_floating_point and len(record.shape) > 1 and record.shape[-1] == vocabulary:
        return "logits"
    return "activations" if forward else "rest"


# --- measuring ----------------------------------------------------------------------------------------------


class Resident(NamedTuple):
    """Bytes in use now, and the most so far."""

    now: int
    peak: int


def resident(device: torch.device | str = "cpu") -> Resident:
    """What the device holds now and has held at most, cheap enough for a progress bar.

    On CUDA, bytes of tensors in the caching allocator. Elsewhere, resident memory of the whole process with
    the interpreter and its libraries in it, 0.3 to 0.4 GB before any model.
    """
    if torch.device(device).type == "cuda":
        return Resident(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        found = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        return Resident(*(int(found[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Resident(peak, peak)  # no cheap way to the current figure here


@dataclass
class Measured:
    """Peaks of a measured stretch, each with its own counter.

    Attributes:
        counter: what `peak_bytes` counts: "cuda allocated" or "live tensors".
        peak_bytes: the headline figure.
        reserved_bytes: CUDA only: allocator's cache and fragmentation included, the figure that has to fit.
        process_bytes: resident memory of the process at most, libraries included.
        process_from_start: the process figure could not be reset and covers everything since the process
            began.
        phase: phase of the peak where one was named.
    """

    counter: str = "live tensors"
    peak_bytes: int = 0
    reserved_bytes: int | None = None
    process_bytes: int = 0
    process_from_start: bool = True
    phase: str = ""
    live: LiveBytes | None = field(default=None, repr=False)


@contextlib.contextmanager
def measure(
    *things: nn.Module | Tensor | Mapping[str, Tensor] | Engine,
    device: torch.device | str = "cpu",
    profile: bool = False,
) -> Iterator[Measured]:
    """Measure the peak of what runs inside; figures are there once the block is left.

    On CUDA the allocator's own counter is used, which is reset (there is one for the whole process).
    Elsewhere live tensors are counted, which takes some microseconds an operation.

    Args:
        things: models, batches, tensors and engines that exist already and count too; not needed on CUDA. What an engine
            keeps is best given by the engine itself: a list of its tensors would keep alive what a step replaces.
        device: where the work happens.
        profile: keep the list of storages alive at the peak in `live.records` (not on CUDA).
    """
    measured = Measured(process_from_start=not _reset_process_peak())
    if torch.device(device).type == "cuda":
        measured.counter = "cuda allocated"
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield measured
        finally:
            torch.cuda.synchronize(device)
            measured.peak_bytes = torch.cuda.max_memory_allocated(device)
            measured.reserved_bytes = torch.cuda.max_memory_reserved(device)
            measured.process_bytes = resident().peak
        return
    measured.live = LiveBytes(profile=profile)
    measured.live.track(*things)
    del things  # what the caller does not hold may go
    try:
        with measured.live:
            yield measured
    finally:
        measured.peak_bytes, measured.phase = measured.live.peak, measured.live.peak_phase
        measured.process_bytes = resident().peak


def _reset_process_peak() -> bool:
    """Ask the kernel to forget the process's high water; whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
