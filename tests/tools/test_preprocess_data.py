"""From files of text to indexed datasets: complete, in order, restartable."""

import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_glm.data.codecs import build_codec
from megatron_glm.data.indexed import check_indexed_dataset
from tests.data.codecs.models import bpe, python_sources
from tests.tools import forked
from tests.tools.faults import (
    die_at_call,
    encode_slowly,
    fill_the_disk,
    use_small_blocks,
    use_small_documents,
)

TOOL = "tools.preprocess_data"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    bpe().save(str(path))
    return path


@pytest.fixture(scope="module")
def codec(model):
    return build_codec("HuggingFaceTokenizer", model)


@pytest.fixture(scope="module")
def texts():
    """400 documents of 1 to 800 characters, some of them not ASCII."""
    rng = random.Random(0)
    source = "\n".join(python_sources(8)) + "中文文本。" * 500 + "é🙂" * 300
    starts = [rng.randrange(len(source) - 1000) for _ in range(400)]
    return [source[a : a + rng.randrange(1, 800)] for a in starts]


@pytest.fixture
def tool(tmp_path, model):
    """Runs the tool into tmp_path/out; gives its exit code and output."""

    def run(*argv, setup=use_small_blocks, setup_args=()):
        return forked.run(TOOL, arguments(tmp_path, model, argv), tmp_path / "log",
                          setup, setup_args)

    return run


def arguments(folder, model, argv):
    defaults = ["--output-prefix", folder / "out", "--tokenizer-type", "HuggingFaceTokenizer",
                "--tokenizer-model", model, "--workers", 2]
    return [*defaults, *argv]


def write_jsonl(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in texts))
    return path


def read_documents(prefix, codec):
    """The ids of every document, read by Megatron."""
    check_indexed_dataset(prefix, contents=True)
    assert json.loads(Path(f"{prefix}.tokenizer.json").read_text()) == codec.fingerprint
    dataset = IndexedDataset(str(prefix))
    return [
        [dataset[i].tolist() for i in range(a, b)]
        for a, b in zip(dataset.document_indices, dataset.document_indices[1:], strict=False)
    ]


def documents_of(codec, texts, end=()):
    return [[codec.encode(text) + list(end)] for text in texts]


def output_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("out*") if path.is_file()}


def assert_only_final_files(folder):
    assert not (folder / "out.partial").exists()


# -- what is written


@pytest.mark.parametrize("eod", [False, True])
def test_output_is_byte_for_byte_what_megatron_would_write(tool, tmp_path, codec, texts, eod):
    result = tool("--input", write_jsonl(tmp_path / "a.jsonl", texts),
                  *(["--append-eod"] if eod else []))
    assert result.code == 0, result.output
    end = [codec.specials["<eod>"]] if eod else []
    builder = IndexedDatasetBuilder(str(tmp_path / "expected.bin"), dtype=np.uint16)
    for text in texts:
        ids = np.array(codec.encode(text) + end, dtype=np.uint16)
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "expected.idx"))
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"expected{suffix}").read_bytes()
        assert (tmp_path / f"out_text_document{suffix}").read_bytes() == expected
    assert_only_final_files(tmp_path)
    assert f"{len(texts)} documents" in result.output
    assert "B/s" in result.output and "tokens" in result.output


def write_gz(path, data):
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))


def write_zst(path, data):
    frames = (data[:5000], data[5000:])
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in frames))


def write_parquet(path, texts):
    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=150)


def write_inputs(folder, texts):
    """The texts in their order, in five formats."""
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", texts[:50])
    for name, write, part in [("1.jsonl.gz", write_gz, texts[50:100]),
                              ("2.jsonl.zst", write_zst, texts[100:150])]:
        write(folder / name, write_jsonl(folder / "plain", part).read_bytes())
    (folder / "plain").unlink()
    write_parquet(folder / "3.parquet", texts[150:350])
    (folder / "4").mkdir()
    for i, text in enumerate(texts[350:]):
        (folder / "4" / f"{i:03}.txt").write_bytes(text.encode())
    (folder / "passed_over.csv").write_text("not,read")


def test_all_formats_of_a_folder_in_the_order_of_their_names(tool, tmp_path, codec, texts):
    write_inputs(tmp_path / "in", texts)
    result = tool("--input", tmp_path / "in")
    assert result.code == 0, result.output
    expected = documents_of(codec, texts)
    assert read_documents(tmp_path / "out_text_document", codec) == expected


def test_output_does_not_depend_on_workers_or_blocks(tool, tmp_path, texts):
    write_inputs(tmp_path / "in", texts)
    assert tool("--input", tmp_path / "in").code == 0
    first = output_files(tmp_path)
    result = tool("--input", tmp_path / "in", "--workers", 1, "--overwrite", setup=None)
    assert result.code == 0, result.output
    assert output_files(tmp_path) == first


