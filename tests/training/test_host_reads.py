"""Where a training step waits for the device: nowhere in the passes of a micro-batch."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_glm.training.agreement import ReadData
from megatron_glm.training.batch import TOKEN_KEYS, next_batch
from tests.host_reads import HostReads
from tests.ranks import run_ranks
from tests.training.pretraining import TINY, pretrain_on_this_rank

ROOT = Path(__file__).parents[2]
COMMON = "megatron/training/utils/common_utils.py"
TRAINING = "megatron/training/training.py"
OBJECTIVES = 3  # all, [MASK] and [gMASK]
# All of it stands in Megatron's train_step and training_log, but for the check for NaN. Only the
# first has work of the device to wait for, the backward pass; the next one waits for the weights.
WHOLE_STEP = {
    "_local_scalar_dense at megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,
    f"tensor at {COMMON}:logical_and_across_model_parallel_group": 1,
    f"_local_scalar_dense at {COMMON}:logical_and_across_model_parallel_group": 1,
    # The norm, and the learning rate for the log.
    f"tensor at {COMMON}:reduce_max_stat_across_model_parallel_group": 2,
    f"_local_scalar_dense at {COMMON}:reduce_max_stat_across_model_parallel_group": 4,
    f"_local_scalar_dense at {TRAINING}:train": 1,
}
LAST_STAGE = {
    "_local_scalar_dense at megatron_glm/training/divergence.py:check_step": 1,
    f"tensor at {TRAINING}:training_log": OBJECTIVES,
}
# What a model's ranks have read is compared when all is done.
SEVERAL_RANKS_A_MODEL = {
    "tensor at megatron_glm/training/agreement.py:compare": 1,
    "tolist at megatron_glm/training/agreement.py:compare": 1,
}
# Of each micro-batch, before it is uploaded: it lies on the host on a GPU too.
FROM_THE_LOADER = (
    "_local_scalar_dense at megatron_glm/training/batch.py:next_batch",
    "_local_scalar_dense at megatron_glm/training/batch.py:_num_places",
    "numpy at megatron_glm/training/agreement.py:add",
)
SCALED = {
    "_local_scalar_dense at megatron/core/optimizer/optimizer.py:"
    "_unscale_main_grads_and_check_for_nan": 1,
}
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


def reads_of_a_step(flags: list[str]) -> Counter:
    """Where the third step waits, from the end of one log line to that of the next."""
    from megatron.training import training

    reads, num_logs = HostReads(), 0
    log = training.training_log

    def counting_log(*args, **kwargs):
        nonlocal num_logs
        report = log(*args, **kwargs)
        num_logs += 1
        if num_logs == 2:
            reads.__enter__()
        elif num_logs == 3:
            reads.__exit__(None, None, None)
        return report

    training.training_log = counting_log
    pretrain_on_this_rank(flags)
    return reads.sites


LAYOUTS = {
    "one rank": (1, DROPOUT),
    "tp 2, pp 2": (4, [
        *DROPOUT, "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--pipeline-model-parallel-size", "2", "--recompute-granularity", "full",
        "--recompute-method", "uniform", "--recompute-num-layers", "1",
    ]),
    "dp 2, bf16, overlapped": (2, [
        "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
    ]),
    "fp16": (1, ["--fp16"]),
}  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_at_known_places_only(corpus, name):
    world_size, layout = LAYOUTS[name]
    # The fused attention of a CPU reads the samples, as it must: its loops run on the host.
    flags = [*TINY, *corpus.flags, "--glm-attention-backend", "reference", "--train-iters", "4"]
    every_rank = run_ranks(reads_of_a_step, [*flags, *layout], world_size=world_size,
                           initialize=False)
    for rank, sites in enumerate(every_rank):
        expected = WHOLE_STEP | dict.fromkeys(FROM_THE_LOADER, 2 if name.startswith("dp 2") else 4)
        if name == "tp 2, pp 2":
            expected |= SEVERAL_RANKS_A_MODEL
        if name == "fp16":
            # Its loss scaler looks for NaN, so the check does not.
            expected |= SCALED | {f"tensor at {TRAINING}:training_log": OBJECTIVES}
        elif name != "tp 2, pp 2" or rank >= 2:
            expected |= LAST_STAGE
        assert sites == expected, rank


def test_what_waits_is_seen():
    tensor = torch.arange(4.0)
    with HostReads() as reads:
        tensor[0].item(), tensor.tolist(), tensor.numpy(), tensor.cpu()
        bool(tensor.sum() > 0), tensor[tensor > 1], tensor.nonzero(), tensor.unique()
        tensor[tensor > 1] = tensor.new_ones(2)
        torch.tensor([1.0], device="cpu")
        torch.cuda.synchronize()
    names = Counter(site.partition(" ")[0] for site in reads.sites.elements())
    assert names == {
        "_local_scalar_dense": 2, "tolist": 1, "numpy": 1, "cpu": 1, "index": 1, "index_put_": 1,
        "nonzero": 1, "_unique2": 1, "tensor": 1, "synchronize": 1,
    }  # fmt: skip


def test_what_does_not_wait_is_passed_over():
    tensor = torch.arange(4.0)
    with HostReads() as reads:
        tensor[tensor > 1] = 0.0
        tensor[torch.tensor([0, 1])] = tensor.new_ones(2)
        torch.where(tensor > 1, tensor, 0.0).sum().clamp(min=1)
    assert reads.sites == {}


def test_a_batch_is_uploaded_from_pinned_memory(monkeypatch):
    """From pageable memory the host would wait for all that the device has to do."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    columns = {key: torch.ones(2, 5 if key in TOKEN_KEYS else 3) for key in
               (*TOKEN_KEYS, "context_lengths", "sample_ends", "objectives", "sources")}
    for device, expected in (("cpu", []), ("cuda", [(2, 4 * 5 + 4 * 3)])):
        next_batch(iter([columns]), micro_batch_size=2, seq_length=5, num_samples=3,
                   device=torch.device(device), read_data=ReadData())
        assert pinned == expected


STRICT = """
import torch, pretrain_glm
from megatron.training import training
get, num_steps = training.get_forward_backward_func, 0
def strict(**options):
    schedule = get(**options)
    def run(**arguments):
        global num_steps
        num_steps += 1
        # The first steps compile kernels and fill caches.
        torch.cuda.set_sync_debug_mode("error" if num_steps > 2 else "default")
        try:
            return schedule(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return run
training.get_forward_backward_func = strict
pretrain_glm.main()
print("steps:", num_steps)
"""


@pytest.mark.gpu
def test_no_pass_of_a_micro_batch_waits_for_the_gpu(corpus):
    flags = [*TINY, *corpus.flags, *DROPOUT, "--bf16", "--train-iters", "5"]
    run = subprocess.run(
        [sys.executable, "-c", STRICT, *flags], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "steps: 5" in run.stdout
