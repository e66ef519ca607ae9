"""Opens Megatron's .bin/.idx files for training, and refuses damaged or foreign ones."""

import json
import logging
import os
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.utils import log_single_rank

from megatron_glm.data.config import DataError
from megatron_glm.data.indexed import check_indexed_dataset

logger = logging.getLogger(__name__)

FINGERPRINT_SUFFIX = ".tokenizer.json"
# The check reads the index whole. Hundreds of ranks that read gigabytes of it from one file system
# would wait for it longer than for anything else, so beyond this many bytes one does it for all.
_LARGE_INDEX = 1 << 28
_REBUILD = "make the data again with tools/preprocess_data.py"


def open_indexed_dataset(prefix: str, tokenizer: Any, mmap: bool = True) -> IndexedDataset:
    """Opens PREFIX.bin and PREFIX.idx.

    Raises GLMError where a file is missing or damaged, where the two do not belong together, or
    where PREFIX.tokenizer.json names another tokenizer than the one given.
    """
    if _is_first_rank() or _index_size(prefix) < _LARGE_INDEX:
        check_indexed_dataset(prefix)
    check_fingerprint(prefix, tokenizer)
    if os.path.getsize(f"{prefix}.bin") == 0:
        raise DataError(f"{prefix}.bin: all its documents are empty; {_REBUILD}")
    return IndexedDataset(prefix, multimodal=False, mmap=mmap)


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _index_size(prefix: str) -> int:
    path = f"{prefix}.idx"
    return os.path.getsize(path) if os.path.isfile(path) else 0


def check_fingerprint(prefix: str, tokenizer: Any) -> None:
    """Raises DataError where the data was made with another tokenizer.

    Data of Megatron's own tool has no fingerprint; it is let through with a warning.
    """
    path = f"{prefix}{FINGERPRINT_SUFFIX}"
    try:
        with open(path, encoding="utf-8") as stream:
            made_with = json.load(stream)
    except FileNotFoundError:
        log_single_rank(
            logger, logging.WARNING,
            f"{path} is missing: cannot tell whether {prefix}.bin was made with this tokenizer",
        )
        return
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_REBUILD}") from error
    given = json.loads(json.dumps(tokenizer.fingerprint))
    if made_with != given:
        names = sorted(set(made_with) | set(given)) if isinstance(made_with, dict) else []
        differing = ", ".join(
            f"{name} {made_with.get(name)} against {given.get(name)}"
            for name in names
            if made_with.get(name) != given.get(name)
        )
        raise DataError(
            f"{prefix}.bin was made with another tokenizer than --tokenizer-model names "
            f"({differing}); give that tokenizer, or {_REBUILD}"
        )


def check_ids(
    ids: np.ndarray,
    vocab_size: int,
    prefix: str,
    documents: np.ndarray | int,
    starts: np.ndarray | int = 0,
) -> None:
    """Raises DataError where an id is outside the vocabulary.

    ids: [n] int64, read from PREFIX.bin. documents, starts: [m], each document's index in the file,
    and where it begins in ids.
    """
    if len(ids) == 0 or (ids.max() < vocab_size and ids.min() >= 0):
        return
    place = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    owner = np.searchsorted(np.atleast_1d(starts), place, side="right") - 1
    raise DataError(
        f"{prefix}.bin: id {ids[place]} in document {np.atleast_1d(documents)[owner]} is outside "
        f"the vocabulary of {vocab_size}: damaged, or made with another tokenizer; {_REBUILD}"
    )
