"""What executes PTX goes the ways of threads that part, and ends at what a GPU might not notice."""

import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tests.ptx.kernel import Kernel, execute  # noqa: E402


def run(body, *tensors, threads=32, grid=(1,)):
    """Executes instructions after those that load the addresses of tensors to %rd0, %rd1, ..."""
    loads = [f"ld.param.b64 %rd{i}, [kernel_param_{i}];" for i in range(len(tensors))]
    execute("\n".join([f".reqntid {threads}", "{", *loads, body, "ret;", "}"]), grid, tensors, 128)


# To %rd9 the address of the own element of the first tensor, of 4 bytes.
OWN = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 32, %r0;
    mul.wide.u32 %rd8, %r2, 4;
    add.s64 %rd9, %rd0, %rd8;
"""


def test_threads_that_part_meet_again():
    out = torch.zeros(2, 32, dtype=torch.int32)
    # Twice the thread's number and one, by a loop; from all programs of odd numbers, 100 less.
    run(OWN + """
        mov.b32 %r3, 1;
        mov.b32 %r4, 0;
        bra.uni $L_test;
    $L_loop:
        add.s32 %r3, %r3, 2;
        add.s32 %r4, %r4, 1;
    $L_test:
        setp.lt.s32 %p1, %r4, %r0;
        @%p1 bra $L_loop;
        setp.eq.b32 %p2, %r1, 1;
        @!%p2 bra $L_end;
        sub.s32 %r3, %r3, 100;
    $L_end:
        shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
        st.global.b32 [%rd9], {%r5};
    """, out, grid=(2,))  # fmt: skip
    expected = 2 * (torch.arange(32) ^ 1) + 1
    assert torch.equal(out, torch.stack([expected, expected - 100]).int())


# A part of a warp, and a part of a program.
@pytest.mark.parametrize("first, together", [
    (5, "shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;"), (32, "bar.sync 0;"),
])  # fmt: skip
def test_threads_wait_for_each_other(first, together):
    turn_off = OWN + f"setp.lt.s32 %p1, %r0, {first};\n@%p1 bra.uni $L_other;\n"
    with pytest.raises(RuntimeError, match="threads wait for others, which have ended"):
        run(turn_off + together + "\n$L_other:\n", torch.zeros(64), threads=64)
    # What is behind in the code waits for what has gone ahead of it.
    out = torch.zeros(64)
    run(turn_off + f"""
    $L_meet:
        {together}
        st.global.b32 [%rd9], {{1}};
        ret;
    $L_other:
        bra.uni $L_meet;
    """, out, threads=64)  # fmt: skip
    assert out.view(torch.int32).eq(1).all()


@pytest.mark.parametrize("count, is_there", [(1, False), (0, True)])
def test_a_copy_is_there_once_it_is_waited_for(count, is_there):
    x, out = torch.arange(32.0), torch.zeros(32)
    body = OWN + f"""
        shl.b32 %r3, %r0, 2;
        cp.async.ca.shared.global [%r3 + 0], [%rd9 + 0], 0x4, 4;
        cp.async.commit_group;
        cp.async.wait_group {count};
        ld.shared.b32 %r5, [%r3];
        add.s64 %rd9, %rd1, %rd8;
        st.global.b32 [%rd9], {{%r5}};
    """
    if is_there:
        run(body, x, out)
        assert torch.equal(out, x)
    else:
        with pytest.raises(IndexError, match="shared memory is read before it is written"):
            run(body, x, out)


@pytest.mark.parametrize("body, message", [
    ("ld.shared.b32 %r5, [global_smem+8];", "shared memory is read before it is written"),
    ("st.shared.b32 [global_smem+128], %r0;", "beyond 128 bytes of shared memory"),
    ("ld.global.v2.b32 {%r5, %r6}, [%rd9];", "no multiple of 8"),
    ("ld.global.b32 %r5, [%rd9+4];", "outside of the tensors"),
])  # fmt: skip
def test_what_must_not_be_addressed(body, message):
    with pytest.raises(IndexError, match=message) as raised:
        run(OWN + body, torch.zeros(32))
    assert raised.value.__notes__ == [f"at {body.rstrip(';')}"]


def test_what_is_not_known_is_refused():
    for instruction in ("wgmma.fence.sync.aligned", "add.f64 %rd1, %rd2, %rd3", "add.sat.s32 %r1"):
        with pytest.raises((NotImplementedError, KeyError)):
            run(instruction + ";")


@triton.jit
def add_one(source_pointer, target_pointer, count, MASKED: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < count if MASKED else at < SIZE * tl.num_programs(0)
    tl.store(target_pointer + at, tl.load(source_pointer + at, mask=mask) + 1, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_kernel_without_its_mask_ends_outside_of_its_tensors(dtype):
    # A view of a larger tensor: no more than what is given may be read.
    whole = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, out = whole[:1000], torch.zeros(1000, dtype=dtype)
    Kernel(add_one, "H100")[(2,)](x, out, 1000, MASKED=True, SIZE=512)
    assert torch.equal(out, x + 1)
    with pytest.raises(IndexError, match="outside of the tensors"):
        Kernel(add_one, "H100")[(2,)](x, out, 1000, MASKED=False, SIZE=512)
