"""What weights mean besides their values: the sizes and settings that travel with a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.reference import LAYERNORM_EPSILON, ROTARY_BASE
from megatron_glm.checkpoint.table import Dimensions

ANGLE_DTYPES = ("fp32", "fp16")


class Tokenizer(Protocol):
    """What is needed of `megatron_glm.data.tokenizer.GLMTokenizer` or of a codec."""

    path: str | Path
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Sizes, and what else two checkpoints must share for their weights to mean the same.

    tokenizer_fingerprint: as `GLMTokenizer.fingerprint`, None where nobody recorded it.
    seq_length: the longest sequence that the model was trained on, in tokens.
    """

    dimensions: Dimensions
    rotary_angle_dtype: str
    unified_multitask_encoding: bool
    seq_length: int = 2048
    tokenizer_fingerprint: dict[str, Any] | None = None

    def __post_init__(self):
        if self.rotary_angle_dtype not in ANGLE_DTYPES:
            raise CheckpointError(
                f"rotary_angle_dtype {self.rotary_angle_dtype!r}: must be fp32 or fp16"
            )

    def as_flags(self) -> dict[str, Any]:
        """The settings under the names of pretrain_glm.py's flags, as checkpoints hold them in
        `args.glm_settings` and training compares them."""
        d = self.dimensions
        return {
            "num_layers": d.num_layers,
            "hidden_size": d.hidden_size,
            "ffn_hidden_size": d.ffn_hidden_size,
            "num_attention_heads": d.num_attention_heads,
            "kv_channels": d.hidden_size // d.num_attention_heads,
            "padded_vocab_size": d.vocab_size,
            "layernorm_epsilon": LAYERNORM_EPSILON,
            "rotary_base": ROTARY_BASE,
            "rotary_angle_dtype": self.rotary_angle_dtype,
            "unified_multitask_encoding": self.unified_multitask_encoding,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }

    @staticmethod
    def from_flags(flags: dict[str, Any], seq_length: int, where: str) -> "Settings":
        """The inverse of `as_flags`. CheckpointError names `where` and what is missing or is not
        GLM's."""
        try:
            dimensions = Dimensions(
                num_layers=flags["num_layers"],
                hidden_size=flags["hidden_size"],
                ffn_hidden_size=flags["ffn_hidden_size"],
                num_attention_heads=flags["num_attention_heads"],
                vocab_size=flags["padded_vocab_size"],
            )
            settings = Settings(
                dimensions,
                flags["rotary_angle_dtype"],
                flags["unified_multitask_encoding"],
                seq_length,
                flags["tokenizer_fingerprint"],
            )
            expected = settings.as_flags()
            other = {
                name: flags[name]
                for name in ("kv_channels", "layernorm_epsilon", "rotary_base")
                if flags[name] != expected[name]
            }
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: the setting {error} is missing or malformed") from None
        if other:
            raise CheckpointError(
                f"{where}: {other}; a GLM of these sizes has "
                f"{ {name: expected[name] for name in other} }"
            )
        return settings

    def with_overrides(self, **values: Any) -> "Settings":
        """A copy with the given values that are not None."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})


def check_tokenizer(settings: Settings, tokenizer: Tokenizer, where: Path) -> None:
    """CheckpointError unless the ids of `tokenizer` are those that the checkpoint `where` knows."""
    known, given = settings.tokenizer_fingerprint, tokenizer.fingerprint
    if known is not None and known != given:
        differing = {name: given.get(name) for name in known if known[name] != given.get(name)}
        raise CheckpointError(
            f"--tokenizer-model {tokenizer.path}: is not what {where} was trained with, so ids "
            f"would mean other text: {differing} here, "
            f"{ {name: known[name] for name in differing} } there; give that file and its type"
        )
    num_tokens, num_rows = given["vocab_size"], settings.dimensions.vocab_size
    if num_tokens > num_rows:
        raise CheckpointError(
            f"--tokenizer-model {tokenizer.path}: has {num_tokens} tokens, more than the "
            f"{num_rows} of {where}; give the file that it was trained with"
        )
