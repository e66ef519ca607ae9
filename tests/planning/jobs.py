"""Runs that several tests plan."""

from megatron_glm.planning.job import Job

GLM_130B = Job(
    num_layers=70, hidden_size=12288, ffn_hidden_size=32768, num_attention_heads=96,
    padded_vocab_size=150528, seq_length=2048, tensor_model_parallel_size=4,
    pipeline_model_parallel_size=8, decoder_first_pipeline_num_layers=8,
    decoder_last_pipeline_num_layers=8, data_parallel_size=24, micro_batch_size=1,
    global_batch_size=4224, dtype="fp16", accumulate_allreduce_grads_in_fp32=False,
    use_distributed_optimizer=True, recompute_granularity="full", recompute_method="uniform",
    recompute_num_layers=1,
)  # fmt: skip
"""GLM-130B as its paper trained it (arXiv 2210.02414, table 11)."""

SMALL = Job(
    num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8,
    padded_vocab_size=1024, seq_length=128, micro_batch_size=2, global_batch_size=16,
)  # fmt: skip
FULL = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}  # fmt: skip
NORMS_AND_GEGLU = {"glm_recompute_norms_and_geglu": True}
