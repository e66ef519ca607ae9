"""The `pack-quantized` format of compressed-tensors: INT4 and INT8 weights for transformers, vLLM.

A weight [out, in] becomes `weight_packed`, int32 [out, in * bits / 32], with code + 2^(bits-1) of
column i in bits i * `bits` and up of its row, `weight_scale` [out, groups] and `weight_shape`.
"""

from typing import Any

import torch

from megatron_glm.checkpoint.errors import CheckpointError, ShapeError
from megatron_glm.checkpoint.quantization import BIT_WIDTHS
from megatron_glm.checkpoint.table import TABLE, Format

FORMAT = "pack-quantized"


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [rows, columns] to int32 [rows, columns * bits / 32]."""
    if codes.shape[1] * bits % 32:
        raise ShapeError(f"{codes.shape[1]} columns of {bits} bits do not fill 32-bit words")
    values = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        values = values[:, 0::2] | (values[:, 1::2] << 4)
    # Little-endian, so the first byte of a word holds its lowest bits.
    return values.contiguous().view(torch.int32)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    values = packed.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 0x0F, values >> 4), dim=-1).flatten(1)
    return (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def quantization_config(bits: int, group_sizes: dict[str, int | None]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    group_sizes: columns that share a scale, None for a whole row, by Hugging Face name of the
    linear layer without its layer number ("mlp.down_proj").
    """
    groups: dict[int | None, list[str]] = {}
    for name, size in group_sizes.items():
        groups.setdefault(size, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": {
                "targets": [rf"re:.*\.{name.replace('.', chr(92) + '.')}$" for name in names],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "dynamic": False,
                    "strategy": "channel" if size is None else "group",
                    "group_size": size,
                },
            }
            for i, (size, names) in enumerate(groups.items())
        },
    }


def bits_of(config: dict[str, Any], where: str) -> int:
    """The bit width of a `quantization_config`; CheckpointError for another scheme than ours."""
    try:
        widths = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
        kinds = {
            (group["weights"]["type"], group["weights"]["symmetric"])
            for group in config["config_groups"].values()
        }
        supported = config["format"] == FORMAT and kinds == {("int", True)} and len(widths) == 1
    except (KeyError, TypeError, AttributeError):
        supported, widths = False, set()
    if not supported or not widths <= set(BIT_WIDTHS):
        raise CheckpointError(
            f"{where}: quantization_config is not symmetric {FORMAT} INT8 or INT4, the only "
            "quantised format that is read"
        )
    return widths.pop()


def linear_names() -> dict[str, str]:
    """Quantisable linear layers: Megatron's pattern of the weight to the name within a layer."""
    return {
        row.megatron: row.pattern(Format.HUGGING_FACE).split("{}.")[1].removesuffix(".weight")
        for row in TABLE
        if row.quantizable
    }
