"""Writes Hugging Face checkpoints that carry their own model and tokenizer code.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` opens one without a network.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from megatron_glm.checkpoint.compressed_tensors import linear_names, pack, quantization_config
from megatron_glm.checkpoint.errors import ShapeError
from megatron_glm.checkpoint.model_card import model_card
from megatron_glm.checkpoint.quantization import QuantizedWeight
from megatron_glm.checkpoint.reference import LAYERNORM_EPSILON, ROTARY_BASE
from megatron_glm.checkpoint.safetensors_file import SafetensorsWriter
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, tensors
from megatron_glm.checkpoint.torch_file import row_blocks
from megatron_glm.checkpoint.torch_writer import TensorSpec

MODEL_TYPE = "megatron_glm"
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_CODE = "megatron_glm.checkpoint.hugging_face_model"
_MODEL_FILES = ("configuration_megatron_glm.py", "modeling_megatron_glm.py")
_TOKENIZER_CODE = "tokenization_megatron_glm.py"
TOKENIZER_CLASS = "MegatronGLMTokenizer"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MODEL = "glm_text.model"


@dataclass(frozen=True)
class ExportedTokenizer:
    """What an export needs of a tokenizer.

    model: content of the tokenizer file; kind and options: of `MegatronGLMTokenizer`; special_ids:
    id of every special token by name.
    """

    model: bytes
    kind: str
    special_ids: dict[str, int]
    options: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Differs where anything of it does."""
        rest = json.dumps([self.kind, self.special_ids, self.options], sort_keys=True)
        return hashlib.sha256(rest.encode() + self.model).hexdigest()


@dataclass(frozen=True)
class GroupedQuantization:
    """Quantised linear weights: columns that share a scale, by Megatron's pattern of the weight;
    None for whole rows."""

    bits: int
    group_sizes: dict[str, int | None]

    @staticmethod
    def uniform(bits: int, group_size: int | None) -> "GroupedQuantization":
        """The same groups in every linear layer."""
        return GroupedQuantization(bits, dict.fromkeys(linear_names(), group_size))


