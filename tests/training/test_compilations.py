"""No step after the first two compiles anything, however many targets and samples it has.

Nor does an evaluation after the first, or a step for its sake: without gradients and dropout a
graph is another, which FlexAttention must not mistake for a reason to compile for any shape.

As on a GPU, on one that computes nothing (tests/null_gpu.py): a kernel is compiled for types,
strides and the alignment of addresses and sizes, some of which follow the data.
"""

import pytest

from tests.training.pretraining import pretrain_on_null_gpu

PROGRAM = """
import json
import torch, triton
import pretrain_glm
from megatron.training import training

compiled, steps, evaluations, shapes = [], [], [], set()
read = pretrain_glm.next_batch

def next_batch(*given, **sizes):
    batch = read(*given, **sizes)
    shapes.add((len(batch.target_rows), batch.num_places))
    return batch

def noting(function, into):
    def noted(*given, **options):
        result = function(*given, **options)
        into.append(compiled.copy())
        compiled.clear()
        return result
    return noted

def graph(arguments):
    compiled.append("a graph")

def kernel(*, src, **_):
    compiled.append(src.name)

torch._dynamo.callback.on_compile_start(graph)
triton.knobs.compilation.listener = kernel
# Megatron's own warm-up compiles what is no part of a GLM.
training.set_jit_fusion_options = lambda **_: None
pretrain_glm.next_batch = next_batch
training.train_step = noting(training.train_step, steps)
training.evaluate = noting(training.evaluate, evaluations)
pretrain_glm.main()
print("\\n" + json.dumps([steps, evaluations, sorted(shapes)]))
"""
# A sequence whose sixteenth is no multiple of four: addresses of some of its rows are unaligned.
RUNS = {
    "flex": ["--bf16", "--glm-attention-backend", "flex"],
    "triton": ["--fp16", "--glm-attention-backend", "triton", "--seq-length", "116",
               "--hidden-dropout", "0.1", "--attention-dropout", "0.1"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_steps_of_other_shapes_compile_nothing(corpus, name):
    flags = [*corpus.flags, *RUNS[name], "--train-iters", "10", "--eval-iters", "1",
             "--eval-interval", "4"]  # fmt: skip
    steps, evaluations, shapes = pretrain_on_null_gpu(PROGRAM, flags)
    assert len(steps) == 10 and steps[0] and evaluations[0]
    assert len({rows for rows, _ in shapes}) >= 6 and len({places for _, places in shapes}) >= 2
    assert steps[2:] == [[]] * 8
    # After steps 4 and 8, and at the end of the held-out texts and of those for a test.
    assert evaluations[1:] == [[]] * 3
