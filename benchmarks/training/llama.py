"""A Llama of transformers under torch.compile, as fast as its user gets it.

Scaled dot product attention, fused AdamW, weights, gradients and moments in 16 bit, gradients
accumulated over the micro-batches of a step and clipped. Under torch.compile, transformers hands
this version of torch a dense mask, which rules out its flash kernels; the option `without_mask`
makes it leave the mask out, as it does uncompiled.
"""

from itertools import cycle

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.attention import DTYPES
from benchmarks.training.turns import Task, Turns

NUM_BATCHES = 16
# Scaled dot product attention that is told it is causal.
WITHOUT_MASK = "sdpa_without_mask"
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_MASK, lambda *args, **kwargs: None)


def run(task: Task, turns: Turns) -> None:
    """Trains until the driver stops it."""
    model = build(task, turns.device)
    turns.built(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    # On a CPU, where nothing is compared, compiling takes longer than it is worth.
    compiled = torch.compile(model) if turns.device.type == "cuda" else model
    size = task.size
    shape = (NUM_BATCHES, size.micro_batch_size, size.seq_length)
    batches = cycle(torch.randint(size.vocab_size, shape, device=turns.device))
    while True:
        turns.before_step()
        for _ in range(size.num_micro_batches):
            tokens = next(batches)
            loss = compiled(input_ids=tokens, labels=tokens).loss
            (loss / size.num_micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def build(task: Task, device: torch.device) -> LlamaForCausalLM:
    """The model with the dimensions of the task, its embedding tied to the logits."""
    size = task.size
    config = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, num_hidden_layers=size.num_layers,
        intermediate_size=size.ffn_hidden_size, num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads, max_position_embeddings=size.seq_length,
        attention_dropout=task.dropout, tie_word_embeddings=True, use_cache=False,
        attn_implementation=WITHOUT_MASK if task.options.get("without_mask") else "sdpa",
        dtype=DTYPES[task.dtype],
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[task.dtype])
    try:
        with device:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)
