"""A Llama that is told to leave its mask out computes the same, by the causal kernel."""

from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.training import llama
from benchmarks.training.turns import Task
from benchmarks.training.work import Size

SIZE = Size(1, 64, 4, 160, 96, 32, 2, 1)


def test_leaving_the_mask_out_changes_the_kernel_alone():
    tokens = torch.randint(SIZE.vocab_size, (2, SIZE.seq_length))
    with_mask = llama.build(Task("", SIZE, "fp32"), torch.device("cpu"))
    without = llama.build(
        Task("", SIZE, "fp32", options={"without_mask": True}), torch.device("cpu")
    )
    without.load_state_dict(with_mask.state_dict())
    expected = with_mask(input_ids=tokens, labels=tokens).loss
    attend = F.scaled_dot_product_attention
    # As it is while torch.compile traces.
    with (
        mock.patch("transformers.masking_utils.is_torchdynamo_exporting", return_value=True),
        mock.patch.object(F, "scaled_dot_product_attention", wraps=attend) as called,
    ):
        dense = with_mask(input_ids=tokens, labels=tokens).loss
        assert called.call_args.kwargs["attn_mask"] is not None
        actual = without(input_ids=tokens, labels=tokens).loss
        assert called.call_args.kwargs["attn_mask"] is None
        assert called.call_args.kwargs["is_causal"]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dense, expected)
