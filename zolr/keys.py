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
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def name_hash(name: str) -> int:
    """64-bit hash of a name, the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def philox(counters: Tensor, key: int) -> Tensor:
    """Philox 4x32-10 of 128-bit counters under a 64-bit key, in integer arithmetic only.

    Args:
        counters: `(blocks, 4)` int64, each entry in [0, 2**32).
        key: 64-bit integer.

    Returns:
        `(blocks, 4)` int64 holding 32-bit words.

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    # Two words at once, (2, blocks): on a GPU a draw costs what its calls cost. Words 0 and 2 of a round are made of the products
    # of words 2 and 0 before it, so they change places, and with them multipliers and keys. Products are taken modulo 2**64,
    # which keeps all bits of an unsigned one; what lies above the low half of `odd` goes when it has been mixed in.
    rows = counters.mT.contiguous()
    even, odd = rows[0::2], rows[1::2]
    index = torch.arange(2, device=counters.device)[:, None]
    here, there = (start + index * (stop - start) for start, stop in (_MULTIPLIERS, _MULTIPLIERS[::-1]))
    keys = key >> 32 & _MASK, key & _MASK
    for done in range(_ROUNDS):
        products = here * even
        even = products >> 32
        for row, word in enumerate(keys if done % 2 == 0 else keys[::-1]):
            even[row].bitwise_xor_(odd[1 - row]).bitwise_xor_(word)
        even, odd = even.bitwise_and_(_MASK), products
        here, there = there, here
        keys = (keys[0] + _WEYL[1]) & _MASK, (keys[1] + _WEYL[0]) & _MASK
    odd = odd.bitwise_and_(_MASK)
    # all words are in place again after an even number of rounds
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1)


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
        shifts = torch.arange(0, 32, 8, device=device)
        octets = (words[:, :, None] >> shifts).bitwise_and_(255)  # (blocks, 4, 4)
        # eight entries at once, from a table of what each octet stands for: no number of many bytes is made for each bit
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        return (2 * bits - 1).to(dtype).index_select(0, octets.flatten()).flatten()
