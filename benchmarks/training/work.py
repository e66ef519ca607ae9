"""What a training step has to do, in operations and bytes.

Model operations are the paper's (arXiv 2210.02414, appendix "Training"; Narayanan et al. 2021):
the products forward and twice that backward, no recomputation. With a gated FFN of 8/3 h and all
s * s pairs of a sequence, `model_flops` is its 72 b s l h^2 (1 + s / 6h + v / 12lh).
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Size:
    """A model and the batch of one step, as one device sees it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    """f; the gated FFN has three h x f matrices."""
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    num_micro_batches: int

    def __str__(self) -> str:
        return f"{self.num_layers} x {self.hidden_size}, sequence {self.seq_length}"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_size * self.seq_length

    @property
    def num_sequences(self) -> int:
        """Sequences of a step."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.num_sequences * self.seq_length


class Product(NamedTuple):
    """A linear layer: [tokens, inputs] times [inputs, outputs], so many times a micro-batch."""

    name: str
    inputs: int
    outputs: int
    count: int


def products(size: Size) -> list[Product]:
    """The linear layers of a whole model, the logits last."""
    h, f, layers = size.hidden_size, size.ffn_hidden_size, size.num_layers
    return [
        Product("query_key_value", h, 3 * h, layers),
        Product("attention_output", h, h, layers),
        Product("ffn_in", h, 2 * f, layers),
        Product("ffn_out", f, h, layers),
        Product("logits", h, size.vocab_size, 1),
    ]


def num_weights(size: Size) -> int:
    """Elements of the weights that tokens are multiplied with; the logits' are the embedding."""
    return sum(each.inputs * each.outputs * each.count for each in products(size))


def product_flops(size: Size) -> int:
    """Operations of a step's products with weights: forward, gradients of inputs and weights."""
    return 6 * num_weights(size) * size.num_tokens


def causal_pairs(size: Size) -> int:
    """(query, key) pairs of a step under a causal mask over whole sequences."""
    return size.num_sequences * size.seq_length * (size.seq_length + 1) // 2


def square_pairs(size: Size) -> int:
    """All (query, key) pairs of a step, which is what the paper's formula counts."""
    return size.num_sequences * size.seq_length**2


def model_flops(size: Size, pairs: float) -> float:
    """Operations of a step whose mask leaves `pairs` pairs, over its sequences.

    Scores and output are 2 h operations each for a pair and a layer, and twice that backward.
    """
    return product_flops(size) + 12 * size.hidden_size * size.num_layers * pairs


def attention_flops(size: Size, pairs: float) -> float:
    """What an attention kernel executes: the backward pass computes the scores again."""
    return 14 * size.hidden_size * size.num_layers * pairs


def element_wise_bytes(size: Size) -> int:
    """Bytes that a step reads and writes between its products, each tensor once, 16 bit.

    Of a layer, forward: two norms (read h, write h and the residual's h), two additions to the
    residual (3 h), rotary positions of query and key (4 h), the gate (3 f). Backward: two norms
    (read the gradients of both outputs and the input, write one: 4 h), two residuals (2 h), rotary
    positions (4 h), the gate (5 f), gradients of the biases (5 h + 2 f). Of the logits: read
    forward, read and written backward. The gradient of each weight is read and added to one in 32
    bit (10 bytes) once a micro-batch.
    """
    h, f = size.hidden_size, size.ffn_hidden_size
    forward = 2 * 3 * h + 2 * 3 * h + 4 * h + 3 * f
    backward = 2 * 4 * h + 2 * 2 * h + 4 * h + 5 * f + 5 * h + 2 * f
    a_token = 2 * (size.num_layers * (forward + backward) + 3 * size.vocab_size)
    return a_token * size.num_tokens + 10 * num_weights(size) * size.num_micro_batches


def optimizer_bytes(size: Size) -> int:
    """Bytes of AdamW with weights of 16 and 32 bit, two moments and gradients of 32 bit each.

    For each weight: zero the gradient (4) and read it for the norm (4); read gradient, weight and
    moments (16); write weight, moments and the 16 bit weight (14).
    """
    return 38 * num_weights(size)


class Rates(NamedTuple):
    """What a device reaches, measured."""

    product_flops: float
    """Operations a second of the products of `products`, forward and backward."""
    attention_flops: float
    """Operations a second of a causal attention kernel at this sequence length, both passes."""
    copy_bytes: float
    """Bytes a second that a copy reads and writes."""


def predicted_seconds(size: Size, pairs: float, rates: Rates) -> float:
    """A step at these rates with nothing overlapped and nothing in between."""
    moved = element_wise_bytes(size) + optimizer_bytes(size)
    return (
        product_flops(size) / rates.product_flops
        + attention_flops(size, pairs) / rates.attention_flops
        + moved / rates.copy_bytes
    )
