"""SAT checkpoints: what THUDM/GLM-130B and FasterTransformer-GLM read.

`latest` holds the iteration, `<iteration>/mp_rank_XX_model_states.pt` one tensor-parallel rank
each, as {"module": {name: tensor}}. INT8 and INT4 checkpoints hold int8 codes of the four linear
weights of a layer and `<name>_scale`, fp16, one a row of the rank's part.
"""

import math
import re
from pathlib import Path

import torch

from megatron_glm.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
)
from megatron_glm.checkpoint.quantization import QuantizedWeight, unpack_int4
from megatron_glm.checkpoint.record import recorded_settings
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import (
    TABLE,
    Dimensions,
    Format,
    Tensor,
    find,
    parts,
    shard_shape,
    tensors,
)
from megatron_glm.checkpoint.torch_file import StoredTensor, TorchFile, convert_rows, empty

MAX_TP = 8
SCALE = "_scale"
_FILE = re.compile(r"mp_rank_(\d{2})_model_states\.pt")
_INV_FREQ = re.compile(r"transformer\.layers\.(\d+)\.attention\.rotary_emb\.inv_freq")


def file_name(rank: int) -> str:
    """The file of a tensor-parallel rank."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def inverse_frequencies(dimensions: Dimensions) -> torch.Tensor:
    """The rotary frequencies 10000^(-2i/d) as SAT stores them in every layer: fp16 [d / 2]."""
    d = dimensions.hidden_size // dimensions.num_attention_heads
    return (1.0 / 10000 ** (torch.arange(0, d, 2, dtype=torch.float32) / d)).to(torch.float16)


class SATCheckpoint:
    """A SAT checkpoint at any tensor parallel size up to 8, read a tensor at a time.

    Opening it reads the index of every shard and checks names, shapes and types against the table;
    CheckpointError says what does not fit. `num_attention_heads` is needed only where the file
    lacks the rotary frequencies that tell it. The format holds no settings: they are those of the
    released GLM-130B unless a conversion.json beside it says otherwise.
    """

    def __init__(self, directory: str | Path, num_attention_heads: int | None = None):
        self.directory = Path(directory)
        self.iteration = self._read_latest()
        self._ranks = [self._open(path) for path in self._shard_paths()]
        self.tp_size = len(self._ranks)
        self.dimensions = self._infer_dimensions(num_attention_heads)
        self.bits = self._infer_bits()
        self.scales = {
            row.megatron: self.tp_size if row.split == 1 else 1
            for row in TABLE
            if self.bits and row.quantizable
        }
        self.dtype = self._ranks[0][find_name("embedding.word_embeddings.weight")].dtype
        self._check()
        self.settings = self._read_settings()

    def read(
        self, tensor: Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor | QuantizedWeight:
        """A whole tensor in Megatron's layout; a QuantizedWeight where it is stored as codes."""
        name = tensor.name(Format.SAT)
        if self.bits and tensor.row.quantizable:
            return self._read_quantized(tensor, memory)
        whole = empty(tensor.shape(self.dimensions), self.dtype, memory)
        ranks = self._ranks[:1] if tensor.row.split is None else self._ranks
        for rank, stored in enumerate(ranks):
            stored[name].read_into(self._parts(tensor, whole, rank))
        return whole

    def _parts(self, tensor: Tensor, whole: torch.Tensor, rank: int) -> list[torch.Tensor]:
        return parts(tensor.row, whole, Format.SAT, rank, self.tp_size)

    def _read_quantized(self, tensor: Tensor, memory: torch.Tensor | None) -> QuantizedWeight:
        name, split = tensor.name(Format.SAT), tensor.row.split
        codes = empty(tensor.shape(self.dimensions), torch.int8, memory)
        # A rank that holds part of every row has a scale for that part.
        groups = self.tp_size if split == 1 else 1
        scales = torch.empty(codes.shape[0], groups, dtype=torch.float16)
        for rank, stored in enumerate(self._ranks):
            code_parts = self._parts(tensor, codes, rank)
            if self.bits == 8:
                stored[name].read_into(code_parts)
            else:
                packed = stored[name].read().split([len(part) for part in code_parts])
                for ours, theirs in zip(code_parts, packed, strict=True):
                    convert_rows(unpack_int4, theirs, ours)
            if split == 1:
                stored[name + SCALE].read_into([scales[:, rank]])
            else:
                stored[name + SCALE].read_into(
                    [part[:, 0] for part in self._parts(tensor, scales, rank)]
                )
        return QuantizedWeight(codes, scales, self.bits)

    def _read_latest(self) -> int:
        path = self.directory / "latest"
        try:
            text = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); a SAT checkpoint names its iteration there"
            ) from None
        if not re.fullmatch(r"\d+", text):
            raise CheckpointError(f"{path}: holds {text[:40]!r} and should hold an iteration only")
        self._folder = self.directory / text
        return int(text)

    def _shard_paths(self) -> list[Path]:
        found = {}
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if match := _FILE.fullmatch(path.name):
                    found[int(match.group(1))] = path
        if not found:
            raise CheckpointError(
                f"{self._folder}: holds no mp_rank_XX_model_states.pt, though `latest` names it"
            )
        missing = set(range(max(found) + 1)) - set(found)
        if missing:
            raise CheckpointError(
                f"{self._folder}: {file_name(min(missing))} is missing, though "
                f"{file_name(max(found))} is there; fetch all shards"
            )
        if len(found) > MAX_TP:
            raise CheckpointError(f"{self._folder}: {len(found)} shards; at most {MAX_TP} are read")
        return [found[rank] for rank in sorted(found)]

    def _open(self, path: Path) -> dict[str, StoredTensor]:
        file = TorchFile(path)
        # torch.save names the folder in the archive after the file that it writes.
        if _FILE.fullmatch(file.root + ".pt") and file.root != path.stem:
            raise CheckpointError(
                f"{path}: was saved as {file.root}.pt; shards were swapped, rename them back"
            )
        module = file.content.get("module") if isinstance(file.content, dict) else None
        if not isinstance(module, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in module.items()
        ):
            raise CorruptFileError(f'{path}: is not {{"module": {{name: tensor}}}}, as SAT saves')
        return {name: file.stored(value) for name, value in module.items()}

    def _infer_dimensions(self, num_attention_heads: int | None) -> Dimensions:
        first = self._ranks[0]
        embedding = self._stored(0, find_name("embedding.word_embeddings.weight"))
        fc1_bias = self._stored(0, find_name("decoder.layers.0.mlp.linear_fc1.bias"))
        layers = [int(m.group(1)) for name in first if (m := re.search(r"\.layers\.(\d+)\.", name))]
        if len(embedding.shape) != 2 or len(fc1_bias.shape) != 1:
            raise ShapeError(f"{embedding.path}: word embeddings of shape {embedding.shape}")
        hidden_size = embedding.shape[1]
        self._check_last_shard(hidden_size)
        inv_freq = first.get("transformer.layers.0.attention.rotary_emb.inv_freq")
        if inv_freq is not None and inv_freq.shape and inv_freq.shape[0]:
            heads = hidden_size // (2 * inv_freq.shape[0])
            if num_attention_heads not in (None, heads):
                raise CheckpointError(
                    f"--num-attention-heads {num_attention_heads}: the rotary frequencies in "
                    f"{inv_freq.path} are those of {heads} heads"
                )
            num_attention_heads = heads
        if num_attention_heads is None:
            raise CheckpointError(
                f"{embedding.path}: holds no rotary frequencies, which would tell the number of "
                "attention heads; give --num-attention-heads"
            )
        return Dimensions(
            num_layers=max(layers) + 1,
            hidden_size=hidden_size,
            ffn_hidden_size=fc1_bias.shape[0] * self.tp_size // 2,
            num_attention_heads=num_attention_heads,
            vocab_size=embedding.shape[0] * self.tp_size,
        )

    def _check_last_shard(self, hidden_size: int) -> None:
        bias = self._stored(0, find_name("decoder.layers.0.self_attention.linear_qkv.bias"))
        num_shards, rest = divmod(3 * hidden_size, max(math.prod(bias.shape), 1))
        if self.tp_size < num_shards and rest == 0:
            raise CheckpointError(
                f"{self._folder}: {file_name(self.tp_size)} is missing: "
                f"{file_name(0)} is one of {num_shards} shards; fetch all of them"
            )

    def _read_settings(self) -> Settings:
        released = Settings(
            self.dimensions, rotary_angle_dtype="fp16", unified_multitask_encoding=True
        )
        recorded = recorded_settings(self.directory)
        if recorded is None:
            return released
        if recorded.dimensions != self.dimensions:
            raise CheckpointError(
                f"{self.directory}: its conversion.json is of a model of other sizes "
                f"({recorded.dimensions}, stored are {self.dimensions}); remove the wrong one"
            )
        return recorded

    def _infer_bits(self) -> int | None:
        stored = self._stored(0, find_name("decoder.layers.0.self_attention.linear_qkv.weight"))
        if stored.dtype != torch.int8:
            return None
        return 8 if stored.shape[-1] == self.dimensions.hidden_size else 4

    def _stored(self, rank: int, name: str) -> StoredTensor:
        try:
            return self._ranks[rank][name]
        except KeyError:
            raise MissingTensorError(f"{self._folder / file_name(rank)}: lacks {name}") from None

    def _check(self) -> None:
        frequencies = inverse_frequencies(self.dimensions)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for tensor in tensors(self.dimensions):
            name = tensor.name(Format.SAT)
            shape = shard_shape(tensor, self.dimensions, self.tp_size)
            if self.bits and tensor.row.quantizable:
                expected[name + SCALE] = (shape[:1], torch.float16)
                expected[name] = ((shape[0], shape[1] * self.bits // 8), torch.int8)
            else:
                expected[name] = (shape, self.dtype)
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise CorruptFileError(f"{self._folder}: holds weights of type {self.dtype}")
        for rank, stored in enumerate(self._ranks):
            for name, (shape, dtype) in expected.items():
                found = self._stored(rank, name)
                if (found.shape, found.dtype) != (shape, dtype):
                    raise ShapeError(
                        f"{found.path}: {name} is {found.dtype} {list(found.shape)}, should be "
                        f"{dtype} {list(shape)} at tensor parallel size {self.tp_size}"
                    )
            for name, found in stored.items():
                if name not in expected:
                    self._check_inverse_frequencies(name, found, frequencies)
        for tensor in tensors(self.dimensions):
            if tensor.row.split is None:
                self._check_replicas(tensor.name(Format.SAT))

    def _check_inverse_frequencies(self, name: str, found: StoredTensor, expected: torch.Tensor):
        match = _INV_FREQ.fullmatch(name)
        if not match or int(match.group(1)) >= self.dimensions.num_layers:
            raise UnknownTensorError(f"{found.path}: {name} is not a tensor of GLM in SAT's names")
        values = found.read()
        if values.shape != expected.shape or not torch.equal(values.to(torch.float16), expected):
            raise CheckpointError(
                f"{found.path}: {name} does not hold the rotary frequencies of base 10000 for "
                f"{2 * len(expected)} dimensions a head; no other base is supported"
            )

    def _check_replicas(self, name: str) -> None:
        copies = [stored[name] for stored in self._ranks]
        for copy in copies[1:]:
            known = copy.crc32 is not None and copies[0].crc32 is not None
            same = (
                copy.crc32 == copies[0].crc32
                if known
                else torch.equal(copy.read(), copies[0].read())
            )
            if not same:
                raise CheckpointError(
                    f"{name}: differs between {copies[0].path} and {copy.path}, which should hold "
                    "copies of it; the shards are of different checkpoints"
                )


def find_name(megatron_name: str) -> str:
    """SAT's name for a tensor with a Megatron name."""
    return find(Format.MEGATRON, megatron_name).name(Format.SAT)


def load_full_state_dict(directory: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a SAT checkpoint, whole, by Megatron name and in Megatron's layout."""
    checkpoint = SATCheckpoint(directory)
    result = {}
    for tensor in tensors(checkpoint.dimensions):
        value = checkpoint.read(tensor)
        if isinstance(value, QuantizedWeight):
            value = value.dequantize()
        result[tensor.name(Format.MEGATRON)] = value
    return result
