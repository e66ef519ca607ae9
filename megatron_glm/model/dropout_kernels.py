"""`dropout` inside a Triton kernel: the same masks from the same seeds."""

import triton
import triton.language as tl

# The constants of `dropout` as the uint32 in whose arithmetic Triton wraps.
MIX_0 = tl.constexpr(0x7FEB352D)
MIX_1 = tl.constexpr(0x846CA68B)
HASH_0 = tl.constexpr(0x85EBCA6B)
HASH_1 = tl.constexpr(0xC2B2AE35)
GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * MIX_0
    x = (x ^ (x >> 15)) * MIX_1
    return x ^ (x >> 16)


@triton.jit
def _words(seed, index):
    return index.to(tl.uint32) * GOLDEN + seed


@triton.jit
def query_word(seed_pointer, row, query):
    """uint32 words of the rows of a mask: queries of the (sequence, head) pair `row`."""
    seed = tl.load(seed_pointer).to(tl.uint32, bitcast=True)
    return _mix(_mix(_words(seed, row)) + query.to(tl.uint32))


@triton.jit
def token_word(seed_pointer, token):
    """uint32 words of the rows of a mask of hidden states: `query_word` of pair 0."""
    return query_word(seed_pointer, token * 0, token)


@triton.jit
def key_word(seed_pointer, key):
    """uint32 words of the columns of a mask: keys, or channels of hidden states."""
    return _words(tl.load(seed_pointer + 1).to(tl.uint32, bitcast=True), key)


@triton.jit
def is_kept(query_words, key_words, threshold):
    """Whether the element of each pair of words is kept."""
    word = (query_words ^ key_words) * HASH_0
    word = (word ^ (word >> 15)) * HASH_1
    return word.to(tl.int32, bitcast=True) < threshold