def test_a_folder_may_hold_the_output_too(tool, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text("{broken\n" + path.read_text())
    argv = ["--input", tmp_path, "--max-rejects", 1]
    interrupt(tool, tmp_path, argv)
    assert tool(*argv).code == 0
    assert (tmp_path / "out.rejects.jsonl").exists()
    assert "already complete" in tool(*argv).output


def test_files_and_globs_come_in_the_order_given(tool, tmp_path, codec, texts):
    for name, part in [("b", texts[:5]), ("c1", texts[5:10]), ("a", texts[10:15])]:
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    inputs = [tmp_path / "b.jsonl", tmp_path / "c*.jsonl", tmp_path / "a.jsonl"]
    assert tool("--input", *inputs).code == 0
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, texts[:15])


def test_paragraphs_of_plain_text(tool, tmp_path, codec):
    paragraphs = [f"paragraph {i}\nsecond line " + "x" * (i % 50) * 20 for i in range(200)]
    text = "\n \n" + "".join(p + "\n" * (2 + i % 3) for i, p in enumerate(paragraphs))
    (tmp_path / "a.txt").write_text(text + "\r\n\r\n  last\r\n")
    result = tool("--input", tmp_path / "a.txt", "--text-documents", "blank-line")
    assert result.code == 0, result.output
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, [p.rstrip() for p in paragraphs] + ["  last"])


def test_split_sentences(tool, tmp_path, codec):
    texts = ['It cost 3.50. "Really?" he said. Yes!', "今天很好。我们走吧！好", "one"]
    sentences = [["It cost 3.50.", ' "Really?"', " he said.", " Yes!"],
                 ["今天很好。", "我们走吧！", "好"], ["one"]]
    result = tool("--input", write_jsonl(tmp_path / "a.jsonl", texts), "--split-sentences",
                  "--append-eod")
    assert result.code == 0, result.output
    expected = [[codec.encode(s) for s in parts] for parts in sentences]
    for parts in expected:
        parts[-1].append(codec.specials["<eod>"])
    assert read_documents(tmp_path / "out_text_sentence", codec) == expected


