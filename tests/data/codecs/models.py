"""Small tokenizers, trained on the sources of the standard library."""

import io
import sysconfig
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CHINESE = (
    "今天天气很好，我们去公园散步。机器学习是人工智能的一个分支！"
    "你吃饭了吗？模型、数据与代码。"
)


def python_sources(count):
    """The text of some files of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text("utf-8") for path in sorted(folder.glob("*.py"))[:count]]


def bpe(words=None, vocab_size=600, specials=()):
    """A byte-level BPE; `words` is the expression of its words, GPT-2's by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*python_sources(12), CHINESE], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return tokenizer


def sentence_piece(**options):
    """The bytes of a SentencePiece model."""
    model = io.BytesIO()
    lines = [line for text in python_sources(6) for line in text.splitlines()] + [CHINESE] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, vocab_size=700,
        hard_vocab_limit=False, **options,
    )
    return model.getvalue()


def ice_text_model():
    """A model with the conventions of icetk's ice_text.model: its first pieces, NFKC."""
    return sentence_piece(
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc", model_type="unigram", character_coverage=1.0,
    )
