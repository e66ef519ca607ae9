"""Training a tokenizer on texts."""

import io
import sys
from collections.abc import Iterable, Iterator
from itertools import batched

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_glm.data.codecs.base import SPECIAL_TOKENS
from megatron_glm.errors import GLMError

BATCH_TEXTS = 1000
# SentencePiece leaves out longer lines, so they are cut. In characters.
LINE_LENGTH = 2000


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """The tokenizer.json of a byte-level BPE with GPT-2's words, special tokens last.

    vocab_size: tokens in all, at least 256 bytes and the special ones. GLMError where the texts do
    not hold enough different words for so many.
    """
    num_learned = vocab_size - len(SPECIAL_TOKENS)
    if num_learned < 256:
        raise GLMError(
            f"--vocab-size {vocab_size}: at least {256 + len(SPECIAL_TOKENS)}, the 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_learned,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(batched(texts, BATCH_TEXTS), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    if tokenizer.get_vocab_size() < vocab_size:
        raise GLMError(
            f"--vocab-size {vocab_size}: the texts hold only enough for "
            f"{tokenizer.get_vocab_size()}; give more text or a smaller size"
        )
    return tokenizer.to_str().encode()


def train_sentence_piece(texts: Iterable[str], vocab_size: int) -> bytes:
    """The .model of a SentencePiece BPE that falls back on bytes, normalises nothing and keeps all
    white space, but reads U+2581 as a space. GLMError where SentencePiece refuses the size or the
    texts."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            control_symbols=list(SPECIAL_TOKENS),
            minloglevel=1,
        )
    except RuntimeError as error:
        raise GLMError(f"--vocab-size {vocab_size}: {error}") from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), LINE_LENGTH):
                yield line[start : start + LINE_LENGTH]
