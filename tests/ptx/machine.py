"""Threads that execute PTX."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from tests.ptx.arithmetic import ARITHMETIC, DTYPES, decode, encode

LANES = np.arange(32)
GARBAGE = 0xCDCDCDCDCDCDCDCD
"""What registers hold that nothing was written to."""
REGISTERS = {"%p": bool, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+")


class Instruction(NamedTuple):
    text: str
    predicate: str | None
    is_negated: bool
    threads: int
    """So many neighbours execute it together."""
    execute: Callable
    operands: list[str]


class Machine:
    """Threads of all programs. Those that are furthest behind in the code go first, but for ones
    that wait for others: so those that took different ways go together again where these meet."""

    def __init__(self, ptx, grid, parameters, memory, shared_bytes):
        self._parameters, self._memory, self._shared_bytes = parameters, memory, shared_bytes
        grid = (*grid, 1, 1)[:3]
        size = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self._code, self._labels = _parse(ptx, size)
        programs = int(np.prod(grid))
        self._program, thread = np.divmod(np.arange(programs * size), size)
        # Shared memory begins at 0.
        self._registers = {"%tid.x": thread.astype(np.uint32),
                           "global_smem": np.zeros(1, np.uint32)}  # fmt: skip
        at = self._program
        for axis, count in zip("xyz", grid, strict=True):
            self._registers[f"%ctaid.{axis}"] = (at % count).astype(np.uint32)
            self._registers[f"%nctaid.{axis}"] = np.full(1, count, np.uint32)
            at = at // count
        self._next = np.zeros(len(thread), np.int64)
        self._shared = np.zeros(programs * shared_bytes, np.uint8)
        self._is_written = np.zeros(len(self._shared), bool)
        # Groups of asynchronous copies, each with the threads for which it has not landed.
        self._copies, self._groups = [], []

    def run(self) -> None:
        while (at := self._next.min()) < len(self._code):
            active = self._ready(at)
            while not active.any():
                at = self._next[self._next > at].min()
                if at == len(self._code):
                    raise RuntimeError("threads wait for others, which have ended")
                active = self._ready(at)
            instruction = self._code[at]
            self._next[active] += 1
            if instruction.predicate:
                active &= self._read(instruction.predicate, "pred") ^ instruction.is_negated
            if active.any():
                try:
                    instruction.execute(self, active, *instruction.operands)
                except Exception as error:
                    error.add_note(f"at {instruction.text}")
                    raise

    def _ready(self, at: int) -> np.ndarray:
        """Threads that are at an instruction with all that execute it together."""
        count = self._code[at].threads
        return (self._next == at).reshape(-1, count).all(1).repeat(count)

    def _read(self, operand: str, type: str) -> np.ndarray:
        if operand in self._registers or operand[0] == "%":
            return decode(self._register(operand), type)
        if operand.startswith("0f"):
            return decode(np.array([int(operand[2:], 16)], np.uint32), type)
        if type == "pred":
            return np.array([int(operand) != 0])
        return decode(np.array([int(operand, 0) % 2**64], np.uint64), type)

    def _read_all(self, operand: str, type: str) -> np.ndarray:
        """Of every thread, also where they share one number."""
        return np.broadcast_to(self._read(operand, type), self._next.shape)

    def _write(self, active: np.ndarray, operand: str, type: str, numbers: np.ndarray) -> None:
        np.copyto(self._register(operand), encode(numbers, type), "unsafe", active)

    def _register(self, name: str) -> np.ndarray:
        if name not in self._registers:
            dtype = REGISTERS[name.rstrip("0123456789")]
            garbage = np.array(GARBAGE, np.uint64).astype(dtype)
            self._registers[name] = np.full(len(self._next), garbage)
        return self._registers[name]

    def _calculate(self, active, *operands, kinds, function, type):
        types = {"t": type, "w": f"{type[0]}{16 * DTYPES[type].itemsize}" if "w" in kinds else "",
                 "u": "u32", "p": "pred"}  # fmt: skip
        own, *types = (types[kind] for kind in kinds)
        target, *sources = operands
        numbers = [self._read(*each) for each in zip(sources, types, strict=True)]
        self._write(active, target, own, function(*numbers))

    def _convert(self, active, target, *sources, to, of):
        # Of a pair, the upper number comes first.
        numbers = [self._read(operand, of) for operand in reversed(sources)]
        self._write(active, target, to, np.stack(numbers, -1) if len(numbers) == 2 else numbers[0])

    def _move(self, active, target, source, *, type):
        """From one register to another, or between one and several smaller ones."""
        targets, sources = _vector(target), _vector(source)
        if len(targets) == len(sources):
            return self._write(active, target, type, self._read(source, type))
        width = 8 * DTYPES[type].itemsize // max(len(targets), len(sources))
        shifts = range(0, 64, width)
        if len(sources) > 1:
            parts = [self._read(part, f"b{width}").astype(DTYPES[type]) for part in sources]
            bits = sum(part << shift for part, shift in zip(parts, shifts, strict=False))
            return self._write(active, target, type, bits)
        for part, shift in zip(targets, shifts, strict=False):
            if part != "_":
                self._write(active, part, f"b{width}", self._read(source, type) >> shift)

    def _branch(self, active, label):
        self._next[active] = self._labels[label]

    def _return(self, active):
        self._next[active] = len(self._code)

    def _barrier(self, active, *_):
        """That threads wait for each other is all."""

    def _load_parameter(self, active, target, source, *, type):
        number = int(re.fullmatch(r"\[\w+_param_(\d+)]", source)[1])
        bits = np.array([self._parameters[number] % 2**64], np.uint64)
        self._write(active, target, type, decode(bits, type))

    def _addresses(self, operand, shared):
        base, _, offset = operand[1:-1].replace(" ", "").partition("+")
        addresses = self._read(base, "u32" if shared else "u64").astype(np.int64) + int(offset or 0)
        return np.broadcast_to(addresses, self._next.shape)

    def _places(self, active, addresses, count, shared):
        """Which bytes active threads mean: an array of such, and indices in it [threads, count]."""
        addresses = addresses[active]
        if (addresses % count).any():
            raise IndexError(f"an address that is no multiple of {count}")
        if not shared:
            return self._memory.bytes, self._memory.places(addresses, count)
        if ((addresses < 0) | (addresses + count > self._shared_bytes)).any():
            raise IndexError(f"an address beyond {self._shared_bytes} bytes of shared memory")
        start = self._program[active] * self._shared_bytes + addresses
        return self._shared, start[:, None] + np.arange(count)

    def _fetch(self, bytes, places):
        if bytes is self._shared and not self._is_written[places].all():
            raise IndexError("shared memory is read before it is written")
        return bytes[places]

    def _put(self, bytes, places, content):
        bytes[places] = content
        if bytes is self._shared:
            self._is_written[places] = True

    def _load(self, active, target, source, *, type, shared):
        parts, dtype = _vector(target), DTYPES[type]
        count = len(parts) * dtype.itemsize
        found = self._fetch(*self._places(active, self._addresses(source, shared), count, shared))
        for part, bits in zip(parts, found.view(dtype).T, strict=True):
            self._register(part)[active] = bits

    def _store(self, active, target, source, *, type, shared):
        parts = [self._read_all(part, type) for part in _vector(source)]
        content = np.stack(parts, 1)[active].view(np.uint8)
        addresses = self._addresses(target, shared)
        self._put(*self._places(active, addresses, content.shape[1], shared), content)

    def _copy(self, active, target, source, size, source_size):
        """Asynchronous; zeros where the size of the source is 0."""
        size, sizes = int(size, 0), self._read_all(source_size, "u32")
        if not np.isin(sizes[active], (0, size)).all():
            raise NotImplementedError("a copy of a part")
        reads = active & (sizes == size)
        content, places = (np.zeros((len(active), size), dtype) for dtype in (np.uint8, int))
        memory, found = self._places(reads, self._addresses(source, False), size, False)
        content[reads] = memory[found]
        _, places[active] = self._places(active, self._addresses(target, True), size, True)
        self._is_written[places[active]] = False
        self._copies.append((active, places, content))

    def _commit(self, active):
        self._groups.append((active.copy(), [(of & active, *copy) for of, *copy in self._copies]))
        self._copies = [(of & ~active, *copy) for of, *copy in self._copies if (of & ~active).any()]

    def _wait(self, active, count):
        """All but the last so many groups of each thread land."""
        after = np.zeros(len(active), int)
        for pending, copies in reversed(self._groups):
            lands = active & pending & (after >= int(count))
            after += pending
            pending &= ~lands
            for of, places, content in copies:
                self._put(self._shared, places[of & lands], content[of & lands])

    def _matrices(self, active, operand, count, transposed):
        """Of each half of the registers of lanes its place in matrices [8, 8] of 16 bits, of which
        lanes 8i to 8i + 7 give the addresses of the rows of the i-th."""
        rows = self._addresses(operand, True).reshape(-1, 32)
        for matrix in range(count):
            for half in range(2):
                place = LANES // 4, 2 * (LANES % 4) + half
                row, column = reversed(place) if transposed else place
                addresses = (rows[:, 8 * matrix + row] + 2 * column).ravel()
                yield matrix, half, self._places(active, addresses, 2, True)

    def _load_matrices(self, active, target, source, *, transposed):
        parts = _vector(target)
        halves = np.zeros((len(parts), len(active), 2), np.uint16)
        for matrix, half, where in self._matrices(active, source, len(parts), transposed):
            halves[matrix, active, half] = self._fetch(*where).view(np.uint16)[:, 0]
        for part, bits in zip(parts, halves, strict=True):
            self._write(active, part, "b32", bits.view(np.uint32)[:, 0])

    def _store_matrices(self, active, target, source, *, transposed):
        parts = [self._read_all(part, "b32") for part in _vector(source)]
        for matrix, half, where in self._matrices(active, target, len(parts), transposed):
            content = parts[matrix][active] >> (16 * half)
            self._put(*where, content.astype(np.uint16)[:, None].view(np.uint8))

    def _multiply(self, active, *operands, of):
        """D = A B + C of [16, 16] and [16, 8] by each warp, whose lanes hold two neighbours of a
        row of A, of a column of B and of a row of C."""
        d, a, b, c = map(_vector, operands)
        row, column = LANES[:, None] // 4, 2 * (LANES[:, None] % 4) + np.arange(2)
        warps = len(active) // 32
        lhs, rhs, sums = (np.zeros((warps, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))

        def pairs(part):
            return self._read(part, f"{of}x2").reshape(warps, 32, 2)

        for i, part in enumerate(a):
            lhs[:, row + 8 * (i % 2), column + 8 * (i // 2)] = pairs(part)
        for i, part in enumerate(b):
            rhs[:, column + 8 * i, row] = pairs(part)
        for i, part in enumerate(c):
            own = row[:, 0] + 8 * (i // 2), column[:, i % 2]
            sums[:, *own] = self._read_all(part, "f32").reshape(warps, 32)
        sums += lhs @ rhs
        for i, part in enumerate(d):
            own = row[:, 0] + 8 * (i // 2), column[:, i % 2]
            self._write(active, part, "f32", sums[:, *own].ravel())

    def _shuffle(self, active, target, source, mask, *_):
        """Registers of the lanes whose number differs in the bits of the mask."""
        bits = self._read_all(source, "b32").reshape(-1, 32)[:, LANES ^ int(mask)]
        self._write(active, target, "b32", bits.ravel())


# What follows the name of its type, and what does not.
TYPED = {
    "mov": Machine._move,
    "ld.param": Machine._load_parameter,
} | {
    f"{name}.{space}{vector}": partial(method, shared=space == "shared")
    for name, method in (("ld", Machine._load), ("st", Machine._store))
    for space in ("global", "shared") for vector in ("", ".v2", ".v4")
}  # fmt: skip
CONVERSIONS = (
    "f32.f16", "f32.bf16", "rn.f32.s32", "rn.f16.f32", "rn.bf16.f32", "rn.f16x2.f32",
    "rn.bf16x2.f32", "s32.s8", "s32.s16", "s64.s32", "u16.u32", "u32.u16", "u32.u64", "u64.u32",
)  # fmt: skip
OTHERS = {
    "bra": Machine._branch,
    "bra.uni": Machine._branch,
    "ret": Machine._return,
    "bar.sync": Machine._barrier,
    "bar.warp.sync": Machine._barrier,
    "cp.async.ca.shared.global": Machine._copy,
    "cp.async.cg.shared.global": Machine._copy,
    "cp.async.commit_group": Machine._commit,
    "cp.async.wait_group": Machine._wait,
    "shfl.sync.bfly.b32": Machine._shuffle,
} | {
    f"{name}.sync.aligned.m8n8.{count}{kind}.shared.b16": partial(method, transposed=bool(kind))
    for name, method in (
        ("ldmatrix", Machine._load_matrices), ("stmatrix", Machine._store_matrices),
    )
    for count in ("x1", "x4") for kind in ("", ".trans")
} | {
    f"mma.sync.aligned.m16n8k16.row.col.f32.{of}.{of}.f32": partial(Machine._multiply, of=of)
    for of in ("f16", "bf16")
} | {
    f"cvt.{name}": partial(Machine._convert, to=name.split(".")[-2], of=name.split(".")[-1])
    for name in CONVERSIONS
}  # fmt: skip


def _method(name: str) -> Callable:
    """What executes an instruction of that name."""
    if name in OTHERS:
        return OTHERS[name]
    base, _, type = name.rpartition(".")
    if base in TYPED:
        return partial(TYPED[base], type=type)
    if base in ARITHMETIC:
        kinds, function = ARITHMETIC[base]
        return partial(Machine._calculate, kinds=kinds, function=function, type=type)
    raise NotImplementedError(f"PTX's instruction {name}")


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _parse(ptx: str, size: int) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and of each label that of the instruction which it stands before.
    size: threads of a program."""
    code, labels = [], {}
    body = re.search(r"^{\n(.*?)^}$", ptx, re.DOTALL | re.MULTILINE)[1]
    body = re.sub(r"//.*|^\s*\.(loc|reg|pragma)\b.*", "", body, flags=re.MULTILINE)
    for statement in re.split(r";|(?<=:)\s", body):
        text = " ".join(statement.split())
        if text.endswith(":"):
            labels[text[:-1]] = len(code)
        elif text:
            negated, predicate, name, operands = INSTRUCTION.fullmatch(text).groups()
            threads = size if name == "bar.sync" else 32 if ".sync" in name else 1
            if threads > 1 and predicate:
                raise NotImplementedError(f"a condition of what threads do together: {text}")
            code.append(Instruction(text, predicate, bool(negated), threads, _method(name),
                                    OPERAND.findall(operands)))  # fmt: skip
    return code, labels
