"""pretrain_glm.py as it runs on a GPU, on one that computes nothing (tests/null_gpu.py).

test_host_reads.py names on a CPU the code that would wait. Here what a GPU alone runs is in it:
fused kernels, pinned memory, streams, NCCL, fused Adam, and who waits is counted where CUDA does.
"""

import pytest

from tests.model.attention.libraries import skip_without_library
from tests.training.pretraining import pretrain_on_null_gpu

LAYERS, MICRO_BATCHES, STEPS = 4, 4, 3
PROGRAM = """
import json
from collections import Counter
import torch, triton
import pretrain_glm
from megatron.training import training
from megatron_glm.model.attention import cudnn_graphs
from tests.null_gpu import num_waits

get, passes, kernels = training.get_forward_backward_func, [], Counter()

def count(metadata):
    kernels[metadata.get()["name"]] += 1

def graph(form, tensors):
    assert all(tensor.is_cuda for tensor in tensors.values())
    kernels["cudnn"] += 1

def counting(**options):
    schedule = get(**options)
    def run(**arguments):
        kernels.clear()
        before = num_waits()
        # Names the code that waits; the first steps compile kernels and fill caches.
        torch.cuda.set_sync_debug_mode("error" if len(passes) >= 2 else "default")
        report = schedule(**arguments)
        torch.cuda.set_sync_debug_mode("default")
        passes.append({"waits": num_waits() - before, "kernels": dict(kernels)})
        return report
    return run

triton.knobs.runtime.launch_enter_hook.add(count)
cudnn_graphs.run = graph
training.get_forward_backward_func = counting
pretrain_glm.main()
print("\\n" + json.dumps(passes))
"""
OF_LAYER = {
    "rotate_forward": 1, "rotate_backward": 1, "geglu_forward": 1, "geglu_backward": 1,
    # The norm of the layer's input, the sum and norm before the MLP, and the sum at the end.
    "forward": 3, "backward": 3,
}  # fmt: skip
OF_MODEL = {"row_statistics": 1, "overwrite_by_gradient": 1}
TRITON = {"forward": 1, "output_dot_gradient": 1, "backward_queries": 1, "backward_keys": 1}
MADE_AGAIN = {"geglu_forward": 1, "forward": 2}
RUNS = {
    "bf16, triton, dropout": (["--bf16", "--hidden-dropout", "0.1", "--attention-dropout", "0.1",
                               "--glm-attention-backend", "triton"], TRITON),
    # Two parts a pass; the outputs are merged where there is dropout, gradients always.
    "fp16, cudnn, distributed optimizer, norms and GeGLU made again": (
        ["--fp16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
         "--glm-attention-backend", "cudnn", "--glm-recompute-norms-and-geglu"],
        {"cudnn": 4, "merge": 1} | MADE_AGAIN,
    ),
    # Its kernels are none of Triton's.
    "bf16, flash": (["--bf16", "--glm-attention-backend", "flash"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_steps_run_on_a_gpu_and_no_pass_waits(corpus, name):
    flags, of_attention = RUNS[name]
    if "flash" in flags:
        skip_without_library("flash")
    passes = pretrain_on_null_gpu(PROGRAM, [*corpus.flags, *flags, "--train-iters", str(STEPS)])
    assert len(passes) == STEPS
    of_layer = {key: OF_LAYER.get(key, 0) + of_attention.get(key, 0)
                for key in OF_LAYER | of_attention}
    expected = {key: LAYERS * number for key, number in of_layer.items()} | OF_MODEL
    for of_step in passes[2:]:
        assert of_step["waits"] == 0
        assert of_step["kernels"] == {key: MICRO_BATCHES * n for key, n in expected.items()}


RESUMING = """
import json
import torch
import pretrain_glm
from megatron.training import training

zeros, train_step, found = torch.zeros, training.train_step, []

# Of what a kernel should write the step counts are asked for.
def written_zeros(*size, **options):
    made = zeros(*size, **options)
    return made.copy_(zeros(made.shape)) if made.numel() == 1 else made

def noting(forward, data, model, optimizer, *arguments, **options):
    steps = [state["step"] for state in optimizer.chained_optimizers[0].optimizer.state.values()]
    if not found:
        places = {step.data_ptr() for step in steps}
        found[:] = len(steps) == len(places), [step.item() for step in steps]
    done = train_step(forward, data, model, optimizer, *arguments, **options)
    for state in optimizer.chained_optimizers[0].optimizer.state.values():
        assert state["step"].is_cuda
        state["step"].copy_(torch.tensor(7.0))
    return done

torch.zeros, training.train_step = written_zeros, noting
try:
    pretrain_glm.main()
except SystemExit as end:
    assert not end.code
print("\\n" + json.dumps(found))
"""


@pytest.mark.parametrize(
    "flags", [["--bf16", "--use-distributed-optimizer"], ["--fp16"]], ids=" ".join
)
def test_a_resumed_run_has_its_step_counts_on_the_gpu(corpus, flags, tmp_path):
    """Each weight its own, as fused Adam wants them, at the number that was saved."""

    def run(until):
        return pretrain_on_null_gpu(RESUMING, [
            *corpus.flags, *flags, "--glm-attention-backend", "triton", "--train-iters", "4",
            "--exit-interval", until, "--save", str(tmp_path), "--load", str(tmp_path),
        ])  # fmt: skip

    assert run("1") == [True, []]
    has_own, steps = run("2")
    assert has_own and len(steps) > LAYERS and set(steps) == {7.0}
