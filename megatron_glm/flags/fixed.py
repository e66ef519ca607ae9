"""Megatron's flags that can have one value only under GLM, and why: above all those that would
train something else in silence, or do nothing."""

from typing import NamedTuple

from megatron.core.transformer.enums import AttnBackend


class Rule(NamedTuple):
    """A flag, the values that it may have (the first is its default), and what to do instead."""

    dest: str
    flag: str
    allowed: tuple
    why: str


_ONE_ACTIVATION = "the MLP is GeGLU with the exact GELU; drop the flag (--glu-activation geglu)"
_ONE_POSITION = "positions are rotary by position id, over the whole head; drop the flag"
_ONE_NORM = "the norm is DeepNorm's LayerNorm with weight, bias and epsilon 1e-5; drop the flag"
_DENSE_ONLY = "GLM is a dense transformer with plain multi-head attention; drop the flag"
_FEW_BITS = "no GLM has been shown yet to train in 8 or 4 bits as well as in 16; drop the flag"
_UNTRIED = "its communication has never been tried with GLM's layer; drop the flag"
_OWN_ATTENTION = "attention is GLM's own; drop the flag, or choose by --glm-attention-backend"
_CAUSAL_GRAPH = "Megatron's CUDA graphs make an s x s causal mask; drop the flag"
_NO_CONTEXT_PARALLELISM = (
    "context parallelism is not supported yet: it assumes a causal mask; use --tensor-model-"
    "parallel-size with --sequence-parallel for long sequences"
)
_EVERY_LOGIT = (
    "it takes the logits of every token, and GLM makes those of its targets alone; drop the flag"
)
_OBJECTIVE = "the blank-infilling dataset does not read it; drop the flag"
_FILES_ALONE = "text, checkpoints and locks are read as files; mount the storage and drop the flag"
_OWN_TOKENIZER = "--tokenizer-type and --tokenizer-model say all of a GLM's; drop the flag"
_ALL_SOURCES = "the log has the validation loss of every source apart anyway; drop the flag"
_FLAGS_DECIDE = (
    "a checkpoint's settings are compared with the flags, never taken; give the flags of its run, "
    "and what differs is named"
)
_FORGETS = (
    "a run that goes on from such a checkpoint forgets what it has read; use a short "
    "--save-interval with --save-retain-interval, which deletes as well"
)
_SKIPS = "it knows the batches of GPT only; go back with --ckpt-step and another --seed instead"
_UNTRIED_HOOKS = (
    "it ends in a TypeError without Transformer Engine, and was never tried with it; drop the flag "
    "(--save-params-interval and --save-wgrads-interval work)"
)