def test_prompts_and_targets_stay_aligned_when_one_is_bad(tool, tmp_path, codec):
    records = [{"inputs": f"question {i}", "targets": f"answer {i}"} for i in range(300)]
    records[7] = {"inputs": "no answer", "targets": ""}
    records[9] = {"inputs": "no targets"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = tool("--input", path, "--json-keys", "inputs", "targets", "--max-rejects", 2)
    assert result.code == 0, result.output
    kept = [r for r in records if r.get("targets")]
    for key in ("inputs", "targets"):
        found = read_documents(tmp_path / f"out_{key}_document", codec)
        assert found == documents_of(codec, [record[key] for record in kept])


def test_large_vocabulary_is_stored_in_32_bits(tmp_path, model, tool):
    tokenizer = json.loads(model.read_text())
    tokenizer["model"]["vocab"] |= {f"filler{i}": 600 + i for i in range(70000)}
    tokenizer["added_tokens"] = []
    big = tmp_path / "big.json"
    big.write_text(json.dumps(tokenizer))
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    result = tool("--input", path, "--tokenizer-model", big, "--append-eod")
    assert result.code == 0, result.output
    codec = build_codec("HuggingFaceTokenizer", big)
    expected = documents_of(codec, ["one", "two"], end=[codec.specials["<eod>"]])
    assert read_documents(tmp_path / "out_text_document", codec) == expected
    assert IndexedDataset(str(tmp_path / "out_text_document")).index.dtype is np.int32


# -- what is bad


def test_rejects_are_listed_with_file_and_line(tool, tmp_path, codec):
    lines = [b'{"text": "good"}', b"", b"{broken", b'{"text": "\xff"}', b'["text"]', b'{"a": 1}',
             b'{"text": 5}', b'{"text": ""}', b'{"text": "\\ud800"}', b"   ", b'{"text": "last"}']
    lines = [b'{"text": "filler %d"}' % i for i in range(300)] + lines
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    result = tool("--input", path, "--max-rejects", 7)
    assert result.code == 0, result.output
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    assert [reject["line"] for reject in rejects] == [303, 304, 305, 306, 307, 308, 309]
    assert {reject["file"] for reject in rejects} == {str(path)}
    reasons = ["not JSON", "not JSON", "JSON list", "no key 'text'", "holds a int", "is empty",
               "not JSON"]
    for reject, reason in zip(rejects, reasons, strict=True):
        assert reason in reject["reason"]
    assert len(read_documents(tmp_path / "out_text_document", codec)) == 302


def test_rejects_of_other_formats(tool, tmp_path, codec):
    table = pyarrow.table({"text": pyarrow.array([b"ok", b"\xff\xfe", None, b""] * 60).cast(
        pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "b.txt").write_bytes(b"bad \xc3")
    (tmp_path / "c.txt").write_bytes(b"")
    inputs = [tmp_path / "a.parquet", tmp_path / "b.txt", tmp_path / "c.txt"]
    result = tool("--input", *inputs, "--max-rejects", 182)
    assert result.code == 0, result.output
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    rows = [r for r in range(1, 241) if r % 4 != 1]
    assert [r["line"] for r in rejects] == [*rows, 1, 1]
    assert len(read_documents(tmp_path / "out_text_document", codec)) == 60


def test_too_many_rejects_stop_the_run_and_a_larger_number_goes_on(tool, tmp_path, codec):
    lines = ['{"text": "good"}' * (1 + i % 10 // 9) for i in range(400)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    for _ in range(2):
        result = tool("--input", path, "--max-rejects", 3)
        assert result.code == 1
        assert "--max-rejects 3: " in result.output
        assert f"{path} line " in result.output
        assert not list(tmp_path.glob("out*.bin"))
    assert tool("--input", path, "--max-rejects", 40).code == 0
    assert len(read_documents(tmp_path / "out_text_document", codec)) == 360


def test_a_document_longer_than_memory_should_hold_is_rejected(tool, tmp_path, codec):
    path = write_jsonl(tmp_path / "a.jsonl", ["first", "x" * 20000, "third", "y" * 9000, "fifth"])
    (tmp_path / "b.txt").write_text("b" * 20000)
    (tmp_path / "c.txt").write_text("short\n\n" + "c\n" * 20000 + "\nend")
    result = tool("--input", path, tmp_path / "b.txt", "--max-rejects", 2,
                  setup=use_small_documents)
    assert result.code == 0, result.output
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    assert [(Path(r["file"]).name, r["line"]) for r in rejects] == [("a.jsonl", 2), ("b.txt", 1)]
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, ["first", "third", "y" * 9000, "fifth"])
    result = tool("--input", tmp_path / "c.txt", "--max-rejects", 1, "--overwrite",
                  "--text-documents", "blank-line", setup=use_small_documents)
    assert result.code == 0, result.output
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, ["short", "end"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "missing.jsonl"], "--input missing.jsonl: no such file"),
        (["--input", "a.csv"], "the suffix '.csv' tells no format"),
        (["--input", "a.jsonl", "a.jsonl"], "given twice"),
        (["--input", "a.jsonl", "--json-keys", "a/b"], "--json-keys a/b"),
        (["--input", "a.txt", "--json-keys", "a", "b"], "plain text has but one"),
        (["--input", "a.jsonl", "--workers", "0"], "--workers 0: at least 1"),
        (["--input", "a.parquet"], "cannot be read to its end"),
        (["--input", "b.parquet"], "--json-keys text: no such column"),
        (["--input", "a.txt"], "holds no documents"),
        (["--input", "a.jsonl", "--text-scheme", "collapsed"], "--text-scheme collapsed with"),
    ],
)
def test_errors_name_the_flag(tool, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.parquet").write_text("PAR1 is not parquet")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "b.parquet")
    argv = [tmp_path / a if (tmp_path / a).exists() else a for a in argv]
    result = tool(*argv, "--max-rejects", 1)
    assert result.code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out*.idx"))


# -- what is interrupted


def test_finished_work_is_not_done_again_and_never_overwritten(tool, tmp_path, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert tool("--input", path).code == 0
    before = output_files(tmp_path)
    assert "already complete" in tool("--input", path).output
    result = tool("--input", path, "--append-eod")
    assert result.code == 1
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


def test_killed_run_leaves_no_worker_behind_and_no_lock(tool, tmp_path, model, texts):
    argv = ["--input", write_jsonl(tmp_path / "a.jsonl", texts)]
    process = forked.start(TOOL, arguments(tmp_path, model, argv), tmp_path / "log", encode_slowly)
    wait_for(lambda: len(workers_of(process.pid)) == 2)
    workers = workers_of(process.pid)
    second = tool(*argv)
    assert second.code == 1
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
    assert process.exitcode == 1
    assert "a worker was killed" in log.read_text()
    assert tool(*argv).code == 0


def interrupt(tool, tmp_path, argv):
    """Kills a run in the middle of its blocks."""
    code = tool(*argv, "--checkpoint-seconds", 0, setup=die_at_call, setup_args=(60,)).code
    assert code == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "state.json").exists()


def test_other_settings_or_inputs_do_not_go_on_with_an_interrupted_run(tool, tmp_path, texts):
    first = write_jsonl(tmp_path / "a.jsonl", texts[:100])
    second = write_jsonl(tmp_path / "b.jsonl", texts[100:])
    interrupt(tool, tmp_path, ["--input", first, second])
    result = tool("--input", first, second, "--append-eod")
    assert result.code == 1
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
    assert result.code == 1
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
    assert result.code == 1
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
    assert result.code == 1
    assert f"--input {second}: cannot be read to its end" in result.output
    state = json.loads((tmp_path / "out.partial" / "state.json").read_text())
    assert state["now"]["cursor"][0] == 1
    assert state["now"]["num_documents"] >= 100
    second.write_bytes(compressed)
    assert tool("--input", first, second).code == 0
    found = read_documents(tmp_path / "out_text_document", codec)
    assert found == documents_of(codec, texts)