class HuggingFaceWriter:
    """A Hugging Face checkpoint to be."""

    def __init__(
        self,
        settings: Settings,
        dtype: torch.dtype,
        quantization: GroupedQuantization | None = None,
        tokenizer: ExportedTokenizer | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.settings, self.dtype = settings, dtype
        self.quantization, self.tokenizer = quantization, tokenizer
        self._specs = {
            tensor: self._tensor_specs(tensor) for tensor in tensors(settings.dimensions)
        }
        self._shards = self._plan(shard_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of the result, without some 100 kB of code and configuration."""
        specs = (spec for specs in self._specs.values() for spec in specs.values())
        model = len(self.tokenizer.model) if self.tokenizer else 0
        return sum(spec.num_bytes for spec in specs) + model

    def write(self, folder: Path, read: Callable[[Tensor], torch.Tensor | QuantizedWeight]) -> None:
        """Writes everything into a folder; `read` is called once a tensor, in the order of
        `tensors`."""
        weight_map = {}
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            specs = {key: spec for tensor in shard for key, spec in self._specs[tensor].items()}
            weight_map |= dict.fromkeys(specs, name)
            with SafetensorsWriter(folder / name, specs) as file:
                for tensor in shard:
                    self._write_tensor(file, tensor, read(tensor))
        total = sum(spec.num_bytes for specs in self._specs.values() for spec in specs.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = self._config()
        _write_json(folder / "config.json", config)
        bits = self.quantization and self.quantization.bits
        kind = self.tokenizer and self.tokenizer.kind
        (folder / "README.md").write_text(model_card(config["dtype"], bits, kind))
        for name in _MODEL_FILES:
            _copy_code(name, folder)
        if self.tokenizer is not None:
            self._write_tokenizer(folder, self.tokenizer)

    def _write_tensor(
        self, file: SafetensorsWriter, tensor: Tensor, value: torch.Tensor | QuantizedWeight
    ) -> None:
        name = tensor.name(Format.HUGGING_FACE)
        if isinstance(value, QuantizedWeight):
            blocks = row_blocks(value.codes)
            file.write(f"{name}_packed", _packed(blocks, value.bits))
            file.write(f"{name}_scale", [value.scales])
            file.write(f"{name}_shape", [torch.tensor(value.codes.shape)])
        else:
            file.write(name, [value])

    def _tensor_specs(self, tensor: Tensor) -> dict[str, TensorSpec]:
        name, shape = tensor.name(Format.HUGGING_FACE), tensor.shape(self.settings.dimensions)
        if self.quantization is None or not tensor.row.quantizable:
            return {name: TensorSpec(self.dtype, shape)}
        bits = self.quantization.bits
        group_size = self.quantization.group_sizes[tensor.row.megatron]
        if shape[1] % (group_size or 1) or shape[1] * bits % 32:
            raise ShapeError(
                f"{name}: {shape[1]} columns cannot be cut into groups of {group_size}, or do not "
                f"fill 32-bit words with {bits} bits each; give another --quantization-group-size"
            )
        groups = shape[1] // group_size if group_size else 1
        return {
            f"{name}_packed": TensorSpec(torch.int32, (shape[0], shape[1] * bits // 32)),
            f"{name}_scale": TensorSpec(torch.float16, (shape[0], groups)),
            f"{name}_shape": TensorSpec(torch.int64, (2,)),
        }

    def _plan(self, shard_bytes: int) -> list[list[Tensor]]:
        shards: list[list[Tensor]] = [[]]
        size = 0
        for tensor, specs in self._specs.items():
            added = sum(spec.num_bytes for spec in specs.values())
            if shards[-1] and size + added > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += added
        return shards

    def _config(self) -> dict[str, Any]:
        d = self.settings.dimensions
        module = f"modeling_{MODEL_TYPE}."
        config = {
            "architectures": ["MegatronGLMForCausalLM"],
            "model_type": MODEL_TYPE,
            "auto_map": {
                "AutoConfig": f"configuration_{MODEL_TYPE}.MegatronGLMConfig",
                "AutoModel": module + "MegatronGLMModel",
                "AutoModelForCausalLM": module + "MegatronGLMForCausalLM",
            },
            "vocab_size": d.vocab_size,
            "hidden_size": d.hidden_size,
            "num_hidden_layers": d.num_layers,
            "num_attention_heads": d.num_attention_heads,
            "intermediate_size": d.ffn_hidden_size,
            "max_position_embeddings": self.settings.seq_length,
            "layer_norm_eps": LAYERNORM_EPSILON,
            "rotary_base": ROTARY_BASE,
            "rotary_angle_dtype": self.settings.rotary_angle_dtype,
            "unified_multitask_encoding": self.settings.unified_multitask_encoding,
            "tokenizer_fingerprint": self.settings.tokenizer_fingerprint,
            "tie_word_embeddings": True,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.tokenizer is not None:
            ids = self.tokenizer.special_ids
            config |= {
                "mask_token_ids": [ids["[MASK]"], ids["[sMASK]"]],
                "gmask_token_id": ids["[gMASK]"],
                "sop_token_id": ids["<sop>"],
                "eop_token_id": ids["<eop>"],
                "eos_token_id": [ids["<eop>"], ids["<eod>"]],
                "pad_token_id": ids["<pad>"],
            }
        if self.quantization is not None:
            names = linear_names()
            config["quantization_config"] = quantization_config(
                self.quantization.bits,
                {names[k]: size for k, size in self.quantization.group_sizes.items()},
            )
        return config

    def _write_tokenizer(self, folder: Path, tokenizer: ExportedTokenizer) -> None:
        (folder / TOKENIZER_MODEL).write_bytes(tokenizer.model)
        _copy_code(_TOKENIZER_CODE, folder)
        code = f"{Path(_TOKENIZER_CODE).stem}.{TOKENIZER_CLASS}"
        _write_json(
            folder / TOKENIZER_CONFIG,
            {
                "tokenizer_class": TOKENIZER_CLASS,
                "auto_map": {"AutoTokenizer": [code, None]},
                "kind": tokenizer.kind,
                "special_ids": tokenizer.special_ids,
                "options": tokenizer.options,
                "padding_side": "left",
                "model_max_length": self.settings.seq_length,
            },
        )
        ids = tokenizer.special_ids
        _write_json(
            folder / "generation_config.json",
            {"eos_token_id": [ids["<eop>"], ids["<eod>"]], "pad_token_id": ids["<pad>"]},
        )


def _packed(blocks: list[torch.Tensor], bits: int) -> Iterator[torch.Tensor]:
    for block in blocks:
        yield pack(block, bits)


def _copy_code(name: str, folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(resources.as_file(resources.files(_CODE) / name))
        shutil.copyfile(source, folder / name)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
