"""Steps of decode as CUDA graphs on a GPU that computes nothing, and on one that is there. What
replays compute: interpreted_step_graphs.py."""

import pytest

pytest.importorskip("triton")
from benchmarks import decode  # noqa: E402
from tests.null_gpu import run_on_null_gpu  # noqa: E402

FORMS = ["bf16", "int8", "int4-fp16"]
SIZES = [
    "--device", "cuda", "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "176",
    "--num-attention-heads", "4", "--vocab-size", "256", "--context", "64",
]  # fmt: skip
# Kernels of a layer: two norms, four products, two of attention, GELU, a product with it, two sums;
# and of a step: its inputs' copy, embedding, rotation, the last norm, logits, these in fp32.
LAUNCHES_OF_A_STEP = 2 * 12 + 6

PROGRAM = """
import sys, torch
from benchmarks import decode
from megatron_glm.inference import search
from megatron_glm.inference.blanks import Blank, Mask, Prompt
from megatron_glm.inference.generation import Filler
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.search import SearchConfig
from megatron_glm.inference.service import Service
from tests.inference.test_service import Waiter
from tests.null_gpu import count_of

COUNTS = ("launches", "graph_launches", "nodes_launched")

class Codec:
    class tokenizer:
        sop, eop, eod = 250, 251, 252

def step(engine):
    before = [count_of(name) for name in COUNTS]
    rows = engine.cache.num_rows
    logits = engine.decode([1] * rows, [9] * rows)
    assert logits.shape == (rows, 256) and logits.dtype == torch.float32
    return [count_of(name) - then for name, then in zip(COUNTS, before)]

def steps(engine):
    engine.prefill([[1] * 5, [2] * 7, [3] * 9])
    print(*(step(engine) for _ in range(4)))
    # Two beams more for four rows, and back.
    for rows in ([2, 1, 0, 0, 1], [4, 0, 3]):
        engine.cache.select(rows)
        print(*(step(engine) for _ in range(3)))
    while max(engine.cache.lengths) < engine.cache.STEP:
        step(engine)
    # The cache moves.
    print(*(step(engine) for _ in range(2)))

def grow(engine):
    engine.prefill([[1] * 5])
    # Of 64 tokens a part: by numbers of parts that Triton could take for different kernels.
    for length in (6, 7, *range(engine.cache.STEP, 6 * engine.cache.STEP, engine.cache.STEP)):
        engine.cache.lengths = [length]
        step(engine)
    assert engine.graphs.enabled

def serve(engine):
    prompt = Prompt(("", ""), (1, 2, 3), (Blank(Mask.GENERATION, 2, 3, 1),))
    service = Service(Filler(engine, Codec), Layout(), max_rows=4, max_waiting=9)
    # Not by beams, which would follow leftovers for the numbers of rows.
    search.sample = lambda *_: 7
    waiters = [Waiter() for _ in range(6)]
    for number, waiter in enumerate(waiters):
        service.submit(prompt, SearchConfig(max_new_tokens=5 + number), waiter)
    before = count_of("graph_launches")
    service.start()
    assert [len(waiter.result()) for waiter in waiters] == [5, 6, 7, 8, 9, 10]
    service.stop()
    assert engine.graphs.enabled and count_of("graph_launches") - before > 10

def spoil(engine):
    decode_step = engine._step

    def reading(inputs):
        torch.empty(2**30, dtype=torch.uint8, device="cuda")
        inputs.sum().item()
        return decode_step(inputs)

    engine._step = reading
    engine.prefill([[1] * 5] * 20)
    reserved = torch.cuda.memory_reserved()
    assert [step(engine)[1] for _ in range(3)] == [0, 0, 0] and not engine.graphs.enabled
    # What a capture and a step of 1 GiB have left can be given back.
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved + 2**29
    # Where all else is.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()

count, *flags = sys.argv[1:]
for form in flags[:int(count)]:
    engine = decode.make_engine(decode.parse(flags[int(count):]), form)
    for action in (steps, grow, serve, spoil):
        engine.cache = engine.new_cache()
        action(engine)
"""


def test_a_step_is_one_launch_whatever_joins_leaves_or_moves():
    done = run_on_null_gpu(PROGRAM, str(len(FORMS)), *FORMS, *SIZES, "--steps", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    run, replay = [LAUNCHES_OF_A_STEP, 0, 0], [1, 1, LAUNCHES_OF_A_STEP - 1]
    # A capture launches two kernels more, for random numbers that nobody draws.
    capture = [3, *replay[1:]]
    # Another number of rows takes new memory, zeros and a copy, and later what is there.
    moving_capture = [5, *replay[1:]]
    assert done.stdout.splitlines() == len(FORMS) * [
        f"{run} {capture} {replay} {replay}", f"{run} {capture} {replay}",
        f"{capture} {replay} {replay}", f"{moving_capture} {replay}",
    ]  # fmt: skip
    # Of each that could not be captured.
    warnings = [line for line in done.stderr.splitlines() if "CUDA graphs" in line]
    assert len(warnings) == len(FORMS)
    assert all("not permitted when stream is capturing" in line for line in warnings)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp16", "bf16", "int8", "int4", "int4-fp16"])
def test_replays_are_steps_on_a_gpu(form):
    arguments = decode.parse([*SIZES, "--steps", "80"])
    engines = [decode.make_engine(arguments, form) for _ in range(2)]
    engines[1].graphs.enabled = False
    for engine in engines:
        engine.prefill([[1] * 5, [2] * 7, [3] * 64])
    for step in range(60):
        found, expected = (engine.decode([7, step, 9], [step] * 3) for engine in engines)
        assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()
        if step % 10 == 9:
            for engine in engines:
                engine.cache.select([2, 0, 0])
    assert engines[0].graphs.enabled
