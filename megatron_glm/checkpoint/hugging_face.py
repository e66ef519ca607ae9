"""Reads the Hugging Face checkpoints that `hugging_face_writer` writes, and only those."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_glm.checkpoint.compressed_tensors import bits_of, unpack
from megatron_glm.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
)
from megatron_glm.checkpoint.hugging_face_writer import INDEX, MODEL_TYPE
from megatron_glm.checkpoint.quantization import QuantizedWeight
from megatron_glm.checkpoint.safetensors_file import read_index
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, find, tensors
from megatron_glm.checkpoint.torch_file import StoredTensor, convert_rows, empty

_FLAGS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "padded_vocab_size": "vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
    "rotary_base": "rotary_base",
    "rotary_angle_dtype": "rotary_angle_dtype",
    "unified_multitask_encoding": "unified_multitask_encoding",
    "tokenizer_fingerprint": "tokenizer_fingerprint",
}


class HuggingFaceCheckpoint:
    """A Hugging Face export of a GLM, plain or quantised, read a tensor at a time.

    CheckpointError says what is missing, damaged or not GLM's. No code in the folder is run.
    """

    iteration = 0

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        config = read_json(self.directory / "config.json")
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{self.directory}/config.json: model_type {config.get('model_type')!r}; only "
                f"{MODEL_TYPE}, the exports of this repository, can be read"
            )
        self.settings = self._read_settings(config)
        quantization = config.get("quantization_config")
        where = f"{self.directory}/config.json"
        self.bits = None if quantization is None else bits_of(quantization, where)
        self._stored = self._open()
        self.dtype = self._check()
        self.scales = self._read_scales()

    def read(
        self, tensor: Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor | QuantizedWeight:
        """A whole tensor; a QuantizedWeight where it is stored as codes."""
        name = tensor.name(Format.HUGGING_FACE)
        if self.bits is None or not tensor.row.quantizable:
            return self._stored[name].read(memory)
        codes = empty(tensor.shape(self.settings.dimensions), torch.int8, memory)
        packed = self._stored[f"{name}_packed"].read()
        convert_rows(lambda block: unpack(block, self.bits), packed, codes)
        return QuantizedWeight(codes, self._stored[f"{name}_scale"].read(), self.bits)

    def _read_scales(self) -> dict[str, int]:
        scales: dict[str, int] = {}
        for tensor in tensors(self.settings.dimensions):
            if self.bits is None or not tensor.row.quantizable:
                continue
            name = f"{tensor.name(Format.HUGGING_FACE)}_scale"
            count = self._stored[name].shape[1]
            columns = tensor.shape(self.settings.dimensions)[1]
            if columns % max(count, 1) or scales.setdefault(tensor.row.megatron, count) != count:
                raise ShapeError(
                    f"{self._stored[name].path}: {name} has {count} scales a row, which do not "
                    "divide the row or are not those of the other layers"
                )
        return scales

    def _read_settings(self, config: dict[str, Any]) -> Settings:
        flags = {ours: config[theirs] for ours, theirs in _FLAGS.items() if theirs in config}
        if "hidden_size" in flags and flags.get("num_attention_heads"):
            flags["kv_channels"] = flags["hidden_size"] // flags["num_attention_heads"]
        return Settings.from_flags(
            flags, config.get("max_position_embeddings", 2048), f"{self.directory}/config.json"
        )

    def _open(self) -> dict[str, StoredTensor]:
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CorruptFileError(f"{self.directory / INDEX}: has no weight_map")
        files: dict[str, dict[str, StoredTensor]] = {}
        stored = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CorruptFileError(
                    f"{self.directory / INDEX}: names {file!r}, which is outside its folder"
                )
            if file not in files:
                path = self.directory / file
                if not path.is_file():
                    raise CheckpointError(
                        f"{path}: is missing, though {INDEX} names it; fetch all files"
                    )
                files[file] = read_index(path)
            if name not in files[file]:
                raise MissingTensorError(
                    f"{self.directory / file}: lacks {name}, which {INDEX} places there"
                )
            stored[name] = files[file].pop(name)
        for file, left in files.items():
            if left:
                raise UnknownTensorError(f"{self.directory / file}: {min(left)} is not in {INDEX}")
        return stored

    def _check(self) -> torch.dtype:
        embedding = find(Format.MEGATRON, "embedding.word_embeddings.weight")
        name = embedding.name(Format.HUGGING_FACE)
        if name not in self._stored:
            raise MissingTensorError(f"{self.directory}: lacks {name}")
        dtype = self._stored[name].dtype
        if not dtype.is_floating_point:
            raise CorruptFileError(f"{self.directory}: {name} is {dtype}")
        unused = dict(self._stored)
        for tensor in tensors(self.settings.dimensions):
            for name, shape, wanted in self._expected(tensor, dtype):
                found = unused.pop(name, None)
                if found is None:
                    raise MissingTensorError(f"{self.directory}: lacks {name}")
                fits = len(found.shape) == len(shape) and all(
                    want in (None, have) for want, have in zip(shape, found.shape, strict=True)
                )
                if not fits or found.dtype != wanted:
                    raise ShapeError(
                        f"{found.path}: {name} is {found.dtype} {list(found.shape)}, should be "
                        f"{wanted} {list(shape)}"
                    )
        if unused:
            raise UnknownTensorError(f"{self.directory}: {min(unused)} is not a tensor of GLM")
        return dtype

    def _expected(self, tensor: Tensor, dtype: torch.dtype):
        name, shape = tensor.name(Format.HUGGING_FACE), tensor.shape(self.settings.dimensions)
        if self.bits is None or not tensor.row.quantizable:
            return [(name, shape, dtype)]
        return [
            (f"{name}_packed", (shape[0], shape[1] * self.bits // 32), torch.int32),
            (f"{name}_scale", (shape[0], None), torch.float16),
            (f"{name}_shape", (2,), torch.int64),
        ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError where there is no file, CorruptFileError for anything else."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except ValueError as error:
        raise CorruptFileError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return content
