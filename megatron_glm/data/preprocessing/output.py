"""The output of a run while it grows, and how it survives being killed.

Everything is appended to files in PREFIX.partial. A checkpoint there (state.json, replaced
atomically) says how long each file was when a certain block was in it; a run that starts again cuts
the files back to those lengths and goes on with the next block. Blocks are appended in the order
of the inputs, so the result does not depend on workers, interruptions or speed.
"""

import io
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_glm.data.codecs import Codec
from megatron_glm.data.indexed import (
    IndexedDatasetError,
    check_indexed_dataset,
    checksums_path,
    ends_crc32_of,
    write_index,
)
from megatron_glm.data.preprocessing.blocks import Cursor
from megatron_glm.data.preprocessing.encoding import EncodedBlock
from megatron_glm.data.preprocessing.inputs import InputFile, InputHash
from megatron_glm.data.preprocessing.snapshot import Snapshot, replace_json
from megatron_glm.errors import GLMError
from megatron_glm.file_lock import take_lock

REJECTS = "rejects.jsonl"
STATE = "state.json"
LOCK = "lock"


class OtherRunError(GLMError):
    """What is under the prefix comes from a run with other settings or inputs."""


class Output:
    """Datasets PREFIX_<key>_<level>.{bin,idx} with their sidecars, one per key.

    settings: what must be equal, besides the inputs, for a run to be the same one. `now` tells how
    far the output is. Methods raise GLMError where the disk cannot be written.
    """

    def __init__(
        self,
        prefix: str,
        settings: dict,
        files: Sequence[InputFile],
        keys: Sequence[str],
        level: str,
        codec: Codec,
    ) -> None:
        self.prefix = prefix
        self.settings = settings
        self.files = files
        self.keys = tuple(keys)
        self.codec = codec
        self.targets = {key: f"{prefix}_{key}_{level}" for key in keys}
        self.summary_path = Path(f"{prefix}.preprocess.json")
        self.folder = Path(f"{prefix}.partial")
        self._streams: dict[str, io.FileIO] = {}
        self._lock: io.TextIOBase | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self.now = Snapshot()
        self._file_start = Snapshot()
        self._consumed = InputHash()
        self._finishing = False

    # -- starting and going on

    def is_complete(self) -> bool:
        """Whether this very run has already been finished; tidies up behind it.

        GLMError where its datasets are missing or damaged by now.
        """
        if not self.summary_path.exists():
            return False
        summary = json.loads(self.summary_path.read_text())
        consumed = InputHash().update_all(self.files).hexdigest()
        if summary["settings"] != self.settings or summary["inputs_sha256"] != consumed:
            return False
        try:
            for target in self.targets.values():
                check_indexed_dataset(target)
        except IndexedDatasetError as error:
            fault = str(error).partition("; ")[0]
            raise GLMError(
                f"{self.summary_path} tells of a finished run, but {fault}; make the data again "
                "with --overwrite"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def open(self, overwrite: bool = False) -> None:
        """Takes the prefix and goes on from the last checkpoint of this run if there is one.

        overwrite: delete what another or a finished run has left; else it is an OtherRunError.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._restore_or_refuse()
            except OtherRunError:
                if not overwrite:
                    raise
                self._remove_all()
            if not self._finishing:
                self._open_streams()

    def _take_lock(self) -> None:
        self._lock = (self.folder / LOCK).open("w")
        if not take_lock(self._lock):
            raise GLMError(
                f"--output-prefix {self.prefix}: another process is writing it; wait for its end"
            )

    def _restore_or_refuse(self) -> None:
        if (self.folder / STATE).exists():
            self._restore(json.loads((self.folder / STATE).read_text()))
        elif existing := self._existing_targets():
            raise OtherRunError(
                f"--output-prefix {self.prefix}: {existing[0]} exists and comes from another run; "
                "choose another prefix, or replace it with --overwrite"
            )

    def _existing_targets(self) -> list[Path]:
        paths = [Path(t + suffix) for t in self.targets.values() for suffix in (".bin", ".idx")]
        return [path for path in [self.summary_path, *paths] if path.exists()]

    def _remove_all(self) -> None:
        self._start_anew()
        for path in self._existing_targets():
            path.unlink()
        Path(f"{self.prefix}.{REJECTS}").unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def _restore(self, state: dict) -> None:
        cure = f"use the same as before, delete {self.folder}, or give --overwrite"
        for name, value in state["settings"].items():
            if self.settings.get(name) != value:
                raise OtherRunError(
                    f"{self.folder} holds an interrupted run whose {name} was {value} and not "
                    f"{self.settings.get(name)}; {cure}"
                )
        self.now = Snapshot.from_json(state["now"])
        self._file_start = Snapshot.from_json(state["file_start"])
        self._finishing = state["finishing"]
        index = self.now.cursor.file
        self._consumed.update_all(self.files[:index])
        if self._consumed.hexdigest() != state["consumed"]:
            raise OtherRunError(
                f"{self.folder} holds an interrupted run, and the files that it has already read "
                f"(--input, the first {index}) are others or have changed since; {cure}"
            )
        if self.now.cursor != Cursor(index) and self._describe(index) != state["current"]:
            # The file that was being read has been replaced: what came of it is dropped.
            self.now = self._file_start.copy()

    def _describe(self, index: int) -> list | None:
        return list(asdict(self.files[index]).values()) if index < len(self.files) else None

    def _open_streams(self) -> None:
        names = [f"{key}.{part}" for key in self.keys for part in ("bin", "lengths", "bounds")]
        for name in [*names, REJECTS]:
            length = self.now.lengths.setdefault(name, 0)
            path = self.folder / name
            if length and (not path.exists() or path.stat().st_size < length):
                raise GLMError(
                    f"{path}: shorter than the {length} bytes that {STATE} beside it tells; delete "
                    f"{self.folder} and start again"
                )
            # Unbuffered: what could not be written must not be tried again at the exit.
            self._streams[name] = path.open("r+b" if path.exists() else "wb", buffering=0)
            self._streams[name].truncate(length)
            self._streams[name].seek(length)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GLMError(
                f"--output-prefix {self.prefix}: cannot be written ({error}); give another, or "
                "make room and run the same command again, it goes on from the last checkpoint"
            ) from error

    # -- growing

    def append(self, block: EncodedBlock) -> None:
        """Adds the block that follows those added before."""
        # Interrupted within, `now` still tells of what was whole before.
        after = self.now.copy()
        with self._writing():
            for key, added in zip(self.keys, block.keys, strict=True):
                self._write(after, f"{key}.bin", added.ids)
                self._write(after, f"{key}.lengths", added.lengths)
                self._write(after, f"{key}.bounds", added.bounds)
                after.crcs[key] = zlib.crc32(added.ids, after.crcs.get(key, 0))
            for reject in block.rejects:
                line = json.dumps(reject._asdict(), ensure_ascii=False) + "\n"
                self._write(after, REJECTS, line.encode(errors="replace"))
        after.num_documents += block.num_documents
        after.num_tokens += block.num_tokens
        after.num_rejects += len(block.rejects)
        after.num_input_bytes += block.num_bytes
        after.cursor = block.next
        if read := self.files[self.now.cursor.file : block.next.file]:
            self._consumed.update_all(read)
            self._file_start = after.copy()
        self.now = after

    def _write(self, after: Snapshot, name: str, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._streams[name].write(rest) :]
        after.lengths[name] += len(data)

    def last_reject(self) -> str:
        """Where the newest reject is and why, in words; there must be one."""
        with (self.folder / REJECTS).open("rb") as rejects:
            last = json.loads(deque(rejects, maxlen=1)[0])
        return f"{last['file']} line {last['line']} ({last['reason']})"

    def checkpoint(self) -> None:
        """Makes what was added so far survive a kill, and a loss of power."""
        with self._writing():
            for stream in self._streams.values():
                os.fsync(stream.fileno())
            state = {
                "settings": self.settings,
                "consumed": self._consumed.hexdigest(),
                "current": self._describe(self.now.cursor.file),
                "now": asdict(self.now),
                "file_start": asdict(self._file_start),
                "finishing": self._finishing,
            }
            replace_json(self.folder / STATE, state)

    # -- finishing

    def finish(self) -> dict:
        """Gives the datasets their final names; returns the summary that is stored beside them."""
        self._finishing = True
        self.checkpoint()
        with self._writing():
            for stream in self._streams.values():
                stream.close()
            for key, target in self.targets.items():
                self._finish_key(key, target)
            if self.now.num_rejects:
                self._move(REJECTS, f"{self.prefix}.{REJECTS}")
            summary = {
                "settings": self.settings,
                "inputs_sha256": self._consumed.hexdigest(),
                "num_files": len(self.files),
                "num_documents": self.now.num_documents,
                "num_tokens": self.now.num_tokens,
                "num_rejects": self.now.num_rejects,
                "datasets": list(self.targets.values()),
            }
            replace_json(self.summary_path, summary)
            shutil.rmtree(self.folder)
        return summary

    def _finish_key(self, key: str, target: str) -> None:
        folder = self.folder
        lengths, bounds = folder / f"{key}.lengths", folder / f"{key}.bounds"
        index_crc = write_index(folder / f"{key}.idx", self.codec.dtype, lengths, bounds)
        replace_json(Path(f"{target}.tokenizer.json"), self.codec.fingerprint)
        data = next(p for p in (folder / f"{key}.bin", Path(f"{target}.bin")) if p.exists())
        checksums = {
            "bin_crc32": self.now.crcs.get(key, 0),
            "bin_ends_crc32": ends_crc32_of(data),
            "idx_crc32": index_crc,
        }
        replace_json(checksums_path(target), checksums)
        self._move(f"{key}.bin", f"{target}.bin")
        # The index comes last: without it there is no dataset.
        self._move(f"{key}.idx", f"{target}.idx")

    def _move(self, name: str, target: str) -> None:
        # An interrupted finish may have moved it already.
        if (self.folder / name).exists():
            os.replace(self.folder / name, target)
