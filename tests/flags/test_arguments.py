"""GLM's flags: every one documented, every refusal with flag, value and cure."""

import argparse
import contextlib
import sys

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_glm.errors import FlagError
from megatron_glm.flags.arguments import (
    DEFAULTS,
    add_glm_arguments,
    fill_derived,
    pin_padded_vocab_size,
)
from megatron_glm.flags.data_paths import check_data_files
from megatron_glm.flags.fixed import RULES
from megatron_glm.flags.presets import PRESETS
from megatron_glm.flags.rules import (
    NEEDS,
    RANGES,
    REQUIRED,
    check_flags,
    check_required,
    check_start,
)

TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer.json"]
TABLE_11 = (
    "--deepnorm --glu-activation geglu --shrink-embedding-gradient-alpha 0.1 --gpt-prob 0.7 "
    "--mask-prob 0.15 --average-block-length 3 --min-gmask-ratio 0.2 --short-seq-prob 0.02 "
    "--single-span-prob 0.02 --aggregated-samples-per-sequence 4 --multitask-ratio 0.05"
).split()


@pytest.fixture(scope="module")
def parser():
    return megatron_and_glm_parser()


def megatron_and_glm_parser() -> argparse.ArgumentParser:
    return add_glm_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    """The preset is read from the command line before parsing."""
    monkeypatch.setattr("sys.argv", ["pretrain_glm.py"])


def parse(parser, *flags):
    args = parser.parse_args([*TOKENIZER, *flags])
    check_flags(args)
    return args


def test_flags_of_table_11_are_the_defaults(parser):
    given, default = parse(parser, *TABLE_11), parse(parser)
    assert vars(given) == vars(default)
    assert default.adam_beta2 == 0.95 and default.loss_scale_window == 2000
    assert default.calculate_per_token_loss and default.attention_softmax_in_fp32


def test_every_glm_flag_explains_itself(parser):
    groups = [g for g in parser._action_groups if g.title and g.title.startswith("GLM")]
    assert len(groups) == 3
    for action in (action for group in groups for action in group._group_actions):
        assert len(action.help or "") > 20, action.option_strings
        assert "default" in action.help.lower(), action.option_strings
    help_text = " ".join(parser.format_help().split())
    assert "between 0 and 1. Default: 0.7." in help_text
    assert "--short-seq-prob SHORT_SEQ_PROB Share of text sequences" in help_text
    assert "Default: 0.02." in help_text


def test_rules_and_defaults_name_flags_that_megatron_has(parser):
    flags = {option: action.dest for action in parser._actions for option in action.option_strings}
    for rule in RULES:
        assert flags.get(rule.flag) == rule.dest, rule.flag
    assert set(DEFAULTS) <= set(flags.values())
    for preset in PRESETS.values():
        assert set(preset) <= set(flags.values())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.flag)
