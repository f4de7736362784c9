"""The order of samples: a keyed permutation of any size, another each epoch, at any position in O(1).

A sample's index is encrypted by an unbalanced Feistel network over the smallest power of two that holds all
samples. What falls outside is encrypted again until it falls inside (cycle walking, Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002): less than two rounds of it on average, as the domain is less
than twice the samples. Each of NUM_ROUNDS rounds xors one half with a hash of the other half and a round key,
which can be undone, so the whole is a bijection whatever the hash. Round keys come from seed and epoch;
epochs are unrelated permutations.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

NUM_ROUNDS = 20
"""Even: with 12, the permutations of five samples are measurably uneven, with 20 they are not."""


class Order:
    """Maps a global sample position p to a sample: epoch p // num_samples, a permutation within it."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples: {num_samples}; at least 1 sample is needed")
        self.num_samples = num_samples
        self.seed = seed
        bits = (num_samples - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def sample(self, position: int) -> int:
        """The sample at global position `position` >= 0."""
        return int(self.samples(position, 1)[0])

    def samples(self, position: int, count: int) -> NDArray[np.int64]:
        """The samples at positions position, ..., position + count - 1: int64 [count]."""
        if position < 0:
            raise ValueError(f"position: {position}; positions begin at 0")
        parts = []
        while count > 0:
            epoch, first = divmod(position, self.num_samples)
            taken = min(count, self.num_samples - first)
            parts.append(self._permuted(np.arange(first, first + taken, dtype=np.uint64), epoch))
            position, count = position + taken, count - taken
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _permuted(self, index: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        keys = self._round_keys(epoch)
        index = self._encrypted(index, keys)
        while (outside := np.flatnonzero(index >= self.num_samples)).size:
            index[outside] = self._encrypted(index[outside], keys)
        return index.astype(np.int64)

    def _encrypted(self, index: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = index >> self._low_bits, index & self._low_mask
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high = high ^ (_mixed(low + first) & self._high_mask)
            low = low ^ (_mixed(high + second) & self._low_mask)
        return (high << self._low_bits) | low

    def _round_keys(self, epoch: int) -> NDArray[np.uint64]:
        """One key a round, from seed (any int, taken modulo 2^64) and epoch."""
        words = (
            xxhash.xxh3_64_intdigest(struct.pack("<QQQ", self.seed % (1 << 64), epoch, turn))
            for turn in range(NUM_ROUNDS)
        )
        return np.fromiter(words, np.uint64, NUM_ROUNDS)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), element by element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
