"""Numbers in the registers of PTX, and its instructions that compute one from others."""

import numpy as np

DTYPES = {
    f"{kind}{width}": np.dtype(f"{'i' if kind == 's' else 'u'}{width // 8}")
    for kind in "bus" for width in (8, 16, 32, 64)
} | {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "bf16": np.dtype("u2")}  # fmt: skip
"""How numbers lie in registers."""


def decode(bits: np.ndarray, type: str) -> np.ndarray:
    """Numbers of a type in registers that may be wider: [n], or [n, 2] of pairs; 16-bit floats as
    fp32."""
    if type == "pred":
        return bits
    if type.endswith("x2"):
        halves = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)
        return decode(halves, type.removesuffix("x2"))
    numbers = bits.astype(f"u{DTYPES[type].itemsize}").view(DTYPES[type])
    if type == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32) if type == "f16" else numbers


def encode(numbers: np.ndarray, type: str) -> np.ndarray:
    """The inverse, floats rounded to the nearest. Integers keep their signs, by which a register
    that is wider is filled up."""
    if type == "pred":
        return numbers
    if type.endswith("x2"):
        halves = encode(numbers, type.removesuffix("x2"))
        return np.ascontiguousarray(halves).view(np.uint32)[..., 0]
    if type == "bf16":
        bits = numbers.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(numbers), 0x7FFF, rounded).astype(np.uint16)
    numbers = numbers.astype(DTYPES[type])
    return numbers.view(f"u{numbers.itemsize}") if type[0] == "f" else numbers


def _twice_as_wide(numbers):
    return numbers.astype(f"{numbers.dtype.kind}{2 * numbers.itemsize}")


def _field(a, position, count):
    """Of so many bits, its highest one repeated above it in signed numbers."""
    width = 8 * a.itemsize
    return a << (width - position - count).astype(a.dtype) >> (width - count).astype(a.dtype)


COMPARISONS = {
    "eq": np.equal, "lt": np.less, "gt": np.greater, "ge": np.greater_equal,
    # Of NaN none holds but ltu; num says that there is none.
    "ne": lambda a, b: (a < b) | (a > b),
    "ltu": lambda a, b: ~(a >= b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip
# Of an instruction without its type: the types of its result and of its operands (t: its own, w:
# that twice as wide, u: u32, p: predicates), and what it does.
ARITHMETIC = {
    "add": ("ttt", np.add),
    "sub": ("ttt", np.subtract),
    "mul": ("ttt", np.multiply),
    "mul.lo": ("ttt", np.multiply),
    "mul.hi": ("ttt", lambda a, b: _twice_as_wide(a) * b >> 8 * a.itemsize),
    "mul.wide": ("wtt", lambda a, b: _twice_as_wide(a) * b),
    "mad.lo": ("tttt", lambda a, b, c: a * b + c),
    "mad.wide": ("wttw", lambda a, b, c: _twice_as_wide(a) * b + c),
    # A product of two fp32 is exact in fp64.
    "fma.rn": ("tttt", lambda a, b, c: a.astype(np.float64) * b + c),
    "div": ("ttt", lambda a, b: np.sign(a) * np.sign(b) * (abs(a) // abs(b))),
    "div.full": ("ttt", np.divide),
    "min": ("ttt", np.fmin),
    "max": ("ttt", np.fmax),
    "neg": ("tt", np.negative),
    "abs": ("tt", np.abs),
    "sqrt.rn": ("tt", np.sqrt),
    "rsqrt.approx.ftz": ("tt", lambda a: 1 / np.sqrt(a.astype(np.float64))),
    "ex2.approx": ("tt", lambda a: np.exp2(a.astype(np.float64))),
    "not": ("tt", np.invert),
    "and": ("ttt", np.bitwise_and),
    "or": ("ttt", np.bitwise_or),
    "xor": ("ttt", np.bitwise_xor),
    # numpy, too, shifts all bits out by more than there are.
    "shl": ("ttu", lambda a, count: a << count.astype(a.dtype)),
    "shr": ("ttu", lambda a, count: a >> count.astype(a.dtype)),
    "bfe": ("ttuu", _field),
    "selp": ("tttp", lambda a, b, which: np.where(which, a, b)),
} | {f"setp.{name}": ("ptt", compare) for name, compare in COMPARISONS.items()}
ARITHMETIC |= {f"{name}.ftz": ARITHMETIC[name] for name in ("fma.rn", "abs", "ex2.approx")}
