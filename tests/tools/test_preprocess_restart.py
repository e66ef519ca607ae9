"""Whenever tools/preprocess_data.py is killed, it goes on and ends with the same bytes."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.tools import forked
from tests.tools.faults import (
    die_at_call,
    encode_slowly,
    fill_the_disk,
    use_small_blocks,
)
from tests.tools.preprocessing import (
    TOOL,
    arguments,
    assert_only_final_files,
    documents_of,
    interrupt,
    output_files,
    read_documents,
    write_gz,
    write_inputs,
    write_jsonl,
    write_zst,
)


def test_finished_work_is_not_done_again_and_never_overwritten(tool, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert tool("--input", path).code == 0
    before = output_files(tmp_path)
    assert "already complete" in tool("--input", path).output
    result = tool("--input", path, "--append-eod")
    assert result.code == 2
    assert "exists and comes from another run" in result.output
    assert {k: v for k, v in output_files(tmp_path).items()} == before
    assert tool("--input", path, "--append-eod", "--overwrite").code == 0
    assert output_files(tmp_path) != before


def test_killed_at_every_step_of_saving_the_output_is_the_same(tool, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts[:6])
    argv = ["--input", path, "--checkpoint-seconds", 0]
    assert tool(*argv).code == 0
    expected = output_files(tmp_path)
    for number in range(1, 1000):
        for old in tmp_path.glob("out*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if tool(*argv, setup=die_at_call, setup_args=(number,)).code == 0:
            break
        assert tool(*argv).code == 0, number
        assert output_files(tmp_path) == expected, number
        assert_only_final_files(tmp_path)
    assert 20 < number < 999


@pytest.mark.timeout(600)
def test_killed_at_50_random_moments_the_output_is_the_same(tmp_path, model, texts):
    write_inputs(tmp_path / "in", texts)
    log = tmp_path / "log"
    argv = arguments(tmp_path, model, ["--input", tmp_path / "in", "--checkpoint-seconds", 0.01])
    assert forked.run(TOOL, argv, log, use_small_blocks).code == 0, log.read_text()
    expected = output_files(tmp_path)
    started = time.monotonic()
    assert forked.run(TOOL, [*argv, "--overwrite"], log, use_small_blocks).code == 0
    duration = time.monotonic() - started
    assert output_files(tmp_path) == expected
    rng = random.Random(1)
    kills = 0
    while kills < 50:
        for path in tmp_path.glob("out*"):
            path.unlink()
        # Some in a row, then the rest in peace: under load a run may not get far before its kill.
        for _ in range(6):
            process = forked.start(TOOL, argv, log, use_small_blocks)
            process.join(rng.uniform(0, duration))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
        assert forked.run(TOOL, argv, log, use_small_blocks).code == 0, log.read_text()
        assert output_files(tmp_path) == expected
        assert_only_final_files(tmp_path)


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return children.read_text().split() if children.exists() else []


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("is_deleted", [True, False])
def test_finished_work_that_is_lost_is_not_called_complete(
    tool, tmp_path, texts, suffix, is_deleted
):
    argv = ["--input", write_jsonl(tmp_path / "a.jsonl", texts)]
    assert tool(*argv).code == 0
    before = output_files(tmp_path)
    lost = tmp_path / f"out_text_document{suffix}"
    lost.unlink() if is_deleted else lost.write_bytes(before[lost.name][:-10])
    result = tool(*argv)
    assert result.code == 2
    assert f"{lost}: " in result.output and "--overwrite" in result.output
    assert tool(*argv, "--overwrite").code == 0
    assert output_files(tmp_path) == before


def test_killed_run_leaves_no_worker_behind_and_no_lock(tool, tmp_path, model, texts):
    argv = ["--input", write_jsonl(tmp_path / "a.jsonl", texts)]
    process = forked.start(TOOL, arguments(tmp_path, model, argv), tmp_path / "log", encode_slowly)
    wait_for(lambda: len(workers_of(process.pid)) == 2)
    workers = workers_of(process.pid)
    second = tool(*argv)
    assert second.code == 2
    assert "another process is writing it" in second.output
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert tool(*argv).code == 0
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_killed_worker_is_reported_and_the_run_goes_on(tool, tmp_path, model, texts):
    argv = ["--input", write_jsonl(tmp_path / "a.jsonl", texts)]
    log = tmp_path / "log"
    process = forked.start(TOOL, arguments(tmp_path, model, argv), log, encode_slowly)
    wait_for(lambda: len(workers_of(process.pid)) == 2)
    os.kill(int(workers_of(process.pid)[0]), signal.SIGKILL)
    process.join()
    assert process.exitcode == 2
    assert "a worker was killed" in log.read_text()
    assert tool(*argv).code == 0


def test_other_settings_or_inputs_do_not_go_on_with_an_interrupted_run(tool, tmp_path, texts):
    first = write_jsonl(tmp_path / "a.jsonl", texts[:100])
    second = write_jsonl(tmp_path / "b.jsonl", texts[100:])
    interrupt(tool, tmp_path, ["--input", first, second])
    result = tool("--input", first, second, "--append-eod")
    assert result.code == 2
    assert "whose append_eod was False and not True" in result.output
    assert tool("--input", first, second, "--append-eod", "--overwrite").code == 0
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    for path in tmp_path.glob("out*"):
        path.unlink()
    interrupt(tool, tmp_path, ["--input", first, second])
    state = json.loads((tmp_path / "out.partial" / "state.json").read_text())
    state["now"]["cursor"] = [1, 0, 0]
    (tmp_path / "out.partial" / "state.json").write_text(json.dumps(state))
    write_jsonl(first, texts[:99])
    result = tool("--input", first, second)
    assert result.code == 2
    assert "are others or have changed" in result.output
    result = tool("--input", first, second, "--overwrite")
    assert result.code == 0, result.output
    assert "399 documents" in result.output


@pytest.mark.parametrize("num_bytes", [3000, 20000, 40000])
def test_full_disk_is_named_and_the_run_goes_on(tool, tmp_path, texts, num_bytes):
    argv = ["--input", write_jsonl(tmp_path / "a.jsonl", texts), "--checkpoint-seconds", 0]
    assert tool(*argv).code == 0
    expected = output_files(tmp_path)
    for path in tmp_path.glob("out*"):
        path.unlink()
    result = tool(*argv, setup=fill_the_disk, setup_args=(num_bytes,))
    assert result.code == 2
    assert "cannot be written" in result.output
    assert "Traceback" not in result.output and "ignored" not in result.output
    assert tool(*argv).code == 0
    assert output_files(tmp_path) == expected


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst"])
def test_a_repaired_file_is_read_anew_and_earlier_ones_are_kept(tool, tmp_path, codec, texts, name):
    first = write_jsonl(tmp_path / "a.jsonl", texts[:100])
    whole = write_jsonl(tmp_path / "plain", texts[100:]).read_bytes()
    second = tmp_path / name
    write = write_gz if name.endswith(".gz") else write_zst
    write(second, whole)
    compressed = second.read_bytes()
    second.write_bytes(compressed[: len(compressed) * 3 // 4])
    result = tool("--input", first, second)
    assert result.code == 2
    assert f"--input {second}: cannot be read to its end" in result.output
    state = json.loads((tmp_path / "out.partial" / "state.json").read_text())
    assert state["now"]["cursor"][0] == 1
    assert state["now"]["num_documents"] >= 100
    second.write_bytes(compressed)
    assert tool("--input", first, second).code == 0
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, texts)
