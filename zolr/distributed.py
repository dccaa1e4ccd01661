"""Several processes on one run: what they exchange, in which order, and what happens when one of them is gone.

A `Team` is one process alone, for which nothing here does anything; `Processes` are the ranks of a torch.distributed job.
Every rank has the whole model and knows all micro-batches of a step. Forward-only steps exchange the `(sum, count)` of each
micro-batch, in float64, and every rank adds them up in the order of the micro-batches: the bits of a run do not depend on
the number of ranks. Backprop exchanges gradients in the coordinates `(m, r)`, in a fixed order of weights, added up in the
order of the ranks: all ranks have the same bits, and those of another number of ranks but for rounding.

No object is pickled; host tensors travel by gloo and device tensors by nccl, which a forward-only run never opens.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from zolr.errors import PeerLostError, PeersDifferError, UsageError

Spread = Literal["batches", "probes"]
SPREADS = ("batches", "probes")

TIMEOUT = 120.0  # seconds without an answer after which a rank counts as lost
PATIENCE = timedelta(hours=2)  # for what one rank does before the others: reading and cutting up a corpus
ROLL_CALL = 3.0  # seconds in which the ranks that are left find out which are not
BUCKET = 1 << 20  # entries of gradients that travel together; a larger one travels alone
BLOCK = 1 << 20  # entries hashed at once


class Team:
    """One process alone: what it has is all there is.

    Attributes:
        rank: number of this process.
        size: number of processes.
        spread: what the ranks share out: the micro-batches of a step, or its probes.
        sent: bytes that this rank has sent, by what they were.
        steps: optimizer steps in which they were sent.

    Args:
        spread: see above.

    Raises:
        UsageError: an unknown spread.
    """

    def __init__(self, spread: Spread = "batches") -> None:
        if spread not in SPREADS:
            raise UsageError(f"spread '{spread}' is not known; use 'batches' or 'probes'")
        self.rank, self.size, self.spread = 0, 1, spread
        self.sent: dict[str, int] = {"losses": 0, "gradients": 0, "evaluation": 0, "control": 0}
        self.steps = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def joined(self, part: Tensor, lengths: Sequence[int] | None = None, what: str = "losses") -> Tensor:
        """The parts of all ranks, `(..., n_rank)`, one after the other along the last axis.

        Args:
            lengths: `n_rank` of every rank, where it is known.
            what: they are counted as.
        """
        return part

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their sums over the ranks; equal shapes on all of them."""

    def largest(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        return number

    def told(self, text: str) -> str:
        """The text of the first rank."""
        return text

    def compare(self, digests: Mapping[str, Tensor], when: str) -> None:
        """Refuse to go on where the ranks differ.

        Args:
            digests: an int64 number for each name, the same names on all ranks.
            when: the moment, for the message.

        Raises:
            PeersDifferError: some rank has another number; the message names the first such name.
        """

    @contextmanager
    def exchanging(self, doing: str) -> Iterator[None]:
        """A block in which others than the team itself exchange tensors, as `fully_shard` does in every forward.

        Raises:
            PeerLostError: another rank is gone.
        """
        yield

    def wait(self, patience: timedelta = PATIENCE) -> None:
        """Go on when all ranks have come here."""

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank through the block, then all others."""
        yield


class Processes(Team):
    """The ranks of a torch.distributed job.

    Uses the process group that there is (that of an accelerate script, for example), or makes one from the environment
    that `torchrun` and `accelerate launch` set.

    Args:
        spread: see `Team`.
        timeout: seconds without an answer after which a rank counts as lost; of a group that is made here.
        device: where the weights are.

    Raises:
        UsageError: a timeout that is not positive, or an environment without ranks.
        PeerLostError: the other ranks are not there.
    """

    def __init__(
        self,
        spread: Spread = "batches",
        *,
        timeout: float = TIMEOUT,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(spread)
        if not 0 < timeout < float("inf"):
            raise UsageError(f"timeout = {timeout} is no time to wait; use seconds, such as {TIMEOUT:g}")
        self.timeout = timedelta(seconds=timeout)
        self._store: Any = None
        self._owner = not dist.is_initialized()
        self._host: Any = None  # the group of host tensors, where the default one is not for them
        if self._owner:
            if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
                raise UsageError("no ranks in the environment; start with torchrun or accelerate launch")
            backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
            with self._careful("start"):
                self._store, rank, size = next(
                    iter(rendezvous("env://", timeout=max(self.timeout, timedelta(seconds=60))))
                )
                dist.init_process_group(
                    backend, store=self._store, rank=rank, world_size=size, timeout=self.timeout
                )
        if not self._owner or dist.get_backend() != "gloo":
            self._host = dist.new_group(backend="gloo", timeout=self.timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        atexit.register(_leave, weakref.ref(self))

    def joined(self, part: Tensor, lengths: Sequence[int] | None = None, what: str = "losses") -> Tensor:
        """See `Team`."""
        if lengths is None:
            lengths = self._gather(torch.tensor([part.shape[-1]]), "control")[:, 0].tolist()
        widest = max(lengths)
        padded = torch.zeros(*part.shape[:-1], widest, dtype=part.dtype)
        padded[..., : part.shape[-1]] = part.detach()
        parts = self._gather(padded, what)
        return torch.cat([p[..., :n] for p, n in zip(parts, lengths, strict=True)], dim=-1).to(part.device)

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """See `Team`. The sum is made in float64, in the order of the ranks, each rank that of its own part."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for own in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            total = self._added_up(flat)
            for tensor, part in zip(own, total.split([t.numel() for t in own]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _added_up(self, flat: Tensor) -> Tensor:
        entries, chunk = flat.numel(), -(-flat.numel() // self.size)
        padded = torch.nn.functional.pad(flat, (0, chunk * self.size - entries))
        parts, total = torch.empty_like(padded), torch.empty_like(padded)
        group = None if padded.is_cuda else self._host
        with self._careful("adding up gradients"):
            dist.all_to_all_single(parts, padded, group=group, async_op=True).wait(self.timeout)  # pyright: ignore
            rows = parts.view(self.size, chunk)
            mine = rows[0].double()
            for row in rows[1:]:
                mine += row
            places = list(total.split(chunk))
            dist.all_gather(places, mine.to(flat.dtype), group=group, async_op=True).wait(self.timeout)  # pyright: ignore
        self.sent["gradients"] += 2 * (self.size - 1) * chunk * flat.element_size()
        return total[:entries]

    def largest(self, number: int) -> int:
        """See `Team`."""
        return int(self._gather(torch.tensor([number]), "control").max())

    def told(self, text: str) -> str:
        """See `Team`."""
        own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = self._gather(torch.tensor([len(text.encode())]), "control")[:, 0].tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(own)] = own[: len(padded)]
        return bytes(self._gather(padded, "control")[0][: lengths[0]].tolist()).decode()

    def compare(self, digests: Mapping[str, Tensor], when: str) -> None:
        """See `Team`."""
        own = torch.stack([digest.cpu() for digest in digests.values()])  # (names,)
        all_ = self._gather(own, "control")  # (ranks, names)
        usual = all_.mode(dim=0).values
        for place, name in enumerate(digests):
            if bool((all_[:, place] == usual[place]).all()):
                continue
            odd = [rank for rank, digest in enumerate(all_[:, place].tolist()) if digest != usual[place]]
            who = f"rank {', '.join(map(str, odd))} differs" if 2 * len(odd) < self.size else "they differ"
            raise PeersDifferError(
                f"'{name}' is not the same on all ranks {when}: {who}; go on from an earlier checkpoint with --resume, "
                "and if it happens again, look for unequal devices, libraries or memory errors"
            )

    @contextmanager
    def exchanging(self, doing: str) -> Iterator[None]:
        """See `Team`."""
        try:
            yield
        except RuntimeError as error:  # gloo's own are of no class of their own
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            with self._careful(doing):
                raise

    def wait(self, patience: timedelta = PATIENCE) -> None:
        """See `Team`."""
        with self._careful("waiting for all ranks"):
            dist.monitored_barrier(group=self._host, timeout=patience)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """See `Team`."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def close(self) -> None:
        """Leave the process group, if it was made here, when all ranks have come so far."""
        if self._owner and dist.is_initialized():
            self.wait()
            dist.destroy_process_group()

    def abandon(self) -> None:
        """Leave at once; the other ranks see that this one is gone."""
        if (
            self._owner and dist.is_initialized() and dist.get_backend() == "gloo"
        ):  # nccl may wait for the others
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _gather(self, part: Tensor, what: str) -> Tensor:
        """The host tensors of all ranks, `(ranks, ...)`, equal shapes."""
        part = part.contiguous()
        if not part.numel():
            return part.new_zeros(self.size, *part.shape)
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with self._careful("an exchange of figures"):
            dist.all_gather(parts, part, group=self._host)
        self.sent[what] += (self.size - 1) * part.numel() * part.element_size()
        return torch.stack(parts)

    @contextmanager
    def _careful(self, doing: str) -> Iterator[None]:
        """Failures of an exchange as what they are: another rank is gone, or does not answer."""
        try:
            yield
        except (RuntimeError, OSError) as error:  # gloo's, nccl's and the store's own are RuntimeErrors
            missing = self._missing()
            # a rank that waits for none of the lost ones hears of them late, and may not have answered yet
            named = ", ".join(map(str, missing))
            one = f"rank {named}" if len(missing) == 1 else f"one of ranks {named}"
            who = f"{one} of the run" if missing else "another rank of the run"
            raise PeerLostError(
                f"{who} is gone, or was silent for {self.timeout.total_seconds():g} s ({doing}); start all ranks again, with "
                "--resume where the run has a checkpoint"
            ) from error

    def _missing(self) -> list[int]:
        """The ranks that do not answer a roll call; none where that cannot be known."""
        try:
            self._store.set(f"zolr/alive/{self.rank}", "")
            self.abandon()  # wakes the ranks that wait for this one, so that they answer
        except (AttributeError, RuntimeError, OSError):  # no store of our own, or it went with its rank
            return []
        # a store whose own process stands still answers no second question, and is not waited for
        missing: list[int] = []
        roll = threading.Thread(target=self._call_roll, args=(missing,), daemon=True)
        roll.start()
        roll.join(ROLL_CALL + 1.0)
        return list(missing)

    def _call_roll(self, missing: list[int]) -> None:
        """Add the ranks that do not answer to those that are missing."""
        end = time.monotonic() + ROLL_CALL
        for rank in range(self.size):
            try:
                self._store.wait([f"zolr/alive/{rank}"], timedelta(seconds=max(0.05, end - time.monotonic())))
            except (RuntimeError, OSError):
                missing.append(rank)


def _leave(team: "weakref.ref[Processes]") -> None:
    """Let a group of our own go while there is still an interpreter.

    A thread of gloo's may be the last to hold a tensor that was exchanged; one that gives it up after that ends the process.
    """
    alive = team()
    if alive is not None and alive._host is not None:
        group, alive._host = alive._host, None
        with suppress(Exception):  # whoever made the default group may have ended all of them
            if dist.is_initialized():
                dist.destroy_process_group(group)


class Share(Sequence[Any]):
    """The micro-batches of a step that one rank evaluates, and how its figures become those of the step.

    Args:
        batches: all micro-batches of the step, the same on every rank; `micro-batch i` goes to the rank that `i` falls to
            when they are cut into as many pieces as there are ranks, each of neighbors.
        team: who shares them.
        seen: is given the sum of losses of a step under backprop before any of its gradients is handed on.
        device: where figures are, should there be no micro-batch here that says so.

    Attributes:
        first: number of the first own micro-batch among all of the step.
        at: number of the one that an iteration has come to. Batches have no names of their own: two of a step may say the same,
            or be the same object.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        team: Team | None = None,
        seen: Callable[[Tensor], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.team, self._seen, self.device = team or Team(), seen, device
        ranks, place = (self.team.size, self.team.rank) if self.team.spread == "batches" else (1, 0)
        self.all, self.total = batches, len(batches)
        pieces = _pieces(self.total, ranks)
        self.first = self.at = pieces[place].start
        self.lengths = [piece.stop - piece.start for piece in pieces]
        self._own = list(batches[pieces[place]])

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, place: Any) -> Any:
        return self._own[place]

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self._own):
            self.at = self.first + i
            yield batch

    @property
    def split(self) -> bool:
        """Whether some micro-batches are elsewhere."""
        return len(self.lengths) > 1

    def stacked(self, figures: Sequence[Tensor], *shape: int) -> Tensor:
        """Figures `(*shape, own)` of some probes, `(probes, *shape, own)`, should there be none of them too."""
        if figures:
            return torch.stack(list(figures))
        return torch.zeros(0, *shape, len(self), dtype=torch.float64, device=self.device)

    def whole(self, parts: Tensor) -> Tensor:
        """Figures `(..., own)` of the own micro-batches -> `(..., total)` of all, in their order."""
        return self.team.joined(parts, self.lengths) if self.split else parts

    def rows(self, parts: Tensor, what: str = "losses") -> Tensor:
        """Figures `(..., own rows)` of single examples -> those of all examples, in the order of the micro-batches."""
        return self.team.joined(parts, what=what) if self.split else parts

    def turn(self, probes: int) -> slice:
        """Those of the probes of a step that are evaluated here."""
        if self.team.spread == "batches":
            return slice(0, probes)
        return _pieces(probes, self.team.size)[self.team.rank]

    def of_all_probes(self, values: Tensor, probes: int) -> Tensor:
        """Figures `(own probes, ...)` -> `(probes, ...)`, in the order of the probes."""
        if self.team.spread == "batches":
            return values
        lengths = [piece.stop - piece.start for piece in _pieces(probes, self.team.size)]
        return self.team.joined(values.movedim(0, -1), lengths).movedim(-1, 0)

    def sums(self, total: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor | float]:
        """Sum and count of the losses of the own micro-batches -> those of the step."""
        if self.split:
            pair = torch.stack([total.double(), torch.as_tensor(count, device=total.device).double()])
            total, count = self.team.joined(pair[:, None], [1] * self.team.size).sum(1).unbind()
        if self._seen is not None:
            self._seen(total)
        return total, count

    def in_order(self, variables: Sequence[Any], emit: Callable[[Any, Tensor], None]) -> Callable[..., None]:
        """An `emit` for gradients of the own micro-batches that hands on those of the step."""
        return _InOrder(self.team, variables, emit) if self.split else emit


def _pieces(things: int, ranks: int) -> list[slice]:
    """Neighbors for every rank, as evenly as it goes.

    >>> [piece.stop - piece.start for piece in _pieces(6, 4)]
    [1, 2, 1, 2]
    """
    cuts = [rank * things // ranks for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def share_of(batches: Sequence[Any]) -> Share:
    """The micro-batches as a share; plain ones are all there are."""
    return batches if isinstance(batches, Share) else Share(batches)


class _InOrder:
    """Adds up gradients over the ranks in a fixed order of weights, whatever the order in which they come.

    Collectives must be in the same order on all ranks, and a rank that has no micro-batch, or none that reaches some
    weight, does not come by its gradients as the others do. Matrices go first, the last of the model before the others, as
    backprop finds them; vectors, which cost little to keep, wait for them.
    """

    def __init__(self, team: Team, variables: Sequence[Any], emit: Callable[[Any, Tensor], None]) -> None:
        self.team, self.emit = team, emit
        backwards = list(reversed(variables))
        self.queue = [v for v in backwards if len(v.shape) > 1] + [v for v in backwards if len(v.shape) < 2]
        self.waiting: dict[str, Tensor] = {}
        self.bucket: list[tuple[Any, Tensor]] = []

    def __call__(self, variable: Any, gradient: Tensor) -> None:
        """Take one gradient of the own micro-batches."""
        self.waiting[variable.name] = gradient
        while self.queue and self.queue[0].name in self.waiting:
            following = self.queue.pop(0)
            self.bucket.append((following, self.waiting.pop(following.name)))
            if not self.queue or sum(g.numel() for _, g in self.bucket) >= BUCKET:
                self._hand_on()

    def _hand_on(self) -> None:
        bucket, self.bucket = self.bucket, []
        # where gradients are accumulated in the coordinates, nothing is left of the dense one
        self.team.add_up([g if v.gathered is None else v.gathered.total for v, g in bucket])
        while bucket:
            variable, gradient = bucket.pop(0)
            self.emit(variable, gradient)


def digest(tensor: Tensor) -> Tensor:
    """A number, 0-dim int64, that another tensor of this shape and dtype hardly has, and none that differs in one entry.

    The bits of an entry, as a whole number, times an odd number of its place, added up modulo 2^64.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1).view(kinds[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), BLOCK):
        part = flat[start : start + BLOCK].long()
        place = torch.arange(start + 1, start + 1 + len(part), device=flat.device)
        total += (part * (place * -7046029254386353131 | 1)).sum()  # 2^64 / the golden ratio
    return total


@contextmanager
def team_of(
    spread: Spread = "batches", *, timeout: float = TIMEOUT, device: torch.device | str = "cpu"
) -> Iterator[Team]:
    """The team that the environment describes, of this process alone where it names no other, left again at the end of a run that
    ends well.

    Args:
        spread, timeout, device: as for `Processes`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield Team(spread)
        return
    team = Processes(spread, timeout=timeout, device=device)
    try:
        with team.exchanging("gathering weights"):
            yield team
    except BaseException:
        team.abandon()
        raise
    team.close()
