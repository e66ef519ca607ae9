"""Random streams and permutations that are functions of integers alone.

Legacy distributions of NumPy are used on purpose: their streams are frozen, so a run resumed under
another version of NumPy draws the same samples.
"""

import zlib

import numpy as np

_MASK64 = (1 << 64) - 1


def random_stream(seed: int, salt: int, epoch: int, index: int) -> np.random.RandomState:
    """A generator of its own for every (seed, salt, epoch, index), each taken modulo 2**64.

    The counter of Philox is set, not advanced: streams cannot overlap, for each is 2**128 long.
    """
    key = (seed & _MASK64) | (salt & _MASK64) << 64
    counter = (epoch & _MASK64) << 128 | (index & _MASK64) << 192
    return np.random.RandomState(np.random.Philox(key=key, counter=counter))


def permute(index: int, size: int, key: int) -> int:
    """Where a random permutation of range(size), chosen by key, puts `index`.

    Takes constant time and memory: a Feistel network over the next power of four, walked until it
    falls inside the range, which takes fewer than four turns on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(6):
            left, right = right, left ^ (mix(key + turn, right) & low)
        index = left << half | right
        if index < size:
            return index


def mix(key: int, value: int) -> int:
    """A 64-bit hash of two integers (the finaliser of SplitMix64, twice)."""
    return _finalise(_finalise(key & _MASK64) ^ (value & _MASK64))


def fingerprint(lengths: np.ndarray) -> int:
    """Tells corpora apart by the lengths of their documents, wherever their files lie: 64 bits."""
    return mix(zlib.crc32(np.ascontiguousarray(lengths)), len(lengths))


def _finalise(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK64
    return value ^ value >> 31
