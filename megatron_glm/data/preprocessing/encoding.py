"""From a block to the ids that are appended to the output: the work of one worker process."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_glm.data.codecs import Codec
from megatron_glm.data.preprocessing.blocks import Block, Cursor, Reject
from megatron_glm.data.preprocessing.documents import Document, read_documents
from megatron_glm.data.preprocessing.sentences import split_sentences


@dataclass
class EncodedKey:
    """What a block adds to one dataset, as bytes: ids, lengths int32 [sequences] in tokens,
    sequences per document int32 [documents]."""

    ids: bytes
    lengths: bytes
    bounds: bytes


@dataclass
class EncodedBlock:
    """What a block adds to the output; `keys` in the order of the job's keys."""

    keys: list[EncodedKey]
    rejects: list[Reject]
    num_documents: int
    num_tokens: int
    next: Cursor
    num_bytes: int


class Encoder:
    """Encodes blocks; the same block gives the same bytes in every process."""

    def __init__(
        self, codec: Codec, keys: Sequence[str], append_eod: bool, split_sentences: bool
    ) -> None:
        self.codec = codec
        self.keys = tuple(keys)
        self.append_eod = append_eod
        self.split_sentences = split_sentences

    def encode(self, block: Block) -> EncodedBlock:
        """Reads, tokenizes and packs the documents of a block."""
        documents: list[Document] = []
        rejects: list[Reject] = []
        for item in read_documents(block, self.keys):
            (documents if isinstance(item, Document) else rejects).append(item)
        # One list per key of one list of sequences per document.
        encoded = [self._tokenize([d.texts[i] for d in documents]) for i in range(len(self.keys))]
        kept = []
        for i, document in enumerate(documents):
            if all(by_document[i] for by_document in encoded):
                kept.append(i)
            else:
                # A tokenizer may drop white space and control characters, and so a whole text.
                start = document.texts[0][:200]
                rejects.append(Reject(document.file, document.line, "no tokens", start))
        keys = [self._pack([by_document[i] for i in kept]) for by_document in encoded]
        num_tokens = sum(len(key.ids) for key in keys) // np.dtype(self.codec.dtype).itemsize
        return EncodedBlock(keys, rejects, len(kept), num_tokens, block.next, block.num_bytes)

    def _tokenize(self, texts: list[str]) -> list[list[np.ndarray]]:
        if not self.split_sentences:
            return [[ids] if len(ids) else [] for ids in self.codec.encode_batch(texts)]
        sentences = [split_sentences(text) for text in texts]
        ids = iter(self.codec.encode_batch([s for parts in sentences for s in parts]))
        return [[part for _ in parts if len(part := next(ids))] for parts in sentences]

    def _pack(self, documents: list[list[np.ndarray]]) -> EncodedKey:
        if self.append_eod:
            eod = np.array([self.codec.specials["<eod>"]], dtype=self.codec.dtype)
            documents = [[*parts[:-1], np.concatenate((parts[-1], eod))] for parts in documents]
        sequences = [part for parts in documents for part in parts]
        return EncodedKey(
            ids=b"".join(part.tobytes() for part in sequences),
            lengths=np.array([len(part) for part in sequences], dtype="<i4").tobytes(),
            bounds=np.array([len(parts) for parts in documents], dtype="<i4").tobytes(),
        )
