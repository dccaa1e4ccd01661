"""How long does a step of a 70B model take, and how much memory, on 1, 8 and 64 cards?

On paper: memory comes from the predictor (the engine's own step on tensors without data) at 2 and 4 layers, which lie on a
straight line with any other number of layers; the time of an exchange from the alpha-beta model of a network; the time of
a pass from the operations it has and an assumed share of the card's peak. No card was used. `--measure` predicts again
(a minute or two) and writes `results/scaling.json`; without it the tables are made from that file. `--help` lists the
assumptions that can be changed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scaling.json"

# a LLaMA of 70B parameters: 80 layers of width 8192, 64 heads of which 8 hold keys and values
MODEL = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LAYERS = 80
GIB, GB = 2**30, 1e9

# what is predicted: sharded weights are held, and reached by the side path
KINDS: dict[str, dict[str, Any]] = {
    "zo": {"hold": True, "realization": "side"},
    "zo nf4": {"quantize": "nf4"},
    "fo": {"hold": True, "realization": "side"},
}


@dataclass(frozen=True)
class Machine:
    """Assumptions, none of them measured here.

    Args:
        memory: GiB of a card.
        peak: bfloat16 operations of a card, TFLOP/s.
        share: of the peak that a pass reaches.
        node: cards of a node.
        inside, outside: rate at which a card sends to its node, and to another node, GB/s.
        alpha: seconds until an exchange between cards begins to move; host: the same for scalars by TCP.
    """

    memory: float = 80.0
    peak: float = 989.0
    share: float = 0.4
    node: int = 8
    inside: float = 450.0
    outside: float = 50.0
    alpha: float = 1e-5
    host: float = 1e-4

    def rate(self, ranks: int) -> float:
        """Bytes a second of a ring over so many cards: over nodes, all cards of a node send outside at once."""
        slow = self.outside * self.node  # what a node sends
        return GB * (self.inside if ranks <= self.node else min(self.inside, slow))

    def gathered(self, size: float, ranks: int, parts: int) -> float:
        """Seconds until every card has `size` bytes of which each has a piece, in so many exchanges."""
        share = (ranks - 1) / ranks
        return parts * (ranks - 1) * self.alpha + size * share / self.rate(ranks) if ranks > 1 else 0.0

    def added(self, size: float, ranks: int) -> float:
        """Seconds of adding up `size` bytes over the cards: everyone a piece, and then all pieces to everyone."""
        return 2 * self.gathered(size, ranks, 1)


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        name: for the table.
        kind: whose predicted bytes it takes, one of KINDS.
        passes: forwards' worth of operations a step; backward through frozen weights costs one, through trained ones two.
        gathers: times the weights come together in a step.
        dense: whether gradients of all weights travel.
        sharded: over all cards, over those of a "node", or not at all ("none").
    """

    name: str
    kind: str
    passes: float
    gathers: int
    dense: bool
    sharded: str


WAYS = (
    Way("zo, nf4 codes whole", "zo nf4", 2, 0, False, "none"),
    Way("zo, weights whole", "zo", 2, 0, False, "none"),
    Way("zo, sharded", "zo", 2, 2, False, "all"),
    Way("zo, sharded in a node", "zo", 2, 2, False, "node"),
    Way("fo, sharded", "fo", 3, 2, False, "all"),
    Way("fo, sharded in a node", "fo", 3, 2, False, "node"),
    Way("AdamW, sharded", "fo", 4, 2, True, "all"),
)


def measured(rank: int, rows: int, length: int) -> dict[str, Any]:
    """Predicted bytes of a step at 2 and 4 layers."""
    import torch
    from transformers import AutoConfig

    from zolr.memory import predict
    from zolr.methods import compose

    found: dict[str, Any] = {"rank": rank, "rows": rows, "length": length, "torch": torch.__version__}
    for kind, settings in KINDS.items():
        paradigm = kind.split()[0]
        for layers in (2, 4):
            config = AutoConfig.for_model("llama", num_hidden_layers=layers, **MODEL)
            seen = predict(
                config,
                compose("stiefel", paradigm, rank=rank),
                batch_size=rows,
                max_length=length,
                dtype=torch.bfloat16,
                objective="lm",
                checkpointing=paradigm == "fo",
                select="attention+linear",
                **settings,
            )
            found[f"{kind} {layers}"] = {"weights": seen.weights_bytes, "peak": seen.peak_bytes}
    return found


