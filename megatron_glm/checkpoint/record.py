"""conversion.json: what a checkpoint was made from, by what, and the hash of every tensor."""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_glm.checkpoint.errors import CorruptFileError
from megatron_glm.checkpoint.quantization import QuantizedWeight
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.torch_file import byte_view, row_blocks

FILE_NAME = "conversion.json"
_PACKAGES = ("megatron-glm", "megatron-core", "torch", "numpy")


def digest(value: torch.Tensor | QuantizedWeight) -> str:
    """sha256 of a whole tensor's little-endian bytes in Megatron's layout, whatever the files that
    hold it look like; of the codes (one a byte) and then the scales of a quantised one."""
    sha256 = hashlib.sha256()
    parts = [value.codes, value.scales] if isinstance(value, QuantizedWeight) else [value]
    for part in parts:
        for block in row_blocks(part):
            sha256.update(byte_view(block.contiguous()))
    return sha256.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a conversion."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_record(
    folder: Path,
    source: dict[str, Any],
    target: dict[str, Any],
    settings: Settings,
    hashes: dict[str, dict[str, str]],
) -> None:
    """Writes conversion.json; `hashes` has "source" and "target" for each Megatron name."""
    content = {
        "source": source,
        "target": target,
        "settings": settings.as_flags() | {"seq_length": settings.seq_length},
        "versions": versions(),
        "tensors": hashes,
    }
    (folder / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The conversion.json of a checkpoint, None where it has none."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if all(isinstance(content[key], dict) for key in ("target", "settings", "tensors")):
            return content
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise CorruptFileError(f"{path}: damaged; remove it to go without its hashes and settings")


def is_conversion(folder: Path) -> bool:
    """Whether a folder holds what a conversion wrote, and no iterations that were trained since."""
    record = read_record(folder)
    if record is None:
        return False
    converted = f"iter_{record['target'].get('iteration') or 0:07d}"
    return all(path.name == converted for path in folder.glob("iter_*"))


def recorded_settings(folder: Path) -> Settings | None:
    """The settings in a checkpoint's conversion.json, None where it has none."""
    record = read_record(folder)
    if record is None:
        return None
    flags = record["settings"]
    return Settings.from_flags(flags, flags.get("seq_length", 2048), str(folder / FILE_NAME))


def recorded_hashes(folder: Path, iteration: int) -> dict[str, str]:
    """What the tensors of a converted checkpoint should hash to, by Megatron name; empty where it
    was not converted, or was trained on since."""
    record = read_record(folder)
    if record is None or record["target"].get("iteration", iteration) != iteration:
        return {}
    return {
        name: entry["target"]
        for name, entry in record["tensors"].items()
        if isinstance(entry, dict) and isinstance(entry.get("target"), str)
    }
