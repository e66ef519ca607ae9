"""Published sizes of the GLM family, all in GLM-130B's architecture, as values of Megatron's flags.

Layers, hidden sizes and heads: GLM (arXiv 2103.10360, table 6 and its released checkpoints) and
GLM-130B (arXiv 2210.02414, table 11). The gated FFN is 8/3 of the hidden size, rounded to a
multiple of 128, which keeps the parameters of the 4x ungated one and gives 130B its 32768.
"""


def _size(num_layers: int, hidden_size: int, num_attention_heads: int, seq_length: int) -> dict:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "ffn_hidden_size": round(hidden_size * 8 / 3 / 128) * 128,
        "seq_length": seq_length,
    }


PRESETS: dict[str, dict] = {
    "tiny": _size(4, 192, 4, 256),
    "110m": _size(12, 768, 12, 512),
    "335m": _size(24, 1024, 16, 512),
    "410m": _size(30, 1024, 16, 512),
    "515m": _size(30, 1152, 18, 512),
    "2b": _size(36, 2048, 32, 1024),
    "10b": _size(48, 4096, 64, 1024),
    # icetk's 150000 tokens and the special ones, padded to a multiple of 768 and pinned: Megatron
    # would multiply the divisor by the tensor parallel size and change the shape with it.
    "130b": _size(70, 12288, 96, 2048) | {"padded_vocab_size": 150528},
}