def line(low: float, high: float, layers: int = LAYERS) -> float:
    """What 2 and 4 layers say about more of them."""
    return low + (high - low) / 2 * (layers - 2)


def coordinates(rank: int) -> int:
    """Entries `(m, r)` of all matrices of all layers."""
    width, inner = MODEL["hidden_size"], MODEL["intermediate_size"]
    keys = width // MODEL["num_attention_heads"] * MODEL["num_key_value_heads"]
    outputs = width + 2 * keys + width + 2 * inner + width  # q, k, v, o, gate, up, down
    return LAYERS * outputs * rank


def estimate(way: Way, cards: int, machine: Machine, seen: dict[str, Any]) -> dict[str, Any] | None:
    """Memory and times of a step; None where the way makes no sense on so many cards."""
    low, high = (seen[f"{way.kind} {layers}"] for layers in (2, 4))
    weights = line(low["weights"], high["weights"])
    beside = line(low["peak"] - low["weights"], high["peak"] - high["weights"])
    layer = (high["weights"] - low["weights"]) / 2
    table = MODEL["vocab_size"] * MODEL["hidden_size"] * 2
    pieces = {"none": 1, "node": machine.node, "all": cards}[way.sharded]
    if (way.sharded == "all" and cards == 1) or (way.sharded == "node" and cards <= machine.node):
        return None
    forward_only = way.kind.startswith("zo")
    own = weights / pieces
    whole = 0 if pieces == 1 else 2 * max(layer, table)  # one unit at work, the next one on its way
    # bfloat16 gradients, float32 weights and two moments beside bfloat16 weights, instead of coordinates
    state = 14 / 2 * weights / pieces if way.dense else 0
    memory = own + whole + state + beside
    parameters = line(*(seen[f"zo {layers}"]["weights"] for layers in (2, 4))) / 2
    tokens = seen["rows"] * seen["length"]
    compute = way.passes * 2 * parameters * tokens / (machine.peak * 1e12 * machine.share)
    exchange = way.gathers * machine.gathered(weights, pieces, LAYERS)
    if way.dense:
        exchange += machine.gathered(weights, pieces, LAYERS)
    elif not forward_only:
        exchange += machine.added(4 * coordinates(seen["rank"]), cards)
    else:
        exchange += (cards - 1) * machine.host
    # sum and count of both signs, float64, to every other rank; or the coordinates, float32, there and back
    sent = 32 * (cards - 1) if forward_only else 8 * coordinates(seen["rank"]) * (cards - 1) / cards
    return {
        "way": way.name,
        "cards": cards,
        "memory": memory,
        "fits": memory <= machine.memory * GIB,
        "compute": compute,
        "exchange": exchange,
        "apart": compute + exchange,
        "overlapped": max(compute, exchange),
        "tokens": cards * tokens / max(compute, exchange),
        "gradients_sent": 2 * weights * (cards - 1) / cards if way.dense else sent,
    }


def tables(machine: Machine, seen: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| way | cards | memory of a card, GiB | fits | compute, s | exchange, s | step, overlapped to apart, s | "
        "tokens a second | a rank sends for the update |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        for cards in (1, 8, 64):
            found = estimate(way, cards, machine, seen)
            if found is None:
                continue
            lines.append(
                f"| {way.name} | {cards} | {found['memory'] / GIB:.0f} | {'yes' if found['fits'] else 'no'} | "
                f"{found['compute']:.2f} | {found['exchange']:.2f} | {found['overlapped']:.2f} to {found['apart']:.2f} | "
                f"{found['tokens']:,.0f} | {readable(found['gradients_sent'])} |"
            )
    return "\n".join(lines)


def readable(size: float) -> str:
    """Bytes for people."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= divisor:
            return f"{size / divisor:.3g} {unit}"
    return f"{size:.0f} B"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="predict the bytes again")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="rows of a card's micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--json", action="store_true")
    for name, value in asdict(Machine()).items():
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help=f"see Machine; default {value}"
        )
    asked = parser.parse_args(arguments)
    machine = Machine(**{name: getattr(asked, name) for name in asdict(Machine())})
    if asked.measure:
        RESULTS.write_text(json.dumps(measured(asked.rank, asked.rows, asked.length), indent=2) + "\n")
    seen = json.loads(RESULTS.read_text())
    if asked.json:
        found = [estimate(way, cards, machine, seen) for way in WAYS for cards in (1, 8, 64)]
        print(json.dumps([one for one in found if one], indent=2))
    else:
        print(tables(machine, seen))


if __name__ == "__main__":
    main()
