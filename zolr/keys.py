"""Key: the name of one random draw.

A draw here depends on its name alone (seed, purpose, step, weight, ...), never on a position in a stream, so it is
the same whatever was drawn before it, in whatever order, on however many threads or machines.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIGNS_PER_COUNTER = 128  # one Philox counter gives four 32-bit words, one bit an entry

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def name_hash(name: str) -> int:
    """64-bit hash of a name, the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _multiply(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `constant * words`, in int64."""
    product = constant * words  # wraps modulo 2**64, so its 64 bits are those of the unsigned product
    return (product >> 32).bitwise_and_(_MASK), product.bitwise_and_(_MASK)


def philox(counters: Tensor, key: int) -> Tensor:
    """Philox 4x32-10 of 128-bit counters under a 64-bit key, in integer arithmetic only.

    Args:
        counters: `(blocks, 4)` int64, each entry in [0, 2**32).
        key: 64-bit integer.

    Returns:
        `(blocks, 4)` int64 holding 32-bit words.

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    c0, c1, c2, c3 = counters.unbind(-1)
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIER_0, c0)
        high1, low1 = _multiply(_MULTIPLIER_1, c2)
        c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = low1, low0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


@dataclass(frozen=True)
class Key:
    """A named, splittable seed.

    Args:
        seed: any integer; with the parts folded in it names one draw.

    >>> Key(0).fold_in("probe", 3, "w").integer() == Key(0).fold_in("probe").fold_in(3, "w").integer()
    True
    """

    seed: int
    path: tuple[int | str, ...] = field(default=())

    def fold_in(self, *parts: int | str) -> "Key":
        """The key below this one along `parts`."""
        return Key(self.seed, self.path + parts)

    def integer(self) -> int:
        """64-bit integer that stands for the whole name (blake2b of seed and path)."""
        # a slash inside a part is escaped, so that no two names read the same
        parts = (f"{type(p).__name__[0]}:{p}".replace("%", "%25").replace("/", "%2F") for p in self.path)
        text = "/".join([str(self.seed), *parts])
        return name_hash(text)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator of a device, the host's by default, seeded by this name; nothing global is touched."""
        return torch.Generator(device).manual_seed(self.integer() >> 1)

    def normal(self, shape: tuple[int, ...] | torch.Size, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 numbers.

        Args:
            device: what they are for. A CUDA card draws its own, which are the same for one kind of card and torch version;
                for all else the host does, whose are the same beside every device, as those of bases have to be.
        """
        drawn_by = device if torch.device(device).type == "cuda" else "cpu"
        return torch.randn(shape, generator=self.generator(drawn_by), dtype=torch.float32, device=drawn_by)

    def uniform(self, shape: tuple[int, ...] | torch.Size = ()) -> Tensor:
        """Uniform float64 numbers in [0, 1) on the host."""
        return torch.rand(shape, generator=self.generator(), dtype=torch.float64)

    def permutation(self, n: int) -> Tensor:
        """A uniform permutation of `range(n)`, int64 on the host."""
        return torch.randperm(n, generator=self.generator())

    def signs(self, counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent fair +-1 entries, the same on every device and torch version.

        Args:
            counters: `(blocks, 4)` int64 from `probes.counters`; one block gives 128 entries.
            dtype: dtype of the result.

        Returns:
            Flat tensor of `128 * blocks` entries on the device of `counters`.
        """
        words = philox(counters, self.integer())  # (blocks, 4)
        device = counters.device
        octets = (words[:, :, None] >> torch.arange(0, 32, 8, device=device)).bitwise_and_(255)  # (blocks, 4, 4)
        # eight entries at once, from a table of what each octet stands for: no number of many bytes is made for each bit
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        return (2 * bits - 1).to(dtype).index_select(0, octets.flatten()).flatten()
