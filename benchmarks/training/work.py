"""What a training step has to do, in operations and bytes.

Model operations are the products forward and twice that backward, no recomputation. With a gated
FFN of 8/3 h, all s * s pairs of a sequence and the logits of all tokens, `model_flops` is the
72 b s l h^2 (1 + s / 6h + v / 12lh) of Megatron's paper (arXiv 2104.04473, appendix, where the
forward pass is computed twice: 96), and to 2e-4 what GLM-130B's counts (arXiv 2210.02414,
section 2.3).
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


class Load(NamedTuple):
    """What the samples of a step leave to compute."""

    pairs: float
    """(query, key) pairs that attention sees."""
    targets: float
    """Tokens whose logits the loss needs."""


def causal_load(size: Size) -> Load:
    """Whole sequences under a causal mask, every token a target."""
    pairs = size.num_sequences * size.seq_length * (size.seq_length + 1) // 2
    return Load(pairs, size.num_tokens)


def formula_load(size: Size) -> Load:
    """All pairs and all logits, which is what the papers' formulas count."""
    return Load(size.num_sequences * size.seq_length**2, size.num_tokens)


def num_weights(size: Size) -> int:
    """Elements of the weights that tokens are multiplied with; the logits' are the embedding."""
    return sum(each.inputs * each.outputs * each.count for each in products(size))


def product_flops(size: Size, targets: float | None = None) -> float:
    """Operations of a step's products with weights: forward, gradients of inputs and weights.

    targets: tokens that logits are computed of; all by default.
    """
    logits = size.hidden_size * size.vocab_size
    layers = num_weights(size) - logits
    if targets is None:
        targets = size.num_tokens
    return 6 * (layers * size.num_tokens + logits * targets)


def model_flops(size: Size, load: Load) -> float:
    """Operations that a step needs.

    Scores and output are 2 h operations each for a pair and a layer, and twice that backward.
    """
    attention = 12 * size.hidden_size * size.num_layers * load.pairs
    return product_flops(size, load.targets) + attention


def attention_flops(size: Size, load: Load) -> float:
    """What an attention kernel executes: the backward pass computes the scores again."""
    return 14 * size.hidden_size * size.num_layers * load.pairs


def element_wise_bytes(size: Size, targets: float) -> float:
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
    layers = 2 * size.num_layers * (forward + backward) * size.num_tokens
    logits = 2 * 3 * size.vocab_size * targets
    return layers + logits + 10 * num_weights(size) * size.num_micro_batches


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


def predicted_seconds(size: Size, load: Load, rates: Rates) -> float:
    """A step at these rates with nothing overlapped and nothing in between."""
    moved = element_wise_bytes(size, load.targets) + optimizer_bytes(size)
    return (
        product_flops(size, load.targets) / rates.product_flops
        + attention_flops(size, load) / rates.attention_flops
        + moved / rates.copy_bytes
    )
