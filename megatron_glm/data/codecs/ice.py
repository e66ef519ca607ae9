"""GLM-130B's own tokenizer: the SentencePiece file of icetk, read without the icetk package.

icetk downloads its model by itself, imports torchvision and pins an old protobuf; of all that only
`ice_text.model` is needed. Ids below `NUM_IMAGE_TOKENS` stand for images, piece i of the file has
id `NUM_IMAGE_TOKENS` + i, and GLM's special tokens follow the last piece (from 150000 on with the
published file of 130000 pieces).
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_glm.data.codecs.base import Codec
from megatron_glm.data.codecs.sentence_piece import (
    BYTE,
    CONTROL,
    USER_DEFINED,
    load_processor,
    read_model,
)
from megatron_glm.errors import GLMError

TEXT_SCHEMES = ("collapsed", "whitespace")
NUM_IMAGE_TOKENS = 20000
PAD_ID = 20003
ICE_SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>",
)  # fmt: skip
NEWLINE = "<n>"
TAB = "<|tab|>"
# The longest run of spaces first, as runs are replaced in this order.
BLANKS = {" " * n: f"<|blank_{n}|>" for n in range(80, 1, -1)}


class IceCodec(Codec):
    """icetk's `ice_text.model`, in one of two text schemes.

    "collapsed", the one of GLM-130B's pre-training: the model's normalisation turns every run of
    white space into one space. "whitespace", for code: newlines, tabs and runs of 2 to 80 spaces
    become tokens of their own, unknown characters bytes, and no space is put before the text.
    Either way the model's NFKC normalisation applies to the rest.
    """

    tokenizer_type = "IceTokenizer"

    def __init__(self, path: Path, text_scheme: str = "collapsed") -> None:
        self.path = path
        self.text_scheme = text_scheme
        proto = read_model(path)
        if not any(piece.piece == NEWLINE for piece in proto.pieces):
            raise GLMError(
                f"--tokenizer-model {path}: has no piece {NEWLINE}, so it is not the "
                "ice_text.model of icetk; use --tokenizer-type SentencePieceTokenizer"
            )
        _append(proto, ICE_SPECIAL_TOKENS, CONTROL)
        if text_scheme == "whitespace":
            _append(proto, [TAB, *reversed(BLANKS.values())], USER_DEFINED)
            _append(proto, [f"<0x{byte:02X}>" for byte in range(256)], BYTE)
            proto.trainer_spec.byte_fallback = True
        self._processor = load_processor(proto, path)
        self._vocab = {piece.piece: NUM_IMAGE_TOKENS + i for i, piece in enumerate(proto.pieces)}
        self.specials = {name: self._vocab[name] for name in ICE_SPECIAL_TOKENS}
        self.specials["<pad>"] = PAD_ID
        self.vocab_size = NUM_IMAGE_TOKENS + len(proto.pieces)
        # Behind a newline token the model neither adds a space nor drops one.
        self._guard = self._processor.encode(NEWLINE) if text_scheme == "whitespace" else []

    def _prepare(self, text: str) -> str:
        if self.text_scheme == "collapsed":
            return text
        text = text.replace("\n", NEWLINE).replace("\t", TAB)
        if "  " in text:
            for run, token in BLANKS.items():
                text = text.replace(run, token)
        return NEWLINE + text

    def encode(self, text: str) -> list[int]:
        ids = self._processor.encode(self._prepare(text))[len(self._guard) :]
        return [i + NUM_IMAGE_TOKENS for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        prepared = [self._prepare(text) for text in texts]
        encoded = self._processor.encode(prepared, num_threads=1, return_type="numpy")
        skip = len(self._guard)
        return [(ids[skip:] + NUM_IMAGE_TOKENS).astype(self.dtype) for ids in encoded]

    def decode_text(self, ids: Sequence[int]) -> str:
        parts = []
        for is_text, run in groupby(ids, lambda i: i >= NUM_IMAGE_TOKENS):
            if is_text:
                parts.append(self._decode_pieces([i - NUM_IMAGE_TOKENS for i in run]))
            else:
                parts += [f"<image_{i}>" for i in run]
        return "".join(parts)

    def _decode_pieces(self, pieces: list[int]) -> str:
        text = self._processor.decode(self._guard + pieces)
        text = text.removeprefix(NEWLINE) if self._guard else text
        text = text.replace(NEWLINE, "\n")
        if self.text_scheme == "whitespace":
            text = text.replace(TAB, "\t")
            for run, token in BLANKS.items():
                text = text.replace(token, run)
        return text

    def serialize(self) -> bytes:
        return self._processor.serialized_model_proto()

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab


def _append(proto: ModelProto, names: Sequence[str], piece_type: int) -> None:
    for name in names:
        proto.pieces.append(ModelProto.SentencePiece(piece=name, score=0.0, type=piece_type))