RULES: tuple[Rule, ...] = (
    Rule("swiglu", "--swiglu", (False,), _ONE_ACTIVATION),
    Rule("quick_geglu", "--quick-geglu", (False,), _ONE_ACTIVATION),
    Rule("squared_relu", "--squared-relu", (False,), _ONE_ACTIVATION),
    Rule("openai_gelu", "--openai-gelu", (False,), _ONE_ACTIVATION),
    Rule("activation_func_clamp_value", "--activation-func-clamp-value", (None,), _ONE_ACTIVATION),
    Rule("glu_linear_offset", "--glu-linear-offset", (0.0,), _ONE_ACTIVATION),
    Rule("use_te_activation_func", "--use-te-activation-func", (False,), _ONE_ACTIVATION),
    Rule("position_embedding_type", "--position-embedding-type", ("none",),
         "GLM's rotary positions are its own, by position id; leave it at none"),
    Rule("use_rotary_position_embeddings", "--use-rotary-position-embeddings", (False,),
         _ONE_POSITION),
    Rule("rotary_interleaved", "--rotary-interleaved", (False,), _ONE_POSITION),
    Rule("rotary_percent", "--rotary-percent", (1.0,), _ONE_POSITION),
    Rule("use_rope_scaling", "--use-rope-scaling", (False,), _ONE_POSITION),
    Rule("rotary_seq_len_interpolation_factor", "--rotary-seq-len-interpolation-factor", (None,),
         _ONE_POSITION),
    Rule("no_rope_freq", "--no-rope-freq", (None,), _ONE_POSITION),
    Rule("attention_backend", "--attention-backend", (AttnBackend.auto,), _OWN_ATTENTION),
    Rule("use_flash_attn", "--use-flash-attn", (False,), _OWN_ATTENTION),
    Rule("flash_attention_version", "--flash-attention-version", (None,), _OWN_ATTENTION),
    Rule("use_kitchen_attention", "--use-kitchen-attention", (False,), _OWN_ATTENTION),
    Rule("apply_query_key_layer_scaling", "--apply-query-key-layer-scaling", (False,),
         "it keeps a softmax in fp16 from overflowing, and GLM's is in fp32; drop the flag"),
    Rule("log_max_attention_logit", "--log-max-attention-logit", (False,),
         "only Transformer Engine's attention keeps the logit; drop the flag"),
    Rule("normalization", "--normalization", ("LayerNorm",), _ONE_NORM),
    Rule("layernorm_epsilon", "--norm-epsilon", (1e-5,), _ONE_NORM),
    Rule("layernorm_zero_centered_gamma", "--apply-layernorm-1p", (False,), _ONE_NORM),
    Rule("fused_residual_rmsnorm", "--fused-residual-rmsnorm", (False,), _ONE_NORM),
    Rule("qk_layernorm", "--qk-layernorm", (False,), _ONE_NORM),
    Rule("qk_l2_norm", "--qk-l2-norm", (False,), _ONE_NORM),
    Rule("qk_clip", "--qk-clip", (False,), _DENSE_ONLY),
    Rule("fp32_residual_connection", "--fp32-residual-connection", (False,),
         "the residual is the output of the norm, in the norm's dtype; drop the flag"),
    Rule("apply_residual_connection_post_layernorm", "--apply-residual-connection-post-layernorm",
         (False,), "DeepNorm's residual is the output of the norm anyway; drop the flag"),
    Rule("add_bias_linear", "--disable-bias-linear", (True,),
         "every linear of GLM has a bias; drop the flag"),
    Rule("untie_embeddings_and_output_weights", "--untie-embeddings-and-output-weights", (False,),
         "GLM's logits use the word embedding; drop the flag"),
    Rule("embedding_init_method_std", "--embedding-init-method-std", (None,),
         "--init-method-std is the embedding's alone; give that instead. Nor would Megatron take "
         "the weight decay off the embedding"),
    Rule("init_model_with_meta_device", "--init-model-with-meta-device", (False,),
         "only Megatron's FSDP would initialise the weights then; drop the flag"),
    Rule("init_method_xavier_uniform", "--init-method-xavier-uniform", (False,),
         "DeepNorm has its own initialisation; drop the flag"),
    Rule("use_mup", "--use-mup", (False,), "DeepNorm has its own initialisation; drop the flag"),
    Rule("group_query_attention", "--group-query-attention", (False,), _DENSE_ONLY),
    Rule("num_query_groups", "--num-query-groups", (1, None), _DENSE_ONLY),
    Rule("attention_output_gate", "--attention-output-gate", (False,), _DENSE_ONLY),
    Rule("softmax_type", "--softmax-type", ("vanilla",), _DENSE_ONLY),
    Rule("window_size", "--window-size", (None,), _DENSE_ONLY),
    Rule("multi_latent_attention", "--multi-latent-attention", (False,), _DENSE_ONLY),
    Rule("experimental_attention_variant", "--experimental-attention-variant", (None,),
         _DENSE_ONLY),
    Rule("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path", (None,),
         _DENSE_ONLY),
    Rule("num_experts", "--num-experts", (None,), _DENSE_ONLY),
    Rule("mtp_num_layers", "--mtp-num-layers", (None, 0), _DENSE_ONLY),
    Rule("hybrid_layer_pattern", "--hybrid-layer-pattern", (None,), _DENSE_ONLY),
    Rule("hybrid_override_pattern", "--hybrid-override-pattern", (None,), _DENSE_ONLY),
    Rule("spec", "--spec", (None,), "the layer is GLM's; drop the flag"),
    Rule("transformer_impl", "--transformer-impl", ("local", "transformer_engine"),
         "a layer is made of Megatron's or Transformer Engine's linears; choose one of the two"),
    Rule("use_transformer_engine_op_fuser", "--use-transformer-engine-op-fuser", (False,),
         _ONE_ACTIVATION),
    Rule("tensor_parallel_num_weight_shards", "--tensor-parallel-num-weight-shards", (None,),
         "it cuts through heads, which DeepNorm's initialisation needs whole; use --tensor-model-"
         "parallel-size, and --use-distributed-optimizer for the optimizer's share"),
    Rule("tp_comm_overlap", "--tp-comm-overlap", (False,), _UNTRIED),
    Rule("symmetric_ar_type", "--symmetric-ar-type", (None,), _UNTRIED),
    Rule("delay_wgrad_compute", "--delay-wgrad-compute", (False,), _DENSE_ONLY),
    Rule("cpu_offloading_num_layers", "--cpu-offloading-num-layers", (0,),
         "it moves what Transformer Engine's own attention and norms keep, which GLM does not use; "
         "use --recompute-granularity"),
    Rule("context_parallel_size", "--context-parallel-size", (1,), _NO_CONTEXT_PARALLELISM),
    Rule("hybrid_context_parallel", "--hybrid-context-parallel", (False,),
         _NO_CONTEXT_PARALLELISM),
    Rule("cross_entropy_loss_fusion", "--cross-entropy-loss-fusion", (False,),
         "it rounds the gradients of the logits to bf16 even in fp32; drop the flag"),
    Rule("fp16_lm_cross_entropy", "--fp16-lm-cross-entropy", (False,),
         "the cross entropy is computed in fp32; drop the flag"),
    Rule("cuda_graph_impl", "--cuda-graph-impl", ("none",), _CAUSAL_GRAPH),
    Rule("enable_cuda_graph", "--enable-cuda-graph", (False,), _CAUSAL_GRAPH),
    Rule("external_cuda_graph", "--external-cuda-graph", (False,), _CAUSAL_GRAPH),
    Rule("optimizer", "--optimizer", ("adam",),
         "Megatron cannot resume SGD, nor begin it with --use-distributed-optimizer, and GLM has "
         "been tried with none of the others; leave it at adam"),
    Rule("optimizer_cuda_graph", "--optimizer-cuda-graph", (False,),
         "a step counts on the host, where a graph would not count again; drop the flag"),
    Rule("optimizer_cpu_offload", "--optimizer-cpu-offload", (False,),
         "it has never been tried with GLM; use --use-distributed-optimizer with "
         "--use-precision-aware-optimizer where memory is short"),
    Rule("fine_grained_activation_offloading", "--fine-grained-activation-offloading", (False,),
         "it cuts the layer between a residual connection and its norm, which are one; drop the "
         "flag, or use --recompute-granularity"),
    Rule("defer_embedding_wgrad_compute", "--defer-embedding-wgrad-compute", (False,),
         "it goes around the embedding gradient shrink; drop the flag"),
    Rule("use_megatron_fsdp", "--use-megatron-fsdp", (False,),
         "the embedding gradient shrink is not proven under FSDP; use --use-distributed-optimizer"),
    Rule("use_torch_fsdp2", "--use-torch-fsdp2", (False,),
         "the embedding gradient shrink is not proven under FSDP; use --use-distributed-optimizer"),
    Rule("create_all_gather_group", "--create-all-gather-group", (False,),
         "Megatron reads it only where it builds a model without a configuration; drop the flag"),
    Rule("freeze_all_layers", "--freeze-all-layers", (False,),
         "Megatron reads it only where it builds a model without a configuration, and would train "
         "all layers here; use --skip-train to evaluate"),
    Rule("check_for_spiky_loss", "--check-for-spiky-loss", (False,),
         "only pretrain_gpt.py looks for spikes; drop the flag, and watch the gradient's norm"),
    Rule("logits_save_dir", "--logits-save-dir", (None,), _EVERY_LOGIT),
    Rule("logits_load_dir", "--logits-load-dir", (None,), _EVERY_LOGIT),
    Rule("fp8", "--fp8-format", (None,), _FEW_BITS),
    Rule("fp4", "--fp4-format", (None,), _FEW_BITS),
    Rule("te_precision_config_file", "--te-precision-config-file", (None,), _FEW_BITS),
    Rule("reset_position_ids", "--reset-position-ids", (False,), _OBJECTIVE),
    Rule("eod_mask_loss", "--eod-mask-loss", (False,), _OBJECTIVE),
    Rule("fim_data", "--fim-data", (False,), _OBJECTIVE),
    Rule("sft", "--sft", (False,), _OBJECTIVE),
    Rule("dataloader_inter_document_masking", "--dataloader-inter-document-masking", (False,),
         "keep documents apart with --reset-attention-mask"),
    Rule("mock_data", "--mock-data", (False,),
         "Megatron's mock samples have no blanks; make a small corpus with tools/gather_text.py"),
    Rule("per_dataset_sequences_path", "--per-dataset-sequences-path", (None,), _OBJECTIVE),
    Rule("dataloader_type", "--dataloader-type", ("single",),
         "GLM's own order reads each sequence once, over resumptions too; leave it at single"),
    Rule("phase_transition_iterations", "--phase-transition-iterations", (None,),
         "each phase would read the first one's sequences again; give another --data-path when the "
         "run goes on, and the mix changes there"),
    Rule("dataloader_fast_cache_load", "--dataloader-fast-cache-load", (False,), _OBJECTIVE),
    Rule("dataloader_defer_npy_index_mmap", "--dataloader-defer-npy-index-mmap", (False,),
         _OBJECTIVE),
    Rule("mid_level_dataset_surplus", "--mid-level-dataset-surplus", (0.005,), _OBJECTIVE),
    Rule("allow_ambiguous_pad_tokens", "--allow-ambiguous-pad-tokens", (False,), _OBJECTIVE),
    Rule("sample_rate", "--sample-rate", (1.0,), _OBJECTIVE),
    Rule("decoder_seq_length", "--decoder-seq-length", (None,), _DENSE_ONLY),
    Rule("object_storage_cache_path", "--object-storage-cache-path", (None,), _FILES_ALONE),
    Rule("enable_msc", "--enable-msc", (False,), _FILES_ALONE),
    Rule("full_validation", "--full-validation", (False,),
         "Megatron ends in an error at the first evaluation; give --eval-iters, the batches of an "
         "evaluation"),
    Rule("multiple_validation_sets", "--multiple-validation-sets", (False,), _ALL_SOURCES),
    Rule("validation_set_names", "--validation-set-names", (None,), _ALL_SOURCES),
    Rule("vocab_size", "--vocab-size", (None,), _OWN_TOKENIZER),
    Rule("pad_vocab_size", "--no-pad-vocab-size", (True,),
         "give --padded-vocab-size, or --make-vocab-size-divisible-by 1"),
    Rule("vocab_file", "--vocab-file", (None,), _OWN_TOKENIZER),
    Rule("merge_file", "--merge-file", (None,), _OWN_TOKENIZER),
    Rule("vocab_extra_ids", "--vocab-extra-ids", (0,), _OWN_TOKENIZER),
    Rule("metadata_path", "--tokenizer-metadata", (None,), _OWN_TOKENIZER),
    Rule("special_tokens", "--tokenizer-special-tokens", (None,), _OWN_TOKENIZER),
    Rule("tokenizer_sentencepiece_legacy", "--tokenizer-sentencepiece-legacy", (False,),
         _OWN_TOKENIZER),
    Rule("tokenizer_sentencepiece_ignore_extra_whitespaces",
         "--no-tokenizer-sentencepiece-ignore-extra-whitespaces", (True,), _OWN_TOKENIZER),
    Rule("tokenizer_hf_no_use_fast", "--tokenizer-hf-no-use-fast", (False,), _OWN_TOKENIZER),
    Rule("tokenizer_hf_no_include_special_tokens", "--tokenizer-hf-no-include-special-tokens",
         (False,), _OWN_TOKENIZER),
    Rule("chat_template", "--chat-template", (None,), _OWN_TOKENIZER),
    Rule("ckpt_format", "--ckpt-format", ("torch_dist",),
         "only of that is it known whether a checkpoint is whole, and tools/ read no other; leave "
         "it at torch_dist"),
    Rule("dist_ckpt_strictness", "--dist-ckpt-strictness",
         ("assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "raise_all",
          "ignore_all"),
         "Megatron's trainer cannot take what that returns; give one that raises or logs"),
    Rule("ckpt_convert_format", "--ckpt-convert-format", (None,),
         "convert by tools/convert_checkpoint.py"),
    Rule("use_checkpoint_args", "--use-checkpoint-args", (False,), _FLAGS_DECIDE),
    Rule("use_mp_args_from_checkpoint_args", "--use-mp-args-from-checkpoint-args", (False,),
         _FLAGS_DECIDE),
    Rule("override_ckpt_iteration", "--override-ckpt-iteration", (None,),
         "the learning rate and the ledger would stay where they were; go back with --ckpt-step"),
    Rule("non_persistent_save_interval", "--non-persistent-save-interval", (None,), _FORGETS),
    Rule("non_persistent_ckpt_type", "--non-persistent-ckpt-type", (None,), _FORGETS),
    Rule("dist_ckpt_save_pre_mcore_014", "--dist-ckpt-save-pre-mcore-014", (False,),
         "Megatron 0.19 reads it nowhere; drop the flag"),
    Rule("save_activations_interval", "--save-activations-interval", (None,), _UNTRIED_HOOKS),
    Rule("save_dgrads_interval", "--save-dgrads-interval", (None,), _UNTRIED_HOOKS),
    Rule("save_tokens_per_expert_interval", "--save-tokens-per-expert-interval", (None,),
         _DENSE_ONLY),
    Rule("iterations_to_skip", "--iterations-to-skip", ([],), _SKIPS),
    Rule("result_rejected_tracker_filename", "--result-rejected-tracker-filename", (None,),
         _SKIPS),
    Rule("rerun_mode", "--rerun-mode", ("disabled", "validate_results"),
         "Megatron 0.19 knows no such mode when it comes to it; give one of the other two"),
    Rule("exit_signal_handler_for_dataloader", "--exit-signal-handler-for-dataloader", (False,),
         "Megatron 0.19 reads it nowhere; --exit-signal-handler is for the loader's processes too"),
    Rule("inprocess_restart", "--inprocess-restart", (False,),
         "only pretrain_gpt.py restarts so; use torchrun's --max-restarts with --load and --save "
         "alike, and the run goes on from its last checkpoint"),
    Rule("perform_rl_step", "--perform-rl-step", (False,), _OBJECTIVE),
    Rule("yaml_cfg", "--yaml-cfg", (None,), "GLM's settings are flags; pass them as such"),
)