def test_every_rule_refuses_by_name(parser, rule):
    args = parse(parser)
    setattr(args, rule.dest, "something else")
    with pytest.raises(FlagError, match=rule.flag):
        check_flags(args)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--swiglu"], "--swiglu: the MLP is GeGLU"),
        (["--position-embedding-type", "rope"], "--position-embedding-type rope"),
        (["--norm-epsilon", "1e-6"], "--norm-epsilon 1e-06"),
        (["--context-parallel-size", "2"], "--context-parallel-size 2"),
        (["--attention-backend", "flash"],
         "--attention-backend AttnBackend.flash: .* choose by --glm-attention-backend"),
        (["--embedding-init-method-std", "1"], "--embedding-init-method-std 1.0: --init-"),
        (["--freeze-all-layers"], "--freeze-all-layers: .* would train all layers"),
        (["--enable-cuda-graph"], "--enable-cuda-graph: .* s x s causal mask"),
        (["--no-bias-dropout-fusion"],
         "--no-bias-dropout-fusion: .* add --no-glm-fused-kernels or drop the flag"),
        (["--kv-channels", "15"], "--kv-channels 15: must be even"),
        (["--recompute-modules", "mlp"],
         r"--recompute-modules \['mlp'\]: does nothing without --recompute-granularity selective"),
        (["--recompute-method", "uniform"],
         "--recompute-method uniform: does nothing without --recompute-granularity full"),
        (["--lr-wsd-decay-iters", "5"], "--lr-wsd-decay-iters 5: does nothing without --lr-"),
        (["--grad-reduce-in-bf16", "--fp16"], "--grad-reduce-in-bf16: does nothing without --bf"),
        (["--recompute-modules", "layernorm", "--recompute-granularity", "selective"],
         "--recompute-modules layernorm: it frees the norm's output"),
        (["--recompute-modules", "moe", "--recompute-activations"],
         "--recompute-modules moe: GLM's layer has none; use .*, core_attn or mlp"),
        (["--recompute-granularity", "full", "--recompute-method", "uniform"],
         "--recompute-granularity full: needs --recompute-method uniform and --recompute-num-la"),
        (["--lr", "1e-4", "--lr-warmup-init", "1e-3"],
         "--lr-warmup-init 0.001: must be at most --lr 0.0001"),
        (["--decoupled-lr", "1e-5", "--min-lr", "1e-4"],
         "--decoupled-lr 1e-05: must be at least 0.0001, to which it goes"),
        (["--train-iters", "9", "--lr-decay-style", "WSD"],
         "--lr-decay-style WSD: needs --lr-wsd-decay-iters"),
        (["--glm-recompute-norms-and-geglu", "--recompute-granularity", "full"],
         "--glm-recompute-norms-and-geglu with --recompute-granularity full: .*; drop either"),
        (["--glm-recompute-norms-and-geglu", "--transformer-impl", "transformer_engine"],
         "--glm-recompute-norms-and-geglu with --transformer-impl transformer_engine"),
        (["--use-precision-aware-optimizer", "--bf16"],
         "--use-precision-aware-optimizer: is part of --use-distributed-optimizer; add that"),
        (["--use-precision-aware-optimizer", "--use-distributed-optimizer", "--log-params-norm"],
         "--log-params-norm with --use-precision-aware-optimizer: Megatron would print 0"),
        (["--optimizer", "sgd"], "--optimizer sgd: Megatron cannot resume SGD"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid"),
        (["--tp-comm-overlap"], "--tp-comm-overlap"),
        (["--hidden-size", "60", "--num-attention-heads", "12"], "--num-attention-heads 12"),
        (["--train-iters", "5", "--lr-warmup-iters", "5"], "--lr-warmup-iters 5"),
        (["--train-iters", "5", "--train-samples", "9"],
         "--train-samples 9 with --train-iters 5: give one"),
        (["--train-samples", "9", "--lr-warmup-iters", "2"],
         "--lr-warmup-iters 2 with --train-samples: .* give --lr-warmup-samples"),
        (["--train-iters", "9", "--lr-decay-samples", "2"],
         "--lr-decay-samples 2 with --train-iters: .* give --lr-decay-iters"),
        (["--fp16", "--bf16"], "--fp16 with --bf16: give one"),
        (["--save-interval", "3", "--save-retain-interval", "7"],
         "--save-retain-interval 7: must be a multiple of --save-interval 3"),
        (["--recompute-granularity", "full"], "--recompute-granularity full: needs --recompute-"),
        (["--glm-attention-backend", "fast"], "--glm-attention-backend fast"),
        (["--data-path", "a", "--valid-data-path", "b"], "--data-path with --valid-data-path"),
        (["--data-path", "a", "--data-args-path", "b"], "--data-path with --data-args-path: give"),
        (["--train-data-path", "a", "--per-split-data-args-path", "b"],
         "--train-data-path with --per-split-data-args-path: give one of both"),
        (["--async-save"], "--async-save: does nothing without --use-persistent-ckpt-worker"),
        (["--decrease-batch-size-if-needed", "--global-batch-size", "7"],
         "--decrease-batch-size-if-needed: does nothing without --rampup-batch-size"),
        (["--log-progress"], "--log-progress: does nothing without --save"),
        (["--manual-gc-interval", "5"], "--manual-gc-interval 5: does nothing without --manual-gc"),
        (["--rerun-mode", "report_stats"], "--rerun-mode report_stats: Megatron 0.19 knows no"),
    ],
)
def test_a_flag_that_trains_something_else_is_refused(parser, flags, named):
    with pytest.raises(FlagError, match=named):
        parse(parser, *flags)


def test_sensors_are_not_logged_where_nothing_reads_them(parser, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", sys)
    parse(parser, "--log-energy")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(FlagError, match="--log-energy: pynvml reads the sensors"):
        parse(parser, "--log-energy")


@pytest.mark.parametrize("flags, line", [
    (["--sequence-lenght", "5"],
     "unrecognized arguments: --sequence-lenght 5; --sequence-lenght: did you mean --seq-length?"),
    (["--micro-batchsize=4"],
     "unrecognized arguments: --micro-batchsize=4; --micro-batchsize=4: did you mean "
     "--micro-batch-size?"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--exit-signal", "10"], "argument --exit-signal: 10: must be a name like SIGUSR1"),
], ids=" ".join)  # fmt: skip
def test_what_cannot_be_parsed_is_one_line(parser, flags, line, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(parser, *flags)
    assert stop.value.code == 2
    error = f"pretrain_glm.py: error: {line}; --help lists all flags\n"
    assert capsys.readouterr().err == error


def test_ranges_and_needs_name_flags_that_megatron_has(parser):
    flags = {option: action.dest for action in parser._actions for option in action.option_strings}
    for dest in (*(need.dest for need in NEEDS), *(dest for _, _, ds in RANGES for dest in ds)):
        assert flags[f"--{dest.replace('_', '-')}"] == dest
    assert {need.other.split()[0] for need in NEEDS} <= flags.keys()


def test_only_embeddings_have_the_standard_deviation_of_a_flag(parser):
    help_text = " ".join(parser.format_help().split())
    assert "Standard deviation of the initial word embeddings." in help_text


@pytest.mark.parametrize("flags, named", [
    (["--train-iters", "0"], "--train-iters 0: must be 1 or more"),
    (["--clip-grad", "-1"], "--clip-grad -1.0: must be 0 or more"),
    (["--lr", "nan"], "--lr nan: must be 0 or more"),
    (["--hidden-dropout", "1.5"], "--hidden-dropout 1.5: must be at least 0 and less than 1"),
    (["--lr", "1e-4", "--min-lr", "1e-3"], "--min-lr 0.001: must be at most --lr 0.0001"),
    (["--split", "0,1,0"], "--split 0,1,0: must be the shares of training"),
    (["--split", "a,b,c"], "--split a,b,c: must be"),
    (["--split", "1,1,1,1"], "--split 1,1,1,1: must be"),
    (["--split", "9,-1,0"], "--split 9,-1,0: must be"),
    (["--data-path", "-1", "a", "2", "b"], "--data-path -1 a 2 b: must be prefixes alone, or"),
    (["--data-path", "0", "a"], "--data-path 0 a: must be"),
    (["--data-path", "nan", "a"], "--data-path nan a: must be"),
    (["--data-path", "1", "a", "2"], "--data-path 1 a 2: must be"),
    (["--data-path", "a", "1"], "--data-path a 1: must be"),
    (["--multitask-data-path", "-1", "a"], "--multitask-data-path -1 a: must be"),
    (["--valid-data-path", "a"], "--valid-data-path without --train-data-path"),
], ids=" ".join)  # fmt: skip
def test_a_value_out_of_its_range_is_refused(parser, flags, named):
    with pytest.raises(FlagError) as error:
        parse(parser, *flags)
    assert named in str(error.value)


@pytest.mark.parametrize("flags", [
    ["--data-path", "a"], ["--data-path", "a", "b"], ["--data-path", "0.3", "a", "2", "b"],
    ["--split", "8,1,1"], ["--split", "99.5,0.5"], ["--split", "0,1,0", "--skip-train"],
    ["--lr", "0", "--min-lr", "0"], ["--recompute-activations", "--recompute-modules", "mlp"],
    ["--decoupled-lr", "1e-5", "--decoupled-min-lr", "0", "--min-lr", "1e-4", "--lr", "1e-3"],
    ["--train-iters", "9", "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "3"],
    ["--no-bias-dropout-fusion", "--no-glm-fused-kernels"], ["--bf16", "--grad-reduce-in-bf16"],
    ["--clip-grad", "0"], ["--eval-iters", "0"],
], ids=" ".join)  # fmt: skip
def test_a_value_at_the_edge_of_its_range_passes(parser, flags):
    parse(parser, *flags)


@pytest.mark.parametrize("world_size, flags, fits", [
    (1, [], True), (8, ["--tensor-model-parallel-size", "2"], True), (8, [], False),
    (3, ["--tensor-model-parallel-size", "2"], True),
    (8, ["--pipeline-model-parallel-size", "4"], True),
    (8, ["--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2"],
     False),
    (8, ["--pipeline-model-parallel-size", "4", "--pipeline-model-parallel-layout", "E|t|t|L"],
     True),
    (8, ["--pipeline-model-parallel-size", "4", "--pipeline-model-parallel-layout", "E|(t|)*6L"],
     False),
], ids=str)  # fmt: skip
def test_a_batch_that_the_ranks_cannot_share_is_refused(parser, world_size, flags, fits):
    """A number of ranks that the layout does not fit has a refusal of its own."""
    args = parser.parse_args([*TOKENIZER, "--micro-batch-size", "2", "--global-batch-size", "24",
                              *flags])  # fmt: skip
    args.world_size = world_size
    if fits:
        check_flags(args)
        return
    with pytest.raises(FlagError, match="--global-batch-size 24: must be divisible by 16, --micro"):
        check_flags(args)


def test_a_run_without_a_step_is_refused(parser):
    parse(parser, "--global-batch-size", "8", "--train-samples", "8")
    parse(parser, "--global-batch-size", "8", "--train-samples", "7", "--rampup-batch-size", "2",
          "2", "8")  # fmt: skip
    with pytest.raises(FlagError, match="--train-samples 7: must be at least 8, the first batch"):
        parse(parser, "--global-batch-size", "8", "--train-samples", "7")


@pytest.mark.parametrize("flag, text, named", [
    ("--data-args-path", "0.3 a 0.7", "must be prefixes alone, or each behind its weight"),
    ("--data-args-path", "0.3 a 0.7 b", None),
    ("--per-split-data-args-path", "a", "must be a JSON object of train, valid, test"),
    ("--per-split-data-args-path", '{"train": ["a"]}', "must be a JSON object of train, valid"),
    ("--per-split-data-args-path", '{"train": [], "valid": "a", "test": null}', "to train on"),
    ("--per-split-data-args-path", '{"train": "a 1", "valid": [], "test": []}', "must be prefixes"),
    ("--per-split-data-args-path", '{"train": "1 a", "valid": null, "test": ["a"]}', None),
])  # fmt: skip
def test_a_file_of_prefixes_is_read_before_the_run(parser, tmp_path, flag, text, named):
    file = tmp_path / "paths"
    file.write_text(text)
    expected = pytest.raises(FlagError, match=f"{flag} {file}: .*{named}")
    with expected if named else contextlib.nullcontext():
        check_data_files(parse(parser, flag, str(file)))
    with pytest.raises(FlagError, match=f"{flag} none: cannot be read .No such file"):
        check_data_files(parse(parser, flag, "none"))


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_flag_is_named(parser, missing):
    args = parser.parse_args(TOKENIZER)
    vars(args).update(dict.fromkeys(REQUIRED, 1))
    check_required(args)
    setattr(args, missing, None)
    with pytest.raises(FlagError, match=f"--{missing.replace('_', '-')} is missing: "):
        check_required(args)


@pytest.mark.parametrize("changes, named", [
    ({}, None), ({"train_iters": None, "train_samples": 5}, None),
    ({"lr": None, "skip_train": True}, None),
    ({"seq_length": None}, "--seq-length is missing"), ({"lr": None}, "--lr is missing"),
    ({"train_iters": None}, "--train-iters is missing"),
    ({"async_save": True}, "--async-save: .*pip install nvidia-resiliency-ext; or give --async-st"),
    ({"async_save": True, "async_strategy": "mcore"}, None),
    ({"wandb_project": "a"}, "--wandb-project a: needs --wandb-save-dir, or --save"),
    ({"wandb_project": "a", "save": "b"}, None),
    ({"world_size": 8}, "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 3: must "
                        "divide the 8 ranks"),
], ids=str)  # fmt: skip
def test_a_run_that_cannot_start_is_refused(parser, monkeypatch, changes, named):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    args = parser.parse_args(TOKENIZER)
    vars(args).update(dict.fromkeys(REQUIRED, 1), train_iters=5, lr=1e-4, world_size=6,
                      tensor_model_parallel_size=2, pipeline_model_parallel_size=3)  # fmt: skip
    vars(args).update(changes)
    with pytest.raises(FlagError, match=named) if named else contextlib.nullcontext():
        check_start(args)


def test_a_preset_is_a_set_of_defaults(monkeypatch):
    flags = ["--glm-preset", "130b", "--num-layers", "7"]
    monkeypatch.setattr("sys.argv", ["pretrain_glm.py", *flags])
    args = parse(megatron_and_glm_parser(), *flags)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (7, 12288, 32768)
    assert (args.num_attention_heads, args.seq_length, args.padded_vocab_size) == (96, 2048, 150528)


def test_deepnorm_cannot_be_turned_off(parser):
    from megatron_glm.model.config import GLMArchitecture

    with pytest.raises(ValueError, match="--no-deepnorm"):
        GLMArchitecture(deepnorm=parser.parse_args(["--no-deepnorm"]).deepnorm)


def test_positions_reach_as_far_as_the_sequence(parser):
    args = parse(parser, "--seq-length", "4096")
    fill_derived(args)
    assert args.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "vocabulary, flags, expected",
    [
        (1000, [], 1024),
        (1000, ["--tensor-model-parallel-size", "8"], 1024),
        (
            150010,
            ["--make-vocab-size-divisible-by", "768", "--tensor-model-parallel-size", "8"],
            150528,
        ),
        (1000, ["--padded-vocab-size", "1001"], 1001),
    ],
)
def test_the_padded_vocabulary_does_not_depend_on_tensor_parallelism(
    parser, vocabulary, flags, expected
):
    args = parse(parser, *flags)
    pin_padded_vocab_size(args, vocabulary)
    assert args.padded_vocab_size == expected


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--padded-vocab-size", "999"], "--padded-vocab-size 999: smaller than the 1000 tokens"),
        (["--padded-vocab-size", "1001", "--tensor-model-parallel-size", "2"], "not divisible by"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(parser, flags, named):
    with pytest.raises(FlagError, match=named):
        pin_padded_vocab_size(parse(parser, *flags), 1000)
