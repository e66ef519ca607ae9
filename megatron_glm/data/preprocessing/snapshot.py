"""How far the output of a run is, as a checkpoint of it is stored."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_glm.data.preprocessing.blocks import Cursor


@dataclass
class Snapshot:
    """The output up to a cursor: bytes of each file, CRC-32 of each key's ids, totals."""

    cursor: Cursor = Cursor()
    lengths: dict[str, int] = field(default_factory=dict)
    crcs: dict[str, int] = field(default_factory=dict)
    num_documents: int = 0
    num_tokens: int = 0
    num_rejects: int = 0
    num_input_bytes: int = 0

    def copy(self) -> "Snapshot":
        """An independent copy."""
        return Snapshot.from_json(asdict(self))

    @staticmethod
    def from_json(values: dict) -> "Snapshot":
        """The snapshot of which `dataclasses.asdict` gave these values, before or after JSON."""
        values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
        return Snapshot(**values | {"cursor": Cursor(*values["cursor"])})


def replace_json(path: Path, value: dict) -> None:
    """Writes a file so that a kill or a loss of power leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
