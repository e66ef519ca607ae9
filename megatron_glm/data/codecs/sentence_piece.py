"""Any SentencePiece model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_glm.data.codecs.base import SPECIAL_TOKENS, Codec
from megatron_glm.errors import GLMError

# Types of a piece in SentencePiece's model file.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6


def read_model(path: Path) -> sentencepiece_model_pb2.ModelProto:
    """Parses a .model file. GLMError where it is none."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # The class of protobuf's error depends on its implementation.
        raise GLMError(f"--tokenizer-model {path}: not a SentencePiece model ({error})") from error
    if not proto.pieces:
        raise GLMError(f"--tokenizer-model {path}: a SentencePiece model without pieces")
    return proto


def load_processor(
    proto: sentencepiece_model_pb2.ModelProto, path: Path
) -> sentencepiece.SentencePieceProcessor:
    """The encoder of a parsed model. GLMError where the library refuses it."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise GLMError(f"--tokenizer-model {path}: {error}") from error


class SentencePieceCodec(Codec):
    """A .model file; the special tokens that it lacks get the ids behind its last one.

    What text survives is up to the model: its normalisation and its dummy prefix are kept.
    """

    tokenizer_type = "SentencePieceTokenizer"

    def __init__(self, path: Path) -> None:
        self.path = path
        proto = read_model(path)
        pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        for name in SPECIAL_TOKENS:
            if name in pieces:
                # A control symbol has an id, but no text ever yields it.
                proto.pieces[pieces[name]].type = CONTROL
        missing = (name for name in SPECIAL_TOKENS if name not in pieces)
        self._vocab = pieces | {name: len(proto.pieces) + i for i, name in enumerate(missing)}
        self.specials = {name: self._vocab[name] for name in SPECIAL_TOKENS}
        self.vocab_size = len(self._vocab)
        self._processor = load_processor(proto, path)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts), num_threads=1, return_type="numpy")
        return [ids.astype(self.dtype) for ids in encoded]

    def decode_text(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids)) if ids else ""

    def serialize(self) -> bytes:
        return self._processor.serialized_model_proto()

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab
