"""What the log says of operations, memory, stragglers and loss scale is GLM's: runs, one of them on
the null GPU, read back.

The counts themselves: tests/planning/test_operations.py (against torch's) and test_on_null_gpu.py.
"""

import contextlib
import io
import re
from argparse import Namespace

import pytest

from megatron_glm.training.accounting import operations_of_step
from megatron_glm.training.log_lines import read_line
from tests.null_gpu import run_on_null_gpu
from tests.ranks import run_ranks
from tests.training.pretraining import TINY, pretrain_on_this_rank

PROGRAM = """
import sys, torch, pretrain_glm
sys.modules["pynvml"] = sys  # no sensors here
for sensor in ("temperature", "power_draw", "utilization", "clock_rate"):
    setattr(torch.cuda, sensor, lambda: 0)
torch._dynamo.callback.on_compile_start(lambda arguments: print("a graph"))
from megatron.training import get_args, training
pretrain_glm.main()
print("operations of a step:", training.num_floating_point_operations(get_args(), 8))
"""


def test_operations_are_those_of_the_paper():
    """72 b s l h^2 (1 + s / 6h + v / 12lh) with f = 8 h / 3, and what GLM-130B has of them."""
    b, s, layers, h, v = 4224, 2048, 70, 12288, 150528
    args = Namespace(num_layers=layers, hidden_size=h, ffn_hidden_size=8 * h // 3, seq_length=s,
                     num_attention_heads=96, kv_channels=128, padded_vocab_size=v)  # fmt: skip
    formula = 72 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert operations_of_step(args, b) == pytest.approx(formula, rel=1e-12)


def test_a_log_says_them(corpus):
    flags = [
        *TINY, *corpus.flags, "--bf16", "--glm-attention-backend", "triton", "--train-iters", "3",
        "--log-interval", "1", "--no-kernel-conformance-check", "--log-straggler",
    ]  # fmt: skip
    done = run_on_null_gpu(PROGRAM, *flags)
    assert done.returncode == 0, done.stderr
    (operations,) = re.findall(r"operations of a step: (\d+)", done.stdout)
    # Products with the weights of 4 layers, h^2 (4 + 3 f / h) each; pairs; logits.
    assert int(operations) == 6 * 8 * 128 * (
        4 * (64**2 * 4 + 3 * 64 * 176) + 4 * 2 * 128 * 64 + 384 * 64
    )
    (forecast,) = set(re.findall(r"footprints: .* total=([\d.]+) MB on a rank of stage 0",
                                 done.stdout))  # fmt: skip
    (taken,) = re.findall(r"after 2 iterations\) .*max allocated: ([\d.]+)", done.stdout)
    assert float(taken) == pytest.approx(float(forecast), rel=0.01)
    # Of each step the rank's forward passes and the longest wait for a batch, in ms.
    times = re.findall(r"MnRtt/Rnk: ([\d.]+)ms/0 .*MxDRtt/Rnk: ([\d.]+)ms/0", done.stdout)
    assert len(times) == 3 and all(float(time) > 0 for pair in times for time in pair)
    # Megatron's warm-up of GPT's functions would compile some.
    assert "a graph" not in done.stdout


def test_a_small_loss_scale_is_logged_whole(corpus):
    """Megatron's line would say 0.0."""
    flags = [*TINY, *corpus.flags, "--fp16", "--initial-loss-scale", "0.0078125",
             "--train-iters", "3"]  # fmt: skip
    (lines,) = run_ranks(lines_of_a_run, flags, world_size=1, initialize=False)
    (line,) = filter(None, map(read_line, lines))
    assert line.loss_scale == 2**-7


def lines_of_a_run(flags: list[str]) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as log:
        pretrain_on_this_rank(flags)
    return log.getvalue().splitlines()
